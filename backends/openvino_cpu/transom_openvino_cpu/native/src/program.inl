// Runs a program: an arena of buffers, and the operators over them.
//
// Between two attention operators, every operator processes each token by itself. Many tokens are therefore divided
// into blocks; a thread runs all these operators on one block, so intermediate results stay in its cache. With few
// tokens, operators run one after another, each on all threads.

namespace {
const int BLOCK = MOST;      // rows of a block
const int MANY_ROWS = 32;    // from this many rows on, rows are divided into blocks

struct Engine {
  tr_program program;
  Pool *pool;
  char *copies;        // everything that tr_program points to, except vectors and matrices
  void **cache;        // per layer
  int pages;           // in the cache of each layer
  int vocabulary;      // rows that every embedding has
  size_t local_bytes, acts_bytes, panel_bytes, scratch_bytes;
  size_t *local_at;    // offset of each local buffer in the scratch memory
  float **global;      // per buffer, [global_rows][width]
  int global_rows;
  float *tables;       // cosines and sines of all ropes, [rope][tokens][2 count]
  size_t *table_at;    // per rope: columns before it
  size_t table_width;
  int table_rows;
  char *shared;        // activations, read by all threads
  size_t shared_bytes;
  char *splits, *queries;
  size_t splits_bytes, queries_bytes;
  double *times; // [threads][TIMES_APART] with TR_TIMES entries, or null: not measured
};
const int TIMES_APART = 16; // whole cache lines, so that each thread writes to its own

// Measures the time of a block of code, if times are measured.
struct Clock {
  double *slot, start;
  static double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
  }
  Clock(const Engine *e, int thread, int kind)
      : slot(e->times ? e->times + thread * TIMES_APART + kind : nullptr), start(slot ? now() : 0) {}
  Clock(const Clock &) = delete;
  ~Clock() {
    if (slot)
      *slot += now() - start;
  }
};

struct Rows { // the rows that an operator processes: r0 ... r1 - 1 of the step
  Engine *e;
  const tr_step *step;
  int r0, r1, thread;
  float *local; // buffers of this block; null: all of them are global
  char *acts, *panel, *tile;
};

INLINE float *at(const Rows &w, tr_view v, int row) {
  const tr_buffer &b = w.e->program.buffer[v.buffer];
  if (w.local && b.local)
    return (float *)((char *)w.local + w.e->local_at[v.buffer]) + (size_t)(row - w.r0) * b.width + v.offset;
  return w.e->global[v.buffer] + (size_t)row * b.width + v.offset;
}
INLINE size_t stride(const Rows &w, tr_view v) { return w.e->program.buffer[v.buffer].width; }

static void embed(const Rows &w, const tr_op &o) {
  const tr_matrix &m = w.e->program.matrix[o.matrix];
  const Blocks blocks(m);
  for (int r = w.r0; r < w.r1; r++) {
    const int64_t token = w.step->token[r];
    const char *tile = tile_at(m, (int)(token / 16));
    const int lane = (int)(token % 16);
    float *y = at(w, o.dst, r);
    if (in_blocks(m)) {
      BlockAt block = {tile, 0};
      for (int c = 0; c < m.columns; c += m.block, blocks.next(block)) {
        const float scale = blocks.scale(block, lane), minimum = m.has_minimums ? blocks.minimum(block, lane) : 0;
        for (int j = 0; j < m.block; j++) {
          float x = scale * ((float)quant_at(m, blocks.quants(block), lane, j) - (float)m.zero);
          if (m.has_minimums)
            x += minimum;
          y[c + j] = x * o.scale;
        }
      }
      continue;
    }
    for (int c = 0; c < m.columns; c++) {
      float x;
      if (m.kind == TR_F32)
        x = ((const float *)tile)[c * 16 + lane];
      else if (m.kind == TR_F16)
        x = half_to_float(((const uint16_t *)tile)[c * 16 + lane]);
      else
        x = bf16_to_float(((const uint16_t *)tile)[(c / 2 * 16 + lane) * 2 + c % 2]);
      y[c] = x * o.scale;
    }
  }
}

// Widths are multiples of 16, except for the vocabulary, which only TR_OP_SCALE and TR_OP_SOFTCAP process.
static void norm(const Rows &w, const tr_op &o) {
  const int n = o.width / o.groups;
  for (int r = w.r0; r < w.r1; r++)
    for (int g = 0; g < o.groups; g++) {
      const float *x = at(w, o.a, r) + g * n;
      float *y = at(w, o.dst, r) + g * n;
      VF s = zero();
      for (int j = 0; j < n; j += 16)
        s = fma(load(x + j), load(x + j), s);
      VF inverse = set1(1.f / __builtin_sqrtf(sum(s) / n + o.scale));
      for (int j = 0; j < n; j += 16)
        store(y + j, mul(mul(load(x + j), inverse), load(o.vector + j)));
    }
}

static void elementwise(const Rows &w, const tr_op &o) {
  for (int r = w.r0; r < w.r1; r++) {
    const float *a = at(w, o.a, r), *b = o.b.buffer < 0 ? nullptr : at(w, o.b, r);
    float *y = at(w, o.dst, r);
    for (int j = 0; j < o.width; j += 16) {
      VF x, z;
      float tail[3][16];
      const int left = o.width - j;
      if (left >= 16) {
        x = load(a + j);
        z = b ? load(b + j) : o.vector ? load(o.vector + j) : zero();
      } else {
        for (int i = 0; i < 16; i++) {
          tail[0][i] = i < left ? a[j + i] : 0.f;
          tail[1][i] = i >= left ? 0.f : b ? b[j + i] : o.vector ? o.vector[j + i] : 0.f;
        }
        x = load(tail[0]), z = load(tail[1]);
      }
      switch (o.kind) {
      case TR_OP_ADD:
      case TR_OP_BIAS:
        x = add(x, z);
        break;
      case TR_OP_GLU:
        x = mul(activate(o.act, x), z);
        break;
      case TR_OP_SCALE:
        x = mul(x, set1(o.scale));
        break;
      case TR_OP_SOFTCAP:
        x = mul(set1(o.scale), tanhv(div(x, set1(o.scale))));
        break;
      }
      if (left >= 16)
        store(y + j, x);
      else {
        store(tail[2], x);
        for (int i = 0; i < left; i++)
          y[j + i] = tail[2][i];
      }
    }
  }
}

static void rotate(const Rows &w, const tr_op &o) {
  const tr_rope &rope = w.e->program.rope[o.index];
  const int n = rope.count, dim = o.width / o.groups;
  for (int r = w.r0; r < w.r1; r++) {
    const float *c = w.e->tables + w.e->table_at[o.index] * w.e->table_rows + (size_t)r * 2 * n, *s = c + n;
    for (int g = 0; g < o.groups; g++) {
      float *x = at(w, o.a, r) + g * dim;
      int j = 0;
      for (; j + 16 <= n; j += 16) {
        VF a = load(x + j), b = load(x + n + j), cv = load(c + j), sv = load(s + j);
        store(x + j, sub(mul(a, cv), mul(b, sv)));
        store(x + n + j, fma(b, cv, mul(a, sv)));
      }
      for (; j < n; j++) {
        float a = x[j], b = x[n + j];
        x[j] = a * c[j] - b * s[j];
        x[n + j] = b * c[j] + a * s[j];
      }
    }
  }
}

// Writes the result of a product, y [rows][WIDE * 16], to its destination.
static void finish_linear(const Rows &w, const tr_op &o, int t0, int count, const float *y) {
  const tr_matrix &m = w.e->program.matrix[o.matrix];
  for (int r = w.r0; r < w.r1; r++, y += WIDE * 16) {
    float *d = at(w, o.dst, r);
    if (o.act) {
      for (int x = 0; x < count; x += 2)
        store(d + (t0 + x) * 8, mul(activate(o.act, load(y + 16 * x)), load(y + 16 * x + 16)));
      continue;
    }
    const float *b = o.b.buffer < 0 ? nullptr : at(w, o.b, r);
    for (int x = 0; x < count; x++) {
      const int c = 16 * (t0 + x);
      if (c + 16 <= m.rows) {
        VF v = load(y + 16 * x);
        if (o.vector)
          v = add(v, load(o.vector + c));
        if (b)
          v = add(v, load(b + c));
        store(d + c, v);
      } else
        for (int i = 0; i < m.rows - c; i++)
          d[c + i] = y[16 * x + i] + (o.vector ? o.vector[c + i] : 0.f) + (b ? b[c + i] : 0.f);
    }
  }
}

static void linear_tiles(const Rows &w, const tr_op &o, const Acts &acts, int t0, int t1) {
  const tr_matrix &m = w.e->program.matrix[o.matrix];
  for (int t = t0; t < t1; t += WIDE) {
    int count = t1 - t < WIDE ? t1 - t : WIDE;
    const bool last = o.dst.buffer == w.e->program.output;
    {
      Clock clock(w.e, w.thread, last ? TR_TIME_VOCABULARY : TR_TIME_PRODUCT);
      tiles_of(m, t, count, acts, w.r1 - w.r0, (float *)w.tile, w.panel);
    }
    Clock clock(w.e, w.thread, last ? TR_TIME_VOCABULARY : TR_TIME_FINISH);
    finish_linear(w, o, t, count, (const float *)w.tile);
  }
}

static Acts ready(const Rows &w, const tr_op &o, char *memory) {
  Clock clock(w.e, w.thread, TR_TIME_ROUND);
  return prepare(w.e->program.matrix[o.matrix], o.by, at(w, o.a, w.r0), stride(w, o.a), w.r1 - w.r0, memory);
}

INLINE int tiles(const tr_matrix &m) { return (m.rows + 15) / 16; }

static void run_op(const Rows &w, const tr_op &o) {
  if (o.kind == TR_OP_LINEAR)
    return linear_tiles(w, o, ready(w, o, w.acts), 0, tiles(w.e->program.matrix[o.matrix]));
  Clock clock(w.e, w.thread, o.kind == TR_OP_NORM ? TR_TIME_NORM : o.kind == TR_OP_ROPE ? TR_TIME_ROPE : TR_TIME_ROWS);
  switch (o.kind) {
  case TR_OP_EMBED:
    return embed(w, o);
  case TR_OP_NORM:
    return norm(w, o);
  case TR_OP_ROPE:
    return rotate(w, o);
  default:
    return elementwise(w, o);
  }
}

static Rows rows_of(Engine *e, const tr_step *step, int r0, int r1, int thread, bool local) {
  Rows w = {e, step, r0, r1, thread, nullptr, nullptr, nullptr, nullptr};
  char *p = (char *)pool_scratch(e->pool, thread, e->scratch_bytes);
  if (local)
    w.local = (float *)p;
  p += e->local_bytes;
  w.acts = p, p += e->acts_bytes;
  w.tile = p, p += (size_t)MOST * WIDE * 64;
  w.panel = p;
  return w;
}

// Runs operators first ... last - 1 on rows of the step; none of them reads another token.
static void run_rows(Engine *e, const tr_step *step, int first, int last, int rows) {
  const int threads = pool_threads(e->pool);
  if (rows >= MANY_ROWS) {
    int blocks = (rows + BLOCK - 1) / BLOCK;
    blocks = (blocks + threads - 1) / threads * threads; // so that all threads finish together
    const int whole = TILED ? TILE : 4; // rows that products process at once
    const int each = ((rows + blocks - 1) / blocks + whole - 1) / whole * whole;
    parallel(e->pool, (rows + each - 1) / each, [=](int i, int thread) {
      int r0 = i * each, r1 = r0 + each < rows ? r0 + each : rows;
      Rows w = rows_of(e, step, r0, r1, thread, true);
      for (int x = first; x < last; x++)
        run_op(w, e->program.op[x]);
    });
    return;
  }
  Rows here = rows_of(e, step, 0, rows, 0, false);
  for (int x = first; x < last; x++) {
    const tr_op &o = e->program.op[x];
    if (o.kind != TR_OP_LINEAR) {
      run_op(here, o);
      continue;
    }
    const tr_matrix &m = e->program.matrix[o.matrix];
    const int n = tiles(m);
    Acts acts = ready(here, o, e->shared);
    int each = (n + threads * 4 - 1) / (threads * 4);
    each = each > WIDE ? (each + WIDE - 1) / WIDE * WIDE : each + (each & 1); // even: a gate and its factor
    parallel(e->pool, (n + each - 1) / each, [=, &o, &acts](int i, int thread) {
      Rows w = rows_of(e, step, 0, rows, thread, false);
      linear_tiles(w, o, acts, i * each, (i + 1) * each < n ? (i + 1) * each : n);
    });
  }
}

// Calls f with the format of the program's cache.
template <class F> static auto by_cache(const tr_program &p, F f) {
  return p.cache == TR_CACHE_INT8 ? f(Int8()) : p.cache == TR_CACHE_BF16 ? f(BFloat16()) : f(Float32());
}
// Bytes of one KV head in a page.
template <class C> static size_t head_bytes(const tr_layer &l, bool routed) {
  return tile_bytes<C>(l.head_dim, l.value_dim) + (routed ? node_numbers(l) * sizeof(typename C::Node::T) : 0);
}

template <class C> static size_t route_bytes(const tr_program &p) {
  size_t n = 0;
  for (int i = 0; i < p.layers; i++)
    n += route_head_bytes<C>(p.layer[i]) * p.layer[i].kv_heads;
  return n;
}
template <class C> static RouteView<C> route_of(const Engine *e, const tr_part &part, int layer, int h) {
  char *p = ((Route *)part.route)->memory;
  for (int i = 0; i < layer; i++)
    p += route_head_bytes<C>(e->program.layer[i]) * e->program.layer[i].kv_heads;
  return route_view<C>(p + route_head_bytes<C>(e->program.layer[layer]) * h, e->program.layer[layer]);
}
// Removes the route's columns and queries behind the cached tokens, which belong to another continuation.
template <class C> static void forget_later(Engine *e, const tr_part &part) {
  for (int i = 0; i < e->program.layers; i++)
    for (int h = 0; h < e->program.layer[i].kv_heads; h++) {
      RouteHead &r = *route_of<C>(e, part, i, h).head;
      for (int32_t &p : r.remembered)
        p = p >= part.past ? -1 : p;
      if (r.columns && r.column[r.columns - 1] >= part.past)
        r.columns = r.patches = 0, r.block = -1;
    }
}

INLINE float loose_of(const Engine *e, const tr_sparsity &rule, int layer, int h) {
  if (!rule.heads)
    return 1;
  int at = h;
  for (int i = 0; i < layer; i++)
    at += e->program.layer[i].kv_heads;
  return rule.heads[at];
}

// One of a few single queries in a step: all threads share its pages.
struct Single {
  tr_part part; // of one token
  int keys;     // cached behind the step
  bool sparse;
};

// One layer of one step.
template <class C> struct Attention {
  typedef typename C::Q Q;
  Engine *e;
  const tr_step *step;
  int index;
  const tr_layer &l;
  Heads<C> s;
  int failed = 0; // TR_OK or an error

  Attention(Engine *engine, const tr_step *steps, const tr_op &o)
      : e(engine), step(steps), index(o.index), l(engine->program.layer[o.index]) {
    Rows w = {e, step, 0, step->tokens, 0, nullptr, nullptr, nullptr, nullptr};
    s.layer = &l, s.cache = (char *)e->cache[o.index];
    s.head = head_bytes<C>(l, e->program.routed), s.page = s.head * l.kv_heads, s.group = l.heads / l.kv_heads;
    s.q = at(w, o.a, 0), s.q_stride = stride(w, o.a);
    s.k = at(w, o.b, 0), s.k_stride = stride(w, o.b);
    s.v = at(w, o.c, 0), s.v_stride = stride(w, o.c);
    s.out = at(w, o.dst, 0), s.out_stride = stride(w, o.dst);
  }

  void fail(int error) { __atomic_store_n(&failed, error, __ATOMIC_RELAXED); }
  char *memory(int thread) { return (char *)pool_scratch(e->pool, thread, e->scratch_bytes); }
  // Whether a policy may skip keys in this part.
  bool sparse(const tr_part &part) const {
    return part.sparsity && part.route && part.past + part.count > part.sparsity->dense_below;
  }
  static int pages_of(const tr_part &p) { return (p.past + p.count - 1) / PAGE - p.past / PAGE + 1; }
  // Chunks are processed in blocks of 64 queries, other queries one by one.
  bool chunk(const tr_part &p) const { return p.count >= COLUMN_ROWS || (p.count > 1 && !sparse(p)); }

  int run() {
    append_all();
    for (int x = 0; x < step->parts && !failed; x++) {
      const tr_part &part = step->part[x];
      if (part.count >= COLUMN_ROWS && part.route) {
        if (sparse(part))
          choose_columns_of_chunk(part);
        remember_chunk(part);
      }
    }
    if (!failed)
      run_singles();
    if (!failed)
      run_chunks();
    return failed;
  }

  // First writes the keys and values of all parts to their pages; a task is one page of one head.
  void append_all() {
    int tasks = 0;
    for (int x = 0; x < step->parts; x++)
      tasks += pages_of(step->part[x]) * l.kv_heads;
    auto task = [&](int i, int thread) {
      Clock clock(e, thread, TR_TIME_CACHE);
      const int h = i % l.kv_heads;
      int page = i / l.kv_heads;
      for (int x = 0; x < step->parts; x++) {
        const tr_part &part = step->part[x];
        if (page >= pages_of(part)) {
          page -= pages_of(part);
          continue;
        }
        const int p0 = (part.past / PAGE + page) * PAGE, p1 = p0 + PAGE, end = part.past + part.count;
        if (!append<C>(s, part, h, p0 < part.past ? part.past : p0, p1 < end ? p1 : end, e->program.routed, memory(thread)))
          fail(TR_NOT_FINITE);
        return;
      }
    };
    if (step->tokens <= 4)
      for (int i = 0; i < tasks; i++)
        task(i, 0);
    else
      parallel(e->pool, tasks, task);
  }

  // Selects columns by `count` queries [kv_heads][count][group][head_dim] at ascending positions.
  void choose_columns_from(const tr_part &part, const Q *queries, const int32_t *position, int count) {
    const tr_sparsity &rule = *part.sparsity;
    const int n = (position[count - 1] / PAGE + 1) * PAGE, shares = count < 4 ? 1 : 4;
    const size_t each = (size_t)s.group * C::query_width(l.head_dim);
    if (!rule.columns)
      return;
    char *m = big((size_t)l.kv_heads * shares * n * 4);
    if (!m)
      return;
    float *mass = (float *)m;
    parallel(e->pool, l.kv_heads * shares, [&](int i, int thread) {
      Clock clock(e, thread, TR_TIME_COLUMNS);
      const int h = i / shares, share = i % shares;
      float *own = mass + (size_t)i * n;
      __builtin_memset(own, 0, (size_t)n * 4);
      if (loose_of(e, rule, index, h) == 0)
        return;
      float *x = (float *)memory(thread);
      for (int r = share; r < count; r += shares)
        column_mass<C>(s, part, h, queries + ((size_t)h * count + r) * each, position[r],
                       far_end(position[r], rule.local), x, own);
    });
    parallel(e->pool, l.kv_heads, [&](int h, int thread) {
      Clock clock(e, thread, TR_TIME_COLUMNS);
      if (loose_of(e, rule, index, h) == 0)
        return;
      RouteView<C> v = route_of<C>(e, part, index, h);
      float *all = mass + (size_t)h * shares * n;
      for (int x = 1; x < shares; x++)
        for (int j = 0; j < n; j += 16)
          store(all + j, add(load(all + j), load(all + (size_t)x * n + j)));
      v.head->columns = choose_columns(all, n, rule.columns, v.head->column);
      v.head->block = (part.past + part.count - 1) / PAGE;
      gather_columns(s, part, h, v);
    });
  }

  void choose_columns_of_chunk(const tr_part &part) {
    const size_t each = (size_t)s.group * C::query_width(l.head_dim);
    Q *queries = (Q *)few(l.kv_heads * COLUMN_ROWS * each * sizeof(Q));
    if (!queries)
      return;
    int32_t position[COLUMN_ROWS];
    for (int j = 0; j < COLUMN_ROWS; j++) {
      position[j] = part.past + (int)((int64_t)(j + 1) * part.count / COLUMN_ROWS) - 1;
      for (int h = 0; h < l.kv_heads; h++)
        load_queries<C, C>(s, part.begin + position[j] - part.past, 1, h, query_factor(l),
                        queries + ((size_t)h * COLUMN_ROWS + j) * each);
    }
    choose_columns_from(part, queries, position, COLUMN_ROWS);
  }

  // Remembers every fourth of the last 64 queries, for selecting columns while decoding.
  void remember(const tr_part &part, int h, int position) {
    RouteView<C> v = route_of<C>(e, part, index, h);
    const int slot = position / 4 % COLUMN_ROWS;
    v.head->remembered[slot] = position;
    load_queries<C, C>(s, part.begin + position - part.past, 1, h, query_factor(l),
                    v.ring + (size_t)slot * s.group * C::query_width(l.head_dim));
  }
  void remember_chunk(const tr_part &part) {
    const int end = part.past + part.count;
    for (int p = end - PAGE > part.past ? end - PAGE : part.past; p < end; p++)
      if (p % 4 == 3)
        for (int h = 0; h < l.kv_heads; h++)
          remember(part, h, p);
  }

  // The columns of a single query: selected again in each block of 64, by the remembered queries.
  void refresh_columns(const tr_part &part) {
    bool stale = false;
    for (int h = 0; h < l.kv_heads; h++)
      stale |= route_of<C>(e, part, index, h).head->block != part.past / PAGE && loose_of(e, *part.sparsity, index, h) > 0;
    if (!stale)
      return;
    const size_t each = (size_t)s.group * C::query_width(l.head_dim);
    Q *queries = (Q *)few(l.kv_heads * COLUMN_ROWS * each * sizeof(Q));
    if (!queries)
      return;
    const RouteHead &first = *route_of<C>(e, part, index, 0).head;
    int32_t position[COLUMN_ROWS];
    int slots[COLUMN_ROWS], count = 0;
    for (int p = part.past - PAGE > 0 ? part.past - PAGE : 0; p < part.past; p++)
      if (p % 4 == 3 && first.remembered[p / 4 % COLUMN_ROWS] == p)
        slots[count] = p / 4 % COLUMN_ROWS, position[count++] = p;
    if (count)
      for (int h = 0; h < l.kv_heads; h++)
        for (int r = 0; r < count; r++)
          __builtin_memcpy(queries + ((size_t)h * count + r) * each,
                           route_of<C>(e, part, index, h).ring + slots[r] * each, each * sizeof(Q));
    else {
      position[0] = part.past, count = 1;
      for (int h = 0; h < l.kv_heads; h++)
        load_queries<C, C>(s, part.begin, 1, h, query_factor(l), queries + h * each);
    }
    choose_columns_from(part, queries, position, count);
  }

  // Memory of the whole step, in two sizes, each in use at most once at a time.
  char *few(size_t bytes) { return grown(e->queries, e->queries_bytes, bytes); }
  char *big(size_t bytes) { return grown(e->splits, e->splits_bytes, bytes); }
  char *grown(char *&p, size_t &has, size_t bytes) {
    if (has < bytes) {
      free(p);
      has = 0;
      if (posix_memalign((void **)&p, 64, bytes)) {
        p = nullptr;
        fail(TR_NO_MEMORY);
        return nullptr;
      }
      has = bytes;
    }
    return p;
  }

  void run_singles() {
    int count = 0;
    for (int x = 0; x < step->parts; x++)
      if (!chunk(step->part[x]))
        count += step->part[x].count;
    if (!count)
      return;
    Single *singles = (Single *)malloc(sizeof(Single) * count);
    if (!singles)
      return fail(TR_NO_MEMORY);
    bool any = false;
    count = 0;
    for (int x = 0; x < step->parts; x++) {
      const tr_part &part = step->part[x];
      if (chunk(part))
        continue;
      for (int t = 0; t < part.count; t++) {
        Single &one = singles[count++];
        one.part = part, one.keys = part.past + part.count;
        one.part.begin += t, one.part.past += t, one.part.count = 1;
        one.sparse = sparse(one.part);
        any |= one.part.route != nullptr;
      }
    }
    // Queries of one sequence run one after another, since each may read the state that the previous one left.
    if (!any)
      attend_singles(singles, count);
    else
      for (int x = 0; x < count && !failed; x++) {
        const tr_part &part = singles[x].part;
        if (singles[x].sparse)
          refresh_columns(part);
        if (!failed)
          attend_singles(singles + x, 1);
        if (!failed && part.route && part.past % 4 == 3)
          for (int h = 0; h < l.kv_heads; h++)
            remember(part, h, part.past);
      }
    free(singles);
  }

  // Threads share the spans of a query, or the items of its plan.
  void attend_singles(const Single *singles, int count) {
    const int threads = pool_threads(e->pool), tasks = count * l.kv_heads;
    int most = 1; // spans of a query
    for (int x = 0; x < count; x++) {
      const int n = spans_of(l, singles[x].part.past).count;
      most = n > most ? n : most;
    }
    int splits = (2 * threads + tasks - 1) / tasks;
    splits = splits > most ? most : splits;
    const size_t share_bytes = align64((size_t)s.group * C::query_width(l.head_dim) * sizeof(Q)) +
                               result_bytes(l, (size_t)s.group);
    size_t choice = align64(sizeof(Plan));
    for (int x = 0; x < count; x++)
      if (singles[x].sparse) {
        const size_t n = align64(sizeof(Plan)) +
                         plan_block_bytes<C>(l, *singles[x].part.sparsity, (singles[x].keys - 1) / PAGE + 1, 1);
        choice = n > choice ? n : choice;
      }
    char *m = big((share_bytes * most + choice) * tasks);
    if (!m)
      return;
    auto share = [&](int task, int x) {
      char *p = m + share_bytes * ((size_t)task * most + x);
      Q *q;
      return gathered_in<C>(p, l, s.group, q);
    };
    auto plan_at = [&](int task) { return m + share_bytes * most * tasks + choice * task; };
    auto routed = [&](int task) {
      const Single &one = singles[task / l.kv_heads];
      return one.sparse && loose_of(e, *one.part.sparsity, index, task % l.kv_heads) > 0;
    };
    bool any = false;
    for (int i = 0; i < tasks; i++)
      any |= routed(i);
    if (any)
      parallel(e->pool, tasks, [&](int i, int thread) {
        Clock clock(e, thread, TR_TIME_ROUTE);
        if (!routed(i))
          return;
        const tr_part &part = singles[i / l.kv_heads].part;
        const int h = i % l.kv_heads;
        RouteView<C> v = route_of<C>(e, part, index, h);
        Plan *plan = (Plan *)plan_at(i);
        if (!plan_block(s, part, h, part.past, part.past + 1, singles[i / l.kv_heads].keys, *part.sparsity,
                        loose_of(e, *part.sparsity, index, h), v, *plan, plan_at(i) + align64(sizeof(Plan)),
                        &v.head->read, &v.head->seen))
          fail(TR_NOT_FINITE);
      });
    if (failed)
      return;
    parallel(e->pool, tasks * splits, [&](int i, int thread) {
      Clock clock(e, thread, TR_TIME_ATTEND);
      const int split = i % splits, task = i / splits, h = task % l.kv_heads;
      const tr_part &part = singles[task / l.kv_heads].part;
      if (!routed(task)) {
        const Spans spans = spans_of(l, part.past);
        const int begin = spans.count * split / splits, end = spans.count * (split + 1) / splits;
        const Q *q = share(task, begin).q;
        if (begin < end)
          load_queries<C, C>(s, part.begin, 1, h, query_factor(l), (Q *)q);
        for (int x = end - 1; x >= begin; x--) {
          Gathered<C> g = share(task, x);
          g.q = q;
          attend_span<C>(s, part, h, spans, x, spans.begin(begin), g);
        }
        return;
      }
      const Plan &plan = *(const Plan *)plan_at(task);
      const Gathered<C> g = share(task, split);
      load_queries<C, C>(s, part.begin, 1, h, query_factor(l), (Q *)g.q);
      begin_rows(s, g, s.group, h, split == splits - 1);
      RouteView<C> v = route_of<C>(e, part, index, h);
      char *buffer = memory(thread);
      int32_t position[64];
      uint64_t mask[64];
      for (int r = 0; r < s.group; r++)
        position[r] = part.past;
      const int unit = part.sparsity->unit, items = plan_items(plan, unit);
      for (int x = items * split / splits; x < items * (split + 1) / splits; x++)
        attend_tile<C>(l, plan_tile<C>(s, part, h, plan, unit, &v, x, position, s.group, buffer, mask), g, s.group);
    });
    for (int i = 0; i < tasks; i++) {
      const tr_part &part = singles[i / l.kv_heads].part;
      const int last = (routed(i) ? splits : spans_of(l, part.past).count) - 1;
      const Gathered<C> g = share(i, last);
      for (int x = last - 1; x >= 0; x--)
        add_span<C>(l, g, share(i, x), s.group);
      if (!write_rows<C>(s, g, part.begin, i % l.kv_heads, s.group))
        fail(TR_NOT_FINITE);
      if (part.route && !routed(i))
        count_all(part, i % l.kv_heads, part.past);
    }
  }

  void count_all(const tr_part &part, int h, int position) {
    const int start = l.window && position - l.window + 1 > 0 ? position - l.window + 1 : 0;
    RouteHead &r = *route_of<C>(e, part, index, h).head;
    r.read += position + 1 - start, r.seen += position + 1 - start;
  }

  // Chunks: blocks of 64 queries, the longest first.
  void run_chunks() {
    int blocks = 0;
    for (int x = 0; x < step->parts; x++)
      if (chunk(step->part[x]))
        blocks += pages_of(step->part[x]);
    double *counts = nullptr; // read and seen per task, since several threads count for a head
    if (e->program.routed && blocks) {
      counts = (double *)big((size_t)blocks * l.kv_heads * 16);
      if (!counts)
        return;
    }
    auto find = [&](int block, int &p0, int &p1) -> const tr_part & {
      for (int x = 0;; x++) {
        const tr_part &part = step->part[x];
        if (!chunk(part))
          continue;
        const int n = pages_of(part);
        if (block >= n) {
          block -= n;
          continue;
        }
        const int end = part.past + part.count;
        p0 = (part.past / PAGE + n - 1 - block) * PAGE, p1 = p0 + PAGE;
        p0 = p0 < part.past ? part.past : p0, p1 = p1 < end ? p1 : end;
        return part;
      }
    };
    parallel(e->pool, blocks * l.kv_heads, [&](int i, int thread) {
      const int h = i % l.kv_heads;
      int p0, p1;
      const tr_part &part = find(i / l.kv_heads, p0, p1);
      double *count = counts ? counts + 2 * i : nullptr;
      const int start = l.window && p0 - l.window + 1 > 0 ? p0 - l.window + 1 : 0;
      if (count)
        count[0] = count[1] = p1 - start;
      const float loose = sparse(part) ? loose_of(e, *part.sparsity, index, h) : 0.f;
      char *m = memory(thread);
      if (!(loose > 0)) {
        Clock clock(e, thread, TR_TIME_ATTEND);
        if (!attend_dense<C>(s, part, h, p0, p1, m))
          fail(TR_NOT_FINITE);
        return;
      }
      RouteView<C> v = route_of<C>(e, part, index, h);
      Plan plan;
      double read = 0, all = 0;
      bool fine;
      {
        Clock clock(e, thread, TR_TIME_ROUTE);
        fine = plan_block(s, part, h, p0, p1, part.past + part.count, *part.sparsity, loose, v, plan,
                          m + attend_plan_bytes<C>(l), &read, &all);
      }
      if (fine) {
        Clock clock(e, thread, TR_TIME_ATTEND);
        fine = attend_plan<C>(s, part, h, p0, p1, plan, part.sparsity->unit, v, m);
      }
      if (!fine)
        fail(TR_NOT_FINITE);
      if (count)
        count[0] = read, count[1] = all;
    });
    if (!counts || failed)
      return;
    for (int i = 0; i < blocks * l.kv_heads; i++) {
      int p0, p1;
      const tr_part &part = find(i / l.kv_heads, p0, p1);
      if (part.route) { // all queries of a block have the same counts
        RouteHead &r = *route_of<C>(e, part, index, i % l.kv_heads).head;
        r.read += counts[2 * i] * (p1 - p0), r.seen += counts[2 * i + 1] * (p1 - p0);
      }
    }
  }
};

// Bytes that one thread needs for attention in this step.
template <class C> static size_t attention_bytes(const Engine *e, const tr_step *step) {
  size_t most = 0;
  for (int i = 0; i < e->program.layers; i++) {
    const tr_layer &l = e->program.layer[i];
    size_t n = attend_plan_bytes<C>(l);
    n = n < make_nodes_bytes(l.head_dim) ? make_nodes_bytes(l.head_dim) : n;
    for (int x = 0; x < step->parts; x++) {
      const tr_part &part = step->part[x];
      if (!part.sparsity)
        continue;
      const int pages = (part.past + part.count - 1) / PAGE + 1;
      const size_t plan = attend_plan_bytes<C>(l) + plan_block_bytes<C>(l, *part.sparsity, pages, PAGE);
      const size_t row = (size_t)pages * PAGE * 4 * TOGETHER + 64;
      n = plan > n ? plan : n;
      n = row > n ? row : n;
    }
    most = n > most ? n : most;
  }
  return most;
}

static bool grow(Engine *e, int rows, int tokens) {
  if (rows > e->global_rows) {
    for (int b = 0; b < e->program.buffers; b++)
      if (b != e->program.output) {
        free(e->global[b]);
        e->global[b] = nullptr;
      }
    e->global_rows = 0;
    for (int b = 0; b < e->program.buffers; b++) {
      if (b == e->program.output)
        continue;
      const tr_buffer &buffer = e->program.buffer[b];
      // Local buffers are global if there are too few rows for blocks.
      size_t n = buffer.local ? (MANY_ROWS < rows ? MANY_ROWS : rows) : rows;
      if (posix_memalign((void **)&e->global[b], 64, align64(n * buffer.width * 4 + 64))) {
        e->global[b] = nullptr;
        return false;
      }
    }
    e->global_rows = rows;
  }
  if (tokens > e->table_rows && e->table_width) {
    free(e->tables);
    e->table_rows = 0;
    if (posix_memalign((void **)&e->tables, 64, align64(e->table_width * tokens * 4))) {
      e->tables = nullptr;
      return false;
    }
    e->table_rows = tokens;
  }
  return true;
}

static void make_tables(Engine *e, const tr_step *step) {
  const int ropes = e->program.ropes, each = 64;
  parallel(e->pool, (step->tokens + each - 1) / each, [=](int i, int) {
    const int last = (i + 1) * each < step->tokens ? (i + 1) * each : step->tokens;
    for (int x = 0; x < step->parts; x++) {
      const tr_part &part = step->part[x];
      int row = part.begin > i * each ? part.begin : i * each;
      for (; row < part.begin + part.count && row < last; row++)
        for (int y = 0; y < ropes; y++) {
          const tr_rope &rope = e->program.rope[y];
          float *table = e->tables + e->table_at[y] * e->table_rows + (size_t)row * 2 * rope.count;
          for (int j = 0; j < rope.count; j++) {
            const float angle = (float)(part.past + row - part.begin) * rope.frequencies[j]; // float, as in the graph
            table[j] = (float)cos((double)angle) * rope.factor;
            table[rope.count + j] = (float)sin((double)angle) * rope.factor;
          }
        }
    }
  });
}

// Whether everything that the step points to lies in the engine's memory. Looks at each token and page once, which is
// nothing beside computing them.
static bool step_fits(const Engine *e, const tr_step *step) {
  if (step->tokens < 1 || step->parts < 1 || step->rows < 0)
    return false;
  for (int i = 0; i < e->program.layers; i++)
    if (!e->cache[i])
      return false;
  int64_t begin = 0;
  for (int x = 0; x < step->parts; x++) {
    const tr_part &part = step->part[x];
    if (part.begin != begin || part.count < 1 || part.past < 0 || (part.sparsity && !part.route))
      return false;
    begin += part.count;
    const int64_t end = (int64_t)part.past + part.count;
    if (begin > step->tokens || end > INT32_MAX - PAGE || part.pages < (end + PAGE - 1) / PAGE)
      return false;
    for (int i = 0; i < part.pages; i++)
      if (part.page[i] < 0 || part.page[i] >= e->pages)
        return false;
  }
  if (begin != step->tokens)
    return false;
  for (int i = 0; i < step->tokens; i++)
    if (step->token[i] < 0 || step->token[i] >= e->vocabulary)
      return false;
  for (int i = 0; i < step->rows; i++)
    if (step->row[i] < 0 || step->row[i] >= step->tokens)
      return false;
  return true;
}

static int32_t run(Engine *e, const tr_step *step, int32_t *layer) {
  *layer = -1;
  const tr_program &p = e->program;
  if (!step_fits(e, step))
    return TR_BAD_STEP;
  if (!grow(e, step->tokens > step->rows ? step->tokens : step->rows, step->tokens))
    return TR_NO_MEMORY;
  const size_t attention = by_cache(p, [&](auto c) { return attention_bytes<decltype(c)>(e, step); });
  const size_t scratch = attention > e->scratch_bytes ? attention : e->scratch_bytes;
  for (int x = 0; x < step->parts; x++)
    if (step->part[x].route)
      by_cache(p, [&](auto c) { forget_later<decltype(c)>(e, step->part[x]); });
  for (int t = 0; t < pool_threads(e->pool); t++)
    if (!pool_scratch(e->pool, t, scratch))
      return TR_NO_MEMORY;
  e->scratch_bytes = scratch; // only now: a step that asks for more than there is must not fail those after it
  e->global[p.output] = step->logits;
  make_tables(e, step);
  int rows = step->tokens, first = 0;
  for (int x = 0; x <= p.ops; x++) {
    const int kind = x < p.ops ? p.op[x].kind : -1;
    if (x < p.ops && kind != TR_OP_ATTEND && kind != TR_OP_ROWS)
      continue;
    if (rows)
      run_rows(e, step, first, x, rows);
    first = x + 1;
    if (kind == TR_OP_ATTEND) {
      const int failed = by_cache(p, [&](auto c) { return Attention<decltype(c)>(e, step, p.op[x]).run(); });
      if (failed) {
        *layer = p.op[x].index;
        return failed;
      }
    } else if (kind == TR_OP_ROWS) {
      const tr_op &o = p.op[x];
      Rows w = {e, step, 0, step->tokens, 0, nullptr, nullptr, nullptr, nullptr};
      for (int r = 0; r < step->rows; r++)
        __builtin_memcpy(at(w, o.dst, r), at(w, o.a, step->row[r]), (size_t)o.width * 4);
      rows = step->rows;
    }
  }
  // A NaN after the last attention would not show anywhere else.
  int damaged = 0;
  parallel(e->pool, step->rows, [&](int r, int) {
    if (!finite(step->logits + (size_t)r * p.buffer[p.output].width, p.buffer[p.output].width))
      __atomic_store_n(&damaged, 1, __ATOMIC_RELAXED);
  });
  return damaged ? TR_NOT_FINITE : TR_OK;
}
} // namespace

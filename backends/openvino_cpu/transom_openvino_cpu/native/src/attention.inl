// Attention over a paged cache: grouped queries, causal, online softmax over tiles of 64 keys.
//
// Online softmax: Milakov and Gimelshein 2018 (arXiv:1805.02867); tiling: Dao 2023 (arXiv:2307.08691).

namespace {
const float NEVER = -1e30f;
const float SLACK = 8; // unnormalized probabilities stay below 2 ** 8
const int SPAN = 4;    // pages that a span has at least, see Spans
const int MOST_SPANS = 16;

// One layer of one step.
template <class C> struct Heads {
  const tr_layer *layer;
  char *cache;
  size_t page, head; // bytes of a page, and of one KV head in it
  int group;         // query heads of a KV head
  const float *q, *k, *v;
  size_t q_stride, k_stride, v_stride;
  float *out;
  size_t out_stride;
  char *place(int32_t p, int h) const { return cache + p * page + h * head; }
  Kept<C> tile(int32_t p, int h) const { return kept_at<C>(place(p, h), layer->head_dim, layer->value_dim); }
  // Pages for sparse attention have routing nodes behind the values: means, then variances.
  typename C::Node::T *nodes(int32_t p, int h) const {
    return (typename C::Node::T *)(place(p, h) + tile_bytes<C>(layer->head_dim, layer->value_dim));
  }
};

// A tile of keys and values. `mask` has a bit for each key that is visible to a row: one word per row, or one word for
// all rows (`step` 0), or null if every row sees every key.
template <class C> struct Tile {
  Kept<C> kept;
  const uint64_t *mask;
  int step;
};

// Rows of queries with their running results: output [rows][value_dim], sums by lane, and the reference exponent of
// both. The reference is near the running maximum, and is moved only if the maximum exceeds it by `SLACK`.
template <class C> struct Gathered {
  const typename C::Q *q; // [rows][query_width], times scale (and log2 e if there is no soft cap)
  float *out, *most, *sums;
};

// AMX adds in an order of its own: no row of bfloat16 does without, while sums of bytes are exact in any order.
template <class C, int R> constexpr bool in_tiles() { return TILED && C::P > 1 && !C::SCALED; }

// Logits of one row of queries to probabilities, relative to the row's reference; overwrites `a`.
template <class C> INLINE void soften(const tr_layer &l, const Tile<C> &t, const Gathered<C> &g, int row, VF (&a)[4]) {
  const int DV = l.value_dim;
  if (l.softcap > 0) {
    const VF cap = set1(l.softcap * LOG2E);
    for (int c = 0; c < 4; c++)
      a[c] = mul(cap, tanhv(a[c]));
  }
  if (t.mask) {
    uint64_t m = t.mask[row * t.step];
    for (int c = 0; c < 4; c++)
      a[c] = pick((unsigned)(m >> (16 * c)) & 0xffff, a[c], set1(NEVER));
  }
  float *sums = g.sums + (size_t)row * 16, *out = g.out + (size_t)row * DV;
  const VF highest = max(max(a[0], a[1]), max(a[2], a[3]));
  const float before = g.most[row];
  if (at_least(highest, set1(before + SLACK))) {
    const float now = top(highest);
    const VF keep = exp2v(set1(before - now));
    g.most[row] = now;
    store(sums, mul(load(sums), keep));
    for (int d = 0; d < DV; d += 16)
      store(out + d, mul(load(out + d), keep));
  }
  VF m = set1(g.most[row]), s = load(sums);
  for (int c = 0; c < 4; c++) {
    a[c] = C::exp2(sub(a[c], m));
    s = add(s, a[c]);
  }
  store(sums, s);
}

template <class C, int R>
INLINE void attend_rows(const tr_layer &l, const Tile<C> &t, const Gathered<C> &g, int row) {
  VF a[R][4];
  C::template scores<R, in_tiles<C, R>()>(g.q + (size_t)row * C::query_width(l.head_dim), l.head_dim, t.kept, a);
  for (int r = 0; r < R; r++)
    soften(l, t, g, row + r, a[r]);
  C::template weigh<R>(a, t.kept, g.out + (size_t)row * l.value_dim, l.value_dim);
}

// int8 in AMX tiles: blocks of sixteen rows as far as there are any; returns the first of the other rows. While one
// block's logits become probabilities, the tiles multiply the next block's queries and the block before's probabilities.
template <class C> static int attend_in_tiles(const tr_layer &l, const Tile<C> &t, const Gathered<C> &g, int rows) {
  const int D = l.head_dim, DV = l.value_dim, width = C::query_width(D), blocks = rows / TILE;
  if (!blocks)
    return 0;
  Tiles tiles(tile_step(D));
  VI s[2][TILE][4], sums[TILE * 256 / 16];
  VF back[2][TILE];
  alignas(64) int8_t p[2][TILE * 64];
  auto multiply = [&](int block) {
    tile_scores<SignedUnsigned>(g.q + (size_t)block * TILE * width, width, D, t.kept.k, s[block & 1]);
  };
  auto weigh = [&](int block) { // to sums [DV / 16][TILE]
    const char *v = (const char *)t.kept.v;
    const size_t apart = (size_t)DV * 4;
    tile_load<6>(p[block & 1], 64);
    int d = 0;
    for (; d + 64 <= DV; d += 64) {
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
      tile_products<UnsignedSigned, 6, 7>(v + (size_t)d * 4, apart);
      VI *to = sums + d;
      tile_store<0>(to, 64), tile_store<1>(to + 16, 64), tile_store<2>(to + 32, 64), tile_store<3>(to + 48, 64);
    }
    for (; d < DV; d += 16) {
      tile_zero<0>(), tile_load<7>(v + (size_t)d * 4, apart), UnsignedSigned::product<0, 6, 7>();
      tile_store<0>(sums + d, 64);
    }
  };
  auto add = [&](int block) {
    float *out = g.out + (size_t)block * TILE * DV;
    for (int r = 0; r < TILE; r++, out += DV)
      for (int d = 0; d < DV; d += 16)
        store(out + d, fma(to_float(sums[d + r]), back[block & 1][r], load(out + d)));
  };
  multiply(0);
  for (int block = 0; block <= blocks; block++) {
    if (block + 1 < blocks)
      multiply(block + 1);
    if (block)
      weigh(block - 1);
    if (block < blocks)
      for (int r = 0; r < TILE; r++) {
        const int row = block * TILE + r;
        const typename C::Q *q = g.q + (size_t)row * width;
        VF a[4];
        VI(&own)[4] = s[block & 1][r];
        const VI start = C::start(q, D);
        for (int c = 0; c < 4; c++)
          own[c] = iadd(own[c], start);
        C::logits(own, q, D, t.kept, a);
        soften(l, t, g, row, a);
        back[block & 1][r] = C::to_bytes_of(a, t.kept, p[block & 1] + r * 64);
      }
    if (block)
      add(block - 1);
  }
  return blocks * TILE;
}

// Rows from r on, R at once, as long as there are R left; returns the first of the others.
template <class C, int R>
INLINE int attend_some(const tr_layer &l, const Tile<C> &t, const Gathered<C> &g, int r, int rows) {
  if constexpr (in_tiles<C, R>()) {
    if (r + R > rows)
      return r;
    Tiles tiles(tile_step(l.head_dim * sizeof(typename C::Q)), R);
    for (; r + R <= rows; r += R)
      attend_rows<C, R>(l, t, g, r);
  } else
    for (; r + R <= rows; r += R)
      attend_rows<C, R>(l, t, g, r);
  return r;
}

template <class C> static void attend_tile(const tr_layer &l, const Tile<C> &t, const Gathered<C> &g, int rows) {
  int r = 0;
  if constexpr (TILED && C::SCALED)
    r = attend_in_tiles<C>(l, t, g, rows);
  else if constexpr (TILED && C::P > 1)
    r = attend_some<C, TILE>(l, t, g, r, rows);
  r = attend_some<C, ROWS>(l, t, g, r, rows);
  if constexpr (ROWS > 3)
    r = attend_some<C, 3>(l, t, g, r, rows);
  attend_some<C, 1>(l, t, g, r, rows);
}

// The pages that a query reads are divided into spans. Each span has a softmax of its own, and `add_span` adds them up
// from the last to the first. The spans follow from the query's position alone, so its result does too, whatever it
// shares a step with and however many threads divide the spans among them.
struct Spans {
  int first, last, count; // pages; spans
  int begin(int span) const { return first + (int)((int64_t)(last - first + 1) * span / count); }
};
INLINE Spans spans_of(const tr_layer &l, int position) {
  // The first page that any query in the page of this one sees.
  const int last = position / PAGE, start = l.window ? last * PAGE - l.window + 1 : 0;
  const int first = start > 0 ? start / PAGE : 0, count = (last - first + SPAN) / SPAN;
  return {first, last, count < MOST_SPANS ? count : MOST_SPANS};
}

template <class C> static void add_span(const tr_layer &l, const Gathered<C> &to, const Gathered<C> &span, int rows) {
  for (int row = 0; row < rows; row += 16) {
    float own[16], its[16];
    const VF a = load(to.most + row), b = load(span.most + row), most = max(a, b);
    store(own, exp2v(sub(a, most))), store(its, exp2v(sub(b, most))), store(to.most + row, most);
    for (int r = row; r < row + 16 && r < rows; r++) {
      const VF x = set1(own[r - row]), y = set1(its[r - row]);
      store(to.sums + r * 16, fma(load(span.sums + r * 16), y, mul(load(to.sums + r * 16), x)));
      float *out = to.out + (size_t)r * l.value_dim;
      const float *from = span.out + (size_t)r * l.value_dim;
      for (int d = 0; d < l.value_dim; d += 16)
        store(out + d, fma(load(from + d), y, mul(load(out + d), x)));
    }
  }
}

// Writes the results of `rows` rows, of consecutive queries from the step's row `row` on. Returns false if a sum is not
// finite.
template <class C> static bool write_rows(const Heads<C> &s, const Gathered<C> &g, size_t row, int h, int rows) {
  const int DV = s.layer->value_dim;
  bool fine = true;
  for (int r = 0; r < rows; r++) {
    float total = sum(load(g.sums + r * 16));
    fine &= total > 0 && total < 1e30f;
    VF inverse = set1(1.f / total);
    float *out = s.out + (row + r / s.group) * s.out_stride + (size_t)(h * s.group + r % s.group) * DV;
    for (int d = 0; d < DV; d += 16)
      store(out + d, mul(load(g.out + (size_t)r * DV + d), inverse));
  }
  return fine;
}

template <class C> // routing.inl
static void make_nodes(const Kept<C> &tile, int dim, typename C::Node::T *nodes, char *memory);
INLINE size_t make_nodes_bytes(int dim) { return (size_t)dim * PAGE * 4; } // size of `memory`

// Writes the new keys and values of one KV head to one page: positions p0 ... p1 - 1 of a part whose row 0 has position
// `past`. Returns false if a number is not finite.
template <class C>
static bool append(const Heads<C> &s, const tr_part &part, int h, int p0, int p1, bool routed, char *memory) {
  const int D = s.layer->head_dim, DV = s.layer->value_dim, page = part.page[p0 / PAGE];
  const Kept<C> tile = s.tile(page, h);
  if (p0 % PAGE == 0) // a reused page may contain NaN, and 0 times its contents must be 0
    __builtin_memset(s.place(page, h), 0, tile_bytes<C>(D, DV));
  const size_t row = part.begin + p0 - part.past;
  const float *k = s.k + row * s.k_stride + (size_t)h * D, *v = s.v + row * s.v_stride + (size_t)h * DV;
  const int t0 = p0 % PAGE, end = t0 + p1 - p0;
  bool fine = true;
  for (int t = t0; t < end;) {
    if (t % C::TOKENS == 0 && t + C::TOKENS <= end) {
      fine &= C::put_some(tile, t, k, s.k_stride, D, v, s.v_stride, DV);
      t += C::TOKENS, k += C::TOKENS * s.k_stride, v += C::TOKENS * s.v_stride;
    } else {
      fine &= C::put(tile, t, k, D, v, DV);
      t++, k += s.k_stride, v += s.v_stride;
    }
  }
  if (routed && end == PAGE)
    make_nodes<C>(tile, D, s.nodes(page, h), memory);
  return fine;
}

// Loads the query rows of one KV head, times `factor`.
template <class F, class C>
static void load_queries(const Heads<C> &s, size_t row, int tokens, int h, float factor, typename F::Q *q) {
  const int D = s.layer->head_dim;
  for (int t = 0; t < tokens; t++)
    for (int g = 0; g < s.group; g++, q += F::query_width(D))
      F::query(q, s.q + (row + t) * s.q_stride + (size_t)(h * s.group + g) * D, factor, D);
}

INLINE float query_factor(const tr_layer &l) { return l.softcap > 0 ? l.scale / l.softcap : l.scale * LOG2E; }

template <class C> INLINE void begin_rows(const Heads<C> &s, const Gathered<C> &g, int rows, int h, bool sinks) {
  const tr_layer &l = *s.layer;
  __builtin_memset(g.out, 0, (size_t)rows * l.value_dim * 4);
  __builtin_memset(g.sums, 0, (size_t)rows * 64);
  for (int r = 0; r < rows; r++) {
    bool sink = sinks && l.sinks;
    g.most[r] = sink ? l.sinks[h * s.group + r % s.group] * LOG2E : NEVER;
    if (sink)
      g.sums[r * 16] = 1;
  }
}

// A bit for each key of page j that is visible to a query at position p.
INLINE uint64_t seen(int j, int p, int window) {
  int last = p - j * PAGE, first = window ? p - window + 1 - j * PAGE : 0;
  uint64_t m = last >= 63 ? ~0ull : last < 0 ? 0 : (2ull << last) - 1;
  return first <= 0 ? m : first > 63 ? 0 : m & ~0ull << first;
}

INLINE int queries_at_once(int group) { // in tokens; their rows should fit in the L2 cache
  int t = 192 / group;
  return t < 8 ? 8 : t > PAGE ? PAGE : t;
}

INLINE size_t result_bytes(const tr_layer &l, size_t rows) {
  return align64(rows * l.value_dim * 4) + rows * 64 + align64(rows * 4);
}
template <class C> INLINE size_t attend_bytes(const tr_layer &l) {
  int group = l.heads / l.kv_heads;
  size_t rows = (size_t)queries_at_once(group) * group;
  return align64(rows * C::query_width(l.head_dim) * sizeof(typename C::Q)) + 2 * result_bytes(l, rows) +
         align64(rows * 8) + 64;
}

template <class C> static void results_in(char *&memory, const tr_layer &l, size_t rows, Gathered<C> &g) {
  g.out = (float *)memory, memory += align64(rows * l.value_dim * 4);
  g.sums = (float *)memory, memory += rows * 64;
  g.most = (float *)memory, memory += align64(rows * 4);
}
template <class C> static Gathered<C> gathered_in(char *&memory, const tr_layer &l, size_t rows, typename C::Q *&q) {
  Gathered<C> g;
  q = (typename C::Q *)memory, memory += align64(rows * C::query_width(l.head_dim) * sizeof(typename C::Q));
  g.q = q;
  results_in(memory, l, rows, g);
  return g;
}

// Dense attention of the queries at positions p0 ... p1 - 1 of a part, all in one block of 64. Returns false if a sum
// is not finite.
template <class C> static bool attend_dense(const Heads<C> &s, const tr_part &part, int h, int p0, int p1, char *memory) {
  const tr_layer &l = *s.layer;
  const int at_once = queries_at_once(s.group);
  bool fine = true;
  for (; p0 < p1; p0 += at_once) {
    const int tokens = p1 - p0 < at_once ? p1 - p0 : at_once, rows = tokens * s.group;
    char *m = memory;
    typename C::Q *q;
    Gathered<C> g = gathered_in<C>(m, l, (size_t)at_once * s.group, q);
    Gathered<C> earlier = g;
    results_in(m, l, (size_t)at_once * s.group, earlier);
    uint64_t *mask = (uint64_t *)m;
    const size_t row = part.begin + p0 - part.past;
    load_queries<C, C>(s, row, tokens, h, query_factor(l), q);
    const Spans spans = spans_of(l, p0); // of all these queries
    for (int span = spans.count - 1, j = spans.last; span >= 0; span--) {
      const bool own = span == spans.count - 1;
      const Gathered<C> &to = own ? g : earlier;
      begin_rows(s, to, rows, h, own);
      for (; j >= spans.begin(span); j--) {
        bool whole = j * PAGE + 63 <= p0 && (!l.window || p0 + tokens - l.window <= j * PAGE);
        if (!whole)
          for (int t = 0; t < tokens; t++)
            for (int x = 0; x < s.group; x++)
              mask[t * s.group + x] = seen(j, p0 + t, l.window);
        Tile<C> tile = {s.tile(part.page[j], h), whole ? nullptr : mask, 1};
        attend_tile<C>(l, tile, to, rows);
      }
      if (!own)
        add_span(l, g, earlier, rows);
    }
    fine &= write_rows(s, g, row, h, rows);
  }
  return fine;
}

// Prefetches a tile.
template <class C> INLINE void ask_for_tile(const Heads<C> &s, int page, int h) {
  const char *tile = s.place(page, h);
  for (size_t b = 0; b < tile_bytes<C>(s.layer->head_dim, s.layer->value_dim); b += 64)
    __builtin_prefetch(tile + b, 0, 2);
}

// Attention of one query over one span. `lowest` is the last page that the caller will read.
template <class C>
static void attend_span(const Heads<C> &s, const tr_part &part, int h, const Spans &spans, int span, int lowest,
                        const Gathered<C> &g) {
  const tr_layer &l = *s.layer;
  const int p = part.past, begin = spans.begin(span);
  begin_rows(s, g, s.group, h, span == spans.count - 1);
  for (int j = spans.begin(span + 1) - 1; j >= begin; j--) {
    if (j > lowest)
      ask_for_tile(s, part.page[j - 1], h);
    uint64_t mask = seen(j, p, l.window);
    Tile<C> tile = {s.tile(part.page[j], h), ~mask ? &mask : nullptr, 0};
    attend_tile<C>(l, tile, g, s.group);
  }
}
} // namespace

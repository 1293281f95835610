// Attention over a paged cache: grouped queries, causal, online softmax over tiles of 64 keys.
//
// Online softmax: Milakov and Gimelshein 2018 (arXiv:1805.02867); tiling: Dao 2023 (arXiv:2307.08691).

namespace {
const float NEVER = -1e30f;
const float SLACK = 8; // unnormalized probabilities stay below 2 ** 8

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

template <class C, int R>
INLINE void attend_rows(const tr_layer &l, const Tile<C> &t, const Gathered<C> &g, int row) {
  const int DV = l.value_dim;
  VF a[R][4];
  float *out = g.out + (size_t)row * DV;
  C::template scores<R>(g.q + (size_t)row * C::query_width(l.head_dim), l.head_dim, t.kept, a);
  for (int r = 0; r < R; r++) {
    if (l.softcap > 0) {
      const VF cap = set1(l.softcap * LOG2E);
      for (int c = 0; c < 4; c++)
        a[r][c] = mul(cap, tanhv(a[r][c]));
    }
    if (t.mask) {
      uint64_t m = t.mask[(row + r) * t.step];
      for (int c = 0; c < 4; c++)
        a[r][c] = pick((unsigned)(m >> (16 * c)) & 0xffff, a[r][c], set1(NEVER));
    }
    float *sums = g.sums + (size_t)(row + r) * 16;
    const VF highest = max(max(a[r][0], a[r][1]), max(a[r][2], a[r][3]));
    const float before = g.most[row + r];
    if (at_least(highest, set1(before + SLACK))) {
      const float now = top(highest);
      const VF keep = exp2v(set1(before - now));
      g.most[row + r] = now;
      store(sums, mul(load(sums), keep));
      for (int d = 0; d < DV; d += 16)
        store(out + (size_t)r * DV + d, mul(load(out + (size_t)r * DV + d), keep));
    }
    VF m = set1(g.most[row + r]), s = load(sums);
    for (int c = 0; c < 4; c++) {
      a[r][c] = C::exp2(sub(a[r][c], m));
      s = add(s, a[r][c]);
    }
    store(sums, s);
  }
  C::template weigh<R>(a, t.kept, out, DV);
}

template <class C> static void attend_tile(const tr_layer &l, const Tile<C> &t, const Gathered<C> &g, int rows) {
  int r = 0;
  if constexpr (TILED && C::P > 1)
    if (rows >= TILE) {
      Tiles tiles(tile_step(l.head_dim * sizeof(typename C::Q)));
      for (; r + TILE <= rows; r += TILE)
        attend_rows<C, TILE>(l, t, g, r);
    }
  for (; r + ROWS <= rows; r += ROWS)
    attend_rows<C, ROWS>(l, t, g, r);
  if constexpr (ROWS > 3)
    for (; r + 3 <= rows; r += 3)
      attend_rows<C, 3>(l, t, g, r);
  for (; r < rows; r++)
    attend_rows<C, 1>(l, t, g, r);
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

template <class C> INLINE size_t attend_bytes(const tr_layer &l) {
  int group = l.heads / l.kv_heads;
  size_t rows = (size_t)queries_at_once(group) * group;
  return align64(rows * C::query_width(l.head_dim) * sizeof(typename C::Q)) + align64(rows * l.value_dim * 4) + rows * 64 +
         align64(rows * 4) + align64(rows * 8) + 64;
}

template <class C> static Gathered<C> gathered_in(char *&memory, const tr_layer &l, size_t rows, typename C::Q *&q) {
  Gathered<C> g;
  q = (typename C::Q *)memory, memory += align64(rows * C::query_width(l.head_dim) * sizeof(typename C::Q));
  g.q = q;
  g.out = (float *)memory, memory += align64(rows * l.value_dim * 4);
  g.sums = (float *)memory, memory += rows * 64;
  g.most = (float *)memory, memory += align64(rows * 4);
  return g;
}

// Dense attention of the queries at positions p0 ... p1 - 1 of a part, all in one block of 64. Returns false if a sum
// is not finite.
template <class C> static bool attend_dense(const Heads<C> &s, const tr_part &part, int h, int p0, int p1, char *memory) {
  const tr_layer &l = *s.layer;
  const int DV = l.value_dim, at_once = queries_at_once(s.group);
  bool fine = true;
  for (; p0 < p1; p0 += at_once) {
    const int tokens = p1 - p0 < at_once ? p1 - p0 : at_once, rows = tokens * s.group;
    char *m = memory;
    typename C::Q *q;
    Gathered<C> g = gathered_in<C>(m, l, (size_t)at_once * s.group, q);
    uint64_t *mask = (uint64_t *)m;
    const size_t row = part.begin + p0 - part.past;
    load_queries<C, C>(s, row, tokens, h, query_factor(l), q);
    begin_rows(s, g, rows, h, true);
    const int last = (p0 + tokens - 1) / PAGE, first = l.window && p0 - l.window + 1 > 0 ? (p0 - l.window + 1) / PAGE : 0;
    for (int j = last; j >= first; j--) {
      bool whole = j * PAGE + 63 <= p0 && (!l.window || p0 + tokens - l.window <= j * PAGE);
      if (!whole)
        for (int t = 0; t < tokens; t++)
          for (int x = 0; x < s.group; x++)
            mask[t * s.group + x] = seen(j, p0 + t, l.window);
      Tile<C> tile = {s.tile(part.page[j], h), whole ? nullptr : mask, 1};
      attend_tile<C>(l, tile, g, rows);
    }
    for (int r = 0; r < rows; r++) {
      float total = sum(load(g.sums + r * 16));
      fine &= total > 0 && total < 1e30f;
      VF inverse = set1(1.f / total);
      float *out = s.out + (row + r / s.group) * s.out_stride + (size_t)(h * s.group + r % s.group) * DV;
      for (int d = 0; d < DV; d += 16)
        store(out + d, mul(load(g.out + (size_t)r * DV + d), inverse));
    }
  }
  return fine;
}

// Prefetches a tile.
template <class C> INLINE void ask_for_tile(const Heads<C> &s, int page, int h) {
  const char *tile = s.place(page, h);
  for (size_t b = 0; b < tile_bytes<C>(s.layer->head_dim, s.layer->value_dim); b += 64)
    __builtin_prefetch(tile + b, 0, 2);
}

// Attention of one query over part `split` of `splits` of its visible pages. `merge_splits` merges the parts.
template <class C>
static void attend_split(const Heads<C> &s, const tr_part &part, int h, int split, int splits, const Gathered<C> &g) {
  const tr_layer &l = *s.layer;
  const int p = part.past;
  load_queries<C, C>(s, part.begin, 1, h, query_factor(l), (typename C::Q *)g.q);
  begin_rows(s, g, s.group, h, split == 0);
  const int last = p / PAGE, first = l.window && p - l.window + 1 > 0 ? (p - l.window + 1) / PAGE : 0;
  const int n = last - first + 1;
  const int end = first + n * (split + 1) / splits;
  for (int j = first + n * split / splits; j < end; j++) {
    if (j + 1 < end)
      ask_for_tile(s, part.page[j + 1], h);
    uint64_t mask = seen(j, p, l.window);
    Tile<C> tile = {s.tile(part.page[j], h), ~mask ? &mask : nullptr, 0};
    attend_tile<C>(l, tile, g, s.group);
  }
}

// Merges the parts g[0 ... splits - 1] of a query.
template <class C>
static bool merge_splits(const Heads<C> &s, const tr_part &part, int h, const Gathered<C> *g, int splits) {
  const int DV = s.layer->value_dim;
  bool fine = true;
  for (int r = 0; r < s.group; r++) {
    float most = NEVER, total = 0;
    for (int x = 0; x < splits; x++)
      most = g[x].most[r] > most ? g[x].most[r] : most;
    float *out = s.out + part.begin * s.out_stride + (size_t)(h * s.group + r) * DV;
    for (int d = 0; d < DV; d += 16)
      store(out + d, zero());
    for (int x = 0; x < splits; x++) {
      VF w = exp2v(set1(g[x].most[r] - most));
      float share = sum(mul(load(g[x].sums + r * 16), w));
      total += share;
      for (int d = 0; d < DV; d += 16)
        store(out + d, fma(load(g[x].out + (size_t)r * DV + d), w, load(out + d)));
    }
    fine &= total > 0 && total < 1e30f;
    VF inverse = set1(1.f / total);
    for (int d = 0; d < DV; d += 16)
      store(out + d, mul(load(out + d), inverse));
  }
  return fine;
}
} // namespace

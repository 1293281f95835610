// Attention over a paged cache: grouped queries, causal, online softmax over tiles of 64 keys.
//
// A page holds for each KV head a tile of keys [dim / P][64][P] and a tile of values [64 / P][dim][P], P numbers that
// meet in one product lying side by side: bfloat16 pairs (P = 2) or single floats (P = 1). So sixteen keys, or sixteen
// columns of values, fill a register, and one word of a query or of a probability is spread over it.
// Online softmax: Milakov and Gimelshein 2018 (arXiv:1805.02867); tiling: Dao 2023 (arXiv:2307.08691).

namespace {
const int PAGE = TR_PAGE;
const float NEVER = -1e30f;
const float SLACK = 8; // probabilities stay below 2 ** 8 before they are divided by their sum

struct Narrow { // bfloat16
  typedef uint16_t T;
  enum { P = 2 };
  typedef VI V;
  INLINE V vec(const T *p) { return iload(p); }
  INLINE V two(const T *low, const T *high) { return iload_two(low, high); }
  INLINE V one(const T *p) { return iset1_at(p); }
  INLINE VF dot(VF acc, V a, V b) { return dot_pairs(acc, a, b); }
  INLINE VF exp2(VF x) { return near_exp2v(x); }
  // 64 floats to 64 numbers
  INLINE void put64(T *p, const VF *x) {
    istore(p, to_bf16x32(x[0], x[1]));
    istore(p + 32, to_bf16x32(x[2], x[3]));
  }
};
struct Wide {
  typedef float T;
  enum { P = 1 };
  typedef VF V;
  INLINE V vec(const T *p) { return load(p); }
  INLINE V two(const T *low, const T *high) { return load_two(low, high); }
  INLINE V one(const T *p) { return set1(*p); }
  INLINE VF dot(VF acc, V a, V b) { return fma(a, b, acc); }
  INLINE VF exp2(VF x) { return exp2v(x); }
  INLINE void put64(T *p, const VF *x) {
    for (int i = 0; i < 4; i++)
      store(p + 16 * i, x[i]);
  }
};

// One layer of one step.
template <class C> struct Heads {
  typedef typename C::T T;
  const tr_layer *layer;
  T *cache;
  size_t page, head; // numbers in a page, and of one KV head in it
  bool routed;       // the page has nodes behind its values
  int group;         // query heads of a KV head
  const float *q, *k, *v;
  size_t q_stride, k_stride, v_stride;
  float *out;
  size_t out_stride;
  T *keys(int32_t p, int h) const { return cache + p * page + h * head; }
  T *values(int32_t p, int h) const { return keys(p, h) + (size_t)layer->head_dim * PAGE; }
};

// A tile of keys and values to attend to. `mask` has a bit for each key that a row may see: one word for each row, or
// one for all (`step` 0), or null where all see all.
template <class C> struct Tile {
  const typename C::T *k, *v;
  const uint64_t *mask;
  int step;
};

// Rows of queries and what has been gathered for them: output [rows][value_dim], sums by lane, and the exponent that
// both are relative to: near the running maximum, and moved only where that has grown past it by `SLACK` powers of two.
template <class C> struct Gathered {
  const typename C::T *q; // [rows][head_dim], times scale (and log2 e where there is no soft cap)
  float *out, *most, *sums;
};

template <class C, int R>
INLINE void attend_rows(const tr_layer &l, const Tile<C> &t, const Gathered<C> &g, int row) {
  typedef typename C::T T;
  const int D = l.head_dim, DV = l.value_dim, P = C::P;
  VF a[R][4];
  alignas(64) T p[R * 64];
  float *out = g.out + (size_t)row * DV;
  for (int r = 0; r < R; r++)
    for (int c = 0; c < 4; c++)
      a[r][c] = zero();
  const T *q = g.q + (size_t)row * D, *k = t.k;
  for (int d = 0; d < D; d += P, k += 64 * P) {
    typename C::V kv[4];
    for (int c = 0; c < 4; c++)
      kv[c] = C::vec(k + 16 * P * c);
    for (int r = 0; r < R; r++) {
      typename C::V x = C::one(q + r * D + d);
      for (int c = 0; c < 4; c++)
        a[r][c] = C::dot(a[r][c], kv[c], x);
    }
  }
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
    C::put64(p + r * 64, a[r]);
    store(sums, s);
  }
  int d = 0;
  for (; d + 64 <= DV; d += 64) {
    for (int r = 0; r < R; r++)
      for (int c = 0; c < 4; c++)
        a[r][c] = load(out + (size_t)r * DV + d + 16 * c);
    const T *v = t.v + d * P;
    for (int j = 0; j < 64; j += P, v += DV * P) {
      typename C::V vv[4];
      for (int c = 0; c < 4; c++)
        vv[c] = C::vec(v + 16 * P * c);
      for (int r = 0; r < R; r++) {
        typename C::V x = C::one(p + r * 64 + j);
        for (int c = 0; c < 4; c++)
          a[r][c] = C::dot(a[r][c], vv[c], x);
      }
    }
    for (int r = 0; r < R; r++)
      for (int c = 0; c < 4; c++)
        store(out + (size_t)r * DV + d + 16 * c, a[r][c]);
  }
  for (; d < DV; d += 16) {
    for (int r = 0; r < R; r++)
      a[r][0] = load(out + (size_t)r * DV + d);
    const T *v = t.v + d * P;
    for (int j = 0; j < 64; j += P, v += DV * P) {
      typename C::V x = C::vec(v);
      for (int r = 0; r < R; r++)
        a[r][0] = C::dot(a[r][0], x, C::one(p + r * 64 + j));
    }
    for (int r = 0; r < R; r++)
      store(out + (size_t)r * DV + d, a[r][0]);
  }
}

template <class C> static void attend_tile(const tr_layer &l, const Tile<C> &t, const Gathered<C> &g, int rows) {
  int r = 0;
  for (; r + ROWS <= rows; r += ROWS)
    attend_rows<C, ROWS>(l, t, g, r);
  if constexpr (ROWS > 3)
    for (; r + 3 <= rows; r += 3)
      attend_rows<C, 3>(l, t, g, r);
  for (; r < rows; r++)
    attend_rows<C, 1>(l, t, g, r);
}

INLINE void narrow(uint16_t *p, float x) {
  uint32_t i;
  __builtin_memcpy(&i, &x, 4);
  if ((i & 0x7fffffff) > 0x7f800000) // NaN stays one
    *p = (uint16_t)(i >> 16 | 0x40);
  else
    *p = (uint16_t)((i + 0x7fff + (i >> 16 & 1)) >> 16);
}
INLINE void narrow(float *p, float x) { *p = x; }

// `factor` times n floats (a multiple of 16) in the numbers of the cache.
INLINE void narrow_row(uint16_t *to, const float *x, float factor, int n) {
  const VF f = set1(factor);
  int d = 0;
  for (; d + 32 <= n; d += 32)
    istore(to + d, to_bf16x32(mul(load(x + d), f), mul(load(x + d + 16), f)));
  for (; d < n; d++)
    narrow(to + d, x[d] * factor);
}
INLINE void narrow_row(float *to, const float *x, float factor, int n) {
  for (int d = 0; d < n; d += 16)
    store(to + d, mul(load(x + d), set1(factor)));
}
// One key into its tile, of which the pair `to` is the first.
INLINE void put_key(uint16_t *to, const float *x, int n) {
  uint16_t row[256];
  narrow_row(row, x, 1.f, n);
  for (int d = 0; d < n; d += 2)
    __builtin_memcpy(to + (size_t)d * PAGE, row + d, 4);
}
INLINE void put_key(float *to, const float *x, int n) {
  for (int d = 0; d < n; d++)
    to[(size_t)d * PAGE] = x[d];
}
// The values of an even token and of the next one, side by side.
INLINE void put_two_values(uint16_t *to, const float *x, const float *y, int n) {
  for (int d = 0; d < n; d += 16)
    istore(to + 2 * d, to_pairs(load(x + d), load(y + d)));
}
INLINE void put_two_values(float *, const float *, const float *, int) {}

template <class C> static void make_nodes(const typename C::T *tile, int dim, typename C::T *nodes); // routing.inl

// The new keys and values of one KV head that go to one page: tokens p0 ... p1 - 1 of a part whose row 0 has position
// `past`.
template <class C> static void append(const Heads<C> &s, const tr_part &part, int h, int p0, int p1) {
  typedef typename C::T T;
  const int D = s.layer->head_dim, DV = s.layer->value_dim, P = C::P, page = p0 / PAGE;
  T *K = s.keys(part.page[page], h), *V = s.values(part.page[page], h);
  if (p0 % PAGE == 0) // a page that somebody held before may hold anything, and 0 times that must be 0
    __builtin_memset(K, 0, (size_t)PAGE * (D + DV) * sizeof(T));
  const size_t row = part.begin + p0 - part.past;
  const float *k = s.k + row * s.k_stride + (size_t)h * D, *v = s.v + row * s.v_stride + (size_t)h * DV;
  const int t0 = p0 % PAGE, n = p1 - p0;
  for (int t = 0; t < n; t++) {
    put_key(K + (size_t)(t0 + t) * P, k + t * s.k_stride, D);
    if (P == 2 && (t0 + t) % 2 == 0 && t + 1 < n) {
      put_two_values(V + (size_t)(t0 + t) * DV, v + t * s.v_stride, v + (t + 1) * s.v_stride, DV);
      t++;
      put_key(K + (size_t)(t0 + t) * P, k + t * s.k_stride, D);
      continue;
    }
    for (int d = 0; d < DV; d++)
      narrow(V + ((size_t)(t0 + t) / P * DV + d) * P + (t0 + t) % P, v[t * s.v_stride + d]);
  }
  if (s.routed && t0 + n == PAGE)
    make_nodes<C>(K, D, V + (size_t)PAGE * DV);
}

// Rows of queries of one KV head, tokens first to last, times `factor`.
template <class C>
static void load_queries(const Heads<C> &s, size_t row, int tokens, int h, float factor, typename C::T *q) {
  const int D = s.layer->head_dim;
  for (int t = 0; t < tokens; t++)
    for (int g = 0; g < s.group; g++, q += D) {
      const float *x = s.q + (row + t) * s.q_stride + (size_t)(h * s.group + g) * D;
      narrow_row(q, x, factor, D);
    }
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

// Bits of the keys of page j that a query at position p sees.
INLINE uint64_t seen(int j, int p, int window) {
  int last = p - j * PAGE, first = window ? p - window + 1 - j * PAGE : 0;
  uint64_t m = last >= 63 ? ~0ull : last < 0 ? 0 : (2ull << last) - 1;
  return first <= 0 ? m : first > 63 ? 0 : m & ~0ull << first;
}

INLINE int queries_at_once(int group) { // tokens: their rows should stay in the second-level cache
  int t = 192 / group;
  return t < 8 ? 8 : t > PAGE ? PAGE : t;
}

template <class C> INLINE size_t attend_bytes(const tr_layer &l) {
  int group = l.heads / l.kv_heads;
  size_t rows = (size_t)queries_at_once(group) * group;
  return align64(rows * l.head_dim * sizeof(typename C::T)) + align64(rows * l.value_dim * 4) + rows * 64 +
         align64(rows * 4) + align64(rows * 8) + 64;
}

template <class C> static Gathered<C> gathered_in(char *&memory, const tr_layer &l, size_t rows, typename C::T *&q) {
  Gathered<C> g;
  q = (typename C::T *)memory, memory += align64(rows * l.head_dim * sizeof(typename C::T));
  g.q = q;
  g.out = (float *)memory, memory += align64(rows * l.value_dim * 4);
  g.sums = (float *)memory, memory += rows * 64;
  g.most = (float *)memory, memory += align64(rows * 4);
  return g;
}

// Queries p0 ... p1 - 1 of a part, all in one block of 64, over all pages that they see. False: a sum is not finite.
template <class C> static bool attend_dense(const Heads<C> &s, const tr_part &part, int h, int p0, int p1, char *memory) {
  const tr_layer &l = *s.layer;
  const int DV = l.value_dim, at_once = queries_at_once(s.group);
  bool fine = true;
  for (; p0 < p1; p0 += at_once) {
    const int tokens = p1 - p0 < at_once ? p1 - p0 : at_once, rows = tokens * s.group;
    char *m = memory;
    typename C::T *q;
    Gathered<C> g = gathered_in<C>(m, l, (size_t)at_once * s.group, q);
    uint64_t *mask = (uint64_t *)m;
    const size_t row = part.begin + p0 - part.past;
    load_queries<C>(s, row, tokens, h, query_factor(l), q);
    begin_rows(s, g, rows, h, true);
    const int last = (p0 + tokens - 1) / PAGE, first = l.window && p0 - l.window + 1 > 0 ? (p0 - l.window + 1) / PAGE : 0;
    for (int j = last; j >= first; j--) {
      bool whole = j * PAGE + 63 <= p0 && (!l.window || p0 + tokens - l.window <= j * PAGE);
      if (!whole)
        for (int t = 0; t < tokens; t++)
          for (int x = 0; x < s.group; x++)
            mask[t * s.group + x] = seen(j, p0 + t, l.window);
      Tile<C> tile = {s.keys(part.page[j], h), s.values(part.page[j], h), whole ? nullptr : mask, 1};
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

// One query, the share `split` of `splits` of the pages that it sees; merged by `merge_splits`.
template <class C>
static void attend_split(const Heads<C> &s, const tr_part &part, int h, int split, int splits, const Gathered<C> &g) {
  const tr_layer &l = *s.layer;
  const int p = part.past;
  load_queries<C>(s, part.begin, 1, h, query_factor(l), (typename C::T *)g.q);
  begin_rows(s, g, s.group, h, split == 0);
  const int last = p / PAGE, first = l.window && p - l.window + 1 > 0 ? (p - l.window + 1) / PAGE : 0;
  const int n = last - first + 1;
  for (int j = first + n * split / splits; j < first + n * (split + 1) / splits; j++) {
    uint64_t mask = seen(j, p, l.window);
    Tile<C> tile = {s.keys(part.page[j], h), s.values(part.page[j], h), ~mask ? &mask : nullptr, 0};
    attend_tile<C>(l, tile, g, s.group);
  }
}

// Puts the shares of a query together: g[0 ... splits - 1].
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

// Node routing: which keys a block of queries reads. The definition is the NumPy reference, transom.ops.sparse_routing;
// the numbers of the steps below are its.
//
// Nodes of 8 keys lie in their page, behind the values of a KV head: means [dim / P][8][P], then variances. They are
// those of all 8 keys, whoever reads them; keys that a sequence has chosen as columns are taken out when it looks: its
// `Route` has the nodes that hold columns a second time, without them.

namespace {
const int NODE = 8, PER_PAGE = PAGE / NODE;
const int MOST_COLUMNS = 64, COLUMN_ROWS = 16;
const float VARIANCE_WEIGHT = .7f, VARIANCE_CAP = 8.3f;

// What one layer and KV head of a sequence keeps from step to step.
template <class C> struct RouteHead {
  typedef typename C::T T;
  int32_t columns;
  int32_t column[MOST_COLUMNS]; // ascending positions
  int32_t patches;              // nodes that hold columns
  int32_t patch[MOST_COLUMNS];  // their numbers, ascending
  float patch_count[MOST_COLUMNS];
  int32_t remembered[COLUMN_ROWS]; // positions of the queries in `ring`, -1: none
  int32_t block;                   // of 64 positions, in which the columns were chosen; -1: never
  double read, seen;
};

INLINE size_t node_numbers(const tr_layer &l) { return (size_t)2 * l.head_dim * PER_PAGE; } // in a page and KV head

// A head's state with what lies behind it: the tile of columns, patches in the form of pages, remembered queries.
template <class C> struct RouteView {
  typedef typename C::T T;
  RouteHead<C> *head;
  T *keys, *values; // of the columns
  T *patches;       // [8] pages of nodes
  T *ring;          // [16][group][head_dim]
};
template <class C> INLINE size_t route_head_bytes(const tr_layer &l) {
  const size_t group = l.heads / l.kv_heads, n = sizeof(typename C::T);
  return align64(sizeof(RouteHead<C>)) + align64((size_t)PAGE * (l.head_dim + l.value_dim) * n) +
         align64(8 * node_numbers(l) * n) + align64(COLUMN_ROWS * group * l.head_dim * n);
}
template <class C> INLINE RouteView<C> route_view(char *p, const tr_layer &l) {
  typedef typename C::T T;
  RouteView<C> v;
  v.head = (RouteHead<C> *)p, p += align64(sizeof(RouteHead<C>));
  v.keys = (T *)p, v.values = v.keys + (size_t)PAGE * l.head_dim;
  p += align64((size_t)PAGE * (l.head_dim + l.value_dim) * sizeof(T));
  v.patches = (T *)p, p += align64(8 * node_numbers(l) * sizeof(T));
  v.ring = (T *)p;
  return v;
}

INLINE float widen(uint16_t x) { return bf16_to_float(x); }
INLINE float widen(float x) { return x; }

// Mean and variance of some keys of a tile: those of `keys` (bits of the page).
template <class C>
static void make_node(const typename C::T *tile, int dim, uint64_t keys, typename C::T *means, typename C::T *variances,
                      int lane) {
  const int P = C::P, n = __builtin_popcountll(keys);
  const float inverse = n ? 1.f / (float)n : 0.f;
  for (int d = 0; d < dim; d++) {
    const typename C::T *x = tile + (size_t)(d / P) * PAGE * P + d % P;
    float s = 0, z = 0;
    for (uint64_t m = keys; m; m &= m - 1) {
      const float k = widen(x[__builtin_ctzll(m) * P]);
      s += k, z += k * k;
    }
    s *= inverse, z = z * inverse - s * s;
    narrow(means + ((size_t)(d / P) * NODE + lane) * P + d % P, s);
    narrow(variances + ((size_t)(d / P) * NODE + lane) * P + d % P, z > 0 ? z : 0);
  }
}

// Column x of a pair, of 16 keys that lie one behind the other.
INLINE VF column_of(const uint16_t *tile, int x) {
  const VI words = iload(tile);
  return as_float(x ? iand(words, iset1((int)0xffff0000)) : left<16>(words));
}
INLINE VF column_of(const float *tile, int) { return load(tile); }

// All nodes of a full page.
template <class C> static void make_nodes(const typename C::T *tile, int dim, typename C::T *nodes) {
  const int P = C::P;
  typename C::T *variances = nodes + (size_t)dim * PER_PAGE;
  auto node_sums = [](const VF *x) { // in the lower half
    const VF pairs = pair_sums(pair_sums(x[0], x[1]), pair_sums(x[2], x[3]));
    return pair_sums(pairs, pairs);
  };
  const VF share = set1(1.f / NODE);
  for (int d = 0; d < dim; d++) {
    VF k[4], squares[4];
    for (int c = 0; c < 4; c++) {
      k[c] = column_of(tile + ((size_t)(d / P) * PAGE + 16 * c) * P, d % P);
      squares[c] = mul(k[c], k[c]);
    }
    const VF mean = mul(node_sums(k), share);
    float means[16], rest[16];
    store(means, mean);
    store(rest, max(zero(), sub(mul(node_sums(squares), share), mul(mean, mean))));
    for (int node = 0; node < PER_PAGE; node++) {
      narrow(nodes + ((size_t)(d / P) * NODE + node) * P + d % P, means[node]);
      narrow(variances + ((size_t)(d / P) * NODE + node) * P + d % P, rest[node]);
    }
  }
}

INLINE int far_end(int position, int local) { // where the local window of a position's block begins
  const int block = position / PAGE - local;
  return block > 0 ? block * PAGE : 0;
}

// Products of R rows with one tile of 64 keys.
template <class C, int R> INLINE void dots(const typename C::T *q, int dim, const typename C::T *k, VF (&a)[R][4]) {
  for (int r = 0; r < R; r++)
    for (int c = 0; c < 4; c++)
      a[r][c] = zero();
  for (int d = 0; d < dim; d += C::P, k += 64 * C::P) {
    typename C::V kv[4];
    for (int c = 0; c < 4; c++)
      kv[c] = C::vec(k + 16 * C::P * c);
    for (int r = 0; r < R; r++) {
      typename C::V x = C::one(q + (size_t)r * dim + d);
      for (int c = 0; c < 4; c++)
        a[r][c] = C::dot(a[r][c], kv[c], x);
    }
  }
}

INLINE VF capped(const tr_layer &l, VF x) { return l.softcap > 0 ? mul(set1(l.softcap * LOG2E), tanhv(x)) : x; }

// --- 1. columns -----------------------------------------------------------------------------------------------------
// Adds to mass[n] the probabilities that R rows from `row` on (of one query: its group) at `position` give to keys before
// `limit`. `x` has room for R * (pages of position) * 64 floats.
template <class C, int R>
static void column_mass_of(const Heads<C> &s, const tr_part &part, int h, const typename C::T *q, int row, int position,
                           int limit, float *x, float *mass) {
  const tr_layer &l = *s.layer;
  const int first = l.window && position - l.window + 1 > 0 ? position - l.window + 1 : 0;
  const int p0 = first / PAGE, pages = position / PAGE + 1, width = (pages - p0) * PAGE;
  const float *sinks = l.sinks ? l.sinks + h * s.group + row : nullptr;
  VF most[R];
  for (int r = 0; r < R; r++)
    most[r] = set1(sinks ? sinks[r] * LOG2E : NEVER);
  for (int j = p0; j < pages; j++) {
    VF a[R][4];
    dots<C, R>(q + (size_t)row * l.head_dim, l.head_dim, s.keys(part.page[j], h), a);
    const uint64_t m = seen(j, position, l.window);
    for (int r = 0; r < R; r++)
      for (int c = 0; c < 4; c++) {
        VF y = pick((unsigned)(m >> 16 * c) & 0xffff, capped(l, a[r][c]), set1(NEVER));
        most[r] = max(most[r], y);
        store(x + (size_t)r * width + (size_t)(j - p0) * PAGE + 16 * c, y);
      }
  }
  for (int r = 0; r < R; r++, x += width) {
    const float t = top(most[r]);
    VF total = zero(), m = set1(t);
    for (int j = 0; j < width; j += 16) {
      VF e = C::exp2(sub(load(x + j), m));
      total = add(total, e);
      store(x + j, e);
    }
    const float sink = sinks ? __builtin_exp2f(sinks[r] * LOG2E - t) : 0.f;
    VF inverse = set1(1.f / (sum(total) + sink));
    for (int j = p0 * PAGE; j < limit; j += 16) // limits are whole pages
      store(mass + j, fma(load(x + j - p0 * PAGE), inverse, load(mass + j)));
  }
}
const int TOGETHER = 3; // rows in one call of column_mass_of
template <class C>
static void column_mass(const Heads<C> &s, const tr_part &part, int h, const typename C::T *q, int position, int limit,
                        float *x, float *mass) {
  int r = 0;
  for (; r + TOGETHER <= s.group; r += TOGETHER)
    column_mass_of<C, TOGETHER>(s, part, h, q, r, position, limit, x, mass);
  for (; r < s.group; r++)
    column_mass_of<C, 1>(s, part, h, q, r, position, limit, x, mass);
}

// The columns out of mass[n] (n whole pages): the `most` keys of most mass, ascending.
static int choose_columns(float *mass, int n, int most, int32_t *column) {
  // The value of the last one taken, found on the bits of its float: sums of what is above need no order.
  union Bits {
    float f;
    uint32_t i;
  };
  auto above = [&](float t) {
    int count = 0;
    VF at = set1(t);
    for (int j = 0; j < n; j += 16)
      count += __builtin_popcount(at_least(load(mass + j), at));
    return count;
  };
  Bits low, high, mid;
  low.i = 1, high.i = 0x7f800000;
  if (above(low.f) > most) {
    while (high.i - low.i > 1) {
      mid.i = low.i + (high.i - low.i) / 2;
      (above(mid.f) >= most ? low : high) = mid;
    }
  }
  // Everything at least low.f: `most` keys, or more where the last ones are equal; the first of those are taken.
  int equal = most - above(high.f), found = 0;
  const bool all = above(low.f) <= most;
  for (int j = 0; j < n && found < most; j++) {
    if (!(mass[j] >= low.f))
      continue;
    if (!all && mass[j] == low.f && --equal < 0)
      continue;
    column[found++] = j;
  }
  return found;
}

// The tile of the columns, and the nodes without them.
template <class C> static void gather_columns(const Heads<C> &s, const tr_part &part, int h, const RouteView<C> &v) {
  const tr_layer &l = *s.layer;
  const int P = C::P, D = l.head_dim, DV = l.value_dim;
  RouteHead<C> &r = *v.head;
  __builtin_memset(v.keys, 0, (size_t)PAGE * (D + DV) * sizeof(typename C::T));
  r.patches = 0;
  for (int x = 0; x < r.columns; x++) {
    const int page = part.page[r.column[x] / PAGE], t = r.column[x] % PAGE;
    const typename C::T *K = s.keys(page, h), *V = s.values(page, h);
    for (int d = 0; d < D; d += P)
      for (int e = 0; e < P; e++)
        v.keys[((size_t)d / P * PAGE + x) * P + e] = K[((size_t)d / P * PAGE + t) * P + e];
    for (int d = 0; d < DV; d++)
      v.values[((size_t)x / P * DV + d) * P + x % P] = V[((size_t)t / P * DV + d) * P + t % P];
    const int node = r.column[x] / NODE;
    if (r.patches && r.patch[r.patches - 1] == node)
      continue;
    uint64_t keys = 0xffull << (node % PER_PAGE * NODE);
    for (int y = x; y < r.columns && r.column[y] / NODE == node; y++)
      keys &= ~(1ull << r.column[y] % PAGE);
    typename C::T *to = v.patches + (size_t)(r.patches / PER_PAGE) * node_numbers(l);
    make_node<C>(K, D, keys, to, to + (size_t)D * PER_PAGE, r.patches % PER_PAGE);
    r.patch[r.patches] = node;
    r.patch_count[r.patches++] = (float)__builtin_popcountll(keys);
  }
}

// --- 4. masses ------------------------------------------------------------------------------------------------------
// The rows of a query block that are looked at.
template <class C> struct Asked {
  typename C::T *q, *q2; // [rows][head_dim]: times scale, and squared times what the variance is multiplied by
  int32_t *position;     // [rows]
  float *most, *near, *column, *total; // [rows]: reference of the exponents (log 2), masses relative to it
  int rows, group;
};
template <class C> INLINE size_t asked_bytes(const tr_layer &l, int rows) {
  return 2 * align64((size_t)rows * l.head_dim * sizeof(typename C::T)) + 5 * align64((size_t)rows * 4);
}
template <class C> static Asked<C> asked_in(char *&p, const tr_layer &l, int rows) {
  Asked<C> a;
  const size_t bytes = align64((size_t)rows * l.head_dim * sizeof(typename C::T));
  a.q = (typename C::T *)p, p += bytes;
  a.q2 = (typename C::T *)p, p += bytes;
  a.position = (int32_t *)p, p += align64((size_t)rows * 4);
  float **f[] = {&a.most, &a.near, &a.column, &a.total};
  for (float **x : f)
    *x = (float *)p, p += align64((size_t)rows * 4);
  a.rows = 0;
  return a;
}

template <class C> static void ask(const Heads<C> &s, const tr_part &part, int h, int position, Asked<C> &a) {
  const tr_layer &l = *s.layer;
  const size_t at = (size_t)a.rows * l.head_dim;
  load_queries<C>(s, part.begin + position - part.past, 1, h, query_factor(l), a.q + at);
  const float f = .5f * VARIANCE_WEIGHT * (l.softcap > 0 ? l.softcap : 1.f / LOG2E);
  for (int x = 0; x < s.group * l.head_dim; x++) {
    const float q = widen(a.q[at + x]);
    narrow(a.q2 + at + x, q * q * f);
  }
  for (int x = 0; x < s.group; x++)
    a.position[a.rows++] = position;
}

// The nearby keys (pages far / 64 ... last) and the columns before them, exactly: R rows from `row` on. `x` has room for
// R * (nearby pages + 1) * 64 floats.
template <class C, int R>
static void exact_masses_of(const Heads<C> &s, const tr_part &part, int h, int far, int last, const RouteView<C> &v,
                            int columns, Asked<C> &a, int row, float *x) {
  const tr_layer &l = *s.layer;
  const int near = last / PAGE - far / PAGE + 1, tiles = near + (columns > 0);
  VF most[R];
  for (int r = 0; r < R; r++)
    most[r] = set1(NEVER);
  for (int t = 0; t < tiles; t++) {
    VF y[R][4];
    const int page = far / PAGE + t;
    dots<C, R>(a.q + (size_t)row * l.head_dim, l.head_dim, t < near ? s.keys(part.page[page], h) : v.keys, y);
    for (int r = 0; r < R; r++) {
      const int position = a.position[row + r];
      uint64_t m = t < near ? seen(page, position, l.window) : columns == 64 ? ~0ull : (1ull << columns) - 1;
      if (t == near && l.window)
        for (int i = 0; i < columns; i++)
          if (v.head->column[i] <= position - l.window)
            m &= ~(1ull << i);
      for (int c = 0; c < 4; c++) {
        y[r][c] = pick((unsigned)(m >> 16 * c) & 0xffff, capped(l, y[r][c]), set1(NEVER));
        most[r] = max(most[r], y[r][c]);
        store(x + (r * tiles + t) * 64 + 16 * c, y[r][c]);
      }
    }
  }
  for (int r = 0; r < R; r++, x += tiles * 64) {
    const int at = row + r;
    const float sink = l.sinks ? l.sinks[h * a.group + at % a.group] * LOG2E : NEVER;
    const float t = top(most[r]) > sink ? top(most[r]) : sink;
    VF m = set1(t), n = zero(), k = zero();
    for (int j = 0; j < near * 64; j += 16)
      n = add(n, C::exp2(sub(load(x + j), m)));
    for (int j = near * 64; j < tiles * 64; j += 16)
      k = add(k, C::exp2(sub(load(x + j), m)));
    a.most[at] = t, a.near[at] = sum(n), a.column[at] = sum(k);
    a.total[at] = a.near[at] + a.column[at] + (l.sinks ? __builtin_exp2f(sink - t) : 0.f);
  }
}
template <class C>
static void exact_masses(const Heads<C> &s, const tr_part &part, int h, int far, int last, const RouteView<C> &v,
                         int all_columns, Asked<C> &a, float *x) {
  int columns = 0, r = 0;
  while (columns < all_columns && v.head->column[columns] < far)
    columns++;
  for (; r + TOGETHER <= a.rows; r += TOGETHER)
    exact_masses_of<C, TOGETHER>(s, part, h, far, last, v, columns, a, r, x);
  for (; r < a.rows; r++)
    exact_masses_of<C, 1>(s, part, h, far, last, v, columns, a, r, x);
}

// Masses of 64 nodes for R rows: count * 2 ** (estimate - most). `halves` are the means of 8 nodes each, variances
// behind them.
template <class C, int R>
INLINE void node_tile(const tr_layer &l, const typename C::T *const *halves, const Asked<C> &a, int row, VF (&e)[R][4]) {
  const int D = l.head_dim, P = C::P;
  const size_t variances = (size_t)D * PER_PAGE;
  VF y[R][4];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < 4; c++)
      y[r][c] = e[r][c] = zero();
  for (int d = 0; d < D; d += P) {
    typename C::V n[4];
    for (int c = 0; c < 4; c++)
      n[c] = C::two(halves[2 * c] + variances + (size_t)d * NODE, halves[2 * c + 1] + variances + (size_t)d * NODE);
    for (int r = 0; r < R; r++) {
      typename C::V x = C::one(a.q2 + (size_t)(row + r) * D + d);
      for (int c = 0; c < 4; c++)
        y[r][c] = C::dot(y[r][c], n[c], x);
    }
  }
  const VF cap = set1(VARIANCE_CAP * (l.softcap > 0 ? 1.f / l.softcap : LOG2E));
  for (int r = 0; r < R; r++)
    for (int c = 0; c < 4; c++)
      e[r][c] = min(cap, y[r][c]);
  for (int d = 0; d < D; d += P) {
    typename C::V n[4];
    for (int c = 0; c < 4; c++)
      n[c] = C::two(halves[2 * c] + (size_t)d * NODE, halves[2 * c + 1] + (size_t)d * NODE);
    for (int r = 0; r < R; r++) {
      typename C::V x = C::one(a.q + (size_t)(row + r) * D + d);
      for (int c = 0; c < 4; c++)
        e[r][c] = C::dot(e[r][c], n[c], x);
    }
  }
  for (int r = 0; r < R; r++) {
    VF m = set1(a.most[row + r]);
    for (int c = 0; c < 4; c++) // far above the exact keys an estimate is beyond belief, and must not overflow
      e[r][c] = C::exp2(min(set1(100.f), sub(capped(l, e[r][c]), m)));
  }
}

// Unit masses U[row][width] of the units before `far`, from pages first ... last - 1 (8 at a time, first is a multiple),
// and their sums by row, added to totals. `units` keys each.
template <class C, int R>
static void unit_masses_of(const Heads<C> &s, const tr_part &part, int h, int far, int first, int last, int unit,
                           const uint64_t *patched, const Asked<C> &a, int row, float *U, size_t width, float *totals) {
  const tr_layer &l = *s.layer;
  const size_t nodes_at = (size_t)PAGE * (l.head_dim + l.value_dim);
  const int per = unit / NODE, pages = far / PAGE;
  for (int p = first; p < last; p += 8) {
    const typename C::T *halves[8];
    for (int x = 0; x < 8; x++)
      halves[x] = s.keys(part.page[p + x < pages ? p + x : pages - 1], h) + nodes_at;
    VF e[R][4];
    node_tile<C, R>(l, halves, a, row, e);
    // One bit for each node: of those before `far`, what is no patch.
    uint64_t mask = ~patched[p / 8];
    if (pages - p < 8)
      mask &= (1ull << (pages - p) * 8) - 1;
    for (int r = 0; r < R; r++) {
      uint64_t m = mask;
      if (l.window) {
        const int start = a.position[row + r] - l.window + 1, n = start / NODE - p * 8; // its first node, from here
        if (start > 0 && n > 0)
          m = n > 63 ? 0 : m & ~0ull << n;
      }
      for (int c = 0; c < 4; c++)
        e[r][c] = pick((unsigned)(m >> 16 * c) & 0xffff, mul(e[r][c], set1((float)NODE)), zero());
      VF t = add(add(e[r][0], e[r][1]), add(e[r][2], e[r][3]));
      totals[row + r] += sum(t);
      float *u = U + (size_t)(row + r) * width + (size_t)p * 8 / per;
      if (per == 2) {
        store(u, pair_sums(e[r][0], e[r][1]));
        store(u + 16, pair_sums(e[r][2], e[r][3]));
      } else {
        float x[64];
        for (int c = 0; c < 4; c++)
          store(x + 16 * c, e[r][c]);
        for (int j = 0; j < 64 / per; j++) {
          float y = 0;
          for (int i = 0; i < per; i++)
            y += x[j * per + i];
          u[j] = y;
        }
      }
    }
  }
}

template <class C>
static void unit_masses(const Heads<C> &s, const tr_part &part, int h, int far, int first, int last, int unit,
                        const uint64_t *patched, const Asked<C> &a, float *U, size_t width, float *totals) {
  int r = 0;
  for (; r + ROWS <= a.rows; r += ROWS)
    unit_masses_of<C, ROWS>(s, part, h, far, first, last, unit, patched, a, r, U, width, totals);
  if constexpr (ROWS > 3)
    for (; r + 3 <= a.rows; r += 3)
      unit_masses_of<C, 3>(s, part, h, far, first, last, unit, patched, a, r, U, width, totals);
  for (; r < a.rows; r++)
    unit_masses_of<C, 1>(s, part, h, far, first, last, unit, patched, a, r, U, width, totals);
}

// Adds the nodes that hold columns, without them.
template <class C>
static void patch_masses(const tr_layer &l, const RouteView<C> &v, int far, int unit, Asked<C> &a, float *U,
                         size_t width) {
  const RouteHead<C> &h = *v.head;
  if (!h.patches)
    return;
  const typename C::T *halves[8];
  for (int x = 0; x < 8; x++)
    halves[x] = v.patches + (size_t)(x * 8 < h.patches ? x : 0) * node_numbers(l);
  auto add_rows = [&](int r, const VF *e) {
    float x[64];
    for (int c = 0; c < 4; c++)
      store(x + 16 * c, e[c]);
    for (int i = 0; i < h.patches && h.patch[i] * NODE < far; i++) {
      if (l.window && (h.patch[i] + 1) * NODE <= a.position[r] - l.window + 1)
        continue;
      const float y = h.patch_count[i] > 0 ? x[i] * h.patch_count[i] : 0;
      U[(size_t)r * width + h.patch[i] * NODE / unit] += y;
      a.total[r] += y;
    }
  };
  int r = 0;
  for (; r + TOGETHER <= a.rows; r += TOGETHER) {
    VF e[TOGETHER][4];
    node_tile<C, TOGETHER>(l, halves, a, r, e);
    for (int i = 0; i < TOGETHER; i++)
      add_rows(r + i, e[i]);
  }
  for (; r < a.rows; r++) {
    VF e[1][4];
    node_tile<C, 1>(l, halves, a, r, e);
    add_rows(r, e[0]);
  }
}

// --- the mean score: all masses from mean keys alone ----------------------------------------------------------------
INLINE int mean_tiles(int node, int keys) { return ((keys + node - 1) / node + 63) / 64; }

// The mean keys of all nodes of a sequence of n keys, laid out as tiles of 64 keys.
template <class C>
static void mean_keys(const Heads<C> &s, const tr_part &part, int h, int node, int n, typename C::T *tiles) {
  const tr_layer &l = *s.layer;
  const int P = C::P, D = l.head_dim, nodes = (n + node - 1) / node;
  __builtin_memset(tiles, 0, (size_t)mean_tiles(node, n) * D * 64 * sizeof(typename C::T));
  for (int g = 0; g < nodes; g++) {
    const int begin = g * node, page = begin / PAGE, count = n - begin < node ? n - begin : node;
    const typename C::T *K = s.keys(part.page[page], h), *means = K + (size_t)PAGE * (D + l.value_dim);
    const bool full = (page + 1) * PAGE <= n; // only then it has nodes
    const int terms = full ? node / NODE : count, from = full ? begin % PAGE / NODE : begin % PAGE;
    const int apart = full ? PER_PAGE : PAGE;
    typename C::T *to = tiles + (size_t)(g / 64) * D * 64 + (size_t)(g % 64) * P;
    for (int d = 0; d < D; d++) {
      const typename C::T *x = (full ? means : K) + ((size_t)(d / P) * apart + from) * P + d % P;
      float sum = 0;
      for (int j = 0; j < terms; j++)
        sum += widen(x[(size_t)j * P]);
      narrow(to + (size_t)(d / P) * 64 * P + d % P, sum / (float)terms);
    }
  }
}

// Unit masses and totals of the rows asked, from n keys; `x` has room for a row of tiles. There are no columns.
template <class C>
static void mean_masses(const tr_layer &l, const typename C::T *tiles, int h, int node, int unit, int n, int far,
                        int last, Asked<C> &a, float *U, size_t width, float *x) {
  const int seen_nodes = last / node + 1, far_nodes = far / node, per = unit / node;
  for (int r = 0; r < a.rows; r++) {
    const int start = l.window && a.position[r] - l.window + 1 > 0 ? a.position[r] - l.window + 1 : 0;
    const int first = start / node, end = a.position[r] / node + 1; // nodes with mass
    float most = l.sinks ? l.sinks[h * a.group + r % a.group] * LOG2E : NEVER;
    const float sink = most;
    for (int t = first / 64; t * 64 < end; t++) {
      VF y[1][4];
      dots<C, 1>(a.q + (size_t)r * l.head_dim, l.head_dim, tiles + (size_t)t * 64 * l.head_dim, y);
      for (int c = 0; c < 4; c++)
        store(x + t * 64 + 16 * c, capped(l, y[0][c]));
    }
    for (int g = first; g < end; g++)
      most = x[g] > most ? x[g] : most;
    float near = 0, total = l.sinks ? __builtin_exp2f(sink - most) : 0.f, *u = U + (size_t)r * width;
    for (int j = 0; j < far_nodes / per; j++)
      u[j] = 0;
    for (int g = first; g < end && g < seen_nodes; g++) {
      const int count = n - g * node < node ? n - g * node : node;
      const float mass = (float)count * __builtin_exp2f(x[g] - most);
      total += mass;
      (g < far_nodes ? u[g / per] : near) += mass;
    }
    a.most[r] = most, a.near[r] = near, a.column[r] = 0, a.total[r] = total;
  }
}

INLINE void mark_patches(const int32_t *patch, int patches, int far, uint64_t *patched) {
  for (int x = 0; x < (far / PAGE + 7) / 8; x++)
    patched[x] = 0;
  for (int i = 0; i < patches && patch[i] * NODE < far; i++)
    patched[patch[i] / 64] |= 1ull << patch[i] % 64;
}

// --- 5 and 6. score and choice --------------------------------------------------------------------------------------
// Marks the units that are read (a bit each); U is overwritten. Returns 1, 0 where everything is read, -1 where a score
// is not finite.
// By the mean score A is the mean of the shares in place of their root mean square.
static int choose_units(const tr_sparsity &rule, float coverage, int begin, int end, int window, int far, int rows,
                        float *U, size_t width, const float *total, const float *near, const float *column,
                        const int32_t *columns, int column_count, uint64_t *bits, int *read, int *seen_keys) {
  const int unit = rule.unit, units = far / unit, every = end / unit + 1;
  float near_score = 0, column_share = 0;
  float inverse[16 * 64];
  for (int r = 0; r < rows; r++) {
    inverse[r] = 1.f / total[r];
    const float n = near[r] * inverse[r];
    near_score += rule.mean_score ? n : n * n, column_share += column[r] * inverse[r];
  }
  near_score = rule.mean_score ? near_score / rows : __builtin_sqrtf(near_score / rows), column_share /= rows;
  double covered = (double)near_score + column_share, sum_all = covered;
  const int first = rule.columns ? 0 : PAGE / unit < units ? PAGE / unit : units;
  for (int j = 0; j < units; j += 16) {
    VF s = zero();
    for (int r = 0; r < rows; r++) {
      VF p = mul(load(U + (size_t)r * width + j), set1(inverse[r]));
      s = rule.mean_score ? add(p, s) : fma(p, p, s);
    }
    s = mul(s, set1(1.f / rows));
    s = rule.mean_score ? s : vsqrt(s);
    if (units - j < 16)
      s = pick((1u << (units - j)) - 1, s, zero());
    store(U + j, s); // row 0 has been read up to here
  }
  for (int j = 0; j < first; j++)
    covered += U[j], sum_all += U[j], U[j] = 0;
  const int padded = (units + 15) / 16 * 16;
  {
    VF t = zero();
    for (int j = 0; j < padded; j += 16)
      t = add(t, load(U + j));
    sum_all += sum(t);
  }
  if (!(sum_all < 1e30))
    return -1;
  const int start = window && begin - window + 1 > 0 ? begin - window + 1 : 0;
  union Bits {
    float f;
    uint32_t i;
  };
  auto count_of = [&](float t) {
    int n = 0;
    for (int j = 0; j < padded; j += 16)
      n += __builtin_popcount(at_least(load(U + j), set1(t)));
    return n;
  };
  auto sum_of = [&](float t) {
    VF n = zero(), at = set1(t);
    for (int j = 0; j < padded; j += 16) {
      VF u = load(U + j);
      n = add(n, pick(at_least(u, at), u, zero()));
    }
    return sum(n);
  };
  // The largest threshold at which enough is read: exact, by halving the interval of the bits of a float.
  auto threshold = [&](auto enough) {
    Bits low, high, mid;
    low.i = 1, high.i = 0x7f800000; // everything with mass, and nothing
    if (enough(high.f))
      return high.f;
    if (!enough(low.f))
      return low.f;
    while (high.i - low.i > 1) {
      mid.i = low.i + (high.i - low.i) / 2;
      (enough(mid.f) ? low : high) = mid;
    }
    return low.f;
  };
  float at;
  if (rule.top_k)
    at = threshold([&](float t) { return count_of(t) >= rule.top_k; });
  else {
    const float need = (float)(coverage * sum_all - covered);
    at = threshold([&](float t) { return need <= 0 || sum_of(t) >= need; });
    const int all_units = end / unit - start / unit + 1;
    int always = end / unit - (far > start ? far : start) / unit + 1;
    if (!rule.columns && PAGE / unit > start / unit)
      always += PAGE / unit - start / unit;
    int least = (int)__builtin_ceilf(rule.min_density * (float)all_units) - always;
    int most = (int)__builtin_floorf(rule.max_density * (float)all_units) - always;
    least = least > 0 ? least : 0, most = most > least ? most : least;
    const int n = count_of(at);
    if (n < least)
      at = threshold([&](float t) { return count_of(t) >= least; });
    else if (n > most)
      at = most ? threshold([&](float t) { return count_of(t) >= most; }) : INFINITY;
  }
  for (int x = 0; x <= every / 64; x++)
    bits[x] = 0;
  for (int j = 0; j < padded; j += 16)
    bits[j / 64] |= (uint64_t)at_least(load(U + j), set1(at)) << (j % 64);
  for (int j = 0; j < first; j++)
    bits[j / 64] |= 1ull << (j % 64);
  for (int j = units; j < every; j++)
    bits[j / 64] |= 1ull << (j % 64);
  // Keys that the last query reads, of those that any of them sees.
  int keys = 0;
  for (int j = 0; j < every; j++)
    if (bits[j / 64] >> (j % 64) & 1) {
      const int k0 = j * unit > start ? j * unit : start, k1 = (j + 1) * unit < end + 1 ? (j + 1) * unit : end + 1;
      keys += k1 > k0 ? k1 - k0 : 0;
    }
  for (int x = 0; x < column_count && columns[x] < far; x++) {
    const int j = columns[x] / unit;
    keys += columns[x] >= start && !(bits[j / 64] >> (j % 64) & 1);
  }
  *read = keys, *seen_keys = end + 1 - start;
  return rule.max_density * 5 > 3 && (int64_t)keys * 5 > (int64_t)*seen_keys * 3 ? 0 : 1;
}
} // namespace

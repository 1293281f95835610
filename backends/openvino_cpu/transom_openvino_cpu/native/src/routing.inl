// Node routing: selects the keys that a block of queries reads. The NumPy reference transom.ops.sparse_routing defines
// the selection; the steps below have its numbers.
//
// Nodes of 8 keys are stored in their page, behind the values of a KV head: means [dim / P][8][P], then variances, with
// P numbers in a word. They include all 8 keys. A sequence must not count its columns twice, so its `Route` has
// patches: copies of the nodes that contain columns, without those columns.

namespace {
const int NODE = 8, PER_PAGE = PAGE / NODE;
const int MOST_COLUMNS = 64, COLUMN_ROWS = 16;
const float VARIANCE_WEIGHT = .7f, VARIANCE_CAP = 8.3f;

// The state of one layer and KV head of a sequence between steps.
struct RouteHead {
  int32_t columns;
  int32_t column[MOST_COLUMNS]; // ascending positions
  int32_t patches;              // number of nodes that contain columns
  int32_t patch[MOST_COLUMNS];  // their indices, ascending
  float patch_count[MOST_COLUMNS];
  int32_t remembered[COLUMN_ROWS]; // positions of the queries in `ring`; -1: none
  int32_t block;                   // block of 64 positions in which the columns were selected; -1: never
  double read, seen;
};

INLINE size_t node_numbers(const tr_layer &l) { return (size_t)2 * l.head_dim * PER_PAGE; } // per page and KV head

// A head's state and the arrays behind it: the tile of columns, patches in the layout of pages, remembered queries.
template <class C> struct RouteView {
  RouteHead *head;
  char *columns;
  Kept<C> kept;                 // tile of the columns
  typename C::Node::T *patches; // [8] pages of nodes
  typename C::Q *ring;          // [16][group][query_width]
};
template <class C> INLINE size_t route_head_bytes(const tr_layer &l) {
  const size_t group = l.heads / l.kv_heads;
  return align64(sizeof(RouteHead)) + align64(tile_bytes<C>(l.head_dim, l.value_dim)) +
         align64(8 * node_numbers(l) * sizeof(typename C::Node::T)) +
         align64(COLUMN_ROWS * group * C::query_width(l.head_dim) * sizeof(typename C::Q));
}
template <class C> INLINE RouteView<C> route_view(char *p, const tr_layer &l) {
  RouteView<C> v;
  v.head = (RouteHead *)p, p += align64(sizeof(RouteHead));
  v.columns = p, v.kept = kept_at<C>(p, l.head_dim, l.value_dim);
  p += align64(tile_bytes<C>(l.head_dim, l.value_dim));
  v.patches = (typename C::Node::T *)p, p += align64(8 * node_numbers(l) * sizeof(typename C::Node::T));
  v.ring = (typename C::Q *)p;
  return v;
}

// The index of number d of node `lane` in a page.
template <class N> INLINE size_t node_at(int d, int lane) {
  return ((size_t)(d / N::P) * NODE + lane) * N::P + d % N::P;
}

// Mean and variance of the keys of a tile whose bits are set in `keys`.
template <class C>
static void make_node(const Kept<C> &tile, int dim, uint64_t keys, typename C::Node::T *means,
                      typename C::Node::T *variances, int lane) {
  const int n = __builtin_popcountll(keys);
  const float inverse = n ? 1.f / (float)n : 0.f;
  float s[256], z[256], k[256];
  for (int d = 0; d < dim; d++)
    s[d] = z[d] = 0;
  for (uint64_t m = keys; m; m &= m - 1) {
    C::key(tile, __builtin_ctzll(m), dim, k);
    for (int d = 0; d < dim; d++)
      s[d] += k[d], z[d] += k[d] * k[d];
  }
  for (int d = 0; d < dim; d++) {
    const float mean = s[d] * inverse, rest = z[d] * inverse - mean * mean;
    narrow(means + node_at<typename C::Node>(d, lane), mean);
    narrow(variances + node_at<typename C::Node>(d, lane), rest > 0 ? rest : 0);
  }
}

// Computes all nodes of a full page; `memory` has room for its keys as floats.
template <class C> static void make_nodes(const Kept<C> &tile, int dim, typename C::Node::T *nodes, char *memory) {
  typename C::Node::T *variances = nodes + (size_t)dim * PER_PAGE;
  auto node_sums = [](const VF *x) { // result in the lower half
    const VF pairs = pair_sums(pair_sums(x[0], x[1]), pair_sums(x[2], x[3]));
    return pair_sums(pairs, pairs);
  };
  const VF share = set1(1.f / NODE);
  float *all = (float *)memory;
  C::spread(tile, dim, all);
  for (int d = 0; d < dim; d++, all += PAGE) {
    VF k[4], squares[4];
    for (int c = 0; c < 4; c++) {
      k[c] = load(all + 16 * c);
      squares[c] = mul(k[c], k[c]);
    }
    const VF mean = mul(node_sums(k), share);
    float means[16], rest[16];
    store(means, mean);
    store(rest, max(zero(), sub(mul(node_sums(squares), share), mul(mean, mean))));
    for (int node = 0; node < PER_PAGE; node++) {
      narrow(nodes + node_at<typename C::Node>(d, node), means[node]);
      narrow(variances + node_at<typename C::Node>(d, node), rest[node]);
    }
  }
}

INLINE int far_end(int position, int local) { // start of the local window of a position's block
  const int block = position / PAGE - local;
  return block > 0 ? block * PAGE : 0;
}

INLINE VF capped(const tr_layer &l, VF x) { return l.softcap > 0 ? mul(set1(l.softcap * LOG2E), tanhv(x)) : x; }

// --- 1. columns -----------------------------------------------------------------------------------------------------
// Adds to mass[n] the probabilities of the keys before `limit`, for R rows from `row` on, which belong to one query at
// `position`. `x` has room for R * (pages of position) * 64 floats.
template <class C, int R>
static void column_mass_of(const Heads<C> &s, const tr_part &part, int h, const typename C::Q *q, int row, int position,
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
    C::template scores<R>(q + (size_t)row * C::query_width(l.head_dim), l.head_dim, s.tile(part.page[j], h), a);
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
static void column_mass(const Heads<C> &s, const tr_part &part, int h, const typename C::Q *q, int position, int limit,
                        float *x, float *mass) {
  int r = 0;
  for (; r + TOGETHER <= s.group; r += TOGETHER)
    column_mass_of<C, TOGETHER>(s, part, h, q, r, position, limit, x, mass);
  for (; r < s.group; r++)
    column_mass_of<C, 1>(s, part, h, q, r, position, limit, x, mass);
}

// Selects columns: the `most` keys with the largest mass[n] (n is in whole pages), ascending.
static int choose_columns(float *mass, int n, int most, int32_t *column) {
  // Finds the smallest selected value by bisection over the bits of its float, without sorting.
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
  // All keys of at least low.f: `most` keys, or more if the smallest are equal; of those the first are selected.
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

// Writes the tile of the columns, and the patches.
template <class C> static void gather_columns(const Heads<C> &s, const tr_part &part, int h, const RouteView<C> &v) {
  const tr_layer &l = *s.layer;
  const int D = l.head_dim, DV = l.value_dim;
  RouteHead &r = *v.head;
  __builtin_memset(v.columns, 0, tile_bytes<C>(D, DV));
  r.patches = 0;
  for (int x = 0; x < r.columns; x++) {
    const Kept<C> tile = s.tile(part.page[r.column[x] / PAGE], h);
    copy_token(tile, r.column[x] % PAGE, v.kept, x, D, DV);
    const int node = r.column[x] / NODE;
    if (r.patches && r.patch[r.patches - 1] == node)
      continue;
    uint64_t keys = 0xffull << (node % PER_PAGE * NODE);
    for (int y = x; y < r.columns && r.column[y] / NODE == node; y++)
      keys &= ~(1ull << r.column[y] % PAGE);
    typename C::Node::T *to = v.patches + (size_t)(r.patches / PER_PAGE) * node_numbers(l);
    make_node<C>(tile, D, keys, to, to + (size_t)D * PER_PAGE, r.patches % PER_PAGE);
    r.patch[r.patches] = node;
    r.patch_count[r.patches++] = (float)__builtin_popcountll(keys);
  }
}

// --- 4. masses ------------------------------------------------------------------------------------------------------
// The sampled rows of a query block.
template <class C> struct Sampled {
  typename C::Q *q;            // [rows][query_width], times scale: for keys
  typename C::Node::T *n, *n2; // [rows][head_dim]: for means and, squared, for variances
  int32_t *position;           // [rows]
  float *most, *near, *column, *total; // [rows]: reference exponent (log 2); masses relative to it
  int rows, group;
};
template <class C> INLINE size_t sampled_bytes(const tr_layer &l, int rows) {
  return align64((size_t)rows * C::query_width(l.head_dim) * sizeof(typename C::Q)) +
         2 * align64((size_t)rows * l.head_dim * sizeof(typename C::Node::T)) + 5 * align64((size_t)rows * 4);
}
template <class C> static Sampled<C> sampled_in(char *&p, const tr_layer &l, int rows) {
  Sampled<C> a;
  a.q = (typename C::Q *)p, p += align64((size_t)rows * C::query_width(l.head_dim) * sizeof(typename C::Q));
  const size_t bytes = align64((size_t)rows * l.head_dim * sizeof(typename C::Node::T));
  a.n = C::SCALED ? (typename C::Node::T *)p : (typename C::Node::T *)a.q, p += C::SCALED ? bytes : 0;
  a.n2 = (typename C::Node::T *)p, p += bytes;
  a.position = (int32_t *)p, p += align64((size_t)rows * 4);
  float **f[] = {&a.most, &a.near, &a.column, &a.total};
  for (float **x : f)
    *x = (float *)p, p += align64((size_t)rows * 4);
  a.rows = 0;
  return a;
}

template <class C> static void sample(const Heads<C> &s, const tr_part &part, int h, int position, Sampled<C> &a) {
  typedef typename C::Node N;
  const tr_layer &l = *s.layer;
  const size_t at = (size_t)a.rows * l.head_dim, row = part.begin + position - part.past;
  load_queries<C, C>(s, row, 1, h, query_factor(l), a.q + (size_t)a.rows * C::query_width(l.head_dim));
  if (C::SCALED)
    load_queries<N, C>(s, row, 1, h, query_factor(l), a.n + at);
  const float f = .5f * VARIANCE_WEIGHT * (l.softcap > 0 ? l.softcap : 1.f / LOG2E);
  for (int x = 0; x < s.group * l.head_dim; x++) {
    const float q = widen(a.n[at + x]);
    narrow(a.n2 + at + x, q * q * f);
  }
  for (int x = 0; x < s.group; x++)
    a.position[a.rows++] = position;
}

// Exact masses of the near keys (pages far / 64 ... last) and of the columns before them, for R rows from `row` on. `x`
// has room for R * (near pages + 1) * 64 floats.
template <class C, int R>
static void exact_masses_of(const Heads<C> &s, const tr_part &part, int h, int far, int last, const RouteView<C> &v,
                            int columns, Sampled<C> &a, int row, float *x) {
  const tr_layer &l = *s.layer;
  const int near = last / PAGE - far / PAGE + 1, tiles = near + (columns > 0);
  VF most[R];
  for (int r = 0; r < R; r++)
    most[r] = set1(NEVER);
  for (int t = 0; t < tiles; t++) {
    VF y[R][4];
    const int page = far / PAGE + t;
    C::template scores<R>(a.q + (size_t)row * C::query_width(l.head_dim), l.head_dim,
                          t < near ? s.tile(part.page[page], h) : v.kept, y);
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
                         int all_columns, Sampled<C> &a, float *x) {
  int columns = 0, r = 0;
  while (columns < all_columns && v.head->column[columns] < far)
    columns++;
  for (; r + TOGETHER <= a.rows; r += TOGETHER)
    exact_masses_of<C, TOGETHER>(s, part, h, far, last, v, columns, a, r, x);
  for (; r < a.rows; r++)
    exact_masses_of<C, 1>(s, part, h, far, last, v, columns, a, r, x);
}

// Masses of 64 nodes for R rows: count * 2 ** (estimate - most). `halves` points to the means of 8 nodes each, followed
// by their variances.
template <class C, int R>
INLINE void node_tile(const tr_layer &l, const typename C::Node::T *const *halves, const Sampled<C> &a, int row,
                      VF (&e)[R][4]) {
  typedef typename C::Node N;
  const int D = l.head_dim, P = N::P;
  const size_t variances = (size_t)D * PER_PAGE;
  VF y[R][4];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < 4; c++)
      y[r][c] = e[r][c] = zero();
  for (int d = 0; d < D; d += P) {
    typename N::V n[4];
    for (int c = 0; c < 4; c++)
      n[c] = N::two(halves[2 * c] + variances + (size_t)d * NODE, halves[2 * c + 1] + variances + (size_t)d * NODE);
    for (int r = 0; r < R; r++) {
      typename N::V x = N::one(a.n2 + (size_t)(row + r) * D + d);
      for (int c = 0; c < 4; c++)
        y[r][c] = N::dot(y[r][c], n[c], x);
    }
  }
  const VF cap = set1(VARIANCE_CAP * (l.softcap > 0 ? 1.f / l.softcap : LOG2E));
  for (int r = 0; r < R; r++)
    for (int c = 0; c < 4; c++)
      e[r][c] = min(cap, y[r][c]);
  for (int d = 0; d < D; d += P) {
    typename N::V n[4];
    for (int c = 0; c < 4; c++)
      n[c] = N::two(halves[2 * c] + (size_t)d * NODE, halves[2 * c + 1] + (size_t)d * NODE);
    for (int r = 0; r < R; r++) {
      typename N::V x = N::one(a.n + (size_t)(row + r) * D + d);
      for (int c = 0; c < 4; c++)
        e[r][c] = N::dot(e[r][c], n[c], x);
    }
  }
  for (int r = 0; r < R; r++) {
    VF m = set1(a.most[row + r]);
    for (int c = 0; c < 4; c++) // an estimate far above the exact keys is not credible, and must not overflow
      e[r][c] = C::exp2(min(set1(100.f), sub(capped(l, e[r][c]), m)));
  }
}

// Masses U[row][width] of the units before `far`, from pages first ... last - 1 (8 at a time; `first` is a multiple of
// 8). Adds their sums to the totals of the rows. `units` is the number of keys per unit.
template <class C, int R>
static void unit_masses_of(const Heads<C> &s, const tr_part &part, int h, int far, int first, int last, int unit,
                           const uint64_t *patched, const Sampled<C> &a, int row, float *U, size_t width,
                           float *totals) {
  const tr_layer &l = *s.layer;
  const int per = unit / NODE, pages = far / PAGE;
  for (int p = first; p < last; p += 8) {
    const typename C::Node::T *halves[8];
    for (int x = 0; x < 8; x++)
      halves[x] = s.nodes(part.page[p + x < pages ? p + x : pages - 1], h);
    if (row == 0) // prefetches the next pages
      for (int x = p + 8; x < p + 16 && x < last; x++) {
        const char *next = (const char *)s.nodes(part.page[x], h);
        for (size_t b = 0; b < node_numbers(l) * sizeof(typename C::Node::T); b += 64)
          __builtin_prefetch(next + b, 0, 2);
      }
    VF e[R][4];
    node_tile<C, R>(l, halves, a, row, e);
    // A bit for each node before `far` that has no patch.
    uint64_t mask = ~patched[p / 8];
    if (pages - p < 8)
      mask &= (1ull << (pages - p) * 8) - 1;
    for (int r = 0; r < R; r++) {
      uint64_t m = mask;
      if (l.window) {
        const int start = a.position[row + r] - l.window + 1, n = start / NODE - p * 8; // its first node
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
                        const uint64_t *patched, const Sampled<C> &a, float *U, size_t width, float *totals) {
  int r = 0;
  for (; r + ROWS <= a.rows; r += ROWS)
    unit_masses_of<C, ROWS>(s, part, h, far, first, last, unit, patched, a, r, U, width, totals);
  if constexpr (ROWS > 3)
    for (; r + 3 <= a.rows; r += 3)
      unit_masses_of<C, 3>(s, part, h, far, first, last, unit, patched, a, r, U, width, totals);
  for (; r < a.rows; r++)
    unit_masses_of<C, 1>(s, part, h, far, first, last, unit, patched, a, r, U, width, totals);
}

// Adds the masses of patches.
template <class C>
static void patch_masses(const tr_layer &l, const RouteView<C> &v, int far, int unit, Sampled<C> &a, float *U,
                         size_t width) {
  const RouteHead &h = *v.head;
  if (!h.patches)
    return;
  const typename C::Node::T *halves[8];
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

// --- the mean score: all masses from mean keys only -----------------------------------------------------------------
INLINE int mean_tiles(int node, int keys) { return ((keys + node - 1) / node + 63) / 64; }

// The mean keys of all nodes of a sequence of n keys, in tiles of 64 keys.
template <class C>
static void mean_keys(const Heads<C> &s, const tr_part &part, int h, int node, int n, typename C::Node::T *tiles) {
  typedef typename C::Node N;
  const tr_layer &l = *s.layer;
  const int D = l.head_dim, nodes = (n + node - 1) / node;
  __builtin_memset(tiles, 0, (size_t)mean_tiles(node, n) * D * 64 * sizeof(*tiles));
  for (int g = 0; g < nodes; g++) {
    const int begin = g * node, page = begin / PAGE, count = n - begin < node ? n - begin : node;
    const bool full = (page + 1) * PAGE <= n; // only full pages have nodes
    float sums[256] = {}, key[256];
    int terms = 0;
    if (full) {
      const typename N::T *means = s.nodes(part.page[page], h);
      for (; terms < node / NODE; terms++)
        for (int d = 0; d < D; d++)
          sums[d] += widen(means[node_at<N>(d, begin % PAGE / NODE + terms)]);
    } else
      for (; terms < count; terms++) {
        C::key(s.tile(part.page[page], h), begin % PAGE + terms, D, key);
        for (int d = 0; d < D; d++)
          sums[d] += key[d];
      }
    typename N::T *to = tiles + (size_t)(g / 64) * D * 64 + (size_t)(g % 64) * N::P;
    for (int d = 0; d < D; d++)
      narrow(to + (size_t)(d / N::P) * 64 * N::P + d % N::P, sums[d] / (float)terms);
  }
}

// Unit masses and totals of the sampled rows over n keys; `x` has room for a row of tiles. There are no columns.
template <class C>
static void mean_masses(const tr_layer &l, const typename C::Node::T *tiles, int h, int node, int unit, int n, int far,
                        int last, Sampled<C> &a, float *U, size_t width, float *x) {
  const int seen_nodes = last / node + 1, far_nodes = far / node, per = unit / node;
  for (int r = 0; r < a.rows; r++) {
    const int start = l.window && a.position[r] - l.window + 1 > 0 ? a.position[r] - l.window + 1 : 0;
    const int first = start / node, end = a.position[r] / node + 1; // nodes with mass
    float most = l.sinks ? l.sinks[h * a.group + r % a.group] * LOG2E : NEVER;
    const float sink = most;
    for (int t = first / 64; t * 64 < end; t++) {
      VF y[1][4];
      C::Node::template products<1>(a.n + (size_t)r * l.head_dim, l.head_dim, tiles + (size_t)t * 64 * l.head_dim, y);
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
// Sets a bit for each unit that is read; overwrites U. Returns 1, or 0 if everything is read, or -1 if a score is not
// finite.
// For the mean score, A is the mean of the shares, not their root mean square.
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
    store(U + j, s); // row 0 is no longer needed up to here
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
  // The largest threshold at which enough is read, exactly, by bisection over the bits of a float.
  auto threshold = [&](auto enough) {
    Bits low, high, mid;
    low.i = 1, high.i = 0x7f800000; // selects everything with mass, and nothing
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
  // Keys that the last query reads, and keys that are visible to any query.
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

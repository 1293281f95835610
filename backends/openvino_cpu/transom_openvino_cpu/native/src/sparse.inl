// Sparse attention over the keys that routing.inl selected. Whole blocks are read in place, loose units are gathered
// into tiles, and the columns are a tile of their own.

namespace {
// The keys that a block of queries reads.
struct Plan {
  int32_t *blocks, *loose; // pages; units
  int block_count, loose_count;
  uint64_t columns; // a bit for each column outside the selected units
};
INLINE size_t plan_bytes(int pages, int unit) {
  return align64((size_t)pages * 4) + align64((size_t)pages * (PAGE / unit) * 4);
}
INLINE void plan_in(char *&p, int pages, int unit, Plan *plan) {
  plan->blocks = (int32_t *)p, p += align64((size_t)pages * 4);
  plan->loose = (int32_t *)p, p += align64((size_t)pages * (PAGE / unit) * 4);
  plan->block_count = plan->loose_count = 0, plan->columns = 0;
}
INLINE int plan_items(const Plan &p, int unit) {
  const int per = PAGE / unit;
  return p.block_count + (p.loose_count + per - 1) / per + (p.columns != 0);
}

INLINE void plan_all(Plan &p, int first, int last) {
  for (int j = last; j >= first; j--)
    p.blocks[p.block_count++] = j;
}

INLINE void plan_chosen(Plan &p, int last, int unit, const uint64_t *bits, const int32_t *column, int columns, int far) {
  const int per = PAGE / unit;
  const uint64_t whole = per == 64 ? ~0ull : (1ull << per) - 1;
  for (int j = last; j >= 0; j--) { // blocks with a mask first
    const int at = j * per;
    const uint64_t u = bits[at / 64] >> (at % 64) & whole;
    // Units behind the last key of the last block are not marked, but the block is always read as a whole.
    if (u == whole || j == last)
      p.blocks[p.block_count++] = j;
    else
      for (int x = 0; x < per; x++)
        if (u >> x & 1)
          p.loose[p.loose_count++] = at + x;
  }
  for (int x = 0; x < columns && column[x] < far; x++) {
    const int u = column[x] / unit;
    if (!(bits[u / 64] >> (u % 64) & 1))
      p.columns |= 1ull << x;
  }
}

// Item x of a plan as a tile, for rows at `position` [rows]; `buffer` has room for a tile, `mask` for all rows.
template <class C>
static Tile<C> plan_tile(const Heads<C> &s, const tr_part &part, int h, const Plan &p, int unit, const RouteView<C> *v,
                         int x, const int32_t *position, int rows, char *buffer, uint64_t *mask) {
  const tr_layer &l = *s.layer;
  const int D = l.head_dim, DV = l.value_dim, per = PAGE / unit;
  const int low = position[0], high = position[rows - 1];
  if (x < p.block_count) {
    const int j = p.blocks[x];
    const bool whole = j * PAGE + 63 <= low && (!l.window || high - l.window + 1 <= j * PAGE);
    if (!whole)
      for (int r = 0; r < rows; r++)
        mask[r] = seen(j, position[r], l.window);
    return {s.tile(part.page[j], h), whole ? nullptr : mask, 1};
  }
  const int a = (x - p.block_count) * per;
  if (a >= p.loose_count) {
    if (!l.window) {
      mask[0] = p.columns;
      return {v->kept, mask, 0};
    }
    for (int r = 0; r < rows; r++) {
      mask[r] = p.columns;
      for (int i = 0; i < v->head->columns && v->head->column[i] <= position[r] - l.window; i++)
        mask[r] &= ~(1ull << i);
    }
    return {v->kept, mask, 1};
  }
  const int n = p.loose_count - a < per ? p.loose_count - a : per;
  const Kept<C> to = kept_at<C>(buffer, D, DV);
  for (int y = 0; y < n; y++) {
    const int u = p.loose[a + y];
    copy_tokens(s.tile(part.page[u / per], h), u % per * unit, to, y * unit, unit, D, DV);
  }
  const int keys = n * unit;
  clear_tokens(to, keys, D, DV);
  const uint64_t every = keys == 64 ? ~0ull : (1ull << keys) - 1;
  if (!l.window) {
    mask[0] = every;
    return {to, keys == 64 ? nullptr : mask, 0};
  }
  for (int r = 0; r < rows; r++) {
    mask[r] = every;
    for (int y = 0; y < n; y++) {
      const int from = p.loose[a + y] * unit, start = position[r] - l.window + 1;
      const int gone = start - from < 0 ? 0 : start - from > unit ? unit : start - from;
      if (gone)
        mask[r] &= ~(((gone == 64 ? 0 : 1ull << gone) - 1) << y * unit);
    }
  }
  return {to, mask, 1};
}

INLINE float coverage_of(const tr_sparsity &rule, float loose) {
  const float c = 1.f - (1.f - rule.coverage) * loose;
  return c > 0 ? c : 0;
}

// Scores of the keys in the local window. A window may be larger than the sequence.
INLINE size_t near_bytes(const tr_sparsity &rule, int pages) {
  return align64((size_t)((rule.local < pages ? rule.local : pages) + 3) * 64 * 4 * TOGETHER);
}

INLINE size_t choice_bytes(const tr_layer &l, const tr_sparsity &rule, int pages, int sampled) {
  const size_t width = (size_t)pages * PAGE / rule.unit + 64;
  return align64((size_t)sampled * width * 4) + align64((size_t)(pages * PAGE / rule.unit / 64 + 2) * 8) +
         align64((size_t)(pages / 8 + 2) * 8) + near_bytes(rule, pages) + align64((size_t)sampled * 4) +
         plan_bytes(pages + 1, rule.unit) + 256 + (size_t)l.heads * 0;
}

// Scores the units for the query block at positions p0 ... p1 - 1, and plans which keys it reads. n keys are cached,
// including those of the block and after it. Returns false if a score is not finite.
template <class C>
static bool plan_block(const Heads<C> &s, const tr_part &part, int h, int p0, int p1, int n, const tr_sparsity &rule,
                       float loose, const RouteView<C> &v, Plan &plan, char *memory, double *read, double *seen_keys) {
  const tr_layer &l = *s.layer;
  const int last = p1 - 1, far = far_end(p0, rule.local), pages = last / PAGE + 1;
  const int start = l.window && p0 - l.window + 1 > 0 ? p0 - l.window + 1 : 0;
  plan_in(memory, pages, rule.unit, &plan);
  if (last + 1 <= rule.dense_below || far <= start) {
    plan_all(plan, start / PAGE, last / PAGE);
    *read += last + 1 - start, *seen_keys += last + 1 - start;
    return true;
  }
  const int step = PAGE / rule.rows, tokens = p1 - p0, most = (tokens >= step ? tokens / step : 1) * s.group;
  Sampled<C> a = sampled_in<C>(memory, l, most);
  a.group = s.group;
  if (tokens >= step)
    for (int p = p0 + step - 1; p < p1; p += step)
      sample(s, part, h, p, a);
  else
    sample(s, part, h, last, a);
  float *x = (float *)memory;
  memory += near_bytes(rule, pages);
  uint64_t *patched = (uint64_t *)memory;
  memory += align64((size_t)(pages / 8 + 2) * 8);
  uint64_t *bits = (uint64_t *)memory;
  memory += align64((size_t)(pages * PAGE / rule.unit / 64 + 2) * 8);
  float *U = (float *)memory;
  const size_t width = (size_t)pages * PAGE / rule.unit + 64;
  const int columns = rule.columns ? v.head->columns : 0; // by this rule; the sequence may have columns by another rule
  if (rule.mean_score) {
    typename C::Node::T *tiles = (typename C::Node::T *)(memory + align64((size_t)most * width * 4));
    float *row = (float *)((char *)tiles + align64((size_t)mean_tiles(rule.node, n) * 64 * l.head_dim * sizeof(*tiles)));
    mean_keys(s, part, h, rule.node, n, tiles);
    mean_masses<C>(l, tiles, h, rule.node, rule.unit, n, far, last, a, U, width, row);
  } else {
    exact_masses(s, part, h, far, last, v, columns, a, x);
    mark_patches(v.head->patch, columns ? v.head->patches : 0, far, patched);
    unit_masses(s, part, h, far, 0, far / PAGE, rule.unit, patched, a, U, width, a.total);
    if (columns)
      patch_masses(l, v, far, rule.unit, a, U, width);
  }
  int keys, all;
  const int found = choose_units(rule, coverage_of(rule, loose), p0, last, l.window, far, a.rows, U, width, a.total,
                                 a.near, a.column, v.head->column, columns, bits, &keys, &all);
  if (found < 0)
    return false;
  if (found)
    plan_chosen(plan, last / PAGE, rule.unit, bits, v.head->column, columns, far);
  else
    plan_all(plan, start / PAGE, last / PAGE), keys = all;
  *read += keys, *seen_keys += all;
  return true;
}

// Bytes of memory for plan_block.
template <class C>
INLINE size_t plan_block_bytes(const tr_layer &l, const tr_sparsity &rule, int pages, int tokens) {
  const int group = l.heads / l.kv_heads, step = PAGE / rule.rows;
  const int rows = (tokens >= step ? (tokens < PAGE ? tokens : PAGE) / step : 1) * group;
  size_t means = 0;
  if (rule.mean_score) {
    const size_t nodes = (size_t)mean_tiles(rule.node, pages * PAGE) * 64;
    means = align64(nodes * l.head_dim * sizeof(typename C::Node::T)) + align64(nodes * 4) + 64;
  }
  return sampled_bytes<C>(l, rows) + choice_bytes(l, rule, pages, rows + 1) + means;
}

// Prefetches item x of a plan.
template <class C>
static void ask_ahead(const Heads<C> &s, const tr_part &part, int h, const Plan &p, int unit, int x) {
  const tr_layer &l = *s.layer;
  const int per = PAGE / unit;
  if (x < p.block_count)
    return ask_for_tile(s, part.page[p.blocks[x]], h);
  for (int a = (x - p.block_count) * per; a < p.loose_count && a < (x - p.block_count + 1) * per; a++) {
    const int u = p.loose[a], t = u % per * unit;
    const Kept<C> tile = s.tile(part.page[u / per], h);
    const char *k = (const char *)(tile.k + (size_t)t * C::P), *v = (const char *)(tile.v + (size_t)t * l.value_dim);
    for (int d = 0; d < l.head_dim / C::P; d++)
      for (int b = 0; b < unit * 4; b += 64)
        __builtin_prefetch(k + (size_t)d * PAGE * 4 + b, 0, 2);
    for (size_t b = 0; b < (size_t)unit * l.value_dim * sizeof(typename C::T); b += 64)
      __builtin_prefetch(v + b, 0, 2);
  }
}

// As attend_dense, over a plan.
template <class C>
static bool attend_plan(const Heads<C> &s, const tr_part &part, int h, int p0, int p1, const Plan &plan, int unit,
                        const RouteView<C> &v, char *memory) {
  const tr_layer &l = *s.layer;
  const int at_once = queries_at_once(s.group);
  bool fine = true;
  for (; p0 < p1; p0 += at_once) {
    const int tokens = p1 - p0 < at_once ? p1 - p0 : at_once, rows = tokens * s.group;
    char *m = memory;
    typename C::Q *q;
    Gathered<C> g = gathered_in<C>(m, l, (size_t)at_once * s.group, q);
    uint64_t *mask = (uint64_t *)m;
    m += align64((size_t)at_once * s.group * 8);
    int32_t *position = (int32_t *)m;
    m += align64((size_t)at_once * s.group * 4);
    char *buffer = m;
    const size_t row = part.begin + p0 - part.past;
    load_queries<C, C>(s, row, tokens, h, query_factor(l), q);
    begin_rows(s, g, rows, h, true);
    for (int r = 0; r < rows; r++)
      position[r] = p0 + r / s.group;
    const int items = plan_items(plan, unit);
    for (int x = 0; x < items; x++) {
      ask_ahead(s, part, h, plan, unit, x + 1);
      attend_tile<C>(l, plan_tile<C>(s, part, h, plan, unit, &v, x, position, rows, buffer, mask), g, rows);
    }
    fine &= write_rows(s, g, row, h, rows);
  }
  return fine;
}
template <class C> INLINE size_t attend_plan_bytes(const tr_layer &l) {
  const size_t rows = (size_t)queries_at_once(l.heads / l.kv_heads) * (l.heads / l.kv_heads);
  return attend_bytes<C>(l) + align64(rows * 4) + align64(rows * 8) +
         align64(tile_bytes<C>(l.head_dim, l.value_dim)) + 64;
}
} // namespace

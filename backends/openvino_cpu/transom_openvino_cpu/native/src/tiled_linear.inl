// Products by bfloat16 in the tiles of AMX.
//
// Weights in blocks are rounded to bfloat16: each is computed in float from its quant, scale and minimum. The sums of
// all columns then stay in the tiles, and nothing is left to be scaled. Scaling the sums of each block instead, as other
// instruction sets do, would take longer than the products.
//
// Tiles add in an order of their own, in steps of 32 columns, and so does every row: a single one in registers.

namespace {
const int STEP = 32; // columns of one product of tiles
const size_t STEP_BYTES = STEP * 32;

// The lowest four bits of each lane as a float.
INLINE VF nibble(VI w) {
  return _mm512_permutexvar_ps(w, _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}

// Weights are rounded to bfloat16 by being cut, after a multiplication with this, which adds half of a unit in the last
// place, give or take a sixth. It is part of their scale and so costs nothing.
const float UP = 1 + 1.f / 384;
INLINE VF cut(VF x) { return as_float(iand(as_int(x), iset1((int)0xffff0000))); }
INLINE VI cut_pairs(VF low, VF high) { return _mm512_mask_blend_epi16(0xaaaaaaaa, right<16>(as_int(low)), as_int(high)); }

// What stays the same for all tiles of a matrix.
struct Layout {
  int columns, steps, block;
  size_t tile; // bytes of a tile
  bool has_minimums;
  float zero;
  Blocks blocks;
  explicit Layout(const tr_matrix &m)
      : columns(m.columns), steps((m.columns + STEP - 1) / STEP), block(m.block), tile(tile_bytes(m)),
        has_minimums(m.has_minimums), zero((float)m.zero), blocks(m) {}
};

// Where the next columns of a tile of weights are.
struct Place {
  BlockAt block;
  int in; // columns of the block before them; without blocks, of the tile
};

// Calls to(column, first, second) with each two of the next `columns` (at most 32) columns of a tile of weights, not yet
// cut. BITS is 0 for weights that are bfloat16. WHOLE: blocks are multiples of 32.
template <int BITS, bool WHOLE, class F>
INLINE void step_of(const Layout &l, Place &at, int columns, bool two_levels, const F &to) {
  if (WHOLE)
    columns = STEP;
  if constexpr (BITS == 0) {
    for (int c = 0; c < columns; c += 2) {
      const VI pair = iload(at.block.superblock + (size_t)(at.in + c) * 32);
      to(c, as_float(left<16>(pair)), as_float(pair));
    }
    at.in += columns;
    return;
  }
  for (int done = 0; done < columns;) {
    const int left = WHOLE ? STEP : l.block - at.in, n = left < columns - done ? left : columns - done;
    const VF up = set1(UP), d = mul(l.blocks.scales(at.block, two_levels), up);
    const VF minimum = l.has_minimums ? mul(l.blocks.minimums(at.block, two_levels), up) : zero();
    const VF least = fma(d, set1(-l.zero), minimum);
    const Quants<BITS> quants(l.block, l.blocks.quants(at.block, two_levels), at.in);
    for (int j = 0; j < n; j += 8) {
      VF x[8];
      if constexpr (BITS == 4) {
        const VI w = iload(quants.low + (size_t)j * 8);
        x[0] = nibble(w), x[1] = nibble(right<8>(w)), x[2] = nibble(right<16>(w)), x[3] = nibble(right<24>(w));
        x[4] = nibble(right<4>(w)), x[5] = nibble(right<12>(w)), x[6] = nibble(right<20>(w)), x[7] = nibble(right<28>(w));
      } else
        quants.eight(j, x);
      for (int k = 0; k < 8; k += 2)
        to(done + j + k, fma(x[k], d, least), fma(x[k + 1], d, least));
    }
    done += n, at.in += n;
    if (at.in == l.block)
      l.blocks.next(at.block, two_levels), at.in = 0;
  }
}
// The same columns as bfloat16, then zeros, [16][16][2].
template <int BITS, bool WHOLE> INLINE void pack_step(const Layout &l, Place &at, int columns, char *out) {
  step_of<BITS, WHOLE>(l, at, columns, l.blocks.levels,
                       [&](int c, VF first, VF second) { istore(out + c * 32, cut_pairs(first, second)); });
  for (int c = WHOLE ? STEP : (columns + 1) / 2 * 2; c < STEP; c += 2)
    istore(out + c * 32, izero());
}

// While it exists, subnormal numbers count as zero, as in tiles.
struct NoSubnormals {
  const unsigned before = _mm_getcsr();
  NoSubnormals() { _mm_setcsr(before | 0x8040); } // FTZ, DAZ
  ~NoSubnormals() { _mm_setcsr(before); }
};

// One row, NV tiles of weights, without tiles but with their sums bit by bit: in each step those of even and of odd columns
// (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBF16PS). Weights stay in registers.
template <int NV, int BITS, bool WHOLE, bool TWO_LEVELS>
static void one_row(const Layout &l, const char *first, const Acts &a, float *y) {
  Place at[NV];
  VF sums[NV];
  for (int v = 0; v < NV; v++)
    at[v] = {{first + v * l.tile, 0}, 0}, sums[v] = zero();
  const size_t each = l.tile / l.steps;
  size_t ahead = 0;
  for (int s = 0; s < l.steps; s++) {
    const float *x = a.floats + s * STEP;
    const int left = l.columns - s * STEP, columns = left < STEP ? left : STEP;
    for (int v = 0; v < NV; v++) {
      VF even = zero(), odd = zero();
      step_of<BITS, WHOLE>(l, at[v], columns, TWO_LEVELS, [&](int column, VF first, VF second) {
        even = fma(cut(first), set1(x[column]), even), odd = fma(cut(second), set1(x[column + 1]), odd);
      });
      sums[v] = add(sums[v], add(even, odd));
    }
    for (const size_t end = (s + 1) * each; ahead < end; ahead += 64)
      for (int v = 0; v < NV; v++)
        ask_ahead(first + v * l.tile, ahead, l.tile, NV);
  }
  for (int v = 0; v < NV; v++)
    store(y + 16 * v, sums[v]);
}

// Up to sixteen rows, NV tiles of weights. While tiles are multiplied, the next weights are unpacked.
template <int NV, int BITS, bool WHOLE>
static void few_tiled(const Layout &l, const char *first, const Acts &a, int rows, float *y) {
  const size_t row = WIDE * 64;
  alignas(64) char w[2][NV][STEP_BYTES];
  Place at[NV];
  const size_t each = l.tile / l.steps;
  size_t ahead = 0;
  auto unpack = [&](int s) {
    const int left = l.columns - s * STEP;
    for (int v = 0; v < NV; v++)
      pack_step<BITS, WHOLE>(l, at[v], left < STEP ? left : STEP, w[s & 1][v]);
    for (const size_t end = (s + 1) * each; ahead < end; ahead += 64)
      for (int v = 0; v < NV; v++)
        ask_ahead(first + v * l.tile, ahead, l.tile, NV);
  };
  for (int v = 0; v < NV; v++)
    at[v] = {{first + v * l.tile, 0}, 0};
  Tiles tiles(64, rows);
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>();
  unpack(0);
  for (int s = 0; s < l.steps; s++) {
    const char *next = w[s & 1][0];
    if (s + 1 < l.steps)
      unpack(s + 1);
    tile_load<4>(a.pairs + (size_t)s * TILE * 16, 64);
    tile_load<5>(next, 64), Pairs::product<0, 4, 5>();
    if (NV > 1)
      tile_load<7>(next + STEP_BYTES, 64), Pairs::product<1, 4, 7>();
    if (NV > 2)
      tile_load<5>(next + 2 * STEP_BYTES, 64), Pairs::product<2, 4, 5>();
  }
  tile_store<0>(y, row);
  if (NV > 1)
    tile_store<1>(y + 16, row);
  if (NV > 2)
    tile_store<2>(y + 32, row);
}

// Adds sixteen rows, or 32 if TWICE, times `steps` steps of NV tiles of weights at p to y, or sets y if it is not `more`.
template <int NV, bool TWICE>
static void tiled_rows(const char *const *p, int steps, const uint32_t *x, size_t x_apart, float *y, bool more) {
  const size_t row = WIDE * 64;
  float *below = y + TILE * WIDE * 16;
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  if (more) {
    tile_load<0>(y, row);
    if (NV > 1)
      tile_load<1>(y + 16, row);
    if (TWICE)
      tile_load<2>(below, row);
    if (NV > 1 && TWICE)
      tile_load<3>(below + 16, row);
  }
  for (int s = 0; s < steps; s++, x += TILE * 16) {
    for (int b = 0; b < 1024; b += 64) { // the next rows come from the L2 cache
      __builtin_prefetch((const char *)x + 1024 + b, 0, 3);
      if (TWICE)
        __builtin_prefetch((const char *)(x + x_apart) + 1024 + b, 0, 3);
    }
    tile_load<4>(x, 64), tile_load<5>(p[0] + s * STEP_BYTES, 64), Pairs::product<0, 4, 5>();
    if (NV > 1)
      tile_load<7>(p[NV - 1] + s * STEP_BYTES, 64), Pairs::product<1, 4, 7>();
    if (TWICE)
      tile_load<6>(x + x_apart, 64), Pairs::product<2, 6, 5>();
    if (NV > 1 && TWICE)
      Pairs::product<3, 6, 7>();
  }
  tile_store<0>(y, row);
  if (NV > 1)
    tile_store<1>(y + 16, row);
  if (TWICE)
    tile_store<2>(below, row);
  if (NV > 1 && TWICE)
    tile_store<3>(below + 16, row);
}

// More rows: a panel of weights stays in the L1 cache while all rows are multiplied by it.
template <int NV, int BITS, bool WHOLE>
static void many_tiled(const Layout &l, const char *first, const Acts &a, int rows, float *y, char *panel) {
  const int most = TILED_PANEL / STEP_BYTES, whole = rows / TILE * TILE;
  const size_t apart = (size_t)l.steps * TILE * 16; // words of sixteen rows
  const char *p[NV];
  Place at[NV];
  for (int v = 0; v < NV; v++)
    p[v] = panel + v * TILED_PANEL, at[v] = {{first + v * l.tile, 0}, 0};
  for (int s = 0; s < l.steps; s += most) {
    const int n = l.steps - s < most ? l.steps - s : most;
    for (int v = 0; v < NV; v++)
      for (int k = 0; k < n; k++) {
        const int left = l.columns - (s + k) * STEP;
        pack_step<BITS, WHOLE>(l, at[v], left < STEP ? left : STEP, panel + v * TILED_PANEL + k * STEP_BYTES);
      }
    auto some = [&](int r, auto twice) {
      const uint32_t *x = a.pairs + (size_t)(r / TILE) * apart + (size_t)s * TILE * 16;
      tiled_rows<NV, twice.value == 1>(p, n, x, apart, y + (size_t)r * WIDE * 16, s > 0);
    };
    {
      Tiles tiles(64);
      int r = 0;
      for (; r + 2 * TILE <= rows; r += 2 * TILE)
        some(r, Bits<1>());
      if (r < whole)
        some(r, Bits<0>());
    }
    if (whole < rows) {
      Tiles tiles(64, rows - whole);
      some(whole, Bits<0>());
    }
  }
}

template <int BITS, bool WHOLE>
static void tiled_products(const tr_matrix &m, int t, int count, const Acts &a, int rows, float *y, char *panel) {
  const Layout l(m);
  const char *first = tile_at(m, t);
  int x = 0;
  if (rows == 1) {
    NoSubnormals here;
    for (; x + 2 <= count; x += 2)
      l.blocks.levels ? one_row<2, BITS, WHOLE, true>(l, first + x * l.tile, a, y + 16 * x)
                      : one_row<2, BITS, WHOLE, false>(l, first + x * l.tile, a, y + 16 * x);
    if (x < count)
      l.blocks.levels ? one_row<1, BITS, WHOLE, true>(l, first + x * l.tile, a, y + 16 * x)
                      : one_row<1, BITS, WHOLE, false>(l, first + x * l.tile, a, y + 16 * x);
    return;
  }
  if (rows <= TILE) {
    for (; count - x > 2 && count - x != 4; x += 3)
      few_tiled<3, BITS, WHOLE>(l, first + x * l.tile, a, rows, y + 16 * x);
    for (; x + 2 <= count; x += 2)
      few_tiled<2, BITS, WHOLE>(l, first + x * l.tile, a, rows, y + 16 * x);
    if (x < count)
      few_tiled<1, BITS, WHOLE>(l, first + x * l.tile, a, rows, y + 16 * x);
    return;
  }
  for (; x + 2 <= count; x += 2)
    many_tiled<2, BITS, WHOLE>(l, first + x * l.tile, a, rows, y + 16 * x, panel);
  for (; x < count; x++)
    many_tiled<1, BITS, WHOLE>(l, first + x * l.tile, a, rows, y + 16 * x, panel);
}
static void tiled_products(const tr_matrix &m, int t, int count, const Acts &a, int rows, float *y, char *panel) {
  if (m.kind == TR_BF16)
    return m.columns % STEP ? tiled_products<0, false>(m, t, count, a, rows, y, panel)
                            : tiled_products<0, true>(m, t, count, a, rows, y, panel);
  by_bits(m, [&](auto bits) {
    m.block % STEP ? tiled_products<bits.value, false>(m, t, count, a, rows, y, panel)
                   : tiled_products<bits.value, true>(m, t, count, a, rows, y, panel);
  });
}
} // namespace

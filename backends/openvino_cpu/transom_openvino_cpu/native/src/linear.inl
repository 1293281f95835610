// Products of rows of activations with a matrix in any format.
//
// There are two algorithms. Few rows: the packed matrix is read once and unpacked in registers, at the speed of memory.
// Many rows: tiles are unpacked to a panel that stays in the L1 or L2 cache and is multiplied by all rows. Activations
// are float, bfloat16, or int8 in groups with one scale each, whose products are exact integers within a group.
//
// Every row is added up in the same order whatever the number of rows, so a sequence gets the same bits whatever shares
// its step. A change to one algorithm is therefore a change to both, see tests/native/test_sharing.py.

namespace {
const int WIDE = 6;  // tiles of 16 outputs that are computed together
const int FEW = 4;   // up to this many rows the algorithm for few rows is used
const int MOST = 256; // rows in one call
const int CUT = 512; // columns in one panel of floats, or of bfloat16

// Rows of activations in the format of a product.
struct Acts {
  const float *wide; // [rows][stride]
  size_t stride;
  int by, columns;
  // int8: columns that share a scale, and the columns among them (at most a block) that are summed as integers.
  int group, unit, groups, units;
  int8_t *bytes;   // [rows][columns up to a multiple of 64]
  float *scales;   // [rows][groups]
  float *sums;     // [rows][units]: of the quantized numbers; otherwise [rows][blocks]: of the numbers
  int32_t *starts; // [rows][units]: -center times the sum of bytes
  uint32_t *pairs; // bfloat16: [rows][columns / 2], or see prepare_tiles; int8: the sums of two units
  float *floats;   // the columns of a single row for tiles, rounded to bfloat16
  size_t pair_stride;
};

// Activations that share a scale. Larger groups need fewer multiplications and lose more to rounding.
INLINE int group_of(const tr_matrix &m) {
  if (m.block >= 32)
    return m.block % 32 == 0 ? 32 : 8;
  return 32 % m.block == 0 && m.columns % 32 == 0 ? 32 : m.block;
}
// Whether units begin where planes do.
INLINE bool planes_fit(const tr_matrix &m) {
  return (m.kind != TR_U5 && m.kind != TR_U6) || (group_of(m) == 32 && m.block % (m.kind == TR_U5 ? 32 : 16) == 0);
}
INLINE int unit_of(const tr_matrix &m) { return m.block < group_of(m) ? m.block : group_of(m); }
// Subtracted from quants to make integers. With minimums it is the middle, so that the remaining term is small.
INLINE int center_of(const tr_matrix &m) { return m.has_minimums ? 1 << (bits_of(m) - 1) : m.zero; }

// Whether a product is computed in tiles, see tiled_linear.inl.
INLINE bool in_tiles(int by) { return TILED && by == TR_BY_BF16; }
const size_t TILED_PANEL = 8 << 10; // bytes of a panel of one tile
INLINE size_t tiled_acts_bytes(const tr_matrix &m, int rows) {
  return ((size_t)(rows + TILE - 1) / TILE * 1024 + 128) * ((m.columns + 31) / 32);
}

// Bytes that `prepare` needs.
INLINE size_t acts_bytes(const tr_matrix &m, int by, int rows) {
  if (by == TR_BY_INT8) {
    const size_t units = m.columns / unit_of(m), groups = m.columns / group_of(m);
    return rows * align64(m.columns) + align64(rows * groups * 4) + 2 * align64(rows * units * 4) +
           align64(rows * ((units + 1) / 2) * 4) + 64;
  }
  if (in_tiles(by))
    return tiled_acts_bytes(m, rows);
  const size_t pairs = by == TR_BY_BF16 ? align64((size_t)rows * ((m.columns + 1) / 2) * 4) : 0;
  return pairs + (in_blocks(m) ? align64((size_t)rows * (m.columns / m.block) * 4) : 0) + 64;
}

static void quantize_row(const float *x, const Acts &a, int row, int center) {
  int8_t *q = a.bytes + row * align64(a.columns);
  float *sums = a.sums + (size_t)row * a.units;
  int32_t *starts = a.starts + (size_t)row * a.units;
  for (int g = 0; g < a.groups; g++, x += a.group, q += a.group) {
    float most = 0;
    int j = 0;
    if (a.group >= 16) {
      VF m = zero();
      for (; j + 16 <= a.group; j += 16) {
        VF v = load(x + j);
        m = max(m, max(v, sub(zero(), v)));
      }
      most = top(m);
    }
    for (; j < a.group; j++)
      most = __builtin_fmaxf(most, __builtin_fabsf(x[j]));
    float scale = most / 127.f;
    const float inverse = most > 1e-30f ? 127.f / most : 0.f; // avoids infinity
    for (int u = 0; u < a.group; u += a.unit) {
      float total = 0;
      j = u;
      if (a.unit >= 16) {
        VF t = zero();
        for (; j + 16 <= u + a.unit; j += 16) {
          VI v = to_int(mul(load(x + j), set1(inverse)));
          t = add(t, to_float(v));
          store_bytes(q + j, v);
        }
        total = sum(t);
      }
      for (; j < u + a.unit; j++) {
        const float v = __builtin_rintf(x[j] * inverse);
        // With NaN among them `most` may not be the largest; the scale becomes NaN below.
        q[j] = (int8_t)__builtin_fmaxf(-127.f, __builtin_fminf(127.f, v)), total += v;
      }
      if (!(total > -1e9f)) // NaN and infinity became the lowest integer; the scale carries them
        scale = NAN, total = 0;
      *sums++ = scale * total, *starts++ = -center * (int32_t)total;
    }
    a.scales[(size_t)row * a.groups + g] = scale;
  }
}

INLINE void pack_pairs(const float *s, int n, uint32_t *d) { // n floats to (n + 1) / 2 bfloat16 pairs
  int j = 0;
  for (; j + 32 <= n; j += 32)
    istore(d + j / 2, to_bf16x32(load(s + j), load(s + j + 16)));
  if (j < n) {
    float tail[32] = {};
    uint32_t words[16];
    for (int i = 0; i < n - j; i++)
      tail[i] = s[j + i];
    istore(words, to_bf16x32(load(tail), load(tail + 16)));
    for (int i = 0; i < (n - j + 1) / 2; i++)
      d[j / 2 + i] = words[i];
  }
}

// To a.pairs, sixteen rows at a time: [rows / 16][steps of 32 columns][16 rows][16 pairs], the last columns padded with
// zeros. Each row of a step is one row of a tile.
static void prepare_tiles(const Acts &a, int rows) {
  const int steps = (a.columns + 31) / 32;
  for (int r = 0; r < rows; r++)
    for (int s = 0; s < steps; s++) {
      uint32_t *to = a.pairs + (((size_t)(r / TILE) * steps + s) * TILE + r % TILE) * 16;
      const int left = a.columns - s * 32, n = left < 32 ? left : 32;
      if (n < 32)
        __builtin_memset(to, 0, 64);
      pack_pairs(a.wide + r * a.stride + s * 32, n, to);
    }
}

// The sum of n columns as a product has them: rounded, if it is by bfloat16. n is a multiple of 8.
INLINE float sum_of(const Acts &a, int row, int column, int n) {
  float sums[8] = {};
  const float *x = a.wide + row * a.stride + column;
  const uint32_t *pairs = a.pairs ? a.pairs + row * a.pair_stride + column / 2 : nullptr;
  for (int j = 0; j < n; j += 8)
    for (int k = 0; k < 8; k++)
      sums[k] += pairs ? bf16_to_float((uint16_t)(pairs[(j + k) / 2] >> (k & 1 ? 16 : 0))) : x[j + k];
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

// Converts x [rows][stride] to the format of a product, in `memory` of acts_bytes.
static Acts prepare(const tr_matrix &m, int by, const float *x, size_t stride, int rows, void *memory) {
  Acts a = {};
  a.wide = x, a.stride = stride, a.by = by, a.columns = m.columns;
  char *p = (char *)memory;
  if (in_tiles(by)) {
    a.pairs = (uint32_t *)p;
    prepare_tiles(a, rows);
    if (rows == 1) {
      const int steps = (m.columns + 31) / 32;
      a.floats = (float *)(p + (size_t)steps * 1024);
      for (int i = 0; i < steps * 32; i++)
        a.floats[i] = bf16_to_float((uint16_t)(a.pairs[i / 32 * 256 + i % 32 / 2] >> (i & 1 ? 16 : 0)));
    }
    return a;
  }
  if (by == TR_BY_INT8) {
    a.group = group_of(m), a.unit = unit_of(m), a.groups = m.columns / a.group, a.units = m.columns / a.unit;
    a.bytes = (int8_t *)p, p += rows * align64(m.columns);
    a.scales = (float *)p, p += align64((size_t)rows * a.groups * 4);
    a.sums = (float *)p, p += align64((size_t)rows * a.units * 4);
    a.starts = (int32_t *)p, p += align64((size_t)rows * a.units * 4);
    a.pairs = (uint32_t *)p, a.pair_stride = (a.units + 1) / 2;
    for (int r = 0; r < rows; r++) {
      quantize_row(x + r * stride, a, r, center_of(m));
      if (m.has_minimums)
        pack_pairs(a.sums + (size_t)r * a.units, a.units, a.pairs + r * a.pair_stride);
    }
    return a;
  }
  if (by == TR_BY_BF16) {
    a.pairs = (uint32_t *)p, a.pair_stride = (m.columns + 1) / 2;
    for (int r = 0; r < rows; r++)
      pack_pairs(x + r * stride, m.columns, a.pairs + r * a.pair_stride);
  }
  if (in_blocks(m)) {
    a.units = m.columns / m.block;
    a.sums = (float *)(p + (by == TR_BY_BF16 ? align64((size_t)rows * a.pair_stride * 4) : 0));
    for (int r = 0; r < rows; r++)
      for (int g = 0; g < a.units; g++)
        a.sums[(size_t)r * a.units + g] = sum_of(a, r, g * m.block, m.block);
  }
  return a;
}

INLINE Acts from_row(Acts a, int row) {
  a.wide += row * a.stride;
  if (a.sums)
    a.sums += (size_t)row * a.units;
  if (a.pairs)
    a.pairs += row * a.pair_stride;
  if (a.bytes) {
    a.bytes += row * align64(a.columns);
    a.scales += (size_t)row * a.groups;
    a.starts += (size_t)row * a.units;
  }
  return a;
}

// --- few rows -------------------------------------------------------------------------------------------------------
// The minimums of 16 rows of a block, relative to the center.
INLINE VF least_of(const tr_matrix &m, VF scales, VF minimums) {
  return fma(scales, set1((float)(center_of(m) - m.zero)), minimums);
}

const size_t AHEAD = 4096; // bytes of a matrix that are asked for before they are needed: alone, processors ask too late
// UNIT and PER: as in `many_bytes`.
template <int R, int BITS, int UNIT, int PER>
static void few_bytes(const tr_matrix &m, int t, const Acts &a, VF *y) {
  const Blocks blocks(m);
  BlockAt at = {tile_at(m, t), 0};
  const size_t ld = align64(m.columns);
  const int unit = UNIT ? UNIT : a.unit, per_group = PER ? PER : a.group / a.unit;
  VF total[R], part[R], minimums[R], even = zero(); // of an even unit, which waits for the odd one
  for (int r = 0; r < R; r++)
    total[r] = part[r] = minimums[r] = zero();
  auto add_minimums = [&](VF first, VF second, int pair) {
    const VI two = to_pairs(first, second);
    for (int r = 0; r < R; r++)
      minimums[r] = dot_pairs(minimums[r], two, iset1_at(a.pairs + r * a.pair_stride + pair));
  };
  int group = 0, left = per_group; // units of the group that are left
  VF outer = zero(), outer_least = zero(); // of the superblock
  for (int u = 0, column = 0; column < m.columns; blocks.next(at)) {
    if (blocks.levels && at.place == 0)
      outer = blocks.outer(at), outer_least = blocks.outer_minimums(at);
    const VF d = blocks.levels ? mul(outer, blocks.codes(at)) : blocks.scales(at);
    VF least = zero();
    if (m.has_minimums)
      least = least_of(m, d, blocks.levels ? mul(outer_least, blocks.minimum_codes(at)) : blocks.minimums(at));
    const char *quants = blocks.quants(at);
    for (int in = 0; in < m.block; in += unit, u++, column += unit) {
      if (u & 1) {
        if (m.has_minimums)
          add_minimums(even, least, u / 2);
      } else
        even = least;
      VI i[R], k[R];
      for (int r = 0; r < R; r++)
        i[r] = iset1(a.starts[r * a.units + u]), k[r] = izero();
      const int8_t *b = a.bytes + column;
      const Quants<BITS> q(m.block, quants, in);
      for (int line = 0; line < unit * BITS * 2; line += 64)
        __builtin_prefetch(quants + in * BITS * 2 + line + AHEAD, 0, 3);
      for (int j = 0; j < unit; j += 8) {
        VI w0, w1;
        q.eight(j, w0, w1);
        for (int r = 0; r < R; r++) {
          VI x0 = iset1_at(b + r * ld + j), x1 = iset1_at(b + r * ld + j + 4);
          i[r] = BITS < 8 ? dot_small(i[r], w0, x0) : dot_bytes(i[r], w0, x0);
          k[r] = BITS < 8 ? dot_small(k[r], w1, x1) : dot_bytes(k[r], w1, x1);
        }
      }
      if (per_group == 1) {
        for (int r = 0; r < R; r++)
          total[r] = fma(to_float(iadd(i[r], k[r])), mul(d, set1(a.scales[r * a.groups + u])), total[r]);
        continue;
      }
      for (int r = 0; r < R; r++)
        part[r] = fma(to_float(iadd(i[r], k[r])), d, part[r]);
      if (--left)
        continue;
      for (int r = 0; r < R; r++) {
        total[r] = fma(part[r], set1(a.scales[r * a.groups + group]), total[r]);
        part[r] = zero();
      }
      group++, left = per_group;
    }
  }
  if (m.has_minimums && a.units & 1)
    add_minimums(even, zero(), a.units / 2);
  for (int r = 0; r < R; r++)
    y[r] = m.has_minimums ? add(total[r], minimums[r]) : total[r];
}

template <int R, int BITS> INLINE void few_bytes(const tr_matrix &m, int t, const Acts &a, VF *y) {
  // Quants with planes have no other units: `planes_fit`.
  if constexpr (BITS == 5)
    few_bytes<R, 5, 32, 1>(m, t, a, y);
  else if (a.unit == 32 && a.group == 32)
    few_bytes<R, BITS, 32, 1>(m, t, a, y);
  else if (BITS == 6 || (a.unit == 16 && a.group == 32))
    few_bytes<R, BITS, 16, 2>(m, t, a, y);
  else if constexpr (BITS != 6)
    few_bytes<R, BITS, 0, 0>(m, t, a, y);
}

// The others compute NV tiles at once, for a single row two: a sum waits for the one before it, so a single chain of
// sums would be slow. Tiles are short, so the processor does not notice in time that there are two streams.
INLINE void ask_ahead(const char *tile, size_t at, size_t bytes, int tiles) {
  at += AHEAD;
  __builtin_prefetch(tile + at + (at < bytes ? 0 : (tiles - 1) * bytes), 0, 3);
}

template <int R, int NV, int BITS, bool PAIRS>
static void few_blocks(const tr_matrix &m, int t, const Acts &a, VF (&y)[R][NV]) {
  const Blocks blocks(m);
  const size_t whole = tile_bytes(m), each = whole / a.units;
  BlockAt at[NV];
  for (int v = 0; v < NV; v++)
    at[v] = {tile_at(m, t + v), 0};
  for (int r = 0; r < R; r++)
    for (int v = 0; v < NV; v++)
      y[r][v] = zero();
  const float *sums = a.sums, *x = a.wide;
  const uint32_t *pairs = a.pairs;
  for (int g = 0; g < a.units; g++, sums++) {
    VF part[R][NV];
    for (int r = 0; r < R; r++)
      for (int v = 0; v < NV; v++)
        part[r][v] = set1(-(float)m.zero * sums[r * (size_t)a.units]);
    for (int j = 0; j < m.block; j += 8, x += 8, pairs += 4) {
      VF w[NV][8];
      for (int v = 0; v < NV; v++)
        Quants<BITS>(m.block, blocks.quants(at[v]), 0).eight(j, w[v]);
      for (int k = 0; k < 8; k += PAIRS ? 2 : 1)
        for (int r = 0; r < R; r++)
          for (int v = 0; v < NV; v++)
            if (PAIRS)
              part[r][v] = dot_pairs(part[r][v], quant_pairs(w[v][k], w[v][k + 1]),
                                     iset1_at(pairs + r * a.pair_stride + k / 2));
            else
              part[r][v] = fma(w[v][k], set1(x[r * a.stride + k]), part[r][v]);
    }
    if (NV > 1)
      for (int v = 0; v < NV; v++)
        for (size_t b = 0; b < each; b += 64)
          ask_ahead(tile_at(m, t + v), g * each + b, whole, NV);
    for (int v = 0; v < NV; blocks.next(at[v++])) {
      const VF d = blocks.scales(at[v]);
      for (int r = 0; r < R; r++)
        y[r][v] = fma(part[r][v], d, y[r][v]);
      if (m.has_minimums)
        for (int r = 0; r < R; r++)
          y[r][v] = fma(blocks.minimums(at[v]), set1(sums[r * (size_t)a.units]), y[r][v]);
    }
  }
}
template <int R, int NV> INLINE void few_blocks(const tr_matrix &m, int t, const Acts &a, VF (&y)[R][NV]) {
  by_bits(m, [&](auto bits) {
    if (a.by == TR_BY_BF16)
      few_blocks<R, NV, bits.value, true>(m, t, a, y);
    else
      few_blocks<R, NV, bits.value, false>(m, t, a, y);
  });
}

template <int R, int NV> INLINE void few_wide(const tr_matrix &m, int t, const Acts &a, VF (&y)[R][NV]) {
  const char *p[NV];
  for (int v = 0; v < NV; v++)
    p[v] = tile_at(m, t + v);
  for (int r = 0; r < R; r++)
    for (int v = 0; v < NV; v++)
      y[r][v] = zero();
  auto column = [&](int c, const VF *w) {
    for (int r = 0; r < R; r++) {
      const VF x = set1(a.wide[r * a.stride + c]);
      for (int v = 0; v < NV; v++)
        y[r][v] = fma(w[v], x, y[r][v]);
    }
  };
  VF w[NV];
  const size_t bytes = tile_bytes(m);
  if (m.kind == TR_BF16) {
    const VI high = iset1((int)0xffff0000);
    for (int c = 0; c < m.columns; c += 2) {
      VI pair[NV];
      for (int v = 0; v < NV; v++)
        pair[v] = iload(p[v] + c * 32), w[v] = as_float(left<16>(pair[v]));
      for (int v = 0; v < NV && NV > 1; v++)
        ask_ahead(p[v], (size_t)c * 32, bytes, NV);
      column(c, w);
      if (c + 1 == m.columns)
        break;
      for (int v = 0; v < NV; v++)
        w[v] = as_float(iand(pair[v], high));
      column(c + 1, w);
    }
    return;
  }
  const bool narrow = m.kind == TR_F16;
  for (int c = 0; c < m.columns; c++) {
    for (int v = 0; v < NV && NV > 1; v++)
      ask_ahead(p[v], (size_t)c * (narrow ? 32 : 64), bytes, NV);
    for (int v = 0; v < NV; v++)
      w[v] = narrow ? load_half((const uint16_t *)p[v] + 16 * c) : load((const float *)p[v] + 16 * c);
    column(c, w);
  }
}

template <int R, int NV> INLINE void few_pairs(const tr_matrix &m, int t, const Acts &a, VF (&y)[R][NV]) {
  const char *p[NV];
  for (int v = 0; v < NV; v++)
    p[v] = tile_at(m, t + v);
  for (int r = 0; r < R; r++)
    for (int v = 0; v < NV; v++)
      y[r][v] = zero();
  const size_t bytes = tile_bytes(m);
  for (int j = 0; j < (m.columns + 1) / 2; j++) {
    for (int v = 0; v < NV && NV > 1; v++)
      ask_ahead(p[v], (size_t)j * 64, bytes, NV);
    for (int r = 0; r < R; r++) {
      const VI x = iset1_at(a.pairs + r * a.pair_stride + j);
      for (int v = 0; v < NV; v++)
        y[r][v] = dot_pairs(y[r][v], iload(p[v] + j * 64), x);
    }
  }
}

// Computes NV tiles of outputs for R rows, to y [R][WIDE * 16].
template <int R, int NV> static void few(const tr_matrix &m, int t, const Acts &a, float *y) {
  VF sums[R][NV];
  if (a.by == TR_BY_INT8)
    for (int v = 0; v < NV; v++) {
      VF one[R];
      by_bits(m, [&](auto bits) { few_bytes<R, bits.value>(m, t + v, a, one); });
      for (int r = 0; r < R; r++)
        sums[r][v] = one[r];
    }
  else if (in_blocks(m))
    few_blocks<R, NV>(m, t, a, sums);
  else if (a.by == TR_BY_BF16)
    few_pairs<R, NV>(m, t, a, sums);
  else
    few_wide<R, NV>(m, t, a, sums);
  for (int r = 0; r < R; r++)
    for (int v = 0; v < NV; v++)
      store(y + (size_t)r * WIDE * 16 + 16 * v, sums[r][v]);
}
template <int NV> static void few_rows(const tr_matrix &m, int t, const Acts &a, int rows, float *y) {
  for (int v = 0; v < NV && rows > 1; v++)
    rows == 4 ? few<4, 1>(m, t + v, a, y + 16 * v) : few<2, 1>(m, t + v, a, y + 16 * v);
  if (rows & 1)
    few<1, NV>(m, t, from_row(a, rows - 1), y + (size_t)(rows - 1) * WIDE * 16);
}

// --- many rows ------------------------------------------------------------------------------------------------------
// A panel of NV tiles for int8 activations. Each of its units has quants [unit / 4][NV][64] and scales [NV][16]. It is
// small enough to stay in the L1 cache while all rows are multiplied by it.
const int BYTE_PANEL = 24 << 10;

INLINE int panel_units(const tr_matrix &m, int tiles) { // whole groups, an even number of units
  const int unit = unit_of(m), step = group_of(m) == unit ? 2 : group_of(m) / unit;
  const int n = BYTE_PANEL / (tiles * (16 * unit + 64)) / step * step;
  return n < step ? step : n;
}

template <int NV, int BITS> static void unpack_bytes(const tr_matrix &m, int t, int u0, int u1, char *panel) {
  const int unit = unit_of(m), per = m.block / unit;
  const Blocks blocks(m);
  for (int v = 0; v < NV; v++) {
    BlockAt block = blocks.at(tile_at(m, t + v), u0 / per);
    char *out = panel;
    for (int u = u0; u < u1; u++, out += (size_t)NV * (16 * unit + 64)) {
      const Quants<BITS> q(m.block, blocks.quants(block), u % per * unit);
      for (int j = 0; j < unit; j += 8) {
        VI first, second;
        q.eight(j, first, second);
        istore(out + ((size_t)(j / 4) * NV + v) * 64, first);
        istore(out + ((size_t)(j / 4 + 1) * NV + v) * 64, second);
      }
      store((float *)(out + (size_t)NV * 16 * unit) + v * 16, blocks.scales(block));
      if (u % per == per - 1)
        blocks.next(block);
    }
  }
}

// All minimums in bfloat16, interleaved by two units: [units / 2][NV][16][2].
template <int NV> static void unpack_minimums(const tr_matrix &m, int t, int units, char *out) {
  const int per = m.block / unit_of(m);
  const Blocks blocks(m);
  for (int u = 0; u < units; u += 2)
    for (int v = 0; v < NV; v++) {
      VF least[2] = {zero(), zero()};
      for (int i = 0; i < 2 && u + i < units; i++) {
        const BlockAt block = blocks.at(tile_at(m, t + v), (u + i) / per);
        least[i] = least_of(m, blocks.scales(block), blocks.minimums(block));
      }
      istore(out + ((size_t)u / 2 * NV + v) * 64, to_pairs(least[0], least[1]));
    }
}

// Adds the minimums of all units, times their sums, to y.
template <int R, int NV> static void add_minimums(const char *minimums, const Acts &a, int row, float *y) {
  const uint32_t *x = a.pairs + row * a.pair_stride;
  VF acc[R][NV];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < NV; v++)
      acc[r][v] = zero();
  for (int u = 0; u < a.units; u += 2, minimums += NV * 64, x++)
    for (int r = 0; r < R; r++) {
      VI s = iset1_at(x + r * a.pair_stride);
      for (int v = 0; v < NV; v++)
        acc[r][v] = dot_pairs(acc[r][v], iload(minimums + v * 64), s);
    }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < NV; v++) {
      float *out = y + (size_t)r * WIDE * 16 + 16 * v;
      store(out, add(load(out), acc[r][v]));
    }
}

// Multiplies R rows from `row` on by a panel of units u0 ... u1 - 1; adds to y if `more`. UNIT and PER are the columns
// of a unit and the units of a group; 0: those of the activations.
template <int R, int NV, bool SMALL, int UNIT, int PER>
static void many_bytes(const char *panel, int u0, int u1, const Acts &a, int row, float *y, bool more) {
  const size_t ld = align64(a.columns);
  const int unit = UNIT ? UNIT : a.unit, per_group = PER ? PER : a.group / a.unit, groups = a.groups, units = a.units;
  const int8_t *b = a.bytes + row * ld + (size_t)u0 * unit;
  const float *scales = a.scales + (size_t)row * groups + u0 / per_group;
  const int32_t *starts = a.starts + (size_t)row * units + u0;
  VF acc[R][NV];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < NV; v++)
      acc[r][v] = more ? load(y + (size_t)r * WIDE * 16 + 16 * v) : zero();
  for (int u = u0; u < u1; u += per_group, scales++) {
    VF part[R][NV]; // sums of a group
    for (int r = 0; r < R; r++)
      for (int v = 0; v < NV; v++)
        part[r][v] = zero();
    for (int k = 0; k < per_group; k++, starts++) {
      VI i[R][NV];
      for (int r = 0; r < R; r++)
        for (int v = 0; v < NV; v++)
          i[r][v] = iset1_at(starts + r * (size_t)units);
      for (int j = 0; j < unit; j += 4, panel += NV * 64, b += 4) {
        VI w[NV];
        for (int v = 0; v < NV; v++)
          w[v] = iload(panel + v * 64);
        for (int r = 0; r < R; r++) {
          VI x = iset1_at(b + r * ld);
          for (int v = 0; v < NV; v++)
            i[r][v] = SMALL ? dot_small(i[r][v], w[v], x) : dot_bytes(i[r][v], w[v], x);
        }
      }
      const float *d = (const float *)panel;
      panel += NV * 64;
      for (int r = 0; r < R; r++)
        if (per_group == 1) {
          const VF s = set1(scales[(size_t)r * groups]);
          for (int v = 0; v < NV; v++)
            acc[r][v] = fma(to_float(i[r][v]), mul(load(d + 16 * v), s), acc[r][v]);
        } else
          for (int v = 0; v < NV; v++)
            part[r][v] = fma(to_float(i[r][v]), load(d + 16 * v), part[r][v]);
    }
    for (int r = 0; r < R && per_group > 1; r++) {
      VF s = set1(scales[(size_t)r * groups]);
      for (int v = 0; v < NV; v++)
        acc[r][v] = fma(part[r][v], s, acc[r][v]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < NV; v++)
      store(y + (size_t)r * WIDE * 16 + 16 * v, acc[r][v]);
}

// Columns of a panel of floats or bfloat16, in whole blocks.
INLINE int columns_at_once(const tr_matrix &m) {
  const int whole = in_blocks(m) ? m.block : 1;
  return whole > CUT ? whole : CUT / whole * whole;
}

// A panel of NV tiles in blocks for floats or bfloat16. Each block has its quants, as floats [block][NV][16] or pairs
// of bfloat16 [block / 2][NV][16][2], then scales and minimums [2][NV][16].
INLINE size_t quants_bytes(const tr_matrix &m, int by) { return (size_t)m.block * (by == TR_BY_BF16 ? 32 : 64); }
template <int NV, int BITS, bool PAIRS>
static void unpack_blocks(const tr_matrix &m, int t, int c0, int c1, char *panel) {
  const Blocks blocks(m);
  for (int v = 0; v < NV; v++) {
    char *out = panel + 64 * v;
    BlockAt block = blocks.at(tile_at(m, t + v), c0 / m.block);
    for (int c = c0; c < c1; c += m.block, blocks.next(block)) {
      for (int j = 0; j < m.block; j += 8) {
        VF x[8];
        Quants<BITS>(m.block, blocks.quants(block), 0).eight(j, x);
        for (int k = 0; k < 8; k += PAIRS ? 2 : 1, out += 64 * NV)
          if (PAIRS)
            istore(out, quant_pairs(x[k], x[k + 1]));
          else
            store((float *)out, x[k]);
      }
      store((float *)out, blocks.scales(block)), out += 64 * NV;
      store((float *)out, m.has_minimums ? blocks.minimums(block) : zero()), out += 64 * NV;
    }
  }
}

// Adds `part` of a block, without the zero point, to y.
INLINE void add_block(const tr_matrix &m, VF part, const float *scales, int apart, float total, bool more, float *y) {
  VF sum = fma(part, load(scales), more ? load(y) : zero());
  if (m.has_minimums)
    sum = fma(load(scales + apart), set1(total), sum);
  store(y, sum);
}

template <int R, int NV, bool PAIRS>
static void many_blocks(const tr_matrix &m, const char *panel, int c0, int c1, const Acts &a, int row, float *y) {
  const float *sums = a.sums + (size_t)row * a.units + c0 / m.block, *x = a.wide + row * a.stride + c0;
  const uint32_t *pairs = a.pairs + row * a.pair_stride + c0 / 2;
  for (int c = c0; c < c1; c += m.block, sums++) {
    VF part[R][NV];
    for (int r = 0; r < R; r++)
      for (int v = 0; v < NV; v++)
        part[r][v] = set1(-(float)m.zero * sums[r * (size_t)a.units]);
    for (int j = 0; j < m.block; j += PAIRS ? 2 : 1, panel += NV * 64, PAIRS ? (void)pairs++ : (void)x++)
      for (int r = 0; r < R; r++)
        for (int v = 0; v < NV; v++)
          if (PAIRS)
            part[r][v] = dot_pairs(part[r][v], iload(panel + 64 * v), iset1_at(pairs + r * a.pair_stride));
          else
            part[r][v] = fma(load((const float *)panel + 16 * v), set1(x[r * a.stride]), part[r][v]);
    for (int r = 0; r < R; r++)
      for (int v = 0; v < NV; v++)
        add_block(m, part[r][v], (const float *)panel + 16 * v, NV * 16, sums[r * (size_t)a.units], c > 0,
                  y + (size_t)r * WIDE * 16 + 16 * v);
    panel += NV * 128;
  }
}

template <int NV, bool PAIRS>
static void all_blocks(const tr_matrix &m, const char *panel, int c0, int c1, const Acts &a, int rows, float *y) {
  int r = 0;
  for (; r + ROWS <= rows; r += ROWS)
    many_blocks<ROWS, NV, PAIRS>(m, panel, c0, c1, a, r, y + (size_t)r * WIDE * 16);
  for (; r + 2 <= rows; r += 2)
    many_blocks<2, NV, PAIRS>(m, panel, c0, c1, a, r, y + (size_t)r * WIDE * 16);
  for (; r < rows; r++)
    many_blocks<1, NV, PAIRS>(m, panel, c0, c1, a, r, y + (size_t)r * WIDE * 16);
}
template <int NV, int BITS, bool PAIRS>
static void many_in_blocks(const tr_matrix &m, int t, const Acts &a, int rows, float *y, char *panel) {
  const int cut = columns_at_once(m);
  for (int c = 0; c < m.columns; c += cut) {
    const int end = c + cut < m.columns ? c + cut : m.columns;
    unpack_blocks<NV, BITS, PAIRS>(m, t, c, end, panel);
    all_blocks<NV, PAIRS>(m, panel, c, end, a, rows, y);
  }
}

// Unpacks columns c0 ... c1 - 1 of NV tiles to floats [column][NV][16].
template <int NV> static void unpack_wide(const tr_matrix &m, int t, int c0, int c1, float *panel) {
  for (int v = 0; v < NV; v++) {
    float *out = panel + 16 * v;
    const char *tile = tile_at(m, t + v);
    for (int c = c0; c < c1; c++, out += NV * 16) {
      if (m.kind == TR_BF16) {
        VI w = iload(tile + c / 2 * 64);
        store(out, as_float(c & 1 ? iand(w, iset1((int)0xffff0000)) : left<16>(w)));
      } else if (m.kind == TR_F16)
        store(out, load_half((const uint16_t *)tile + 16 * c));
      else
        store(out, load((const float *)tile + 16 * c));
    }
  }
}

template <int R, int NV>
static void many_wide(const float *panel, int columns, const float *x, size_t stride, float *y, bool more) {
  VF acc[R][NV];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < NV; v++)
      acc[r][v] = more ? load(y + (size_t)r * WIDE * 16 + 16 * v) : zero();
  for (int c = 0; c < columns; c++, panel += NV * 16)
    for (int r = 0; r < R; r++) {
      VF s = set1(x[r * stride + c]);
      for (int v = 0; v < NV; v++)
        acc[r][v] = fma(load(panel + 16 * v), s, acc[r][v]);
    }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < NV; v++)
      store(y + (size_t)r * WIDE * 16 + 16 * v, acc[r][v]);
}

// Multiplies all pairs of NV tiles at p.
template <int R, int NV> static void many_pairs(const char *const *p, const Acts &a, int row, float *y) {
  const uint32_t *x = a.pairs + row * a.pair_stride;
  VF acc[R][NV];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < NV; v++)
      acc[r][v] = zero();
  for (int j = 0; j < (a.columns + 1) / 2; j++) {
    VI w[NV];
    for (int v = 0; v < NV; v++)
      w[v] = iload(p[v] + j * 64);
    for (int r = 0; r < R; r++) {
      VI s = iset1_at(x + r * a.pair_stride + j);
      for (int v = 0; v < NV; v++)
        acc[r][v] = dot_pairs(acc[r][v], w[v], s);
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < NV; v++)
      store(y + (size_t)r * WIDE * 16 + 16 * v, acc[r][v]);
}

// Bytes of the panel of one call of `tiles_of`.
INLINE size_t panel_bytes(const tr_matrix &m, int by) {
  if (by == TR_BY_INT8) {
    const size_t quants = (size_t)2 * panel_units(m, 2) * (16 * unit_of(m) + 64);
    const size_t minimums = m.has_minimums ? (size_t)(m.columns / unit_of(m) + 1) * 64 : 0;
    return quants > minimums ? quants : minimums;
  }
  if (in_tiles(by))
    return 2 * TILED_PANEL;
  if (in_blocks(m))
    return (size_t)(columns_at_once(m) / m.block) * 2 * (quants_bytes(m, by) + 128);
  return by == TR_BY_F32 ? (size_t)CUT * 2 * 64 : 0;
}

template <int NV, bool SMALL, int UNIT, int PER>
static void all_rows(const char *panel, int u0, int u1, const Acts &a, int rows, float *y) {
  int r = 0;
  const int AT_ONCE = PER > 1 && ROWS > 4 ? 4 : ROWS;
  for (; r + AT_ONCE <= rows; r += AT_ONCE)
    many_bytes<AT_ONCE, NV, SMALL, UNIT, PER>(panel, u0, u1, a, r, y + (size_t)r * WIDE * 16, u0 > 0);
  for (; r + 2 <= rows; r += 2)
    many_bytes<2, NV, SMALL, 0, 0>(panel, u0, u1, a, r, y + (size_t)r * WIDE * 16, u0 > 0);
  for (; r < rows; r++)
    many_bytes<1, NV, SMALL, 0, 0>(panel, u0, u1, a, r, y + (size_t)r * WIDE * 16, u0 > 0);
}
// The most common formats have specialized code: unrolled, their sums stay in registers.
template <int NV, bool SMALL>
static void all_rows(const char *panel, int u0, int u1, const Acts &a, int rows, float *y) {
  if (a.unit == 32 && a.group == 32)
    all_rows<NV, SMALL, 32, 1>(panel, u0, u1, a, rows, y);
  else if (a.unit == 16 && a.group == 32)
    all_rows<NV, SMALL, 16, 2>(panel, u0, u1, a, rows, y);
  else
    all_rows<NV, SMALL, 0, 0>(panel, u0, u1, a, rows, y);
}

template <int NV> static void all_pairs(const char *const *p, const Acts &a, int rows, float *y) {
  int r = 0;
  for (; r + ROWS <= rows; r += ROWS)
    many_pairs<ROWS, NV>(p, a, r, y + (size_t)r * WIDE * 16);
  for (; r + 2 <= rows; r += 2)
    many_pairs<2, NV>(p, a, r, y + (size_t)r * WIDE * 16);
  for (; r < rows; r++)
    many_pairs<1, NV>(p, a, r, y + (size_t)r * WIDE * 16);
}

// NV is 1 or 2.
template <int NV> static void many(const tr_matrix &m, int t, const Acts &a, int rows, float *y, char *panel) {
  if (a.by == TR_BY_INT8) {
    const bool small = SMALL_APART && m.kind != TR_U8;
    const int most = panel_units(m, 2);
    for (int u = 0; u < a.units; u += most) {
      const int end = u + most < a.units ? u + most : a.units;
      by_bits(m, [&](auto bits) { unpack_bytes<NV, bits.value>(m, t, u, end, panel); });
      if (small)
        all_rows<NV, true>(panel, u, end, a, rows, y);
      else
        all_rows<NV, false>(panel, u, end, a, rows, y);
    }
    if (!m.has_minimums)
      return;
    unpack_minimums<NV>(m, t, a.units, panel);
    int r = 0;
    for (; r + ROWS <= rows; r += ROWS)
      add_minimums<ROWS, NV>(panel, a, r, y + (size_t)r * WIDE * 16);
    for (; r + 2 <= rows; r += 2)
      add_minimums<2, NV>(panel, a, r, y + (size_t)r * WIDE * 16);
    for (; r < rows; r++)
      add_minimums<1, NV>(panel, a, r, y + (size_t)r * WIDE * 16);
  } else if (in_blocks(m)) {
    by_bits(m, [&](auto bits) {
      if (a.by == TR_BY_BF16)
        many_in_blocks<NV, bits.value, true>(m, t, a, rows, y, panel);
      else
        many_in_blocks<NV, bits.value, false>(m, t, a, rows, y, panel);
    });
  } else if (a.by == TR_BY_BF16) {
    const char *p[NV];
    for (int v = 0; v < NV; v++)
      p[v] = tile_at(m, t + v);
    all_pairs<NV>(p, a, rows, y);
  } else {
    const int cut = columns_at_once(m);
    for (int c = 0; c < m.columns; c += cut) {
      int end = c + cut < m.columns ? c + cut : m.columns;
      unpack_wide<NV>(m, t, c, end, (float *)panel);
      int r = 0;
      for (; r + ROWS <= rows; r += ROWS)
        many_wide<ROWS, NV>((float *)panel, end - c, a.wide + r * a.stride + c, a.stride, y + (size_t)r * WIDE * 16, c > 0);
      for (; r + 2 <= rows; r += 2)
        many_wide<2, NV>((float *)panel, end - c, a.wide + r * a.stride + c, a.stride, y + (size_t)r * WIDE * 16, c > 0);
      for (; r < rows; r++)
        many_wide<1, NV>((float *)panel, end - c, a.wide + r * a.stride + c, a.stride, y + (size_t)r * WIDE * 16, c > 0);
    }
  }
}

#ifdef TRANSOM_AMX
static void tiled_products(const tr_matrix &m, int t, int count, const Acts &a, int rows, float *y, char *panel);
#endif

// Computes tiles t ... t + count - 1 (count <= WIDE) for up to MOST rows, to y [rows][WIDE * 16].
static void tiles_of(const tr_matrix &m, int t, int count, const Acts &a, int rows, float *y, char *panel) {
#ifdef TRANSOM_AMX
  if (in_tiles(a.by))
    return tiled_products(m, t, count, a, rows, y, panel);
#endif
  int x = 0;
  if (rows <= FEW) {
    for (; x + 2 <= count; x += 2)
      few_rows<2>(m, t + x, a, rows, y + 16 * x);
    if (x < count)
      few_rows<1>(m, t + x, a, rows, y + 16 * x);
    return;
  }
  for (; x + 2 <= count; x += 2)
    many<2>(m, t + x, a, rows, y + 16 * x, panel);
  for (; x < count; x++)
    many<1>(m, t + x, a, rows, y + 16 * x, panel);
}
} // namespace

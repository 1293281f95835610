// Products of rows of activations with a matrix in any format.
//
// There are two algorithms. Few rows: the packed matrix is read once and unpacked in registers, at the speed of memory.
// Many rows: tiles are unpacked to a panel that stays in the L1 or L2 cache and is multiplied by all rows. Activations
// are float, bfloat16, or int8 in groups with one scale each, whose products are exact integers within a group.

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
  float *sums;     // [rows][units]: of the quantized numbers; for float: of the floats, over blocks
  int32_t *starts; // [rows][units]: -center times the sum of bytes
  uint32_t *pairs; // bfloat16: [rows][columns / 2]; int8: the sums of two units
  size_t pair_stride;
};

INLINE bool in_blocks(const tr_matrix &m) { return m.kind == TR_U4 || m.kind == TR_U8; }
// Activations that share a scale. Wider groups are faster and less accurate; 64 is as accurate as 32, see the
// benchmarks.
INLINE int group_of(const tr_matrix &m) {
  if (m.block >= 64)
    return m.block % 64 == 0 ? 64 : m.block % 32 == 0 ? 32 : 8;
  return 64 % m.block == 0 && m.columns % 64 == 0 ? 64 : m.block;
}
INLINE int unit_of(const tr_matrix &m) { return m.block < group_of(m) ? m.block : group_of(m); }
// Subtracted from quants to make integers. With minimums it is the middle, so that the remaining term is small.
INLINE int center_of(const tr_matrix &m) { return m.has_minimums ? (m.kind == TR_U4 ? 8 : 128) : m.zero; }

// Bytes that `prepare` needs.
INLINE size_t acts_bytes(const tr_matrix &m, int by, int rows) {
  if (by == TR_BY_INT8) {
    const size_t units = m.columns / unit_of(m), groups = m.columns / group_of(m);
    return rows * align64(m.columns) + align64(rows * groups * 4) + 2 * align64(rows * units * 4) +
           align64(rows * ((units + 1) / 2) * 4) + 64;
  }
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

// Converts x [rows][stride] to the format of a product, in `memory` of acts_bytes.
static Acts prepare(const tr_matrix &m, int by, const float *x, size_t stride, int rows, void *memory) {
  Acts a = {};
  a.wide = x, a.stride = stride, a.by = by, a.columns = m.columns;
  char *p = (char *)memory;
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
    p += align64((size_t)rows * a.pair_stride * 4);
    for (int r = 0; r < rows; r++)
      pack_pairs(x + r * stride, m.columns, a.pairs + r * a.pair_stride);
  }
  if (in_blocks(m)) { // sums over blocks, for zero points and minimums
    a.units = m.columns / m.block;
    a.sums = (float *)p;
    for (int r = 0; r < rows; r++)
      for (int g = 0; g < a.units; g++) {
        const float *s = x + r * stride + (size_t)g * m.block;
        float t = 0;
        for (int j = 0; j < m.block; j++)
          t += s[j];
        a.sums[(size_t)r * a.units + g] = t;
      }
  }
  return a;
}

INLINE size_t block_bytes(const tr_matrix &m) { // for 16 rows
  size_t quants = (size_t)16 * m.block / (m.kind == TR_U4 ? 2 : 1), scale = m.wide_scales ? 64 : 32;
  return quants + scale * (m.has_minimums ? 2 : 1);
}
INLINE size_t tile_bytes(const tr_matrix &m) {
  switch (m.kind) {
  case TR_F32:
    return (size_t)64 * m.columns;
  case TR_F16:
    return (size_t)32 * m.columns;
  case TR_BF16:
    return (size_t)64 * ((m.columns + 1) / 2);
  }
  return block_bytes(m) * (m.columns / m.block);
}
INLINE const char *tile_at(const tr_matrix &m, int t) { return (const char *)m.data + tile_bytes(m) * t; }

// --- few rows -------------------------------------------------------------------------------------------------------
// The minimums of 16 rows of a block, relative to the center.
INLINE VF least_of(const tr_matrix &m, const char *scales, size_t scale, VF d) {
  return fma(d, set1((float)(center_of(m) - m.zero)), load_scales(scales + scale, m.wide_scales));
}

template <int R, bool NIBBLES> INLINE void few_bytes(const tr_matrix &m, int t, const Acts &a, VF *y) {
  const char *p = tile_at(m, t);
  const size_t quants = (size_t)16 * m.block / (NIBBLES ? 2 : 1), scale = m.wide_scales ? 64 : 32, bytes = block_bytes(m);
  const VI low = iset1(0x0f0f0f0f);
  const size_t ld = align64(m.columns);
  const int per_group = a.group / a.unit;
  VF part[R];
  for (int r = 0; r < R; r++)
    y[r] = part[r] = zero();
  for (int u = 0, column = 0; column < m.columns; p += bytes) {
    VF d = load_scales(p + quants, m.wide_scales), least = zero();
    if (m.has_minimums)
      least = least_of(m, p + quants, scale, d);
    const char *q = p;
    for (int in = 0; in < m.block; in += a.unit, u++, column += a.unit) {
      VI i[R], k[R];
      for (int r = 0; r < R; r++)
        i[r] = iset1(a.starts[r * a.units + u]), k[r] = izero();
      const int8_t *b = a.bytes + column;
      for (int j = 0; j < a.unit; j += 8, q += NIBBLES ? 64 : 128) {
        VI w = iload(q), w0 = NIBBLES ? iand(w, low) : w, w1 = NIBBLES ? iand(right<4>(w), low) : iload(q + 64);
        for (int r = 0; r < R; r++) {
          VI x0 = iset1_at(b + r * ld + j), x1 = iset1_at(b + r * ld + j + 4);
          i[r] = NIBBLES ? dot_nibbles(i[r], w0, x0) : dot_bytes(i[r], w0, x0);
          k[r] = NIBBLES ? dot_nibbles(k[r], w1, x1) : dot_bytes(k[r], w1, x1);
        }
      }
      const bool last = (u + 1) % per_group == 0;
      for (int r = 0; r < R; r++) {
        part[r] = fma(add(to_float(i[r]), to_float(k[r])), d, part[r]);
        if (m.has_minimums)
          y[r] = fma(least, set1(a.sums[r * a.units + u]), y[r]);
        if (last) {
          y[r] = fma(part[r], set1(a.scales[r * a.groups + u / per_group]), y[r]);
          part[r] = zero();
        }
      }
    }
  }
}

template <int R> INLINE void few_wide_blocks(const tr_matrix &m, int t, const Acts &a, VF *y) {
  const char *p = tile_at(m, t);
  const bool nibbles = m.kind == TR_U4;
  const size_t quants = (size_t)16 * m.block / (nibbles ? 2 : 1), scale = m.wide_scales ? 64 : 32, bytes = block_bytes(m);
  const VI byte = iset1(0xff), low = iset1(0x0f0f0f0f);
  for (int r = 0; r < R; r++)
    y[r] = zero();
  for (int g = 0; g < m.columns / m.block; g++, p += bytes) {
    VF part[R], other[R];
    for (int r = 0; r < R; r++)
      part[r] = set1(-(float)m.zero * a.sums[r * a.units + g]), other[r] = zero();
    const float *x = a.wide + (size_t)g * m.block;
    for (int j = 0; j < m.block; j += 4) {
      VI w = nibbles ? iload(p + j / 8 * 64) : iload(p + j * 16);
      if (nibbles)
        w = iand(j & 4 ? right<4>(w) : w, low);
      VF w0 = to_float(iand(w, byte)), w1 = to_float(iand(right<8>(w), byte));
      VF w2 = to_float(iand(right<16>(w), byte)), w3 = to_float(right<24>(w));
      for (int r = 0; r < R; r++) {
        const float *s = x + r * a.stride + j;
        part[r] = fma(w0, set1(s[0]), part[r]);
        other[r] = fma(w1, set1(s[1]), other[r]);
        part[r] = fma(w2, set1(s[2]), part[r]);
        other[r] = fma(w3, set1(s[3]), other[r]);
      }
    }
    VF d = load_scales(p + quants, m.wide_scales);
    for (int r = 0; r < R; r++) {
      y[r] = fma(add(part[r], other[r]), d, y[r]);
      if (m.has_minimums)
        y[r] = fma(load_scales(p + quants + scale, m.wide_scales), set1(a.sums[r * a.units + g]), y[r]);
    }
  }
}

template <int R> INLINE void few_wide(const tr_matrix &m, int t, const Acts &a, VF *y) {
  const char *p = tile_at(m, t);
  VF z[R];
  for (int r = 0; r < R; r++)
    y[r] = z[r] = zero();
  int j = 0;
  if (m.kind == TR_BF16) {
    const VI high = iset1((int)0xffff0000);
    for (; j + 2 <= m.columns; j += 2) {
      VI w = iload(p + j * 32);
      for (int r = 0; r < R; r++) {
        y[r] = fma(as_float(left<16>(w)), set1(a.wide[r * a.stride + j]), y[r]);
        z[r] = fma(as_float(iand(w, high)), set1(a.wide[r * a.stride + j + 1]), z[r]);
      }
    }
    if (j < m.columns)
      for (int r = 0; r < R; r++)
        y[r] = fma(as_float(left<16>(iload(p + j * 32))), set1(a.wide[r * a.stride + j]), y[r]);
  } else {
    bool narrow = m.kind == TR_F16;
    for (; j < m.columns; j++) {
      VF w = narrow ? load_half((const uint16_t *)p + 16 * j) : load((const float *)p + 16 * j);
      for (int r = 0; r < R; r++)
        if (j & 1)
          z[r] = fma(w, set1(a.wide[r * a.stride + j]), z[r]);
        else
          y[r] = fma(w, set1(a.wide[r * a.stride + j]), y[r]);
    }
  }
  for (int r = 0; r < R; r++)
    y[r] = add(y[r], z[r]);
}

template <int R> INLINE void few_pairs(const tr_matrix &m, int t, const Acts &a, VF *y) {
  const char *p = tile_at(m, t);
  const int half = (m.columns + 1) / 2;
  VF z[R];
  for (int r = 0; r < R; r++)
    y[r] = z[r] = zero();
  int j = 0;
  for (; j + 2 <= half; j += 2)
    for (int r = 0; r < R; r++) {
      y[r] = dot_pairs(y[r], iload(p + j * 64), iset1_at(a.pairs + (size_t)r * half + j));
      z[r] = dot_pairs(z[r], iload(p + j * 64 + 64), iset1_at(a.pairs + (size_t)r * half + j + 1));
    }
  for (; j < half; j++)
    for (int r = 0; r < R; r++)
      y[r] = dot_pairs(y[r], iload(p + j * 64), iset1_at(a.pairs + (size_t)r * half + j));
  for (int r = 0; r < R; r++)
    y[r] = add(y[r], z[r]);
}

// Computes one tile of outputs for R rows.
template <int R> static void few(const tr_matrix &m, int t, const Acts &a, VF *y) {
  if (a.by == TR_BY_INT8)
    m.kind == TR_U4 ? few_bytes<R, true>(m, t, a, y) : few_bytes<R, false>(m, t, a, y);
  else if (in_blocks(m)) // for bfloat16 too: memory is the limit, so rounding activations saves nothing
    few_wide_blocks<R>(m, t, a, y);
  else if (a.by == TR_BY_BF16)
    few_pairs<R>(m, t, a, y);
  else
    few_wide<R>(m, t, a, y);
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

template <int NV> static void unpack_bytes(const tr_matrix &m, int t, int u0, int u1, char *panel) {
  const int unit = unit_of(m), per = m.block / unit;
  const size_t quants = (size_t)16 * m.block / (m.kind == TR_U4 ? 2 : 1), bytes = block_bytes(m);
  const VI low = iset1(0x0f0f0f0f);
  for (int v = 0; v < NV; v++) {
    const char *tile = tile_at(m, t + v);
    char *out = panel;
    for (int u = u0; u < u1; u++, out += (size_t)NV * (16 * unit + 64)) {
      const char *block = tile + u / per * bytes;
      if (m.kind == TR_U4) {
        const char *p = block + (size_t)(u % per) * unit * 8;
        for (int j = 0; j < unit / 8; j++) {
          VI w = iload(p + 64 * j);
          istore(out + ((size_t)(2 * j) * NV + v) * 64, iand(w, low));
          istore(out + ((size_t)(2 * j + 1) * NV + v) * 64, iand(right<4>(w), low));
        }
      } else {
        const char *p = block + (size_t)(u % per) * unit * 16;
        for (int j = 0; j < unit / 4; j++)
          istore(out + ((size_t)j * NV + v) * 64, iload(p + 64 * j));
      }
      store((float *)(out + (size_t)NV * 16 * unit) + v * 16, load_scales(block + quants, m.wide_scales));
    }
  }
}

// Minimums of units u0 ... u1 - 1 in bfloat16, interleaved by two units: [units / 2][NV][16][2]; u0 is even.
template <int NV> static void unpack_minimums(const tr_matrix &m, int t, int u0, int u1, char *out) {
  const int per = m.block / unit_of(m);
  const size_t quants = (size_t)16 * m.block / (m.kind == TR_U4 ? 2 : 1), scale = m.wide_scales ? 64 : 32;
  for (int u = u0; u < u1; u += 2)
    for (int v = 0; v < NV; v++) {
      VF least[2] = {zero(), zero()};
      for (int i = 0; i < 2 && u + i < u1; i++) {
        const char *scales = tile_at(m, t + v) + (u + i) / per * block_bytes(m) + quants;
        least[i] = least_of(m, scales, scale, load_scales(scales, m.wide_scales));
      }
      istore(out + ((size_t)(u - u0) / 2 * NV + v) * 64, to_pairs(least[0], least[1]));
    }
}

// Multiplies R rows from `row` on by a panel of units u0 ... u1 - 1; adds to y if `more`. `minimums` may be null. UNIT
// and PER are the columns of a unit and the units of a group; 0: those of the activations.
template <int R, int NV, bool NIBBLES, int UNIT, int PER>
static void many_bytes(const char *panel, const char *minimums, int u0, int u1, const Acts &a, int row, float *y,
                       bool more) {
  const size_t ld = align64(a.columns);
  const int unit = UNIT ? UNIT : a.unit, per_group = PER ? PER : a.group / a.unit, groups = a.groups, units = a.units;
  const int8_t *b = a.bytes + row * ld + (size_t)u0 * unit;
  const float *scales = a.scales + (size_t)row * groups + u0 / per_group;
  const int32_t *starts = a.starts + (size_t)row * units + u0;
  VF acc[R][NV];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < NV; v++)
      acc[r][v] = more ? load(y + (size_t)r * WIDE * 16 + 16 * v) : zero();
  if (minimums) {
    const uint32_t *x = a.pairs + row * a.pair_stride + u0 / 2;
    for (int u = u0; u < u1; u += 2, minimums += NV * 64, x++)
      for (int r = 0; r < R; r++) {
        VI s = iset1_at(x + r * a.pair_stride);
        for (int v = 0; v < NV; v++)
          acc[r][v] = dot_pairs(acc[r][v], iload(minimums + v * 64), s);
      }
  }
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
            i[r][v] = NIBBLES ? dot_nibbles(i[r][v], w[v], x) : dot_bytes(i[r][v], w[v], x);
        }
      }
      const float *d = (const float *)panel;
      panel += NV * 64;
      for (int r = 0; r < R; r++)
        for (int v = 0; v < NV; v++)
          part[r][v] = fma(to_float(i[r][v]), load(d + 16 * v), part[r][v]);
    }
    for (int r = 0; r < R; r++) {
      VF s = set1(scales[(size_t)r * groups]);
      for (int v = 0; v < NV; v++)
        acc[r][v] = fma(part[r][v], s, acc[r][v]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < NV; v++)
      store(y + (size_t)r * WIDE * 16 + 16 * v, acc[r][v]);
}

// Sixteen rows by AMX tiles, with the same sums in the same order as `many_bytes`. One tile product is one unit.
INLINE bool tiles_take_units(const Acts &a) { return a.unit >= 16 && a.unit <= 64 && a.group <= 4 * a.unit; }
template <int NV>
static void tiled_bytes(const char *panel, const char *minimums, int u0, int u1, const Acts &a, int row, float *y,
                        bool more) {
  const size_t ld = align64(a.columns), quants = (size_t)NV * 16 * a.unit, size = quants + NV * 64;
  const int per_group = a.group / a.unit;
  VI sums[4][NV][TILE];
  for (int u = u0; u < u1; u += per_group, panel += per_group * size) {
    for (int k = 0; k < per_group; k++) {
      tile_load<4>(a.bytes + row * ld + (size_t)(u + k) * a.unit, ld);
      tile_zero<0>();
      tile_load<5>(panel + k * size, NV * 64), SignedUnsigned::product<0, 4, 5>();
      tile_store<0>(sums[k][0], 64);
      if constexpr (NV > 1) {
        tile_zero<1>();
        tile_load<5>(panel + k * size + 64, NV * 64), SignedUnsigned::product<1, 4, 5>();
        tile_store<1>(sums[k][1], 64);
      }
    }
    for (int r = 0; r < TILE; r++) {
      const int32_t *starts = a.starts + (size_t)(row + r) * a.units + u;
      const VF scale = set1(a.scales[(size_t)(row + r) * a.groups + u / per_group]);
      for (int v = 0; v < NV; v++) {
        float *out = y + (size_t)r * WIDE * 16 + 16 * v;
        VF acc = more || u > u0 ? load(out) : zero(), part = zero();
        if (minimums && u == u0) {
          const uint32_t *x = a.pairs + (row + r) * a.pair_stride + u0 / 2;
          for (int p = 0; u0 + 2 * p < u1; p++)
            acc = dot_pairs(acc, iload(minimums + ((size_t)p * NV + v) * 64), iset1_at(x + p));
        }
        for (int k = 0; k < per_group; k++)
          part = fma(to_float(iadd(sums[k][v][r], iset1_at(starts + k))),
                     load((const float *)(panel + k * size + quants) + 16 * v), part);
        store(out, fma(part, scale, acc));
      }
    }
  }
}

// Calls put(column, four) with the floats of 16 rows and four columns, for columns c0 ... c1 - 1 of a tile in blocks;
// c0 and c1 are multiples of the block.
template <class F> INLINE void unpack_blocks(const tr_matrix &m, int t, int c0, int c1, const F &put) {
  const bool nibbles = m.kind == TR_U4;
  const VI byte = iset1(0xff), low = iset1(0x0f0f0f0f);
  const size_t quants = (size_t)16 * m.block / (nibbles ? 2 : 1), scale = m.wide_scales ? 64 : 32;
  for (int c = c0; c < c1; c += m.block) {
    const char *p = tile_at(m, t) + c / m.block * block_bytes(m);
    VF d = load_scales(p + quants, m.wide_scales), z = set1((float)m.zero);
    VF least = m.has_minimums ? load_scales(p + quants + scale, m.wide_scales) : zero();
    for (int j = 0; j < m.block; j += 4) {
      VI w = nibbles ? iload(p + j / 8 * 64) : iload(p + j * 16);
      if (nibbles)
        w = iand(j & 4 ? right<4>(w) : w, low);
      const VI four[4] = {iand(w, byte), iand(right<8>(w), byte), iand(right<16>(w), byte), right<24>(w)};
      VF x[4];
      for (int k = 0; k < 4; k++)
        x[k] = add(mul(d, sub(to_float(four[k]), z)), least);
      put(c + j, x);
    }
  }
}

// Unpacks columns c0 ... c1 - 1 of NV tiles, in whole blocks, to floats [column][NV][16].
template <int NV> static void unpack_wide(const tr_matrix &m, int t, int c0, int c1, float *panel) {
  for (int v = 0; v < NV; v++) {
    float *out = panel + 16 * v;
    if (in_blocks(m)) {
      unpack_blocks(m, t + v, c0, c1, [&](int c, const VF *x) {
        for (int k = 0; k < 4; k++)
          store(out + (size_t)(c + k - c0) * NV * 16, x[k]);
      });
      continue;
    }
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

// Unpacks columns c0 ... c1 - 1 of NV tiles in blocks to bfloat16 [column / 2][NV][16][2].
template <int NV> static void unpack_pairs(const tr_matrix &m, int t, int c0, int c1, char *panel) {
  for (int v = 0; v < NV; v++)
    unpack_blocks(m, t + v, c0, c1, [&](int c, const VF *x) {
      char *out = panel + ((size_t)(c - c0) / 2 * NV + v) * 64;
      istore(out, to_pairs(x[0], x[1]));
      istore(out + NV * 64, to_pairs(x[2], x[3]));
    });
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

// Multiplies pairs of columns j0 ... j1 - 1 of NV tiles at p, where `apart` is the stride of pairs in bytes.
template <int R, int NV>
static void many_pairs(const char *const *p, size_t apart, int j0, int j1, const Acts &a, int row, float *y) {
  const uint32_t *x = a.pairs + row * a.pair_stride;
  VF acc[R][NV];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < NV; v++)
      acc[r][v] = j0 ? load(y + (size_t)r * WIDE * 16 + 16 * v) : zero();
  for (int j = j0; j < j1; j++) {
    VI w[NV];
    for (int v = 0; v < NV; v++)
      w[v] = iload(p[v] + (j - j0) * apart);
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

// Sixteen rows by AMX tiles; j1 - j0 is a multiple of 16.
template <int NV>
static void tiled_pairs(const char *const *p, size_t apart, int j0, int j1, const Acts &a, int row, float *y) {
  const size_t from_row = a.pair_stride * 4, to_row = WIDE * 64;
  if (j0) {
    tile_load<0>(y, to_row);
    if constexpr (NV > 1)
      tile_load<1>(y + 16, to_row);
  } else
    tile_zero<0>(), tile_zero<1>();
  for (int j = j0; j < j1; j += 16) {
    tile_load<6>(a.pairs + row * a.pair_stride + j, from_row);
    tile_load<7>(p[0] + (j - j0) * apart, apart), Pairs::product<0, 6, 7>();
    if constexpr (NV > 1)
      tile_load<7>(p[1] + (j - j0) * apart, apart), Pairs::product<1, 6, 7>();
  }
  tile_store<0>(y, to_row);
  if constexpr (NV > 1)
    tile_store<1>(y + 16, to_row);
}

// Bytes of the panel of one call of `tiles_of`.
INLINE size_t panel_bytes(const tr_matrix &m, int by) {
  if (by == TR_BY_INT8)
    return align64((size_t)2 * panel_units(m, 2) * (16 * unit_of(m) + 64)) + (size_t)panel_units(m, 2) * 64 + 64;
  int cut = m.block > CUT ? m.block : CUT;
  return by == TR_BY_F32 ? (size_t)cut * 2 * 64 : in_blocks(m) ? (size_t)cut * 64 : 0;
}

template <int NV, bool NIBBLES, int UNIT, int PER>
static void all_rows(const char *panel, const char *minimums, int u0, int u1, const Acts &a, int rows, float *y) {
  int r = 0;
  if constexpr (TILED)
    if (tiles_take_units(a) && rows >= TILE) {
      Tiles tiles(a.unit);
      for (; r + TILE <= rows; r += TILE)
        tiled_bytes<NV>(panel, minimums, u0, u1, a, r, y + (size_t)r * WIDE * 16, u0 > 0);
    }
  const int AT_ONCE = PER > 1 && ROWS > 4 ? 4 : ROWS;
  for (; r + AT_ONCE <= rows; r += AT_ONCE)
    many_bytes<AT_ONCE, NV, NIBBLES, UNIT, PER>(panel, minimums, u0, u1, a, r, y + (size_t)r * WIDE * 16, u0 > 0);
  for (; r + 2 <= rows; r += 2)
    many_bytes<2, NV, NIBBLES, 0, 0>(panel, minimums, u0, u1, a, r, y + (size_t)r * WIDE * 16, u0 > 0);
  for (; r < rows; r++)
    many_bytes<1, NV, NIBBLES, 0, 0>(panel, minimums, u0, u1, a, r, y + (size_t)r * WIDE * 16, u0 > 0);
}
// The most common formats have specialized code: unrolled, their sums stay in registers.
template <int NV, bool NIBBLES>
static void all_rows(const char *panel, const char *minimums, int u0, int u1, const Acts &a, int rows, float *y) {
  if (a.unit == 32 && a.group == 64)
    all_rows<NV, NIBBLES, 32, 2>(panel, minimums, u0, u1, a, rows, y);
  else if (a.unit == 64 && a.group == 64)
    all_rows<NV, NIBBLES, 64, 1>(panel, minimums, u0, u1, a, rows, y);
  else
    all_rows<NV, NIBBLES, 0, 0>(panel, minimums, u0, u1, a, rows, y);
}

template <int NV>
static void all_pairs(const char *const *p, size_t apart, int j0, int j1, const Acts &a, int rows, float *y) {
  int r = 0;
  if constexpr (TILED)
    if (rows >= TILE && (j1 - j0) % 16 == 0) {
      Tiles tiles(64);
      for (; r + TILE <= rows; r += TILE)
        tiled_pairs<NV>(p, apart, j0, j1, a, r, y + (size_t)r * WIDE * 16);
    }
  for (; r + ROWS <= rows; r += ROWS)
    many_pairs<ROWS, NV>(p, apart, j0, j1, a, r, y + (size_t)r * WIDE * 16);
  for (; r + 2 <= rows; r += 2)
    many_pairs<2, NV>(p, apart, j0, j1, a, r, y + (size_t)r * WIDE * 16);
  for (; r < rows; r++)
    many_pairs<1, NV>(p, apart, j0, j1, a, r, y + (size_t)r * WIDE * 16);
}

// Columns of a panel of floats or bfloat16, in whole blocks.
INLINE int columns_at_once(const tr_matrix &m) {
  const int whole = in_blocks(m) ? m.block : 1;
  return whole > CUT ? whole : CUT / whole * whole;
}

// NV is 1 or 2.
template <int NV> static void many(const tr_matrix &m, int t, const Acts &a, int rows, float *y, char *panel) {
  if (a.by == TR_BY_INT8) {
    const bool nibbles = NIBBLES_APART && m.kind == TR_U4;
    const int most = panel_units(m, 2);
    char *minimums = panel + align64((size_t)2 * most * (16 * unit_of(m) + 64));
    for (int u = 0; u < a.units; u += most) {
      const int end = u + most < a.units ? u + most : a.units;
      unpack_bytes<NV>(m, t, u, end, panel);
      if (m.has_minimums)
        unpack_minimums<NV>(m, t, u, end, minimums);
      const char *least = m.has_minimums ? minimums : nullptr;
      if (nibbles)
        all_rows<NV, true>(panel, least, u, end, a, rows, y);
      else
        all_rows<NV, false>(panel, least, u, end, a, rows, y);
    }
  } else if (a.by == TR_BY_BF16 && !in_blocks(m)) {
    const char *p[NV];
    for (int v = 0; v < NV; v++)
      p[v] = tile_at(m, t + v);
    all_pairs<NV>(p, 64, 0, (m.columns + 1) / 2, a, rows, y);
  } else if (a.by == TR_BY_BF16) {
    const int cut = columns_at_once(m);
    const char *p[NV];
    for (int v = 0; v < NV; v++)
      p[v] = panel + 64 * v;
    for (int c = 0; c < m.columns; c += cut) {
      const int end = c + cut < m.columns ? c + cut : m.columns;
      unpack_pairs<NV>(m, t, c, end, panel);
      all_pairs<NV>(p, NV * 64, c / 2, end / 2, a, rows, y);
    }
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

// Computes tiles t ... t + count - 1 (count <= WIDE) for up to MOST rows, to y [rows][WIDE * 16].
static void tiles_of(const tr_matrix &m, int t, int count, const Acts &a, int rows, float *y, char *panel) {
  if (rows <= FEW) {
    for (int x = 0; x < count; x++) {
      VF v[FEW];
      if (rows == 4)
        few<4>(m, t + x, a, v);
      else if (rows >= 2)
        few<2>(m, t + x, a, v);
      if (rows == 1 || rows == 3)
        few<1>(m, t + x, from_row(a, rows - 1), v + rows - 1);
      for (int r = 0; r < rows; r++)
        store(y + (size_t)r * WIDE * 16 + 16 * x, v[r]);
    }
    return;
  }
  int x = 0;
  for (; x + 2 <= count; x += 2)
    many<2>(m, t + x, a, rows, y + 16 * x, panel);
  for (; x < count; x++)
    many<1>(m, t + x, a, rows, y + 16 * x, panel);
}
} // namespace

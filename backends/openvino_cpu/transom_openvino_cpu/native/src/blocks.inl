// Where the numbers of a matrix are: tiles, and blocks with their quants, scales and minimums. `abi.h` defines the layout.

namespace {
INLINE bool in_blocks(const tr_matrix &m) { return m.kind >= TR_U4; }
INLINE int bits_of(const tr_matrix &m) {
  return m.kind == TR_U4 ? 4 : m.kind == TR_U5 ? 5 : m.kind == TR_U6 ? 6 : 8;
}
// Calls f with the bits of a quant as a constant.
template <int BITS> struct Bits {
  enum { value = BITS };
};
template <class F> INLINE void by_bits(const tr_matrix &m, const F &f) {
  switch (m.kind) {
  case TR_U4:
    return f(Bits<4>());
  case TR_U5:
    return f(Bits<5>());
  case TR_U6:
    return f(Bits<6>());
  default:
    return f(Bits<8>());
  }
}
INLINE bool superblocks_fit(const tr_matrix &m) {
  return !m.outer || (m.outer > 0 && m.outer % ((int64_t)4 * m.block) == 0 && m.columns % m.outer == 0);
}

// A block of 16 rows: its superblock, and its place there.
struct BlockAt {
  const char *superblock;
  int place;
};
// The blocks of a tile. Without two levels of scales a block is a superblock of its own.
struct Blocks {
  size_t quants_bytes, bytes;               // of a block's quants, of a superblock
  size_t quants_at, scales_at, minimums_at; // of the first block in a superblock
  int columns, count;                       // of a superblock; its blocks
  bool wide, levels;
  explicit INLINE_MEMBER Blocks(const tr_matrix &m)
      : quants_bytes((size_t)2 * bits_of(m) * m.block), wide(m.wide_scales), levels(m.outer) {
    const int parts = m.has_minimums ? 2 : 1;
    if (levels) {
      columns = m.outer, count = m.outer / m.block;
      scales_at = 64, minimums_at = 64 + (size_t)16 * count, quants_at = 64 + (size_t)16 * count * parts;
      bytes = quants_at + count * quants_bytes;
    } else {
      const size_t size = wide ? 64 : 32;
      columns = m.block, count = 1;
      quants_at = 0, scales_at = quants_bytes, minimums_at = quants_bytes + size;
      bytes = quants_bytes + size * parts;
    }
  }
  INLINE_MEMBER BlockAt at(const char *tile, int block) const {
    return {tile + block / count * bytes, block % count};
  }
  // `two`: the value of `levels`, for code in which it is a constant.
  INLINE_MEMBER void next(BlockAt &b, bool two) const {
    if (!two || ++b.place == count)
      b.superblock += bytes, b.place = 0;
  }
  INLINE_MEMBER void next(BlockAt &b) const { next(b, levels); }
  INLINE_MEMBER const char *quants(BlockAt b, bool two) const {
    return two ? b.superblock + quants_at + b.place * quants_bytes : b.superblock;
  }
  INLINE_MEMBER const char *quants(BlockAt b) const { return quants(b, levels); }
  // With two levels, of sixteen rows.
  static INLINE_MEMBER VF floats(const char *bytes) { return to_float(load_bytes((const int8_t *)bytes)); }
  INLINE_MEMBER VF outer(BlockAt b) const { return load_half((const uint16_t *)b.superblock); }
  INLINE_MEMBER VF outer_minimums(BlockAt b) const { return load_half((const uint16_t *)b.superblock + 16); }
  INLINE_MEMBER VF codes(BlockAt b) const { return floats(b.superblock + scales_at + b.place * 16); }
  INLINE_MEMBER VF minimum_codes(BlockAt b) const { return floats(b.superblock + minimums_at + b.place * 16); }
  // Of sixteen rows. A product of 11 and 8 bits is exact.
  INLINE_MEMBER VF scales(BlockAt b, bool two) const {
    return two ? mul(outer(b), codes(b)) : load_scales(b.superblock + scales_at, wide);
  }
  INLINE_MEMBER VF scales(BlockAt b) const { return scales(b, levels); }
  INLINE_MEMBER VF minimums(BlockAt b, bool two) const {
    return two ? mul(outer_minimums(b), minimum_codes(b)) : load_scales(b.superblock + minimums_at, wide);
  }
  INLINE_MEMBER VF minimums(BlockAt b) const { return minimums(b, levels); }
  // Of one row.
  INLINE_MEMBER float number(const char *p, int row) const {
    return wide ? ((const float *)p)[row] : half_to_float(((const uint16_t *)p)[row]);
  }
  INLINE_MEMBER float number(const char *half, const char *codes, int row) const {
    return half_to_float(((const uint16_t *)half)[row]) * (float)((const int8_t *)codes)[row];
  }
  INLINE_MEMBER float scale(BlockAt b, int row) const {
    return levels ? number(b.superblock, b.superblock + scales_at + b.place * 16, row)
                  : number(b.superblock + scales_at, row);
  }
  INLINE_MEMBER float minimum(BlockAt b, int row) const {
    return levels ? number(b.superblock + 32, b.superblock + minimums_at + b.place * 16, row)
                  : number(b.superblock + minimums_at, row);
  }
};
INLINE size_t tile_bytes(const tr_matrix &m) {
  switch (m.kind) {
  case TR_F32:
    return (size_t)64 * m.columns;
  case TR_F16:
    return (size_t)32 * m.columns;
  case TR_BF16:
    return (size_t)64 * ((m.columns + 1) / 2);
  }
  const Blocks blocks(m);
  return blocks.bytes * (m.columns / blocks.columns);
}
INLINE const char *tile_at(const tr_matrix &m, int t) { return (const char *)m.data + tile_bytes(m) * t; }

// The quants of a block from a column on, which is the first of a plane: `low` has those of eight bits, or their lowest
// four bits; `planes` the others, of 32 columns (one bit) or 16 (two bits) in 64 bytes.
template <int BITS> struct Quants {
  const char *low, *planes;
  Quants(int columns, const char *quants, int column) // `columns` of the block
      : low(quants + (size_t)column * (BITS == 8 ? 16 : 8)),
        planes(quants + (size_t)columns * 8 + (size_t)column * (BITS - 4) * 2) {}

  // The bits above the fourth of vector V (four columns) of a plane.
  template <int V> static INLINE_MEMBER VI high(VI plane) {
    constexpr int AT = V * (BITS - 4);
    if constexpr (AT <= 4)
      plane = left<4 - AT>(plane);
    else
      plane = right<AT - 4>(plane);
    return iand(plane, iset1(BITS == 5 ? 0x10101010 : 0x30303030));
  }
  template <int V> static INLINE_MEMBER void add_high(VI plane, VI &first, VI &second) {
    first = ior(first, high<V>(plane)), second = ior(second, high<V + 1>(plane));
  }
  // Eight columns from column j on, as bytes: byte 4 r + c is row r, column c, of the first four and the second four.
  INLINE_MEMBER void eight(int j, VI &first, VI &second) const {
    if constexpr (BITS == 8) {
      first = iload(low + (size_t)j * 16), second = iload(low + (size_t)j * 16 + 64);
      return;
    }
    const VI half = iset1(0x0f0f0f0f), w = iload(low + (size_t)j * 8);
    first = iand(w, half), second = iand(right<4>(w), half);
    if constexpr (BITS == 5) {
      const VI plane = iload(planes + j / 32 * 64);
      switch (j / 8 % 4) {
      case 0:
        return add_high<0>(plane, first, second);
      case 1:
        return add_high<2>(plane, first, second);
      case 2:
        return add_high<4>(plane, first, second);
      default:
        return add_high<6>(plane, first, second);
      }
    }
    if constexpr (BITS == 6) {
      const VI plane = iload(planes + j / 16 * 64);
      j / 8 % 2 ? add_high<2>(plane, first, second) : add_high<0>(plane, first, second);
    }
  }
  // The same as floats.
  INLINE_MEMBER void eight(int j, VF *x) const {
    VI w[2];
    eight(j, w[0], w[1]);
    const VI byte = iset1(0xff);
    for (int i = 0; i < 2; i++, x += 4) {
      x[0] = to_float(iand(w[i], byte)), x[1] = to_float(iand(right<8>(w[i]), byte));
      x[2] = to_float(iand(right<16>(w[i]), byte)), x[3] = to_float(right<24>(w[i]));
    }
  }
};
// One of the 16 rows, one of the columns.
INLINE uint8_t quant_at(const tr_matrix &m, const char *quants, int row, int column) {
  const int byte = row * 4 + column % 4;
  if (m.kind == TR_U8)
    return (uint8_t)quants[column / 4 * 64 + byte];
  const uint8_t w = (uint8_t)quants[column / 8 * 64 + byte];
  const int low = column & 4 ? w >> 4 : w & 15, bits = bits_of(m) - 4;
  if (!bits)
    return (uint8_t)low;
  const int columns = 32 / bits; // of a plane
  const uint8_t plane = (uint8_t)quants[(size_t)m.block * 8 + column / columns * 64 + byte];
  return (uint8_t)(low | (plane >> column % columns / 4 * bits & ((1 << bits) - 1)) << 4);
}
// Quants as bfloat16, which holds them exactly.
INLINE VI quant_pairs(VF low, VF high) { return ior(right<16>(as_int(low)), as_int(high)); }
} // namespace

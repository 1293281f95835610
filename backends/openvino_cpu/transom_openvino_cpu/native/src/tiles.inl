// AMX: registers of sixteen rows of up to 64 bytes, called tiles, and products of two of them. The words of the cache
// and of panels, [words of a row][16], are the right factor of a product without conversion.
//
// Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18, and volume 2. Where a processor
// lacks them, the tests trap the instructions and do the same in tests/native/traps.cpp.

namespace {
const int TILE = 16; // rows in one product

#ifdef TRANSOM_AMX
const bool TILED = true;

// Configures the shapes of tiles while it exists. The left factors 4 and 6 and the sums 0 to 3 have `rows` rows. The
// pair of factors 4 and 5 has rows of `bytes`, a multiple of 4; the pair 6 and 7 has rows of 64.
struct Tiles {
  explicit Tiles(int bytes, int rows = TILE) {
    struct alignas(64) {
      uint8_t palette, start, unused[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } shapes = {};
    shapes.palette = 1;
    for (int t = 0; t < 8; t++)
      shapes.row_bytes[t] = 64, shapes.rows[t] = (uint8_t)rows;
    shapes.row_bytes[4] = (uint16_t)bytes, shapes.rows[5] = (uint8_t)(bytes / 4), shapes.rows[7] = TILE;
    __asm__ volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~Tiles() { __asm__ volatile("tilerelease"); }
};

// `apart` is the stride of rows in bytes.
template <int T> INLINE void tile_load(const void *p, size_t apart) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(apart), "i"(T) : "memory");
}
template <int T> INLINE void tile_store(void *p, size_t apart) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(apart), "i"(T) : "memory");
}
template <int T> INLINE void tile_zero() { __asm__ volatile("tilezero %%tmm%c0" ::"i"(T)); }

// sums += a times b: signed bytes times unsigned bytes, unsigned times signed, and bfloat16
struct SignedUnsigned {
  template <int SUMS, int A, int B> INLINE void product() {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(A), "i"(B));
  }
};
struct UnsignedSigned {
  template <int SUMS, int A, int B> INLINE void product() {
    __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(A), "i"(B));
  }
};
struct Pairs {
  template <int SUMS, int A, int B> INLINE void product() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(A), "i"(B));
  }
};
#else // never instantiated
const bool TILED = false;
struct Tiles {
  explicit Tiles(int bytes, int rows = TILE);
};
template <int T> void tile_load(const void *p, size_t apart);
template <int T> void tile_store(void *p, size_t apart);
template <int T> void tile_zero();
struct SignedUnsigned {
  template <int SUMS, int A, int B> static void product();
};
typedef SignedUnsigned UnsignedSigned, Pairs;
#endif

// Bytes of a row in one product, out of `bytes` in all; a multiple of 16.
INLINE int tile_step(int bytes) { return bytes % 64 ? bytes & -bytes : 64; }

// Sums 0 to 3 += tile A times 64 columns of words at p, where `apart` is the stride of rows in bytes.
template <class D, int A, int B> INLINE void tile_products(const char *p, size_t apart) {
  tile_load<B>(p, apart), D::template product<0, A, B>();
  tile_load<B>(p + 64, apart), D::template product<1, A, B>();
  tile_load<B>(p + 128, apart), D::template product<2, A, B>();
  tile_load<B>(p + 192, apart), D::template product<3, A, B>();
}
// Four tiles side by side, rows of 64 words at p.
INLINE void four_tiles_to(char *p, size_t apart) {
  tile_store<0>(p, apart), tile_store<1>(p + 64, apart), tile_store<2>(p + 128, apart), tile_store<3>(p + 192, apart);
}

// x [rows][64 words] = rows of `bytes` at q, with stride `apart`, times the 64 keys at k.
template <class D> INLINE void tile_scores(const void *q, size_t apart, int bytes, const void *k, void *x) {
  const int step = tile_step(bytes);
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (int b = 0; b < bytes; b += step) {
    tile_load<4>((const char *)q + b, apart);
    tile_products<D, 4, 5>((const char *)k + (size_t)b * 64, 256);
  }
  four_tiles_to((char *)x, 256);
}
} // namespace

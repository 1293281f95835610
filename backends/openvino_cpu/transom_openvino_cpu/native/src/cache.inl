// The number formats of the cache (float, bfloat16 or int8), and the two products of attention in each of them.
//
// A page has one tile of keys and values per KV head. A tile consists of 4-byte words of P numbers, which are
// multiplied together. Keys are stored as [dim / P][64] words and values as [64 / P][dim] words. A register then holds
// sixteen keys, or sixteen columns of values, and one word of a query or of probabilities is broadcast to all lanes.
//
// int8: every key, value and query of a head has one scale. Keys and queries are first multiplied by a Hadamard matrix,
// which leaves their products unchanged and distributes outlier channels over all channels (QuaRot, Ashkboos and others
// 2024, arXiv:2404.00456). Probabilities are quantized to 8 bits in each tile of 64 (SageAttention, Zhang and others
// 2024, arXiv:2410.02367). All products are then products of bytes, and nothing is unpacked.

namespace {
const int PAGE = TR_PAGE;

// A tile in memory. Only int8 has scales: 64 for keys, 64 for values.
template <class C> struct Kept {
  typename C::T *k, *v;
  float *scales;
};
template <class C> INLINE size_t tile_bytes(int dim, int value_dim) {
  return (size_t)PAGE * (dim + value_dim) * sizeof(typename C::T) + (C::SCALED ? 2 * PAGE * 4 : 0);
}
template <class C> INLINE Kept<C> kept_at(char *p, int dim, int value_dim) {
  typedef typename C::T T;
  T *k = (T *)p, *v = k + (size_t)PAGE * dim;
  return {k, v, C::SCALED ? (float *)(v + (size_t)PAGE * value_dim) : nullptr};
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
INLINE float widen(uint16_t x) { return bf16_to_float(x); }
INLINE float widen(float x) { return x; }

// Shared by float and bfloat16; F is one of the two. Nodes have the format of the cache, so the same queries are
// multiplied by keys and by nodes.
template <class F, class Number, int Pair> struct Plain {
  typedef Number T;
  typedef Number Q; // number of a query
  typedef F Node;   // format of routing nodes, and of the queries multiplied by them
  enum { P = Pair, SCALED = 0 };

  static int query_width(int dim) { return dim; }

  // Logits of R rows with 64 keys.
  template <int R> INLINE void products(const T *q, int dim, const T *k, VF (&a)[R][4]) {
    for (int r = 0; r < R; r++)
      for (int c = 0; c < 4; c++)
        a[r][c] = zero();
    for (int d = 0; d < dim; d += P, k += 64 * P) {
      typename F::V kv[4];
      for (int c = 0; c < 4; c++)
        kv[c] = F::vec(k + 16 * P * c);
      for (int r = 0; r < R; r++) {
        typename F::V x = F::one(q + (size_t)r * dim + d);
        for (int c = 0; c < 4; c++)
          a[r][c] = F::dot(a[r][c], kv[c], x);
      }
    }
  }
  // IN_TILES: with the tiles that the caller has configured for R rows.
  template <int R, bool IN_TILES = false> INLINE void scores(const Q *q, int dim, const Kept<F> &t, VF (&a)[R][4]) {
    if constexpr (IN_TILES)
      tile_scores<Pairs>(q, dim * sizeof(Q), dim * sizeof(Q), t.k, a);
    else
      products<R>(q, dim, t.k, a);
  }

  // out [R][dim] += probabilities a times values; overwrites `a`.
  template <int R> INLINE void weigh(VF (&a)[R][4], const Kept<F> &t, float *out, int dim) {
    alignas(64) T p[R * 64];
    for (int r = 0; r < R; r++)
      F::put64(p + r * 64, a[r]);
    int d = 0;
    if constexpr (TILED && P > 1) {
      const size_t apart = (size_t)dim * 4;
      for (; d + 64 <= dim; d += 64) {
        tile_load<0>(out + d, apart), tile_load<1>(out + d + 16, apart);
        tile_load<2>(out + d + 32, apart), tile_load<3>(out + d + 48, apart);
        for (int half = 0; half < 2; half++) {
          tile_load<6>(p + 32 * half, 64 * sizeof(T));
          tile_products<Pairs, 6, 7>((const char *)t.v + (16 * half) * apart + (size_t)d * 4, apart);
        }
        four_tiles_to((char *)(out + d), apart);
      }
      for (; d < dim; d += 16) {
        tile_load<0>(out + d, apart);
        for (int half = 0; half < 2; half++) {
          tile_load<6>(p + 32 * half, 64 * sizeof(T));
          tile_load<7>((const char *)t.v + (16 * half) * apart + (size_t)d * 4, apart), Pairs::product<0, 6, 7>();
        }
        tile_store<0>(out + d, apart);
      }
      return;
    }
    for (; d + 64 <= dim; d += 64) {
      for (int r = 0; r < R; r++)
        for (int c = 0; c < 4; c++)
          a[r][c] = load(out + (size_t)r * dim + d + 16 * c);
      const T *v = t.v + d * P;
      for (int j = 0; j < 64; j += P, v += dim * P) {
        typename F::V vv[4];
        for (int c = 0; c < 4; c++)
          vv[c] = F::vec(v + 16 * P * c);
        for (int r = 0; r < R; r++) {
          typename F::V x = F::one(p + r * 64 + j);
          for (int c = 0; c < 4; c++)
            a[r][c] = F::dot(a[r][c], vv[c], x);
        }
      }
      for (int r = 0; r < R; r++)
        for (int c = 0; c < 4; c++)
          store(out + (size_t)r * dim + d + 16 * c, a[r][c]);
    }
    for (; d < dim; d += 16) {
      for (int r = 0; r < R; r++)
        a[r][0] = load(out + (size_t)r * dim + d);
      const T *v = t.v + d * P;
      for (int j = 0; j < 64; j += P, v += dim * P) {
        typename F::V x = F::vec(v);
        for (int r = 0; r < R; r++)
          a[r][0] = F::dot(a[r][0], x, F::one(p + r * 64 + j));
      }
      for (int r = 0; r < R; r++)
        store(out + (size_t)r * dim + d, a[r][0]);
    }
  }

  // Stores the key and value of token t in a tile. Returns false if they are not finite and this would not show later.
  static bool put(const Kept<F> &tile, int t, const float *k, int dim, const float *v, int value_dim) {
    F::put_key(tile.k + (size_t)t * P, k, dim);
    for (int d = 0; d < value_dim; d++)
      narrow(tile.v + ((size_t)t / P * value_dim + d) * P + t % P, v[d]);
    return true;
  }
  // Unpacks all keys of a tile to floats [dim][64].
  static void spread(const Kept<F> &tile, int dim, float *x) {
    for (int d = 0; d < dim; d++)
      for (int c = 0; c < 4; c++)
        store(x + (size_t)d * PAGE + 16 * c, F::column_of(tile.k + ((size_t)(d / P) * PAGE + 16 * c) * P, d % P));
  }
  // Unpacks one key to floats [dim].
  static void key(const Kept<F> &tile, int t, int dim, float *x) {
    for (int d = 0; d < dim; d++)
      x[d] = widen(tile.k[((size_t)(d / P) * PAGE + t) * P + d % P]);
  }
};

struct BFloat16 : Plain<BFloat16, uint16_t, 2> {
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
  // Column x of a pair, for 16 consecutive keys.
  INLINE VF column_of(const T *tile, int x) {
    const VI words = iload(tile);
    return as_float(x ? iand(words, iset1((int)0xffff0000)) : left<16>(words));
  }
  // `factor` times n floats (a multiple of 16).
  static void query(Q *to, const float *x, float factor, int n) {
    const VF f = set1(factor);
    int d = 0;
    for (; d + 32 <= n; d += 32)
      istore(to + d, to_bf16x32(mul(load(x + d), f), mul(load(x + d + 16), f)));
    for (; d < n; d++)
      narrow(to + d, x[d] * factor);
  }
  static void put_key(T *to, const float *x, int n) {
    T row[256];
    query(row, x, 1.f, n);
    for (int d = 0; d < n; d += 2)
      __builtin_memcpy(to + (size_t)d * PAGE, row + d, 4);
  }
  // Stores tokens t ... t + TOKENS - 1, where t is a multiple of TOKENS.
  enum { TOKENS = 2 };
  static bool put_some(const Kept<BFloat16> &tile, int t, const float *k, size_t k_apart, int dim, const float *v,
                       size_t v_apart, int value_dim) {
    for (int x = 0; x < TOKENS; x++)
      put_key(tile.k + (size_t)(t + x) * P, k + x * k_apart, dim);
    for (int d = 0; d < value_dim; d += 16)
      istore(tile.v + (size_t)t * value_dim + 2 * d, to_pairs(load(v + d), load(v + v_apart + d)));
    return true;
  }
};

struct Float32 : Plain<Float32, float, 1> {
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
  INLINE VF column_of(const T *tile, int) { return load(tile); }
  static void query(Q *to, const float *x, float factor, int n) {
    for (int d = 0; d < n; d += 16)
      store(to + d, mul(load(x + d), set1(factor)));
  }
  static void put_key(T *to, const float *x, int n) {
    for (int d = 0; d < n; d++)
      to[(size_t)d * PAGE] = x[d];
  }
  enum { TOKENS = 1 };
  static bool put_some(const Kept<Float32> &tile, int t, const float *k, size_t, int dim, const float *v, size_t,
                       int value_dim) {
    return put(tile, t, k, dim, v, value_dim);
  }
};

// --- int8 -----------------------------------------------------------------------------------------------------------
INLINE int turned_together(int dim) { return dim & -dim; } // its largest power-of-two divisor, at least 16

template <int H> INLINE VF butterfly(VF x) {
  alignas(64) static const float signs[16] = {
      1, H & 1 ? -1.f : 1, H & 2 ? -1.f : 1, H & 3 ? -1.f : 1, H & 4 ? -1.f : 1, H & 5 ? -1.f : 1,
      H & 6 ? -1.f : 1, H & 7 ? -1.f : 1, H & 8 ? -1.f : 1, H & 9 ? -1.f : 1, H & 10 ? -1.f : 1,
      H & 11 ? -1.f : 1, H & 12 ? -1.f : 1, H & 13 ? -1.f : 1, H & 14 ? -1.f : 1, H & 15 ? -1.f : 1};
  return fma(x, load(signs), swapped<H>(x));
}
// x [dim] times unscaled Hadamard matrices of size `turned_together`; their square is that number times the identity.
INLINE void turn(const float *x, int dim, float *y) {
  for (int d = 0; d < dim; d += 16)
    store(y + d, butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(load(x + d))))));
  const int together = turned_together(dim);
  for (int h = 16; h < together; h *= 2)
    for (int b = 0; b < dim; b += 2 * h)
      for (int d = b; d < b + h; d += 16) {
        const VF low = load(y + d), high = load(y + d + h);
        store(y + d, add(low, high));
        store(y + d + h, sub(low, high));
      }
}
INLINE float largest(const float *x, int n) {
  VF most = zero();
  for (int d = 0; d < n; d += 16)
    most = max(most, max(load(x + d), sub(zero(), load(x + d))));
  return top(most);
}
INLINE float to_bytes(float most) { return most > 1e-30f ? 127.f / most : 0.f; }
INLINE float from_bytes(float most) { return most > 1e-30f ? most / 127.f : 0.f; }

struct Int8 {
  typedef uint8_t T; // keys: the number plus 128; values: the number
  typedef int8_t Q;
  typedef BFloat16 Node;
  enum { P = 4, SCALED = 1, TOKENS = 4 };

  // A query: dim numbers, a scale, 128 times the sum of the numbers, padding.
  static int query_width(int dim) { return dim + 16; }
  static void query(Q *to, const float *x, float factor, int dim) {
    float y[256];
    turn(x, dim, y);
    const float most = largest(y, dim);
    const VF inverse = set1(to_bytes(most));
    VF sums = zero();
    for (int d = 0; d < dim; d += 16) {
      const VF n = round_even(mul(load(y + d), inverse));
      sums = add(sums, n);
      store_bytes(to + d, to_int(n));
    }
    // Integers cannot be NaN, so the scale carries it.
    const bool numbers = finite(y, dim);
    const float scale = numbers ? from_bytes(most) * (factor / (float)turned_together(dim)) : __builtin_nanf("");
    const int32_t offset = numbers ? 128 * (int32_t)sum(sums) : 0;
    __builtin_memcpy(to + dim, &scale, 4);
    __builtin_memcpy(to + dim + 4, &offset, 4);
  }
  INLINE VF exp2(VF x) { return near_exp2v(x); }

  // Logits of R rows with 64 keys.
  template <int R, bool IN_TILES = false> INLINE void scores(const Q *q, int dim, const Kept<Int8> &t, VF (&a)[R][4]) {
    static_assert(!IN_TILES, "see attend_in_tiles");
    VI s[R][4];
    const int width = query_width(dim);
    for (int r = 0; r < R; r++)
      for (int c = 0; c < 4; c++)
        s[r][c] = start(q + (size_t)r * width, dim);
    const T *k = t.k;
    for (int d = 0; d < dim; d += 4, k += 256) {
      VI kv[4];
      for (int c = 0; c < 4; c++)
        kv[c] = iload(k + 64 * c);
      for (int r = 0; r < R; r++) {
        const VI x = iset1_at(q + (size_t)r * width + d);
        for (int c = 0; c < 4; c++)
          s[r][c] = dot_bytes(s[r][c], kv[c], x);
      }
    }
    for (int r = 0; r < R; r++)
      logits(s[r], q + (size_t)r * width, dim, t, a[r]);
  }
  // Minus 128 times the sum of a query, to compensate for the offset of keys.
  INLINE VI start(const Q *q, int dim) {
    int32_t offset;
    __builtin_memcpy(&offset, q + dim + 4, 4);
    return iset1(-offset);
  }
  // The integers of a row to logits.
  INLINE void logits(const VI (&s)[4], const Q *q, int dim, const Kept<Int8> &t, VF (&a)[4]) {
    float own;
    __builtin_memcpy(&own, q + dim, 4);
    for (int c = 0; c < 4; c++)
      a[c] = mul(to_float(s[c]), mul(load(t.scales + 16 * c), set1(own)));
  }

  // Probabilities of a row times the scales of values, to bytes from 0 to 255; overwrites `a`. Returns what a byte is.
  INLINE VF to_bytes_of(VF (&a)[4], const Kept<Int8> &t, int8_t *p) {
    for (int c = 0; c < 4; c++)
      a[c] = mul(a[c], load(t.scales + PAGE + 16 * c));
    const float most = top(max(max(a[0], a[1]), max(a[2], a[3])));
    const VF inverse = set1(most > 1e-30f ? 255.f / most : 0.f);
    for (int c = 0; c < 4; c++)
      store_bytes(p + 16 * c, to_int(mul(a[c], inverse)));
    return set1(most * (1.f / 255.f));
  }
  template <int R> INLINE void weigh(VF (&a)[R][4], const Kept<Int8> &t, float *out, int dim) {
    alignas(64) int8_t p[R * 64];
    VF back[R];
    for (int r = 0; r < R; r++)
      back[r] = to_bytes_of(a[r], t, p + r * 64);
    int d = 0;
    for (; d + 64 <= dim; d += 64) {
      VI s[R][4];
      for (int r = 0; r < R; r++)
        for (int c = 0; c < 4; c++)
          s[r][c] = izero();
      const T *v = t.v + d * 4;
      for (int j = 0; j < 64; j += 4, v += (size_t)dim * 4) {
        VI vv[4];
        for (int c = 0; c < 4; c++)
          vv[c] = iload(v + 64 * c);
        for (int r = 0; r < R; r++) {
          const VI x = iset1_at(p + r * 64 + j);
          for (int c = 0; c < 4; c++)
            s[r][c] = dot_bytes(s[r][c], x, vv[c]);
        }
      }
      for (int r = 0; r < R; r++)
        for (int c = 0; c < 4; c++) {
          float *o = out + (size_t)r * dim + d + 16 * c;
          store(o, fma(to_float(s[r][c]), back[r], load(o)));
        }
    }
    for (; d < dim; d += 16) {
      VI s[R];
      for (int r = 0; r < R; r++)
        s[r] = izero();
      const T *v = t.v + d * 4;
      for (int j = 0; j < 64; j += 4, v += (size_t)dim * 4) {
        const VI x = iload(v);
        for (int r = 0; r < R; r++)
          s[r] = dot_bytes(s[r], iset1_at(p + r * 64 + j), x);
      }
      for (int r = 0; r < R; r++)
        store(out + (size_t)r * dim + d, fma(to_float(s[r]), back[r], load(out + (size_t)r * dim + d)));
    }
  }

  static bool put_key(const Kept<Int8> &tile, int t, const float *x, int dim) {
    float y[256];
    int8_t row[256];
    turn(x, dim, y);
    const float most = largest(y, dim);
    const VF inverse = set1(to_bytes(most));
    for (int d = 0; d < dim; d += 16)
      store_bytes(row + d, to_int(add(round_even(mul(load(y + d), inverse)), set1(128.f))));
    for (int d = 0; d < dim; d += 4)
      __builtin_memcpy(tile.k + (size_t)d * PAGE + 4 * t, row + d, 4);
    tile.scales[t] = from_bytes(most);
    return finite(x, dim);
  }
  static bool put(const Kept<Int8> &tile, int t, const float *k, int dim, const float *v, int value_dim) {
    int8_t row[256];
    const float most = largest(v, value_dim);
    const VF inverse = set1(to_bytes(most));
    for (int d = 0; d < value_dim; d += 16)
      store_bytes(row + d, to_int(mul(load(v + d), inverse)));
    for (int d = 0; d < value_dim; d++)
      tile.v[((size_t)t / 4 * value_dim + d) * 4 + t % 4] = (uint8_t)row[d];
    tile.scales[PAGE + t] = from_bytes(most);
    return put_key(tile, t, k, dim) & finite(v, value_dim);
  }
  static bool put_some(const Kept<Int8> &tile, int t, const float *k, size_t k_apart, int dim, const float *v,
                       size_t v_apart, int value_dim) {
    bool fine = true;
    VF inverse[4];
    for (int x = 0; x < 4; x++) {
      fine &= put_key(tile, t + x, k + x * k_apart, dim) & finite(v + x * v_apart, value_dim);
      const float most = largest(v + x * v_apart, value_dim);
      inverse[x] = set1(to_bytes(most));
      tile.scales[PAGE + t + x] = from_bytes(most);
    }
    const VI low = iset1(0xff);
    for (int d = 0; d < value_dim; d += 16) {
      auto number = [&](int x) { return iand(to_int(mul(load(v + x * v_apart + d), inverse[x])), low); };
      istore(tile.v + (size_t)t * value_dim + 4 * d,
             ior(ior(number(0), left<8>(number(1))), ior(left<16>(number(2)), left<24>(number(3)))));
    }
    return fine;
  }

  // Undoes the Hadamard transform of keys.
  static void spread(const Kept<Int8> &tile, int dim, float *x) {
    const int together = turned_together(dim);
    const VF share = set1(1.f / (float)together);
    VF scale[4];
    for (int c = 0; c < 4; c++)
      scale[c] = mul(load(tile.scales + 16 * c), share);
    const VI low = iset1(0xff);
    for (int d = 0; d < dim; d += 4)
      for (int c = 0; c < 4; c++) {
        const VI words = iload(tile.k + (size_t)d * PAGE + 64 * c);
        const VI parts[4] = {iand(words, low), iand(right<8>(words), low), iand(right<16>(words), low), right<24>(words)};
        for (int y = 0; y < 4; y++)
          store(x + (size_t)(d + y) * PAGE + 16 * c, mul(sub(to_float(parts[y]), set1(128.f)), scale[c]));
      }
    for (int h = 1; h < together; h *= 2)
      for (int b = 0; b < dim; b += 2 * h)
        for (int d = b; d < b + h; d++)
          for (int c = 0; c < 4; c++) {
            float *at = x + (size_t)d * PAGE + 16 * c;
            const VF first = load(at), second = load(at + (size_t)h * PAGE);
            store(at, add(first, second));
            store(at + (size_t)h * PAGE, sub(first, second));
          }
  }
  static void key(const Kept<Int8> &tile, int t, int dim, float *x) {
    float y[256];
    const float scale = tile.scales[t] * (1.f / (float)turned_together(dim));
    for (int d = 0; d < dim; d++)
      y[d] = ((float)tile.k[(size_t)(d / 4) * 256 + 4 * t + d % 4] - 128.f) * scale;
    turn(y, dim, x);
  }
};

// Copies the key and value of one token from one tile to another.
template <class C> static void copy_token(const Kept<C> &from, int t, const Kept<C> &to, int x, int dim, int value_dim) {
  const int P = C::P;
  for (int d = 0; d < dim / P; d++)
    __builtin_memcpy(to.k + ((size_t)d * PAGE + x) * P, from.k + ((size_t)d * PAGE + t) * P, 4);
  for (int d = 0; d < value_dim; d++)
    to.v[((size_t)x / P * value_dim + d) * P + x % P] = from.v[((size_t)t / P * value_dim + d) * P + t % P];
  if (C::SCALED)
    to.scales[x] = from.scales[t], to.scales[PAGE + x] = from.scales[PAGE + t];
}
// The same for n tokens; t, x and n are multiples of 8.
template <class C>
static void copy_tokens(const Kept<C> &from, int t, const Kept<C> &to, int x, int n, int dim, int value_dim) {
  const int P = C::P;
  for (int d = 0; d < dim / P; d++)
    __builtin_memcpy(to.k + ((size_t)d * PAGE + x) * P, from.k + ((size_t)d * PAGE + t) * P, 4 * (size_t)n);
  __builtin_memcpy(to.v + (size_t)x * value_dim, from.v + (size_t)t * value_dim,
                   (size_t)n * value_dim * sizeof(typename C::T));
  if (C::SCALED) {
    __builtin_memcpy(to.scales + x, from.scales + t, 4 * (size_t)n);
    __builtin_memcpy(to.scales + PAGE + x, from.scales + PAGE + t, 4 * (size_t)n);
  }
}
// Sets tokens t to 63 to zero (t is a multiple of 8), because 0 times the old contents must be 0.
template <class C> static void clear_tokens(const Kept<C> &tile, int t, int dim, int value_dim) {
  const int P = C::P;
  for (int d = 0; d < dim / P; d++)
    __builtin_memset(tile.k + ((size_t)d * PAGE + t) * P, 0, 4 * (size_t)(PAGE - t));
  __builtin_memset(tile.v + (size_t)t * value_dim, 0, (size_t)(PAGE - t) * value_dim * sizeof(typename C::T));
  if (C::SCALED) {
    __builtin_memset(tile.scales + t, 0, 4 * (size_t)(PAGE - t));
    __builtin_memset(tile.scales + PAGE + t, 0, 4 * (size_t)(PAGE - t));
  }
}
} // namespace

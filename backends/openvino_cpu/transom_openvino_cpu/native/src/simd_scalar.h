// Sixteen lanes in plain C++, for every processor. See simd_avx512.h for what each function means.
//
// No intrinsics: the lanes are vectors of four, which GCC and Clang keep in the registers of x86-64 and AArch64, and
// split on other processors.
#pragma once
#include <cstdint>

namespace {
typedef float F4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));
typedef uint32_t U4 __attribute__((vector_size(16)));
typedef int16_t S8 __attribute__((vector_size(16)));
struct VF {
  F4 v[4];
};
struct VI { // unsigned, so that shifts and sums are defined for every number
  U4 v[4];
};
#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))
enum { ROWS = 2, SMALL_APART = 0 };
// Evaluates an expression for each of the four quarters i.
#define TR_QUARTERS(V, EXPRESSION)                                                                                     \
  V r;                                                                                                                 \
  for (int i = 0; i < 4; i++)                                                                                          \
    r.v[i] = EXPRESSION;                                                                                               \
  return r

INLINE F4 all(float x) { return F4{x, x, x, x}; }
INLINE U4 all(uint32_t x) { return U4{x, x, x, x}; }
INLINE F4 choose(I4 mask, F4 x, F4 y) { return (F4)((mask & (I4)x) | (~mask & (I4)y)); }
INLINE F4 smaller(F4 x, F4 y) { return choose(x < y, x, y); }
INLINE F4 larger(F4 x, F4 y) { return choose(x > y, x, y); }

INLINE VF set1(float x) { TR_QUARTERS(VF, all(x)); }
INLINE VF zero() { return set1(0.f); }
INLINE VF load(const float *p) {
  VF r;
  __builtin_memcpy(&r, p, 64);
  return r;
}
INLINE void store(float *p, VF x) { __builtin_memcpy(p, &x, 64); }
INLINE VF add(VF x, VF y) { TR_QUARTERS(VF, x.v[i] + y.v[i]); }
INLINE VF sub(VF x, VF y) { TR_QUARTERS(VF, x.v[i] - y.v[i]); }
INLINE VF mul(VF x, VF y) { TR_QUARTERS(VF, x.v[i] * y.v[i]); }
INLINE VF div(VF x, VF y) { TR_QUARTERS(VF, x.v[i] / y.v[i]); }
INLINE VF fma(VF x, VF y, VF z) { TR_QUARTERS(VF, x.v[i] * y.v[i] + z.v[i]); } // rounded once or twice
INLINE VF max(VF x, VF y) { TR_QUARTERS(VF, larger(x.v[i], y.v[i])); }         // y if one is NaN
INLINE VF min(VF x, VF y) { TR_QUARTERS(VF, smaller(x.v[i], y.v[i])); }        // y if one is NaN
INLINE VF vsqrt(VF x) {
  for (int i = 0; i < 16; i++)
    x.v[i / 4][i % 4] = __builtin_sqrtf(x.v[i / 4][i % 4]);
  return x;
}
INLINE float sum(VF x) {
  const F4 q = (x.v[0] + x.v[2]) + (x.v[1] + x.v[3]);
  return (q[0] + q[2]) + (q[1] + q[3]);
}
INLINE float top(VF x) {
  const F4 q = larger(larger(x.v[0], x.v[2]), larger(x.v[1], x.v[3]));
  const float a = q[0] > q[2] ? q[0] : q[2], b = q[1] > q[3] ? q[1] : q[3];
  return a > b ? a : b;
}
INLINE I4 lanes_of(unsigned mask) { // all ones in the lanes whose bit is set, of four
  const U4 bits = {1, 2, 4, 8};
  return (I4)((all((uint32_t)mask) & bits) == bits);
}
INLINE VF pick(unsigned mask, VF x, VF y) { TR_QUARTERS(VF, choose(lanes_of(mask >> 4 * i), x.v[i], y.v[i])); }
INLINE unsigned at_least(VF x, VF y) {
  unsigned mask = 0;
  for (int i = 0; i < 16; i++)
    mask |= (unsigned)(x.v[i / 4][i % 4] >= y.v[i / 4][i % 4]) << i;
  return mask;
}
// From 2 ** 23 on every float is an integer; adding 2 ** 23 to a smaller number removes its fraction.
INLINE F4 rounded(F4 x) {
  const U4 sign = (U4)x & all(0x80000000u);
  const F4 size = (F4)((U4)x ^ sign), far = (F4)((U4)all(8388608.f) | sign);
  return choose(size < all(8388608.f), x + far - far, x);
}
INLINE VF round_even(VF x) { TR_QUARTERS(VF, rounded(x.v[i])); }
// Only the exponent is computed, so subnormal results are 0, and results from 2 ** 128 on are infinite.
INLINE F4 power_of(F4 n) {
  n = larger(smaller(n, all(128.f)), all(-127.f)); // 128 for NaN
  return (F4)(((U4)__builtin_convertvector(n, I4) + all(127u)) << 23);
}
INLINE VF scale2(VF x, VF n) { TR_QUARTERS(VF, x.v[i] * power_of(n.v[i])); }

INLINE VF load_two(const float *low, const float *high) {
  VF r;
  __builtin_memcpy(&r, low, 32);
  __builtin_memcpy(&r.v[2], high, 32);
  return r;
}
INLINE VF pair_sums(VF x, VF y) {
  VF r;
  for (int i = 0; i < 4; i++) {
    const F4 *q = i < 2 ? x.v + 2 * i : y.v + 2 * (i - 2);
    r.v[i] = F4{q[0][0], q[0][2], q[1][0], q[1][2]} + F4{q[0][1], q[0][3], q[1][1], q[1][3]};
  }
  return r;
}

template <int H> INLINE VF swapped(VF x) {
  VF r;
  for (int i = 0; i < 16; i++)
    r.v[i / 4][i % 4] = x.v[(i ^ H) / 4][(i ^ H) % 4];
  return r;
}

INLINE VI iset1(int32_t x) { TR_QUARTERS(VI, all((uint32_t)x)); }
INLINE VI izero() { return iset1(0); }
INLINE VI iload(const void *p) {
  VI r;
  __builtin_memcpy(&r, p, 64);
  return r;
}
INLINE VI iload_two(const void *low, const void *high) {
  VI r;
  __builtin_memcpy(&r, low, 32);
  __builtin_memcpy(&r.v[2], high, 32);
  return r;
}
INLINE VI iset1_at(const void *p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return iset1(x);
}
INLINE void istore(void *p, VI x) { __builtin_memcpy(p, &x, 64); }
INLINE VI iand(VI x, VI y) { TR_QUARTERS(VI, x.v[i] & y.v[i]); }
INLINE VI iadd(VI x, VI y) { TR_QUARTERS(VI, x.v[i] + y.v[i]); }
INLINE VI ior(VI x, VI y) { TR_QUARTERS(VI, x.v[i] | y.v[i]); }
template <int N> INLINE VI right(VI x) { TR_QUARTERS(VI, x.v[i] >> N); }
template <int N> INLINE VI left(VI x) { TR_QUARTERS(VI, x.v[i] << N); }
INLINE VF to_float(VI x) { TR_QUARTERS(VF, __builtin_convertvector((I4)x.v[i], F4)); }
INLINE U4 whole(F4 x) { // the lowest number for NaN and out-of-range values, like the instructions
  x = rounded(x);
  const F4 low = all(-2147483648.f);
  return (U4)__builtin_convertvector(choose((x >= low) & (x < -low), x, low), I4);
}
INLINE VI to_int(VF x) { TR_QUARTERS(VI, whole(x.v[i])); }
INLINE VF as_float(VI x) { TR_QUARTERS(VF, (F4)x.v[i]); }
INLINE VI as_int(VF x) { TR_QUARTERS(VI, (U4)x.v[i]); }

INLINE F4 halves(const uint16_t *p) {
  const U4 h = {p[0], p[1], p[2], p[3]}, rest = h & all(0x7fffu), normal = (rest << 13) + all(0x38000000u);
  const F4 small = __builtin_convertvector((I4)rest, F4) * all(5.9604644775390625e-8f); // and 0
  const F4 large = (F4)(normal + all(0x38000000u));                                     // infinity and NaN
  const F4 x = choose(rest < all(0x400u), small, choose(rest < all(0x7c00u), (F4)normal, large));
  return (F4)((U4)x | (h & all(0x8000u)) << 16);
}
INLINE VF load_half(const uint16_t *p) { TR_QUARTERS(VF, halves(p + 4 * i)); }
INLINE VI load_bytes(const int8_t *p) {
  VI x;
  for (int i = 0; i < 16; i++)
    x.v[i / 4][i % 4] = (uint32_t)(int32_t)p[i];
  return x;
}
INLINE void store_bytes(int8_t *p, VI x) {
  for (int i = 0; i < 16; i++)
    p[i] = (int8_t)x.v[i / 4][i % 4];
}
// A product of an unsigned and a signed byte fits into 16 bits, a sum of two does not: so words are multiplied, those
// of the bytes with even places and those of the odd ones, and added in 32 bits.
INLINE U4 dot4(U4 acc, U4 w, U4 x) {
  const I4 e = (I4)((S8)(w & all(0xff00ffu)) * ((S8)(x << 8 & all(0xff00ff00u)) >> 8));
  const I4 o = (I4)((S8)(w >> 8 & all(0xff00ffu)) * ((S8)x >> 8));
  return acc + (U4)((((I4)((U4)e << 16) >> 16) + (e >> 16)) + (((I4)((U4)o << 16) >> 16) + (o >> 16)));
}
INLINE VI dot_bytes(VI acc, VI w, VI x) { TR_QUARTERS(VI, dot4(acc.v[i], w.v[i], x.v[i])); }
INLINE VI dot_small(VI acc, VI w, VI x) { return dot_bytes(acc, w, x); }

INLINE VF dot_pairs(VF acc, VI x, VI y) {
  const VI high = iset1((int)0xffff0000);
  acc = fma(as_float(left<16>(x)), as_float(left<16>(y)), acc);
  return fma(as_float(iand(x, high)), as_float(iand(y, high)), acc);
}
INLINE U4 high_bf16(F4 x) { // bfloat16 in the high half, rounded to nearest even; NaN stays NaN
  const U4 i = (U4)x;
  const F4 near = (F4)(i + all(0x7fffu) + (i >> 16 & all(1u)));
  return (U4)choose(x == x, near, (F4)(i | all(0x400000u))) & all(0xffff0000u);
}
INLINE VI to_pairs(VF low, VF high) { TR_QUARTERS(VI, high_bf16(low.v[i]) >> 16 | high_bf16(high.v[i])); }
INLINE VI to_bf16x32(VF first, VF second) {
  uint16_t words[32];
  for (int i = 0; i < 4; i++) {
    const U4 a = high_bf16(first.v[i]) >> 16, b = high_bf16(second.v[i]) >> 16;
    for (int k = 0; k < 4; k++)
      words[4 * i + k] = (uint16_t)a[k], words[16 + 4 * i + k] = (uint16_t)b[k];
  }
  return iload(words);
}
#undef TR_QUARTERS
} // namespace

// Sixteen lanes in one AVX-512 register. The other simd_*.h implement the same functions in other instructions.
#pragma once
#include <cstdint>
#include <immintrin.h>

namespace {
typedef __m512 VF;
typedef __m512i VI;
#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))
enum {
  ROWS = 6,        // rows multiplied at once by four registers, or two tiles: their sums fill the 32 registers
  SMALL_APART = 0 // 1: dot_small is faster than dot_bytes
};

INLINE VF zero() { return _mm512_setzero_ps(); }
INLINE VF set1(float x) { return _mm512_set1_ps(x); }
INLINE VF load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void store(float *p, VF x) { _mm512_storeu_ps(p, x); }
INLINE VF add(VF a, VF b) { return _mm512_add_ps(a, b); }
INLINE VF sub(VF a, VF b) { return _mm512_sub_ps(a, b); }
INLINE VF mul(VF a, VF b) { return _mm512_mul_ps(a, b); }
INLINE VF div(VF a, VF b) { return _mm512_div_ps(a, b); }
INLINE VF fma(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
INLINE VF max(VF a, VF b) { return _mm512_max_ps(a, b); } // b if one is NaN
INLINE VF min(VF a, VF b) { return _mm512_min_ps(a, b); } // b if one is NaN
INLINE VF vsqrt(VF a) { return _mm512_sqrt_ps(a); }
INLINE float sum(VF a) { return _mm512_reduce_add_ps(a); }
INLINE float top(VF a) { return _mm512_reduce_max_ps(a); }
// x where the lane's bit is set, else y
INLINE VF pick(unsigned mask, VF x, VF y) { return _mm512_mask_blend_ps((__mmask16)mask, y, x); }
INLINE unsigned at_least(VF a, VF b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
INLINE VF round_even(VF a) { return _mm512_roundscale_ps(a, 8); }
INLINE VF scale2(VF a, VF n) { return _mm512_scalef_ps(a, n); } // a * 2 ** n, n is an integer

// Loads eight lanes from each of two addresses.
INLINE VF load_two(const float *low, const float *high) {
  return _mm512_castpd_ps(_mm512_insertf64x4(_mm512_castpd256_pd512(_mm256_loadu_pd((const double *)low)),
                                             _mm256_loadu_pd((const double *)high), 1));
}
// a0 + a1, a2 + a3, …, b0 + b1, …
INLINE VF pair_sums(VF a, VF b) {
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  return add(_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b));
}

// Moves lane i ^ H to lane i.
template <int H> INLINE VF swapped(VF a) {
  return H == 1   ? _mm512_permute_ps(a, 0xb1)
         : H == 2 ? _mm512_permute_ps(a, 0x4e)
         : H == 4 ? _mm512_shuffle_f32x4(a, a, 0xb1)
                  : _mm512_shuffle_f32x4(a, a, 0x4e);
}

INLINE VI izero() { return _mm512_setzero_si512(); }
INLINE VI iset1(int32_t x) { return _mm512_set1_epi32(x); }
INLINE VI iload(const void *p) { return _mm512_loadu_si512(p); }
INLINE VI iload_two(const void *low, const void *high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)low)),
                            _mm256_loadu_si256((const __m256i *)high), 1);
}
INLINE VI iset1_at(const void *p) { // one word from memory, in every lane
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return _mm512_set1_epi32(x);
}
INLINE void istore(void *p, VI x) { _mm512_storeu_si512(p, x); }
INLINE VI iand(VI a, VI b) { return _mm512_and_si512(a, b); }
template <int N> INLINE VI right(VI a) { return _mm512_srli_epi32(a, N); }
template <int N> INLINE VI left(VI a) { return _mm512_slli_epi32(a, N); }
INLINE VI iadd(VI a, VI b) { return _mm512_add_epi32(a, b); }
INLINE VI ior(VI a, VI b) { return _mm512_or_si512(a, b); }
INLINE VF to_float(VI a) { return _mm512_cvtepi32_ps(a); }
INLINE VI to_int(VF a) { return _mm512_cvtps_epi32(a); } // to nearest even
INLINE VF as_float(VI a) { return _mm512_castsi512_ps(a); }
INLINE VI as_int(VF a) { return _mm512_castps_si512(a); }

INLINE VF load_half(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
// 16 signed bytes
INLINE VI load_bytes(const int8_t *p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }
// 16 numbers to signed bytes
INLINE void store_bytes(int8_t *p, VI a) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(a)); }
// acc + sums of 4 products each of unsigned bytes w and signed bytes a; |w * a| summed never leaves 32 bits
INLINE VI dot_bytes(VI acc, VI w, VI a) {
#ifdef __clang__
  return _mm512_dpbusd_epi32(acc, w, a);
#else // GCC copies the accumulator twice around the intrinsic
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(a));
  return acc;
#endif
}
// The same where w <= 127
INLINE VI dot_small(VI acc, VI w, VI a) { return dot_bytes(acc, w, a); }

#ifdef TRANSOM_BF16
// acc + sums of 2 products each of bfloat16 pairs
INLINE VF dot_pairs(VF acc, VI a, VI b) {
#ifdef __clang__
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#else
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
#endif
}
// bfloat16 pairs (low, high), rounded to nearest even
INLINE VI to_pairs(VF low, VF high) {
  __m512i l = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low));
  __m512i h = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high));
  return _mm512_or_si512(l, _mm512_slli_epi32(h, 16));
}
// 32 bfloat16 in the order of memory
INLINE VI to_bf16x32(VF first, VF second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }
#else
INLINE VF dot_pairs(VF acc, VI a, VI b) {
  const VI high = _mm512_set1_epi32((int)0xffff0000);
  acc = fma(as_float(left<16>(a)), as_float(left<16>(b)), acc);
  return fma(as_float(iand(a, high)), as_float(iand(b, high)), acc);
}
INLINE VI to_high_bf16(VF x) { // bfloat16 in the high half, rounded to nearest even; NaN stays NaN
  VI i = as_int(x), odd = iand(right<16>(i), iset1(1));
  VI near = _mm512_add_epi32(i, _mm512_add_epi32(odd, iset1(0x7fff)));
  near = _mm512_mask_mov_epi32(ior(i, iset1(0x400000)), _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), near);
  return iand(near, iset1((int)0xffff0000));
}
INLINE VI to_pairs(VF low, VF high) { return ior(right<16>(to_high_bf16(low)), to_high_bf16(high)); }
INLINE VI to_bf16x32(VF first, VF second) {
  __m256i a = _mm512_cvtepi32_epi16(right<16>(to_high_bf16(first)));
  __m256i b = _mm512_cvtepi32_epi16(right<16>(to_high_bf16(second)));
  return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}
#endif
} // namespace

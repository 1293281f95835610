// Sixteen lanes in two AVX2 registers, with FMA and F16C. See simd_avx512.h for what each function means.
#pragma once
#include <cstdint>
#include <immintrin.h>

namespace {
struct VF {
  __m256 a, b;
};
struct VI {
  __m256i a, b;
};
#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))
enum { ROWS = 2, SMALL_APART = 1 };

INLINE VF zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE VF set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE VF load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float *p, VF x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
INLINE VF add(VF x, VF y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE VF sub(VF x, VF y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INLINE VF mul(VF x, VF y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE VF div(VF x, VF y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
INLINE VF fma(VF x, VF y, VF z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
INLINE VF max(VF x, VF y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; } // y if one is NaN
INLINE VF min(VF x, VF y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; } // y if one is NaN
INLINE VF vsqrt(VF x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
INLINE float sum(VF x) {
  __m256 h = _mm256_add_ps(x.a, x.b);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
INLINE float top(VF x) {
  __m256 h = _mm256_max_ps(x.a, x.b);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
INLINE __m256 lanes_of(unsigned mask) { // all ones in the lanes whose bit is set, of eight
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)mask), bits), bits));
}
INLINE VF pick(unsigned mask, VF x, VF y) {
  return {_mm256_blendv_ps(y.a, x.a, lanes_of(mask)), _mm256_blendv_ps(y.b, x.b, lanes_of(mask >> 8))};
}
INLINE unsigned at_least(VF x, VF y) {
  unsigned low = (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ));
  return low | (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ)) << 8;
}
INLINE VF round_even(VF x) { return {_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
// Only the exponent is computed, so subnormal results are 0, and results from 2 ** 128 on are infinite.
INLINE __m256 power_of(__m256 n) {
  n = _mm256_max_ps(_mm256_set1_ps(-127), _mm256_min_ps(_mm256_set1_ps(128), n));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
INLINE VF scale2(VF x, VF n) { return {_mm256_mul_ps(x.a, power_of(n.a)), _mm256_mul_ps(x.b, power_of(n.b))}; }

INLINE VF load_two(const float *low, const float *high) { return {_mm256_loadu_ps(low), _mm256_loadu_ps(high)}; }
INLINE __m256 sums_of_pairs(VF x) {
  __m256 h = _mm256_hadd_ps(x.a, x.b); // by halves of a register: 0, 1, 4, 5, 2, 3, 6, 7
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(h), 0xd8));
}
INLINE VF pair_sums(VF x, VF y) { return {sums_of_pairs(x), sums_of_pairs(y)}; }

template <int H> INLINE VF swapped(VF x) {
  if (H == 8)
    return {x.b, x.a};
  if (H == 4)
    return {_mm256_permute2f128_ps(x.a, x.a, 1), _mm256_permute2f128_ps(x.b, x.b, 1)};
  return {_mm256_permute_ps(x.a, H == 1 ? 0xb1 : 0x4e), _mm256_permute_ps(x.b, H == 1 ? 0xb1 : 0x4e)};
}

INLINE VI izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
INLINE VI iset1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE VI iload(const void *p) {
  return {_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1)};
}
INLINE VI iload_two(const void *low, const void *high) {
  return {_mm256_loadu_si256((const __m256i *)low), _mm256_loadu_si256((const __m256i *)high)};
}
INLINE VI iset1_at(const void *p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return iset1(x);
}
INLINE void istore(void *p, VI x) {
  _mm256_storeu_si256((__m256i *)p, x.a);
  _mm256_storeu_si256((__m256i *)p + 1, x.b);
}
INLINE VI iand(VI x, VI y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
INLINE VI iadd(VI x, VI y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
INLINE VI ior(VI x, VI y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
template <int N> INLINE VI right(VI x) { return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)}; }
template <int N> INLINE VI left(VI x) { return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)}; }
INLINE VF to_float(VI x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
INLINE VI to_int(VF x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
INLINE VF as_float(VI x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
INLINE VI as_int(VF x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }

INLINE VF load_half(const uint16_t *p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p + 1))};
}
INLINE VI load_bytes(const int8_t *p) {
  return {_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)),
          _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8)))};
}
INLINE __m256i low_words(VI x) { // of lanes below 2 ** 16
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xd8);
}
INLINE void store_bytes(int8_t *p, VI x) {
  __m256i w = low_words(iand(x, iset1(0xff)));
  _mm_storeu_si128((__m128i *)p, _mm_packus_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
}

#ifdef TRANSOM_AVX_VNNI
#ifdef __AVXVNNI__
#define TR_DPBUSD _mm256_dpbusd_avx_epi32
#else // the same instruction in its AVX-512 encoding
#define TR_DPBUSD _mm256_dpbusd_epi32
#endif
INLINE VI dot_bytes(VI acc, VI w, VI x) { return {TR_DPBUSD(acc.a, w.a, x.a), TR_DPBUSD(acc.b, w.b, x.b)}; }
INLINE VI dot_small(VI acc, VI w, VI x) { return dot_bytes(acc, w, x); }
#undef TR_DPBUSD
#else
// Two products of 255 * 127 overflow the 16-bit sums of vpmaddubsw, so bytes are first widened to words, separately
// those at even and odd places. In a loop the compiler does this once for each of w and x.
INLINE __m256i dot_words(__m256i acc, __m256i w, __m256i x) {
  const __m256i even = _mm256_set1_epi16(0xff);
  __m256i e = _mm256_madd_epi16(_mm256_and_si256(w, even), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
  __m256i o = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8));
  return _mm256_add_epi32(acc, _mm256_add_epi32(e, o));
}
INLINE VI dot_bytes(VI acc, VI w, VI x) { return {dot_words(acc.a, w.a, x.a), dot_words(acc.b, w.b, x.b)}; }
INLINE __m256i dot_maddubs(__m256i acc, __m256i w, __m256i x) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
INLINE VI dot_small(VI acc, VI w, VI x) { return {dot_maddubs(acc.a, w.a, x.a), dot_maddubs(acc.b, w.b, x.b)}; }
#endif

INLINE VF dot_pairs(VF acc, VI x, VI y) {
  const VI high = iset1((int)0xffff0000);
  acc = fma(as_float(left<16>(x)), as_float(left<16>(y)), acc);
  return fma(as_float(iand(x, high)), as_float(iand(y, high)), acc);
}
INLINE __m256i high_bf16(__m256 x) { // bfloat16 in the high half, rounded to nearest even; NaN stays NaN
  __m256i i = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(i, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(i, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256 nan = _mm256_or_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(0x400000)));
  __m256 y = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_and_si256(_mm256_castps_si256(y), _mm256_set1_epi32((int)0xffff0000));
}
INLINE VI to_high_bf16(VF x) { return {high_bf16(x.a), high_bf16(x.b)}; }
INLINE VI to_pairs(VF low, VF high) { return ior(right<16>(to_high_bf16(low)), to_high_bf16(high)); }
INLINE VI to_bf16x32(VF first, VF second) {
  return {low_words(right<16>(to_high_bf16(first))), low_words(right<16>(to_high_bf16(second)))};
}
} // namespace

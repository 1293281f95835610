// Functions on sixteen lanes, on top of the simd_*.h that was included before.

namespace {
const float LOG2E = 1.44269504088896340736f;

// 2 ** x, relative error below 4e-7 (minimax polynomial of degree 6 on [-0.5, 0.5]); 0 far below, NaN stays NaN
INLINE VF exp2v(VF x) {
  VF n = round_even(x), f = sub(x, n);
  VF p = set1(1.5403530e-4f);
  p = fma(p, f, set1(1.3333558e-3f));
  p = fma(p, f, set1(9.6181291e-3f));
  p = fma(p, f, set1(5.5504109e-2f));
  p = fma(p, f, set1(2.4022651e-1f));
  p = fma(p, f, set1(6.9314718e-1f));
  p = fma(p, f, set1(1.f));
  return scale2(p, n);
}
// The same with an error below 8e-5 (minimax of degree 3), for results that are then rounded to bfloat16
INLINE VF near_exp2v(VF x) {
  VF n = round_even(x), f = sub(x, n);
  VF p = set1(5.517166907e-2f);
  p = fma(p, f, set1(2.426111222e-1f));
  p = fma(p, f, set1(6.932609855e-1f));
  p = fma(p, f, set1(9.999280735e-1f));
  return scale2(p, n);
}
INLINE VF expv(VF x) { return exp2v(mul(x, set1(LOG2E))); }
// tanh(x) = 1 - 2 / (1 + e ** 2x), with x clamped to the range in which float can distinguish it from 1
INLINE VF tanhv(VF x) {
  x = max(set1(-10.f), min(set1(10.f), x));
  return sub(set1(1.f), div(set1(2.f), add(set1(1.f), expv(add(x, x)))));
}
INLINE VF siluv(VF x) { return div(x, add(set1(1.f), expv(sub(zero(), max(set1(-88.f), x))))); }
INLINE VF gelu_tanhv(VF x) {
  VF inner = mul(set1(0.7978845608f), fma(mul(mul(x, x), x), set1(0.044715f), x));
  return mul(mul(set1(.5f), x), add(set1(1.f), tanhv(inner)));
}
// x / 2 * (1 + erf(x / sqrt 2)); erf by Abramowitz and Stegun 7.1.26, error below 1.5e-7
INLINE VF geluv(VF x) {
  VF y = mul(x, set1(0.70710678f)), a = max(y, sub(zero(), y));
  VF t = div(set1(1.f), fma(set1(0.3275911f), a, set1(1.f)));
  VF p = set1(1.061405429f);
  p = fma(p, t, set1(-1.453152027f));
  p = fma(p, t, set1(1.421413741f));
  p = fma(p, t, set1(-0.284496736f));
  p = fma(p, t, set1(0.254829592f));
  VF e = sub(set1(1.f), mul(mul(p, t), expv(sub(zero(), mul(a, a)))));
  e = pick(at_least(y, zero()), e, sub(zero(), e));
  return mul(mul(set1(.5f), x), add(set1(1.f), e));
}
INLINE VF activate(int act, VF x) {
  switch (act) {
  case TR_ACT_SILU:
    return siluv(x);
  case TR_ACT_GELU:
    return geluv(x);
  case TR_ACT_GELU_TANH:
    return gelu_tanhv(x);
  }
  return x;
}

INLINE float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff, bits;
  if (rest >= 0x7c00)
    bits = 0x7f800000 | (rest & 0x3ff) << 13;
  else if (rest >= 0x400)
    bits = (rest << 13) + 0x38000000;
  else { // 0 and subnormal numbers: the product is exact
    float f = (float)rest * 5.9604644775390625e-8f;
    __builtin_memcpy(&bits, &f, 4);
  }
  bits |= sign;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
INLINE float bf16_to_float(uint16_t h) {
  uint32_t bits = (uint32_t)h << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
INLINE VF load_scales(const void *p, int wide) { return wide ? load((const float *)p) : load_half((const uint16_t *)p); }
INLINE size_t align64(size_t n) { return (n + 63) & ~(size_t)63; }

static bool finite(const float *x, int n) {
  VF differences = zero(); // x - x: 0, or NaN
  float rest = 0;
  int j = 0;
  for (; j + 16 <= n; j += 16)
    differences = add(differences, sub(load(x + j), load(x + j)));
  for (; j < n; j++)
    rest += x[j] - x[j];
  return sum(differences) + rest == 0;
}
} // namespace

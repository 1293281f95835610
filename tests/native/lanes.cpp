// Checks every function of one simd_*.h, and those of math.inl over it, against plain formulas; prints what is wrong.
// HEADER is the header, the argument a seed. Started by test_lanes.py.
#include HEADER
#include "abi.h"
#include "math.inl"
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {
uint64_t state;
uint32_t bits32() { // splitmix64
  uint64_t z = state += 0x9e3779b97f4a7c15ull;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull, z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return (uint32_t)((z ^ z >> 31) >> 16);
}
float number(uint32_t i) {
  float x;
  memcpy(&x, &i, 4);
  return x;
}
uint32_t word(float x) {
  uint32_t i;
  memcpy(&i, &x, 4);
  return i;
}
float between(float a, float b) { return a + (b - a) * (float)(bits32() >> 8) / 16777216.f; }

const float ODD[] = {0.f, -0.f, 1.f, -1.f, .5f, -.5f, 1.5f, 2.5f, -2.5f, 126.5f, -127.5f, 4194303.5f, 8388607.5f,
                     8388609.f, -16777217.f, 2e9f, 1e30f, -1e30f, 3e38f, 1e-40f, -1e-44f, INFINITY, -INFINITY, NAN};
float any() { // anything, with what is odd more often
  const uint32_t i = bits32();
  return i % 4 == 0 ? ODD[i / 4 % (sizeof(ODD) / 4)] : i % 4 == 1 ? number(bits32()) : between(-300, 300);
}

int wrong;
void check(bool fine, const char *what, int lane, double got, double wanted) {
  if (!fine && wrong++ < 20)
    printf("%s, lane %d: %.9g in place of %.9g\n", what, lane, got, wanted);
}
bool same(float a, float b) { return word(a) == word(b) || (a != a && b != b) || (a == 0 && b == 0); }
template <class F> void floats_are(const char *what, VF got, const F &wanted) {
  float x[16];
  store(x, got);
  for (int i = 0; i < 16; i++)
    check(same(x[i], wanted(i)), what, i, x[i], wanted(i));
}
template <class F> void integers_are(const char *what, VI got, const F &wanted) {
  uint32_t x[16];
  istore(x, got);
  for (int i = 0; i < 16; i++)
    check(x[i] == wanted(i), what, i, x[i], wanted(i));
}
// What the lanes i of a value are.
#define ARE(WHAT, GOT, EXPRESSION) floats_are(WHAT, GOT, [&](int i) -> float { return (void)i, EXPRESSION; })
#define IARE(WHAT, GOT, EXPRESSION) integers_are(WHAT, GOT, [&](int i) -> uint32_t { return (void)i, EXPRESSION; })
#define EACH(ARRAY, EXPRESSION)                                                                                        \
  for (int i = 0; i < 16; i++)                                                                                         \
  ARRAY[i] = EXPRESSION

uint32_t brief(float x) { // bfloat16, rounded to nearest even
  const uint32_t i = word(x);
  return x != x ? (i >> 16 | 0x40) : (i + 0x7fff + (i >> 16 & 1)) >> 16;
}
bool tiny(float x) { return x != 0 && fabsf(x) < 1.2e-38f; }
void equal_brief(const char *what, uint32_t got, float x, int lane) {
  const float g = number(got << 16), w = number(brief(x) << 16);
  check(same(g, w) || (tiny(x) && (g == 0 || tiny(g))), what, lane, g, w); // AVX-512 BF16 has no subnormal numbers
}

void floats() {
  float a[16], b[16], c[16], y[16], f[32];
  EACH(a, any());
  EACH(b, any());
  EACH(c, any());
  const VF x = load(a), z = load(b);
  ARE("zero", zero(), 0.f);
  ARE("set1", set1(a[3]), a[3]);
  ARE("add", add(x, z), a[i] + b[i]);
  ARE("sub", sub(x, z), a[i] - b[i]);
  ARE("mul", mul(x, z), a[i] * b[i]);
  ARE("div", div(x, z), a[i] / b[i]);
  ARE("max", max(x, z), a[i] > b[i] ? a[i] : b[i]);
  ARE("min", min(x, z), a[i] < b[i] ? a[i] : b[i]);
  ARE("vsqrt", vsqrt(x), sqrtf(a[i]));
  ARE("round_even", round_even(x), nearbyintf(a[i]));
  store(y, fma(x, z, load(c)));
  for (int i = 0; i < 16; i++) {
    const volatile float product = a[i] * b[i]; // volatile: not made one operation
    check(same(y[i], fmaf(a[i], b[i], c[i])) || same(y[i], product + c[i]), "fma", i, y[i], fmaf(a[i], b[i], c[i]));
  }
  const unsigned mask = bits32() & 0xffff;
  ARE("pick", pick(mask, x, z), mask >> i & 1 ? a[i] : b[i]);
  unsigned wanted = 0;
  for (int i = 0; i < 16; i++)
    wanted |= (unsigned)(a[i] >= b[i]) << i;
  check(at_least(x, z) == wanted, "at_least", -1, at_least(x, z), wanted);
  EACH(a, between(-9, 9));
  double total = 0;
  float most = -INFINITY;
  for (int i = 0; i < 16; i++)
    total += a[i], most = a[i] > most ? a[i] : most;
  check(fabs(sum(load(a)) - total) < 1e-4, "sum", -1, sum(load(a)), total);
  check(top(load(a)) == most, "top", -1, top(load(a)), most);
  for (int i = 0; i < 32; i++)
    f[i] = between(-9, 9);
  ARE("load_two", load_two(f + 1, f + 20), i < 8 ? f[1 + i] : f[12 + i]);
  ARE("swapped 1", swapped<1>(load(a)), a[i ^ 1]);
  ARE("swapped 2", swapped<2>(load(a)), a[i ^ 2]);
  ARE("swapped 4", swapped<4>(load(a)), a[i ^ 4]);
  ARE("swapped 8", swapped<8>(load(a)), a[i ^ 8]);
  ARE("pair_sums", pair_sums(load(f), load(f + 16)), f[2 * i] + f[2 * i + 1]);
  const float n = (float)((int)(bits32() % 801) - 400);
  EACH(a, between(.5f, 2));
  store(y, scale2(load(a), set1(n)));
  for (int i = 0; i < 16; i++) { // 2 ** n may be 0 where it is subnormal, and infinite where that is no float
    const float w = ldexpf(a[i], (int)n);
    check(y[i] == w || (n < -126 && y[i] >= 0 && y[i] <= w) || (n > 127 && y[i] == INFINITY), "scale2", i, y[i], w);
  }
  ARE("scale2", scale2(load(a), set1(-1e30f)), 0.f);
  ARE("scale2", scale2(set1(NAN), set1(n)), NAN);
}

void integers() {
  uint32_t a[16], b[16], y[16], w[16];
  float f[16], g[16];
  EACH(a, bits32());
  EACH(b, bits32());
  const VI x = iload(a), z = iload(b);
  IARE("izero", izero(), 0u);
  IARE("iset1", iset1((int32_t)a[5]), a[5]);
  memcpy(w, (char *)a + 3, 4);
  IARE("iset1_at", iset1_at((char *)a + 3), w[0]);
  uint32_t two[32];
  for (int i = 0; i < 32; i++)
    two[i] = bits32();
  IARE("iload_two", iload_two(two + 1, two + 20), i < 8 ? two[1 + i] : two[12 + i]);
  IARE("iand", iand(x, z), a[i] & b[i]);
  IARE("ior", ior(x, z), a[i] | b[i]);
  IARE("iadd", iadd(x, z), a[i] + b[i]);
  IARE("right", right<5>(x), a[i] >> 5);
  IARE("right", right<24>(x), a[i] >> 24);
  IARE("left", left<16>(x), a[i] << 16);
  IARE("as_float", as_int(as_float(x)), a[i]);
  ARE("to_float", to_float(x), (float)(int32_t)a[i]);
  EACH(f, any());
  EACH(y, !(f[i] >= -2147483648.f && f[i] < 2147483648.f) ? 0x80000000u : (uint32_t)(int32_t)nearbyintf(f[i]));
  IARE("to_int", to_int(load(f)), y[i]);
  int8_t bytes[16];
  EACH(b, i ? a[i] : 0x80000000u);
  store_bytes(bytes, iload(b));
  for (int i = 0; i < 16; i++)
    check(bytes[i] == (int8_t)b[i], "store_bytes", i, bytes[i], (int8_t)b[i]);
  IARE("load_bytes", load_bytes(bytes), (uint32_t)(int32_t)bytes[i]);
  for (int small = 0; small < 2; small++) {
    EACH(a, bits32() % 3 ? bits32() : 0xffffffffu);
    EACH(b, bits32() % 3 ? bits32() : bits32() % 2 ? 0x7f7f7f7fu : 0x81818181u);
    EACH(w, bits32() & 0xffffff);
    if (small)
      EACH(a, a[i] & 0x7f7f7f7fu);
    for (int i = 0; i < 16; i++) {
      int32_t s = (int32_t)w[i];
      for (int k = 0; k < 32; k += 8)
        s += (int32_t)(a[i] >> k & 255) * (int8_t)(b[i] >> k);
      y[i] = (uint32_t)s;
    }
    if (small)
      IARE("dot_small", dot_small(iload(w), iload(a), iload(b)), y[i]);
    else
      IARE("dot_bytes", dot_bytes(iload(w), iload(a), iload(b)), y[i]);
  }
  EACH(f, any());
  EACH(g, any());
  istore(y, to_pairs(load(f), load(g)));
  for (int i = 0; i < 16; i++)
    equal_brief("to_pairs, low", y[i] & 0xffff, f[i], i), equal_brief("to_pairs, high", y[i] >> 16, g[i], i);
  uint16_t brief32[32];
  istore(brief32, to_bf16x32(load(f), load(g)));
  for (int i = 0; i < 32; i++)
    equal_brief("to_bf16x32", brief32[i], i < 16 ? f[i] : g[i - 16], i);
  float acc[16], got[16];
  EACH(acc, between(-9, 9));
  EACH(a, brief(between(-9, 9)) << 16 | brief(between(-9, 9)));
  EACH(b, brief(between(-9, 9)) << 16 | brief(between(-9, 9)));
  store(got, dot_pairs(load(acc), iload(a), iload(b)));
  for (int i = 0; i < 16; i++) {
    const double s = (double)acc[i] + (double)number(a[i] << 16) * number(b[i] << 16) +
                     (double)number(a[i] & 0xffff0000u) * number(b[i] & 0xffff0000u);
    check(fabs(got[i] - s) < 1e-4, "dot_pairs", i, got[i], s);
  }
}

void halves() { // all of them
  for (uint32_t h = 0; h < 0x10000; h += 16) {
    uint16_t in[16];
    float y[16];
    for (uint32_t i = 0; i < 16; i++) {
      const uint32_t at = h + i, e = at >> 10 & 31, m = at & 1023;
      in[i] = (uint16_t)at;
      y[i] = e == 31 ? m ? NAN : INFINITY : e ? ldexpf((float)(1024 + m), (int)e - 25) : ldexpf((float)m, -24);
      y[i] = at & 0x8000 ? -y[i] : y[i];
      check(same(half_to_float(in[i]), y[i]), "half_to_float", (int)at, half_to_float(in[i]), y[i]);
      check(same(bf16_to_float(in[i]), number(at << 16)), "bf16_to_float", (int)at, bf16_to_float(in[i]), y[i]);
    }
    ARE("load_half", load_half(in), y[i]);
  }
}

template <class F, class G>
void near(const char *what, F f, G g, float low, float high, double relative, double absolute) {
  float x[16], y[16];
  EACH(x, between(low, high));
  store(y, f(load(x)));
  for (int i = 0; i < 16; i++) {
    const double w = g((double)x[i]);
    check(fabs(y[i] - w) <= relative * fabs(w) + absolute, what, i, y[i], w);
  }
}

void functions() {
  near("exp2v", [](VF x) { return exp2v(x); }, [](double x) { return exp2(x); }, -126, 127, 4e-7, 0);
  near("exp2v", [](VF x) { return exp2v(x); }, [](double x) { return exp2(x); }, -2, 0, 4e-7, 0);
  near("tanhv", [](VF x) { return tanhv(x); }, [](double x) { return tanh(x); }, -12, 12, 0, 5e-7);
  near("siluv", [](VF x) { return siluv(x); }, [](double x) { return x / (1 + exp(-x)); }, -80, 80, 4e-6, 0);
  near("gelu_tanhv", [](VF x) { return gelu_tanhv(x); },
       [](double x) { return x / 2 * (1 + tanh(sqrt(2 / M_PI) * (x + .044715 * x * x * x))); }, -9, 9, 1e-6, 3e-6);
  near("geluv", [](VF x) { return geluv(x); }, [](double x) { return x / 2 * (1 + erf(x / sqrt(2.))); }, -9, 9, 1e-6, 3e-6);
  ARE("exp2v far below", exp2v(set1(-1e30f)), 0.f);
  ARE("exp2v of 0", exp2v(zero()), 1.f);
  const VF nan = set1(number(bits32() | 0x7fc00000));
  VF all[] = {exp2v(nan), expv(nan), tanhv(nan), siluv(nan), gelu_tanhv(nan), geluv(nan)};
  for (VF x : all)
    ARE("a function of NaN", x, NAN);
}
} // namespace

int main(int, char **arguments) {
  state = strtoull(arguments[1], nullptr, 10);
  halves();
  for (int i = 0; i < 2000; i++)
    floats(), integers(), functions();
  printf(wrong ? "%d are wrong\n" : "all is well\n", wrong);
  return wrong > 0;
}

// What two kinds of product and one reading of memory reach on this machine, with nothing else to do: the yardsticks of
// cpu_profile.py. Products are those of AMX tiles, where this process may use them, else of registers. Prints one JSON
// object: operations or bytes per second of so many threads together.
//
//     g++ -O2 -pthread cpu_peaks.cpp -o cpu_peaks && ./cpu_peaks THREADS
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <immintrin.h>
#include <sys/syscall.h>
#include <thread>
#include <unistd.h>
#include <vector>

static double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Twelve independent sums: more than the latency of any of these instructions.
#define SUMS(ins)                                                                                                        \
  ins " %%zmm30, %%zmm31, %%zmm0\n" ins " %%zmm30, %%zmm31, %%zmm1\n" ins " %%zmm30, %%zmm31, %%zmm2\n" ins              \
      " %%zmm30, %%zmm31, %%zmm3\n" ins " %%zmm30, %%zmm31, %%zmm4\n" ins " %%zmm30, %%zmm31, %%zmm5\n" ins              \
      " %%zmm30, %%zmm31, %%zmm6\n" ins " %%zmm30, %%zmm31, %%zmm7\n" ins " %%zmm30, %%zmm31, %%zmm8\n" ins              \
      " %%zmm30, %%zmm31, %%zmm9\n" ins " %%zmm30, %%zmm31, %%zmm10\n" ins " %%zmm30, %%zmm31, %%zmm11\n"
#define LOOP(ins)                                                                                                        \
  asm volatile("1:\n" SUMS(ins) "dec %0\n jnz 1b\n"                                                                      \
               : "+r"(n)                                                                                                 \
               :                                                                                                         \
               : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11")

static const long TURNS = 20000000;
static void integers() {
  long n = TURNS;
  LOOP("vpdpbusd");
}
static void bfloat16s() {
  long n = TURNS;
  LOOP("vdpbf16ps");
}

// Products of tiles of sixteen rows of 64 bytes, with four independent sums. Tiles of zeros would be faster than others:
// the processor lowers its frequency for work.
#define TILES(ins)                                                                                                       \
  asm volatile("ldtilecfg %1\n tileloadd (%2,%3,1), %%tmm4\n tileloadd (%2,%3,1), %%tmm5\n 1:\n" ins                     \
               " %%tmm5, %%tmm4, %%tmm0\n" ins " %%tmm5, %%tmm4, %%tmm1\n" ins " %%tmm5, %%tmm4, %%tmm2\n" ins           \
               " %%tmm5, %%tmm4, %%tmm3\n dec %0\n jnz 1b\n tilerelease"                                                 \
               : "+r"(n)                                                                                                 \
               : "m"(shapes), "r"(numbers), "r"((long)64)                                                                \
               : "cc", "memory")
static const long TILE_TURNS = 2000000;
static bool may_use_tiles() {
  unsigned a = 7, b, c = 0, d;
  asm("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return (d >> 22 & 7) == 7 && !syscall(SYS_arch_prctl, 0x1023, 18); // BF16, TILE, INT8; permission for their registers
}
static void tiles(bool bytes) {
  long n = TILE_TURNS;
  struct {
    uint8_t palette = 1, start = 0, unused[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
  } shapes;
  alignas(64) uint16_t numbers[512];
  for (int i = 0; i < 512; i++)
    numbers[i] = (uint16_t)(0x3c00 + i * 40503 % 0x300 + (i * 2654435761u >> 31 << 15)); // between .008 and 2 in size
  if (bytes)
    TILES("tdpbssd");
  else
    TILES("tdpbf16ps");
}

template <class F> static double seconds(int threads, F f) { // the best of three
  double best = 1e9;
  for (int turn = 0; turn < 3; turn++) {
    std::vector<std::thread> all;
    const double start = now();
    for (int t = 0; t < threads; t++)
      all.emplace_back(f, t);
    for (std::thread &t : all)
      t.join();
    const double took = now() - start;
    best = took < best ? took : best;
  }
  return best;
}

int main(int count, char **words) {
  const int threads = count > 1 ? atoi(words[1]) : 1;
  printf("{");
  const double products = 4.0 * TILE_TURNS * 16 * 16 * threads; // of words
  if (may_use_tiles())
    printf("\"int8\": %.4g, \"bf16\": %.4g, ", products * 128 / seconds(threads, [](int) { tiles(true); }),
           products * 64 / seconds(threads, [](int) { tiles(false); }));
  else if (__builtin_cpu_supports("avx512vnni")) // 64 products and as many sums an instruction
    printf("\"int8\": %.4g, ", 12.0 * TURNS * 128 * threads / seconds(threads, [](int) { integers(); }));
  if (!may_use_tiles() && __builtin_cpu_supports("avx512bf16"))
    printf("\"bf16\": %.4g, ", 12.0 * TURNS * 64 * threads / seconds(threads, [](int) { bfloat16s(); }));
  const size_t each = (size_t)1 << 26; // words of 8 bytes: 512 MB, more than any cache
  std::vector<uint64_t> memory(each, 1);
  volatile uint64_t sink = 0;
  const double took = seconds(threads, [&](int t) {
    uint64_t a = 0, b = 0, c = 0, d = 0;
    for (size_t i = each / threads * t; i + 4 <= each / threads * (t + 1); i += 4)
      a += memory[i], b += memory[i + 1], c += memory[i + 2], d += memory[i + 3];
    sink = sink + a + b + c + d;
  });
  printf("\"memory\": %.4g}\n", 8.0 * (double)each / took);
}

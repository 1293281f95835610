// The library's code for AVX-512 with VNNI and BF16.
#define TRANSOM_BF16
#include "simd_avx512.h"

#define LEVEL level_avx512_bf16
#define LEVEL_NAME "avx512_bf16"
#include "level.inl"

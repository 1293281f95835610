// The library's code for AVX2 with FMA and F16C.
#include "simd_avx2.h"

#define LEVEL level_avx2
#define LEVEL_NAME "avx2"
#include "level.inl"

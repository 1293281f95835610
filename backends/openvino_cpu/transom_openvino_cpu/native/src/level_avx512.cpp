// The library's code for AVX-512 with VNNI.
#include "simd_avx512.h"

#define LEVEL level_avx512
#define LEVEL_NAME "avx512"
#include "level.inl"

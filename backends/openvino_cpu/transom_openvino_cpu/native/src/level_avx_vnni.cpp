// The library's code for AVX2 with FMA, F16C and AVX-VNNI: integer products as AVX-512 has them.
#define TRANSOM_AVX_VNNI
#include "simd_avx2.h"

#define LEVEL level_avx_vnni
#define LEVEL_NAME "avx_vnni"
#include "level.inl"

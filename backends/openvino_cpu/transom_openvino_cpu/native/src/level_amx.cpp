// The library's code for AVX-512 with VNNI and BF16, and AMX with tiles of bytes and of bfloat16.
#define TRANSOM_BF16
#define TRANSOM_AMX
#include "simd_avx512.h"

#define LEVEL level_amx
#define LEVEL_NAME "amx"
#include "level.inl"

// The library's code for every processor.
#include "simd_scalar.h"

#define LEVEL level_scalar
#define LEVEL_NAME "scalar"
#include "level.inl"

// The table of kernels for one instruction set: compiled once for each, with KERNELS_… saying which (setup.py).

#include "attention.h"
#include "common.h"
#include "products.h"
#include "rows.h"

#if defined(KERNELS_AVX512)
extern const Kernels kernels_avx512 = {"avx512", linears, linear_sum, attend, layer_norm, best};
#elif defined(KERNELS_AVX2)
extern const Kernels kernels_avx2 = {"avx2", linears, linear_sum, attend, layer_norm, best};
#elif defined(KERNELS_NEON)
extern const Kernels kernels_neon = {"neon", linears, linear_sum, attend, layer_norm, best};
#endif

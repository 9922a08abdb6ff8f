// The tables of kernels for one instruction set: compiled once for each, with KERNELS_… saying which (setup.py).

#include "attention.h"
#include "common.h"
#include "linears.h"
#include "rows.h"
#include "screened.h"

namespace {

template <Extra E>
constexpr Kernels table(const char* name) {
  return {name, linears<E>, screened<E>, linear_sum<E>, attend, layer_norm, best, candidates};
}

}  // namespace

#if defined(KERNELS_AVX512)
extern const Kernels kernels_avx512 = table<Extra::NONE>("avx512");
extern const Kernels kernels_avx512_vnni = table<Extra::VNNI>("avx512_vnni");
extern const Kernels kernels_avx512_bf16 = table<Extra::BF16>("avx512_bf16");
extern const Kernels kernels_avx512_amx = table<Extra::AMX>("avx512_amx");
#elif defined(KERNELS_AVX2)
extern const Kernels kernels_avx2 = table<Extra::NONE>("avx2");
#elif defined(KERNELS_NEON)
extern const Kernels kernels_neon = table<Extra::NONE>("neon");
#endif

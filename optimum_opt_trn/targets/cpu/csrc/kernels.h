// The kernels as a table of C functions, one table for each instruction set that the package was built for.
//
// Matrices are row-major. `dtype` is that of weights, biases and caches; all else is float32. INT8 is for weights only:
// their outputs are multiplied with a scale each, and their biases are float32. Nothing is checked: the callers in
// kernels.py do that. Every function returns 0, or a handle for `pool_left`, or NO_MEMORY.
#pragma once

#include <cstdint>

enum Dtype { FLOAT32, FLOAT16, BFLOAT16, INT8 };

// By unit, so many rows at most are multiplied at a time with the weights as they are.
constexpr int64_t MOST_UNIT_ROWS = 8;
// linears takes at most so many rows through a layernorm: the calling thread does that.
constexpr int64_t MOST_NORMED_ROWS = 48;
// With more rows, copies in int8 save no time.
constexpr int64_t MOST_SCREENED_ROWS = 4;

constexpr uint64_t NO_MEMORY = ~uint64_t{0};

// y (m, n) = scale * (x @ w.T) + bias; w (n, k), rows ldw apart; scale and bias (n,) or null. bfloat16 weights may be
// there a second time, coded (coded_format.h).
struct Output {
  const void* w;
  int64_t n, ldw;
  const float* scale;
  const void* bias;
  float* y;
  const void* coded;
};

// w (n, k) in int8, rows ldw apart, times scale (n,). A product with it is off by at most error (n,) times the length of a
// row of x.
struct Copy {
  const void* w;
  int64_t ldw;
  const float *scale, *error;
};

// A summand x @ w.T: x (m, k), w (n, k), rows ldw apart; or, by unit, w (k, n), rows ldw apart, and x @ w. bfloat16
// weights may be there a second time, coded, by output or by unit whatever w is.
struct Input {
  const float* x;
  const void* w;
  int64_t k, ldw;
  const void* coded;
};

// weight and bias (n,), or null.
struct Norm {
  const float *weight, *bias;
  float eps;
};

struct Kernels {
  const char* name;
  // x (m, k), through a layernorm unless `norm` is null; negative results become 0 with `relu`. With `bfloat16`, factors
  // may be rounded to it where that is faster. From `least_integers` rows on, int8 weights by output may be multiplied
  // with integers.
  uint64_t (*linears)(int threads, Dtype dtype, bool bfloat16, int64_t least_integers, int64_t m, int64_t k,
                      const float* x, const Norm* norm, bool relu, int64_t count, const Output* outputs);
  // The same results with relu, of at most MOST_SCREENED_ROWS rows, for floating-point weights that have copies in int8:
  // these are read first, and then the weights of those outputs that they do not show to be 0. If that is most of them,
  // `without` becomes the number of calls to come that read no copies.
  uint64_t (*screened)(int threads, Dtype dtype, bool bfloat16, int64_t least_integers, int64_t m, int64_t k,
                       const float* x, const Norm* norm, int64_t* without, int64_t count, const Output* outputs,
                       const Copy* copies);
  // y (m, n) = scale (n,) * the sum of the inputs + bias (n,) + residual (m, n); the three may be null. By unit, with
  // `skip`, units that are 0 in all rows are not read. Coded weights are by unit if `coded_by_unit`.
  uint64_t (*linear_sum)(int threads, Dtype dtype, bool bfloat16, int64_t least_integers, int64_t m, int64_t n,
                         bool by_unit, bool coded_by_unit, bool skip, const float* scale, const void* bias,
                         const float* residual, float* y, int64_t count, const Input* inputs);
  // query, key, value, y: (tokens, heads * d); keys, values: (slots, heads, length, d), whose strides are the same;
  // slots, positions: (tokens,), within the cache, the tokens of a slot adjacent.
  uint64_t (*attend)(int threads, Dtype dtype, int64_t tokens, int64_t heads, int64_t d, const float* query,
                     const float* key, const float* value, void* keys, void* values, const int64_t* strides,
                     const int64_t* slots, const int64_t* positions, float scale, float* y);
  uint64_t (*layer_norm)(int threads, int64_t m, int64_t n, const float* x, const Norm* norm, float* y);
  // The k highest of each row of x (m, n), rows ldx apart, and where they are, ascending where values tie. Places in
  // `masked` (m, masks), which may be -1, count as `mask`. NaN is the highest.
  uint64_t (*best)(int threads, int64_t m, int64_t n, int64_t ldx, const float* x, int64_t masks, const int32_t* masked,
                   float mask, int64_t k, float* values, int32_t* places);
  // Where the highest of each row of x (m, n) may be, if each value is off by at most its of `errors` (n,) times the
  // row's of `factors` (m,): ascending, to places (m, most); how many there are, which can be more, to counts (m,).
  uint64_t (*candidates)(int threads, int64_t m, int64_t n, const float* x, const float* errors, const float* factors,
                         int64_t most, int32_t* counts, int32_t* places);
};

// What kernels may use beyond the vectors of their instruction set; each includes those before it.
enum class Extra { NONE, VNNI, BF16, AMX };

#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512_vnni, kernels_avx512_bf16, kernels_avx512_amx;
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
#endif

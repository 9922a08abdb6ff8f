// What a decoding step reads most: 16-bit weights and caches, each byte once, multiplied in float32.
//
// Compiled for the host it runs on, with ATen's portable vectors (AVX-512, AVX2, NEON, or plain C++). Weights stay as
// they are in the checkpoint, row-major `[out, in]`, straight from a memory map; a tensor-parallel shard of one is a
// view of it.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/layer_norm.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using Vec = at::vec::Vectorized<float>;
constexpr int64_t LANES = Vec::size();

// The inner loops hold their sums in registers: 32 of them with AVX-512 and on NEON, 16 with AVX2.
#if defined(CPU_CAPABILITY_AVX2)
constexpr int64_t FEW_ROWS = 2, GEMM_ROWS = 4, GEMM_VECTORS = 2;
#else
constexpr int64_t FEW_ROWS = 8, GEMM_ROWS = 8, GEMM_VECTORS = 3;
#endif

// Weight rows that M rows of x are multiplied with at once, each a stream of its own from memory (measured).
constexpr int streams(int m) { return FEW_ROWS > 2 && (m == 3 || m == 4) ? 8 : 4; }
// Outputs that a thread takes at once: enough to amortise the call, few enough to share evenly.
constexpr int64_t OUTPUTS = 16;
// Up to so many rows of x weights are converted again for every FEW_ROWS of them; with more it pays to convert and
// transpose a panel of weights first (measured by benchmarks/linear_cpu.py).
constexpr int64_t MOST_FEW_ROWS = 48;
// A panel has PANEL outputs, converted for DEPTH inputs; a thread's PANELS of them fit its second-level cache.
constexpr int64_t PANEL = GEMM_VECTORS * LANES, DEPTH = 1024, PANELS = 4;

template <typename T>
inline Vec load(const T* from) {
  Vec to;
  at::vec::load_to_float<T>(from, to);
  return to;
}

template <>
inline Vec load<float>(const float* from) {
  return Vec::loadu(from);
}

inline float sum(const Vec& v) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, v);
}

// y = relu(sums + bias) + residual, each of the three where it is asked for.
template <typename T>
struct Output {
  const T* bias;
  bool relu;
  const float* residual;
  float* y;
  int64_t n;

  void operator()(int64_t row, int64_t column, float value) const {
    if (bias != nullptr) value += static_cast<float>(bias[column]);
    if (relu) value = std::max(value, 0.0f);
    if (residual != nullptr) value += residual[row * n + column];
    y[row * n + column] = value;
  }
};

// x (m, k), contiguous, times w (n, k), rows ldw apart.
template <typename T>
struct Part {
  const float* x;
  const T* w;
  int64_t k, ldw;
};

// The sum of its parts: one, or one of each tensor-parallel rank.
template <typename T>
struct Product {
  std::vector<Part<T>> parts;
  int64_t m, n;
  Output<T> output;
};

// The products of R weight rows with M rows of x. The lanes run along k, so that weights are used as they lie.
template <int R, int M, typename T>
inline void dot(const Product<T>& p, int64_t row, int64_t column) {
  Vec sums[R][M];
  float rests[R][M] = {};  // of inputs that fill no vector
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) sums[r][m] = Vec(0.0f);
  for (const Part<T>& part : p.parts) {
    const int64_t k = part.k, ldw = part.ldw;
    const float* x = part.x + row * k;
    const T* w = part.w + column * ldw;
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) {
      Vec weights[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        weights[r] = ::load(w + r * ldw + i);
        // Hardware does not follow a stream into the next page, and a row is a page or two: ask for the next R rows.
        __builtin_prefetch(w + (r + R) * ldw + i, 0, 1);
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const Vec xs = Vec::loadu(x + m * k + i);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) sums[r][m] = at::vec::fmadd(weights[r], xs, sums[r][m]);
      }
    }
    for (; i < k; i++)
      for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) rests[r][m] += static_cast<float>(w[r * ldw + i]) * x[m * k + i];
  }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) p.output(row + m, column + r, sum(sums[r][m]) + rests[r][m]);
}

template <int M, typename T>
void dots(const Product<T>& p, int64_t row, int64_t begin, int64_t end) {
  int64_t column = begin;
  for (; column + streams(M) <= end; column += streams(M)) dot<streams(M), M>(p, row, column);
  for (; column < end; column++) dot<1, M>(p, row, column);
}

// dots<M> for an M that is known when running.
template <int M, typename T>
void dots_of(int64_t rows, const Product<T>& p, int64_t row, int64_t begin, int64_t end) {
  if constexpr (M > 1) {
    if (rows < M) return dots_of<M - 1>(rows, p, row, begin, end);
  }
  dots<M>(p, row, begin, end);
}

// Several products in one go: threads that wait for one another once, not after each, lose less time.
template <typename T>
void few_rows(const std::vector<Product<T>>& products) {
  std::vector<std::pair<const Product<T>*, int64_t>> tasks;
  for (const Product<T>& p : products)
    for (int64_t begin = 0; begin < p.n; begin += OUTPUTS) tasks.emplace_back(&p, begin);
  at::parallel_for(0, tasks.size(), 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; task++) {
      const auto& [p, begin] = tasks[task];
      for (int64_t row = 0; row < p->m; row += FEW_ROWS)
        dots_of<FEW_ROWS>(std::min(FEW_ROWS, p->m - row), *p, row, begin, std::min(p->n, begin + OUTPUTS));
    }
  });
}

// Weights [column, column + PANEL) x [begin, begin + depth) as float32 (depth, PANEL), zeros beyond the last column.
template <typename T>
void pack(const Part<T>& part, int64_t n, int64_t column, int64_t begin, int64_t depth, float* panel) {
  alignas(64) float block[LANES * LANES];
  for (int64_t c = 0; c < PANEL; c += LANES)
    for (int64_t i = 0; i < depth; i += LANES) {
      const int64_t width = std::min(LANES, depth - i);
      for (int64_t r = 0; r < LANES; r++) {
        const T* from = part.w + (column + c + r) * part.ldw + begin + i;
        float* to = block + r * LANES;
        if (column + c + r >= n)
          std::fill_n(to, LANES, 0.0f);
        else if (width == LANES)
          ::load(from).store(to);
        else
          std::transform(from, from + width, to, [](T value) { return static_cast<float>(value); });
      }
      at::vec::transpose_mxn<float>(block, LANES, panel + i * PANEL + c, PANEL, LANES, width);
    }
}

// M rows of x times a panel. The lanes run along the outputs; sums is (M, PANEL).
template <int M>
inline void multiply(const float* x, int64_t ldx, const float* panel, int64_t depth, float* sums) {
  Vec totals[M][GEMM_VECTORS];
  for (int m = 0; m < M; m++)
    for (int v = 0; v < GEMM_VECTORS; v++) totals[m][v] = Vec(0.0f);
  for (int64_t i = 0; i < depth; i++) {
    Vec weights[GEMM_VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < GEMM_VECTORS; v++) weights[v] = Vec::loadu(panel + i * PANEL + v * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const Vec xs(x[m * ldx + i]);
#pragma GCC unroll 8
      for (int v = 0; v < GEMM_VECTORS; v++) totals[m][v] = at::vec::fmadd(xs, weights[v], totals[m][v]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < GEMM_VECTORS; v++) totals[m][v].store(sums + m * PANEL + v * LANES);
}

template <int M>
void multiply_of(int64_t rows, const float* x, int64_t ldx, const float* panel, int64_t depth, float* sums) {
  if constexpr (M > 1) {
    if (rows < M) return multiply_of<M - 1>(rows, x, ldx, panel, depth, sums);
  }
  multiply<M>(x, ldx, panel, depth, sums);
}

// As in a GEMM after Goto and van de Geijn (2008), but that only the weights are packed, while they are converted.
template <typename T>
void many_rows(const Product<T>& p) {
  at::parallel_for(0, (p.n + PANEL - 1) / PANEL, 1, [&](int64_t first, int64_t last) {
    const std::unique_ptr<float, decltype(&std::free)> panels(
        static_cast<float*>(std::aligned_alloc(64, PANELS * DEPTH * PANEL * sizeof(float))), &std::free);
    TORCH_CHECK(panels != nullptr, "no memory for a panel of weights");
    alignas(64) float sums[GEMM_ROWS * PANEL];
    for (int64_t group = first; group < last; group += PANELS) {
      const int64_t count = std::min(PANELS, last - group);
      for (const Part<T>& part : p.parts)
        for (int64_t begin = 0; begin < part.k; begin += DEPTH) {
          const int64_t depth = std::min(DEPTH, part.k - begin);
          const bool starts = &part == &p.parts.front() && begin == 0;
          const bool ends = &part == &p.parts.back() && begin + depth == part.k;
          for (int64_t i = 0; i < count; i++)
            pack(part, p.n, (group + i) * PANEL, begin, depth, panels.get() + i * DEPTH * PANEL);
          for (int64_t row = 0; row < p.m; row += GEMM_ROWS) {
            const int64_t rows = std::min(GEMM_ROWS, p.m - row);
            for (int64_t i = 0; i < count; i++) {
              const float* panel = panels.get() + i * DEPTH * PANEL;
              multiply_of<GEMM_ROWS>(rows, part.x + row * part.k + begin, part.k, panel, depth, sums);
              const int64_t column = (group + i) * PANEL, columns = std::min(PANEL, p.n - column);
              for (int64_t r = 0; r < rows; r++)
                for (int64_t c = 0; c < columns; c++) {
                  const float value = sums[r * PANEL + c];
                  float* y = p.output.y + (row + r) * p.n + column + c;
                  const float total = starts ? value : *y + value;
                  if (ends)
                    p.output(row + r, column + c, total);
                  else
                    *y = total;
                }
            }
          }
        }
    }
  });
}

void check_dtype(const char* name, at::ScalarType dtype) {
  TORCH_CHECK(dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat, name, " is ", dtype,
              ", not float16, bfloat16 or float32");
}

// Calls `run` with a null pointer of the C++ type of `dtype`.
template <typename F>
void with_dtype(at::ScalarType dtype, F&& run) {
  if (dtype == at::kHalf)
    run(static_cast<at::Half*>(nullptr));
  else if (dtype == at::kBFloat16)
    run(static_cast<at::BFloat16*>(nullptr));
  else
    run(static_cast<float*>(nullptr));
}

template <typename T>
Part<T> part_of(const Tensor& x, const Tensor& weight) {
  return {x.const_data_ptr<float>(), weight.const_data_ptr<T>(), weight.size(1), weight.stride(0)};
}

template <typename T>
void multiply_all(const std::vector<Product<T>>& products) {
  if (products[0].m <= MOST_FEW_ROWS)
    few_rows(products);
  else
    for (const Product<T>& product : products) many_rows(product);
}

// x float32 (..., k) and weight (n, k) of `dtype` fit each other -> the shape of their product
std::vector<int64_t> check_factors(const Tensor& x, const Tensor& weight, at::ScalarType dtype) {
  check_dtype("weight", dtype);
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous() && x.dim() > 0, "x is not contiguous float32 (..., k)");
  TORCH_CHECK(weight.dim() == 2 && weight.stride(1) == 1 && weight.size(1) == x.size(-1) && weight.scalar_type() == dtype,
              "weight is not a matrix of contiguous rows of ", x.size(-1), ", ", dtype);
  auto shape = x.sizes().vec();
  shape.back() = weight.size(0);
  return shape;
}

void check_bias(const Tensor& bias, at::ScalarType dtype, int64_t n) {
  TORCH_CHECK(bias.scalar_type() == dtype && bias.is_contiguous() && bias.numel() == n, "bias is not contiguous ", dtype,
              " (", n, ")");
}

// For each of the weights (n, k), with x float32 (..., k): relu(x @ weight.T + bias), float32 (..., n). Weights and
// biases (n,), of which there may be none, have one dtype. With `eps`, x goes through a layernorm before.
std::vector<Tensor> linears(const Tensor& given, at::TensorList weights, at::TensorList biases, bool relu,
                            std::optional<double> eps, const std::optional<Tensor>& norm_weight,
                            const std::optional<Tensor>& norm_bias) {
  TORCH_CHECK(!weights.empty() && (biases.empty() || biases.size() == weights.size()), weights.size(), " weights and ",
              biases.size(), " biases");
  const Tensor x = eps ? at::layer_norm(given, {given.size(-1)}, norm_weight, norm_bias, *eps) : given;
  const at::ScalarType dtype = weights[0].scalar_type();
  std::vector<Tensor> results;
  for (size_t i = 0; i < weights.size(); i++) {
    results.push_back(at::empty(check_factors(x, weights[i], dtype), x.options()));
    if (!biases.empty()) check_bias(biases[i], dtype, weights[i].size(0));
  }
  with_dtype(dtype, [&]<typename T>(T*) {
    std::vector<Product<T>> products;
    for (size_t i = 0; i < weights.size(); i++) {
      const int64_t n = weights[i].size(0), m = n == 0 ? 0 : results[i].numel() / n;
      const Output<T> output{biases.empty() ? nullptr : biases[i].const_data_ptr<T>(), relu, nullptr,
                             results[i].mutable_data_ptr<float>(), n};
      products.push_back({{part_of<T>(x, weights[i])}, m, n, output});
    }
    multiply_all(products);
  });
  return results;
}

// The sum of x @ weight.T over xs float32 (..., k) and weights (n, k), whose k may differ, + bias (n,) + residual
// float32 (..., n) -> float32 (..., n). Weights and bias have one dtype.
Tensor linear_sum(at::TensorList xs, at::TensorList weights, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& residual) {
  TORCH_CHECK(!weights.empty() && xs.size() == weights.size(), xs.size(), " xs and ", weights.size(), " weights");
  const at::ScalarType dtype = weights[0].scalar_type();
  const auto shape = check_factors(xs[0], weights[0], dtype);
  for (size_t i = 1; i < weights.size(); i++)
    TORCH_CHECK(check_factors(xs[i], weights[i], dtype) == shape, "the parts of a sum are not all ", shape);
  const int64_t n = shape.back();
  if (bias) check_bias(*bias, dtype, n);
  if (residual)
    TORCH_CHECK(residual->scalar_type() == at::kFloat && residual->is_contiguous() && residual->sizes() == shape,
                "residual is not contiguous float32 ", shape);
  Tensor y = at::empty(shape, xs[0].options());
  with_dtype(dtype, [&]<typename T>(T*) {
    const Output<T> output{bias ? bias->const_data_ptr<T>() : nullptr, false,
                           residual ? residual->const_data_ptr<float>() : nullptr, y.mutable_data_ptr<float>(), n};
    Product<T> product{{}, n == 0 ? 0 : y.numel() / n, n, output};
    for (size_t i = 0; i < weights.size(); i++) product.parts.push_back(part_of<T>(xs[i], weights[i]));
    multiply_all<T>({product});
  });
  return y;
}

// sums[0, N * LANES) += weights (count,) times values (count, >= N * LANES), rows ldv apart
template <int N, typename C>
inline void mix(const float* weights, const C* values, int64_t ldv, int64_t count, float* sums) {
  Vec totals[N];
  for (int v = 0; v < N; v++) totals[v] = Vec::loadu(sums + v * LANES);
  for (int64_t j = 0; j < count; j++) {
    const Vec weight(weights[j]);
    const C* row = values + j * ldv;
#pragma GCC unroll 4
    for (int v = 0; v < N; v++) totals[v] = at::vec::fmadd(weight, ::load(row + v * LANES), totals[v]);
  }
  for (int v = 0; v < N; v++) totals[v].store(sums + v * LANES);
}

// One head's query (d,) over the first `count` of its keys and values (count, d), rows ldc apart.
template <typename C>
void attend_head(const float* query, float scale, const C* keys, const C* values, int64_t ldc, int64_t count, int64_t d,
                 float* scores, float* mixed) {
  float highest = -std::numeric_limits<float>::infinity();
  for (int64_t j = 0; j < count; j++) {
    const C* key = keys + j * ldc;
    Vec sums(0.0f);
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) {
      sums = at::vec::fmadd(Vec::loadu(query + i), ::load(key + i), sums);
      __builtin_prefetch(key + i + 16 * ldc, 0, 2);
      __builtin_prefetch(values + j * ldc + i, 0, 3);
    }
    float score = sum(sums);
    for (; i < d; i++) score += query[i] * static_cast<float>(key[i]);
    scores[j] = score * scale;
    highest = std::max(highest, scores[j]);
  }
  float total = 0.0f;
  int64_t j = 0;
  for (; j + LANES <= count; j += LANES) {
    const Vec weights = (Vec::loadu(scores + j) - Vec(highest)).exp();
    weights.store(scores + j);
    total += sum(weights);
  }
  for (; j < count; j++) total += scores[j] = std::exp(scores[j] - highest);
  const float share = 1.0f / total;
  for (j = 0; j < count; j++) scores[j] *= share;
  std::fill_n(mixed, d, 0.0f);
  int64_t i = 0;
  for (; i + 4 * LANES <= d; i += 4 * LANES) mix<4>(scores, values + i, ldc, count, mixed + i);
  for (; i + LANES <= d; i += LANES) mix<1>(scores, values + i, ldc, count, mixed + i);
  for (; i < d; i++)
    for (j = 0; j < count; j++) mixed[i] += scores[j] * static_cast<float>(values[j * ldc + i]);
}

// Writes each token's key and value to its place in the cache, and attends to what its slot holds up to there.
//
// query, key, value: float32 (tokens, heads * d); keys, values: (slots, heads, c, d), of which c may be strided;
// slots, positions: int64 (tokens,), the tokens of a slot adjacent. Returns float32 (tokens, heads * d).
Tensor attend(const Tensor& query, const Tensor& key, const Tensor& value, Tensor& keys, Tensor& values,
              const Tensor& slots, const Tensor& positions, double scale) {
  check_dtype("the cache", keys.scalar_type());
  TORCH_CHECK(keys.dim() == 4 && keys.stride(3) == 1 && keys.sizes() == values.sizes() &&
                  keys.strides() == values.strides() && keys.scalar_type() == values.scalar_type(),
              "keys and values are not alike, or not (slots, heads, c, d) with contiguous rows");
  const int64_t tokens = query.size(0), heads = keys.size(1), length = keys.size(2), d = keys.size(3);
  for (const Tensor& x : {query, key, value})
    TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous() && x.dim() == 2 && x.size(0) == tokens &&
                    x.size(1) == heads * d,
                "query, key and value are not contiguous float32 (", tokens, ", ", heads * d, ")");
  for (const Tensor& x : {slots, positions})
    TORCH_CHECK(x.scalar_type() == at::kLong && x.is_contiguous() && x.numel() == tokens,
                "slots and positions are not contiguous int64 (", tokens, ",)");
  const int64_t *slot = slots.const_data_ptr<int64_t>(), *position = positions.const_data_ptr<int64_t>();
  std::vector<int64_t> runs;  // where each slot's tokens begin
  for (int64_t t = 0; t < tokens; t++) {
    TORCH_CHECK(0 <= slot[t] && slot[t] < keys.size(0) && 0 <= position[t] && position[t] < length, "token ", t,
                " is at slot ", slot[t], ", position ", position[t], ", outside the cache");
    if (t == 0 || slot[t] != slot[t - 1]) runs.push_back(t);
  }
  const int64_t count = runs.size();
  runs.push_back(tokens);
  Tensor mixed = at::empty_like(query);
  with_dtype(keys.scalar_type(), [&]<typename C>(C*) {
    const float *q = query.const_data_ptr<float>(), *k = key.const_data_ptr<float>(),
                *v = value.const_data_ptr<float>();
    C *all_keys = keys.mutable_data_ptr<C>(), *all_values = values.mutable_data_ptr<C>();
    float* out = mixed.mutable_data_ptr<float>();
    const int64_t by_slot = keys.stride(0), by_head = keys.stride(1), by_place = keys.stride(2);
    at::parallel_for(0, count * heads, 1, [&](int64_t first, int64_t last) {
      std::vector<float> scores(length);
      for (int64_t task = first; task < last; task++) {
        const int64_t begin = runs[task / heads], end = runs[task / heads + 1], head = task % heads;
        const int64_t cached = slot[begin] * by_slot + head * by_head;
        for (int64_t t = begin; t < end; t++)
          for (int64_t i = 0; i < d; i++) {
            const int64_t from = (t * heads + head) * d + i, to = cached + position[t] * by_place + i;
            all_keys[to] = static_cast<C>(k[from]);
            all_values[to] = static_cast<C>(v[from]);
          }
        for (int64_t t = begin; t < end; t++) {
          const int64_t at = (t * heads + head) * d;
          attend_head(q + at, static_cast<float>(scale), all_keys + cached, all_values + cached, by_place,
                      position[t] + 1, d, scores.data(), out + at);
        }
      }
    });
  });
  return mixed;
}

}  // namespace

TORCH_LIBRARY(optimum_opt_trn, library) {
  library.def(
      "linears(Tensor x, Tensor[] weights, Tensor[] biases, bool relu, float? eps, Tensor? norm_weight, "
      "Tensor? norm_bias) -> Tensor[]");
  library.def("linear_sum(Tensor[] xs, Tensor[] weights, Tensor? bias, Tensor? residual) -> Tensor");
  library.def(
      "attend(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor slots, "
      "Tensor positions, float scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(optimum_opt_trn, CPU, library) {
  library.impl("linears", linears);
  library.impl("linear_sum", linear_sum);
  library.impl("attend", attend);
}

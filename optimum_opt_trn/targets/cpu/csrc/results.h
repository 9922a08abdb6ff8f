// What becomes of the sums of a product.
#pragma once

#include "common.h"

namespace {

// y (m, n) = scale (n,) * sums + bias (n,), without what is negative if `relu`, + residual (m, n). The three may be null.
struct Results {
  int64_t n;
  const float* scale;
  const void* bias;
  const float* residual;
  bool relu;
  float* y;
};

// `count` results of a row, from `column` on; T is the dtype of the weights.
template <typename T>
inline void finish(const Results& results, int64_t row, int64_t column, int64_t count, const float* sums) {
  const auto* bias = static_cast<const typename BiasOf<T>::Type*>(results.bias);
  const int64_t begin = row * results.n + column;
  for (int64_t c = 0; c < count; c += LANES) {
    const int64_t width = lesser(LANES, count - c);
    Vec value = load(sums + c, width);
    if (results.scale != nullptr) value = value * load(results.scale + column + c, width);
    if (bias != nullptr) value = value + load(bias + column + c, width);
    if (results.relu) value = largest(zeros(), value);  // of 0 and NaN, it takes the second
    if (results.residual != nullptr) value = value + load(results.residual + begin + c, width);
    store(results.y + begin + c, value, width);
  }
}

}  // namespace

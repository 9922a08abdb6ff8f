// The products of a model's layers, and which kernel computes them.
#pragma once

#include "int8_products.h"
#include "panels.h"
#include "products.h"
#include "rounded_products.h"
#include "rows.h"
#include "units.h"

namespace {

inline uint64_t run_products(Job* job, int threads, Dtype dtype, ProductsCall* call) {
  const bool panels = call->m > MOST_FEW_ROWS || call->products[0].by_unit;
  const int64_t pieces = divide(call, threads, panels);
  return with_weight_dtype(dtype, [&]<typename T>(T*) {
    if (!panels) return pool_run(job, threads, pieces, few_rows_piece<T>, few_rows_commit<T>);
    return run_panels<T, Float32Panels<T>>(job, threads, pieces, *call);
  });
}

// y of `count` products, of as many inputs, all of x (m, k).
template <Extra E>
inline uint64_t linears(int threads, Dtype dtype, bool bfloat16, int64_t least_integers, int64_t m, int64_t k,
                        const float* x, const Norm* norm, bool relu, int64_t count, const Output* outputs) {
  const Input shared = {x, nullptr, k, k};
  const bool rounded = E >= Extra::BF16 && bfloat16 && rounds(dtype, m, false);
  const bool whole = E >= Extra::VNNI && dtype == INT8 && !rounded && m >= least_integers;
  const int64_t integers = whole ? integer_bytes(m, 1, &shared) : 0;
  // Of few rows the normed ones are with the call; the caller gives many to layer_norm first.
  const int64_t normed = norm != nullptr ? m * k * sizeof(float) : 0;
  Job* job;
  ProductsCall* call = begin<ProductsCall>(
      &job, count * (sizeof(Product) + sizeof(Input)) + 2 * LINE + (rounded ? rounded_bytes(m, 1, &shared) : 0) +
                integers + normed);
  if (call == nullptr) return NO_MEMORY;
  Product* products = reinterpret_cast<Product*>(call + 1);
  Input* inputs = reinterpret_cast<Input*>(products + count);
  float* more = vectors_from(inputs + count);
  if (norm != nullptr) {
    for (int64_t row = 0; row < m; row++) normalize(x + row * k, k, *norm, more + row * k);
    x = more;
    more = vectors_from(more + m * k);
  }
  if (rounded) x = round_x(x, m, k, more);
  for (int64_t i = 0; i < count; i++) {
    const Output& output = outputs[i];
    inputs[i] = {x, output.w, k, output.ldw};
    products[i] = {0, 0, 0, 1, inputs + i, false, {output.n, output.scale, output.bias, nullptr, relu, output.y}};
  }
  *call = {m, count, products, integers > 0 ? to_integers(m, 1, inputs, more) : nullptr};
  if (integers > 0) return run_integers(job, threads, call, divide(call, threads, false));
  return rounded ? run_rounded(job, threads, dtype, call) : run_products(job, threads, dtype, call);
}

template <Extra E>
inline uint64_t linear_sum(int threads, Dtype dtype, bool bfloat16, int64_t least_integers, int64_t m, int64_t n,
                           bool by_unit, bool skip, const float* scale, const void* bias, const float* residual,
                           float* y, int64_t count, const Input* inputs) {
  const Results results = {n, scale, bias, residual, false, y};
  const bool rounded = E >= Extra::BF16 && bfloat16 && rounds(dtype, m, by_unit);
  if (const int64_t rows = by_unit ? rows_by_unit(rounded, m, n, count, inputs) : 0; rows > 0)
    return with_weight_dtype(dtype, [&]<typename T>(T*) {
      return units_sums<T>(threads, m, rows, skip, results, count, inputs);
    });
  const bool whole = E >= Extra::VNNI && dtype == INT8 && !by_unit && !rounded && m >= least_integers;
  const int64_t integers = whole ? integer_bytes(m, count, inputs) : 0;
  Job* job;
  ProductsCall* call = begin<ProductsCall>(
      &job, sizeof(Product) + count * sizeof(Input) + LINE + (rounded ? rounded_bytes(m, count, inputs) : 0) +
                integers);
  if (call == nullptr) return NO_MEMORY;
  Product* product = reinterpret_cast<Product*>(call + 1);
  Input* copied = reinterpret_cast<Input*>(product + 1);
  memcpy(copied, inputs, count * sizeof(Input));
  float* more = vectors_from(copied + count);
  if (rounded) {
    for (int64_t i = 0; i < count; i++) {
      copied[i].x = round_x(inputs[i].x, m, inputs[i].k, more);
      more += rounded_bytes(m, 1, inputs + i) / sizeof(float);
    }
  }
  *product = {0, 0, 0, count, copied, by_unit, results};
  *call = {m, 1, product, integers > 0 ? to_integers(m, count, copied, more) : nullptr};
  if (integers > 0) return run_integers(job, threads, call, divide(call, threads, false));
  return rounded ? run_rounded(job, threads, dtype, call) : run_products(job, threads, dtype, call);
}

}  // namespace

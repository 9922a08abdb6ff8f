// The products of a model's layers, and which kernel computes them.
#pragma once

#include "int8_products.h"
#include "products.h"
#include "rounded_products.h"
#include "rows.h"
#include "unit_panels.h"
#include "units.h"

namespace {

// Divides the products into pieces of OUTPUTS outputs, or of panels; their number.
inline int64_t divide(ProductsCall* call, int threads, bool panels) {
  int64_t pieces = 0;
  for (int64_t i = 0; i < call->count; i++) {
    Product& p = call->products[i];
    p.first_piece = pieces;
    const int64_t all = pieces_of(p.results.n, PANEL);
    p.panels = PANELS;
    // With few rows the time goes into reading weights, which wide pieces do faster.
    while (p.panels > 1 && pieces_of(all, p.panels) < (call->m <= 64 ? 2 : 8) * threads) p.panels /= 2;
    pieces += panels ? pieces_of(all, p.panels) : pieces_of(p.results.n, OUTPUTS);
  }
  return pieces;
}

inline uint64_t run_products(Job* job, int threads, Dtype dtype, ProductsCall* call) {
  const bool panels = call->m > MOST_FEW_ROWS || call->products[0].by_unit;
  const int64_t pieces = divide(call, threads, panels);
  return with_weight_dtype(dtype, [&]<typename T>(T*) {
    if (!panels) return pool_run(job, threads, pieces, few_rows_piece<T>, few_rows_commit<T>);
    if (call->products[0].by_unit)
      pool_run(job, threads, pieces, unit_panels_piece<T, Float32Units<T>>, nullptr);
    else
      pool_run(job, threads, pieces, many_rows_piece<T>, nullptr);
    return uint64_t{0};  // no piece is computed twice, so that none is left
  });
}

// y of `count` products, of as many inputs, all of x (m, k).
template <Extra E>
inline uint64_t linears(int threads, Dtype dtype, bool bfloat16, int64_t m, int64_t k, const float* x, const Norm* norm,
                        bool relu, int64_t count, const Output* outputs) {
  const Input shared = {x, nullptr, k, k};
  const bool rounded = E >= Extra::BF16 && bfloat16 && rounds(dtype, m, false, 1, &shared);
  const int64_t integers = E >= Extra::VNNI && dtype == INT8 && !rounded ? integer_bytes(m, 1, &shared) : 0;
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
    products[i] = {0, 1, 0, inputs + i, false, {output.n, output.scale, output.bias, nullptr, relu, output.y}};
  }
  *call = {m, count, products, integers > 0 ? to_integers(m, 1, inputs, more) : nullptr};
  if (integers > 0) return run_integers(job, threads, call, divide(call, threads, false));
  return rounded ? run_rounded(job, threads, dtype, call, divide(call, threads, false))
                 : run_products(job, threads, dtype, call);
}

template <Extra E>
inline uint64_t linear_sum(int threads, Dtype dtype, bool bfloat16, int64_t m, int64_t n, bool by_unit, bool skip,
                           const float* scale, const void* bias, const float* residual, float* y, int64_t count,
                           const Input* inputs) {
  const Results results = {n, scale, bias, residual, false, y};
  if (by_unit && takes_units(m, n, count, inputs))
    return with_weight_dtype(dtype, [&]<typename T>(T*) {
      return units_sum<T>(threads, m, skip, results, count, inputs);
    });
  const bool rounded = E >= Extra::BF16 && bfloat16 && rounds(dtype, m, by_unit, count, inputs);
  const int64_t integers =
      E >= Extra::VNNI && dtype == INT8 && !by_unit && !rounded ? integer_bytes(m, count, inputs) : 0;
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
  *product = {0, count, 0, copied, by_unit, results};
  *call = {m, 1, product, integers > 0 ? to_integers(m, count, copied, more) : nullptr};
  if (integers > 0) return run_integers(job, threads, call, divide(call, threads, false));
  return rounded ? run_rounded(job, threads, dtype, call, divide(call, threads, by_unit))
                 : run_products(job, threads, dtype, call);
}

}  // namespace

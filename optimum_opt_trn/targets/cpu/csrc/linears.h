// The products of a model's layers, and which kernel computes them.
#pragma once

#include "amx_integers.h"
#include "amx_products.h"
#include "coded_panels.h"
#include "int8_products.h"
#include "panels.h"
#include "products.h"
#include "rounded_products.h"
#include "rows.h"
#include "units.h"

namespace {

// What becomes of the factors of products.
enum class Factors { FLOAT32, PACKED, INTEGERS, DIGIT_TILES, PAIRS, TILES };
struct Way {
  Factors factors;
  bool rounded;        // to bfloat16
  bool coded = false;  // the weights are
};

// Which coded weights all products or summands have.
enum class CodedWeights { NONE, BY_OUTPUT, BY_UNIT };
template <typename Given>
inline CodedWeights coded_weights(Dtype dtype, bool by_unit, int64_t count, const Given* all) {
  bool coded = dtype == BFLOAT16;
  for (int64_t i = 0; i < count; i++) coded = coded && all[i].coded != nullptr;
  if (!coded) return CodedWeights::NONE;
  return by_unit ? CodedWeights::BY_UNIT : CodedWeights::BY_OUTPUT;
}

// How m rows of the inputs are multiplied. By unit, these are the rows for which panels are faster.
template <Extra E>
inline Way way_of(Dtype dtype, bool bfloat16, int64_t least_integers, int64_t m, bool by_unit, CodedWeights coded,
                  int64_t count, const Input* inputs) {
  const bool pairs = E == Extra::BF16 && bfloat16;
  if (coded == CodedWeights::BY_OUTPUT && m <= MOST_CODED_ROWS) return {Factors::FLOAT32, false, true};
  if (pairs && coded == CodedWeights::BY_OUTPUT && m <= ROUNDED_ROWS) return {Factors::PAIRS, true, true};
  if (pairs && coded == CodedWeights::BY_UNIT && m > CODED_UNIT_ROWS && takes_coded_panels(count, inputs))
    return {Factors::PAIRS, true, true};
  const bool integers = E >= Extra::VNNI && dtype == INT8 && !by_unit && m >= least_integers &&
                        integer_bytes(m, count, inputs) > 0;
  if (E >= Extra::AMX && integers && takes_digit_tiles(m)) return {Factors::DIGIT_TILES, false};
  if (E >= Extra::AMX && (by_unit || m >= least_amx_rows(dtype, bfloat16))) return {Factors::TILES, bfloat16};
  if (pairs && rounds(dtype, m, by_unit)) return {Factors::PAIRS, true};
  if (integers) return {Factors::INTEGERS, false};
  return {m >= LEAST_PACKED_ROWS ? Factors::PACKED : Factors::FLOAT32, false};
}

// Floats that m packed rows of an input take.
inline int64_t packed_floats(Way way, int64_t m, const Input& input) {
  return way.factors == Factors::PAIRS ? rounded_floats(m, input.k) : m * input.k;
}

// Bytes of what becomes of m rows of the inputs, for n sums; 0 if they stay as they are.
inline int64_t factor_bytes(Way way, bool by_unit, int64_t m, int64_t n, int64_t count, const Input* inputs) {
  if (way.factors == Factors::FLOAT32) return 0;
  if (way.factors == Factors::TILES) return amx_bytes(way.rounded, by_unit, m, n, count, inputs);
  if (way.factors == Factors::INTEGERS) return integer_bytes(m, count, inputs);
  if (way.factors == Factors::DIGIT_TILES) return digit_tile_bytes(m, count, inputs);
  int64_t floats = 0;
  for (int64_t i = 0; i < count; i++) floats += packed_floats(way, m, inputs[i]);
  return packing_bytes(count, floats * sizeof(float));
}

// Makes factors of the rows of the inputs in `memory` of factor_bytes, or plans to: their x become them, except integers.
inline void make_factors(Way way, Dtype dtype, bool by_unit, int64_t n, int64_t count, Input* inputs, float* memory,
                         ProductsCall* call) {
  if (way.factors == Factors::FLOAT32) return;
  if (way.factors == Factors::TILES) {
    call->splits = plan_tiles(way.rounded, dtype, by_unit, call->m, n, count, inputs, memory);
  } else if (way.factors == Factors::INTEGERS) {
    call->integers = to_integers(call->m, count, inputs, memory);
  } else if (way.factors == Factors::DIGIT_TILES) {
    call->integers = to_digit_tiles(call->m, count, inputs, memory);
  } else {
    const bool pairs = way.factors == Factors::PAIRS;
    const int64_t depth = pairs ? rounded_depth(way.coded, dtype, call->m, by_unit, count, inputs)
                                : Float32Panels<float>::DEPTH;
    call->packing = plan_packing(depth, count, inputs, memory,
                                 [&](const Input& input) { return packed_floats(way, call->m, input); });
  }
}

// Makes the weights of an input the coded ones, rows of `length`.
inline void use_coded(int64_t length, const void* coded, Input* input) {
  input->w = coded;
  input->ldw = coded_bytes(length);
}

// Computes the products of a call, whose factors were made of `inputs` inputs.
inline uint64_t run_products(Way way, Job* job, int threads, Dtype dtype, int64_t inputs, ProductsCall* call) {
  if (way.factors == Factors::TILES) return run_amx(job, threads, dtype, way.rounded, inputs, call);
  if (way.coded && call->products[0].by_unit) return run_coded_panels(job, threads, inputs, call);
  if (way.factors == Factors::PAIRS) return run_rounded(way.coded, job, threads, dtype, inputs, call);
  if (way.factors == Factors::INTEGERS) return run_integers(job, threads, call, divide(call, threads));
  if (way.factors == Factors::DIGIT_TILES) return run_digit_tiles(job, threads, call);
  if (way.coded) return pool_run(job, threads, divide(call, threads), few_rows_piece<Coded>, few_rows_commit<Coded>);
  return with_weight_dtype(dtype, [&]<typename T>(T*) {
    if (call->m > MOST_FEW_ROWS || call->products[0].by_unit)
      return run_panels<T, Float32Panels<T>>(job, threads, inputs, call);
    return pool_run(job, threads, divide(call, threads), few_rows_piece<T>, few_rows_commit<T>);
  });
}

// How many of m rows a call has.
inline int64_t rows_of(int64_t m) { return pieces_of(m, pieces_of(m, MOST_ROWS)); }

// y of `count` products, of as many inputs, all of x (m, k).
template <Extra E>
inline uint64_t linears(int threads, Dtype dtype, bool bfloat16, int64_t least_integers, int64_t m, int64_t k,
                        const float* x, const Norm* norm, bool relu, int64_t count, const Output* outputs) {
  const Input given = {x, nullptr, k, k, nullptr};
  const CodedWeights coded = coded_weights(dtype, false, count, outputs);
  const Way way = way_of<E>(dtype, bfloat16, least_integers, m, false, coded, 1, &given);
  return each_block(m, rows_of(m), [&](int64_t first, int64_t rows) {
    // Of few rows the normed ones are with the call; the caller gives many to layer_norm first.
    const int64_t normed = norm != nullptr ? rows * k * sizeof(float) : 0;
    Job* job;
    ProductsCall* call = begin<ProductsCall>(
        &job, count * (sizeof(Product) + sizeof(Input)) + 2 * LINE + factor_bytes(way, false, rows, 0, 1, &given) + normed);
    if (call == nullptr) return NO_MEMORY;
    Product* products = reinterpret_cast<Product*>(call + 1);
    Input* inputs = reinterpret_cast<Input*>(products + count);
    float* more = vectors_from(inputs + count);
    Input shared = {x + first * k, nullptr, k, k, nullptr};
    if (norm != nullptr) {
      for (int64_t row = 0; row < rows; row++) normalize(shared.x + row * k, k, *norm, more + row * k);
      shared.x = more;
      more = vectors_from(more + rows * k);
    }
    *call = {rows, count, products, nullptr, nullptr, nullptr};
    make_factors(way, dtype, false, 0, 1, &shared, more, call);
    for (int64_t i = 0; i < count; i++) {
      const Output& output = outputs[i];
      const Results results = {output.n, output.scale, output.bias, nullptr, relu, output.y + first * output.n};
      inputs[i] = {shared.x, output.w, k, output.ldw, nullptr};
      if (way.coded) use_coded(k, output.coded, &inputs[i]);
      products[i] = {0, 0, 0, 0, 1, inputs + i, false, results};
    }
    return run_products(way, job, threads, dtype, 1, call);
  });
}

template <Extra E>
inline uint64_t linear_sum(int threads, Dtype dtype, bool bfloat16, int64_t least_integers, int64_t m, int64_t n,
                           bool by_unit, bool coded_by_unit, bool skip, const float* scale, const void* bias,
                           const float* residual, float* y, int64_t count, const Input* inputs) {
  const CodedWeights coded = coded_weights(dtype, coded_by_unit, count, inputs);
  const Way way = way_of<E>(dtype, bfloat16, least_integers, m, by_unit, coded, count, inputs);
  const int64_t few = coded_by_unit ? CODED_UNIT_ROWS : by_unit ? MOST_UNIT_ROWS : 0;
  const int64_t unit_rows = few > 0 ? rows_by_unit(way.rounded, few, m, n, count, inputs) : 0;
  if (unit_rows > 0 && coded_by_unit)
    return units_sums<Coded>(threads, m, unit_rows, skip, {n, scale, bias, residual, false, y}, count, inputs);
  if (unit_rows > 0)
    return with_weight_dtype(dtype, [&]<typename T>(T*) {
      return units_sums<T>(threads, m, unit_rows, skip, {n, scale, bias, residual, false, y}, count, inputs);
    });
  if (way.coded) by_unit = coded_by_unit;
  return each_block(m, rows_of(m), [&](int64_t first, int64_t rows) {
    Job* job;
    ProductsCall* call = begin<ProductsCall>(
        &job, sizeof(Product) + count * sizeof(Input) + LINE + factor_bytes(way, by_unit, rows, n, count, inputs));
    if (call == nullptr) return NO_MEMORY;
    Product* product = reinterpret_cast<Product*>(call + 1);
    Input* copied = reinterpret_cast<Input*>(product + 1);
    for (int64_t i = 0; i < count; i++) {
      copied[i] = inputs[i];
      copied[i].x += first * inputs[i].k;
      if (way.coded) use_coded(by_unit ? n : inputs[i].k, inputs[i].coded, &copied[i]);
    }
    *call = {rows, 1, product, nullptr, nullptr, nullptr};
    make_factors(way, dtype, by_unit, n, count, copied, vectors_from(copied + count), call);
    const float* rest = residual == nullptr ? nullptr : residual + first * n;
    *product = {0, 0, 0, 0, count, copied, by_unit, {n, scale, bias, rest, false, y + first * n}};
    return run_products(way, job, threads, dtype, count, call);
  });
}

}  // namespace

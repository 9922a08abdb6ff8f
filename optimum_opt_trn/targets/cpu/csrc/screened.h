// Products whose negative results become 0, with weights that have a copy in int8. The copy is read first, and of the
// weights only the rows whose results it does not show to be 0: half of the bytes, and a few rows.
//
// By the Cauchy-Schwarz inequality a sum is off by at most the length of the difference of a weight row and its copy,
// times the length of the row of x. So results are those of the weights, to the bit.
#pragma once

#include <float.h>

#include "linears.h"

namespace {

// Of rows with fewer inputs than LEAST_INPUTS, only so many gain.
constexpr int64_t LEAST_INPUTS = 1024, MOST_SHORT_ROWS = 2;
// The copy has to leave out so large a part of the bytes, or it costs more time than it saves. If it does not, so many
// calls go without it.
constexpr double LEAST_SAVED = 0.1;
constexpr int64_t CALLS_WITHOUT = 63;

struct ScreenedCall {
  ProductsCall products, copies;
  const Copy* made;      // of each product
  const float* lengths;  // of each row of x, rounded up
  int64_t *left, *without;
};

// The length of a row of x (k,), rounded up: the sum of squares has more than 4 parts. Of very small numbers too much
// may be lost.
inline float length_of(const float* x, int64_t k) {
  Vec squares = zeros();
  float rest = 0.0f;
  int64_t i = 0;
  for (; i + LANES <= k; i += LANES) squares = multiply_add(load(x + i), load(x + i), squares);
  for (; i < k; i++) rest += x[i] * x[i];
  const float total = sum(squares) + rest;
  return total > 1e-30f ? sqrtf(total) * (1.0f + (k + 16) * 0x1p-24f) : INFINITY;
}

// Those of `count` outputs, at most OUTPUTS, from `begin` on, that may be above 0 in some row; their number. The sums
// (m, OUTPUTS) are those with the copy.
template <typename T>
inline int64_t find_left(const ScreenedCall& call, const Product& p, const Copy& copy, int64_t begin, int64_t count,
                         const float* sums, int32_t* found) {
  const auto* bias = static_cast<const typename BiasOf<T>::Type*>(p.results.bias);
  uint32_t left[pieces_of(OUTPUTS, LANES)] = {};
  for (int64_t row = 0; row < call.products.m; row++)
    for (int64_t i = 0; i < count; i += LANES) {
      const int64_t width = lesser(LANES, count - i);
      Vec most = load(sums + row * OUTPUTS + i, width) * load(copy.scale + begin + i, width);
      if (bias != nullptr) most = most + load(bias + begin + i, width);
      most = multiply_add(all(call.lengths[row]), load(copy.error + begin + i, width), most);
      // Below 0: a sum of -0 stays -0, where +0 would be written.
      left[i / LANES] |= above(most, all(-FLT_MIN)) & ((1u << width) - 1);
    }
  int64_t number = 0;
  for (int64_t i = 0; i < count; i += LANES)
    for (uint32_t bits = left[i / LANES]; bits != 0; bits &= bits - 1)
      found[number++] = static_cast<int32_t>(begin + i + __builtin_ctz(bits));
  return number;
}

// The sums of m rows, at most M, with the weight rows `found`, to their places in sums (m, OUTPUTS).
template <int M, typename T>
inline void sum_left(const Product& p, int64_t m, int64_t begin, int64_t count, const int32_t* found, float* sums) {
  if constexpr (M > 1) {
    if (m < M) return sum_left<M - 1, T>(p, m, begin, count, found, sums);
  }
  constexpr int R = streams_of<T>(M);
  const Input& input = p.inputs[0];
  for (int64_t first = 0; first < count; first += R) {
    const T *rows[R], *next[R];
    for (int64_t r = 0; r < R; r++) {
      rows[r] = static_cast<const T*>(input.w) + found[lesser(first + r, count - 1)] * input.ldw;
      next[r] = static_cast<const T*>(input.w) + found[lesser(first + R + r, count - 1)] * input.ldw;
    }
    Totals<R, M> totals;
    totals.template add<T>(
        input.k, input.x, [&](int r) { return rows[r]; },
        [&](int r, int64_t i) {
          if (asks<M, T>(i)) __builtin_prefetch(next[r] + i, 0, 1);
        });
    float some[M * OUTPUTS];
    totals.store(some);
    for (int64_t r = 0; r < lesser<int64_t>(R, count - first); r++)
      for (int64_t row = 0; row < M; row++)
        sums[row * OUTPUTS + found[first + r] - begin] = some[row * OUTPUTS + r];
  }
}

template <typename T>
void screened_piece(const void* given, int64_t piece, float* scratch) {
  const ScreenedCall& call = *static_cast<const ScreenedCall*>(given);
  const Product& p = product_of(call.products, piece);
  const int64_t m = call.products.m, begin = (piece - p.first_piece) * OUTPUTS;
  if (call.copies.integers != nullptr)
    integers_piece(&call.copies, piece, scratch);
  else
    few_rows_piece<Int8>(&call.copies, piece, scratch);
  int32_t found[OUTPUTS];
  const int64_t left = find_left<T>(call, p, call.made[&p - call.products.products], begin,
                                    lesser(OUTPUTS, p.results.n - begin), scratch, found);
  for (int64_t i = 0; i < m * OUTPUTS; i++) scratch[i] = -INFINITY;  // becomes 0
  sum_left<lesser<int>(MOST_SCREENED_ROWS, few_rows<T>), T>(p, m, begin, left, found, scratch);
  scratch[m * OUTPUTS] = static_cast<float>(left);
}

template <typename T>
void screened_commit(const void* given, int64_t piece, const float* scratch) {
  const ScreenedCall& call = *static_cast<const ScreenedCall*>(given);
  few_rows_commit<T>(&call.products, piece, scratch);
  __atomic_fetch_add(call.left, static_cast<int64_t>(scratch[call.products.m * OUTPUTS]), __ATOMIC_RELAXED);
}

template <typename T>
void screened_finish(const void* given) {
  const ScreenedCall& call = *static_cast<const ScreenedCall*>(given);
  int64_t outputs = 0;
  for (int64_t i = 0; i < call.products.count; i++) outputs += call.products.products[i].results.n;
  const double copied = 1.0 / bytes_of<T>, read = static_cast<double>(*call.left) / outputs;
  if (copied + read > 1.0 - LEAST_SAVED) *call.without = CALLS_WITHOUT;
}

// y of `count` products, of as many inputs, all of x (m, k); negative ones become 0. The outputs have no scale.
template <Extra E>
inline uint64_t screened(int threads, Dtype dtype, bool bfloat16, int64_t least_integers, int64_t m, int64_t k,
                         const float* x, const Norm* norm, int64_t* without, int64_t count, const Output* outputs,
                         const Copy* copies) {
  const Input given = {x, nullptr, k, k, nullptr};
  const bool few = m <= (k < LEAST_INPUTS ? MOST_SHORT_ROWS : MOST_SCREENED_ROWS);
  const CodedWeights coded = coded_weights(dtype, false, count, outputs);
  const Way way = way_of<E>(dtype, bfloat16, least_integers, m, false, coded, 1, &given);
  if (*without > 0 || !few || way.factors != Factors::FLOAT32) {
    if (*without > 0) --*without;
    return linears<E>(threads, dtype, bfloat16, least_integers, m, k, x, norm, true, count, outputs);
  }
  const bool integers = E >= Extra::VNNI && m >= least_integers && integer_bytes(m, 1, &given) > 0;
  const Way copied = {integers ? Factors::INTEGERS : Factors::FLOAT32, false};
  const int64_t normed = norm != nullptr ? m * k * sizeof(float) : 0;
  Job* job;
  ScreenedCall* call = begin<ScreenedCall>(
      &job, count * (2 * sizeof(Product) + 2 * sizeof(Input) + sizeof(Copy)) + sizeof(int64_t) + m * sizeof(float) +
                2 * LINE + normed + factor_bytes(copied, false, m, 0, 1, &given));
  if (call == nullptr) return NO_MEMORY;
  Product* products = reinterpret_cast<Product*>(call + 1);
  Input* inputs = reinterpret_cast<Input*>(products + 2 * count);
  Copy* made = reinterpret_cast<Copy*>(inputs + 2 * count);
  int64_t* left = reinterpret_cast<int64_t*>(made + count);
  float* lengths = reinterpret_cast<float*>(left + 1);
  float* more = vectors_from(lengths + m);
  Input shared = given;
  if (norm != nullptr) {
    for (int64_t row = 0; row < m; row++) normalize(x + row * k, k, *norm, more + row * k);
    shared.x = more;
    more = vectors_from(more + m * k);
  }
  for (int64_t row = 0; row < m; row++) lengths[row] = length_of(shared.x + row * k, k);
  *left = 0;
  *call = {{m, count, products, nullptr, nullptr, nullptr}, {m, count, products + count, nullptr, nullptr, nullptr},
           made, lengths, left, without};
  make_factors(copied, INT8, false, 0, 1, &shared, more, &call->copies);
  for (int64_t i = 0; i < count; i++) {
    const Output& output = outputs[i];
    inputs[i] = {shared.x, output.w, k, output.ldw, nullptr};
    if (way.coded) use_coded(k, output.coded, &inputs[i]);
    products[i] = {0, 0, 0, 0, 1, inputs + i, false, {output.n, nullptr, output.bias, nullptr, true, output.y}};
    made[i] = copies[i];
    inputs[count + i] = {shared.x, copies[i].w, k, copies[i].ldw, nullptr};
    products[count + i] = {0, 0, 0, 0, 1, inputs + count + i, false, {output.n, nullptr, nullptr, nullptr, false, nullptr}};
  }
  divide(&call->copies, threads);
  const int64_t pieces = divide(&call->products, threads);
  const auto run = [&]<typename T>(T*) {
    return pool_run(job, threads, pieces, screened_piece<T>, screened_commit<T>, screened_finish<T>);
  };
  return way.coded ? run(static_cast<Coded*>(nullptr)) : with_dtype(dtype, run);
}

}  // namespace

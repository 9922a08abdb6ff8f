// What is computed row by row: layernorms, and the best of a row's values.
#pragma once

#include "common.h"

namespace {

inline void normalize(const float* x, int64_t n, const Norm& norm, float* y) {
  Vec sums = zeros();
  float total = 0.0f;
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) sums = sums + load(x + i);
  for (; i < n; i++) total += x[i];
  const float mean = (sum(sums) + total) / n;
  sums = zeros();
  total = 0.0f;
  for (i = 0; i + LANES <= n; i += LANES) {
    const Vec centred = load(x + i) - all(mean);
    sums = multiply_add(centred, centred, sums);
  }
  for (; i < n; i++) total += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / sqrtf((sum(sums) + total) / n + norm.eps);
  for (i = 0; i + LANES <= n; i += LANES) {
    Vec v = (load(x + i) - all(mean)) * all(scale);
    if (norm.weight != nullptr) v = multiply_add(v, load(norm.weight + i), load(norm.bias + i));
    store(y + i, v);
  }
  for (; i < n; i++) {
    y[i] = (x[i] - mean) * scale;
    if (norm.weight != nullptr) y[i] = y[i] * norm.weight[i] + norm.bias[i];
  }
}

struct NormCall {
  int64_t m, n, rows;  // rows of a piece
  const float* x;
  Norm norm;
  float* y;
};

inline void norm_piece(const void* given, int64_t piece, float*) {
  const NormCall& call = *static_cast<const NormCall*>(given);
  for (int64_t row = piece * call.rows; row < lesser(call.m, (piece + 1) * call.rows); row++)
    normalize(call.x + row * call.n, call.n, call.norm, call.y + row * call.n);
}

inline uint64_t layer_norm(int threads, int64_t m, int64_t n, const float* x, const Norm* norm, float* y) {
  Job* job;
  NormCall* call = begin<NormCall>(&job);
  if (call == nullptr) return NO_MEMORY;
  *call = {m, n, m <= 8 ? m : pieces_of(m, lesser(MOST_PIECES, 4 * int64_t{threads})), x, *norm, y};
  pool_run(job, threads, pieces_of(m, call->rows), norm_piece, nullptr);
  return 0;  // no piece is computed twice, so that none is left
}

// Computes a piece for each of m rows, as many at a time as a call has pieces; `make` describes those from a row on.
template <typename C, typename Make>
inline uint64_t each_row(int threads, int64_t m, Compute compute, const Make& make) {
  for (int64_t row = 0; row < m; row += MOST_PIECES) {
    Job* job;
    C* call = begin<C>(&job);
    if (call == nullptr) return NO_MEMORY;
    *call = make(row);
    pool_run(job, threads, lesser(MOST_PIECES, m - row), compute, nullptr);
  }
  return 0;  // no piece is computed twice, so that none is left
}

struct BestCall {
  int64_t n, ldx, masks, k;
  const float* x;
  const int32_t* masked;
  float mask;
  float* values;
  int32_t* places;
};

struct Candidate {
  float value;
  int32_t place;
};

// Whether a comes after b in the order of results.
inline bool worse(Candidate a, Candidate b) {
  const bool a_is_nan = a.value != a.value, b_is_nan = b.value != b.value;
  if (a_is_nan != b_is_nan) return b_is_nan;
  if (!a_is_nan && a.value != b.value) return a.value < b.value;
  return a.place > b.place;
}

// The root of a heap is its worst; sinks what is at the root to where it belongs.
inline void sink(Candidate* heap, int64_t count) {
  for (int64_t at = 0;;) {
    int64_t child = 2 * at + 1;
    if (child >= count) return;
    if (child + 1 < count && worse(heap[child + 1], heap[child])) child++;
    if (!worse(heap[child], heap[at])) return;
    const Candidate moved = heap[at];
    heap[at] = heap[child];
    heap[child] = moved;
    at = child;
  }
}

inline void best_piece(const void* given, int64_t row, float* scratch) {
  const BestCall& call = *static_cast<const BestCall*>(given);
  const float* x = call.x + row * call.ldx;
  const int32_t* masked = call.masked + row * call.masks;
  Candidate* heap = reinterpret_cast<Candidate*>(scratch);
  const int64_t k = call.k;
  for (int64_t i = 0; i < k; i++) heap[i] = {-INFINITY, INT32_MAX};  // worse than all
  const auto offer = [&](int64_t place) {
    Candidate candidate = {x[place], static_cast<int32_t>(place)};
    for (int64_t i = 0; i < call.masks; i++)
      if (masked[i] == place) candidate.value = call.mask;
    if (worse(heap[0], candidate)) {
      heap[0] = candidate;
      sink(heap, k);
    }
  };
  int64_t place = 0;
  // Until the heap is full, equal values count too.
  for (; place < lesser(k, call.n); place++) offer(place);
  for (; place + LANES <= call.n; place += LANES)
    for (uint32_t bits = above(load(x + place), all(heap[0].value)); bits != 0; bits &= bits - 1)
      offer(place + __builtin_ctz(bits));
  for (; place < call.n; place++)
    if (!(x[place] <= heap[0].value)) offer(place);
  for (int64_t i = k - 1; i >= 0; i--) {  // the worst first
    call.values[row * k + i] = heap[0].value;
    call.places[row * k + i] = heap[0].place;
    heap[0] = heap[i];
    sink(heap, i);
  }
}

inline uint64_t best(int threads, int64_t m, int64_t n, int64_t ldx, const float* x, int64_t masks,
                     const int32_t* masked, float mask, int64_t k, float* values, int32_t* places) {
  return each_row<BestCall>(threads, m, best_piece, [&](int64_t row) -> BestCall {
    return {n, ldx, masks, k, x + row * ldx, masked + row * masks, mask, values + row * k, places + row * k};
  });
}

struct CandidatesCall {
  int64_t n, most;
  const float *x, *errors, *factors;
  int32_t *counts, *places;
};

inline void candidates_piece(const void* given, int64_t row, float*) {
  const CandidatesCall& call = *static_cast<const CandidatesCall*>(given);
  const float *x = call.x + row * call.n, factor = call.factors[row];
  Vec lowest = all(-INFINITY);
  float highest = -INFINITY;
  int64_t i = 0;
  for (; i + LANES <= call.n; i += LANES)
    lowest = largest(lowest, multiply_add(all(-factor), load(call.errors + i), load(x + i)));
  for (; i < call.n; i++) highest = fmaxf(highest, x[i] - factor * call.errors[i]);
  highest = nextafterf(fmaxf(highest, largest(lowest)), -INFINITY);
  int64_t found = 0;
  const auto take = [&](int64_t place) {
    if (found < call.most) call.places[row * call.most + found] = static_cast<int32_t>(place);
    found++;
  };
  for (i = 0; i + LANES <= call.n; i += LANES)
    for (uint32_t bits = above(multiply_add(all(factor), load(call.errors + i), load(x + i)), all(highest)); bits != 0;
         bits &= bits - 1)
      take(i + __builtin_ctz(bits));
  for (; i < call.n; i++)
    if (!(x[i] + factor * call.errors[i] <= highest)) take(i);
  call.counts[row] = static_cast<int32_t>(found);
}

inline uint64_t candidates(int threads, int64_t m, int64_t n, const float* x, const float* errors, const float* factors,
                           int64_t most, int32_t* counts, int32_t* places) {
  return each_row<CandidatesCall>(threads, m, candidates_piece, [&](int64_t row) -> CandidatesCall {
    return {n, most, x + row * n, errors, factors + row, counts + row, places + row * most};
  });
}

}  // namespace

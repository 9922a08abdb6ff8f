// Attention of one token of one head. The lanes run along the head: keys and values are used as they are read.
#pragma once

#include "common.h"

namespace {

// sums[0, N * LANES) += weights (count,) times values (count, >= N * LANES), rows ldv apart
template <int N, typename C>
inline void mix(const float* weights, const C* values, int64_t ldv, int64_t count, float* sums) {
  Vec totals[N];
  for (int v = 0; v < N; v++) totals[v] = load(sums + v * LANES);
  for (int64_t j = 0; j < count; j++) {
    const Vec weight = all(weights[j]);
    const C* row = values + j * ldv;
#pragma GCC unroll 8
    for (int v = 0; v < N; v++) totals[v] = multiply_add(weight, load(row + v * LANES), totals[v]);
  }
  for (int v = 0; v < N; v++) store(sums + v * LANES, totals[v]);
}

// query (d,) over keys and values (count, d), rows ldc apart, to mixed (d,), behind which are the scores (count,).
template <typename C>
void attend_token(const float* query, const C* keys, const C* values, int64_t ldc, int64_t count, int64_t d,
                  float scale, float* mixed) {
  float* scores = mixed + d;
  float highest = -INFINITY;
  for (int64_t j = 0; j < count; j++) {
    const C* key = keys + j * ldc;
    Vec sums = zeros();
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) {
      sums = multiply_add(load(query + i), load(key + i), sums);
      __builtin_prefetch(key + i + 16 * ldc, 0, 2);
      __builtin_prefetch(values + j * ldc + i, 0, 3);
    }
    float score = sum(sums);
    for (; i < d; i++) score += query[i] * scalar(key[i]);
    scores[j] = score * scale;
    highest = scores[j] > highest ? scores[j] : highest;
  }
  float total = 0.0f;
  int64_t j = 0;
  for (; j + LANES <= count; j += LANES) {
    const Vec weights = exponential(load(scores + j) - all(highest));
    store(scores + j, weights);
    total += sum(weights);
  }
  for (; j < count; j++) total += scores[j] = expf(scores[j] - highest);
  const float share = 1.0f / total;
  for (j = 0; j < count; j++) scores[j] *= share;
  for (int64_t i = 0; i < d; i++) mixed[i] = 0.0f;
  int64_t i = 0;
  for (; i + 4 * LANES <= d; i += 4 * LANES) mix<4>(scores, values + i, ldc, count, mixed + i);
  for (; i + LANES <= d; i += LANES) mix<1>(scores, values + i, ldc, count, mixed + i);
  for (; i < d; i++)
    for (j = 0; j < count; j++) mixed[i] += scores[j] * scalar(values[j * ldc + i]);
}

}  // namespace

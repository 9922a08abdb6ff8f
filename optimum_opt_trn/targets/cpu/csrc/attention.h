// Attention of few new tokens over the used part of the cache, in the cache's dtype.
#pragma once

#include <sched.h>

#include "common.h"

namespace {

template <typename C>
struct AttendCall {
  int64_t heads, d, by_slot, by_head, by_place;
  const float* query;
  const C *keys, *values;
  const int64_t *slots, *positions;
  float scale;
  float* y;
};

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

// A token and a head: the head's query (d,) over the first keys and values of its slot, to mixed (d,), which comes
// first in the scratch memory; scores are behind it.
template <typename C>
void attend_piece(const void* given, int64_t piece, float* mixed) {
  const AttendCall<C>& call = *static_cast<const AttendCall<C>*>(given);
  const int64_t token = piece / call.heads, head = piece % call.heads, d = call.d, ldc = call.by_place;
  const int64_t cached = call.slots[token] * call.by_slot + head * call.by_head, count = call.positions[token] + 1;
  const float* query = call.query + piece * d;
  const C *keys = call.keys + cached, *values = call.values + cached;
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
    scores[j] = score * call.scale;
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

template <typename C>
void attend_commit(const void* given, int64_t piece, const float* mixed) {
  const AttendCall<C>& call = *static_cast<const AttendCall<C>*>(given);
  memcpy(call.y + piece * call.d, mixed, call.d * sizeof(float));
}

// The keys and values of the new tokens are written to the cache first, by the caller: they are few.
template <typename C>
uint64_t attend_in(int threads, int64_t tokens, int64_t heads, int64_t d, const float* query, const float* key,
                   const float* value, C* keys, C* values, const int64_t* strides, const int64_t* slots,
                   const int64_t* positions, float scale, float* y) {
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t head = 0; head < heads; head++) {
      const int64_t from = (t * heads + head) * d;
      const int64_t to = slots[t] * strides[0] + head * strides[1] + positions[t] * strides[2];
      for (int64_t i = 0; i < d; i++) {
        keys[to + i] = narrow<C>(key[from + i]);
        values[to + i] = narrow<C>(value[from + i]);
      }
    }
  uint64_t handle = 0;
  const int64_t at_once = MOST_PIECES / heads;
  for (int64_t t = 0; t < tokens; t += at_once) {
    Job* job;
    const int64_t count = lesser(at_once, tokens - t);
    AttendCall<C>* call = begin<AttendCall<C>>(&job, 2 * count * sizeof(int64_t));
    if (call == nullptr) return NO_MEMORY;
    int64_t* copied = reinterpret_cast<int64_t*>(call + 1);
    memcpy(copied, slots + t, count * sizeof(int64_t));
    memcpy(copied + count, positions + t, count * sizeof(int64_t));
    const int64_t offset = t * heads * d;
    *call = {heads, d, strides[0], strides[1], strides[2], query + offset, keys, values, copied, copied + count, scale,
             y + offset};
    while (!pool_left(handle)) sched_yield();
    handle = pool_run(job, threads, count * heads, attend_piece<C>, attend_commit<C>);
  }
  return handle;
}

inline uint64_t attend(int threads, Dtype dtype, int64_t tokens, int64_t heads, int64_t d, const float* query,
                       const float* key, const float* value, void* keys, void* values, const int64_t* strides,
                       const int64_t* slots, const int64_t* positions, float scale, float* y) {
  return with_dtype(dtype, [&]<typename C>(C*) {
    return attend_in<C>(threads, tokens, heads, d, query, key, value, static_cast<C*>(keys), static_cast<C*>(values),
                        strides, slots, positions, scale, y);
  });
}

}  // namespace

// What all kernels share. This file and all below are compiled once for each instruction set, and the linker must not
// mix what they make: everything is in an anonymous namespace, and the C++ library is not used.
#pragma once

#include <math.h>
#include <string.h>

#include "kernels.h"
#include "pool.h"

namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
struct Int8 {
  int8_t value;
};
// A byte of a row of coded weights (coded_format.h).
struct Coded {
  uint8_t value;
};

// The dtype of the biases that go with weights of type T.
template <typename T>
struct BiasOf {
  using Type = T;
};
template <>
struct BiasOf<Int8> {
  using Type = float;
};
template <>
struct BiasOf<Coded> {
  using Type = BFloat16;
};

template <typename T>
constexpr bool is_coded = false;
template <>
constexpr bool is_coded<Coded> = true;
// Bytes of a weight, but for what a coded row begins with.
template <typename T>
constexpr double bytes_of = is_coded<T> ? 1.5 : sizeof(T);

template <typename T>
constexpr T lesser(T a, T b) {
  return b < a ? b : a;
}
constexpr int64_t pieces_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

}  // namespace

#if defined(KERNELS_AVX512)
#include "simd_avx512.h"
#elif defined(KERNELS_AVX2)
#include "simd_avx2.h"
#elif defined(KERNELS_NEON)
#include "simd_neon.h"
#endif

namespace {

inline float scalar(float value) { return value; }
inline float scalar(Int8 value) { return value.value; }
inline float scalar(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

#if !defined(KERNELS_AVX512)
// The first `count` lanes; the others are 0, and are not read or written.
template <typename T>
inline Vec load(const T* from, int64_t count) {
  if (count == LANES) return load(from);
  float padded[LANES] = {};
  for (int64_t i = 0; i < count; i++) padded[i] = scalar(from[i]);
  return load(padded);
}
inline void store(float* to, Vec v, int64_t count) {
  if (count == LANES) return store(to, v);
  float padded[LANES];
  store(padded, v);
  memcpy(to, padded, count * sizeof(float));
}
#endif

// To the nearest, of two to the even one, as torch converts.
template <typename T>
inline T narrow(float value);
template <>
inline float narrow<float>(float value) {
  return value;
}
template <>
inline Half narrow<Half>(float value) {
  return to_half(value);
}
template <>
inline BFloat16 narrow<BFloat16>(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (value != value) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// count of them, to the nearest as well
template <typename T>
inline void narrow(const float* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
  for (; i < count; i++) to[i] = narrow<T>(from[i]);
}

// e to the power of v, v at most 0: 2^n * e^r, e^r by its Taylor series, which at |r| <= ln(2) / 2 is off by 2e-8.
inline Vec exponential(Vec v) {
  v = largest(all(-87.0f), v);  // in this order NaN stays NaN: x86 returns the second
  const Vec n = rounded(v * all(1.44269504f));
  Vec r = multiply_add(n, all(-0.693145752f), v);  // ln(2) in two parts, the first of few bits
  r = multiply_add(n, all(-1.42860677e-6f), r);
  Vec y = all(1.0f / 5040);
  y = multiply_add(y, r, all(1.0f / 720));
  y = multiply_add(y, r, all(1.0f / 120));
  y = multiply_add(y, r, all(1.0f / 24));
  y = multiply_add(y, r, all(1.0f / 6));
  y = multiply_add(y, r, all(0.5f));
  y = multiply_add(y, r, all(1.0f));
  y = multiply_add(y, r, all(1.0f));
  return y * power_of_two(n);
}

// Begins a call that is described by a C and whatever has `more` bytes behind it.
template <typename C>
inline C* begin(Job** job, int64_t more = 0) {
  return static_cast<C*>(pool_begin(sizeof(C) + more, job));
}

// Bytes that the processor fetches together.
constexpr int64_t LINE = 64;

// Where the vectors of a call begin, less than a LINE behind what else it has: loads that cross a line take longer.
inline float* vectors_from(void* behind) {
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(behind) + LINE - 1) / LINE * LINE);
}

// Calls `run` with a null pointer of the C++ type of `dtype`.
template <typename F>
inline uint64_t with_dtype(Dtype dtype, F run) {
  if (dtype == FLOAT16) return run(static_cast<Half*>(nullptr));
  if (dtype == BFLOAT16) return run(static_cast<BFloat16*>(nullptr));
  return run(static_cast<float*>(nullptr));
}

// The same for weights, which can be int8.
template <typename F>
inline uint64_t with_weight_dtype(Dtype dtype, F run) {
  return dtype == INT8 ? run(static_cast<Int8*>(nullptr)) : with_dtype(dtype, run);
}

}  // namespace

// Vectors of 16 floats: AVX-512 F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

#define WITH_BF16 __attribute__((target("avx512bf16")))

namespace {

using Vec = __m512;
constexpr int64_t LANES = 16;

// Products of few rows: at most FEW_ROWS rows of x at a time, and so many weight rows with M of them. Chosen by
// benchmarks/linear_cpu.py, as all constants here. With 8 rows the sums would take all registers.
constexpr int FEW_ROWS = 7;
constexpr int streams(int m) { return m == 1 ? 4 : m <= 4 ? 6 : 4; }
// With so many rows at most, weights are asked for once a line; with more, several times, which is faster.
constexpr int MOST_ASKING_ONCE = 1;
// By unit (units.h): so many rows at a time, and vectors of outputs with m of them.
constexpr int UNIT_ROWS = 8;
constexpr int tile(int m) { return m <= 4 ? 4 : 3; }
// Of coded weights (coded.h): so many rows at most, and weight rows with M of them; by unit, so many rows at a time.
constexpr int64_t MOST_CODED_ROWS = 4;
constexpr int coded_streams(int m) { return m <= 2 ? 2 : 3; }
constexpr int CODED_UNIT_ROWS = 4;
// With more rows, panels of weights (panels.h).
constexpr int64_t MOST_FEW_ROWS = 20;
constexpr int GEMM_ROWS = 8, GEMM_VECTORS = 3;

inline Vec zeros() { return _mm512_setzero_ps(); }
inline Vec all(float value) { return _mm512_set1_ps(value); }
inline Vec load(const float* from) { return _mm512_loadu_ps(from); }
inline Vec load(const Half* from) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
inline Vec load(const BFloat16* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Vec load(const Int8* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline void store(float* to, Vec v) { _mm512_storeu_ps(to, v); }
inline void store(Half* to, Vec v) {
  const __m256i halves = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
}
// As `narrow` in common.h.
inline void store(BFloat16* to, Vec v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i high = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  high = _mm512_mask_mov_epi32(high, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(high));
}
// The first `count` lanes; the others are 0, and are not read or written.
inline Vec load(const float* from, int64_t count) { return _mm512_maskz_loadu_ps((1u << count) - 1, from); }
inline Vec load(const Half* from, int64_t count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((1u << count) - 1, from));
}
inline Vec load(const BFloat16* from, int64_t count) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16((1u << count) - 1, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Vec load(const Int8* from, int64_t count) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8((1u << count) - 1, from)));
}
inline void store(float* to, Vec v, int64_t count) { _mm512_mask_storeu_ps(to, (1u << count) - 1, v); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec largest(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline float largest(Vec v) { return _mm512_reduce_max_ps(v); }
inline Vec rounded(Vec v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec power_of_two(Vec n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }
// The sums of four vectors, to four floats: fewer operations than four of `sum`.
inline void store_sums(Vec a, Vec b, Vec c, Vec d, float* to) {
  const Vec ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const Vec cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const Vec abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
// A bit for each lane that is not 0; that a lane is NaN counts.
inline uint32_t nonzero(Vec v) { return _mm512_cmp_ps_mask(v, zeros(), _CMP_NEQ_UQ); }
// A bit for each lane that is not at most `limit`.
inline uint32_t above(Vec v, Vec limit) { return _mm512_cmp_ps_mask(v, limit, _CMP_NLE_UQ); }

// Coded weights (coded.h): bytes, codes in the lower and the upper four bits of each, and what a table of 16 has for
// them; whether any is `value`; the numbers of bfloat16 whose low and high bytes they are, two to 32 bits; and these as
// floats, of each vector the lower ones and then the upper ones.
using Bytes = __m512i;
inline Bytes load_bytes(const void* from) { return _mm512_loadu_si512(from); }
inline void store_bytes(void* to, Bytes v) { _mm512_storeu_si512(to, v); }
inline Bytes repeated(const void* from) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}
inline Bytes lower_codes(Bytes v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
inline Bytes upper_codes(Bytes v) { return lower_codes(_mm512_srli_epi16(v, 4)); }
inline Bytes look_up(Bytes table, Bytes codes) { return _mm512_shuffle_epi8(table, codes); }
inline bool any(Bytes v, char value) { return _mm512_cmpeq_epi8_mask(v, _mm512_set1_epi8(value)) != 0; }
inline bool any(Bytes v, Bytes w, char value) {
  const __m512i values = _mm512_set1_epi8(value);
  return !_kortestz_mask64_u8(_mm512_cmpeq_epi8_mask(v, values), _mm512_cmpeq_epi8_mask(w, values));
}
inline void join(Bytes low, Bytes high, Bytes (&to)[2]) {
  to[0] = _mm512_unpacklo_epi8(low, high);
  to[1] = _mm512_unpackhi_epi8(low, high);
}
inline void widen(const Bytes (&pairs)[2], Vec (&to)[4]) {
  const Bytes upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int i = 0; i < 2; i++) {
    to[2 * i] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs[i], 16));
    to[2 * i + 1] = _mm512_castsi512_ps(_mm512_and_si512(pairs[i], upper));
  }
}

inline float scalar(Half value) { return _cvtsh_ss(value.bits); }
inline Half to_half(float value) { return {static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))}; }

inline void transpose(Vec (&rows)[LANES]) {
  // First 4 x 4 values in each quarter of the vectors, then the quarters of 4 x 4 vectors.
  Vec pairs[16], quads[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      quads[i + 2 * j] = _mm512_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0x44);
      quads[i + 2 * j + 1] = _mm512_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0xee);
    }
  for (int i = 0; i < 4; i++) {
    const Vec even = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0x88);
    const Vec odd = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0xdd);
    const Vec later_even = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0x88);
    const Vec later_odd = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0xdd);
    rows[i] = _mm512_shuffle_f32x4(even, later_even, 0x88);
    rows[i + 4] = _mm512_shuffle_f32x4(odd, later_odd, 0x88);
    rows[i + 8] = _mm512_shuffle_f32x4(even, later_even, 0xdd);
    rows[i + 12] = _mm512_shuffle_f32x4(odd, later_odd, 0xdd);
  }
}

}  // namespace

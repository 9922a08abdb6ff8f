// Vectors of 8 floats: AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

namespace {

using Vec = __m256;
constexpr int64_t LANES = 8;

// As in simd_avx512.h; there are 16 registers, so that fewer sums are kept at a time.
constexpr int FEW_ROWS = 6;
constexpr int streams(int m) { return m <= 2 ? 4 : m <= 4 ? 3 : 2; }
constexpr int MOST_ASKING_ONCE = 2;
constexpr int UNIT_ROWS = 6;
constexpr int tile(int m) { return m == 1 ? 8 : m == 2 ? 4 : m <= 4 ? 3 : 2; }
constexpr int64_t MOST_CODED_ROWS = 1;
constexpr int coded_streams(int) { return 2; }
constexpr int CODED_UNIT_ROWS = 2;
constexpr int64_t MOST_FEW_ROWS = 48;
constexpr int GEMM_ROWS = 6, GEMM_VECTORS = 2;

inline Vec zeros() { return _mm256_setzero_ps(); }
inline Vec all(float value) { return _mm256_set1_ps(value); }
inline Vec load(const float* from) { return _mm256_loadu_ps(from); }
inline Vec load(const Half* from) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }
inline Vec load(const BFloat16* from) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Vec load(const Int8* from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
inline void store(float* to, Vec v) { _mm256_storeu_ps(to, v); }
inline void store(Half* to, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
// As `narrow` in common.h.
inline void store(BFloat16* to, Vec v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i high = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  high = _mm256_blendv_epi8(high, _mm256_set1_epi32(0x7fc0), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec largest(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline float largest(Vec v) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
inline Vec rounded(Vec v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec power_of_two(Vec n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline float sum(Vec v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline void store_sums(Vec a, Vec b, Vec c, Vec d, float* to) {
  const Vec ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const Vec cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const Vec abcd = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
}
inline uint32_t nonzero(Vec v) { return _mm256_movemask_ps(_mm256_cmp_ps(v, zeros(), _CMP_NEQ_UQ)); }
inline uint32_t above(Vec v, Vec limit) { return _mm256_movemask_ps(_mm256_cmp_ps(v, limit, _CMP_NLE_UQ)); }

using Bytes = __m256i;
inline Bytes load_bytes(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline void store_bytes(void* to, Bytes v) { _mm256_storeu_si256(static_cast<__m256i*>(to), v); }
inline Bytes repeated(const void* from) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}
inline Bytes lower_codes(Bytes v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
inline Bytes upper_codes(Bytes v) { return lower_codes(_mm256_srli_epi16(v, 4)); }
inline Bytes look_up(Bytes table, Bytes codes) { return _mm256_shuffle_epi8(table, codes); }
inline bool any(Bytes v, char value) {
  return _mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_set1_epi8(value))) != 0;
}
inline void join(Bytes low, Bytes high, Bytes (&to)[2]) {
  to[0] = _mm256_unpacklo_epi8(low, high);
  to[1] = _mm256_unpackhi_epi8(low, high);
}
inline void widen(const Bytes (&pairs)[2], Vec (&to)[4]) {
  const Bytes upper = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  for (int i = 0; i < 2; i++) {
    to[2 * i] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs[i], 16));
    to[2 * i + 1] = _mm256_castsi256_ps(_mm256_and_si256(pairs[i], upper));
  }
}

inline float scalar(Half value) { return _cvtsh_ss(value.bits); }
inline Half to_half(float value) { return {static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))}; }

inline void transpose(Vec (&rows)[LANES]) {
  Vec pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      quads[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0x44);
      quads[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0xee);
    }
  for (int i = 0; i < 4; i++) {
    rows[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
}

}  // namespace

// Vectors of 4 floats: NEON of 64-bit ARM. No ARM processor has measured the constants.
#pragma once

#include <arm_neon.h>

namespace {

using Vec = float32x4_t;
constexpr int64_t LANES = 4;

constexpr int FEW_ROWS = 8;
constexpr int streams(int m) { return m <= 2 ? 8 : m <= 4 ? 4 : m <= 6 ? 4 : 3; }
constexpr int MOST_ASKING_ONCE = 2;
constexpr int UNIT_ROWS = 8;
constexpr int tile(int m) { return m <= 2 ? 8 : m <= 4 ? 5 : 3; }
constexpr int64_t MOST_CODED_ROWS = 4;
constexpr int coded_streams(int m) { return m <= 2 ? 2 : 3; }
constexpr int CODED_UNIT_ROWS = 4;
constexpr int64_t MOST_FEW_ROWS = 48;
constexpr int GEMM_ROWS = 8, GEMM_VECTORS = 3;

inline Vec zeros() { return vdupq_n_f32(0.0f); }
inline Vec all(float value) { return vdupq_n_f32(value); }
inline Vec load(const float* from) { return vld1q_f32(from); }
inline Vec load(const Half* from) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(from))));
}
inline Vec load(const BFloat16* from) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(from)), 16));
}
inline Vec load(const Int8* from) {
  uint32_t four;
  memcpy(&four, from, sizeof four);
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four)));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}
inline void store(float* to, Vec v) { vst1q_f32(to, v); }
inline void store(Half* to, Vec v) {
  vst1_u16(reinterpret_cast<uint16_t*>(to), vreinterpret_u16_f16(vcvt_f16_f32(v)));
}
// As `narrow` in common.h.
inline void store(BFloat16* to, Vec v) {
  const uint32x4_t bits = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t high = vshrq_n_u32(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd), 16);
  vst1_u16(reinterpret_cast<uint16_t*>(to), vmovn_u32(vbslq_u32(vceqq_f32(v, v), high, vdupq_n_u32(0x7fc0))));
}
inline Vec multiply_add(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
inline Vec largest(Vec a, Vec b) { return vmaxq_f32(a, b); }
inline float largest(Vec v) { return vmaxvq_f32(v); }
inline Vec rounded(Vec v) { return vrndnq_f32(v); }
inline Vec power_of_two(Vec n) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
}
inline float sum(Vec v) { return vaddvq_f32(v); }
inline void store_sums(Vec a, Vec b, Vec c, Vec d, float* to) {
  store(to, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
}
inline uint32_t bits_of(uint32x4_t mask) {
  const uint32x4_t places = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(mask, places));
}
inline uint32_t nonzero(Vec v) { return bits_of(vmvnq_u32(vceqq_f32(v, zeros()))); }
inline uint32_t above(Vec v, Vec limit) { return bits_of(vmvnq_u32(vcleq_f32(v, limit))); }

inline float scalar(Half value) {
  return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(value.bits))), 0);
}
using Bytes = uint8x16_t;
inline Bytes load_bytes(const void* from) { return vld1q_u8(static_cast<const uint8_t*>(from)); }
inline void store_bytes(void* to, Bytes v) { vst1q_u8(static_cast<uint8_t*>(to), v); }
inline Bytes repeated(const void* from) { return load_bytes(from); }
inline Bytes lower_codes(Bytes v) { return vandq_u8(v, vdupq_n_u8(15)); }
inline Bytes upper_codes(Bytes v) { return vshrq_n_u8(v, 4); }
inline Bytes look_up(Bytes table, Bytes codes) { return vqtbl1q_u8(table, codes); }
inline bool any(Bytes v, char value) { return vmaxvq_u8(vceqq_u8(v, vdupq_n_u8(value))) != 0; }
inline void join(Bytes low, Bytes high, Bytes (&to)[2]) {
  to[0] = vzip1q_u8(low, high);
  to[1] = vzip2q_u8(low, high);
}
inline void widen(const Bytes (&pairs)[2], Vec (&to)[4]) {
  for (int i = 0; i < 2; i++) {
    const uint32x4_t words = vreinterpretq_u32_u8(pairs[i]);
    to[2 * i] = vreinterpretq_f32_u32(vshlq_n_u32(words, 16));
    to[2 * i + 1] = vreinterpretq_f32_u32(vandq_u32(words, vdupq_n_u32(0xffff0000)));
  }
}

inline Half to_half(float value) {
  return {vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(value))), 0)};
}

inline void transpose(Vec (&rows)[LANES]) {
  const float32x4x2_t a = vtrnq_f32(rows[0], rows[1]), b = vtrnq_f32(rows[2], rows[3]);
  rows[0] = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
  rows[1] = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
  rows[2] = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
  rows[3] = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}

}  // namespace

// Reading coded weights (coded_format.h): bfloat16 in three quarters of the bytes. That costs some ten operations for 64
// weights, so that it is faster than bfloat16 as it is with few rows, where memory is the limit.
#pragma once

#include "coded_format.h"
#include "common.h"

namespace {

// Weights that are decoded together: four vectors, which begin HALF / 4 weights apart. A half has PARTS of them.
constexpr int64_t DECODED = 4 * LANES, PARTS = HALF / DECODED;
static_assert(sizeof(Bytes) == DECODED);

// The high bytes of a vector of weights, whose first is `byte` of the half that begins at weight `begin`, where some have
// the code OTHER.
__attribute__((noinline, cold)) Bytes with_others(const Coded* row, int64_t begin, int64_t byte, Bytes codes,
                                                  Bytes high) {
  uint8_t code[sizeof(Bytes)], bytes[sizeof(Bytes)];
  store_bytes(code, codes);
  store_bytes(bytes, high);
  for (int64_t i = 0; i < DECODED; i++) {
    const uint32_t place = static_cast<uint32_t>(begin + place_of(byte + i));
    for (int64_t other = 0; code[i] == OTHER && other < MOST_OTHERS; other++) {
      uint32_t word;
      memcpy(&word, row + OTHERS_BEGIN + 4 * other, sizeof word);
      if (word >> 8 == place && word != 0) bytes[i] = static_cast<uint8_t>(word);
    }
  }
  return load_bytes(bytes);
}

// Weights of part PART of half H of the block from weight `begin` on, two to 32 bits. `table` has the row's high bytes,
// repeated.
template <int H, int PART>
inline void decode(const Coded* row, int64_t begin, Bytes table, Bytes (&to)[2]) {
  const Coded* block = row + block_begin(begin);
  const Bytes both = load_bytes(block + CODED_BLOCK + PART * DECODED);
  const Bytes codes = H == 0 ? lower_codes(both) : upper_codes(both);
  Bytes high = look_up(table, codes);
  if (__builtin_expect(any(codes, OTHER), 0)) high = with_others(row, begin + H * HALF, PART * DECODED, codes, high);
  join(load_bytes(block + H * HALF + PART * DECODED), high, to);
}

// The same as floats, to the four vectors at PART * LANES and so many times HALF / 4.
template <int H, int PART>
inline void decode(const Coded* row, int64_t begin, Bytes table, Vec (&to)[4]) {
  Bytes pairs[2];
  decode<H, PART>(row, begin, table, pairs);
  widen(pairs, to);
}

// Calls `use.template operator()<H, PART>()` for each half and part of a block.
template <typename Use>
inline void each_part(const Use& use) {
  const auto half = [&]<int H>() {
    use.template operator()<H, 0>();
    if constexpr (PARTS > 1) use.template operator()<H, 1>();
    if constexpr (PARTS > 2) {
      use.template operator()<H, 2>();
      use.template operator()<H, 3>();
    }
  };
  half.template operator()<0>();
  half.template operator()<1>();
}

// Asks for what is read first in part PART of half H of a block: its line of low bytes, and in the second half that of
// codes, in which the first half's lie too. GCC drops what only asks unless it is inlined at once.
template <int H, int PART, typename Ask>
__attribute__((always_inline)) inline void ask_lines(const Ask& ask) {
  if constexpr (PART == 0) ask(H * HALF);
  if constexpr (PART == 0 && H == 1) ask(CODED_BLOCK);
}

}  // namespace

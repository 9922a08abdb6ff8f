// bfloat16 weights in 12 bits each, without loss. The high byte of one is its sign and seven of the eight bits of its
// exponent: of a row's high bytes, nearly all are among 15. So a row has its 15 most frequent ones, then each weight's
// low byte and a code of four bits for the high one, and apart from that the few weights with others.
//
// A row of k weights is
// - the high bytes of codes 0 to 14 (and one byte that is not used),
// - MOST_OTHERS words, each the high byte of a weight with code OTHER and 256 times its place; or 0, which the words
//   behind the last are,
// - for each CODED_BLOCK weights their low bytes, of one HALF after the other, and 64 bytes of codes: four bits for a
//   weight of the first half, the upper four for one of the second.
// In a half, `place_of` says which weight a byte is of: the one order for which vectors of 16, 32 and 64 bytes become
// vectors of floats that follow one another.
#pragma once

#include <cstdint>

constexpr int64_t CODED_BLOCK = 128, HALF = CODED_BLOCK / 2, BLOCK_BYTES = CODED_BLOCK + HALF;
constexpr int OTHER = 15;
constexpr int64_t MOST_OTHERS = 12, OTHERS_BEGIN = 16, BLOCKS_BEGIN = OTHERS_BEGIN + 4 * MOST_OTHERS;

// Bytes of a row of k weights, a multiple of CODED_BLOCK.
constexpr int64_t coded_bytes(int64_t k) { return BLOCKS_BEGIN + k / CODED_BLOCK * BLOCK_BYTES; }

// Where in a row the block of a weight begins.
constexpr int64_t block_begin(int64_t place) { return BLOCKS_BEGIN + place / CODED_BLOCK * BLOCK_BYTES; }

// Of the weights of a half, which one a byte belongs to. Vectors of bytes interleave in parts of 16; two neighbours make
// a word of 32 bits with two weights, of which one vector of floats gets the lower, another the upper ones.
constexpr int64_t place_of(int64_t byte) {
  const int64_t part = byte / 16, quarter = byte % 16 / 8 * 2 + byte % 2;
  return quarter * 16 + part * 4 + byte % 8 / 2;
}

// Codes n rows of k weights, rows ldw apart, to rows of coded_bytes(k), on `threads` threads. Returns how many rows have
// more than MOST_OTHERS weights of other high bytes; these are not written whole. With `coded` null, counts only.
int64_t encode(int threads, int64_t n, int64_t k, int64_t ldw, const uint16_t* w, uint8_t* coded);

// Attention of a block of tokens of one slot, of one head: keys and values are converted once for all of them, KEYS at
// a time, and both products are those of a GEMM. The softmax goes along with the keys (Milakov and Gimelshein 2018,
// "Online normalizer calculation for softmax"), so that no scores are kept (Dao et al. 2022, "FlashAttention").
#pragma once

#include "common.h"
#include "tiles.h"

namespace {

// A block has so many tokens at most, takes so many keys at a time, and asks for keys so many before it needs them.
constexpr int64_t TOKENS = 64, KEYS = 192, AHEAD = 64;

constexpr int64_t padded(int64_t count) { return pieces_of(count, LANES) * LANES; }
// Whether the scratch memory is enough for heads of d; see attend_block.
constexpr bool blocks_fit(int64_t d) {
  return 2 * TOKENS * padded(d) + 2 * padded(TOKENS) + GEMM_ROWS * KEYS + 2 * KEYS * padded(d) <= SCRATCH;
}
static_assert(blocks_fit(256) && KEYS % LANES == 0);

// Asks for `count` rows of d values, ldc apart.
template <typename C>
inline void prefetch(const C* rows, int64_t ldc, int64_t count, int64_t d) {
  for (int64_t j = 0; j < count; j++)
    for (int64_t i = 0; i < d; i += 64 / static_cast<int64_t>(sizeof(C))) __builtin_prefetch(rows + j * ldc + i, 0, 2);
}

// keys (count, d), rows ldc apart, to panels (count / LANES, d, LANES) in float32, with zeros behind the last key. Asks
// for the keys after them, of which there are `more`, and for their values.
template <typename C>
void transpose_keys(const C* keys, const C* values, int64_t ldc, int64_t count, int64_t more, int64_t d,
                    float* panels) {
  for (int64_t j = 0; j < count; j += LANES) {
    const int64_t height = lesser(LANES, count - j);
    prefetch(keys + (j + AHEAD) * ldc, ldc, lesser(LANES, count + more - j - AHEAD), d);
    prefetch(values + j * ldc, ldc, height, d);
    for (int64_t i = 0; i < d; i += LANES) {
      const int64_t width = lesser(LANES, d - i);
      const C* from = keys + j * ldc + i;
      Vec rows[LANES];
      if (height == LANES && width == LANES)
        for (int64_t r = 0; r < LANES; r++) rows[r] = load(from + r * ldc);
      else
        for (int64_t r = 0; r < LANES; r++) rows[r] = load(from + r * ldc, r < height ? width : 0);
      transpose(rows);
      for (int64_t l = 0; l < width; l++) store(panels + j * d + (i + l) * LANES, rows[l]);
    }
  }
}

// values (count, d), rows ldc apart, to (count, padded(d)) in float32.
template <typename C>
void convert_values(const C* values, int64_t ldc, int64_t count, int64_t d, float* to) {
  for (int64_t j = 0; j < count; j++) {
    const C* from = values + j * ldc;
    for (int64_t i = 0; i < d; i += LANES, to += LANES)
      store(to, i + LANES <= d ? load(from + i) : load(from + i, d - i));
  }
}

// scores (count,) to e to the power of what they are above the highest so far, which grows; behind the last one there
// are up to LANES - 1 floats that may be overwritten. `total` becomes the sum with these weights. Returns what earlier
// weights are to be multiplied with.
inline float weigh(float* scores, int64_t count, float* highest, float* total) {
  if (count == 0) return 1.0f;
  for (int64_t j = count; j < padded(count); j++) scores[j] = -INFINITY;
  Vec highests = all(*highest);
  for (int64_t j = 0; j < count; j += LANES) highests = largest(highests, load(scores + j));
  const float before = *highest;
  *highest = largest(highests);
  Vec sums = zeros();
  for (int64_t j = 0; j < count; j += LANES) {
    const Vec weights = exponential(load(scores + j) - all(*highest));
    store(scores + j, weights);
    sums = sums + weights;
  }
  const float factor = expf(before - *highest);
  *total = *total * factor + sum(sums);
  return factor;
}

// query (rows, d), rows ldq apart, at most TOKENS of them, over keys and values (highest position + 1, d), rows ldc
// apart: each up to its position. To mixed (rows, padded(d)), behind which is the rest of the scratch memory.
template <typename C>
void attend_block(const float* query, int64_t ldq, int64_t rows, const int64_t* positions, const C* keys,
                  const C* values, int64_t ldc, int64_t d, float scale, float* mixed) {
  const int64_t width = padded(d);
  float* queries = mixed + TOKENS * width;
  float* highest = queries + TOKENS * width;
  float* totals = highest + padded(TOKENS);
  float* scores = totals + padded(TOKENS);
  float* panels = scores + GEMM_ROWS * KEYS;
  float* converted = panels + KEYS * width;
  int64_t used = 0;
  for (int64_t row = 0; row < rows; row++) {
    used = positions[row] + 1 > used ? positions[row] + 1 : used;
    highest[row] = -INFINITY;
    totals[row] = 0.0f;
    for (int64_t i = 0; i < width; i++) mixed[row * width + i] = 0.0f;
    for (int64_t i = 0; i < d; i++) queries[row * width + i] = query[row * ldq + i] * scale;
  }
  for (int64_t begin = 0; begin < used; begin += KEYS) {
    const int64_t count = lesser(KEYS, used - begin);
    transpose_keys(keys + begin * ldc, values + begin * ldc, ldc, count, used - begin - count, d, panels);
    convert_values(values + begin * ldc, ldc, count, d, converted);
    for (int64_t row = 0; row < rows; row += GEMM_ROWS) {
      const int64_t some = lesser<int64_t>(GEMM_ROWS, rows - row);
      // How many of these keys each row sees.
      int64_t seen[GEMM_ROWS], fewest = count, most = 0;
      for (int64_t r = 0; r < some; r++) {
        const int64_t left = positions[row + r] + 1 - begin;
        seen[r] = left < 0 ? 0 : lesser(left, count);
        fewest = lesser(fewest, seen[r]);
        most = seen[r] > most ? seen[r] : most;
      }
      if (most == 0) continue;
      multiply<false>(some, pieces_of(most, LANES), queries + row * width, width, panels, LANES, d * LANES, d, nullptr,
                     scores, KEYS);
      float factors[GEMM_ROWS];
      for (int64_t r = 0; r < some; r++)
        factors[r] = weigh(scores + r * KEYS, seen[r], highest + row + r, totals + row + r);
      multiply<true>(some, width / LANES, scores, KEYS, converted, width, LANES, fewest, factors, mixed + row * width,
                    width);
      // What some rows see and others do not: values may be infinite, which times 0 is no number.
      const float same = 1.0f;
      for (int64_t r = 0; r < some; r++)
        if (seen[r] > fewest)
          multiply<true>(1, width / LANES, scores + r * KEYS + fewest, KEYS, converted + fewest * width, width, LANES,
                        seen[r] - fewest, &same, mixed + (row + r) * width, width);
    }
  }
  for (int64_t row = 0; row < rows; row++)
    for (int64_t i = 0; i < width; i++) mixed[row * width + i] /= totals[row];
}

}  // namespace

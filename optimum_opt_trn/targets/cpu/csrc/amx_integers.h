// Sums of products of few rows with int8 weights in exact integers, as in int8_products.h, by Intel AMX: to the same bits.
//
// A tile of weights is 64 inputs of 16 outputs, loaded as they lie. The other one has the digits of x: a column is a digit
// of a row, and has four inputs in each of the tile's rows. One instruction adds the products of both to 16 x 16 sums.
#pragma once

#include "amx_tiles.h"
#include "int8_products.h"

#if defined(KERNELS_AVX512)

namespace {

constexpr int64_t DIGIT_COLUMNS = 16, DIGIT_TILE = TILE_ROWS * BYTES;
constexpr int MOST_DIGIT_TILES = 4;
// With fewer rows, vectors are as fast; with more, there are more tiles of sums than are kept.
constexpr int64_t LEAST_DIGIT_ROWS = 3, MOST_DIGIT_ROWS = MOST_DIGIT_TILES * DIGIT_COLUMNS / DIGITS;

inline bool takes_digit_tiles(int64_t m) { return m >= LEAST_DIGIT_ROWS && m <= MOST_DIGIT_ROWS; }

// Bytes of m rows of the inputs as integers, and of the tiles of their digits.
inline int64_t digit_tile_bytes(int64_t m, int64_t count, const Input* inputs) {
  const int64_t steps = digit_bytes(count, inputs) / (DIGITS * BYTES);
  return integer_bytes(m, count, inputs) + LINE + steps * pieces_of(m * DIGITS, DIGIT_COLUMNS) * DIGIT_TILE;
}

// Makes both, in `memory` of digit_tile_bytes. Of each step of 64 inputs there are as many tiles as the columns need.
inline const Integers* to_digit_tiles(int64_t m, int64_t count, const Input* inputs, void* memory) {
  Integers* made = to_integers(m, count, inputs, memory);
  float* tiles = vectors_from(static_cast<char*>(memory) + integer_bytes(m, count, inputs));
  made->tiles = reinterpret_cast<int8_t*>(tiles);
  for (const int8_t* step = made->digits; step < made->digits + made->stride; step += DIGITS * BYTES)
    for (int64_t first = 0; first < DIGITS * m; first += DIGIT_COLUMNS) {
      Vec columns[LANES];
      for (int64_t c = 0; c < DIGIT_COLUMNS; c++) {
        const int64_t row = (first + c) / DIGITS, digit = (first + c) % DIGITS;
        const int8_t* from = step + row * made->stride + digit * BYTES;
        columns[c] = row < m ? load(reinterpret_cast<const float*>(from)) : zeros();
      }
      transpose(columns);
      for (int64_t r = 0; r < TILE_ROWS; r++, tiles += LANES) store(tiles, columns[r]);
    }
  return made;
}

template <int C, int A, int B>
inline void multiply_digits() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Half of a vector of int32, exactly.
template <int HALF>
inline __m512d doubles(Vec v) {
  return _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(_mm512_castps_si512(v), HALF));
}

// The sum of three digits' sums, which is exact, times the scale of the row.
template <int HALF>
inline __m256 joined(Vec low, Vec middle, Vec high, double scale) {
  __m512d sum = _mm512_fmadd_pd(doubles<HALF>(middle), _mm512_set1_pd(256), doubles<HALF>(low));
  sum = _mm512_fmadd_pd(doubles<HALF>(high), _mm512_set1_pd(65536), sum);
  return _mm512_cvtpd_ps(_mm512_mul_pd(sum, _mm512_set1_pd(scale)));
}

// The products of m rows, whose columns fill TILES tiles, with `outputs` weight rows, at most 16, from `column` on; to
// sums (m, 16), rows of which are `width` apart.
template <int TILES>
inline void multiply_digit_tiles(const Integers& x, int64_t m, const Product& p, int64_t column, int64_t outputs,
                                 float* sums, int64_t width) {
  each<0, TILES>([&]<int I>() { zero_tile<I>(); });
  const int8_t* tiles = x.tiles;
  alignas(LINE) int8_t padded[DIGIT_TILE] = {};
  for (int64_t part = 0; part < p.count; part++) {
    const int64_t k = p.inputs[part].k, ldw = p.inputs[part].ldw;
    const int8_t* w = static_cast<const int8_t*>(p.inputs[part].w) + column * ldw;
    for (int64_t i = 0; i < k; i += BYTES, tiles += TILES * DIGIT_TILE) {
      if (k - i >= BYTES && outputs >= TILE_ROWS) {
        load_tile<MOST_DIGIT_TILES>(w + i, ldw);
      } else {  // digits beyond k are 0, and so what is left in `padded` does not count
        for (int64_t r = 0; r < lesser(outputs, TILE_ROWS); r++)
          memcpy(padded + r * BYTES, w + r * ldw + i, lesser(BYTES, k - i));
        load_tile<MOST_DIGIT_TILES>(padded, BYTES);
      }
      each<0, TILES>([&]<int I>() {
        load_tile<MOST_DIGIT_TILES + 1>(tiles + I * DIGIT_TILE, BYTES);
        multiply_digits<I, MOST_DIGIT_TILES, MOST_DIGIT_TILES + 1>();
      });
    }
  }
  alignas(LINE) float totals[TILES * SUMS_TILE];  // int32
  each<0, TILES>([&]<int I>() { store_tile<I>(totals + I * SUMS_TILE); });
  Vec of[TILES][LANES];  // of a column each
  for (int tile = 0; tile < TILES; tile++) {
    for (int64_t r = 0; r < TILE_ROWS; r++) of[tile][r] = load(totals + tile * SUMS_TILE + r * LANES);
    transpose(of[tile]);
  }
  for (int64_t row = 0; row < m; row++) {
    const Vec* digits = &of[0][0] + row * DIGITS;
    const double scale = x.rows[row].scale;
    _mm256_storeu_ps(sums + row * width, joined<0>(digits[0], digits[1], digits[2], scale));
    _mm256_storeu_ps(sums + row * width + LANES / 2, joined<1>(digits[0], digits[1], digits[2], scale));
  }
}

// Rows that cannot be integers are multiplied as they are.
inline void digit_tiles_piece(const void* given, int64_t number, float* scratch) {
  const ProductsCall& call = *static_cast<const ProductsCall*>(given);
  const Product& p = product_of(call, number);
  const PanelsPiece piece = panels_of(p, number);
  const Integers& x = *call.integers;
  begin_tiles();
  for (int64_t column = piece.first; column < piece.end; column += TILE_ROWS) {
    const int64_t outputs = piece.end - column;
    float* to = scratch + column - piece.first;
    switch (pieces_of(call.m * DIGITS, DIGIT_COLUMNS)) {
      case 1: multiply_digit_tiles<1>(x, call.m, p, column, outputs, to, piece.width); break;
      case 2: multiply_digit_tiles<2>(x, call.m, p, column, outputs, to, piece.width); break;
      case 3: multiply_digit_tiles<3>(x, call.m, p, column, outputs, to, piece.width); break;
      default: multiply_digit_tiles<4>(x, call.m, p, column, outputs, to, piece.width);
    }
  }
  end_tiles();
  for (int64_t row = 0; row < call.m; row++)
    if (isnan(x.rows[row].scale))
      dots<1, Int8>(1, p, row, piece.first, piece.end, 0, 1, scratch + row * piece.width);
}

inline void digit_tiles_commit(const void* given, int64_t number, const float* scratch) {
  const ProductsCall& call = *static_cast<const ProductsCall*>(given);
  const Product& p = product_of(call, number);
  panels_write<Int8>(p, panels_of(p, number), call.m, scratch);
}

inline uint64_t run_digit_tiles(Job* job, int threads, ProductsCall* call) {
  return pool_run(job, threads, divide(call, threads, {AMX_PANEL, 1, 2}), digit_tiles_piece, digit_tiles_commit);
}

}  // namespace

#else

namespace {

inline bool takes_digit_tiles(int64_t) { return false; }
inline int64_t digit_tile_bytes(int64_t, int64_t, const Input*) { return 0; }
inline const Integers* to_digit_tiles(int64_t, int64_t, const Input*, void*) { return nullptr; }
inline uint64_t run_digit_tiles(Job*, int, ProductsCall*) { return 0; }

}  // namespace

#endif

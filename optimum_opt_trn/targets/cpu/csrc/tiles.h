// The inner loop of a GEMM: some rows times some vectors of columns, whose sums stay in registers.
#pragma once

#include "common.h"

namespace {

// c (M, N vectors), times `factors` (M,) if ADDED and else 0, plus a (M, depth) times b (depth, N vectors). Rows of a
// and c are lda and ldc apart, those of b `by_row`, and the vectors of a row of b `by_vector`.
template <bool ADDED, int M, int N>
void multiply_tile(const float* a, int64_t lda, const float* b, int64_t by_row, int64_t by_vector, int64_t depth,
          const float* factors, float* c, int64_t ldc) {
  Vec totals[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < N; v++) totals[m][v] = ADDED ? load(c + m * ldc + v * LANES) * all(factors[m]) : zeros();
  for (int64_t i = 0; i < depth; i++) {
    Vec bs[N];
#pragma GCC unroll 8
    for (int v = 0; v < N; v++) bs[v] = load(b + i * by_row + v * by_vector);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const Vec as = all(a[m * lda + i]);
#pragma GCC unroll 8
      for (int v = 0; v < N; v++) totals[m][v] = multiply_add(as, bs[v], totals[m][v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < N; v++) store(c + m * ldc + v * LANES, totals[m][v]);
}

// The same with `rows` of a, at most M, and `vectors` of b, at most N.
template <bool ADDED, int M = GEMM_ROWS, int N = GEMM_VECTORS>
void multiply_few(int64_t rows, int64_t vectors, const float* a, int64_t lda, const float* b, int64_t by_row,
             int64_t by_vector, int64_t depth, const float* factors, float* c, int64_t ldc) {
  if constexpr (M > 1) {
    if (rows < M)
      return multiply_few<ADDED, M - 1, N>(rows, vectors, a, lda, b, by_row, by_vector, depth, factors, c, ldc);
  }
  if constexpr (N > 1) {
    if (vectors < N)
      return multiply_few<ADDED, M, N - 1>(rows, vectors, a, lda, b, by_row, by_vector, depth, factors, c, ldc);
  }
  multiply_tile<ADDED, M, N>(a, lda, b, by_row, by_vector, depth, factors, c, ldc);
}

// The same with up to GEMM_ROWS rows and any number of vectors, in tiles of nearly equal width.
template <bool ADDED>
inline void multiply(int64_t rows, int64_t vectors, const float* a, int64_t lda, const float* b, int64_t by_row,
                     int64_t by_vector, int64_t depth, const float* factors, float* c, int64_t ldc) {
  const int64_t width = pieces_of(vectors, pieces_of(vectors, GEMM_VECTORS));
  for (int64_t v = 0; v < vectors; v += width)
    multiply_few<ADDED>(rows, lesser(width, vectors - v), a, lda, b + v * by_vector, by_row, by_vector, depth, factors,
                   c + v * LANES, ldc);
}

}  // namespace

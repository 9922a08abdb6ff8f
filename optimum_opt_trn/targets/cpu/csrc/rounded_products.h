// Products whose factors are rounded to bfloat16, which AVX-512 BF16 multiplies two at a time: twice as many a second as
// float32 ones. Sums are float32. x is rounded once a call, and packed (panels.h): to whole vectors, with zeros at their
// end.
#pragma once

#include "panels.h"

#if defined(KERNELS_AVX512)

namespace {

// Factors of a vector.
constexpr int64_t PAIRED = 2 * LANES;
// So many rows of x at a time, and so many weight rows with M of them: their sums leave registers for the factors.
constexpr int ROUNDED_ROWS = 8;
constexpr int rounded_streams(int m) { return m <= 6 ? 4 : 3; }
constexpr int CODED_STREAMS = 3;  // if they are coded
// 6 times 4 is the fastest, but fewer blocks read the weights less often, which counts more where they are few.
constexpr int64_t rounded_blocks(int64_t m) { return pieces_of(m, m <= 2 * ROUNDED_ROWS ? ROUNDED_ROWS : 6); }
// Weights by output that bfloat16 holds exactly are multiplied as they lie with up to so many rows, and factors in them;
// all others in panels.
constexpr int64_t MOST_ROUNDED_DOTS = 24, MOST_DOT_FACTORS = MOST_ROUNDED_DOTS * 4096;
inline bool rounded_panels(Dtype dtype, int64_t m, bool by_unit, int64_t count, const Input* inputs) {
  bool many = m > MOST_ROUNDED_DOTS;
  for (int64_t i = 0; i < count; i++) many = many || m * inputs[i].k > MOST_DOT_FACTORS;
  return by_unit || (dtype != BFLOAT16 && dtype != INT8) || many;
}
// With fewer rows float32 is as fast: memory or rounding the weights is the limit.
constexpr int64_t least_rounded_rows(Dtype dtype) { return dtype == BFLOAT16 ? 4 : dtype == INT8 ? 5 : 12; }

// Units of a panel, and of one of coded weights (coded_panels.h).
constexpr int64_t ROUNDED_DEPTH = 256, DECODED_DEPTH = 128;

constexpr int64_t paired(int64_t k) { return pieces_of(k, PAIRED) * PAIRED; }

// The first `count` values, rounded, and zeros.
WITH_BF16 inline __m512i rounded(const BFloat16* from, int64_t count) {
  return _mm512_maskz_loadu_epi16(count < PAIRED ? (1u << count) - 1 : ~0u, from);
}
template <typename T>
WITH_BF16 inline __m512i rounded(const T* from, int64_t count) {
  const Vec low = load(from, lesser(LANES, count));
  return (__m512i)_mm512_cvtne2ps_pbh(count > LANES ? load(from + LANES, count - LANES) : zeros(), low);
}

// x, rounded and packed.
inline const BFloat16* rounded_x(const Input& input) { return reinterpret_cast<const BFloat16*>(input.x); }

// totals += the products of R weight rows with M rows of x, of `present` inputs from i on. Of AHEAD rows at `ahead` it
// asks for the same inputs.
template <int AHEAD, int R, int M, typename T>
WITH_BF16 __attribute__((always_inline)) inline void add_rounded(const T* w, int64_t ldw, const BFloat16* x, int64_t ldx,
                                                                 int64_t i, int64_t present, const T* ahead,
                                                                 Vec (&totals)[R][M]) {
  __m512bh weights[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) weights[r] = (__m512bh)rounded(w + r * ldw + i, present);
#pragma GCC unroll 8
  for (int r = 0; r < AHEAD; r++) __builtin_prefetch(ahead + r * ldw + i, 0, 1);
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    __m512i xs = _mm512_loadu_si512(x + m * ldx + i);
    asm("" : "+v"(xs));  // GCC would load it anew for each of its uses, and loads are the limit
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) totals[r][m] = _mm512_dpbf16_ps(totals[r][m], (__m512bh)xs, weights[r]);
  }
}

// As `dot`. AHEAD weight rows are asked for, which begin `first` rows further on.
template <int AHEAD, int R, int M, typename T>
WITH_BF16 inline void rounded_dot(const Product& p, int64_t row, int64_t column, int64_t first, float* sums) {
  Vec totals[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) totals[r][m] = zeros();
  for (int64_t part = 0; part < p.count; part++) {
    const Input& input = p.inputs[part];
    const int64_t k = input.k, ldx = paired(k), ldw = input.ldw;
    const BFloat16* x = rounded_x(input) + row * ldx;
    const T* w = static_cast<const T*>(input.w) + column * ldw;
    const T* ahead = w + first * ldw;
    int64_t i = 0;
    for (; i + PAIRED <= k; i += PAIRED) add_rounded<AHEAD, R, M, T>(w, ldw, x, ldx, i, PAIRED, ahead, totals);
    if (i < k) add_rounded<0, R, M, T>(w, ldw, x, ldx, i, k - i, ahead, totals);
  }
  store_totals(totals, sums);
}

// The products of outputs from `begin` to `end` with block `block` of the rows of x, of `blocks`. While one block after
// the other is multiplied, memory is to work as well: each asks for its part of the next piece's weights.
template <int M, typename T>
WITH_BF16 inline void rounded_dots(int64_t rows, const Product& p, int64_t row, int64_t begin, int64_t end,
                                   int64_t block, int64_t blocks, float* sums) {
  if constexpr (M > 1) {
    if (rows < M) return rounded_dots<M - 1, T>(rows, p, row, begin, end, block, blocks, sums);
  }
  constexpr int R = rounded_streams(M);
  const int64_t ahead = pieces_of(R, blocks), first = block * ahead;
  int64_t column = begin;
  for (; column + R <= end; column += R) {
    float* to = sums + column - begin;
    if (first >= R)
      rounded_dot<0, R, M, T>(p, row, column, 0, to);
    else if (ahead == 1)
      rounded_dot<1, R, M, T>(p, row, column, OUTPUTS + first, to);
    else if (ahead == 2)
      rounded_dot<2, R, M, T>(p, row, column, OUTPUTS + first, to);
    else
      rounded_dot<R, R, M, T>(p, row, column, R, to);
  }
  for (; column < end; column++) rounded_dot<0, 1, M, T>(p, row, column, 0, sums + column - begin);
}

template <typename T>
WITH_BF16 void rounded_piece(const void* given, int64_t piece, float* scratch) {
  const ProductsCall& call = *static_cast<const ProductsCall*>(given);
  const Product& p = product_of(call, piece);
  const int64_t begin = (piece - p.first_piece) * OUTPUTS, end = lesser(p.results.n, begin + OUTPUTS);
  const int64_t blocks = rounded_blocks(call.m), rows = pieces_of(call.m, blocks);  // as in few_rows_piece
  for (int64_t row = 0; row < call.m; row += rows)
    rounded_dots<ROUNDED_ROWS, T>(lesser(rows, call.m - row), p, row, begin, end, row / rows, blocks,
                               scratch + row * OUTPUTS);
}

// totals += the products of R rows of coded weights with M rows of x, of half H of the block from input i on. x has pairs
// as `decode` makes them. The next R rows are asked for.
template <int H, int R, int M>
WITH_BF16 __attribute__((always_inline)) inline void add_coded(const Coded* w, int64_t ldw, const BFloat16* x,
                                                               int64_t ldx, int64_t i, const Bytes (&tables)[R],
                                                               Vec (&totals)[R][M]) {
  const Coded* next = w + R * ldw + block_begin(i);
  Bytes weights[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    __builtin_prefetch(next + r * ldw + H * HALF, 0, 1);
    if constexpr (H == 1) __builtin_prefetch(next + r * ldw + CODED_BLOCK, 0, 1);
    decode<H, 0>(w + r * ldw, i, tables[r], weights[r]);
  }
#pragma GCC unroll 2
  for (int v = 0; v < 2; v++)
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      __m512i xs = _mm512_loadu_si512(x + m * ldx + i + H * HALF + v * PAIRED);
      asm("" : "+v"(xs));  // as in add_rounded
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
        totals[r][m] = _mm512_dpbf16_ps(totals[r][m], (__m512bh)xs, (__m512bh)weights[r][v]);
    }
}

template <int R, int M>
WITH_BF16 inline void rounded_coded_dot(const Product& p, int64_t column, float* sums) {
  Vec totals[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) totals[r][m] = zeros();
  for (int64_t part = 0; part < p.count; part++) {
    const Input& input = p.inputs[part];
    const Coded* w = static_cast<const Coded*>(input.w) + column * input.ldw;
    Bytes tables[R];
    for (int r = 0; r < R; r++) tables[r] = repeated(w + r * input.ldw);
    for (int64_t i = 0; i < input.k; i += CODED_BLOCK) {
      add_coded<0, R, M>(w, input.ldw, rounded_x(input), input.k, i, tables, totals);
      add_coded<1, R, M>(w, input.ldw, rounded_x(input), input.k, i, tables, totals);
    }
  }
  store_totals(totals, sums);
}

template <int M>
WITH_BF16 inline void rounded_coded_dots(int64_t rows, const Product& p, int64_t begin, int64_t end, float* sums) {
  if constexpr (M > 1) {
    if (rows < M) return rounded_coded_dots<M - 1>(rows, p, begin, end, sums);
  }
  constexpr int R = CODED_STREAMS;
  int64_t column = begin;
  for (; column + R <= end; column += R) rounded_coded_dot<R, M>(p, column, sums + column - begin);
  for (; column < end; column++) rounded_coded_dot<1, M>(p, column, sums + column - begin);
}

WITH_BF16 void rounded_coded_piece(const void* given, int64_t piece, float* scratch) {
  const ProductsCall& call = *static_cast<const ProductsCall*>(given);
  const Product& p = product_of(call, piece);
  const int64_t begin = (piece - p.first_piece) * OUTPUTS;
  rounded_coded_dots<ROUNDED_ROWS>(call.m, p, begin, lesser(p.results.n, begin + OUTPUTS), scratch);
}

// The weights of two units, rounded: those of the first in the even places, those of the second in the odd ones.
WITH_BF16 inline __m512i unit_pairs(const BFloat16* even, const BFloat16* odd, __m512i places) {
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(even));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd));
  return _mm512_permutexvar_epi16(places, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
}
template <typename T>
WITH_BF16 inline __m512i unit_pairs(const T* even, const T* odd, __m512i places) {
  return _mm512_permutexvar_epi16(places, (__m512i)_mm512_cvtne2ps_pbh(load(odd), load(even)));
}

// The lower half of a vector of 32 has the weights of one unit, the upper half those of the next; where each belongs.
WITH_BF16 inline __m512i unit_places() {
  alignas(64) uint16_t order[PAIRED];
  for (int i = 0; i < PAIRED; i++) order[i] = i / 2 + i % 2 * LANES;
  return _mm512_load_si512(order);
}

// As pack_units, but the weights of two units are neighbours, in the 32 bits of a lane: (units / 2, PANEL).
template <typename T>
WITH_BF16 void pack_rounded_units(const Panel<T>& panel) {
  const __m512i places = unit_places();
  for (int64_t i = 0; i < panel.units; i += 2)
    for (int64_t c = 0; c < PANEL; c += LANES) {
      const T* from = panel.w + i * panel.ldw + c;
      const int64_t width = c < panel.columns ? lesser(LANES, panel.columns - c) : 0;
      const Vec even = load(from, width), odd = i + 1 < panel.units ? load(from + panel.ldw, width) : zeros();
      _mm512_storeu_si512(panel.packed + i / 2 * PANEL + c,
                          _mm512_permutexvar_epi16(places, (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
    }
}

// The same by output.
template <typename T>
WITH_BF16 void pack_rounded_outputs(const Panel<T>& panel) {
  for (int64_t c = 0; c < PANEL; c += LANES)
    for (int64_t i = 0; i < panel.units; i += PAIRED) {
      const int64_t width = lesser(PAIRED, panel.units - i), height = panel.columns - c;
      const T* from = panel.w + c * panel.ldw + i;
      float* to = panel.packed + i / 2 * PANEL + c;
      Vec rows[LANES];
      if (width == PAIRED && height >= LANES) {
        for (int64_t r = 0; r < LANES; r++) rows[r] = _mm512_castsi512_ps(rounded(from + r * panel.ldw, PAIRED));
      } else {
        for (int64_t r = 0; r < LANES; r++)
          rows[r] = r < height ? _mm512_castsi512_ps(rounded(from + r * panel.ldw, width)) : zeros();
      }
      transpose(rows);
      for (int64_t l = 0; l < pieces_of(width, 2); l++) store(to + l * PANEL, rows[l]);
    }
}

// totals += the products of two units: of M rows of x, rows ldx apart, and V vectors of pairs of weights.
template <int M, int V>
WITH_BF16 __attribute__((always_inline)) inline void add_pairs(const BFloat16* x, int64_t ldx, const __m512i (&pairs)[V],
                                                               Vec (&totals)[M][V]) {
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    int32_t pair;
    memcpy(&pair, x + m * ldx, sizeof pair);
    const __m512bh xs = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) totals[m][v] = _mm512_dpbf16_ps(totals[m][v], xs, (__m512bh)pairs[v]);
  }
}

// As multiply_panel.
template <bool PACKED, int M, typename T>
WITH_BF16 void multiply_rounded(const Panel<T>& panel, const BFloat16* x, int64_t ldx, Ahead& next, float* sums,
                                int64_t ldy) {
  Vec totals[M][GEMM_VECTORS];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < GEMM_VECTORS; v++) totals[m][v] = zeros();
  Ahead ahead = next;
  float* packed = panel.packed;
  const T* w = panel.w;
  const int64_t ldw = panel.ldw, units = panel.units;
  const __m512i places = unit_places();
  for (int64_t i = 0; i < units; i += 2, packed += PANEL, w += 2 * ldw) {
    ahead.ask();
    __m512i weights[GEMM_VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < GEMM_VECTORS; v++) {
      weights[v] = PACKED ? _mm512_loadu_si512(packed + v * LANES)
                          : unit_pairs(w + v * LANES, w + ldw + v * LANES, places);
      if (!PACKED) _mm512_storeu_si512(packed + v * LANES, weights[v]);
    }
    add_pairs(x + i, ldx, weights, totals);
  }
  next = ahead;
  add_totals(totals, panel.starts, sums, ldy);
}

template <int M, typename T>
WITH_BF16 void multiply_rounded(int64_t rows, const Panel<T>& panel, const BFloat16* x, int64_t ldx, Ahead& next,
                                float* sums, int64_t ldy) {
  if constexpr (M > 1) {
    if (rows < M) return multiply_rounded<M - 1>(rows, panel, x, ldx, next, sums, ldy);
  }
  panel.is_packed ? multiply_rounded<true, M>(panel, x, ldx, next, sums, ldy)
                  : multiply_rounded<false, M>(panel, x, ldx, next, sums, ldy);
}

// As Float32Panels.
template <typename T>
struct RoundedPanels {
  static constexpr int64_t WIDTH = PANEL, DEPTH = ROUNDED_DEPTH;
  static constexpr int64_t STEP = 2, PASSES = 1, FLOATS = DEPTH * WIDTH / 2;
  static int64_t blocks(int64_t m) { return pieces_of(m, GEMM_ROWS); }
  WITH_BF16 static void pack_x(const float* x, int64_t units, int64_t m, int64_t begin, int64_t row, float* packed) {
    BFloat16* to = reinterpret_cast<BFloat16*>(packed) + begin * m + row * paired(units);
    for (int64_t i = 0; i < units; i += PAIRED) _mm512_storeu_si512(to + i, rounded(x + i, lesser(PAIRED, units - i)));
  }
  static int64_t x_bytes(int64_t units) { return paired(units) * sizeof(BFloat16); }
  static bool is_whole(const Panel<T>& panel) {
    return panel.by_unit && panel.columns == PANEL && panel.units % STEP == 0;
  }
  static void pack(const Panel<T>& panel) { panel.by_unit ? pack_rounded_units(panel) : pack_rounded_outputs(panel); }
  static void multiply(int64_t rows, const Panel<T>& panel, const ProductsCall& call, const Input& input, int64_t row,
                       int64_t begin, Ahead& next, float* sums, int64_t ldy) {
    const int64_t ldx = paired(panel.units);
    multiply_rounded<GEMM_ROWS>(rows, panel, rounded_x(input) + begin * call.m + row * ldx, ldx, next, sums, ldy);
  }
};

// x for coded weights.
struct CodedX {
  WITH_BF16 static void pack_x(const float* x, int64_t units, int64_t, int64_t, int64_t row, float* packed) {
    BFloat16* to = reinterpret_cast<BFloat16*>(packed) + row * units;
    const __m512i places = unit_places();
    for (int64_t i = 0; i < units; i += PAIRED)
      _mm512_storeu_si512(to + i, _mm512_permutexvar_epi16(
                                      places, (__m512i)_mm512_cvtne2ps_pbh(load(x + i + LANES), load(x + i))));
  }
};

// Whether the factors of these products are to be rounded.
inline bool rounds(Dtype dtype, int64_t m, bool by_unit) { return by_unit || m >= least_rounded_rows(dtype); }

// Units of x that are packed together: those of a panel, or all.
inline int64_t rounded_depth(bool coded, Dtype dtype, int64_t m, bool by_unit, int64_t count, const Input* inputs) {
  if (coded) return by_unit ? DECODED_DEPTH : INT32_MAX;
  return rounded_panels(dtype, m, by_unit, count, inputs) ? ROUNDED_DEPTH : INT32_MAX;
}

// Floats that m rounded rows of k take.
inline int64_t rounded_floats(int64_t m, int64_t k) { return m * paired(k) / 2; }

inline uint64_t run_rounded(bool coded, Job* job, int threads, Dtype dtype, int64_t inputs, ProductsCall* call) {
  if (coded) {
    run_first(job, threads, inputs, *call, pack_x_piece<CodedX>);
    return pool_run(job, threads, divide(call, threads), rounded_coded_piece, few_rows_commit<BFloat16>);
  }
  const Product& first = call->products[0];  // others have inputs of the same k
  if (!rounded_panels(dtype, call->m, first.by_unit, first.count, first.inputs)) {
    run_first(job, threads, inputs, *call, pack_x_piece<RoundedPanels<BFloat16>>);
    const int64_t pieces = divide(call, threads);
    return dtype == INT8 ? pool_run(job, threads, pieces, rounded_piece<Int8>, few_rows_commit<Int8>)
                         : pool_run(job, threads, pieces, rounded_piece<BFloat16>, few_rows_commit<BFloat16>);
  }
  return with_weight_dtype(dtype, [&]<typename T>(T*) {
    return run_panels<T, RoundedPanels<T>>(job, threads, inputs, call);
  });
}

}  // namespace

#else  // other instruction sets multiply in float32

namespace {

inline bool rounds(Dtype, int64_t, bool) { return false; }
constexpr int ROUNDED_ROWS = 0;
inline int64_t rounded_depth(bool, Dtype, int64_t, bool, int64_t, const Input*) { return 0; }
inline int64_t rounded_floats(int64_t, int64_t) { return 0; }
inline uint64_t run_rounded(bool, Job*, int, Dtype, int64_t, ProductsCall*) { return 0; }

}  // namespace

#endif

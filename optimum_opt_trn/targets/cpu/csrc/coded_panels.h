// Products of some rows with coded weights by unit (coded.h), by AVX-512 BF16. x is rounded, as in rounded_products.h. The
// weights of a panel (panels.h) are decoded for two units at a time, and kept for further rows.
#pragma once

#include "rounded_products.h"

#if defined(KERNELS_AVX512)

namespace {

static_assert(PARTS == 1);
// Rows that are multiplied with weights as they are decoded: of eight, the sums of half a decoded vector fit the
// registers, so that each is decoded twice, which is faster than to keep it.
constexpr int64_t MOST_DECODING_ROWS = 8;
// With more rows, so many go together, and weights are kept.
constexpr int64_t DECODED_ROWS = 6;
// Whether pairs of weights are decoded, decoded and kept, or were kept.
enum class Pairs { DECODED, KEPT, READ };

// Half H of the block from output `begin` on of two units' weights: of each, numbers of bfloat16 as `join` makes them.
template <int H>
WITH_BF16 __attribute__((always_inline)) inline void decode_units(const Coded* first, const Coded* second, int64_t begin,
                                                                  Bytes (&even)[2], Bytes (&odd)[2]) {
  const auto codes_of = [&](const Coded* row) __attribute__((always_inline)) {
    const Bytes both = load_bytes(row + block_begin(begin) + CODED_BLOCK);
    return H == 0 ? lower_codes(both) : upper_codes(both);
  };
  const Bytes codes = codes_of(first), more_codes = codes_of(second);
  Bytes high = look_up(repeated(first), codes), more_high = look_up(repeated(second), more_codes);
  if (__builtin_expect(any(codes, more_codes, OTHER), 0)) {
    high = with_others(first, begin + H * HALF, 0, codes, high);
    more_high = with_others(second, begin + H * HALF, 0, more_codes, more_high);
  }
  join(load_bytes(first + block_begin(begin) + H * HALF), high, even);
  join(load_bytes(second + block_begin(begin) + H * HALF), more_high, odd);
}

// sums (M, CODED_BLOCK), rows ldy apart, += x (M, units), rows ldx apart, times the panel's outputs of half H: those that
// V vectors have from quarter Q on.
template <Pairs P, int H, int Q, int V, int M>
WITH_BF16 void multiply_pairs(const Panel<Coded>& panel, const BFloat16* x, int64_t ldx, Ahead& next, float* sums,
                              int64_t ldy) {
  Vec totals[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) totals[m][v] = zeros();
  Ahead ahead = next;
  // Each call that decodes asks for another line of the next units; the last one asks for their heads.
  constexpr int64_t LINE_OF_BLOCK = Q == 0 ? H * HALF : CODED_BLOCK;
  const char* line = H == 1 && Q == 1 ? panel.next_head : panel.next + LINE_OF_BLOCK;
  float* kept = panel.packed + H * HALF;
  const Coded* w = panel.w;
  const int64_t ldw = panel.ldw, units = panel.units, column = panel.column;
  for (int64_t i = 0; i < units; i += 2, kept += CODED_BLOCK, w += 2 * ldw) {
    Bytes pairs[V];
    if constexpr (P == Pairs::DECODED) {
      __builtin_prefetch(line, 0, 2);
      __builtin_prefetch(line + ldw, 0, 2);
      line += 2 * ldw;
    } else {
      ahead.ask();
    }
    if constexpr (P == Pairs::READ) {
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) pairs[v] = load_bytes(kept + v * LANES);
    } else {
      Bytes even[2], odd[2];
      decode_units<H>(w, w + ldw, column, even, odd);
#pragma GCC unroll 8
      for (int v = 0; v < V; v += 2) {
        pairs[v] = _mm512_unpacklo_epi16(even[Q + v / 2], odd[Q + v / 2]);
        pairs[v + 1] = _mm512_unpackhi_epi16(even[Q + v / 2], odd[Q + v / 2]);
      }
      if constexpr (P == Pairs::KEPT)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) store_bytes(kept + v * LANES, pairs[v]);
    }
    add_pairs(x + i, ldx, pairs, totals);
  }
  next = ahead;
  // Two neighbours have the sums of every other output of two vectors (place_of in coded_format.h).
  Vec ordered[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v += 2) {
      ordered[m][v] = _mm512_shuffle_ps(totals[m][v], totals[m][v + 1], 0x88);
      ordered[m][v + 1] = _mm512_shuffle_ps(totals[m][v], totals[m][v + 1], 0xdd);
    }
  add_totals(ordered, panel.starts, sums + H * HALF + Q * HALF / 2, ldy);
}

template <int M>
WITH_BF16 void multiply_decoding(int64_t rows, const Panel<Coded>& panel, const BFloat16* x, int64_t ldx, Ahead& next,
                                 float* sums, int64_t ldy) {
  if constexpr (M > 1) {
    if (rows < M) return multiply_decoding<M - 1>(rows, panel, x, ldx, next, sums, ldy);
  }
  multiply_pairs<Pairs::DECODED, 0, 0, 2, M>(panel, x, ldx, next, sums, ldy);
  multiply_pairs<Pairs::DECODED, 0, 1, 2, M>(panel, x, ldx, next, sums, ldy);
  multiply_pairs<Pairs::DECODED, 1, 0, 2, M>(panel, x, ldx, next, sums, ldy);
  multiply_pairs<Pairs::DECODED, 1, 1, 2, M>(panel, x, ldx, next, sums, ldy);
}

template <int M>
WITH_BF16 void multiply_decoded(int64_t rows, const Panel<Coded>& panel, const BFloat16* x, int64_t ldx, Ahead& next,
                                float* sums, int64_t ldy) {
  if constexpr (M > 1) {
    if (rows < M) return multiply_decoded<M - 1>(rows, panel, x, ldx, next, sums, ldy);
  }
  if (panel.is_packed) {
    multiply_pairs<Pairs::READ, 0, 0, 4, M>(panel, x, ldx, next, sums, ldy);
    multiply_pairs<Pairs::READ, 1, 0, 4, M>(panel, x, ldx, next, sums, ldy);
  } else {
    multiply_pairs<Pairs::KEPT, 0, 0, 4, M>(panel, x, ldx, next, sums, ldy);
    multiply_pairs<Pairs::KEPT, 1, 0, 4, M>(panel, x, ldx, next, sums, ldy);
  }
}

// As Float32Panels (panels.h), of an even number of units.
struct CodedPanels {
  static constexpr int64_t WIDTH = CODED_BLOCK, DEPTH = DECODED_DEPTH;
  static constexpr int64_t STEP = 2, PASSES = 2, FLOATS = DEPTH * WIDTH / 2;
  static int64_t blocks(int64_t m) { return m <= MOST_DECODING_ROWS ? 1 : pieces_of(m, DECODED_ROWS); }
  static int64_t x_bytes(int64_t units) { return paired(units) * sizeof(BFloat16); }
  static bool is_whole(const Panel<Coded>&) { return true; }
  static void pack(const Panel<Coded>&) {}
  static void multiply(int64_t rows, const Panel<Coded>& panel, const ProductsCall& call, const Input& input, int64_t row,
                       int64_t begin, Ahead& next, float* sums, int64_t ldy) {
    const int64_t ldx = paired(panel.units);
    const BFloat16* x = rounded_x(input) + begin * call.m + row * ldx;
    if (call.m <= MOST_DECODING_ROWS)
      multiply_decoding<MOST_DECODING_ROWS>(rows, panel, x, ldx, next, sums, ldy);
    else
      multiply_decoded<DECODED_ROWS>(rows, panel, x, ldx, next, sums, ldy);
  }
};

// Whether inputs can be multiplied so.
inline bool takes_coded_panels(int64_t count, const Input* inputs) {
  for (int64_t i = 0; i < count; i++)
    if (inputs[i].k % CodedPanels::STEP != 0) return false;
  return true;
}

inline uint64_t run_coded_panels(Job* job, int threads, int64_t inputs, ProductsCall* call) {
  run_first(job, threads, inputs, *call, pack_x_piece<RoundedPanels<BFloat16>>);
  return pool_run(job, threads, divide(call, threads, in_panels(CodedPanels::WIDTH, call->m)),
                  panels_piece<Coded, CodedPanels>, panels_commit<Coded, CodedPanels>);
}

}  // namespace

#else

namespace {

inline bool takes_coded_panels(int64_t, const Input*) { return false; }
inline uint64_t run_coded_panels(Job*, int, int64_t, ProductsCall*) { return 0; }

}  // namespace

#endif

// Sums of products of few rows with int8 weights in exact integers, by AVX-512 VNNI.
//
// A row of x becomes integers of 24 bits, by one scale for the row. An integer is three digits to the base 256, from
// -128 to 127 each, so that it is as exact beside the row's largest as a float32 is. VPDPBUSD adds to each int32 the
// products of four unsigned bytes with four signed ones. Flipping the highest bit of a weight makes it unsigned, 128
// larger, and 128 times the sum of the row's integers is taken from the result. Only that is rounded, so that it
// depends neither on the order of sums nor on the other rows.
#pragma once

#include <float.h>

#include "products.h"

#if defined(KERNELS_AVX512)

namespace {

// Inputs that are added at a time.
constexpr int64_t BYTES = 64;
constexpr int DIGITS = 3;
// The largest number of a row becomes this: below 127 * (256^2 + 256 + 1), beyond which the highest digit could be 128.
constexpr float LARGEST = 8.355e6f;
// The least that it can be: LARGEST divided by less than a quarter of 1e-31 is infinite.
constexpr float LEAST = 1e-30f;
// With so many inputs at most no int32 overflows: a weight is below 256 there, a digit at most 128.
constexpr int64_t MOST_INPUTS = 65536;
static_assert(255 * 128 * MOST_INPUTS <= INT32_MAX);
// With more rows panels of float32 are faster.
constexpr int64_t MOST_INTEGER_ROWS = 192;

struct IntegerRow {
  double scale;    // NaN: the row cannot be made integers, whose digits are 0
  int64_t excess;  // 128 times the sum of the integers
};

struct Integers {
  const IntegerRow* rows;
  const int8_t* digits;  // of each row: of BYTES inputs the lowest digits, then the middle ones, then the highest
  int64_t stride;        // bytes of a row
  const int8_t* tiles;   // amx_integers.h
};

// Bytes of the digits of a row of the inputs.
inline int64_t digit_bytes(int64_t count, const Input* inputs) {
  int64_t bytes = 0;
  for (int64_t part = 0; part < count; part++) bytes += pieces_of(inputs[part].k, BYTES) * BYTES * DIGITS;
  return bytes;
}

// Bytes of m rows of the inputs as integers, or 0 if they have to stay as they are.
inline int64_t integer_bytes(int64_t m, int64_t count, const Input* inputs) {
  int64_t depth = 0;
  for (int64_t part = 0; part < count; part++) depth += inputs[part].k;
  if (m > MOST_INTEGER_ROWS || depth > MOST_INPUTS) return 0;
  return sizeof(Integers) + LINE + m * (digit_bytes(count, inputs) + sizeof(IntegerRow));
}

// Which of the inputs [i, i + BYTES) there are of k, a bit each.
inline uint64_t present(int64_t i, int64_t k) {
  return k - i >= BYTES ? ~uint64_t{0} : (uint64_t{1} << (k - i)) - 1;
}

// Makes integers of one row of the inputs.
inline IntegerRow to_integers(int64_t count, const Input* inputs, int64_t row, int8_t* digits) {
  // As integers, magnitudes have the order of the numbers; infinity and NaN are the largest.
  __m512i most = _mm512_setzero_si512();
  for (int64_t part = 0; part < count; part++) {
    const int64_t k = inputs[part].k;
    const float* x = inputs[part].x + row * k;
    for (int64_t i = 0; i < k; i += LANES) {
      const __mmask16 mask = static_cast<__mmask16>(present(i, k));
      most = _mm512_max_epi32(most, _mm512_castps_si512(_mm512_abs_ps(_mm512_maskz_loadu_ps(mask, x + i))));
    }
  }
  const int32_t bits = _mm512_reduce_max_epi32(most);
  float largest;
  memcpy(&largest, &bits, sizeof largest);
  const bool zero = largest == 0.0f, fits = zero || (largest >= LEAST && largest <= FLT_MAX);
  const float factor = fits && !zero ? LARGEST / largest : 0.0f;
  const __m512i middle = _mm512_set1_epi32(0x808080);
  __m512i sums = _mm512_setzero_si512();
  for (int64_t part = 0; part < count; part++) {
    const int64_t k = inputs[part].k;
    const float* x = inputs[part].x + row * k;
    for (int64_t i = 0; i < k; i += BYTES, digits += DIGITS * BYTES) {
      const uint64_t there = fits ? present(i, k) : 0;
      __m512i sum = _mm512_setzero_si512();
      for (int64_t j = 0; j < BYTES; j += LANES) {
        const __mmask16 mask = static_cast<__mmask16>(there >> j);
        const __m512i integers = _mm512_cvtps_epi32(_mm512_maskz_loadu_ps(mask, x + i + j) * all(factor));
        sum = _mm512_add_epi32(sum, integers);
        // Adding 128 to each digit carries; flipping the highest bits takes it away again.
        __m512i bytes = _mm512_xor_si512(_mm512_add_epi32(integers, middle), middle);
        for (int digit = 0; digit < DIGITS; digit++, bytes = _mm512_srli_epi32(bytes, 8))
          _mm_storeu_si128(reinterpret_cast<__m128i*>(digits + digit * BYTES + j), _mm512_cvtepi32_epi8(bytes));
      }
      sums = _mm512_add_epi64(sums, _mm512_cvtepi32_epi64(_mm512_castsi512_si256(sum)));
      sums = _mm512_add_epi64(sums, _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(sum, 1)));
    }
  }
  return {fits ? (zero ? 0.0 : 1.0 / factor) : NAN, 128 * _mm512_reduce_add_epi64(sums)};
}

// Makes integers of m rows of the inputs, in `memory` of integer_bytes.
inline Integers* to_integers(int64_t m, int64_t count, const Input* inputs, void* memory) {
  Integers* made = static_cast<Integers*>(memory);
  int8_t* digits = reinterpret_cast<int8_t*>(vectors_from(made + 1));
  const int64_t stride = digit_bytes(count, inputs);
  IntegerRow* rows = reinterpret_cast<IntegerRow*>(digits + m * stride);
  for (int64_t row = 0; row < m; row++) rows[row] = to_integers(count, inputs, row, digits + row * stride);
  *made = {rows, digits, stride, nullptr};
  return made;
}

// The sum of each of four vectors.
inline __m256d sums_of(const __m512i* v) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
  const __m512i abcd = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64(abcd, 1));
  return _mm256_cvtepi32_pd(_mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}

// Sums are made SUMS at a time, in so many places.
constexpr int SUMS = 4;
constexpr int places(int sums) { return (sums + SUMS - 1) / SUMS * SUMS; }

// R rows of weights, and where to ask for others meanwhile.
template <int R>
struct WeightRows {
  const int8_t *rows[R], *next[R];
};

// Adds to sums (M, R), in their places, the products of k weights of each row with M rows of digits, `stride` apart; k
// is a multiple of BYTES. GCC 12 keeps all totals in registers in this form: loops that are not nested, and totals
// stored before they are added up.
template <int R, int M>
__attribute__((target("avx512vnni"))) inline void add_products(int64_t k, const WeightRows<R>& w, const int8_t* digits,
                                                               int64_t stride, double* sums) {
  const __m512i highest = _mm512_set1_epi8(-128);
  __m512i low[M * R], middle[M * R], high[M * R];
#pragma GCC unroll 8
  for (int t = 0; t < M * R; t++) low[t] = middle[t] = high[t] = _mm512_setzero_si512();
  for (int64_t i = 0; i < k; i += BYTES, digits += DIGITS * BYTES) {
    __m512i weights[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      weights[r] = _mm512_xor_si512(_mm512_loadu_si512(w.rows[r] + i), highest);
      // Asked for again where it was asked for a little before, more of them come in time.
      __builtin_prefetch(w.next[r] + i, 0, 1);
      __builtin_prefetch(w.next[r] + i - 2 * BYTES, 0, 1);
    }
#pragma GCC unroll 8
    for (int t = 0; t < M * R; t++) {
      const __m512i* x = reinterpret_cast<const __m512i*>(digits + t / R * stride);
      low[t] = _mm512_dpbusd_epi32(low[t], weights[t % R], x[0]);
      middle[t] = _mm512_dpbusd_epi32(middle[t], weights[t % R], x[1]);
      high[t] = _mm512_dpbusd_epi32(high[t], weights[t % R], x[2]);
    }
  }
  __m512i stored[DIGITS][places(M * R)] = {};
#pragma GCC unroll 8
  for (int t = 0; t < M * R; t++) {
    stored[0][t] = low[t];
    stored[1][t] = middle[t];
    stored[2][t] = high[t];
  }
  for (int t = 0; t < M * R; t += SUMS) {
    __m256d sum = _mm256_add_pd(_mm256_loadu_pd(sums + t), sums_of(stored[0] + t));
    sum = _mm256_fmadd_pd(sums_of(stored[1] + t), _mm256_set1_pd(256), sum);
    _mm256_storeu_pd(sums + t, _mm256_fmadd_pd(sums_of(stored[2] + t), _mm256_set1_pd(65536), sum));
  }
}

// The products of M rows of x, from `row` on, with `there` weight rows, at most R, from `column` on; to y, rows of
// which are `ldy` apart. Asks for the weight rows behind them: each of `passes` calls with the same weights for its part
// of them.
template <int R, int M>
inline void multiply_digits(const Integers& x, int64_t row, int64_t count, const Input* inputs, int64_t column,
                            int64_t there, int64_t pass, int64_t passes, float* y, int64_t ldy) {
  double sums[places(M * R)];  // exact, below 2^53
  for (int i = 0; i < places(M * R); i++) sums[i] = i < M * R ? -static_cast<double>(x.rows[row + i / R].excess) : 0.0;
  const int8_t* digits = x.digits + row * x.stride;
  for (int64_t part = 0; part < count; part++) {
    const int64_t ldw = inputs[part].ldw, rest = inputs[part].k % BYTES, whole = inputs[part].k - rest;
    WeightRows<R> w;
    for (int64_t r = 0; r < R; r++) {
      w.rows[r] = static_cast<const int8_t*>(inputs[part].w) + (column + lesser(r, there - 1)) * ldw;
      w.next[r] = r % passes == pass ? w.rows[r] + R * ldw : w.rows[r];
    }
    add_products<R, M>(whole, w, digits, x.stride, sums);
    digits += whole * DIGITS;
    if (rest == 0) continue;
    int8_t padded[R][BYTES] = {};
    for (int r = 0; r < R; r++) {
      memcpy(padded[r], w.rows[r] + whole, rest);
      w.rows[r] = w.next[r] = padded[r];
    }
    add_products<R, M>(BYTES, w, digits, x.stride, sums);
    digits += BYTES * DIGITS;
  }
  for (int64_t i = 0; i < M * R; i++)
    if (i % R < there) y[i / R * ldy + i % R] = static_cast<float>(sums[i] * x.rows[row + i / R].scale);
}

// The products of m rows of x, M at a time, with the weight rows [begin, end), R at a time; to y, rows of which are
// `ldy` apart.
template <int R, int M>
inline void multiply_all_digits(const Integers& x, int64_t m, int64_t count, const Input* inputs, int64_t begin,
                                int64_t end, float* y, int64_t ldy) {
  const int64_t passes = pieces_of(m, M);
  for (int64_t column = begin; column < end; column += R)
    for (int64_t pass = 0; pass < passes; pass++) {
      const int64_t row = pass * M, there = lesser<int64_t>(R, end - column);
      float* to = y + row * ldy + column - begin;
      if (row + M <= m)
        multiply_digits<R, M>(x, row, count, inputs, column, there, pass, passes, to, ldy);
      else
        multiply_digits<R, 1>(x, row, count, inputs, column, there, pass, passes, to, ldy);
    }
}

// The same, as it is fastest: three weight rows are read fastest, and four at a time take least arithmetic.
inline void multiply_integers(const Integers& x, int64_t m, int64_t count, const Input* inputs, int64_t begin,
                              int64_t end, float* y, int64_t ldy) {
  if (m == 1) return multiply_all_digits<3, 1>(x, m, count, inputs, begin, end, y, ldy);
  if (m == 2) return multiply_all_digits<3, 2>(x, m, count, inputs, begin, end, y, ldy);
  multiply_all_digits<4, 2>(x, m, count, inputs, begin, end, y, ldy);
}

// Rows that cannot be integers are multiplied as they are.
inline void integers_piece(const void* given, int64_t piece, float* scratch) {
  const ProductsCall& call = *static_cast<const ProductsCall*>(given);
  const Product& p = product_of(call, piece);
  const int64_t begin = (piece - p.first_piece) * OUTPUTS, end = lesser(p.results.n, begin + OUTPUTS);
  multiply_integers(*call.integers, call.m, p.count, p.inputs, begin, end, scratch, OUTPUTS);
  for (int64_t row = 0; row < call.m; row++)
    if (isnan(call.integers->rows[row].scale)) dots<1, Int8>(1, p, row, begin, end, 0, 1, scratch + row * OUTPUTS);
}

inline uint64_t run_integers(Job* job, int threads, ProductsCall* call, int64_t pieces) {
  return pool_run(job, threads, pieces, integers_piece, few_rows_commit<Int8>);
}

}  // namespace

#else

namespace {

inline int64_t integer_bytes(int64_t, int64_t, const Input*) { return 0; }
inline Integers* to_integers(int64_t, int64_t, const Input*, void*) { return nullptr; }
inline void integers_piece(const void*, int64_t, float*) {}
inline uint64_t run_integers(Job*, int, ProductsCall*, int64_t) { return 0; }

}  // namespace

#endif

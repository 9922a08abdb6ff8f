// Products of more rows by Intel AMX, which multiplies tiles of bfloat16 and sums them in float32.
//
// A tile is 16 rows of 32 factors. One instruction adds to 16 x 16 sums the products of two tiles, of 16 rows and 16
// columns, 16 times as many a cycle as float32 vectors do. A float32 is the sum of three bfloat16 numbers, its parts: the
// nearest to it, the nearest to what is left, and so on. A float16 has two parts, its upper 8 bits and the others; a
// bfloat16 and an int8 one. Products of parts i and j, from 0, are left out if i + j > 2: of a float32 and a float16 they
// are below 2^-24 of the whole, as the parts are below 2^-9 and 2^-17 of the float32 and 2^-7 of the float16. What is left
// is as exact as a product of float32 (Henry, Tang, Heinecke, "Leveraging the bfloat16 artificial intelligence datatype
// for higher-precision computations", 2019). If factors may be rounded, the first part alone is taken, to the nearest.
// Sums with factors that are infinite or NaN are not finite, but not always the same as in float32; they are computed anew.
//
// Weights by output are the first factor of the instruction and x is the second; sums are then (outputs, rows). By unit
// it is the other way round. The second factor has its inputs in pairs, along a tile's row. Pairs are the inputs i and
// i + 16 of 32, in both factors, so that they need no permutation; but neighbours where weights are bfloat16 by output,
// whose tiles are loaded as they lie.
#pragma once

#include "panels.h"

#if defined(KERNELS_AVX512)

namespace {

// Rows of a tile, its factors in a row, and all of them.
constexpr int64_t TILE_ROWS = 16, TILE_DEPTH = 32, TILE = TILE_ROWS * TILE_DEPTH;
constexpr int64_t SUMS_TILE = TILE_ROWS * TILE_ROWS;
// Outputs of a panel of weights, and its units: half of it fits the first-level cache beside what it is multiplied with.
constexpr int64_t AMX_PANEL = 4 * TILE_ROWS;
constexpr int64_t amx_depth(bool rounded) { return rounded ? 256 : 128; }
constexpr int MOST_PARTS = 3;
// So many rows of tiles are few enough for memory to be the limit: how weights are read counts more than how they are
// multiplied.
constexpr int64_t FEW_TILES = 4;

// The parts of factors of type T.
template <typename T>
constexpr int parts_of(bool rounded) {
  return rounded ? 1 : sizeof(T) == 4 ? 3 : 1;
}
template <>
constexpr int parts_of<Half>(bool rounded) {
  return rounded ? 1 : 2;
}

// Calls f<I>() to f<N - 1>().
template <int I, int N, typename F>
__attribute__((always_inline)) inline void each(const F& f) {
  if constexpr (I < N) {
    f.template operator()<I>();
    each<I + 1, N>(f);
  }
}

template <int C>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(C));
}
template <int C>
inline void load_tile(const void* from, int64_t stride = LINE) {  // of bytes from row to row
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(C) : "memory");
}
template <int C>
inline void store_tile(float* to) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(LINE), "i"(C) : "memory");
}
template <int C, int A, int B>
inline void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// All eight tiles have 16 rows of 64 bytes.
inline void begin_tiles() {
  struct alignas(64) {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } config = {1, 0, {}, {}, {}};
  for (int i = 0; i < 8; i++) {
    config.bytes[i] = LINE;
    config.rows[i] = TILE_ROWS;
  }
  asm volatile("ldtilecfg %0" ::"m"(config));
}
inline void end_tiles() { asm volatile("tilerelease"); }

// The upper halves of the lanes of two vectors: those of the first in the lower halves of the result's.
inline Vec upper_halves(Vec first, Vec second) {
  return _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(_mm512_castps_si512(first), 16),
                                                     _mm512_castps_si512(second)));
}
// The first part: what a bfloat16 has of it, or the nearest bfloat16.
inline Vec upper_of(Vec v) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0xffff0000)));
}
WITH_BF16 inline Vec nearest_to(Vec v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(v)), 16));
}

// The parts of two vectors of factors of type T. Parts of a float32 are rounded, so that what is left is small.
template <typename T, bool ROUNDED>
WITH_BF16 inline void split_pair(Vec first, Vec second, Vec* parts) {
  constexpr int PARTS = parts_of<T>(ROUNDED);
  constexpr bool NEAREST = sizeof(T) == 4 || (ROUNDED && __is_same(T, Half));
  for (int part = 0; part < PARTS; part++) {
    const Vec upper = NEAREST ? nearest_to(first) : upper_of(first);
    const Vec other = NEAREST ? nearest_to(second) : upper_of(second);
    parts[part] = upper_halves(upper, other);
    first = first - upper;
    second = second - other;
  }
}

// Up to 16 values; zeros beyond `count`, which may be negative.
template <typename T>
inline Vec load_some(const T* from, int64_t count) {
  return count >= LANES ? load(from) : count > 0 ? load(from, count) : zeros();
}

// Where a panel of weights is made of those at w, rows ldw apart. Its tiles are (4, steps, parts); of a row of tiles, 16
// rows of outputs, or of pairs of units.
template <typename T>
struct AmxPanel {
  const T* w;
  int64_t ldw, units, columns;
  BFloat16* tiles;
};

// Whether pairs of inputs are neighbours.
template <typename T>
constexpr bool pairs_neighbours(bool by_unit) {
  return __is_same(T, BFloat16) && !by_unit;
}

// Makes the tiles of COUNT times 16 outputs from `first` on, of one step.
template <typename T, bool ROUNDED, bool BY_UNIT, int COUNT>
WITH_BF16 inline void pack_tiles(const AmxPanel<T>& panel, int64_t first, int64_t step) {
  constexpr int PARTS = parts_of<T>(ROUNDED);
  const int64_t stride = pieces_of(panel.units, TILE_DEPTH) * PARTS * TILE, i = step * TILE_DEPTH;
  BFloat16* tiles = panel.tiles + first / TILE_ROWS * stride + step * PARTS * TILE;
  const int64_t units = panel.units - i, columns = panel.columns - first;
  const T* w = panel.w + (BY_UNIT ? i * panel.ldw + first : first * panel.ldw + i);
  if constexpr (pairs_neighbours<T>(BY_UNIT)) {
    const __mmask32 there = units < TILE_DEPTH ? (1u << units) - 1 : ~0u;
    for (int64_t r = 0; r < COUNT * TILE_ROWS; r++, w += panel.ldw)
      _mm512_storeu_si512(tiles + r / TILE_ROWS * stride + r % TILE_ROWS * TILE_DEPTH,
                          _mm512_maskz_loadu_epi16(r < columns ? there : 0, w));
    return;
  }
  const auto put = [&](int64_t o, int64_t r, Vec low, Vec high) WITH_BF16 {
    Vec parts[PARTS];
    split_pair<T, ROUNDED>(low, high, parts);
    for (int part = 0; part < PARTS; part++)
      store(reinterpret_cast<float*>(tiles + o * stride + part * TILE + r * TILE_DEPTH), parts[part]);
  };
  if (units >= TILE_DEPTH && columns >= COUNT * TILE_ROWS) {
    for (int64_t r = 0; r < (BY_UNIT ? 1 : COUNT) * TILE_ROWS; r++, w += panel.ldw)
      for (int64_t o = 0; o < (BY_UNIT ? COUNT : 1); o++) {
        if (BY_UNIT)
          put(o, r, load(w + o * TILE_ROWS), load(w + LANES * panel.ldw + o * TILE_ROWS));
        else
          put(r / TILE_ROWS, r % TILE_ROWS, load(w), load(w + LANES));
      }
    return;
  }
  for (int64_t o = 0; o < COUNT; o++)
    for (int64_t r = 0; r < TILE_ROWS; r++) {
      Vec low = zeros(), high = zeros();
      const int64_t output = o * TILE_ROWS + (BY_UNIT ? 0 : r);
      if (BY_UNIT) {
        if (r < units) low = load_some(w + r * panel.ldw + output, columns - output);
        if (r + LANES < units) high = load_some(w + (r + LANES) * panel.ldw + output, columns - output);
      } else if (output < columns) {
        low = load_some(w + output * panel.ldw, units);
        high = load_some(w + output * panel.ldw + LANES, units - LANES);
      }
      put(o, r, low, high);
    }
}

// The places of pairs of neighbours in a vector of pairs i and i + 16.
inline __m512i neighbours() {
  alignas(LINE) uint16_t order[TILE_DEPTH];
  for (int i = 0; i < TILE_DEPTH; i++) order[i] = i % TILE_ROWS * 2 + i / TILE_ROWS;
  return _mm512_load_si512(order);
}

// The tiles of up to 16 rows of `units` inputs of x, rows ldx apart: (steps, parts). `pairs`: of neighbours.
template <bool ROUNDED>
WITH_BF16 void split_rows(const float* x, int64_t rows, int64_t units, int64_t ldx, bool by_unit, bool pairs,
                          BFloat16* tiles) {
  constexpr int PARTS = parts_of<float>(ROUNDED);
  const __m512i order = neighbours();
  for (int64_t i = 0; i < units; i += TILE_DEPTH, tiles += PARTS * TILE) {
    Vec parts[TILE_ROWS][PARTS];
    for (int64_t r = 0; r < TILE_ROWS; r++) {
      const float* from = x + r * ldx + i;
      split_pair<float, ROUNDED>(r < rows ? load_some(from, units - i) : zeros(),
                                 r < rows ? load_some(from + LANES, units - i - LANES) : zeros(), parts[r]);
    }
    for (int part = 0; part < PARTS; part++) {
      Vec tile[LANES];
      for (int64_t r = 0; r < TILE_ROWS; r++) {
        const __m512i as_made = _mm512_castps_si512(parts[r][part]);
        tile[r] = pairs ? _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, as_made)) : parts[r][part];
      }
      if (!by_unit) transpose(tile);  // x is the second factor then
      for (int64_t r = 0; r < TILE_ROWS; r++)
        store(reinterpret_cast<float*>(tiles + part * TILE + r * TILE_DEPTH), tile[r]);
    }
  }
}

// Four tiles of sums that are still to be added to others: those of the first two are side by side, and so are the others,
// `apart` from them.
struct Added {
  float *tiles, *sums;
  int64_t apart;

  void add() const {
    if (sums == nullptr) return;
    for (int64_t tile = 0; tile < 4; tile++) {
      const float* from = tiles + tile * SUMS_TILE;
      float* to = sums + tile / 2 * apart + tile % 2 * SUMS_TILE;
#pragma GCC unroll 4
      for (int64_t i = 0; i < SUMS_TILE; i += LANES) store(to + i, load(to + i) + load(from + i));
    }
  }
};

template <bool BY_UNIT, int C, int W, int X>
inline void multiply_factors() {
  if constexpr (BY_UNIT)
    multiply_tiles<C, X, W>();
  else
    multiply_tiles<C, W, X>();
}

// What is asked for while tiles are multiplied, the weights and inputs that come next; and the sums of the tiles before.
struct Flow {
  Ahead weights, x;
  Added added;
};

// The sums of products of four pairs of tiles, `multiply(step)` being those of a step. `pack` makes the tiles of weights of
// a step; it is called a step ahead. Both this and adding the sums before go along with the products: these take a
// hundred cycles for a few instructions.
template <typename Pack, typename Multiply>
WITH_BF16 __attribute__((always_inline)) inline void sum_four(int64_t steps, const Pack& pack, const Multiply& multiply,
                                                              Flow& flow, float* sums, int64_t apart) {
  zero_tile<0>();
  zero_tile<1>();
  zero_tile<2>();
  zero_tile<3>();
  pack(0);
  Ahead weights = flow.weights;
  for (int64_t step = 0; step < steps; step++) {
    weights.ask();
    multiply(step);
    if (step + 1 < steps) pack(step + 1);
    if (step == 0) flow.added.add();
  }
  flow.weights = weights;
  flow.x.ask();
  store_tile<0>(flow.added.tiles);
  store_tile<1>(flow.added.tiles + SUMS_TILE);
  store_tile<2>(flow.added.tiles + 2 * SUMS_TILE);
  store_tile<3>(flow.added.tiles + 3 * SUMS_TILE);
  flow.added.sums = sums;
  flow.added.apart = apart;
}

// Adds the products of two tiles of outputs and two of rows to their sums. Tiles of weights are `ldw` apart, of x `ldx`,
// of the sums of rows `ldy`.
template <bool BY_UNIT, int W_PARTS, int X_PARTS, typename Pack>
WITH_BF16 inline void multiply_four(int64_t steps, const BFloat16* w, int64_t ldw, const BFloat16* x, int64_t ldx,
                                    const Pack& pack, Flow& flow, float* sums, int64_t ldy) {
  const auto multiply = [&](int64_t step) WITH_BF16 __attribute__((always_inline)) {
    const BFloat16 *ws = w + step * W_PARTS * TILE, *xs = x + step * X_PARTS * TILE;
    for (int i = 0; i < W_PARTS; i++) {
      load_tile<4>(ws + i * TILE);
      load_tile<5>(ws + i * TILE + ldw);
      for (int j = 0; j < lesser(X_PARTS, MOST_PARTS - i); j++) {
        load_tile<6>(xs + j * TILE);
        multiply_factors<BY_UNIT, 0, 4, 6>();
        multiply_factors<BY_UNIT, 1, 5, 6>();
        load_tile<7>(xs + j * TILE + ldx);
        multiply_factors<BY_UNIT, 2, 4, 7>();
        multiply_factors<BY_UNIT, 3, 5, 7>();
      }
    }
  };
  sum_four(steps, pack, multiply, flow, sums, ldy);
}

// The same of four tiles of outputs and one of rows.
template <bool BY_UNIT, int W_PARTS, int X_PARTS, typename Pack>
WITH_BF16 inline void multiply_column(int64_t steps, const BFloat16* w, int64_t ldw, const BFloat16* x,
                                      const Pack& pack, Flow& flow, float* sums) {
  const auto multiply = [&](int64_t step) WITH_BF16 __attribute__((always_inline)) {
    const BFloat16 *ws = w + step * W_PARTS * TILE, *xs = x + step * X_PARTS * TILE;
    for (int i = 0; i < W_PARTS; i++)
      for (int j = 0; j < lesser(X_PARTS, MOST_PARTS - i); j++) {
        load_tile<7>(xs + j * TILE);
        load_tile<4>(ws + i * TILE);
        multiply_factors<BY_UNIT, 0, 4, 7>();
        load_tile<5>(ws + i * TILE + ldw);
        multiply_factors<BY_UNIT, 1, 5, 7>();
        load_tile<6>(ws + i * TILE + 2 * ldw);
        multiply_factors<BY_UNIT, 2, 6, 7>();
        load_tile<4>(ws + i * TILE + 3 * ldw);
        multiply_factors<BY_UNIT, 3, 4, 7>();
      }
  };
  sum_four(steps, pack, multiply, flow, sums, 2 * SUMS_TILE);
}

// Adds the products of a panel, 64 outputs whose tiles are ldw apart, with `rows` rows of tiles, ldx apart, to their sums.
// `pack<COUNT>(first, step)` makes the tiles of COUNT times 16 outputs of a step.
template <bool BY_UNIT, int W_PARTS, int X_PARTS, typename Pack>
WITH_BF16 inline void multiply_panel(int64_t steps, const BFloat16* w, int64_t ldw, const BFloat16* x, int64_t ldx,
                                     int64_t rows, const Pack& pack, Flow& flow, float* sums, int64_t ldy) {
  const auto is_packed = [](int64_t) {};
  for (int64_t half = 0; half < AMX_PANEL && rows > 1; half += AMX_PANEL / 2) {
    const BFloat16* of_half = w + half / TILE_ROWS * ldw;
    float* to = sums + half * TILE_ROWS;
    const auto pack_half = [&](int64_t step) WITH_BF16 { pack.template operator()<2>(half, step); };
    multiply_four<BY_UNIT, W_PARTS, X_PARTS>(steps, of_half, ldw, x, ldx, pack_half, flow, to, ldy);
    for (int64_t row = 2; row + 2 <= rows; row += 2)
      multiply_four<BY_UNIT, W_PARTS, X_PARTS>(steps, of_half, ldw, x + row * ldx, ldx, is_packed, flow, to + row * ldy,
                                               ldy);
  }
  if (rows % 2 == 0) return;
  const auto pack_all = [&](int64_t step) WITH_BF16 { pack.template operator()<4>(0, step); };
  x += (rows - 1) * ldx;
  sums += (rows - 1) * ldy;
  if (rows == 1)
    multiply_column<BY_UNIT, W_PARTS, X_PARTS>(steps, w, ldw, x, pack_all, flow, sums);
  else
    multiply_column<BY_UNIT, W_PARTS, X_PARTS>(steps, w, ldw, x, is_packed, flow, sums);
}

// Makes rows of the sums (rows, width), which were tiles of sums (outputs, rows), or (rows, outputs) by unit. `tiles` is
// memory for 16 rows.
inline void join_tiles(bool by_unit, int64_t rows, int64_t width, float* sums, float* tiles) {
  for (int64_t row = 0; row < rows; row += TILE_ROWS, sums += TILE_ROWS * width) {
    memcpy(tiles, sums, TILE_ROWS * width * sizeof(float));
    for (int64_t o = 0; o < width; o += TILE_ROWS) {
      Vec tile[LANES];
      for (int64_t r = 0; r < TILE_ROWS; r++) tile[r] = load(tiles + o * TILE_ROWS + r * LANES);
      if (!by_unit) transpose(tile);
      for (int64_t r = 0; r < TILE_ROWS; r++) store(sums + r * width + o, tile[r]);
    }
  }
}

constexpr int64_t tiled(int64_t k) { return pieces_of(k, TILE_DEPTH) * TILE_DEPTH; }

// What tiles are made of: the rows of an input, and where its tiles are: those of `depth` units of all rows together, as
// they are read; of them (rows / 16, steps, parts).
struct Split {
  const float* x;
  int64_t k;
  BFloat16* tiles;
};
struct Splits {
  bool by_unit, pairs;  // of neighbours
  int64_t depth;
  const Split* all;
  float* sums;  // of groups
};

// The products of a row of x with an output, one by one: of the units [begin, end) of `count` inputs from `part` on.
template <typename T>
float exact_sum(const Product& p, const Splits& splits, int64_t part, int64_t count, int64_t begin, int64_t end,
                int64_t row, int64_t output) {
  float sum = 0.0f;
  for (int64_t i = part; i < part + count; i++) {
    const Input& input = p.inputs[i];
    for (int64_t unit = begin; unit < lesser(end, input.k); unit++)
      sum += splits.all[i].x[row * input.k + unit] * scalar(*weight_at<T>(p, input, unit, output));
  }
  return sum;
}

// Whether NaN is among these inputs of a row: all sums are NaN then.
inline bool has_nan(const Product& p, const Splits& splits, int64_t part, int64_t count, int64_t row) {
  for (int64_t i = part; i < part + count; i++) {
    const float* x = splits.all[i].x + row * p.inputs[i].k;
    for (int64_t unit = 0; unit < p.inputs[i].k; unit++)
      if (isnan(x[unit])) return true;
  }
  return false;
}

// Makes sums (m, width) of the outputs from `first` on what they are in float32, where they are not finite.
template <typename T>
void mend_sums(const ProductsCall& call, const Product& p, int64_t part, int64_t count, int64_t begin, int64_t end,
               int64_t first, float* sums, int64_t width) {
  const int64_t columns = lesser(width, p.results.n - first);
  for (int64_t row = 0; row < call.m; row++, sums += width)
    for (int64_t c = 0; c < columns; c += LANES) {
      const Vec given = load(sums + c, lesser(LANES, columns - c));
      uint32_t wrong = nonzero(given - given);
      const bool nan = wrong != 0 && has_nan(p, *call.splits, part, count, row);
      for (; wrong != 0; wrong &= wrong - 1) {
        const int64_t output = c + __builtin_ctz(wrong);
        sums[output] = nan ? NAN : exact_sum<T>(p, *call.splits, part, count, begin, end, row, first + output);
      }
    }
}

}  // namespace

#endif

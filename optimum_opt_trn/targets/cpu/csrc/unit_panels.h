// Products of more rows with weights that lie by unit, (k, n). A panel is PANEL outputs of some units. The first rows
// that are multiplied with one convert it and leave it in the first-level cache for the others; all rows meanwhile ask
// for the weights of the next units, so that memory and arithmetic work at the same time.
#pragma once

#include "common.h"
#include "products.h"
#include "results.h"

namespace {

// Lines of memory that are read next: `rows` rows, `stride` bytes apart, of `bytes` each; so many are asked for a step.
struct Ahead {
  const char* row;
  int64_t rows, bytes, stride, at, lines;

  void ask() {
    for (int64_t line = 0; line < lines && rows > 0; line++) {
      __builtin_prefetch(row + at, 0, 2);
      at += LINE;
      if (at < bytes) continue;
      at = 0;
      row += stride;
      rows--;
    }
  }
};

template <typename T>
struct UnitPanel {
  const T* w;  // of the first unit and output
  int64_t ldw, units, columns;
  float* packed;
  bool is_packed, starts;  // whether it is packed already; whether sums start at 0 with it
};

// The weights of a panel as float32, (units, PANEL), with zeros beyond the last column.
template <typename T>
void pack_units(const UnitPanel<T>& panel) {
  for (int64_t i = 0; i < panel.units; i++)
    for (int64_t c = 0; c < PANEL; c += LANES) {
      const int64_t width = c < panel.columns ? lesser(LANES, panel.columns - c) : 0;
      store(panel.packed + i * PANEL + c, load(panel.w + i * panel.ldw + c, width));
    }
}

// sums (M, PANEL), rows ldy apart, += x (M, units), rows ldx apart, times the panel, which is packed unless PACKED.
template <bool PACKED, int M, typename T>
void multiply_units(const UnitPanel<T>& panel, const float* x, int64_t ldx, Ahead& next, float* sums, int64_t ldy) {
  Vec totals[M][GEMM_VECTORS];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < GEMM_VECTORS; v++) totals[m][v] = panel.starts ? zeros() : load(sums + m * ldy + v * LANES);
  Ahead ahead = next;
  float* packed = panel.packed;
  const T* w = panel.w;
  const int64_t ldw = panel.ldw, units = panel.units;
  for (int64_t i = 0; i < units; i++, packed += PANEL, w += ldw) {
    ahead.ask();
    Vec weights[GEMM_VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < GEMM_VECTORS; v++) {
      weights[v] = PACKED ? load(packed + v * LANES) : load(w + v * LANES);
      if (!PACKED) store(packed + v * LANES, weights[v]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const Vec xs = all(x[m * ldx + i]);
#pragma GCC unroll 8
      for (int v = 0; v < GEMM_VECTORS; v++) totals[m][v] = multiply_add(xs, weights[v], totals[m][v]);
    }
  }
  next = ahead;
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < GEMM_VECTORS; v++) store(sums + m * ldy + v * LANES, totals[m][v]);
}

template <int M, typename T>
void multiply_units(int64_t rows, const UnitPanel<T>& panel, const float* x, int64_t ldx, Ahead& next, float* sums,
                    int64_t ldy) {
  if constexpr (M > 1) {
    if (rows < M) return multiply_units<M - 1>(rows, panel, x, ldx, next, sums, ldy);
  }
  panel.is_packed ? multiply_units<true, M>(panel, x, ldx, next, sums, ldy)
                  : multiply_units<false, M>(panel, x, ldx, next, sums, ldy);
}

// How panels are packed and multiplied in float32.
template <typename T>
struct Float32Units {
  // Units of a step, and of a panel, which takes half of the first-level cache.
  static constexpr int64_t STEP = 1, DEPTH = 128;
  // Whether the first rows can convert it.
  static bool whole(const UnitPanel<T>& panel) { return panel.columns == PANEL; }
  static void pack(const UnitPanel<T>& panel) { pack_units(panel); }
  static void multiply(int64_t rows, const UnitPanel<T>& panel, const Input& input, int64_t row, int64_t begin,
                       Ahead& next, float* sums, int64_t ldy) {
    multiply_units<GEMM_ROWS>(rows, panel, input.x + row * input.k + begin, input.k, next, sums, ldy);
  }
};

// A piece of so many panels' outputs, from the first unit to the last one.
template <typename T, typename Units>
void unit_panels_piece(const void* given, int64_t piece, float* scratch) {
  const ProductsCall& call = *static_cast<const ProductsCall*>(given);
  const Product& p = product_of(call, piece);
  const int64_t n = p.results.n, most = p.panels * PANEL;
  float* rests = scratch + Units::DEPTH * PANEL;  // sums of a panel of less than PANEL outputs
  static_assert((Units::DEPTH + GEMM_ROWS) * PANEL <= SCRATCH);
  const int64_t blocks = pieces_of(call.m, GEMM_ROWS), block = pieces_of(call.m, blocks);  // as in few_rows_piece
  const int64_t first = (piece - p.first_piece) * most, end = lesser(n, first + most);
  const int64_t lines = pieces_of(Units::STEP * PANEL * static_cast<int64_t>(sizeof(T)), LINE * blocks);
  // What is read from `unit` of input `part` on; after the last one come the first ones of the next piece.
  const auto ahead = [&](int64_t part, int64_t unit) -> Ahead {
    if (part < p.count && unit >= p.inputs[part].k) part++, unit = 0;
    const bool here = part < p.count;
    const Input& input = p.inputs[here ? part : 0];
    const int64_t from = here ? first : end, width = lesser(here ? end - first : most, n - from);
    const T* w = static_cast<const T*>(input.w) + unit * input.ldw + from;
    return {reinterpret_cast<const char*>(w), width > 0 ? lesser(Units::DEPTH, input.k - unit) : 0,
            width * static_cast<int64_t>(sizeof(T)), input.ldw * static_cast<int64_t>(sizeof(T)), 0, lines};
  };
  for (int64_t part = 0; part < p.count; part++) {
    const Input& input = p.inputs[part];
    for (int64_t begin = 0; begin < input.k; begin += Units::DEPTH) {
      const int64_t units = lesser(Units::DEPTH, input.k - begin);
      const bool starts = part == 0 && begin == 0, ends = part == p.count - 1 && begin + units == input.k;
      Ahead next = ahead(part, begin + units);
      for (int64_t column = first; column < end; column += PANEL) {
        const int64_t columns = lesser(PANEL, end - column);
        const bool whole = columns == PANEL;
        const T* w = static_cast<const T*>(input.w) + begin * input.ldw + column;
        UnitPanel<T> panel = {w, input.ldw, units, columns, scratch, false, starts};
        if (!Units::whole(panel)) {
          Units::pack(panel);
          panel.is_packed = true;
        }
        for (int64_t row = 0; row < call.m; row += block, panel.is_packed = true) {
          const int64_t rows = lesser(block, call.m - row);
          float* y = p.results.y + row * n + column;
          float* sums = whole ? y : rests;
          const int64_t ldy = whole ? n : PANEL;
          if (!whole && !starts)
            for (int64_t r = 0; r < rows; r++) memcpy(sums + r * PANEL, y + r * n, columns * sizeof(float));
          Units::multiply(rows, panel, input, row, begin, next, sums, ldy);
          for (int64_t r = 0; r < rows; r++) {
            if (ends)
              finish<T>(p.results, row + r, column, columns, sums + r * ldy);
            else if (!whole)
              memcpy(y + r * n, sums + r * PANEL, columns * sizeof(float));
          }
        }
      }
    }
  }
}

}  // namespace

// Products of more rows. A panel is PANEL outputs of some units, packed so that vectors lie along outputs, as in a GEMM
// after Goto and van de Geijn (2008); of many rows, x is packed as well. A panel stays in the first-level cache until all
// rows are multiplied with it. Meanwhile the weights that come next are asked for, so that memory works as well. Where
// weights lie by unit, (k, n), the first rows are multiplied while the panel is packed.
#pragma once

#include "common.h"
#include "products.h"
#include "results.h"

namespace {

// Lines of memory that are read next: `rows` rows, `stride` bytes apart, of `bytes` each; so many are asked for a step.
// What is read of a row may be behind its `head`, a line that is read, too; null if there is none.
struct Ahead {
  const char* row;
  int64_t rows, bytes, stride, at, lines;
  const char* head;

  void ask() {
    for (int64_t line = 0; line < lines && rows > 0; line++) {
      __builtin_prefetch(row + at, 0, 2);
      at += LINE;
      if (at < bytes) continue;
      at = 0;
      row += stride;
      rows--;
      if (head != nullptr) __builtin_prefetch(head += stride, 0, 2);
    }
  }
};

template <typename T>
struct Panel {
  const T* w;  // of the first unit and output; of the row of the unit, if it is coded
  int64_t ldw, units, columns;
  float* packed;
  bool by_unit, is_packed, starts;  // with `starts`, sums are 0 before
  // By unit: the first output, and the same of the units that are read next, and the head of their row (Ahead).
  int64_t column;
  const char *next, *next_head;
};

// Packs a panel of weights that lie by unit: float32 (units, PANEL), zeros beyond the last column.
template <typename T>
void pack_units(const Panel<T>& panel) {
  for (int64_t i = 0; i < panel.units; i++)
    for (int64_t c = 0; c < PANEL; c += LANES) {
      const int64_t width = c < panel.columns ? lesser(LANES, panel.columns - c) : 0;
      store(panel.packed + i * PANEL + c, load(panel.w + i * panel.ldw + c, width));
    }
}

// The same by output.
template <typename T>
void pack_outputs(const Panel<T>& panel) {
  for (int64_t c = 0; c < PANEL; c += LANES)
    for (int64_t i = 0; i < panel.units; i += LANES) {
      const int64_t width = lesser(LANES, panel.units - i), height = panel.columns - c;
      const T* from = panel.w + c * panel.ldw + i;
      float* to = panel.packed + i * PANEL + c;
      Vec rows[LANES];
      if (width == LANES && height >= LANES) {
        for (int64_t r = 0; r < LANES; r++) rows[r] = load(from + r * panel.ldw);
      } else {
        for (int64_t r = 0; r < LANES; r++) rows[r] = r < height ? load(from + r * panel.ldw, width) : zeros();
      }
      transpose(rows);
      for (int64_t l = 0; l < width; l++) store(to + l * PANEL, rows[l]);
    }
}

// sums (M, PANEL), rows ldy apart, become the totals if `starts`, or are added to.
template <int M, int V>
__attribute__((always_inline)) inline void add_totals(const Vec (&totals)[M][V], bool starts, float* sums, int64_t ldy) {
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      float* sum = sums + m * ldy + v * LANES;
      store(sum, starts ? totals[m][v] : load(sum) + totals[m][v]);
    }
}

// sums (M, PANEL), rows ldy apart, += x (M, units), rows ldx apart, times the panel, which is packed unless PACKED. One
// long sum would be less exact than this sum of sums.
template <bool PACKED, int M, typename T>
void multiply_panel(const Panel<T>& panel, const float* x, int64_t ldx, Ahead& next, float* sums, int64_t ldy) {
  Vec totals[M][GEMM_VECTORS];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < GEMM_VECTORS; v++) totals[m][v] = zeros();
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
  add_totals(totals, panel.starts, sums, ldy);
}

template <int M, typename T>
void multiply_panel(int64_t rows, const Panel<T>& panel, const float* x, int64_t ldx, Ahead& next, float* sums,
                    int64_t ldy) {
  if constexpr (M > 1) {
    if (rows < M) return multiply_panel<M - 1>(rows, panel, x, ldx, next, sums, ldy);
  }
  panel.is_packed ? multiply_panel<true, M>(panel, x, ldx, next, sums, ldy)
                  : multiply_panel<false, M>(panel, x, ldx, next, sums, ldy);
}

// Fewer rows do not displace one another: 64 rows of 2048 inputs are multiplied as fast as those of 2064.
constexpr int64_t LEAST_PACKED_ROWS = 65;

// Bytes of `count` inputs that are packed to `packed` bytes.
inline int64_t packing_bytes(int64_t count, int64_t packed) {
  return sizeof(Packing) + count * sizeof(PackedX) + LINE + packed;
}

// Where the inputs are to be packed, in `memory` of packing_bytes; their x become that. `floats` says how many an input
// takes.
template <typename F>
inline const Packing* plan_packing(int64_t depth, int64_t count, Input* inputs, void* memory, F floats) {
  Packing* made = static_cast<Packing*>(memory);
  PackedX* all = reinterpret_cast<PackedX*>(made + 1);
  float* packed = vectors_from(all + count);
  for (int64_t i = 0; i < count; i++) {
    all[i] = {inputs[i].x, inputs[i].k, packed};
    inputs[i].x = packed;
    packed += floats(inputs[i]);
  }
  *made = {depth, all};
  return made;
}

template <typename Panels>
void pack_x_piece(const void* given, int64_t number, float*) {
  const ProductsCall& call = *static_cast<const ProductsCall*>(given);
  const int64_t blocks = pieces_of(call.m, ROWS_AT_ONCE), first = number % blocks * ROWS_AT_ONCE;
  const PackedX& input = call.packing->all[number / blocks];
  for (int64_t begin = 0; begin < input.k; begin += call.packing->depth) {
    const int64_t units = lesser(call.packing->depth, input.k - begin);
    for (int64_t row = first; row < lesser(call.m, first + ROWS_AT_ONCE); row++)
      Panels::pack_x(input.x + row * input.k + begin, units, call.m, begin, row, input.packed);
  }
}

// How panels are packed and multiplied in float32.
template <typename T>
struct Float32Panels {
  // Outputs of a panel, and its units; it takes half of the first-level cache.
  static constexpr int64_t WIDTH = PANEL, DEPTH = 128;
  // Units of a step, and how many times steps go through the panel with a block of rows.
  static constexpr int64_t STEP = 1, PASSES = 1;
  static constexpr int64_t FLOATS = DEPTH * WIDTH;  // that a packed panel takes at most
  // Packs `units` units from `begin` on of row `row` of m.
  static void pack_x(const float* x, int64_t units, int64_t m, int64_t begin, int64_t row, float* packed) {
    memcpy(packed + begin * m + row * units, x, units * sizeof(float));
  }
  static int64_t blocks(int64_t m) { return pieces_of(m, GEMM_ROWS); }
  // Bytes that so many packed units of a row take.
  static int64_t x_bytes(int64_t units) { return units * sizeof(float); }
  // Whether it can be packed while the first rows are multiplied.
  static bool is_whole(const Panel<T>& panel) { return panel.by_unit && panel.columns == PANEL; }
  static void pack(const Panel<T>& panel) { panel.by_unit ? pack_units(panel) : pack_outputs(panel); }
  // Of `call` rows `row` and following, and the units from `begin` on.
  static void multiply(int64_t rows, const Panel<T>& panel, const ProductsCall& call, const Input& input, int64_t row,
                       int64_t begin, Ahead& next, float* sums, int64_t ldy) {
    const bool packed = call.packing != nullptr;
    const int64_t ldx = packed ? panel.units : input.k;
    const float* x = input.x + (packed ? begin * call.m : begin) + row * ldx;
    multiply_panel<GEMM_ROWS>(rows, panel, x, ldx, next, sums, ldy);
  }
};

// Which outputs a piece has; their sums (rows, width) are in the scratch memory behind a panel.
struct PanelsPiece {
  int64_t first, end, width;
};

inline PanelsPiece panels_of(const Product& p, int64_t piece) {
  const int64_t all = pieces_of(p.results.n, p.panel), place = piece - p.first_piece;
  const auto begin = [&](int64_t i) { return lesser(p.results.n, i * all / p.pieces * p.panel); };
  return {begin(place), begin(place + 1), p.panels * p.panel};
}

// Where a weight is, which is the first of a coded block.
template <typename T>
inline const T* weight_at(const Product& p, const Input& input, int64_t unit, int64_t output) {
  const int64_t row = p.by_unit ? unit : output, place = p.by_unit ? output : unit;
  return static_cast<const T*>(input.w) + row * input.ldw + (is_coded<T> ? block_begin(place) : place);
}

// Bytes of so many weights of a row.
template <typename T>
constexpr int64_t bytes_of_weights(int64_t count) {
  return static_cast<int64_t>(count * bytes_of<T>);
}

// The weights of a piece that are read from `unit` of input `part` on, of `depth` units; after the last input come the
// first ones of the next piece.
template <typename T>
inline Ahead weights_from(const Product& p, const PanelsPiece& piece, int64_t part, int64_t unit, int64_t depth,
                          int64_t lines) {
  if (part < p.count && unit >= p.inputs[part].k) part++, unit = 0;
  const bool here = part < p.count;
  const Input& input = p.inputs[here ? part : 0];
  const int64_t from = here ? piece.first : piece.end;
  const int64_t width = lesser(here ? piece.end - from : piece.width, p.results.n - from);
  const int64_t units = lesser(depth, input.k - unit), stride = input.ldw * static_cast<int64_t>(sizeof(T));
  const char* w = reinterpret_cast<const char*>(weight_at<T>(p, input, unit, from));
  const int64_t rows = p.by_unit ? units : width, values = p.by_unit ? width : units;
  const char* head = is_coded<T> ? static_cast<const char*>(input.w) + (p.by_unit ? unit : from) * stride : nullptr;
  return {w, width > 0 ? rows : 0, bytes_of_weights<T>(values), stride, 0, lines, head};
}

// The packed x that is read next: from `unit` of input `part` on, of `depth` units; after the last input come the first
// units of the first. `passes` times it is asked for.
template <typename Panels>
inline Ahead packed_x_from(const ProductsCall& call, const Product& p, int64_t part, int64_t unit, int64_t passes) {
  if (call.packing == nullptr) return {};
  if (unit >= p.inputs[part].k) part = (part + 1) % p.count, unit = 0;
  const Input& input = p.inputs[part];
  const int64_t bytes = call.m * Panels::x_bytes(lesser(Panels::DEPTH, input.k - unit));
  return {reinterpret_cast<const char*>(input.x) + call.m * Panels::x_bytes(unit), 1, bytes, 0, 0,
          pieces_of(bytes, LINE * passes), nullptr};
}

// Writes the sums (m, width) of a piece.
template <typename T>
void panels_write(const Product& p, const PanelsPiece& piece, int64_t m, const float* sums) {
  for (int64_t row = 0; row < m; row++)
    finish<T>(p.results, row, piece.first, piece.end - piece.first, sums + row * piece.width);
}

template <typename T, typename Panels>
void panels_piece(const void* given, int64_t number, float* scratch) {
  constexpr int64_t WIDTH = Panels::WIDTH, STEP = Panels::STEP;
  static_assert(Panels::FLOATS + MOST_ROWS * PANELS * WIDTH <= SCRATCH);
  const ProductsCall& call = *static_cast<const ProductsCall*>(given);
  const Product& p = product_of(call, number);
  const PanelsPiece piece = panels_of(p, number);
  const int64_t m = call.m, blocks = Panels::blocks(m), block = pieces_of(m, blocks);  // as in few_rows_piece
  const int64_t lines = pieces_of(bytes_of_weights<T>(STEP * WIDTH), LINE * blocks * Panels::PASSES);
  float* sums = scratch + Panels::FLOATS;
  for (int64_t part = 0; part < p.count; part++) {
    const Input& input = p.inputs[part];
    for (int64_t begin = 0; begin < input.k; begin += Panels::DEPTH) {
      const int64_t units = lesser(Panels::DEPTH, input.k - begin);
      const bool starts = part == 0 && begin == 0;
      const Ahead then = weights_from<T>(p, piece, part, begin + units, Panels::DEPTH, lines);
      Ahead next = then;
      Ahead next_x = packed_x_from<Panels>(call, p, part, begin + units,
                                           blocks * pieces_of(piece.end - piece.first, WIDTH));
      for (int64_t column = piece.first; column < piece.end; column += WIDTH) {
        const int64_t columns = lesser(WIDTH, piece.end - column);
        const T* w = is_coded<T> ? static_cast<const T*>(input.w) + begin * input.ldw
                                 : weight_at<T>(p, input, begin, column);
        Panel<T> panel = {w, input.ldw, units, columns, scratch, p.by_unit, false, starts, column,
                          then.row + bytes_of_weights<T>(column - piece.first), then.head};
        if (!Panels::is_whole(panel)) {
          Panels::pack(panel);
          panel.is_packed = true;
        }
        for (int64_t row = 0; row < m; row += block, panel.is_packed = true) {
          next_x.ask();
          Panels::multiply(lesser(block, m - row), panel, call, input, row, begin, next,
                           sums + row * piece.width + column - piece.first, piece.width);
        }
      }
    }
  }
}

template <typename T, typename Panels>
void panels_commit(const void* given, int64_t number, const float* scratch) {
  const ProductsCall& call = *static_cast<const ProductsCall*>(given);
  const Product& p = product_of(call, number);
  panels_write<T>(p, panels_of(p, number), call.m, scratch + Panels::FLOATS);
}

// Computes the products of a call, of `inputs` inputs.
template <typename T, typename Panels>
uint64_t run_panels(Job* job, int threads, int64_t inputs, ProductsCall* call) {
  if (call->packing != nullptr) run_first(job, threads, inputs, *call, pack_x_piece<Panels>);
  const int64_t pieces = divide(call, threads, in_panels(Panels::WIDTH, call->m));
  return pool_run(job, threads, pieces, panels_piece<T, Panels>, panels_commit<T, Panels>);
}

}  // namespace

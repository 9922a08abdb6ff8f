// Products with weights that lie by output, row-major (n, k), straight from a memory map; a tensor-parallel shard of
// one is a view of it. 16-bit weights are converted in registers, and sums are float32.
#pragma once

#include "coded.h"
#include "common.h"
#include "results.h"

namespace {

// Outputs of a piece: enough to amortise taking it, few enough to share evenly, and a multiple of 3, 4 and 6 streams.
constexpr int64_t OUTPUTS = 24;
// Of more rows a panel of PANEL outputs at a time, of AMX_PANEL with tiles; a piece has PANELS or fewer (panels.h).
constexpr int64_t PANEL = GEMM_VECTORS * LANES, PANELS = 4;
// A call has at most so many rows: the sums of a piece fit the scratch memory, and what is multiplied with a panel the
// second-level cache. More rows are several calls.
constexpr int64_t MOST_ROWS = 512;

// The sum of `count` products of x (m, k) and w (n, k), or w (k, n) by unit; a piece has `panels` panels at most, of
// `panel` outputs.
struct Product {
  int64_t first_piece, pieces, panel, panels, count;
  const Input* inputs;
  bool by_unit;
  Results results;
};

// An input's x (m, k), and where it is packed: (k / depth, m, depth), so that what is multiplied with a panel lies
// together. Rows of 2048 floats would be so far apart that they displace one another from the caches.
struct PackedX {
  const float* x;
  int64_t k;
  float* packed;
};
struct Packing {
  int64_t depth;
  const PackedX* all;
};

struct Integers;
struct Splits;

struct ProductsCall {
  int64_t m, count;
  Product* products;
  // What panels.h makes of x, or int8_products.h, or amx_products.h.
  const Packing* packing;
  const Integers* integers;
  const Splits* splits;
};

// What is made of x first is made so many rows at a time; of so many rows at most by the calling thread, which then
// waits for no other.
constexpr int64_t ROWS_AT_ONCE = 16, MOST_ROWS_ALONE = 64;

// Makes it, of each of `inputs` inputs.
inline void run_first(Job* job, int threads, int64_t inputs, const ProductsCall& call, Compute compute) {
  pool_run_first(job, call.m <= MOST_ROWS_ALONE ? 1 : threads, pieces_of(call.m, ROWS_AT_ONCE) * inputs, compute);
}

inline const Product& product_of(const ProductsCall& call, int64_t piece) {
  int64_t i = call.count - 1;
  while (call.products[i].first_piece > piece) i--;
  return call.products[i];
}

// How products are divided: into panels of so many outputs, at most so many panels a piece, and for each thread at least
// so many pieces.
struct Division {
  int64_t panel, panels, least;
};
// With few rows the time goes into reading weights, which wide pieces do faster.
inline Division in_panels(int64_t width, int64_t m) { return {width, PANELS, m <= 64 ? 2 : 8}; }

// Divides the products into pieces; their number. Without panels, a piece has OUTPUTS outputs.
inline int64_t divide(ProductsCall* call, int threads, const Division& division = {}) {
  int64_t pieces = 0;
  for (int64_t i = 0; i < call->count; i++) {
    Product& p = call->products[i];
    p.first_piece = pieces;
    p.pieces = pieces_of(p.results.n, OUTPUTS);
    if (division.panel > 0) {
      const int64_t all = pieces_of(p.results.n, division.panel);
      p.panel = division.panel;
      p.panels = division.panels;
      while (p.panels > 1 && pieces_of(all, p.panels) < division.least * threads) p.panels--;
      // As many for each thread: of 11 pieces, one of two threads would have 6.
      p.pieces = lesser(all, pieces_of(pieces_of(all, p.panels), threads) * threads);
    }
    pieces += p.pieces;
  }
  return pieces;
}

// The sums over the lanes of each total, to sums (m, OUTPUTS).
template <int R, int M>
inline void store_totals(const Vec (&totals)[R][M], float* sums) {
  // Four at a time, the last ones with zeros, so that all are added in the same order.
  constexpr int COUNT = (R * M + 3) / 4 * 4;
  float results[COUNT];
  const auto total = [&](int i) { return i < R * M ? totals[i % R][i / R] : zeros(); };
#pragma GCC unroll 16
  for (int i = 0; i < COUNT; i += 4) store_sums(total(i), total(i + 1), total(i + 2), total(i + 3), results + i);
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) sums[m * OUTPUTS + r] = results[m * R + r];
}

// The sums of R weight rows' products with M rows of x; those of one do not depend on what others are made with it.
template <int R, int M>
struct Totals {
  Vec lanes[R][M];
  float rests[R][M];  // of inputs that fill no vector

  Totals() {
    for (int r = 0; r < R; r++)
      for (int m = 0; m < M; m++) {
        lanes[r][m] = zeros();
        rests[r][m] = 0.0f;
      }
  }

  // Adds products of k inputs, along which the lanes run; `row(r)` is a weight row, `ask(r, i)` is called where its
  // inputs from i on are read, or its bytes from i on if they are coded.
  template <typename T, typename Row, typename Ask>
  void add(int64_t k, const float* x, const Row& row, const Ask& ask) {
    if constexpr (is_coded<T>)
      add_coded(k, x, row, ask);
    else
      add_plain(k, x, row, ask);
  }

  template <typename Row, typename Ask>
  void add_plain(int64_t k, const float* x, const Row& row, const Ask& ask) {
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) {
      Vec weights[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        weights[r] = load(row(r) + i);
        ask(r, i);
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const Vec xs = load(x + m * k + i);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) lanes[r][m] = multiply_add(weights[r], xs, lanes[r][m]);
      }
    }
    for (; i < k; i++)
      for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) rests[r][m] = fmaf(scalar(row(r)[i]), x[m * k + i], rests[r][m]);
  }

  template <typename Row, typename Ask>
  void add_coded(int64_t k, const float* x, const Row& row, const Ask& ask) {
    Bytes tables[R];
    for (int r = 0; r < R; r++) tables[r] = repeated(row(r));
    for (int64_t i = 0; i < k; i += CODED_BLOCK)
      each_part([&]<int H, int PART>() {
        const float* from = x + i + H * HALF + PART * LANES;
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          ask_lines<H, PART>([&](int64_t byte) __attribute__((always_inline)) {
            ask(r, block_begin(i) + byte);
          });
          Vec weights[4];
          decode<H, PART>(row(r), i, tables[r], weights);
#pragma GCC unroll 4
          for (int v = 0; v < 4; v++)
#pragma GCC unroll 8
            for (int m = 0; m < M; m++)
              lanes[r][m] = multiply_add(weights[v], load(from + m * k + v * HALF / 4), lanes[r][m]);
        }
      });
  }

  // To sums (m, OUTPUTS).
  void store(float* sums) const {
    store_totals(lanes, sums);
    for (int m = 0; m < M; m++)
      for (int r = 0; r < R; r++) sums[m * OUTPUTS + r] += rests[r][m];
  }
};

// How many rows of x are multiplied with weights of type T at a time, and how many rows of weights with m of them.
template <typename T>
constexpr int few_rows = is_coded<T> ? MOST_CODED_ROWS : FEW_ROWS;
template <typename T>
constexpr int streams_of(int m) {
  return is_coded<T> ? coded_streams(m) : streams(m);
}

// With M rows of x, whether weights of type T are asked for where the inputs from i on are read.
template <int M, typename T>
constexpr bool asks(int64_t i) {
  return is_coded<T> || M > MOST_ASKING_ONCE || i % (LINE / static_cast<int64_t>(sizeof(T))) == 0;
}

// In which order lines of some rows are asked for: for row r at place i, that at `i * by_place + r * by_row`. Rows that
// follow one another are asked for from the first one's beginning to the last one's end, since memory is read faster so
// than in several places; others each from its own beginning.
struct Order {
  int64_t by_place, by_row;
};
template <int M, typename T>
inline Order order_of(int64_t rows, int64_t k, int64_t ldw) {
  constexpr int64_t OF_A_LINE = LINE / static_cast<int64_t>(sizeof(T));
  if (is_coded<T>) return {rows, OF_A_LINE};
  return ldw == k ? Order{rows, M > MOST_ASKING_ONCE ? LANES : OF_A_LINE} : Order{1, ldw};
}

// The products of R weight rows with M rows of x, to sums (m, OUTPUTS). Hardware does not follow a stream into the next
// page, so AHEAD weight rows are asked for: the next R, or those that begin `first` rows behind.
template <int AHEAD, int R, int M, typename T>
inline void dot(const Product& p, int64_t row, int64_t column, int64_t first, float* sums) {
  Totals<R, M> totals;
  for (int64_t part = 0; part < p.count; part++) {
    const int64_t k = p.inputs[part].k, ldw = p.inputs[part].ldw;
    const T* w = static_cast<const T*>(p.inputs[part].w) + column * ldw;
    const T* next = w + (AHEAD == R ? R : first) * ldw;
    const Order order = order_of<M, T>(AHEAD, k, ldw);
    if constexpr (is_coded<T>)  // blocks begin behind a line
      for (int r = 0; r < AHEAD; r++) __builtin_prefetch(next + r * LINE);
    totals.template add<T>(
        k, p.inputs[part].x + row * k, [&](int r) { return w + r * ldw; },
        [&](int r, int64_t i) __attribute__((always_inline)) {
          if constexpr (AHEAD > 0)
            if (r < AHEAD && asks<M, T>(i)) __builtin_prefetch(next + i * order.by_place + r * order.by_row);
        });
  }
  totals.store(sums);
}

template <int M, typename T>
inline void dots(int64_t rows, const Product& p, int64_t row, int64_t begin, int64_t end, int64_t block, int64_t blocks,
                 float* sums) {
  if constexpr (M > 1) {
    if (rows < M) return dots<M - 1, T>(rows, p, row, begin, end, block, blocks, sums);
  }
  // With several blocks, some ask for a part of the next piece's weights each, so that memory works meanwhile.
  constexpr int R = streams_of<T>(M), PART = R > 2 ? 2 : 1;
  int64_t column = begin;
  for (; column + R <= end; column += R) {
    float* to = sums + column - begin;
    if (blocks == 1)
      dot<R, R, M, T>(p, row, column, 0, to);
    else if (PART * block < R)
      dot<PART, R, M, T>(p, row, column, OUTPUTS + PART * block, to);
    else
      dot<0, R, M, T>(p, row, column, 0, to);
  }
  for (; column < end; column++) dot<0, 1, M, T>(p, row, column, 0, sums + column - begin);
}

template <typename T>
void few_rows_piece(const void* given, int64_t piece, float* scratch) {
  const ProductsCall& call = *static_cast<const ProductsCall*>(given);
  const Product& p = product_of(call, piece);
  const int64_t begin = (piece - p.first_piece) * OUTPUTS, end = lesser(p.results.n, begin + OUTPUTS);
  // Rows in blocks of equal size: a last block of one row would convert all weights for that row.
  const int64_t blocks = pieces_of(call.m, few_rows<T>), rows = pieces_of(call.m, blocks);
  for (int64_t row = 0; row < call.m; row += rows)
    dots<few_rows<T>, T>(lesser(rows, call.m - row), p, row, begin, end, row / rows, blocks, scratch + row * OUTPUTS);
}

template <typename T>
void few_rows_commit(const void* given, int64_t piece, const float* scratch) {
  const ProductsCall& call = *static_cast<const ProductsCall*>(given);
  const Product& p = product_of(call, piece);
  const int64_t begin = (piece - p.first_piece) * OUTPUTS, end = lesser(p.results.n, begin + OUTPUTS);
  for (int64_t row = 0; row < call.m; row++)
    finish<T>(p.results, row, begin, end - begin, scratch + row * OUTPUTS);
}

}  // namespace

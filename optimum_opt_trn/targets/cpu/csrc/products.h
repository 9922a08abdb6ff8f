// Products with weights that lie by output, row-major (n, k), straight from a memory map; a tensor-parallel shard of
// one is a view of it. 16-bit weights are converted in registers, and sums are float32.
#pragma once

#include "common.h"
#include "rows.h"
#include "units.h"

namespace {

// Outputs of a piece: enough to amortise taking it, few enough to share evenly, and a multiple of 3, 4 and 6 streams.
constexpr int64_t OUTPUTS = 24;
// A panel has PANEL outputs, converted for DEPTH inputs; a piece's PANELS of them fit the second-level cache.
constexpr int64_t PANEL = GEMM_VECTORS * LANES, DEPTH = 1024, PANELS = 4;
static_assert(PANELS * DEPTH * PANEL + GEMM_ROWS * PANEL <= SCRATCH);

// The sum of `count` products of x (m, k) and w (n, k), or w (k, n) by unit, and what happens to it.
struct Product {
  int64_t n, first_piece, count, panels;
  const Input* inputs;
  const float* scale;
  const void* bias;
  const float* residual;
  bool relu, by_unit;
  float* y;
};

struct ProductsCall {
  int64_t m, count;
  Product* products;
};

inline const Product& product_of(const ProductsCall& call, int64_t piece) {
  int64_t i = call.count - 1;
  while (call.products[i].first_piece > piece) i--;
  return call.products[i];
}

template <typename T>
inline void finish(const Product& p, int64_t row, int64_t column, float value) {
  if (p.scale != nullptr) value *= p.scale[column];
  if (p.bias != nullptr) value += scalar(static_cast<const typename BiasOf<T>::Type*>(p.bias)[column]);
  if (p.relu) value = value < 0.0f ? 0.0f : value;
  if (p.residual != nullptr) value += p.residual[row * p.n + column];
  p.y[row * p.n + column] = value;
}

// The products of R weight rows with M rows of x, to sums (m, OUTPUTS). The lanes run along k.
template <int R, int M, typename T>
inline void dot(const Product& p, int64_t row, int64_t column, float* sums) {
  Vec totals[R][M];
  float rests[R][M];  // of inputs that fill no vector
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) {
      totals[r][m] = zeros();
      rests[r][m] = 0.0f;
    }
  for (int64_t part = 0; part < p.count; part++) {
    const int64_t k = p.inputs[part].k, ldw = p.inputs[part].ldw;
    const float* x = p.inputs[part].x + row * k;
    const T* w = static_cast<const T*>(p.inputs[part].w) + column * ldw;
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) {
      Vec weights[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        weights[r] = load(w + r * ldw + i);
        // Hardware does not follow a stream into the next page, and a row is a page or two: ask for the next R rows.
        __builtin_prefetch(w + (r + R) * ldw + i, 0, 1);
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const Vec xs = load(x + m * k + i);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) totals[r][m] = multiply_add(weights[r], xs, totals[r][m]);
      }
    }
    for (; i < k; i++)
      for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) rests[r][m] += scalar(w[r * ldw + i]) * x[m * k + i];
  }
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) sums[m * OUTPUTS + r] = sum(totals[r][m]) + rests[r][m];
}

template <int M, typename T>
inline void dots(int64_t rows, const Product& p, int64_t row, int64_t begin, int64_t end, float* sums) {
  if constexpr (M > 1) {
    if (rows < M) return dots<M - 1, T>(rows, p, row, begin, end, sums);
  }
  int64_t column = begin;
  for (; column + streams(M) <= end; column += streams(M))
    dot<streams(M), M, T>(p, row, column, sums + column - begin);
  for (; column < end; column++) dot<1, M, T>(p, row, column, sums + column - begin);
}

template <typename T>
void few_rows_piece(const void* given, int64_t piece, float* scratch) {
  const ProductsCall& call = *static_cast<const ProductsCall*>(given);
  const Product& p = product_of(call, piece);
  const int64_t begin = (piece - p.first_piece) * OUTPUTS, end = lesser(p.n, begin + OUTPUTS);
  // Rows in blocks of equal size: a last block of one row would convert all weights for that row.
  const int64_t blocks = pieces_of(call.m, FEW_ROWS), rows = pieces_of(call.m, blocks);
  for (int64_t row = 0; row < call.m; row += rows)
    dots<FEW_ROWS, T>(lesser(rows, call.m - row), p, row, begin, end, scratch + row * OUTPUTS);
}

template <typename T>
void few_rows_commit(const void* given, int64_t piece, const float* scratch) {
  const ProductsCall& call = *static_cast<const ProductsCall*>(given);
  const Product& p = product_of(call, piece);
  const int64_t begin = (piece - p.first_piece) * OUTPUTS, end = lesser(p.n, begin + OUTPUTS);
  for (int64_t row = 0; row < call.m; row++)
    for (int64_t column = begin; column < end; column++)
      finish<T>(p, row, column, scratch[row * OUTPUTS + column - begin]);
}

// Converts `count` panels of weights that lie by unit, from `column` on; see `pack`. A row is read for all of them.
template <typename T>
void pack_units(const Input& input, int64_t n, int64_t column, int64_t count, int64_t begin, int64_t depth,
                float* panels) {
  const int64_t width = lesser(count * PANEL, n - column);
  for (int64_t i = 0; i < depth; i++) {
    const T* from = static_cast<const T*>(input.w) + (begin + i) * input.ldw + column;
    const T* next = from + (i + 8 < depth ? 8 * input.ldw : 0);
    for (int64_t c = 0; c < count * PANEL; c += LANES) {
      float* to = panels + c / PANEL * DEPTH * PANEL + i * PANEL + c % PANEL;
      __builtin_prefetch(next + c, 0, 2);
      if (c + LANES <= width)
        store(to, load(from + c));
      else
        for (int64_t l = 0; l < LANES; l++) to[l] = c + l < width ? scalar(from[c + l]) : 0.0f;
    }
  }
}

// Weights [column, column + PANEL) x [begin, begin + depth) as float32 (depth, PANEL), zeros beyond the last column.
template <typename T>
void pack(const Input& input, int64_t n, int64_t column, int64_t begin, int64_t depth, float* panel) {
  const T* w = static_cast<const T*>(input.w);
  for (int64_t c = 0; c < PANEL; c += LANES)
    for (int64_t i = 0; i < depth; i += LANES) {
      const int64_t width = lesser(LANES, depth - i);
      Vec rows[LANES];
      for (int64_t r = 0; r < LANES; r++) {
        const T* from = w + (column + c + r) * input.ldw + begin + i;
        if (column + c + r >= n) {
          rows[r] = zeros();
        } else if (width == LANES) {
          rows[r] = load(from);
        } else {
          float padded[LANES] = {};
          for (int64_t l = 0; l < width; l++) padded[l] = scalar(from[l]);
          rows[r] = load(padded);
        }
      }
      transpose(rows);
      for (int64_t l = 0; l < width; l++) store(panel + (i + l) * PANEL + c, rows[l]);
    }
}

// M rows of x times a panel. The lanes run along the outputs; sums is (M, PANEL).
template <int M>
inline void multiply(int64_t rows, const float* x, int64_t ldx, const float* panel, int64_t depth, float* sums) {
  if constexpr (M > 1) {
    if (rows < M) return multiply<M - 1>(rows, x, ldx, panel, depth, sums);
  }
  Vec totals[M][GEMM_VECTORS];
  for (int m = 0; m < M; m++)
    for (int v = 0; v < GEMM_VECTORS; v++) totals[m][v] = zeros();
  for (int64_t i = 0; i < depth; i++) {
    Vec weights[GEMM_VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < GEMM_VECTORS; v++) weights[v] = load(panel + i * PANEL + v * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const Vec xs = all(x[m * ldx + i]);
#pragma GCC unroll 8
      for (int v = 0; v < GEMM_VECTORS; v++) totals[m][v] = multiply_add(xs, weights[v], totals[m][v]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < GEMM_VECTORS; v++) store(sums + m * PANEL + v * LANES, totals[m][v]);
}

// As in a GEMM after Goto and van de Geijn (2008), but only the weights are packed, while they are converted.
template <typename T>
void many_rows_piece(const void* given, int64_t piece, float* scratch) {
  const ProductsCall& call = *static_cast<const ProductsCall*>(given);
  const Product& p = product_of(call, piece);
  float* sums = scratch + PANELS * DEPTH * PANEL;
  const int64_t block = pieces_of(call.m, pieces_of(call.m, GEMM_ROWS));  // as in few_rows_piece
  const int64_t first = (piece - p.first_piece) * p.panels;
  const int64_t count = lesser(p.panels, pieces_of(p.n, PANEL) - first);
  for (int64_t part = 0; part < p.count; part++) {
    const Input& input = p.inputs[part];
    for (int64_t begin = 0; begin < input.k; begin += DEPTH) {
      const int64_t depth = lesser(DEPTH, input.k - begin);
      const bool starts = part == 0 && begin == 0, ends = part == p.count - 1 && begin + depth == input.k;
      if (p.by_unit)
        pack_units<T>(input, p.n, first * PANEL, count, begin, depth, scratch);
      else
        for (int64_t i = 0; i < count; i++)
          pack<T>(input, p.n, (first + i) * PANEL, begin, depth, scratch + i * DEPTH * PANEL);
      for (int64_t row = 0; row < call.m; row += block) {
        const int64_t rows = lesser(block, call.m - row);
        for (int64_t i = 0; i < count; i++) {
          multiply<GEMM_ROWS>(rows, input.x + row * input.k + begin, input.k, scratch + i * DEPTH * PANEL, depth, sums);
          const int64_t column = (first + i) * PANEL, columns = lesser(PANEL, p.n - column);
          for (int64_t r = 0; r < rows; r++) {
            float* y = p.y + (row + r) * p.n + column;
            if (!starts)
              for (int64_t c = 0; c < columns; c++) sums[r * PANEL + c] += y[c];
            if (ends)
              for (int64_t c = 0; c < columns; c++) finish<T>(p, row + r, column + c, sums[r * PANEL + c]);
            else
              memcpy(y, sums + r * PANEL, columns * sizeof(float));
          }
        }
      }
    }
  }
}

// Divides the products into pieces of `unit` outputs, or more where there would be too many; their number.
inline int64_t divide(ProductsCall* call, int threads, bool few) {
  int64_t pieces = 0;
  for (int64_t i = 0; i < call->count; i++) {
    Product& p = call->products[i];
    p.first_piece = pieces;
    const int64_t panels = pieces_of(p.n, PANEL);
    p.panels = PANELS;
    while (p.panels > 1 && pieces_of(panels, p.panels) < 8 * threads) p.panels /= 2;
    pieces += few ? pieces_of(p.n, OUTPUTS) : pieces_of(panels, p.panels);
  }
  return pieces;
}

template <Extra E>
inline uint64_t run_products(Job* job, int threads, Dtype dtype, ProductsCall* call) {
  const bool few = call->m <= MOST_FEW_ROWS && !call->products[0].by_unit;
  const int64_t pieces = divide(call, threads, few);
  return with_weight_dtype(dtype, [&]<typename T>(T*) {
    if (few) return pool_run(job, threads, pieces, few_rows_piece<T>, few_rows_commit<T>);
    pool_run(job, threads, pieces, many_rows_piece<T>, nullptr);
    return uint64_t{0};  // no piece is computed twice, so that none is left
  });
}

template <Extra E>
inline uint64_t linears(int threads, Dtype dtype, int64_t m, int64_t k, const float* x, const Norm* norm, bool relu,
                        int64_t count, const Output* outputs) {
  // Of few rows the normed ones are with the call; the caller gives many to layer_norm first.
  const int64_t normed = norm != nullptr ? m * k : 0;
  Job* job;
  ProductsCall* call = begin<ProductsCall>(&job, count * (sizeof(Product) + sizeof(Input)) + normed * sizeof(float));
  if (call == nullptr) return NO_MEMORY;
  Product* products = reinterpret_cast<Product*>(call + 1);
  Input* inputs = reinterpret_cast<Input*>(products + count);
  if (norm != nullptr) {
    float* rows = reinterpret_cast<float*>(inputs + count);
    for (int64_t row = 0; row < m; row++) normalize(x + row * k, k, *norm, rows + row * k);
    x = rows;
  }
  for (int64_t i = 0; i < count; i++) {
    const Output& output = outputs[i];
    inputs[i] = {x, output.w, k, output.ldw};
    products[i] = {output.n, 0, 1, 0, inputs + i, output.scale, output.bias, nullptr, relu, false, output.y};
  }
  *call = {m, count, products};
  return run_products<E>(job, threads, dtype, call);
}

template <Extra E>
inline uint64_t linear_sum(int threads, Dtype dtype, int64_t m, int64_t n, bool by_unit, bool skip, const float* scale,
                           const void* bias, const float* residual, float* y, int64_t count, const Input* inputs) {
  if (by_unit && takes_units(m, n, count, inputs))
    return with_weight_dtype(dtype, [&]<typename T>(T*) {
      return units_sum<T>(threads, m, n, skip, scale, bias, residual, y, count, inputs);
    });
  Job* job;
  ProductsCall* call = begin<ProductsCall>(&job, sizeof(Product) + count * sizeof(Input));
  if (call == nullptr) return NO_MEMORY;
  Product* product = reinterpret_cast<Product*>(call + 1);
  Input* copied = reinterpret_cast<Input*>(product + 1);
  memcpy(copied, inputs, count * sizeof(Input));
  *product = {n, 0, count, 0, copied, scale, bias, residual, false, by_unit, y};
  *call = {m, 1, product};
  return run_products<E>(job, threads, dtype, call);
}

}  // namespace

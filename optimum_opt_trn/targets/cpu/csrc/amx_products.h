// Products by tiles (amx_tiles.h): panels of weights for many rows, and for few rows weights as memory gives them fastest.
#pragma once

#include "amx_tiles.h"
#include "amx_units.h"

#if defined(KERNELS_AVX512)

namespace {

constexpr int64_t PACKED_FLOATS = AMX_PANEL * amx_depth(false) * MOST_PARTS / 2;
static_assert(PACKED_FLOATS >= AMX_PANEL * amx_depth(true) / 2);
static_assert(PACKED_FLOATS + MOST_ROWS * PANELS * AMX_PANEL <= SCRATCH);

// With fewer rows by output, float32 or integers are as fast.
constexpr int64_t least_amx_rows(Dtype dtype, bool rounded) {
  if (dtype == BFLOAT16) return rounded ? 5 : 8;
  return rounded ? 8 : dtype == INT8 ? 10 : 14;
}

// The sums of a piece, as tiles: (rows / 16, width / 16).
template <typename T, bool ROUNDED, bool BY_UNIT>
WITH_BF16 void amx_sum(const ProductsCall& call, const Product& p, const PanelsPiece& piece, float* scratch) {
  constexpr int W_PARTS = parts_of<T>(ROUNDED), X_PARTS = parts_of<float>(ROUNDED);
  constexpr int64_t DEPTH = amx_depth(ROUNDED);
  const int64_t rows = pieces_of(call.m, TILE_ROWS), ldy = piece.width * TILE_ROWS;
  const int64_t passes = rows / 2 * 2 + rows % 2;  // of a panel
  const int64_t lines = pieces_of(TILE_DEPTH * AMX_PANEL * static_cast<int64_t>(sizeof(T)), LINE * passes);
  const int64_t x_unit = rows * TILE_ROWS * X_PARTS * sizeof(BFloat16);
  BFloat16* packed = reinterpret_cast<BFloat16*>(scratch);
  float* sums = scratch + PACKED_FLOATS;
  memset(sums, 0, rows * ldy * sizeof(float));
  alignas(64) float added[4 * SUMS_TILE];
  Flow flow = {{}, {}, {added, nullptr, 0}};
  for (int64_t part = 0; part < p.count; part++) {
    const Input& input = p.inputs[part];
    const BFloat16* x = reinterpret_cast<const BFloat16*>(input.x);
    for (int64_t begin = 0; begin < input.k; begin += DEPTH) {
      const int64_t units = lesser(DEPTH, input.k - begin), steps = pieces_of(units, TILE_DEPTH);
      const int64_t ldx = steps * X_PARTS * TILE;
      const BFloat16* xs = x + begin * rows * TILE_ROWS * X_PARTS;
      flow.weights = weights_from<T>(p, piece, part, begin + units, DEPTH, lines);
      const int64_t behind = lesser(DEPTH, input.k - begin - units) * x_unit;
      flow.x = {reinterpret_cast<const char*>(xs) + units * x_unit, behind > 0, behind, 0, 0,
                pieces_of(behind, LINE * passes * pieces_of(piece.end - piece.first, AMX_PANEL))};
      for (int64_t column = piece.first; column < piece.end; column += AMX_PANEL) {
        const AmxPanel<T> panel = {weight_at<T>(p, input, begin, column), input.ldw, units, piece.end - column, packed};
        const auto pack = [&]<int COUNT>(int64_t first, int64_t step) WITH_BF16 {
          pack_tiles<T, ROUNDED, BY_UNIT, COUNT>(panel, first, step);
        };
        multiply_panel<BY_UNIT, W_PARTS, X_PARTS>(steps, packed, steps * W_PARTS * TILE, xs, ldx, rows, pack, flow,
                                                  sums + (column - piece.first) * TILE_ROWS, ldy);
      }
    }
  }
  flow.added.add();
}

// With few rows of tiles, weights by output are read once, 16 outputs at a time, along their rows. The products of so many
// inputs are summed up in a tile before they are added to others.
constexpr int64_t STREAM_DEPTH = 512;

// Adds to sums (16 * ROWS, width) the products of ROWS rows of tiles, ldx apart, with up to 16 outputs. Their weights are
// packed a step ahead, as in sum_four, and those of the next 16 outputs are asked for; but tiles of bfloat16 are loaded
// as they lie, by so few instructions that the processor itself is far enough ahead.
template <typename T, bool ROUNDED, int ROWS>
WITH_BF16 void stream_outputs(const T* w, int64_t ldw, int64_t outputs, int64_t units, const BFloat16* x, int64_t ldx,
                              float* sums, int64_t width) {
  constexpr int W_PARTS = parts_of<T>(ROUNDED), X_PARTS = parts_of<float>(ROUNDED);
  // Tiles of sums of a row of tiles: more than one as an instruction waits for the one before with the same sums.
  constexpr int SUMS = 4 / ROWS;
  constexpr int64_t RING = 4, OF_A_LINE = LINE / sizeof(T);
  alignas(64) BFloat16 ring[RING][W_PARTS * TILE];
  const auto pack = [&](int64_t step) WITH_BF16 {
    const AmxPanel<T> panel = {w + step * TILE_DEPTH, ldw, lesser(TILE_DEPTH, units - step * TILE_DEPTH), outputs,
                               ring[step % RING]};
    pack_tiles<T, ROUNDED, false, 1>(panel, 0, 0);
    if (step * TILE_DEPTH % OF_A_LINE != 0) return;
    for (int64_t r = 0; r < TILE_ROWS; r++)
      for (int64_t i = 0; i < TILE_DEPTH; i += OF_A_LINE)
        __builtin_prefetch(panel.w + (TILE_ROWS + r) * ldw + i, 0, 2);
  };
  zero_tile<0>();
  zero_tile<1>();
  zero_tile<2>();
  zero_tile<3>();
  const int64_t steps = pieces_of(units, TILE_DEPTH);
  const int64_t whole = pairs_neighbours<T>(false) && outputs >= TILE_ROWS ? units / TILE_DEPTH : 0;
  if (whole == 0) pack(0);
  for (int64_t step = 0; step < steps; step++, x += X_PARTS * TILE) {
    if (step + 1 < steps && step + 1 >= whole) pack(step + 1);
    if (step < whole) {
      load_tile<4>(w + step * TILE_DEPTH, ldw * sizeof(T));
    } else {
      const BFloat16* packed = ring[step % RING];
      each<0, W_PARTS>([&]<int I>() { load_tile<4 + I>(packed + I * TILE); });
    }
    each<0, ROWS>([&]<int ROW>() {
      each<0, X_PARTS>([&]<int J>() {
        load_tile<7>(x + ROW * ldx + J * TILE);
        each<0, lesser(W_PARTS, MOST_PARTS - J)>(
            [&]<int I>() { multiply_tiles<ROW * SUMS + (I + J) % SUMS, 4 + I, 7>(); });
      });
    });
  }
  alignas(64) float tiles[4 * SUMS_TILE];
  store_tile<0>(tiles);
  store_tile<1>(tiles + SUMS_TILE);
  store_tile<2>(tiles + 2 * SUMS_TILE);
  store_tile<3>(tiles + 3 * SUMS_TILE);
  for (int row = 0; row < ROWS; row++) {
    Vec of[LANES];  // of an output each
    for (int64_t r = 0; r < TILE_ROWS; r++) {
      const float* from = tiles + row * SUMS * SUMS_TILE + r * LANES;
      of[r] = load(from);
      for (int i = 1; i < SUMS; i++) of[r] = of[r] + load(from + i * SUMS_TILE);
    }
    transpose(of);
    for (int64_t r = 0; r < TILE_ROWS; r++, sums += width) store(sums, load(sums) + of[r]);
  }
}

template <typename T, bool ROUNDED, int ROWS>
void stream_sum(const Product& p, const PanelsPiece& piece, float* sums) {
  constexpr int X_PARTS = parts_of<float>(ROUNDED);
  memset(sums, 0, ROWS * TILE_ROWS * piece.width * sizeof(float));
  for (int64_t part = 0; part < p.count; part++) {
    const Input& input = p.inputs[part];
    const BFloat16* x = reinterpret_cast<const BFloat16*>(input.x);
    for (int64_t column = piece.first; column < piece.end; column += TILE_ROWS)
      for (int64_t begin = 0; begin < input.k; begin += STREAM_DEPTH) {
        const int64_t units = lesser(STREAM_DEPTH, input.k - begin);
        stream_outputs<T, ROUNDED, ROWS>(weight_at<T>(p, input, begin, column), input.ldw, piece.end - column, units,
                                         x + begin * ROWS * TILE_ROWS * X_PARTS,
                                         pieces_of(units, TILE_DEPTH) * X_PARTS * TILE, sums + column - piece.first,
                                         piece.width);
      }
  }
}

template <typename T, bool ROUNDED>
void stream_piece(const void* given, int64_t number, float* scratch) {
  const ProductsCall& call = *static_cast<const ProductsCall*>(given);
  const Product& p = product_of(call, number);
  const PanelsPiece piece = panels_of(p, number);
  float* sums = scratch + PACKED_FLOATS;
  begin_tiles();
  switch (pieces_of(call.m, TILE_ROWS)) {
    case 1: stream_sum<T, ROUNDED, 1>(p, piece, sums); break;
    case 2: stream_sum<T, ROUNDED, 2>(p, piece, sums); break;
    case 3: stream_sum<T, ROUNDED, 3>(p, piece, sums); break;
    default: stream_sum<T, ROUNDED, 4>(p, piece, sums);
  }
  end_tiles();
  if (!ROUNDED) mend_sums<T>(call, p, 0, p.count, 0, INT64_MAX, piece.first, sums, piece.width);
}

template <typename T, bool ROUNDED>
void amx_piece(const void* given, int64_t number, float* scratch) {
  const ProductsCall& call = *static_cast<const ProductsCall*>(given);
  const Product& p = product_of(call, number);
  const PanelsPiece piece = panels_of(p, number);
  begin_tiles();
  p.by_unit ? amx_sum<T, ROUNDED, true>(call, p, piece, scratch) : amx_sum<T, ROUNDED, false>(call, p, piece, scratch);
  end_tiles();
  float* sums = scratch + PACKED_FLOATS;
  join_tiles(p.by_unit, call.m, piece.width, sums, scratch);
  if (!ROUNDED) mend_sums<T>(call, p, 0, p.count, 0, INT64_MAX, piece.first, sums, piece.width);
}

template <typename T>
void amx_commit(const void* given, int64_t number, const float* scratch) {
  const ProductsCall& call = *static_cast<const ProductsCall*>(given);
  const Product& p = product_of(call, number);
  panels_write<T>(p, panels_of(p, number), call.m, scratch + PACKED_FLOATS);
}

inline bool streams(bool by_unit, int64_t m) { return !by_unit && m <= FEW_TILES * TILE_ROWS; }
static_assert(ROWS_AT_ONCE == TILE_ROWS);

template <bool ROUNDED>
void split_piece(const void* given, int64_t number, float*) {
  const ProductsCall& call = *static_cast<const ProductsCall*>(given);
  const int64_t blocks = pieces_of(call.m, TILE_ROWS), row = number % blocks * TILE_ROWS;
  const Split& split = call.splits->all[number / blocks];
  const int64_t depth = call.splits->depth;
  for (int64_t begin = 0; begin < split.k; begin += depth) {
    const int64_t units = lesser(depth, split.k - begin);
    split_rows<ROUNDED>(split.x + row * split.k + begin, lesser(TILE_ROWS, call.m - row), units, split.k,
                        call.splits->by_unit, call.splits->pairs,
                        split.tiles + (begin * blocks * TILE_ROWS + row * tiled(units)) * parts_of<float>(ROUNDED));
  }
}

// Bytes of the tiles of m rows of the inputs, and of what is said about them.
inline int64_t amx_bytes(bool rounded, bool by_unit, int64_t m, int64_t n, int64_t count, const Input* inputs) {
  int64_t bytes = sizeof(Splits) + count * sizeof(Split) + LINE;
  if (takes_groups(by_unit, m, n, count, inputs)) bytes += groups_of(count, inputs) * m * n * sizeof(float);
  for (int64_t i = 0; i < count; i++)
    bytes += pieces_of(m, TILE_ROWS) * TILE_ROWS * tiled(inputs[i].k) * parts_of<float>(rounded) * sizeof(BFloat16);
  return bytes;
}

// Where the tiles of the inputs will be, in `memory` of amx_bytes; the inputs' x become that.
inline const Splits* plan_tiles(bool rounded, Dtype dtype, bool by_unit, int64_t m, int64_t n, int64_t count,
                                Input* inputs, void* memory) {
  Splits* made = static_cast<Splits*>(memory);
  Split* all = reinterpret_cast<Split*>(made + 1);
  float* tiles = vectors_from(all + count);
  for (int64_t i = 0; i < count; i++) {
    all[i] = {inputs[i].x, inputs[i].k, reinterpret_cast<BFloat16*>(tiles)};
    inputs[i].x = tiles;
    tiles += pieces_of(m, TILE_ROWS) * TILE_ROWS * tiled(inputs[i].k) * parts_of<float>(rounded) / 2;
  }
  const bool groups = takes_groups(by_unit, m, n, count, inputs);
  const int64_t depth = groups ? GROUP : streams(by_unit, m) ? STREAM_DEPTH : amx_depth(rounded);
  *made = {by_unit, dtype == BFLOAT16 && !by_unit, depth, all, groups ? tiles : nullptr};  // behind all tiles
  return made;
}

inline uint64_t run_amx(Job* job, int threads, Dtype dtype, bool rounded, int64_t inputs, ProductsCall* call) {
  run_first(job, threads, inputs, *call, rounded ? split_piece<true> : split_piece<false>);
  const Product& p = call->products[0];
  if (call->splits->sums != nullptr) {
    const int64_t pieces = groups_of(p.count, p.inputs) * pieces_of(p.results.n, width_of(p.results.n));
    return with_weight_dtype(dtype, [&]<typename T>(T*) {
      return pool_run(job, threads, pieces, rounded ? group_piece<T, true> : group_piece<T, false>, group_commit,
                      group_finish<T>);
    });
  }
  const bool streamed = streams(p.by_unit, call->m);
  const int64_t pieces = divide(call, threads, {AMX_PANEL, streamed ? 1 : PANELS, 2});
  return with_weight_dtype(dtype, [&]<typename T>(T*) {
    if (streamed)
      return pool_run(job, threads, pieces, rounded ? stream_piece<T, true> : stream_piece<T, false>, amx_commit<T>);
    return pool_run(job, threads, pieces, rounded ? amx_piece<T, true> : amx_piece<T, false>, amx_commit<T>);
  });
}

}  // namespace

#else

namespace {

inline int64_t least_amx_rows(Dtype, bool) { return 0; }
inline int64_t amx_bytes(bool, bool, int64_t, int64_t, int64_t, const Input*) { return 0; }
inline const Splits* plan_tiles(bool, Dtype, bool, int64_t, int64_t, int64_t, Input*, void*) { return nullptr; }
inline uint64_t run_amx(Job*, int, Dtype, bool, int64_t, ProductsCall*) { return 0; }

}  // namespace

#endif

// Products of few rows with weights by unit, by tiles.
#pragma once

#include "amx_tiles.h"
#include "units.h"

#if defined(KERNELS_AVX512)

namespace {

// So few rows are multiplied in groups of units, whose rows of weights are read one after the other, GROUP_WIDTH outputs
// of them: memory gives such at up to twice the speed of panels. Groups are summed for themselves, and then added up.
constexpr int64_t MOST_GROUPED_ROWS = FEW_TILES * TILE_ROWS, GROUP_WIDTH = 2048;
// Units whose weights are packed at a time.
constexpr int64_t group_depth(int weight_parts) { return (weight_parts == MOST_PARTS ? 1 : 2) * TILE_DEPTH; }
// From the tiles of 16 outputs to the next ones: at a distance of 4096 bytes all would be in the same lines of the cache.
constexpr int64_t group_stride(int weight_parts, int64_t steps) { return steps * weight_parts * TILE + TILE_DEPTH; }
constexpr bool fits_group(int parts) {
  const int64_t tiles = GROUP_WIDTH / TILE_ROWS * group_stride(parts, group_depth(parts) / TILE_DEPTH);
  return GROUP_WIDTH * MOST_GROUPED_ROWS + tiles / 2 <= SCRATCH;
}
static_assert(fits_group(1) && fits_group(2) && fits_group(3));

struct Group {
  const Input* input;
  int64_t begin, end;  // of its units
};

inline Group group_of(const Product& p, int64_t number) {
  const Input* input = p.inputs;
  for (; number >= pieces_of(input->k, GROUP); input++) number -= pieces_of(input->k, GROUP);
  return {input, number * GROUP, lesser(input->k, (number + 1) * GROUP)};
}

// Outputs of a piece.
inline int64_t width_of(int64_t n) {
  return pieces_of(pieces_of(n, pieces_of(n, GROUP_WIDTH)), AMX_PANEL) * AMX_PANEL;
}

// As pack_tiles, of all columns and steps; the tiles of 16 outputs and the next ones are `stride` apart.
template <typename T, bool ROUNDED>
WITH_BF16 void pack_rows(const AmxPanel<T>& panel, int64_t stride) {
  constexpr int PARTS = parts_of<T>(ROUNDED);
  const int64_t steps = pieces_of(panel.units, TILE_DEPTH), tiles = pieces_of(panel.columns, AMX_PANEL) * 4;
  for (int64_t step = 0; step < steps; step++)
    for (int64_t r = 0; r < TILE_ROWS; r++) {
      const int64_t unit = step * TILE_DEPTH + r;
      const T *first = panel.w + unit * panel.ldw, *second = first + LANES * panel.ldw;
      for (int64_t o = 0; o < tiles; o++) {
        const int64_t columns = panel.columns - o * TILE_ROWS;
        Vec parts[PARTS];
        split_pair<T, ROUNDED>(unit < panel.units ? load_some(first + o * TILE_ROWS, columns) : zeros(),
                               unit + LANES < panel.units ? load_some(second + o * TILE_ROWS, columns) : zeros(), parts);
        __builtin_prefetch(first + 2 * panel.ldw + o * TILE_ROWS, 0, 2);
        __builtin_prefetch(second + 2 * panel.ldw + o * TILE_ROWS, 0, 2);
        BFloat16* to = panel.tiles + o * stride + step * PARTS * TILE + r * TILE_DEPTH;
        for (int part = 0; part < PARTS; part++) store(reinterpret_cast<float*>(to + part * TILE), parts[part]);
      }
    }
}

template <typename T, bool ROUNDED>
WITH_BF16 void group_piece(const void* given, int64_t number, float* scratch) {
  constexpr int W_PARTS = parts_of<T>(ROUNDED), X_PARTS = parts_of<float>(ROUNDED);
  constexpr int64_t DEPTH = group_depth(W_PARTS);
  const ProductsCall& call = *static_cast<const ProductsCall*>(given);
  const Product& p = call.products[0];
  const int64_t n = p.results.n, width = width_of(n), parts = pieces_of(n, width);
  const Group group = group_of(p, number / parts);
  const Input& input = *group.input;
  const int64_t first = number % parts * width, columns = lesser(width, n - first);
  const int64_t rows = pieces_of(call.m, TILE_ROWS), ldx = pieces_of(group.end - group.begin, TILE_DEPTH) * X_PARTS * TILE;
  const BFloat16* x = reinterpret_cast<const BFloat16*>(input.x) + group.begin * rows * TILE_ROWS * X_PARTS;
  float* sums = scratch;
  BFloat16* packed = reinterpret_cast<BFloat16*>(sums + rows * TILE_ROWS * width);
  memset(sums, 0, rows * TILE_ROWS * width * sizeof(float));
  alignas(64) float added[4 * SUMS_TILE];
  Flow flow = {{}, {}, {added, nullptr, 0}};
  const auto is_packed = []<int COUNT>(int64_t, int64_t) {};
  begin_tiles();
  for (int64_t begin = group.begin; begin < group.end; begin += DEPTH, x += DEPTH * TILE_ROWS * X_PARTS) {
    const int64_t units = lesser(DEPTH, group.end - begin), steps = pieces_of(units, TILE_DEPTH);
    const int64_t ldw = group_stride(W_PARTS, steps);
    pack_rows<T, ROUNDED>({weight_at<T>(p, input, begin, first), input.ldw, units, columns, packed}, ldw);
    for (int64_t column = 0; column < columns; column += AMX_PANEL)
      multiply_panel<true, W_PARTS, X_PARTS>(steps, packed + column / TILE_ROWS * ldw, ldw, x, ldx, rows, is_packed,
                                             flow, sums + column * TILE_ROWS, width * TILE_ROWS);
  }
  flow.added.add();
  end_tiles();
  join_tiles(true, call.m, width, sums, reinterpret_cast<float*>(packed));
  if (!ROUNDED) mend_sums<T>(call, p, &input - p.inputs, 1, group.begin, group.end, first, sums, width);
}

inline void group_commit(const void* given, int64_t number, const float* scratch) {
  const ProductsCall& call = *static_cast<const ProductsCall*>(given);
  const int64_t n = call.products[0].results.n, width = width_of(n), parts = pieces_of(n, width);
  const int64_t first = number % parts * width, columns = lesser(width, n - first);
  float* sums = call.splits->sums + number / parts * call.m * n + first;
  for (int64_t row = 0; row < call.m; row++) memcpy(sums + row * n, scratch + row * width, columns * sizeof(float));
}

template <typename T>
void group_finish(const void* given) {
  const ProductsCall& call = *static_cast<const ProductsCall*>(given);
  const Product& p = call.products[0];
  add_groups<T>(p.results, call.m, groups_of(p.count, p.inputs), call.splits->sums);
}

inline bool takes_groups(bool by_unit, int64_t m, int64_t n, int64_t count, const Input* inputs) {
  return by_unit && m <= MOST_GROUPED_ROWS && groups_of(count, inputs) * pieces_of(n, width_of(n)) <= MOST_PIECES;
}

}  // namespace

#endif

// The second product of an MLP, with weights that lie by unit, (k, n): a unit that is 0 in every row is not read.
//
// Units are summed in groups of GROUP by their number, in their order, and then the groups in theirs. What is skipped
// changes no bit of that: adding 0 times a finite weight changes a sum only from -0 to 0, and sums are made +0 at the
// end. With weights that are not finite it would; nothing is stored by unit then (artifacts.py).
#pragma once

#include <sched.h>

#include "coded.h"
#include "common.h"
#include "results.h"

namespace {

// Units that are summed together. More are read faster; fewer would fit more threads, so that groups are divided by
// outputs too: a piece is a group's sums for `width` outputs, which changes no bit of them.
constexpr int64_t GROUP = 512;
constexpr int64_t LEAST_WIDTH = 256, PIECES_OF_A_THREAD = 3;
// Units whose weights are added at a time, a row of each; they and the next ones fit the second-level cache.
constexpr int64_t BLOCK = 8;
// More rows than MOST_UNIT_ROWS, up to so many, go in blocks, if that reads a part of the units only: then it is faster
// than panels, to which zeros are as good as other inputs. Panels of rounded factors are faster than others.
constexpr int64_t MOST_SPARSE_ROWS = 32;
constexpr double MOST_READ = 0.6, MOST_READ_ROUNDED = 0.4;

template <typename T>
struct UnitsCall {
  int64_t m, n, groups, parts, width;  // parts of a group, of `width` outputs
  Results results;
  float* sums;  // (groups, m, n)
  struct Group {
    const T* w;
    int64_t ldw, count, ldx;  // count of units to add
    const int32_t* units;     // which; null for the first ones
    const float* x;           // (m, count), of these units, rows ldx apart
  };
  Group* all;
};

// sums (M, n) += x (M, count) times the weights of `count` units, at most BLOCK; the weights in `next` are asked for.
template <int M, int V, typename T>
inline int64_t add_tiles(int64_t c, int64_t n, int64_t count, const T* const* w, const T* const* next, const float* x,
                         int64_t ldx, float* sums) {
  constexpr int64_t WIDTH = V * LANES, OF_A_LINE = LINE / sizeof(T);
  for (; c + WIDTH <= n; c += WIDTH) {
    Vec totals[M][V];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) totals[m][v] = load(sums + m * n + c + v * LANES);
    for (int64_t u = 0; u < count; u++) {
      Vec weights[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) weights[v] = load(w[u] + c + v * LANES);
#pragma GCC unroll 8
      for (int64_t i = 0; i < WIDTH; i += OF_A_LINE) __builtin_prefetch(next[u] + c + i, 0, 2);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const Vec xs = all(x[m * ldx + u]);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) totals[m][v] = multiply_add(weights[v], xs, totals[m][v]);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) store(sums + m * n + c + v * LANES, totals[m][v]);
  }
  return c;
}

// The same with coded weights, whose rows begin `begin` outputs before; n and `begin` are multiples of CODED_BLOCK.
template <int M>
inline void add_coded(int64_t n, int64_t count, int64_t begin, const Coded* const* w, const Coded* const* next,
                      const float* x, int64_t ldx, float* sums) {
  Bytes tables[BLOCK];
  for (int64_t u = 0; u < count; u++) tables[u] = repeated(w[u]);
  for (int64_t c = 0; c < n; c += CODED_BLOCK)
    each_part([&]<int H, int PART>() {
      float* part = sums + c + H * HALF + PART * LANES;
      Vec totals[M][4];
#pragma GCC unroll 8
      for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) totals[m][v] = load(part + m * n + v * HALF / 4);
      for (int64_t u = 0; u < count; u++) {
        Vec weights[4];
        decode<H, PART>(w[u], begin + c, tables[u], weights);
        const Coded* block = next[u] + block_begin(begin + c);
        ask_lines<H, PART>([&](int64_t byte) __attribute__((always_inline)) { __builtin_prefetch(block + byte, 0, 2); });
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
          const Vec xs = all(x[m * ldx + u]);
#pragma GCC unroll 4
          for (int v = 0; v < 4; v++) totals[m][v] = multiply_add(weights[v], xs, totals[m][v]);
        }
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) store(part + m * n + v * HALF / 4, totals[m][v]);
    });
}

template <int M, typename T>
inline void add_units(int64_t n, int64_t count, int64_t begin, const T* const* w, const T* const* next, const float* x,
                      int64_t ldx, float* sums) {
  if constexpr (is_coded<T>) {
    add_coded<M>(n, count, begin, w, next, x, ldx, sums);
  } else {
    int64_t c = add_tiles<M, tile(M), T>(0, n, count, w, next, x, ldx, sums);
    c = add_tiles<M, 1, T>(c, n, count, w, next, x, ldx, sums);
    for (; c < n; c++)
      for (int64_t m = 0; m < M; m++)
        for (int64_t u = 0; u < count; u++)
          sums[m * n + c] = fmaf(scalar(w[u][c]), x[m * ldx + u], sums[m * n + c]);
  }
}

// Of M rows, SOME at a time; the others follow while the weights are in the cache.
template <int M, int SOME, typename T>
inline void add_rows(int64_t n, int64_t count, int64_t begin, const T* const* w, const T* const* next, const float* x,
                     int64_t ldx, float* sums) {
  constexpr int NOW = lesser(M, SOME);
  add_units<NOW, T>(n, count, begin, w, next, x, ldx, sums);
  if constexpr (NOW < M)
    add_rows<M - NOW, SOME, T>(n, count, begin, w, next, x + NOW * ldx, ldx, sums + NOW * n);
}

// The sums (M, outputs of the piece) of a piece.
template <int M, typename T>
inline void add_group(const UnitsCall<T>& call, int64_t piece, float* sums) {
  if constexpr (M > 1) {
    if (call.m < M) return add_group<M - 1, T>(call, piece, sums);
  }
  constexpr int PASSES = pieces_of(M, is_coded<T> ? CODED_UNIT_ROWS : UNIT_ROWS), SOME = pieces_of(M, PASSES);
  const int64_t place = piece / call.parts, begin = piece % call.parts * call.width;
  const int64_t width = lesser(call.width, call.n - begin);
  const auto& group = call.all[place];
  memset(sums, 0, M * width * sizeof(float));
  // After the last unit of a group come the first ones of the next, which the same thread probably adds next.
  const auto& after = call.all[place + 1 < call.groups && call.all[place + 1].count > 0 ? place + 1 : place];
  const auto unit = [&](int64_t j) {
    const auto& of = j < group.count ? group : after;
    j = lesser(j < group.count ? j : j - group.count, of.count - 1);
    return of.w + (of.units != nullptr ? of.units[j] : j) * of.ldw + (is_coded<T> ? 0 : begin);
  };
  for (int64_t j = 0; j < group.count; j += BLOCK) {
    const T *w[BLOCK], *next[BLOCK];
    for (int64_t u = 0; u < BLOCK; u++) {
      w[u] = unit(j + u);
      next[u] = unit(j + BLOCK + u);
    }
    add_rows<M, SOME, T>(width, lesser(BLOCK, group.count - j), begin, w, next, group.x + j, group.ldx, sums);
  }
}

template <typename T>
void units_piece(const void* given, int64_t piece, float* scratch) {
  add_group<MOST_UNIT_ROWS, T>(*static_cast<const UnitsCall<T>*>(given), piece, scratch);
}

template <typename T>
void units_commit(const void* given, int64_t piece, const float* scratch) {
  const UnitsCall<T>& call = *static_cast<const UnitsCall<T>*>(given);
  const int64_t begin = piece % call.parts * call.width, width = lesser(call.width, call.n - begin);
  float* sums = call.sums + piece / call.parts * call.m * call.n + begin;
  for (int64_t row = 0; row < call.m; row++)
    memcpy(sums + row * call.n, scratch + row * width, width * sizeof(float));
}

// Adds the sums (groups, m, n) up, and writes the results.
template <typename T>
void add_groups(const Results& results, int64_t m, int64_t groups, float* sums) {
  const int64_t size = m * results.n;
  float* totals = sums;  // the first group's
  int64_t i = 0;
  for (; i + 4 * LANES <= size; i += 4 * LANES) {
    Vec total[4];
    for (int v = 0; v < 4; v++) total[v] = load(totals + i + v * LANES);
    for (int64_t group = 1; group < groups; group++)
      for (int v = 0; v < 4; v++) total[v] = total[v] + load(sums + group * size + i + v * LANES);
    for (int v = 0; v < 4; v++) store(totals + i + v * LANES, total[v] + zeros());  // -0 becomes 0
  }
  for (; i < size; i++) {
    for (int64_t group = 1; group < groups; group++) totals[i] += sums[group * size + i];
    totals[i] += 0.0f;
  }
  for (int64_t row = 0; row < m; row++) finish<T>(results, row, 0, results.n, totals + row * results.n);
}

template <typename T>
void units_finish(const void* given) {
  const UnitsCall<T>& call = *static_cast<const UnitsCall<T>*>(given);
  add_groups<T>(call.results, call.m, call.groups, call.sums);
}

// The groups of all inputs.
inline int64_t groups_of(int64_t count, const Input* inputs) {
  int64_t groups = 0;
  for (int64_t i = 0; i < count; i++) groups += pieces_of(inputs[i].k, GROUP);
  return groups;
}

// Calls `take` with the units of x (m, count), rows k apart, that are not 0 in every row, ascending.
template <typename Take>
inline void each_unit(const float* x, int64_t m, int64_t k, int64_t count, const Take& take) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    uint32_t bits = 0;
    for (int64_t row = 0; row < m; row++) bits |= nonzero(load(x + row * k + i));
    for (; bits != 0; bits &= bits - 1) take(i + __builtin_ctz(bits));
  }
  for (; i < count; i++) {
    bool any = false;
    for (int64_t row = 0; row < m; row++) any |= x[row * k + i] != 0.0f;
    if (any) take(i);
  }
}

// Whether there are few enough rows and groups; `n` floats of a row and group have to fit the scratch memory.
inline bool takes_units(int64_t m, int64_t n, int64_t count, const Input* inputs) {
  return m <= MOST_UNIT_ROWS && m * n <= SCRATCH &&
         groups_of(count, inputs) * pieces_of(n, LEAST_WIDTH) <= MOST_PIECES;
}

// How many of the m rows are multiplied at a time, or 0 if another way is faster for them. Up to `few` rows none is. That
// depends on the inputs alone, and not on whether units are skipped, so that results do not either.
inline int64_t rows_by_unit(bool rounded, int64_t few, int64_t m, int64_t n, int64_t count, const Input* inputs) {
  const int64_t rows = pieces_of(m, pieces_of(m, MOST_UNIT_ROWS));
  if (m > MOST_SPARSE_ROWS || !takes_units(rows, n, count, inputs)) return 0;
  if (m <= few) return rows;
  int64_t all = 0, found = 0;
  for (int64_t i = 0; i < count; i++)
    for (int64_t row = 0; row < m; row += rows, all += inputs[i].k)
      each_unit(inputs[i].x + row * inputs[i].k, lesser(rows, m - row), inputs[i].k, inputs[i].k,
                [&](int64_t) { found++; });
  // Other ways with so few rows wait for memory, too, whatever their factors are.
  return found <= (rounded && m > MOST_UNIT_ROWS ? MOST_READ_ROUNDED : MOST_READ) * all ? rows : 0;
}

// Of the rows, m from `row` on.
template <typename T>
uint64_t units_sum(int threads, int64_t row, int64_t m, bool skip, Results results, int64_t count,
                   const Input* inputs) {
  using Call = UnitsCall<T>;
  using Group = typename Call::Group;
  const int64_t n = results.n;
  results.y += row * n;
  if (results.residual != nullptr) results.residual += row * n;
  const int64_t groups = groups_of(count, inputs);
  const int64_t units_bytes = groups * GROUP * sizeof(int32_t), values_bytes = groups * GROUP * m * sizeof(float);
  Job* job;
  Call* call = begin<Call>(
      &job, groups * (sizeof(Group) + m * n * sizeof(float)) + (skip ? units_bytes + values_bytes : 0));
  if (call == nullptr) return NO_MEMORY;
  Group* group = reinterpret_cast<Group*>(call + 1);
  float* sums = reinterpret_cast<float*>(group + groups);
  float* values = sums + groups * m * n;
  int32_t* units = reinterpret_cast<int32_t*>(values + groups * GROUP * m);
  int64_t parts = 1;
  while (groups * parts < PIECES_OF_A_THREAD * threads && n >= 2 * parts * LEAST_WIDTH) parts *= 2;
  constexpr int64_t MULTIPLE = is_coded<T> ? CODED_BLOCK : LANES;
  const int64_t width = pieces_of(pieces_of(n, parts), MULTIPLE) * MULTIPLE;
  *call = {m, n, groups, pieces_of(n, width), width, results, sums, group};
  for (int64_t i = 0; i < count; i++) {
    const Input& input = inputs[i];
    for (int64_t first = 0; first < input.k; first += GROUP, group++) {
      const int64_t size = lesser(GROUP, input.k - first);
      const int64_t ldw = is_coded<T> ? coded_bytes(n) : input.ldw;
      const T* w = static_cast<const T*>(is_coded<T> ? input.coded : input.w) + first * ldw;
      const float* x = input.x + row * input.k + first;
      *group = {w, ldw, size, input.k, nullptr, x};
      if (skip) {
        int64_t found = 0;
        each_unit(x, m, input.k, size, [&](int64_t unit) { units[found++] = static_cast<int32_t>(unit); });
        if (found == size) continue;
        for (int64_t r = 0; r < m; r++)
          for (int64_t j = 0; j < found; j++) values[r * found + j] = x[r * input.k + units[j]];
        *group = {w, ldw, found, found, units, values};
        units += found;
        values += m * found;
      }
    }
  }
  return pool_run(job, threads, groups * call->parts, units_piece<T>, units_commit<T>, units_finish<T>);
}

// Calls `run` with the first of some rows and how many, at most `rows`, until it was called with all m.
template <typename F>
inline uint64_t each_block(int64_t m, int64_t rows, F run) {
  uint64_t handle = 0;
  for (int64_t row = 0; row < m && handle != NO_MEMORY; row += rows) {
    while (!pool_left(handle)) sched_yield();
    handle = run(row, lesser(rows, m - row));
  }
  return handle;
}

// Sums of m rows, `rows` of them at a time.
template <typename T>
uint64_t units_sums(int threads, int64_t m, int64_t rows, bool skip, const Results& results, int64_t count,
                    const Input* inputs) {
  return each_block(m, rows, [&](int64_t first, int64_t some) {
    return units_sum<T>(threads, first, some, skip, results, count, inputs);
  });
}

}  // namespace

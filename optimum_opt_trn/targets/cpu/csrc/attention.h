// Attention of a step's new tokens over the used part of the cache, in the cache's dtype.
#pragma once

#include <sched.h>

#include "attention_block.h"
#include "attention_token.h"
#include "common.h"

namespace {

// From so many tokens of a slot on, converting keys and values for all of them pays.
constexpr int64_t FEWEST_IN_BLOCK = 5;
// The caller writes keys and values of so few floats alone, as that takes no longer than sharing them.
constexpr int64_t MOST_WRITTEN_ALONE = 32768;

// Where the cache is: keys and values (slots, heads, length, d).
template <typename C>
struct Cache {
  C *keys, *values;
  int64_t by_slot, by_head, by_place;
};

template <typename C>
struct WriteCall {
  int64_t tokens, heads, d, at_once;
  const float *key, *value;
  Cache<C> cache;
  const int64_t *slots, *positions;
};

template <typename C>
void write_piece(const void* given, int64_t piece, float*) {
  const WriteCall<C>& call = *static_cast<const WriteCall<C>*>(given);
  for (int64_t t = piece * call.at_once; t < lesser(call.tokens, (piece + 1) * call.at_once); t++)
    for (int64_t head = 0; head < call.heads; head++) {
      const int64_t from = (t * call.heads + head) * call.d;
      const int64_t to =
          call.slots[t] * call.cache.by_slot + head * call.cache.by_head + call.positions[t] * call.cache.by_place;
      narrow(call.key + from, call.d, call.cache.keys + to);
      narrow(call.value + from, call.d, call.cache.values + to);
    }
}

// Tokens of a slot that a piece takes together.
struct Block {
  int64_t slot, first, count;
};

template <typename C>
struct AttendCall {
  int64_t heads, d;
  Cache<C> cache;
  const float* query;
  float scale;
  float* y;
  const Block* blocks;
  const int64_t* positions;
};

template <typename C>
void attend_piece(const void* given, int64_t piece, float* mixed) {
  const AttendCall<C>& call = *static_cast<const AttendCall<C>*>(given);
  const Block& block = call.blocks[piece / call.heads];
  const int64_t head = piece % call.heads, from = block.slot * call.cache.by_slot + head * call.cache.by_head;
  const int64_t* positions = call.positions + block.first;
  const C *keys = call.cache.keys + from, *values = call.cache.values + from;
  const float* query = call.query + (block.first * call.heads + head) * call.d;
  if (block.count == 1)
    attend_token(query, keys, values, call.cache.by_place, *positions + 1, call.d, call.scale, mixed);
  else
    attend_block(query, call.heads * call.d, block.count, positions, keys, values, call.cache.by_place, call.d,
                 call.scale, mixed);
}

template <typename C>
void attend_commit(const void* given, int64_t piece, const float* mixed) {
  const AttendCall<C>& call = *static_cast<const AttendCall<C>*>(given);
  const Block& block = call.blocks[piece / call.heads];
  for (int64_t row = 0; row < block.count; row++)
    memcpy(call.y + ((block.first + row) * call.heads + piece % call.heads) * call.d, mixed + row * padded(call.d),
           call.d * sizeof(float));
}

// The block that begins with token `first`, of at most `most` tokens, or of one.
inline Block block_at(int64_t first, int64_t tokens, const int64_t* slots, int64_t most) {
  int64_t end = first + 1;
  while (end < tokens && slots[end] == slots[first]) end++;
  const int64_t count = end - first;
  if (lesser(most, count) < FEWEST_IN_BLOCK) return {slots[first], first, 1};
  // Blocks of a run have nearly the same size, if possible of whole tiles.
  const int64_t share = pieces_of(count, pieces_of(count, most));
  return {slots[first], first, lesser(lesser(count, most), pieces_of(share, GEMM_ROWS) * GEMM_ROWS)};
}

template <typename C>
uint64_t attend_in(int threads, int64_t tokens, int64_t heads, int64_t d, const float* query, const float* key,
                   const float* value, Cache<C> cache, const int64_t* slots, const int64_t* positions, float scale,
                   float* y) {
  const WriteCall<C> written = {tokens, heads, d, tokens, key, value, cache, slots, positions};
  Job* job;
  if (tokens * heads * d <= MOST_WRITTEN_ALONE) {
    write_piece<C>(&written, 0, nullptr);
  } else {
    WriteCall<C>* call = begin<WriteCall<C>>(&job);
    if (call == nullptr) return NO_MEMORY;
    *call = written;
    call->at_once = pieces_of(tokens, lesser(tokens, lesser<int64_t>(MOST_PIECES, 4 * threads)));
    pool_run(job, threads, pieces_of(tokens, call->at_once), write_piece<C>, nullptr);
  }
  const auto blocks_of = [&](int64_t most) {
    int64_t count = 0;
    for (int64_t t = 0; t < tokens; t += block_at(t, tokens, slots, most).count) count++;
    return count;
  };
  int64_t most = blocks_fit(d) ? TOKENS : 1, blocks = blocks_of(most);
  while (most > GEMM_ROWS && blocks * heads < 4 * threads) blocks = blocks_of(most /= 2);
  uint64_t handle = 0;
  for (int64_t t = 0; blocks > 0;) {
    const int64_t count = lesser(blocks, MOST_PIECES / heads);
    AttendCall<C>* call = begin<AttendCall<C>>(&job, count * sizeof(Block) + tokens * sizeof(int64_t));
    if (call == nullptr) return NO_MEMORY;
    Block* copied = reinterpret_cast<Block*>(call + 1);
    for (int64_t i = 0; i < count; i++, t += copied[i - 1].count) copied[i] = block_at(t, tokens, slots, most);
    int64_t* places = reinterpret_cast<int64_t*>(copied + count);
    memcpy(places, positions, tokens * sizeof(int64_t));
    *call = {heads, d, cache, query, scale, y, copied, places};
    while (!pool_left(handle)) sched_yield();
    handle = pool_run(job, threads, count * heads, attend_piece<C>, attend_commit<C>);
    blocks -= count;
  }
  return handle;
}

inline uint64_t attend(int threads, Dtype dtype, int64_t tokens, int64_t heads, int64_t d, const float* query,
                       const float* key, const float* value, void* keys, void* values, const int64_t* strides,
                       const int64_t* slots, const int64_t* positions, float scale, float* y) {
  return with_dtype(dtype, [&]<typename C>(C*) {
    const Cache<C> cache = {static_cast<C*>(keys), static_cast<C*>(values), strides[0], strides[1], strides[2]};
    return attend_in<C>(threads, tokens, heads, d, query, key, value, cache, slots, positions, scale, y);
  });
}

}  // namespace

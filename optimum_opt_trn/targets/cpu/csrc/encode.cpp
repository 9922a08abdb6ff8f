// Codes weights, once for all instruction sets: an export does it, and models read them.
#include <cstring>

#include "coded_format.h"
#include "pool.h"

namespace {

struct Encoding {
  int64_t n, k, ldw;
  const uint16_t* w;
  uint8_t* coded;
  int64_t* failed;
};
// Rows of a piece, if they are few.
constexpr int64_t ROWS = 16;

int64_t rows_of_a_piece(int64_t n) { return ROWS * MOST_PIECES >= n ? ROWS : (n + MOST_PIECES - 1) / MOST_PIECES; }

// The most frequent high bytes of a row, to `table`, and the code of each byte, to `codes`; how many weights have others.
int64_t choose(const uint16_t* w, int64_t k, uint8_t* table, uint8_t* codes) {
  uint32_t counts[4][256] = {};  // equal neighbours do not wait for one another
  for (int64_t i = 0; i < k; i++) counts[i % 4][w[i] >> 8]++;
  for (int value = 0; value < 256; value++)
    for (int part = 1; part < 4; part++) counts[0][value] += counts[part][value];
  memset(codes, OTHER, 256);
  int64_t others = k;
  for (int code = 0; code < OTHER; code++) {
    int best = 0;
    for (int value = 1; value < 256; value++)
      if (counts[0][value] > counts[0][best]) best = value;
    table[code] = static_cast<uint8_t>(best);
    if (counts[0][best] == 0) continue;  // the row has fewer
    codes[best] = static_cast<uint8_t>(code);
    others -= counts[0][best];
    counts[0][best] = 0;
  }
  return others;
}

// Whether a row fits.
bool encode_row(const uint16_t* w, int64_t k, uint8_t* coded) {
  uint8_t table[OTHERS_BEGIN] = {}, codes[256];
  if (choose(w, k, table, codes) > MOST_OTHERS) return false;
  if (coded == nullptr) return true;
  memset(coded, 0, BLOCKS_BEGIN);
  memcpy(coded, table, sizeof table);
  int64_t others = 0;
  for (int64_t begin = 0; begin < k; begin += CODED_BLOCK) {
    uint8_t* block = coded + block_begin(begin);
    for (int64_t byte = 0; byte < HALF; byte++) {
      uint8_t both = 0;
      for (int64_t half = 0; half < 2; half++) {
        const int64_t place = begin + half * HALF + place_of(byte);
        const uint8_t high = w[place] >> 8, code = codes[high];
        block[half * HALF + byte] = static_cast<uint8_t>(w[place]);
        both |= code << 4 * half;
        if (code != OTHER) continue;
        const uint32_t word = static_cast<uint32_t>(place) << 8 | high;
        memcpy(coded + OTHERS_BEGIN + 4 * others++, &word, sizeof word);
      }
      block[CODED_BLOCK + byte] = both;
    }
  }
  return true;
}

void encode_piece(const void* given, int64_t piece, float*) {
  const Encoding& call = *static_cast<const Encoding*>(given);
  const int64_t rows = rows_of_a_piece(call.n), begin = piece * rows;
  for (int64_t row = begin; row < call.n && row < begin + rows; row++) {
    uint8_t* coded = call.coded == nullptr ? nullptr : call.coded + row * coded_bytes(call.k);
    if (!encode_row(call.w + row * call.ldw, call.k, coded)) __atomic_fetch_add(call.failed, 1, __ATOMIC_RELAXED);
  }
}

}  // namespace

int64_t encode(int threads, int64_t n, int64_t k, int64_t ldw, const uint16_t* w, uint8_t* coded) {
  Job* job;
  Encoding* call = static_cast<Encoding*>(pool_begin(sizeof(Encoding), &job));
  if (call == nullptr) return -1;
  int64_t failed = 0;
  *call = {n, k, ldw, w, coded, &failed};
  const int64_t rows = rows_of_a_piece(n);
  pool_run(job, threads, (n + rows - 1) / rows, encode_piece, nullptr);
  return failed;
}

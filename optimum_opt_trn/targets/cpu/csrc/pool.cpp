#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <atomic>

namespace {

constexpr int64_t JOBS = 256;
// How long a thread without work waits awake: longer than what Python does between two calls of a step.
constexpr int64_t IDLE_NANOSECONDS = 60'000;
// How long a caller waits for a piece that another thread computes before it computes the piece itself: as long as two
// of its own pieces took, and at least this. A thread that lost its core comes back after milliseconds.
constexpr int64_t PATIENCE_NANOSECONDS = 40'000;

enum State : unsigned char { OPEN, COMMITTING, DONE };

int64_t now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1'000'000'000LL + time.tv_nsec;
}

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A ticket says which piece of a share is next: 32 bits of a number that grows with every call, 8 of the job's place,
// 12 of where the share ends, 12 of the next piece. Taking a piece compares all of it, so that nobody takes one of a
// call that has ended.
constexpr uint64_t next_of(uint64_t ticket) { return ticket & 0xfff; }
constexpr uint64_t end_of(uint64_t ticket) { return ticket >> 12 & 0xfff; }
constexpr uint64_t place_of(uint64_t ticket) { return ticket >> 24 & 0xff; }

// The pieces of a call are divided into a share for each thread: neighbours, so that what a kernel prefetches at the
// end of a piece is what the same thread reads next. Who has no piece left takes from the shares of others.
struct alignas(64) Share {
  std::atomic<uint64_t> ticket;
};

}  // namespace

struct Job {
  std::atomic<uint64_t> handle;  // the ticket's upper 40 bits
  std::atomic<int64_t> pieces, done, left;
  Compute compute;
  Commit commit;
  std::atomic<unsigned char> states[MOST_PIECES + 1];
  void* memory;
  size_t bytes;
};

namespace {

struct Pool {
  pthread_mutex_t calls;  // held by the thread whose call runs
  pthread_mutex_t sleep;
  pthread_cond_t work, finished;
  Share shares[MOST_THREADS + 1];  // the caller's first
  std::atomic<uint64_t> newest;    // handle of the newest call whose pieces can be taken
  std::atomic<int64_t> limit, sleeping, waiting;
  int64_t workers;
  uint32_t number;
  float* scratch;  // the caller's
  Job jobs[JOBS];
};

std::atomic<Pool*> current;

float* allocate_scratch() {
  return static_cast<float*>(aligned_alloc(64, SCRATCH * sizeof(float)));
}

// The last access to the job is `left`: then its memory may serve another call.
void compute_piece(Pool* pool, Job* job, int64_t piece, float* scratch) {
  const int64_t pieces = job->pieces.load(std::memory_order_relaxed);
  job->compute(job->memory, piece, scratch);
  unsigned char open = OPEN;
  if (job->states[piece].compare_exchange_strong(open, COMMITTING, std::memory_order_acq_rel)) {
    if (job->commit != nullptr) job->commit(job->memory, piece, scratch);
    job->states[piece].store(DONE, std::memory_order_release);
    const bool last = job->done.fetch_add(1) + 1 == pieces;
    if (last && pool->waiting.load() > 0) {
      pthread_mutex_lock(&pool->sleep);
      pthread_cond_broadcast(&pool->finished);
      pthread_mutex_unlock(&pool->sleep);
    }
  }
}

// Takes a piece of a share, if there is one, and computes it.
bool take_from(Pool* pool, Share* share, float* scratch) {
  uint64_t ticket = share->ticket.load(std::memory_order_acquire);
  do {
    if (next_of(ticket) >= end_of(ticket)) return false;
  } while (!share->ticket.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel));
  Job* job = &pool->jobs[place_of(ticket)];
  compute_piece(pool, job, next_of(ticket), scratch);
  job->left.fetch_add(1, std::memory_order_release);
  return true;
}

// Takes pieces until there are none: of the thread's own share, then of those after it; how many. `index` 0 is the
// caller.
int64_t take_all(Pool* pool, int64_t index, float* scratch) {
  const int64_t shares = pool->limit.load() + 1;
  int64_t taken = 0;
  for (int64_t i = 0; i < shares; i++)
    while (take_from(pool, &pool->shares[(index + i) % shares], scratch)) taken++;
  return taken;
}

struct Start {
  Pool* pool;
  int64_t index;  // from 1
  float* scratch;
};

void* work(void* given) {
  Start start = *static_cast<Start*>(given);
  free(given);
#if defined(__linux__)
  pthread_setname_np(pthread_self(), "opt-kernels");
#endif
  Pool* pool = start.pool;
  uint64_t seen = 0;
  int64_t since = now();
  for (;;) {
    const uint64_t newest = pool->newest.load();
    if (newest != seen) {
      seen = newest;
      if (start.index <= pool->limit.load()) {
        take_all(pool, start.index, start.scratch);
        since = now();
      }
      continue;
    }
    for (int i = 0; i < 16; i++) relax();
    if (now() - since < IDLE_NANOSECONDS) continue;
    pool->sleeping.fetch_add(1);
    pthread_mutex_lock(&pool->sleep);
    while (pool->newest.load() == seen) pthread_cond_wait(&pool->work, &pool->sleep);
    pthread_mutex_unlock(&pool->sleep);
    pool->sleeping.fetch_sub(1);
    since = now();
  }
}

// Starts workers until there are `count`, or the system gives no more: fewer are slower, and as good.
void hire(Pool* pool, int64_t count) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the program's own threads
  while (pool->workers < count) {
    Start* start = static_cast<Start*>(malloc(sizeof(Start)));
    float* scratch = allocate_scratch();
    pthread_t thread;
    pthread_attr_t detached;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    bool started = start != nullptr && scratch != nullptr;
    if (started) {
      *start = {pool, pool->workers + 1, scratch};
      started = pthread_create(&thread, &detached, work, start) == 0;
    }
    pthread_attr_destroy(&detached);
    if (!started) {
      free(start);
      free(scratch);
      break;
    }
    pool->workers++;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

// Gives a job a new handle.
void name(Pool* pool, Job* job) {
  job->handle.store(static_cast<uint64_t>(++pool->number) << 8 | (job - pool->jobs));
}

// Runs the pieces of a call until all are done. Threads may still be in it.
void run_pieces(Pool* pool, Job* job, int threads, int64_t pieces, Compute compute, Commit commit) {
  const uint64_t handle = job->handle.load();
  job->compute = compute;
  job->commit = commit;
  for (int64_t i = 0; i < pieces; i++) job->states[i].store(OPEN, std::memory_order_relaxed);
  job->done.store(0);
  job->left.store(0);
  job->pieces.store(pieces);
  int64_t helpers = threads - 1 < pieces - 1 ? threads - 1 : pieces - 1;
  if (helpers > MOST_THREADS) helpers = MOST_THREADS;
  if (helpers <= 0) {
    for (int64_t piece = 0; piece < pieces; piece++) compute_piece(pool, job, piece, pool->scratch);
    job->left.store(pieces);
  } else {
    if (pool->workers < helpers) hire(pool, helpers);
    pool->limit.store(helpers);
    for (int64_t share = 0; share <= helpers; share++) {
      const uint64_t first = pieces * share / (helpers + 1), end = pieces * (share + 1) / (helpers + 1);
      pool->shares[share].ticket.store(handle << 24 | end << 12 | first);
    }
    pool->newest.store(handle);
    if (pool->sleeping.load() > 0) {
      pthread_mutex_lock(&pool->sleep);
      pthread_cond_broadcast(&pool->work);
      pthread_mutex_unlock(&pool->sleep);
    }
    const int64_t begun = now(), taken = take_all(pool, 0, pool->scratch), since = now();
    const int64_t two_pieces = taken > 0 ? 2 * (since - begun) / taken : 0;
    const int64_t patience = two_pieces > PATIENCE_NANOSECONDS ? two_pieces : PATIENCE_NANOSECONDS;
    bool again = commit != nullptr;
    while (job->done.load(std::memory_order_acquire) < pieces) {
      if (now() - since < patience) {
        relax();
      } else if (again) {
        for (int64_t piece = 0; piece < pieces; piece++)
          if (job->states[piece].load() == OPEN) compute_piece(pool, job, piece, pool->scratch);
        again = false;
      } else if (commit != nullptr) {
        sched_yield();  // a thread is committing, which takes less than a microsecond
      } else {
        pool->waiting.store(1);
        pthread_mutex_lock(&pool->sleep);
        while (job->done.load() < pieces) pthread_cond_wait(&pool->finished, &pool->sleep);
        pthread_mutex_unlock(&pool->sleep);
        pool->waiting.store(0);
      }
    }
  }
}

// A child has none of its parent's threads, and its locks as they were: it begins anew.
void forget() { current.store(nullptr); }

}  // namespace

void pool_prepare() {
  if (current.load() != nullptr) return;
  static bool watching = false;
  if (!watching) watching = pthread_atfork(nullptr, nullptr, forget) == 0;
  Pool* pool = static_cast<Pool*>(aligned_alloc(64, (sizeof(Pool) + 63) / 64 * 64));
  if (pool == nullptr) return;
  memset(static_cast<void*>(pool), 0, sizeof(Pool));
  pthread_mutex_init(&pool->calls, nullptr);
  pthread_mutex_init(&pool->sleep, nullptr);
  pthread_cond_init(&pool->work, nullptr);
  pthread_cond_init(&pool->finished, nullptr);
  pool->scratch = allocate_scratch();
  current.store(pool);
}

void* pool_begin(size_t bytes, Job** job) {
  Pool* pool = current.load();
  if (pool == nullptr || pool->scratch == nullptr) return nullptr;
  pthread_mutex_lock(&pool->calls);
  int64_t place = 0;  // of a job that all threads have left; there are more jobs than threads
  while (pool->jobs[place].left.load(std::memory_order_acquire) != pool->jobs[place].pieces.load()) place++;
  Job* found = &pool->jobs[place];
  if (found->bytes < bytes) {
    free(found->memory);
    found->bytes = (bytes + 4095) / 4096 * 4096;
    found->memory = aligned_alloc(64, found->bytes);
    if (found->memory == nullptr) {
      found->bytes = 0;
      pthread_mutex_unlock(&pool->calls);
      return nullptr;
    }
  }
  name(pool, found);
  *job = found;
  return found->memory;
}

void pool_run_first(Job* job, int threads, int64_t pieces, Compute compute) {
  Pool* pool = current.load();
  run_pieces(pool, job, threads, pieces, compute, nullptr);
  while (job->left.load(std::memory_order_acquire) != pieces) sched_yield();  // all are done, none is computed twice
  name(pool, job);
}

uint64_t pool_run(Job* job, int threads, int64_t pieces, Compute compute, Commit commit,
                  Finish finish) {
  Pool* pool = current.load();
  run_pieces(pool, job, threads, pieces, compute, commit);
  if (finish != nullptr) finish(job->memory);
  const bool left = job->left.load(std::memory_order_acquire) == pieces;
  const uint64_t handle = job->handle.load();
  pthread_mutex_unlock(&pool->calls);
  return left ? 0 : handle;
}

bool pool_left(uint64_t handle) {
  Pool* pool = current.load();
  if (pool == nullptr || handle == 0) return true;
  const Job* job = &pool->jobs[handle & 0xff];
  return job->handle.load() != handle || job->left.load(std::memory_order_acquire) == job->pieces.load();
}

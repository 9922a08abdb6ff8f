// Threads of our own, which share the pieces of one call at a time.
//
// A piece goes to whichever thread is free. The calling thread always takes part, so a call ends even if no other
// thread ever runs. A call ends when its pieces are done: where another thread holds the last pieces and does not
// deliver them (the system gave its core to another process), the caller computes them again itself.
//
// That is safe because a piece is computed into the thread's own scratch memory and is then committed, by one thread
// only. A thread that comes late finds its piece committed, and drops what it computed. Until then it may still read
// the call's inputs, so whoever owns them keeps them until `pool_left` says that all threads have left the call.
#pragma once

#include <cstddef>
#include <cstdint>

// Computes piece `piece` of `call`. With a `commit` it writes to `scratch` only, and may run twice at a time.
using Compute = void (*)(const void* call, int64_t piece, float* scratch);
// Writes the results of a piece from `scratch` to where they belong.
using Commit = void (*)(const void* call, int64_t piece, const float* scratch);
// What the caller does when all pieces are done.
using Finish = void (*)(const void* call);

// Of each thread: floats of scratch memory, 64-byte aligned. A panel of weights and its sums fit (panels.h).
constexpr int64_t SCRATCH = 270336;
// Besides the caller.
constexpr int64_t MOST_THREADS = 128;
// A call has at most so many pieces.
constexpr int64_t MOST_PIECES = 4095;

struct Job;

// The pool of this process; another one after a fork. To be called by one thread at a time.
void pool_prepare();

// Memory of `bytes` for the description of a call, 64-byte aligned; waits until no other thread calls. Null if there
// is no memory; the pool is then free for others again.
void* pool_begin(size_t bytes, Job** job);

// Runs pieces that write results themselves, in the memory of the call that `pool_begin` began; before those of pool_run.
void pool_run_first(Job* job, int threads, int64_t pieces, Compute compute);

// Runs the pieces of the call that `pool_begin` began, on `threads` threads with the caller. `commit` null: pieces
// write results themselves, and none is computed twice. Returns 0, or a handle if threads are still in the call.
uint64_t pool_run(Job* job, int threads, int64_t pieces, Compute compute, Commit commit,
                  Finish finish = nullptr);

// Whether all threads have left the call with this handle; 0 is that of none.
bool pool_left(uint64_t handle);

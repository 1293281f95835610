// Threads that wait for work, and the loop over tasks that they share.
//
// A step of a decoder is some hundred short parallel loops with a few microseconds between them, so the threads spin
// for a while before they sleep: waking one costs as much as a loop takes.
#pragma once
#include <cstddef>
#include <cstdint>

typedef void (*tr_task)(void *context, int32_t index, int32_t thread);

struct Pool;
Pool *pool_new(int32_t count);
void pool_free(Pool *pool);
int32_t pool_threads(const Pool *pool);
// Calls task(context, i, thread) for every i below n, each once, on all threads; returns when all are done.
void pool_run(Pool *pool, int32_t n, tr_task task, void *context);
// Memory of one thread, at least `bytes`, 64-byte aligned; what it held is lost. Null when there is none.
void *pool_scratch(Pool *pool, int32_t thread, size_t bytes);

// pool_run with a lambda f(index, thread).
template <class F> static inline void parallel(Pool *pool, int32_t n, const F &f) {
  pool_run(
      pool, n, [](void *c, int32_t i, int32_t t) { (*(const F *)c)(i, t); }, (void *)&f);
}

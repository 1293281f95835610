// A pool of threads, and parallel loops over tasks.
//
// A step of a decoder is some hundred short parallel loops with a few microseconds between them. Waking a thread takes
// as long as a loop, so threads spin for a while before they sleep.
#pragma once
#include <cstddef>
#include <cstdint>

typedef void (*tr_task)(void *context, int32_t index, int32_t thread);

struct Pool;
Pool *pool_new(int32_t count);
void pool_free(Pool *pool);
int32_t pool_threads(const Pool *pool);
// Calls task(context, i, thread) once for every i below n, on all threads. Returns when all are done.
void pool_run(Pool *pool, int32_t n, tr_task task, void *context);
// Memory of one thread, at least `bytes`, 64-byte aligned; its contents are lost. Null if there is no memory.
void *pool_scratch(Pool *pool, int32_t thread, size_t bytes);

// pool_run with a lambda f(index, thread).
template <class F> static inline void parallel(Pool *pool, int32_t n, const F &f) {
  pool_run(
      pool, n, [](void *c, int32_t i, int32_t t) { (*(const F *)c)(i, t); }, (void *)&f);
}

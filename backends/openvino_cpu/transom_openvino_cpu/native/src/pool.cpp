#include "pool.h"
#include <atomic>
#include <cstdlib>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

namespace {
const int SPINS = 1 << 14; // pauses, some 100 microseconds

struct Worker {
  Pool *pool;
  pthread_t thread;
  int32_t index;
  void *scratch;
  size_t bytes;
  char apart[64];
};

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

void sleep_while(std::atomic<uint32_t> *word, uint32_t value) {
  syscall(SYS_futex, (uint32_t *)word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void wake_all(std::atomic<uint32_t> *word) {
  syscall(SYS_futex, (uint32_t *)word, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}
} // namespace

struct Pool {
  int32_t count, started;
  Worker *workers;
  alignas(64) std::atomic<uint32_t> generation; // incremented for each loop; sleeping threads wait for it
  alignas(64) std::atomic<uint64_t> left;       // the loop's generation, and in the low bits the tasks not yet taken
  alignas(64) std::atomic<int32_t> done;        // tasks
  alignas(64) std::atomic<int32_t> asleep;
  std::atomic<bool> stop;
  int32_t tasks;
  tr_task task;
  void *context;
};

namespace {
// A loop ends when its tasks are done, not when every worker has seen it, so a worker that the system has preempted
// delays the loop only if it holds a task. Such a worker may wake up during a later loop. Therefore the remaining tasks
// and the generation are in one word: a task that is taken belongs to the loop of that generation, and this loop does
// not end before the task is done.
void take(Pool *p, int32_t thread) {
  uint64_t left = p->left.load(std::memory_order_acquire);
  while ((uint32_t)left) {
    if (!p->left.compare_exchange_weak(left, left - 1, std::memory_order_acquire))
      continue;
    p->task(p->context, p->tasks - (int32_t)(uint32_t)left, thread);
    p->done.fetch_add(1, std::memory_order_release);
    left = p->left.load(std::memory_order_acquire);
  }
}

void *work(void *w_) {
  Worker *w = (Worker *)w_;
  Pool *p = w->pool;
  uint32_t seen = 0;
  for (;;) {
    for (int spin = 0; p->generation.load(std::memory_order_acquire) == seen; spin++) {
      if (spin < SPINS) {
        relax();
        continue;
      }
      p->asleep.fetch_add(1);
      if (p->generation.load() == seen)
        sleep_while(&p->generation, seen);
      p->asleep.fetch_sub(1);
    }
    seen = p->generation.load(std::memory_order_acquire);
    if (p->stop.load())
      return nullptr;
    take(p, w->index);
  }
}
} // namespace

Pool *pool_new(int32_t count) {
  Pool *p = nullptr;
  if (count < 1 || posix_memalign((void **)&p, 64, sizeof(Pool)))
    return nullptr;
  p->workers = (Worker *)calloc(count, sizeof(Worker));
  if (!p->workers) {
    free(p);
    return nullptr;
  }
  p->count = count, p->started = 0;
  p->generation = 0, p->left = 0, p->done = 0, p->asleep = 0, p->stop = false;
  for (int32_t i = 0; i < count; i++)
    p->workers[i].pool = p, p->workers[i].index = i;
  for (int32_t i = 1; i < count; i++) {
    if (pthread_create(&p->workers[i].thread, nullptr, work, &p->workers[i])) {
      pool_free(p);
      return nullptr;
    }
    p->started = i;
  }
  return p;
}

void pool_free(Pool *p) {
  p->stop = true;
  p->generation.fetch_add(1);
  wake_all(&p->generation);
  for (int32_t i = 1; i <= p->started; i++)
    pthread_join(p->workers[i].thread, nullptr);
  for (int32_t i = 0; i < p->count; i++)
    free(p->workers[i].scratch);
  free(p->workers);
  free(p);
}

int32_t pool_threads(const Pool *p) { return p->count; }

void pool_run(Pool *p, int32_t n, tr_task task, void *context) {
  if (n <= 1 || p->count == 1) {
    for (int32_t i = 0; i < n; i++)
      task(context, i, 0);
    return;
  }
  p->tasks = n, p->task = task, p->context = context;
  p->done.store(0, std::memory_order_relaxed);
  const uint64_t generation = p->generation.load(std::memory_order_relaxed) + 1;
  p->left.store(generation << 32 | (uint32_t)n, std::memory_order_release);
  p->generation.fetch_add(1); // sequentially consistent, like the reads of a worker before it sleeps
  if (p->asleep.load() > 0)
    wake_all(&p->generation);
  take(p, 0);
  for (int spin = 0; p->done.load(std::memory_order_acquire) < n; spin++) {
    if (spin < SPINS)
      relax();
    else
      sched_yield();
  }
}

void *pool_scratch(Pool *p, int32_t thread, size_t bytes) {
  Worker *w = &p->workers[thread];
  if (w->bytes < bytes) {
    free(w->scratch);
    w->scratch = nullptr, w->bytes = 0;
    if (posix_memalign(&w->scratch, 64, bytes))
      return w->scratch = nullptr;
    w->bytes = bytes;
  }
  return w->scratch;
}

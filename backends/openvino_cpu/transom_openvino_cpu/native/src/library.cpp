// The C interface: calls the code of the requested instruction set.
#include "abi.h"
#include "level.h"
#include "pool.h"
#include <cstdlib>
#include <cstring>

#define TR_EXPORT extern "C" __attribute__((visibility("default")))

// Null if the build omitted the unit.
extern const Level level_scalar __attribute__((weak)), level_avx2 __attribute__((weak)),
    level_avx_vnni __attribute__((weak)), level_avx512 __attribute__((weak)), level_avx512_bf16 __attribute__((weak)),
    level_amx __attribute__((weak));

namespace {
const Level *const LEVELS[] = {&level_scalar, &level_avx2, &level_avx_vnni, &level_avx512, &level_avx512_bf16,
                               &level_amx};
char names[128]; // of the available levels

__attribute__((constructor)) void name_levels() {
  for (const Level *l : LEVELS)
    if (l) {
      if (*names)
        strcat(names, " ");
      strcat(names, l->name);
    }
}

struct Opened {
  const Level *level;
  void *engine;
};
} // namespace

TR_EXPORT const char *tr_levels(void) { return names; }

TR_EXPORT int32_t tr_pool_new(int32_t count, void **pool) {
  *pool = pool_new(count);
  return *pool ? TR_OK : TR_NO_THREADS;
}

TR_EXPORT void tr_pool_free(void *pool) { pool_free((Pool *)pool); }

TR_EXPORT int32_t tr_open(const tr_program *program, const char *level, void *pool, void **engine) {
  *engine = nullptr;
  for (const Level *l : LEVELS)
    if (l && !strcmp(l->name, level)) {
      Opened *o = (Opened *)calloc(1, sizeof(Opened));
      if (!o)
        return TR_NO_MEMORY;
      o->level = l;
      int32_t status = l->open(program, (Pool *)pool, &o->engine);
      if (status != TR_OK)
        free(o);
      else
        *engine = o;
      return status;
    }
  return TR_NO_LEVEL;
}

TR_EXPORT void tr_close(void *engine) {
  Opened *o = (Opened *)engine;
  o->level->close(o->engine);
  free(o);
}

TR_EXPORT int64_t tr_page_bytes(void *engine, int32_t layer) {
  Opened *o = (Opened *)engine;
  return o->level->page_bytes(o->engine, layer);
}

TR_EXPORT void tr_set_cache(void *engine, int32_t layer, void *memory, int32_t pages) {
  Opened *o = (Opened *)engine;
  o->level->set_cache(o->engine, layer, memory, pages);
}

TR_EXPORT int32_t tr_route_new(void *engine, void **route) {
  Opened *o = (Opened *)engine;
  return o->level->new_route(o->engine, route);
}

TR_EXPORT int32_t tr_route_copy(void *engine, const void *from, void **route) {
  Opened *o = (Opened *)engine;
  return o->level->copy_route(o->engine, from, route);
}

TR_EXPORT void tr_route_free(void *route) {
  free(((Route *)route)->memory);
  free(route);
}

TR_EXPORT int64_t tr_route_data(void *route, void **memory) {
  *memory = ((Route *)route)->memory;
  return (int64_t)((Route *)route)->bytes;
}

TR_EXPORT int32_t tr_route_check(void *engine, void *route, int32_t tokens) {
  Opened *o = (Opened *)engine;
  return o->level->route_fits(o->engine, route, tokens) ? TR_OK : TR_BAD_PROGRAM;
}

TR_EXPORT void tr_route_counts(void *engine, void *route, double *read, double *seen) {
  Opened *o = (Opened *)engine;
  o->level->route_counts(o->engine, route, read, seen);
}

TR_EXPORT int32_t tr_times(void *engine, double *seconds) {
  Opened *o = (Opened *)engine;
  return o->level->times(o->engine, seconds);
}

TR_EXPORT int32_t tr_run(void *engine, const tr_step *step, int32_t *layer) {
  Opened *o = (Opened *)engine;
  return o->level->run(o->engine, step, layer);
}

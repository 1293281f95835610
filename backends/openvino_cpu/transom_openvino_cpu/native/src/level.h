// The functions of the translation unit of one instruction set, called by library.cpp.
#pragma once
#include "abi.h"

struct Pool;

// The state of sparse attention for a sequence: for each layer and KV head a RouteHead and the arrays behind it. It may
// outlive its engine.
struct Route {
  size_t bytes;
  char *memory;
};

struct Level {
  const char *name;
  int32_t (*open)(const tr_program *program, Pool *pool, void **engine);
  void (*close)(void *engine);
  int64_t (*page_bytes)(void *engine, int32_t layer);
  void (*set_cache)(void *engine, int32_t layer, void *memory, int32_t pages);
  int32_t (*new_route)(void *engine, void **route);
  int32_t (*copy_route)(void *engine, const void *from, void **route);
  void (*route_counts)(void *engine, void *route, double *read, double *seen);
  bool (*route_fits)(void *engine, void *route, int32_t tokens);
  int32_t (*times)(void *engine, double *seconds);
  int32_t (*run)(void *engine, const tr_step *step, int32_t *layer);
};

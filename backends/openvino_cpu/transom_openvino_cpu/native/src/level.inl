// The code that is compiled once per instruction set. The including file has included a simd_*.h and defines LEVEL, the
// name of its `Level`.
#include "abi.h"
#include "level.h"
#include "pool.h"
#include <cmath>
#include <cstdlib>
#include <ctime>
// The order matters: each uses those before it.
#include "math.inl"
#include "tiles.inl"
#include "blocks.inl"
#include "linear.inl"
#ifdef TRANSOM_AMX
#include "tiled_linear.inl"
#endif
#include "cache.inl"
#include "attention.inl"
#include "routing.inl"
#include "sparse.inl"
#include "program.inl"

namespace {
// Copies an array to `at` and advances `at`. The arrays of a program need not outlive tr_open.
template <class X> const X *keep(char *&at, const X *from, int n) {
  X *copy = (X *)at;
  if (n)
    __builtin_memcpy((void *)copy, (const void *)from, sizeof(X) * n);
  at += align64(sizeof(X) * n);
  return copy;
}

void close_engine(void *engine) {
  Engine *e = (Engine *)engine;
  if (e->global)
    for (int b = 0; b < e->program.buffers; b++)
      if (b != e->program.output)
        free(e->global[b]);
  free(e->global);
  free(e->local_at);
  free(e->table_at);
  free(e->cache);
  free(e->tables);
  free(e->shared);
  free(e->splits);
  free(e->queries);
  free(e->times);
  free(e->copies);
  free(e);
}

bool view_fits(const tr_program &p, tr_view v, int width) {
  return v.buffer >= 0 && v.buffer < p.buffers && v.offset >= 0 && width > 0 &&
         (int64_t)v.offset + width <= p.buffer[v.buffer].width;
}
// Local buffers have the rows of one block, so operators that read other rows cannot use them.
bool shared_view(const tr_program &p, tr_view v, int width) { return view_fits(p, v, width) && !p.buffer[v.buffer].local; }

const int MOST_GROUP = 64; // query heads per KV head; the size of arrays in routing.inl and in Attention
const int MOST_WIDTH = 1 << 24; // of a buffer; a wider one means a damaged program

// A wrong program would write outside its buffers, so it is checked.
bool program_fits(const tr_program &p) {
  if (p.output < 0 || p.output >= p.buffers || p.buffer[p.output].local)
    return false;
  for (int x = 0; x < p.buffers; x++)
    if (p.buffer[x].width < 1 || p.buffer[x].width > MOST_WIDTH)
      return false;
  if (p.cache < TR_CACHE_F32 || p.cache > TR_CACHE_INT8)
    return false;
  for (int x = 0; x < p.ropes; x++)
    if (p.rope[x].count < 1 || !p.rope[x].frequencies)
      return false;
  for (int x = 0; x < p.layers; x++) {
    const tr_layer &l = p.layer[x];
    if (l.kv_heads < 1 || l.heads < 1 || l.heads % l.kv_heads || l.heads / l.kv_heads > MOST_GROUP ||
        l.head_dim < 16 || l.head_dim > 256 || l.head_dim % 16 || l.value_dim < 16 || l.value_dim > 256 ||
        l.value_dim % 16 || l.window < 0)
      return false;
  }
  for (int x = 0; x < p.matrices; x++) {
    const tr_matrix &m = p.matrix[x];
    if (m.kind < TR_F32 || m.kind > TR_U6 || m.rows < 1 || m.columns < 1 || !m.data ||
        (!in_blocks(m) && m.outer) ||
        (in_blocks(m) && (m.block < 8 || m.block % 8 || m.columns % m.block || m.zero < 0 || m.zero > 255 ||
                          !planes_fit(m) || !superblocks_fit(m))))
      return false;
  }
  // The operator after which only the rows that need logits remain. There is one, and those rows belong to no token:
  // whatever depends on tokens comes before it.
  int choice = -1;
  for (int x = 0; x < p.ops; x++)
    if (p.op[x].kind == TR_OP_ROWS) {
      if (choice >= 0)
        return false;
      choice = x;
    }
  if (choice < 0 || p.op[choice].a.buffer == p.output)
    return false;
  for (int x = 0; x < p.ops; x++) {
    const tr_op &o = p.op[x];
    const bool has_matrix = o.kind == TR_OP_EMBED || o.kind == TR_OP_LINEAR;
    if (has_matrix && (o.matrix < 0 || o.matrix >= p.matrices))
      return false;
    if (o.kind != TR_OP_ROPE && !view_fits(p, o.dst, o.width))
      return false;
    if (o.kind != TR_OP_ATTEND && o.b.buffer >= 0 && !view_fits(p, o.b, o.width))
      return false;
    if (x < choice && (o.dst.buffer == p.output || o.a.buffer == p.output || o.b.buffer == p.output))
      return false;
    if (x > choice && (o.kind == TR_OP_EMBED || o.kind == TR_OP_ROPE || o.kind == TR_OP_ATTEND))
      return false;
    switch (o.kind) {
    case TR_OP_EMBED:
      if (p.matrix[o.matrix].columns != o.width)
        return false;
      break;
    case TR_OP_LINEAR: {
      const tr_matrix &m = p.matrix[o.matrix];
      if (!view_fits(p, o.a, m.columns) || (o.act ? m.rows % 32 || m.rows / 2 != o.width : m.rows != o.width))
        return false;
      const bool blocks = in_blocks(m);
      if (o.by != TR_BY_F32 && !(o.by == TR_BY_INT8 && blocks) && !(o.by == TR_BY_BF16 && (blocks || m.kind == TR_BF16)))
        return false;
      break;
    }
    case TR_OP_NORM:
    case TR_OP_ROPE:
      if (!view_fits(p, o.a, o.width) || o.groups < 1 || o.width % o.groups || o.width / o.groups % 16)
        return false;
      if (o.kind == TR_OP_NORM ? !o.vector
                               : o.index < 0 || o.index >= p.ropes ||
                                     (int64_t)2 * p.rope[o.index].count > o.width / o.groups)
        return false;
      break;
    case TR_OP_ATTEND: {
      if (o.index < 0 || o.index >= p.layers)
        return false;
      const tr_layer &l = p.layer[o.index];
      if (o.width != (int64_t)l.heads * l.value_dim || !shared_view(p, o.dst, o.width) ||
          !shared_view(p, o.a, l.heads * l.head_dim) || !shared_view(p, o.b, l.kv_heads * l.head_dim) ||
          !shared_view(p, o.c, l.kv_heads * l.value_dim))
        return false;
      break;
    }
    case TR_OP_ADD:
    case TR_OP_GLU:
      if (!view_fits(p, o.b, o.width))
        return false;
      // fall through
    case TR_OP_SCALE:
    case TR_OP_SOFTCAP:
    case TR_OP_BIAS:
      if (!view_fits(p, o.a, o.width))
        return false;
      break;
    case TR_OP_ROWS:
      if (!shared_view(p, o.a, o.width) || !shared_view(p, o.dst, o.width))
        return false;
      break;
    default:
      return false;
    }
  }
  return true;
}

int32_t open_engine(const tr_program *program, Pool *pool, void **engine) {
  *engine = nullptr;
  const tr_program &p = *program;
  if (!program_fits(p))
    return TR_BAD_PROGRAM;
  Engine *e = (Engine *)calloc(1, sizeof(Engine));
  if (!e)
    return TR_NO_MEMORY;
  e->program = p, e->pool = pool;
  const size_t copies = align64(sizeof(tr_op) * p.ops) + align64(sizeof(tr_matrix) * p.matrices) +
                        align64(sizeof(tr_rope) * p.ropes) + align64(sizeof(tr_layer) * p.layers) +
                        align64(sizeof(tr_buffer) * p.buffers) + 64;
  if (posix_memalign((void **)&e->copies, 64, copies))
    e->copies = nullptr;
  e->global = (float **)calloc(p.buffers + 1, sizeof(float *));
  e->local_at = (size_t *)calloc(p.buffers + 1, sizeof(size_t));
  e->table_at = (size_t *)calloc(p.ropes + 1, sizeof(size_t));
  e->cache = (void **)calloc(p.layers + 1, sizeof(void *));
  if (!e->copies || !e->global || !e->local_at || !e->table_at || !e->cache) {
    close_engine(e);
    return TR_NO_MEMORY;
  }
  char *at = e->copies;
  e->program.op = keep(at, p.op, p.ops);
  e->program.matrix = keep(at, p.matrix, p.matrices);
  e->program.rope = keep(at, p.rope, p.ropes);
  e->program.layer = keep(at, p.layer, p.layers);
  e->program.buffer = keep(at, p.buffer, p.buffers);
  for (int b = 0; b < p.buffers; b++)
    if (p.buffer[b].local) {
      e->local_at[b] = e->local_bytes;
      e->local_bytes += align64((size_t)p.buffer[b].width * BLOCK * 4);
    }
  for (int i = 0; i < p.ropes; i++) {
    e->table_at[i] = e->table_width;
    e->table_width += 2 * (size_t)p.rope[i].count;
  }
  e->vocabulary = e->pages = INT32_MAX;
  for (int x = 0; x < p.ops; x++) {
    const tr_op &o = p.op[x];
    if (o.kind == TR_OP_EMBED && p.matrix[o.matrix].rows < e->vocabulary)
      e->vocabulary = p.matrix[o.matrix].rows;
    if (o.kind != TR_OP_LINEAR)
      continue;
    const tr_matrix &m = p.matrix[o.matrix];
    const size_t acts = align64(acts_bytes(m, o.by, MOST)), panel = panel_bytes(m, o.by);
    e->acts_bytes = acts > e->acts_bytes ? acts : e->acts_bytes;
    e->panel_bytes = panel > e->panel_bytes ? panel : e->panel_bytes;
  }
  e->scratch_bytes = e->local_bytes + e->acts_bytes + (size_t)MOST * WIDE * 64 + e->panel_bytes + 64;
  for (int i = 0; i < p.layers; i++) {
    const size_t n = by_cache(p, [&](auto c) { return attend_plan_bytes<decltype(c)>(p.layer[i]); });
    e->scratch_bytes = n > e->scratch_bytes ? n : e->scratch_bytes;
  }
  e->shared_bytes = e->acts_bytes;
  if (posix_memalign((void **)&e->shared, 64, e->shared_bytes + 64)) {
    e->shared = nullptr;
    close_engine(e);
    return TR_NO_MEMORY;
  }
  *engine = e;
  return TR_OK;
}

int64_t page_bytes_of(void *engine, int32_t layer) {
  Engine *e = (Engine *)engine;
  const tr_layer &l = e->program.layer[layer];
  return (int64_t)l.kv_heads *
         (int64_t)by_cache(e->program, [&](auto c) { return head_bytes<decltype(c)>(l, e->program.routed); });
}

void set_cache_of(void *engine, int32_t layer, void *memory, int32_t pages) {
  Engine *e = (Engine *)engine;
  e->cache[layer] = memory;
  e->pages = pages < e->pages ? pages : e->pages;
}

template <class C> void reset_route(Engine *e, Route *r) {
  tr_part part = {};
  part.route = r;
  for (int i = 0; i < e->program.layers; i++)
    for (int h = 0; h < e->program.layer[i].kv_heads; h++) {
      RouteHead &head = *route_of<C>(e, part, i, h).head;
      head.columns = head.patches = 0, head.block = -1, head.read = head.seen = 0;
      for (int32_t &p : head.remembered)
        p = -1;
    }
}

int32_t new_route(void *engine, void **route) {
  Engine *e = (Engine *)engine;
  *route = nullptr;
  Route *r = (Route *)calloc(1, sizeof(Route));
  if (!r)
    return TR_NO_MEMORY;
  r->bytes = by_cache(e->program, [&](auto c) { return route_bytes<decltype(c)>(e->program); });
  if (posix_memalign((void **)&r->memory, 64, r->bytes)) {
    free(r);
    return TR_NO_MEMORY;
  }
  by_cache(e->program, [&](auto c) { reset_route<decltype(c)>(e, r); });
  *route = r;
  return TR_OK;
}

template <class C> void copy_heads(Engine *e, const Route *from, Route *to) {
  tr_part a = {}, b = {};
  a.route = (void *)from, b.route = to;
  for (int i = 0; i < e->program.layers; i++) {
    const tr_layer &l = e->program.layer[i];
    const size_t each = (size_t)(l.heads / l.kv_heads) * C::query_width(l.head_dim);
    for (int h = 0; h < l.kv_heads; h++) {
      RouteView<C> x = route_of<C>(e, a, i, h), y = route_of<C>(e, b, i, h);
      *y.head = *x.head;
      y.head->read = y.head->seen = 0;
      if (x.head->columns) {
        __builtin_memcpy(y.columns, x.columns, tile_bytes<C>(l.head_dim, l.value_dim));
        __builtin_memcpy(y.patches, x.patches, 8 * node_numbers(l) * sizeof(*x.patches));
      }
      for (int r = 0; r < COLUMN_ROWS; r++)
        if (x.head->remembered[r] >= 0)
          __builtin_memcpy(y.ring + r * each, x.ring + r * each, each * sizeof(*x.ring));
    }
  }
}

int32_t copy_route(void *engine, const void *from, void **route) {
  Engine *e = (Engine *)engine;
  int32_t status = new_route(engine, route);
  if (status == TR_OK)
    by_cache(e->program, [&](auto c) { copy_heads<decltype(c)>(e, (const Route *)from, (Route *)*route); });
  return status;
}

// Whether n numbers are ascending and in 0 ... end - 1.
bool ascending(const int32_t *x, int n, int most, int64_t end) {
  if (n < 0 || n > most)
    return false;
  for (int i = 0; i < n; i++)
    if (x[i] < (i ? (int64_t)x[i - 1] + 1 : 0) || x[i] >= end)
      return false;
  return true;
}

template <class C> bool heads_fit(Engine *e, void *route, int tokens) {
  tr_part part = {};
  part.route = route;
  for (int i = 0; i < e->program.layers; i++)
    for (int h = 0; h < e->program.layer[i].kv_heads; h++) {
      const RouteHead &r = *route_of<C>(e, part, i, h).head;
      if (!ascending(r.column, r.columns, MOST_COLUMNS, tokens) ||
          !ascending(r.patch, r.patches, MOST_COLUMNS, ((int64_t)tokens + NODE - 1) / NODE))
        return false;
      for (int x = 0; x < r.patches; x++)
        if (!(r.patch_count[x] >= 0 && r.patch_count[x] <= NODE))
          return false;
      for (int32_t p : r.remembered)
        if (p < -1 || p >= tokens)
          return false;
    }
  return true;
}

bool route_fits(void *engine, void *route, int32_t tokens) {
  Engine *e = (Engine *)engine;
  return by_cache(e->program, [&](auto c) { return heads_fit<decltype(c)>(e, route, tokens); });
}

template <class C> void take_counts(Engine *e, void *route, double *read, double *seen) {
  tr_part part = {};
  part.route = route;
  for (int i = 0; i < e->program.layers; i++)
    for (int h = 0; h < e->program.layer[i].kv_heads; h++, read++, seen++) {
      RouteHead &head = *route_of<C>(e, part, i, h).head;
      *read += head.read, *seen += head.seen;
      head.read = head.seen = 0;
    }
}

void route_counts(void *engine, void *route, double *read, double *seen) {
  Engine *e = (Engine *)engine;
  by_cache(e->program, [&](auto c) { take_counts<decltype(c)>(e, route, read, seen); });
}

int32_t times_of(void *engine, double *seconds) {
  Engine *e = (Engine *)engine;
  const int threads = pool_threads(e->pool);
  for (int x = 0; x < TR_TIMES; x++) {
    seconds[x] = 0;
    for (int t = 0; e->times && t < threads; t++)
      seconds[x] += e->times[t * TIMES_APART + x];
  }
  if (!e->times && posix_memalign((void **)&e->times, 64, sizeof(double) * TIMES_APART * threads)) {
    e->times = nullptr;
    return TR_NO_MEMORY;
  }
  __builtin_memset(e->times, 0, sizeof(double) * TIMES_APART * threads);
  return TR_OK;
}

int32_t run_engine(void *engine, const tr_step *step, int32_t *layer) { return run((Engine *)engine, step, layer); }
} // namespace

extern const Level LEVEL = {LEVEL_NAME, open_engine, close_engine, page_bytes_of, set_cache_of,
                            new_route,  copy_route,  route_counts, route_fits,    times_of,     run_engine};

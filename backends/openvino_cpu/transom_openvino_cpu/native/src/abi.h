// The plain C interface of the library: what Python fills in with ctypes and hands over. Everything here is read only
// while a call runs, and every pointer stays the caller's.
#pragma once
#include <cstddef>
#include <cstdint>

extern "C" {

enum { TR_PAGE = 64 }; // tokens in a page of the cache, keys in a tile, queries in a block

// How the numbers of a matrix are kept. All of them in tiles of 16 rows (outputs); rows are padded with zeros.
enum {
  TR_F32 = 0,  // [tile][column][16] float
  TR_F16 = 1,  // [tile][column][16] IEEE half
  TR_BF16 = 2, // [tile][column / 2][16][2] bfloat16; an odd last column is padded with zeros
  TR_U4 = 3,   // [tile][block] of: quants, scales, minimums. Quants: [block / 8] of 64 bytes, which hold 2 x 4 columns
               // of 16 rows: byte 4 r + c is row r, columns c (low half) and 4 + c (high half)
  TR_U8 = 4,   // the same with quants [block / 4] of 64 bytes: byte 4 r + c is row r, column c
};

// A matrix [rows, columns]. A number of kinds TR_U4 and TR_U8 is scale * (quant - zero) + minimum.
struct tr_matrix {
  int32_t kind, rows, columns;
  int32_t block;        // columns that share a scale: a multiple of 8 that divides columns
  int32_t zero;         // subtracted from every quant
  int32_t has_minimums; // 0: they are left out of the data
  int32_t wide_scales;  // 1: scales and minimums are float; 0: IEEE half
  int32_t unused;
  const void *data;
};

enum {
  TR_OP_EMBED = 0,   // dst = scale * rows `tokens` of matrix
  TR_OP_NORM = 1,    // dst = a / rms(a) * vector, over each of `groups` equal parts of the row
  TR_OP_LINEAR = 2,  // dst = matrix a + vector + b
  TR_OP_ADD = 3,     // dst = a + b
  TR_OP_GLU = 4,     // dst = act(a) * b
  TR_OP_ROPE = 5,    // a turned in place: `groups` heads, rotary table `index`
  TR_OP_ATTEND = 6,  // dst = attention of a (queries), b (keys), c (values) in layer `index`
  TR_OP_ROWS = 7,    // dst = the rows of a whose logits are wanted; what follows has these rows
  TR_OP_SCALE = 8,   // dst = scale * a
  TR_OP_SOFTCAP = 9, // dst = scale * tanh(a / scale)
  TR_OP_BIAS = 10,   // dst = a + vector
};
enum { TR_ACT_NONE = 0, TR_ACT_SILU = 1, TR_ACT_GELU = 2, TR_ACT_GELU_TANH = 3 };
// In what numbers the activations meet a matrix.
enum { TR_BY_F32 = 0, TR_BY_INT8 = 1, TR_BY_BF16 = 2 };

// Columns of a buffer. Buffers hold float rows, one for each token; `buffer` is -1 where there is none.
struct tr_view {
  int32_t buffer, offset;
};

struct tr_op {
  int32_t kind;
  int32_t width; // columns of dst; of a for TR_OP_NORM, TR_OP_ROPE
  struct tr_view dst, a, b, c;
  int32_t matrix;
  int32_t groups;
  int32_t index;
  int32_t act; // of TR_OP_GLU; of TR_OP_LINEAR with rows in turn 16 of a gate and 16 of what it multiplies
  int32_t by;
  float scale; // epsilon of TR_OP_NORM
  const float *vector;
};

// Rotary frequencies: columns 0 ... 2 count - 1 of each head turn, column i with column count + i.
struct tr_rope {
  const float *frequencies;
  int32_t count;
  float factor; // of cosines and sines
};

struct tr_layer {
  int32_t heads, kv_heads, head_dim, value_dim; // dims: multiples of 16 up to 256
  int32_t window;                               // keys that a query sees, itself included; 0: all
  float scale, softcap;                         // softcap 0: none
  const float *sinks;                           // [heads], or null
};

struct tr_buffer {
  int32_t width;
  int32_t local; // written before it is read between two barriers (attention, choice of rows)
};

// In what numbers keys and values are kept.
enum { TR_CACHE_F32 = 0, TR_CACHE_BF16 = 1, TR_CACHE_INT8 = 2 };

struct tr_program {
  int32_t ops, matrices, ropes, layers, buffers;
  int32_t cache;        // TR_CACHE_…
  int32_t routed;       // 1: pages hold the nodes that a sparsity policy needs
  int32_t output;       // the buffer that is tr_step.logits
  const struct tr_op *op;
  const struct tr_matrix *matrix;
  const struct tr_rope *rope;
  const struct tr_layer *layer;
  const struct tr_buffer *buffer;
};

// Which keys are read; the fields are those of transom.sparsity.Sparsity.
struct tr_sparsity {
  float coverage, min_density, max_density;
  int32_t local;       // blocks of 64 before a block of queries that it reads whole
  int32_t columns;     // up to 64
  int32_t unit;        // 8, 16, 32 or 64
  int32_t rows;        // divides 64, up to 16
  int32_t dense_below; // keys
  int32_t top_k;
  int32_t node;        // 8; by the mean score a multiple of it that divides unit
  int32_t mean_score;  // 1: the textbook score, which has no columns
  int32_t unused;
  const float *heads; // [layers, kv_heads of each]: what 1 - coverage is multiplied by, or null
};

// Some new tokens of one sequence.
struct tr_part {
  int32_t begin, count; // rows of the step
  int32_t past;         // tokens cached before
  int32_t pages;
  const int32_t *page; // [pages], those that the new tokens go to included
  const struct tr_sparsity *sparsity; // null: every key is read
  void *route;                        // of the sequence; needed where there is a policy
};

struct tr_step {
  int32_t tokens, parts, rows;
  int32_t unused;
  const int64_t *token; // [tokens]
  const struct tr_part *part;
  const int32_t *row; // [rows], whose logits are wanted
  float *logits;      // [rows, vocabulary]
};

enum { TR_OK = 0, TR_NO_MEMORY = -1, TR_NO_THREADS = -2, TR_NO_LEVEL = -3, TR_BAD_PROGRAM = -4, TR_NOT_FINITE = -5 };

// The names of the instruction sets that this library was built with, best last, separated by spaces.
const char *tr_levels(void);

// Threads that wait for work: `count` in all, the caller of tr_run included. Returns TR_OK or an error.
int32_t tr_pool_new(int32_t count, void **pool);
void tr_pool_free(void *pool);

// A program ready to run. `level` is one of tr_levels; the caller knows that the processor has it.
int32_t tr_open(const struct tr_program *program, const char *level, void *pool, void **engine);
void tr_close(void *engine);

// Bytes of one page of a layer, keys and values together; the caller hands over pages of zeros.
int64_t tr_page_bytes(void *engine, int32_t layer);
// The memory of a layer's pages: [pages][kv_heads][keys, then values], 64-byte aligned.
void tr_set_cache(void *engine, int32_t layer, void *memory);

// What sparse attention remembers of one sequence: the keys that draw mass from everywhere, the latest queries. It may
// be older than the sequence: what lies behind the tokens cached at a step is forgotten then.
int32_t tr_route_new(void *engine, void **route);
int32_t tr_route_copy(void *engine, const void *from, void **route);
void tr_route_free(void *route);
// What a route holds: its bytes, and where they lie. Bytes of one route may be written over those of another one of an
// engine with the same program, and are then checked: whether they can be those of a sequence of so many tokens.
int64_t tr_route_data(void *route, void **memory);
int32_t tr_route_check(void *engine, void *route, int32_t tokens);
// Adds to read and seen [layers, kv_heads of each] the keys that queries have read, and those that they could see,
// and sets the route's own counts to 0.
void tr_route_counts(void *engine, void *route, double *read, double *seen);

// What the threads' time goes to.
enum {
  TR_TIME_ROWS = 0,       // embedding, element by element
  TR_TIME_NORM = 1,
  TR_TIME_ROPE = 2,
  TR_TIME_ROUND = 3,      // activations into the form that a product takes
  TR_TIME_PRODUCT = 4,    // with matrices
  TR_TIME_FINISH = 5,     // activation functions, biases, residuals
  TR_TIME_VOCABULARY = 6, // all of the rows whose logits are wanted
  TR_TIME_CACHE = 7,      // keys, values and nodes written
  TR_TIME_COLUMNS = 8,
  TR_TIME_ROUTE = 9,
  TR_TIME_ATTEND = 10,
  TR_TIMES = 11
};
// Sets seconds[TR_TIMES] to thread seconds since this was called last. The first call starts the clocks. Returns TR_OK
// or an error.
int32_t tr_times(void *engine, double *seconds);

// Runs the program on one step. Returns TR_OK or an error; *layer is then the layer that failed, or -1: TR_NOT_FINITE is
// then of the logits.
int32_t tr_run(void *engine, const struct tr_step *step, int32_t *layer);
}

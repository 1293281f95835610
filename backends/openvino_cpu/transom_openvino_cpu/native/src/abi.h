// The C interface of the library, which Python calls through ctypes. Structs are read only during a call, and the
// caller keeps ownership of every pointer.
#pragma once
#include <cstddef>
#include <cstdint>

extern "C" {

enum { TR_PAGE = 64 }; // tokens per page of the cache, keys per tile, queries per block

// Formats of a matrix. All have tiles of 16 rows (outputs); missing rows are zeros.
enum {
  TR_F32 = 0,  // [tile][column][16] float
  TR_F16 = 1,  // [tile][column][16] IEEE half
  TR_BF16 = 2, // [tile][column / 2][16][2] bfloat16; an odd last column is padded with zeros
  TR_U4 = 3,   // [tile][block] of quants, scales, minimums. Quants: [block / 8] groups of 64 bytes with 8 columns of
               // 16 rows: byte 4 r + c is row r, columns c (low half) and 4 + c (high half)
  TR_U8 = 4,   // the same, with quants in [block / 4] groups of 64 bytes: byte 4 r + c is row r, column c
  TR_U5 = 5,   // as TR_U4, with the lowest four bits first, then the fifth ones: [block / 32] planes of 64 bytes, whose
               // byte 4 r + c has in bit v that of row r, column 4 v + c
  TR_U6 = 6,   // the same, with [block / 16] planes, whose bits 2 v and 2 v + 1 are the highest two
};
// With scales of two levels, blocks lie in superblocks of `outer` columns: [tile][superblock] of 16 IEEE halves for the
// scales and 16 for the minimums (zeros if there are none), [block] 16 signed bytes for the scales, the same for the
// minimums if there are any, and [block] quants. A scale, or a minimum, is its half times its byte.

// A matrix [rows, columns]. From TR_U4 on a number is scale * (quant - zero) + minimum.
struct tr_matrix {
  int32_t kind, rows, columns;
  int32_t block;        // columns that share a scale; a multiple of 8, and a divisor of columns. TR_U5: a multiple of 32;
                        // TR_U6: that too, or 16 if columns are a multiple of 32
  int32_t zero;         // subtracted from every quant
  int32_t has_minimums; // 0: the data has none
  int32_t wide_scales;  // 1: scales and minimums are float; 0: IEEE half
  int32_t outer;        // columns of a superblock, a multiple of 4 blocks, and a divisor of columns; 0: one level
  const void *data;
};

enum {
  TR_OP_EMBED = 0,   // dst = scale * rows `tokens` of matrix
  TR_OP_NORM = 1,    // dst = a / rms(a) * vector, in each of `groups` equal parts of the row
  TR_OP_LINEAR = 2,  // dst = matrix a + vector + b
  TR_OP_ADD = 3,     // dst = a + b
  TR_OP_GLU = 4,     // dst = act(a) * b
  TR_OP_ROPE = 5,    // rotates a in place: `groups` heads, rotary table `index`
  TR_OP_ATTEND = 6,  // dst = attention of a (queries), b (keys), c (values) in layer `index`
  TR_OP_ROWS = 7,    // dst = the rows of a that need logits; later operators have only these rows
  TR_OP_SCALE = 8,   // dst = scale * a
  TR_OP_SOFTCAP = 9, // dst = scale * tanh(a / scale)
  TR_OP_BIAS = 10,   // dst = a + vector
};
enum { TR_ACT_NONE = 0, TR_ACT_SILU = 1, TR_ACT_GELU = 2, TR_ACT_GELU_TANH = 3 };
// Formats of activations in a product.
enum { TR_BY_F32 = 0, TR_BY_INT8 = 1, TR_BY_BF16 = 2 };

// Columns of a buffer. Buffers have one row of floats per token; `buffer` is -1 if there is none.
struct tr_view {
  int32_t buffer, offset;
};

struct tr_op {
  int32_t kind;
  int32_t width; // columns of dst, or of a for TR_OP_NORM and TR_OP_ROPE
  struct tr_view dst, a, b, c;
  int32_t matrix;
  int32_t groups;
  int32_t index;
  int32_t act; // for TR_OP_GLU; for TR_OP_LINEAR if its rows alternate: 16 of a gate, 16 of its factor
  int32_t by;
  float scale; // for TR_OP_NORM: epsilon
  const float *vector;
};

// Rotary frequencies: columns 0 ... 2 count - 1 of each head are rotated, column i with column count + i.
struct tr_rope {
  const float *frequencies;
  int32_t count;
  float factor; // multiplied with cosines and sines
};

struct tr_layer {
  int32_t heads, kv_heads, head_dim, value_dim; // dims: multiples of 16 up to 256
  int32_t window;                               // keys visible to a query, including its own; 0: all
  float scale, softcap;                         // softcap 0: none
  const float *sinks;                           // [heads], or null
};

struct tr_buffer {
  int32_t width;
  int32_t local; // 1: between two barriers (attention, selection of rows) it is written before it is read
};

// Formats of cached keys and values.
enum { TR_CACHE_F32 = 0, TR_CACHE_BF16 = 1, TR_CACHE_INT8 = 2 };

struct tr_program {
  int32_t ops, matrices, ropes, layers, buffers;
  int32_t cache;        // TR_CACHE_…
  int32_t routed;       // 1: pages have routing nodes, for sparse attention
  int32_t output;       // the buffer for tr_step.logits
  const struct tr_op *op;
  const struct tr_matrix *matrix;
  const struct tr_rope *rope;
  const struct tr_layer *layer;
  const struct tr_buffer *buffer;
};

// A sparsity policy; the fields are those of transom.sparsity.Sparsity.
struct tr_sparsity {
  float coverage, min_density, max_density;
  int32_t local;       // blocks of 64 before a block of queries that are read completely
  int32_t columns;     // up to 64
  int32_t unit;        // 8, 16, 32 or 64
  int32_t rows;        // divides 64, up to 16
  int32_t dense_below; // keys
  int32_t top_k;
  int32_t node;        // 8; for the mean score a multiple of 8 that divides unit
  int32_t mean_score;  // 1: the mean score, which has no columns
  int32_t unused;
  const float *heads; // [layers, kv_heads of each]: factors of 1 - coverage, or null
};

// New tokens of one sequence.
struct tr_part {
  int32_t begin, count; // row range in the step
  int32_t past;         // tokens already cached
  int32_t pages;
  const int32_t *page; // [pages], including those for the new tokens
  const struct tr_sparsity *sparsity; // null: every key is read
  void *route;                        // of the sequence; required with a policy
};

struct tr_step {
  int32_t tokens, parts, rows;
  int32_t unused;
  const int64_t *token; // [tokens]
  const struct tr_part *part;
  const int32_t *row; // [rows] that need logits
  float *logits;      // [rows, vocabulary]
};

enum {
  TR_OK = 0,
  TR_NO_MEMORY = -1,
  TR_NO_THREADS = -2,
  TR_NO_LEVEL = -3,
  TR_BAD_PROGRAM = -4,
  TR_NOT_FINITE = -5,
  TR_BAD_STEP = -6
};

// Names of the instruction sets that this library was built with, separated by spaces, best last.
const char *tr_levels(void);

// Starts a pool of `count` threads, including the caller of tr_run. Returns TR_OK or an error.
int32_t tr_pool_new(int32_t count, void **pool);
void tr_pool_free(void *pool);

// Prepares a program to run. `level` is one of tr_levels that the processor supports.
int32_t tr_open(const struct tr_program *program, const char *level, void *pool, void **engine);
void tr_close(void *engine);

// Bytes of one page of a layer, for keys and values; the caller provides pages of zeros.
int64_t tr_page_bytes(void *engine, int32_t layer);
// Sets the memory of a layer's pages: [pages][kv_heads][keys, then values], 64-byte aligned.
void tr_set_cache(void *engine, int32_t layer, void *memory, int32_t pages);

// The state of sparse attention for one sequence: its columns, which attract mass from everywhere, and its latest
// queries. It may be ahead of the sequence: a step drops everything behind the tokens that are cached.
int32_t tr_route_new(void *engine, void **route);
int32_t tr_route_copy(void *engine, const void *from, void **route);
void tr_route_free(void *route);
// The contents of a route: their size and address. They may be overwritten with those of another route of an engine
// with the same program; tr_route_check then checks whether they fit a sequence of a given length.
int64_t tr_route_data(void *route, void **memory);
int32_t tr_route_check(void *engine, void *route, int32_t tokens);
// Adds to read and seen [layers, kv_heads of each] the keys that queries read, and those visible to them, and resets
// the route's own counts to 0.
void tr_route_counts(void *engine, void *route, double *read, double *seen);

// Categories of thread time.
enum {
  TR_TIME_ROWS = 0,       // embedding and elementwise operators
  TR_TIME_NORM = 1,
  TR_TIME_ROPE = 2,
  TR_TIME_ROUND = 3,      // conversion of activations to the format of a product
  TR_TIME_PRODUCT = 4,    // matrix products
  TR_TIME_FINISH = 5,     // activation functions, biases, residuals
  TR_TIME_VOCABULARY = 6, // everything on the rows that need logits
  TR_TIME_CACHE = 7,      // writing keys, values and nodes
  TR_TIME_COLUMNS = 8,
  TR_TIME_ROUTE = 9,
  TR_TIME_ATTEND = 10,
  TR_TIMES = 11
};
// Sets seconds[TR_TIMES] to the thread seconds since the last call. The first call starts measuring. Returns TR_OK or
// an error.
int32_t tr_times(void *engine, double *seconds);

// Runs the program on one step. Returns TR_OK or an error. On an error *layer is the layer that failed, or -1;
// TR_NOT_FINITE with -1 means that logits are not finite. TR_BAD_STEP means that nothing was computed: a token has no row
// in the embedding, a page does not exist, or the parts and rows do not match the step.
int32_t tr_run(void *engine, const struct tr_step *step, int32_t *layer);
}

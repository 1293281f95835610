"""The Triton kernels, one to a file, each with its launch grid and the shapes of its arguments.

**The cache.** Of each layer K [pages, kv_heads, 64, head_dim] and V [pages, kv_heads, 64, value_dim]. A page holds 64
consecutive positions of one sequence, of every KV head; `PAGES` int32 [sequences, most_pages] says which page holds
which block of a sequence, as far as it has them.

**Query blocks.** Queries of one sequence whose positions lie in one block of 64 choose together what they read; while
decoding, each query does alone. `BLOCKS` int32 [blocks, 4]: the sequence, the row of the first query among the step's
tokens, its position, and the number of queries; those that follow lie behind it, and have the positions that follow.

**What a query block reads**, for each KV head, in three parts:

1. *Far units*: 16 consecutive keys each, all of them before the near part. `FAR` int32 [blocks, kv_heads, most_far]
   has their indices in the sequence (position / 16), ascending; `FAR_COUNT` int32 [blocks, kv_heads] how many.
2. *Columns*: single keys before the near part that lie in no far unit of the block. `COLUMNS` int32
   [blocks, kv_heads, 64] has their positions, -1 where there is none, in any order.
3. *Near*: every position from `NEAR` int32 [blocks, kv_heads], a multiple of 64, up to the query.

A dense block has `NEAR` 0 and no far units. The causal mask and the sliding window hold for every part.

Importing a module of this package imports triton.
"""

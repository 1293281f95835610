"""The Triton kernels, one to a file, each with its launch grid and the shapes of its arguments.

**The cache.** Each layer has K [pages, kv_heads, 64, head_dim] and V [pages, kv_heads, 64, value_dim]. A page holds 64
consecutive positions of one sequence, for every KV head. `PAGES` int32 [sequences, most_pages] is the page table: the
pages of each sequence in order; entries beyond a sequence's last page are unused.

**Query blocks.** Queries of one sequence in the same block of 64 positions select keys together; while decoding, each
query selects its own. `BLOCKS` int32 [blocks, 4] has, for each query block, the sequence, the row of the first query
among the step's tokens, its position, and the number of queries. Rows and positions of a block are consecutive.

**Selected keys.** A query block reads keys in three parts, for each KV head:

1. *Far units*: runs of 16 consecutive keys before the near part. `FAR` int32 [blocks, kv_heads, most_far] has their
   indices in the sequence (position / 16), ascending, and `FAR_COUNT` int32 [blocks, kv_heads] their number.
2. *Columns*: single keys before the near part, outside the far units of the block. `COLUMNS` int32
   [blocks, kv_heads, 64] has their positions in any order; unused entries are -1.
3. *Near*: every position from `NEAR` int32 [blocks, kv_heads], a multiple of 64, up to the query.

A dense block has `NEAR` 0 and no far units. The causal mask and the sliding window apply to every part.

Importing a module of this package imports triton.
"""

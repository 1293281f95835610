"""Writing into the cache in Triton's interpreter: rotation, pages and nodes against the registry's references.

Draws: stored numbers are compared by the rounding of their type: 1e-6 in float32, 4e-3 in 16 bits for values below 5.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from calls import Array

from transom.ops import rotary_embedding
from transom.ops.sparse_routing import _nodes
from transom_cuda_triton.kernels.append import append

PAGE, NODES = 64, 8


def width(columns: int) -> int:
    """The power of two that holds so many columns."""
    return 1 << (columns - 1).bit_length() if columns else 0


class Cache:
    """The tensors of one layer, and sequences that grow in it."""

    def __init__(self, rng: np.random.Generator, dtype: torch.dtype, head: int, value: int, rotated: int) -> None:
        self.dtype, self.head, self.value, self.rotated, self.kv_heads = dtype, head, value, rotated, 2
        self.pages = torch.from_numpy(rng.permutation(12).astype(np.int32).reshape(3, 4))
        nothing = {"fill_value": float("nan"), "dtype": dtype}
        self.k = torch.full((12, self.kv_heads, PAGE, head), **nothing)
        self.v = torch.full((12, self.kv_heads, PAGE, value), **nothing)
        self.means, self.variances = (torch.full((12, self.kv_heads, NODES, head), float("nan")) for _ in range(2))
        self.counts = torch.zeros((12, self.kv_heads, NODES), dtype=torch.int32)
        angles = rng.random((PAGE * 4, rotated // 2)).astype(np.float32) * 6
        self.cos, self.sin = np.cos(angles), np.sin(angles)

    def append(self, keys: Array, values: Array, blocks: list[tuple[int, int, int, int]], interleaved: bool) -> None:
        k, v = (torch.from_numpy(x).to(self.dtype) for x in (keys, values))
        append[(len(blocks), self.kv_heads)](
            k, v, torch.from_numpy(self.cos), torch.from_numpy(self.sin), self.k, self.v, self.means, self.variances,
            self.counts, torch.tensor(blocks, dtype=torch.int32), self.pages, k.stride(0), v.stride(0),
            self.k.stride(0), self.k.stride(1), self.v.stride(0), self.v.stride(1), self.pages.shape[1],
            HEAD=self.head, VALUE=self.value, ROTATED=self.rotated, INTERLEAVED=interleaved,
            HALF_WIDTH=width(self.rotated // 2), REST_WIDTH=width(self.head - self.rotated),
            VALUE_WIDTH=width(self.value),
        )  # fmt: skip

    def of(self, tensor: torch.Tensor, sequence: int, length: int) -> Array:
        """float32 [length, kv_heads, columns] of what lies in a sequence's pages."""
        rows = tensor[self.pages[sequence].long()].float().numpy().transpose(0, 2, 1, 3)
        found: Array = rows.reshape(-1, *rows.shape[2:])[:length]
        return found


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbors"])
@pytest.mark.parametrize(("head", "rotated"), [(16, 16), (64, 32), (80, 80), (96, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.sweep(  # interpreted
    but=(
        "float32-16-16-neighbors",
        "float16-16-16-halves",
        "float32-64-32-halves",
        "float16-64-32-neighbors",
        "float32-80-80-halves",
        "float16-96-48-neighbors",
    )
)
def test_keys_are_rotated_and_nodes_follow(
    head: int, rotated: int, interleaved: bool, dtype: torch.dtype, rng: np.random.Generator
) -> None:
    value = int(rng.choice([16, 48]))
    cache = Cache(rng, dtype, head, value, rotated)
    lengths, texts = [0, 0, 0], [int(n) for n in rng.integers(70, 200, 3)]
    written: list[list[tuple[Array, Array]]] = [[], [], []]
    while any(done < wanted for done, wanted in zip(lengths, texts, strict=True)):
        keys: list[Array] = []
        values: list[Array] = []
        blocks: list[tuple[int, int, int, int]] = []
        row = 0
        for s in range(3):
            new = min(int(rng.choice([0, 1, 5, 64, 100])), texts[s] - lengths[s])
            k = rng.standard_normal((new, cache.kv_heads * head)).astype(np.float16).astype(np.float32)
            v = rng.standard_normal((new, cache.kv_heads * value)).astype(np.float16).astype(np.float32)
            keys.append(k)
            values.append(v)
            written[s].append((k, v))
            at, end = lengths[s], lengths[s] + new
            while at < end:
                count = min(at // PAGE * PAGE + PAGE, end) - at
                blocks.append((s, row, at, count))
                at, row = at + count, row + count
            lengths[s] = end
        if blocks:
            cache.append(np.concatenate(keys), np.concatenate(values), blocks, interleaved)
    close: dict[str, Any] = {"atol": 1e-6 if dtype is torch.float32 else 4e-3, "rtol": 1e-5}
    for s, length in enumerate(lengths):
        k, v = (np.concatenate(parts) for parts in zip(*written[s], strict=True))
        positions = np.arange(length)[None]
        attributes = {"num_heads": cache.kv_heads, "interleaved": int(interleaved), "rotary_embedding_dim": rotated}
        wanted = rotary_embedding.reference((k[None], cache.cos, cache.sin, positions), attributes)[0][0]
        got = cache.of(cache.k, s, length)
        np.testing.assert_allclose(got.reshape(length, -1), wanted, **close)
        np.testing.assert_array_equal(cache.of(cache.v, s, length).reshape(length, -1), v)
        for h in range(cache.kv_heads):
            nodes = _nodes(got[:, h], np.zeros(0, np.int64), 8)
            kept = slice(0, -(-length // 8))
            for tensor, theirs in ((cache.means, nodes.mean), (cache.variances, nodes.variance)):
                ours = tensor[cache.pages[s].long()][:, h].numpy().reshape(-1, head)
                np.testing.assert_allclose(ours[kept], theirs[kept], atol=2e-6)
            counts = cache.counts[cache.pages[s].long()][:, h].numpy().reshape(-1)
            np.testing.assert_array_equal(counts[: len(nodes.count)], nodes.count)

"""Random calls of attention as the kernels take them, and what the registry's reference makes of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from transom.ops import cached_attention
from transom.ops.sparse_routing import BLOCK, HeadRoute, choose
from transom.sparsity import Sparsity

Array = np.ndarray[Any, np.dtype[Any]]
UNIT = 16
RULE = Sparsity(coverage=0.6, local_window=64, columns=16, dense_below=64)
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "sparse": {"policy": RULE},
    "no columns": {"policy": Sparsity(coverage=0.5, columns=0, dense_below=1)},
    "wide units": {"policy": Sparsity(coverage=0.5, unit=32, dense_below=64)},
    "window": {"window": 100},
    "sparse window": {"policy": RULE, "window": 150},
    "soft cap and sinks": {"softcap": 5.0, "with_sinks": True},
    "sparse, soft cap and sinks": {"policy": RULE, "softcap": 5.0, "with_sinks": True},
}


def parts(size: int) -> tuple[int, int]:
    """A head size as the sum of two powers of two."""
    first = 1 << size.bit_length() - 1
    return first, size - first


def packed(quants: Array, bits: int, block: int) -> Array:
    """Quants [rows, columns] in blocks, as the kernels take them: uint8."""
    if bits == 8:
        return quants.astype(np.uint8)
    halves = quants.reshape(len(quants), -1, 2, block // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).astype(np.uint8).reshape(len(quants), -1)


@dataclass
class Call:
    """One step of some sequences: `lengths` are (past, new) tokens of each."""

    lengths: list[tuple[int, int]]
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 64
    value_dim: int = 64
    policy: Sparsity | None = None
    softcap: float = 0.0
    window: int = 0
    with_sinks: bool = False
    spare: int = 3
    """Pages of the cache that belong to nobody, and hold what is no number."""
    inputs: list[Array | None] = field(default_factory=list, init=False)
    attributes: dict[str, Any] = field(default_factory=dict, init=False)

    def draw(self, rng: np.random.Generator, dtype: Any = np.float32) -> Call:
        """Random queries, keys and values, rounded to a dtype; keys with some that draw mass from everywhere."""
        past, new = (sum(n) for n in zip(*self.lengths, strict=True))
        kv, q_heads = self.kv_heads, self.kv_heads * self.group

        def random(rows: int, columns: int, scale: float = 1.0) -> Array:
            return (scale * rng.standard_normal((rows, columns))).astype(dtype).astype(np.float32)

        keys = random(past + new, kv * self.head_dim)
        keys[rng.permutation(len(keys))[: len(keys) // 16]] *= np.float32(2)
        values = random(past + new, kv * self.value_dim)
        sequences = np.concatenate([np.full(n, i) for i, (_, n) in enumerate(self.lengths)]).astype(np.int64)
        positions = np.concatenate([np.arange(p, p + n) for p, n in self.lengths]).astype(np.int64)
        past_sequences = np.concatenate([np.full(p, i) for i, (p, _) in enumerate(self.lengths)]).astype(np.int64)
        past_positions = np.concatenate([np.arange(p) for p, _ in self.lengths]).astype(np.int64)
        sinks = rng.standard_normal(q_heads).astype(np.float32) if self.with_sinks else None
        self.inputs = [
            random(new, q_heads * self.head_dim), keys[past:], values[past:], keys[:past], values[:past],
            sequences, positions, past_sequences, past_positions, None, sinks,
        ]  # fmt: skip
        rule = "dense" if self.policy is None else self.policy.layer(0).to_string()
        self.attributes = {a.name: a.default for a in cached_attention.ATTRIBUTES} | {
            "q_num_heads": q_heads, "kv_num_heads": kv, "softcap": self.softcap, "sliding_window": self.window,
            "sparsity": rule,
        }  # fmt: skip
        return self

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    def wanted(self) -> Array:
        """float32 [tokens, q_heads, value_dim], by the registry's reference."""
        out = cached_attention.reference(self.inputs, self.attributes)[0]
        return out.reshape(len(out), -1, self.value_dim)

    # as the kernels take it -------------------------------------------------------------------------------------------
    def pages(self, rng: np.random.Generator) -> tuple[Array, Array, Array]:
        """(K, V, PAGES): the cache with the new tokens in it."""
        counts = [-(-(p + n) // BLOCK) for p, n in self.lengths]
        total = sum(counts) + self.spare
        order = rng.permutation(total).tolist()
        k = np.full((total, self.kv_heads, BLOCK, self.head_dim), np.nan, np.float32)
        v = np.full((total, self.kv_heads, BLOCK, self.value_dim), np.nan, np.float32)
        table = np.full((len(self.lengths), max(counts) + 1), -1, np.int32)
        keys, values = (np.concatenate([self.inputs[i + 2], self.inputs[i]]) for i in (1, 2))
        sequences = np.concatenate([self.inputs[7], self.inputs[5]])
        for s, count in enumerate(counts):
            own = np.flatnonzero(sequences == s)
            for j in range(count):
                page = table[s, j] = order.pop()
                rows = own[j * BLOCK : (j + 1) * BLOCK]
                k[page, :, : len(rows)] = keys[rows].reshape(len(rows), self.kv_heads, -1).transpose(1, 0, 2)
                v[page, :, : len(rows)] = values[rows].reshape(len(rows), self.kv_heads, -1).transpose(1, 0, 2)
        return k, v, table

    def lists(self) -> dict[str, Array]:
        """BLOCKS, FAR, FAR_COUNT, COLUMNS, NEAR, by the registry's choice."""
        starts = np.concatenate([[0], np.cumsum([n for _, n in self.lengths])])
        blocks: dict[tuple[int, int], int] = {}
        if self.policy is None:
            for s, (past, new) in enumerate(self.lengths):
                at = past
                while at < past + new:
                    blocks[s, at] = len(blocks)
                    at = min(at // BLOCK * BLOCK + BLOCK, past + new)
            choices: list[HeadRoute] = []
        else:
            choices = choose(self.inputs, self.attributes)
            for choice in choices:
                for b in choice.route.blocks:
                    blocks.setdefault((choice.sequence, b.begin), len(blocks))
        shape = (len(blocks), self.kv_heads)
        most = max(1, max(-(-(p + n) // UNIT) for p, n in self.lengths))
        found = {
            "BLOCKS": np.zeros((len(blocks), 4), np.int32), "NEAR": np.zeros(shape, np.int32),
            "FAR": np.full((*shape, most), -1, np.int32), "FAR_COUNT": np.zeros(shape, np.int32),
            "COLUMNS": np.full((*shape, BLOCK), -1, np.int32),
        }  # fmt: skip
        for (s, begin), i in blocks.items():
            past, new = self.lengths[s]
            single = bool(choices) and new < 16
            end = begin + 1 if single else min(begin // BLOCK * BLOCK + BLOCK, past + new)
            found["BLOCKS"][i] = (s, starts[s] + begin - past, begin, end - begin)
        for choice in choices:
            rule = self.policy
            assert rule is not None
            local = -(-rule.local_window // BLOCK)
            for b in choice.route.blocks:
                if b.dense:
                    continue
                at = blocks[choice.sequence, b.begin], choice.head
                near = max(0, b.begin // BLOCK - local) * BLOCK
                units = (b.units[:, None] * (rule.unit // UNIT) + np.arange(rule.unit // UNIT)).reshape(-1)
                far = units[units < near // UNIT]
                single_keys = b.columns[~np.isin(b.columns // UNIT, far)]
                found["NEAR"][at], found["FAR_COUNT"][at] = near, len(far)
                found["FAR"][at][: len(far)] = far
                found["COLUMNS"][at][: len(single_keys)] = single_keys
        return found


class Tensors:
    """A call's arguments in a dtype, as tensors, under the names that the kernels have for them."""

    def __init__(self, call: Call, rng: np.random.Generator, dtype: torch.dtype) -> None:
        k, v, table = call.pages(rng)
        queries, sinks = call.inputs[0], call.inputs[10]
        assert queries is not None
        self.q, self.k, self.v = (torch.from_numpy(x).to(dtype).contiguous() for x in (queries, k, v))
        self.out = torch.full((len(queries), call.kv_heads * call.group, call.value_dim), float("nan"), dtype=dtype)
        self.pages = torch.from_numpy(table)
        self.lists = {name: torch.from_numpy(array) for name, array in call.lists().items()}
        self.sinks = None if sinks is None else torch.from_numpy(sinks)
        far, blocks = self.lists["FAR"], self.lists["BLOCKS"]
        self.blocks = len(blocks)
        self.reading = {
            "Q": self.q, "K": self.k, "V": self.v, "PAGES": self.pages, **self.lists,
            "factor": call.scale, "cap": call.softcap, "window": call.window, "q_token": self.q.stride(0),
            "k_page": self.k.stride(0), "k_head": self.k.stride(1), "v_page": self.v.stride(0),
            "v_head": self.v.stride(1), "most_pages": self.pages.shape[1], "most_far": far.shape[2],
            "SPARSE": call.policy is not None, "CAPPED": call.softcap > 0, "WINDOWED": call.window > 0,
            **dict(zip(("HEAD", "HEAD_REST"), parts(call.head_dim), strict=True)),
        }  # fmt: skip
        self.values = dict(zip(("VALUE", "VALUE_REST"), parts(call.value_dim), strict=True)) | {"GROUP": call.group}
        self.ending = {"OUT": self.out, "out_token": self.out.stride(0), "SINKS": self.sinks}
        self.ending["WITH_SINKS"] = sinks is not None

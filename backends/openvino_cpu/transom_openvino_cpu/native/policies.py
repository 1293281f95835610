"""Sparsity policies in the library's format."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from transom.signature import LayerCache
from transom.sparsity import Sparsity
from transom_openvino_cpu.native.library import PAGE_TOKENS, CSparsityRule

NODE = 8
MOST_COLUMNS = 64
MOST_ROWS = 16


def unsupported(policy: Sparsity) -> str:
    """Why the library cannot apply this policy; empty if it can."""
    if policy.dense:
        return ""
    if policy.score == "mean":
        if policy.columns:
            return "the native attention has no columns with the score 'mean'"
        if policy.node % NODE:
            return f"the native attention needs nodes of a multiple of {NODE} tokens, not of {policy.node}"
    elif policy.node != NODE:
        return f"the native attention needs nodes of {NODE} tokens with the score 'rms', not of {policy.node}"
    if policy.unit < NODE:
        return f"the native attention selects units of at least {NODE} tokens, not of {policy.unit}"
    if policy.columns > MOST_COLUMNS:
        return f"the native attention has at most {MOST_COLUMNS} columns, not {policy.columns}"
    if policy.rows > MOST_ROWS:
        return f"the native attention samples at most {MOST_ROWS} rows of a block, not {policy.rows}"
    return ""


class NativePolicy:
    """A policy in the library's format; keeps the memory alive that it points to.

    Raises:
        ValueError: the library cannot apply it, or its heads are those of another model.
    """

    def __init__(self, policy: Sparsity, layers: Sequence[LayerCache]) -> None:
        if reason := unsupported(policy):
            raise ValueError(reason)
        self._heads: Any = None
        if policy.heads is not None:
            if len(policy.heads) != len(layers):
                raise ValueError(f"the sparsity policy has {len(policy.heads)} layers, and the model has {len(layers)}")
            flat: list[float] = []
            for heads, layer in zip(policy.heads, layers, strict=True):
                if len(heads) not in (1, layer.kv_heads):
                    raise ValueError(f"the sparsity policy has {len(heads)} KV heads, and the model {layer.kv_heads}")
                flat += heads if len(heads) == layer.kv_heads else heads * layer.kv_heads
            self._heads = np.array(flat, np.float32)
        self._rule = CSparsityRule(
            policy.coverage, policy.min_density, policy.max_density, -(-policy.local_window // PAGE_TOKENS),
            policy.columns, policy.unit, policy.rows, policy.dense_below, policy.top_k, policy.node,
            policy.score == "mean", 0,
            None if self._heads is None else self._heads.ctypes.data,
        )  # fmt: skip
        self.pointer = ctypes.pointer(self._rule)

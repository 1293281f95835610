"""The inputs of a neutral decoder graph for one ragged step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from transom.sessions.steps import Array
from transom.signature import Decoder, cache_input_names


def empty_cache(decoder: Decoder) -> list[Array]:
    """Keys and values of each layer for zero tokens: float32 [0, kv_heads * dim]."""
    return [
        np.zeros((0, layer.kv_heads * dim), np.float32)
        for layer in decoder.layers
        for dim in (layer.head_dim, layer.value_dim)
    ]


def decoder_inputs(
    tokens: Sequence[Sequence[int]],
    logit_rows: Sequence[int] | Array,
    cache: Sequence[Array],
    past: Sequence[int] = (),
) -> dict[str, Array]:
    """The inputs of a decoder graph, by name.

    Args:
        tokens: the new token ids of each sequence, at least one per sequence.
        logit_rows: indices of the tokens that need logits, among the new tokens of all sequences.
        cache: keys and values of each layer in turn, `[past tokens of all sequences, kv_heads * dim]`.
        past: cached tokens of each sequence; empty if no sequence has any.
    """
    counts, past = [len(part) for part in tokens], past or [0] * len(tokens)
    ids = np.arange(len(tokens), dtype=np.int64)
    positions = [n + np.arange(c, dtype=np.int64) for n, c in zip(past, counts, strict=True)]
    inputs: dict[str, Array] = {
        "input_ids": np.concatenate([np.asarray(part, np.int64) for part in tokens]),
        "positions": np.concatenate(positions),
        "sequences": np.repeat(ids, counts),
        "past_positions": np.concatenate([np.arange(n, dtype=np.int64) for n in past]),
        "past_sequences": np.repeat(ids, past),
        "logit_rows": np.asarray(logit_rows, np.int64),
    }
    for i in range(len(cache) // 2):
        for name, part in zip(cache_input_names(i), cache[2 * i : 2 * i + 2], strict=True):
            inputs[name] = part
    return inputs

"""Random calls of a sparse `transom::CachedAttention` with an unambiguous choice of keys, for the conformance kit.

The choice compares scores: an engine that computes in bfloat16 may legitimately read another unit if two score nearly
the same. So all keys of a unit have logits of the same level, levels are well separated, and a draw is rejected if the
reference's choice was close to a different one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from transom.ops.schema import Array, Sample
from transom.ops.sparse_routing import choose
from transom.sparsity import Sparsity

MARGIN = 0.03
"""Minimum margin of a sample's choice: several bfloat16 rounding errors."""
_STEP = 0.8
"""Difference between the logits of adjacent levels."""


@dataclass(frozen=True)
class _Case:
    policy: Sparsity
    attributes: Mapping[str, Any]
    sinks: bool = False


_CASES: Mapping[str, _Case] = {
    "sparse, coverage": _Case(Sparsity(0.8, columns=4, max_density=0.6, dense_below=100), {}),
    "sparse, top_k": _Case(Sparsity(1.0, columns=4, top_k=2, rows=8, max_density=0.6, dense_below=0), {"scale": 0.3}),
    "sparse, textbook": _Case(
        Sparsity(0.8, columns=0, node=64, unit=64, score="mean", max_density=0.6, dense_below=0), {}
    ),
    "sparse, calibrated, all attributes": _Case(
        Sparsity(0.85, columns=4, max_density=0.6, dense_below=0, heads=((0.0, 2.0),)),
        {"softcap": 30.0, "sliding_window": 250},
        sinks=True,
    ),
}


def samples(rng: np.random.Generator, defaults: Mapping[str, Any]) -> Iterator[Sample]:
    """One sample per case, each with a prefill chunk, a decode and a first step in one batch.

    Args:
        defaults: default values of the operator's attributes.
    """
    for label, case in _CASES.items():
        while True:
            sample = _draw(rng, label, case)
            if _margin(sample, defaults) >= MARGIN:
                break
        yield sample


def _margin(sample: Sample, defaults: Mapping[str, Any]) -> float:
    found = choose(sample.inputs, {**defaults, **sample.attributes})
    return min(choice.route.margin for choice in found)


def _draw(rng: np.random.Generator, label: str, case: _Case) -> Sample:
    kv_heads, group, dim, value_dim = 2, int(rng.choice([1, 2])), 16, int(rng.choice([16, 32]))
    new, old = [int(rng.integers(40, 80)), 1, 3], [int(rng.integers(260, 330)), int(rng.integers(260, 390)), 0]
    seq, past_seq = np.repeat([7, 0, 3], new), np.repeat([7, 0, 3], old)
    pos = np.concatenate([o + np.arange(n) for n, o in zip(new, old, strict=True)])
    past_pos = np.concatenate([np.arange(o) for o in old])
    mix = rng.permutation(len(past_seq))
    scale = case.attributes.get("scale", dim**-0.5)
    all_seq, all_pos = np.concatenate([past_seq[mix], seq]), np.concatenate([past_pos[mix], pos])
    towards = rng.standard_normal((kv_heads, dim)).astype(np.float32)
    towards /= np.linalg.norm(towards, axis=1, keepdims=True)

    def noise(*shape: int) -> Array:
        return (0.1 * rng.standard_normal(shape)).astype(np.float32)

    queries = towards[:, None] / np.float32(scale) + noise(len(seq), kv_heads, group, dim)
    levels = np.zeros((len(all_seq), kv_heads), np.float32)
    for sequence in np.unique(all_seq):
        rows = np.flatnonzero(all_seq == sequence)
        units = all_pos[rows] // case.policy.unit
        for head in range(kv_heads):
            levels[rows, head] = -_STEP * rng.permutation(units.max() + 1)[units]
            old_rows = rows[all_pos[rows] < 128]
            if case.policy.columns and len(old_rows) >= case.policy.columns:
                heavy = rng.choice(old_rows, case.policy.columns, replace=False)
                levels[heavy, head] = 1.5
    keys = levels[:, :, None] * towards + noise(len(all_seq), kv_heads, dim)
    values = rng.standard_normal((len(all_seq), kv_heads * value_dim)).astype(np.float32)
    keys, past = keys.reshape(len(all_seq), -1), len(past_seq)
    optional: list[Array | None] = []
    if case.sinks:
        optional = [None, rng.standard_normal(kv_heads * group).astype(np.float32)]
    return Sample(
        label,
        (
            queries.reshape(len(seq), -1),
            keys[past:],
            values[past:],
            keys[:past],
            values[:past],
            seq.astype(np.int64),
            pos.astype(np.int64),
            past_seq[mix].astype(np.int64),
            past_pos[mix].astype(np.int64),
            *optional,
        ),
        {
            "q_num_heads": kv_heads * group,
            "kv_num_heads": kv_heads,
            "sparsity": case.policy.layer(0).to_string(),
            **case.attributes,
        },
        outputs=3,
    )

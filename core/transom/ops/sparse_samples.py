"""Random calls of a sparse `transom::CachedAttention` whose choice is clear, for the conformance kit.

A choice is a comparison: an engine that computes in bfloat16 may rightly read another unit where two are nearly alike.
So keys of one unit have one level of logits, levels lie apart, and draws in which the reference's choice is close to
another one are thrown away.
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
"""Least distance of a sample's choice from another one: several roundings of bfloat16."""
_STEP = 0.8
"""Between the logits of neighbouring levels."""


@dataclass(frozen=True)
class _Form:
    policy: Sparsity
    attributes: Mapping[str, Any]
    sinks: bool = False


_FORMS: Mapping[str, _Form] = {
    "sparse, coverage": _Form(Sparsity(0.8, columns=4, max_density=0.6, dense_below=100), {}),
    "sparse, top_k": _Form(Sparsity(1.0, columns=4, top_k=2, rows=8, max_density=0.6, dense_below=0), {"scale": 0.3}),
    "sparse, textbook": _Form(
        Sparsity(0.8, columns=0, node=64, unit=64, score="mean", max_density=0.6, dense_below=0), {}
    ),
    "sparse, calibrated, all attributes": _Form(
        Sparsity(0.85, columns=4, max_density=0.6, dense_below=0, heads=((0.0, 2.0),)),
        {"softcap": 30.0, "sliding_window": 250},
        sinks=True,
    ),
}


def samples(rng: np.random.Generator, defaults: Mapping[str, Any]) -> Iterator[Sample]:
    """One sample for each form: a prefill chunk, a decode and a first step side by side.

    Args:
        defaults: the operator's attributes.
    """
    for label, form in _FORMS.items():
        while True:
            sample = _draw(rng, label, form)
            if _margin(sample, defaults) >= MARGIN:
                break
        yield sample


def _margin(sample: Sample, defaults: Mapping[str, Any]) -> float:
    found = choose(sample.inputs, {**defaults, **sample.attributes})
    return min(choice.route.margin for choice in found)


def _draw(rng: np.random.Generator, label: str, form: _Form) -> Sample:
    kv_heads, group, dim, value_dim = 2, int(rng.choice([1, 2])), 16, int(rng.choice([16, 32]))
    new, old = [int(rng.integers(40, 80)), 1, 3], [int(rng.integers(260, 330)), int(rng.integers(260, 390)), 0]
    seq, past_seq = np.repeat([7, 0, 3], new), np.repeat([7, 0, 3], old)
    pos = np.concatenate([o + np.arange(n) for n, o in zip(new, old, strict=True)])
    past_pos = np.concatenate([np.arange(o) for o in old])
    mix = rng.permutation(len(past_seq))
    scale = form.attributes.get("scale", dim**-0.5)
    all_seq, all_pos = np.concatenate([past_seq[mix], seq]), np.concatenate([past_pos[mix], pos])
    towards = rng.standard_normal((kv_heads, dim)).astype(np.float32)
    towards /= np.linalg.norm(towards, axis=1, keepdims=True)

    def noise(*shape: int) -> Array:
        return (0.1 * rng.standard_normal(shape)).astype(np.float32)

    queries = towards[:, None] / np.float32(scale) + noise(len(seq), kv_heads, group, dim)
    levels = np.zeros((len(all_seq), kv_heads), np.float32)
    for sequence in np.unique(all_seq):
        rows = np.flatnonzero(all_seq == sequence)
        units = all_pos[rows] // form.policy.unit
        for head in range(kv_heads):
            levels[rows, head] = -_STEP * rng.permutation(units.max() + 1)[units]
            old_rows = rows[all_pos[rows] < 128]
            if form.policy.columns and len(old_rows) >= form.policy.columns:
                heavy = rng.choice(old_rows, form.policy.columns, replace=False)
                levels[heavy, head] = 1.5
    keys = levels[:, :, None] * towards + noise(len(all_seq), kv_heads, dim)
    values = rng.standard_normal((len(all_seq), kv_heads * value_dim)).astype(np.float32)
    keys, past = keys.reshape(len(all_seq), -1), len(past_seq)
    optional: list[Array | None] = []
    if form.sinks:
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
            "sparsity": form.policy.layer(0).to_string(),
            **form.attributes,
        },
        outputs=3,
    )

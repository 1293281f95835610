"""Shared by the tests of sparse attention: random calls, policies of every kind, and an oracle of the choice.

The oracle works key by key in float64, from the description in `transom.ops.sparse_routing` alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from transom.ops import Array, Sample
from transom.ops.cached_attention import SCHEMA
from transom.sparsity import Sparsity

CAREFUL = 1e-4
"""Choices with a smaller margin are not compared: float32 may choose differently."""

POLICIES: dict[str, Sparsity] = {
    "coverage": Sparsity(0.5, columns=8, max_density=0.6, dense_below=0),
    "dense start": Sparsity(0.7, columns=8, dense_below=200),
    "top_k": Sparsity(1.0, columns=8, top_k=2, dense_below=0),
    "textbook": Sparsity(0.6, 64, 0, 64, 64, max_density=0.6, dense_below=0, score="mean"),
    "mean with columns": Sparsity(0.3, columns=8, node=16, unit=32, max_density=0.6, dense_below=0, score="mean"),
    "bounds, no columns": Sparsity(0.4, columns=0, min_density=0.3, max_density=0.5, dense_below=0),
    "two rows, small units": Sparsity(0.4, columns=4, rows=2, node=4, unit=8, dense_below=0),
    "every row, wide window": Sparsity(0.4, 100, 4, rows=64, max_density=0.6, dense_below=0),
    "calibrated": Sparsity(0.6, columns=4, dense_below=0, heads=((0.0, 1.5),)),
    "balanced": Sparsity(dense_below=0),
}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 100},
    "window across units": {"sliding_window": 150, "softcap": 3.0},
    "softcap": {"softcap": 2.0},
    "scale": {"scale": 0.5},
    "sinks": {"sinks": True},
}
BATCHES = {
    "ragged": ((70, 1, 30, 3), (190, 300, 0, 254)),
    "first step": ((320,), (0,)),
    "decodes": ((1, 1), (300, 270)),
    "fewer than a prefill": ((5, 15), (300, 250)),
    "least prefill": ((16,), (300,)),
    "aligned chunk": ((128,), (256,)),
}
SPREAD = [
    (p, f, b)
    for i, p in enumerate(POLICIES)
    for j, f in enumerate(FORMS)
    for k, b in enumerate(BATCHES)
    if (i + j + k) % 3 == 0
]
"""A third of all combinations, including every pair of policy, form and batch."""


def call(
    rng: np.random.Generator,
    new: Sequence[int],
    old: Sequence[int],
    policy: Sparsity,
    *,
    sinks: bool = False,
    peaked: float = 2.0,
    **attributes: Any,
) -> Sample:
    """A random call with two KV heads and two query heads per KV head; the packed past is in random order."""
    q_heads, kv_heads, dim, value_dim = 4, 2, 16, 8
    names = rng.permutation(40)[: len(new)]
    seq, past_seq = np.repeat(names, new).astype(np.int64), np.repeat(names, old).astype(np.int64)
    pos = np.concatenate([o + np.arange(n, dtype=np.int64) for n, o in zip(new, old, strict=True)])
    past_pos = np.concatenate([np.arange(o, dtype=np.int64) for o in old])
    mix, turn = rng.permutation(len(past_seq)), rng.permutation(len(seq))

    def floats(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    t, p = len(seq), len(past_seq)
    inputs: list[Array | None] = [
        floats(t, q_heads * dim) * np.float32(peaked), floats(t, kv_heads * dim), floats(t, kv_heads * value_dim),
        floats(p, kv_heads * dim), floats(p, kv_heads * value_dim),
        seq[turn], pos[turn], past_seq[mix], past_pos[mix],
    ]  # fmt: skip
    if sinks:
        inputs += [None, floats(q_heads)]
    named = {"q_num_heads": q_heads, "kv_num_heads": kv_heads, "sparsity": policy.layer(0).to_string()}
    return Sample("call", tuple(inputs), named | attributes, outputs=3)


def full(sample: Sample) -> dict[str, Any]:
    return SCHEMA.attributes_with_defaults(sample.attributes)


@dataclass(frozen=True)
class Chosen:
    """The keys that one query block reads, by the oracle."""

    begin: int
    end: int
    keys: frozenset[int]
    """Positions read by any of its queries, before causality and window."""
    columns: tuple[int, ...]


def oracle(sample: Sample, policy: Sparsity, sequence: int, head: int) -> list[Chosen]:
    """The choice of one sequence and KV head of a call."""
    a = full(sample)
    q, k, _, past_k, _, seq, pos, past_seq, past_pos = (np.asarray(x, np.float64) for x in sample.inputs[:9])
    kv_heads, group = a["kv_num_heads"], a["q_num_heads"] // a["kv_num_heads"]
    dim = k.shape[1] // kv_heads
    scale, cap, window = a["scale"] or dim**-0.5, a["softcap"], a["sliding_window"]
    sinks = None
    if len(sample.inputs) > 10:
        sinks = np.asarray(sample.inputs[10], np.float64).reshape(kv_heads, group)[head]
    keys = {int(p): row for p, s, row in zip(past_pos, past_seq, past_k, strict=True) if s == sequence}
    keys |= {int(p): row for p, s, row in zip(pos, seq, k, strict=True) if s == sequence}
    keys = {p: row[head * dim : (head + 1) * dim] for p, row in keys.items()}
    queries = {int(p): row.reshape(-1, dim)[head * group :][:group] for p, s, row in zip(pos, seq, q, strict=True)
               if s == sequence}  # fmt: skip
    first, count, n = min(queries), len(queries), len(keys)

    def capped(x: float) -> float:
        return cap * math.tanh(x / cap) if cap else x

    def logit(p: int, g: int, j: int) -> float:
        return capped(float(queries[p][g] @ keys[j]) * scale)

    def sees(p: int, j: int) -> bool:
        return j <= p and (not window or p - j < window)

    local = math.ceil(policy.local_window / 64)

    def far_end(p: int) -> int:
        return max(0, p // 64 - local) * 64

    if count < 16:
        groups = [[p] for p in sorted(queries)]
    else:
        groups = [[p for p in sorted(queries) if p // 64 == b] for b in range(n // 64 + 1)]
    everything = frozenset(range(n))
    coverage = 1 - (1 - policy.coverage) * (policy.heads[0][head] if policy.heads else 1)
    dense_head = policy.heads is not None and policy.heads[0][head] == 0

    # columns
    columns: list[int] = []
    if policy.columns:
        mass = dict.fromkeys(keys, 0.0)
        rows = min(16, count)
        for i in range(rows):
            p = first + (i + 1) * count // rows - 1
            for g in range(group):
                weights = {j: math.exp(logit(p, g, j)) for j in keys if sees(p, j)}
                total = sum(weights.values()) + (math.exp(sinks[g]) if sinks is not None else 0)
                for j, weight in weights.items():
                    if j < far_end(p):
                        mass[j] += weight / total
        best = sorted(keys, key=lambda j: (-mass[j], j))[: policy.columns]
        columns = sorted(j for j in best if mass[j] > 0)
    left_out = set(columns)

    def node(p: int, g: int, number: int) -> float:
        """Estimated mass of a node for a row; 0 if the row sees none of it."""
        places = range(number * policy.node, (number + 1) * policy.node)
        inside = [keys[j] for j in places if j in keys and j not in left_out]
        if not inside or (window and p - places[-1] >= window):
            return 0.0
        x = queries[p][g] * scale
        exponent = float(x @ np.mean(inside, 0))
        if policy.score == "rms":
            exponent += min(0.5 * 0.7 * float((x * x) @ np.var(inside, 0)), 8.3)
        return len(inside) * math.exp(capped(exponent))

    found = []
    for group_rows in groups:
        if not group_rows:
            continue
        begin, end = group_rows[0], group_rows[-1]
        far = far_end(begin)
        if dense_head or end + 1 <= policy.dense_below or far == 0:
            found.append(Chosen(begin, end, everything, ()))
            continue
        stride = 64 // policy.rows
        looked_at = group_rows[stride - 1 :: stride] or group_rows[-1:]
        per_unit, near, at = [], [], []
        for p in looked_at:
            for g in range(group):
                masses = [node(p, g, i) for i in range(far // policy.node)]
                step = policy.unit // policy.node
                units = np.array([sum(masses[i : i + step]) for i in range(0, len(masses), step)])
                if policy.score == "rms":
                    nearby = sum(math.exp(logit(p, g, j)) for j in range(far, p + 1) if sees(p, j))
                    single = sum(math.exp(logit(p, g, j)) for j in columns if j < far and sees(p, j))
                else:
                    nearby = sum(node(p, g, i) for i in range(far // policy.node, p // policy.node + 1))
                    single = sum(math.exp(logit(p, g, j)) for j in columns if sees(p, j))
                total = units.sum() + nearby + single + (math.exp(sinks[g]) if sinks is not None else 0)
                per_unit.append(units / total)
                near.append(nearby / total)
                at.append(single / total)
        if policy.score == "rms":
            score, near_score = np.sqrt(np.mean(np.square(per_unit), 0)), math.sqrt(np.mean(np.square(near)))
        else:
            score, near_score = np.mean(per_unit, 0), float(np.mean(near))
        sink_units = set() if policy.columns else set(range(64 // policy.unit))
        covered = near_score + float(np.mean(at)) + sum(score[u] for u in sink_units)
        goal = coverage * (near_score + float(np.mean(at)) + score.sum())
        order = sorted((u for u in range(len(score)) if u not in sink_units), key=lambda u: (-score[u], u))
        chosen: list[int] = []
        sofar = covered
        for u in order:
            if score[u] <= 0 or (len(chosen) == policy.top_k if policy.top_k else sofar >= goal):
                break
            chosen.append(u)
            sofar += score[u]
        start = max(0, begin - window + 1) if window else 0
        if not policy.top_k:
            every = {j // policy.unit for j in range(start, end + 1)}
            always = {j // policy.unit for j in range(max(far, start), end + 1)}
            always |= {u for u in sink_units if (u + 1) * policy.unit > start}
            # integers as float32
            least = math.ceil(np.float32(policy.min_density) * np.float32(len(every))) - len(always)
            most = max(math.floor(np.float32(policy.max_density) * np.float32(len(every))) - len(always), least, 0)
            with_mass = [u for u in order if score[u] > 0]
            chosen = with_mass[: min(max(len(chosen), least), most)]
        read = {j for u in {*chosen, *sink_units} for j in range(u * policy.unit, (u + 1) * policy.unit)}
        used = tuple(c for c in columns if c < far)
        read |= set(used) | set(range(far, n))
        seen = range(start, end + 1)
        if policy.max_density > 0.6 and sum(j in read for j in seen) * 5 > len(seen) * 3:
            found.append(Chosen(begin, end, everything, ()))
            continue
        found.append(Chosen(begin, end, frozenset(j for j in read if j <= end), used))
    return found

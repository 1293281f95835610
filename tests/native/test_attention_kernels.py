"""Attention of the native library alone, dense and sparse, against NumPy in float64, on every instruction set of this
processor.

Draws: `allowed` bounds for each row what the rounding of probabilities may take; the rest are sums in float32.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from levels import LEVELS, pytestmark  # noqa: F401  pytest reads the mark from here
from programs import Draft, Machine, in_bytes, narrowed, together, turned

from transom.programs.written import AttentionLayer, View
from transom.sparsity import Sparsity

Array = np.ndarray[Any, np.dtype[Any]]

ROUNDING = 2.0**-8
"""Relative error of a number that was rounded to bfloat16."""

each_level = pytest.mark.parametrize("level", LEVELS)

EMULATED = [f"{kind}-{cache}-amx" for kind in ("softcap", "window", "sinks") for cache in ("bf16", "int8")]
"""Attention with tiles of AMX, where each instruction is a trap; "plain" and "all" are left in a usual run."""


def _size(rng: np.random.Generator, highest: int) -> int:
    return int(rng.integers(1, highest + 1))


def _attention(
    q: Array, k: Array, v: Array, layer: AttentionLayer, sinks: Array | None, cache: str
) -> tuple[Array, Array]:
    """Attention of one whole sequence in float64, and how far the rounding of probabilities may take it."""
    tokens, group = len(q), layer.heads // layer.kv_heads
    factor = np.float32(layer.scale / layer.softcap if layer.softcap else layer.scale * np.float32(np.log2(np.e)))
    q = q.reshape(tokens, layer.heads, layer.head_dim)
    k = k.reshape(tokens, layer.kv_heads, layer.head_dim)
    v = v.reshape(tokens, layer.kv_heads, layer.value_dim)
    if cache == "bf16":
        q, k, v = narrowed(np.float32(q) * factor) / np.float64(factor), narrowed(k), narrowed(v)
    elif cache == "int8":
        q, k, v = turned(in_bytes(turned(q))), turned(in_bytes(turned(k))), in_bytes(v)
        q, k = (x / together(layer.head_dim) for x in (q, k))
    k, v = k.astype(np.float64).repeat(group, 1), v.astype(np.float64).repeat(group, 1)
    scores = np.einsum("qhd,khd->hqk", q, k) * layer.scale
    if layer.softcap:
        scores = layer.softcap * np.tanh(scores / layer.softcap)
    distance = np.arange(tokens)[:, None] - np.arange(tokens)
    seen = (distance >= 0) & ((distance < layer.window) | (layer.window == 0))
    scores = np.where(seen, scores, -np.inf)
    most = scores.max(-1, keepdims=True)
    weights = np.exp(scores - most)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks.astype(np.float64)[:, None, None] - most)
    weights = weights / total
    out = np.einsum("hqk,khd->qhd", weights, v).reshape(tokens, -1)
    allowed = np.einsum("hqk,khd->qhd", weights, np.abs(v)) * {"f32": 0, "bf16": ROUNDING * 1.01, "int8": 1e-4}[cache]
    if cache == "int8":  # in each page half of a 255th of the largest probability, times what its value is scaled by
        scales = np.abs(v).max(-1).T / 127  # [heads, keys]
        for page in range(0, tokens, 64):
            inside = slice(page, page + 64)
            largest = (weights[..., inside] * scales[:, None, inside]).max(-1)
            steps = np.abs(v[inside]) / np.maximum(scales.T[inside, :, None], 1e-30)
            allowed += np.einsum("hq,hd->qhd", largest * (0.51 / 255), steps.sum(0))
    return out, allowed.reshape(tokens, -1)


@each_level
@pytest.mark.parametrize("cache", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("kind", ["plain", "softcap", "window", "sinks", "all"])
@pytest.mark.sweep(only=EMULATED)
def test_attention_over_pages(kind: str, cache: str, level: str, rng: np.random.Generator) -> None:
    """Ragged steps of several sequences: chunks over page borders, single tokens, pages in any order."""
    kv_heads, group = _size(rng, 3), int(rng.choice([1, 2, 3, 4, 7, 16]))
    head, value = (int(rng.choice([16, 32, 48, 64, 80, 96, 128, 256])) for _ in range(2))
    layer = AttentionLayer(
        kv_heads * group, kv_heads, head, value if rng.random() < 0.5 else head,
        int(rng.integers(1, 130)) if kind in ("window", "all") else 0,
        float(np.float32(head**-0.5 * rng.uniform(0.5, 2))),
        float(np.float32(rng.uniform(1, 20))) if kind in ("softcap", "all") else 0.0, -1,
    )  # fmt: skip
    sinks = rng.standard_normal(layer.heads).astype(np.float32) * 2 if kind in ("sinks", "all") else None
    lengths = [int(n) for n in (rng.integers(1, 20), rng.integers(60, 70), rng.integers(130, 300))]
    widths = (layer.heads * head, kv_heads * head, kv_heads * layer.value_dim)
    table = rng.standard_normal((sum(lengths), sum(widths))).astype(np.float32) * 1.5
    draft = Draft()
    x, out = draft.rows(table), draft.buffer(layer.heads * layer.value_dim)
    views = [View(x.buffer, at) for at in (0, widths[0], widths[0] + widths[1])]
    draft.add("attend", out, layer.heads * layer.value_dim, a=views[0], b=views[1], c=views[2],
              index=draft.layer(layer, sinks))  # fmt: skip
    starts = np.cumsum([0, *lengths])
    needed = [-(-n // 64) for n in lengths]
    free = rng.permutation(sum(needed)).tolist()
    pages = [[free.pop() for _ in range(n)] for n in needed]
    rows = [table[a:b] for a, b in itertools.pairwise(starts)]
    wanted = [_attention(*np.split(r, np.cumsum(widths[:2]), 1), layer, sinks, cache) for r in rows]
    done = [0] * len(lengths)
    threads = int(rng.integers(1, 4))
    with Machine(draft.program(out, cache=cache), level, threads=threads, pages=sum(needed)) as machine:
        while any(d < n for d, n in zip(done, lengths, strict=True)):
            open_ = [s for s, n in enumerate(lengths) if done[s] < n]
            chosen = rng.permutation(open_)[: int(rng.integers(1, len(open_) + 1))].tolist()
            counts = [min(int(rng.choice([1, 1, 2, 3, 30, 64, 65, 100])), lengths[s] - done[s]) for s in chosen]
            tokens = [
                np.arange(starts[s] + done[s], starts[s] + done[s] + c) for s, c in zip(chosen, counts, strict=True)
            ]
            past, total = [done[s] for s in chosen], sum(counts)
            got = machine.engine.step(tokens, past, [pages[s] for s in chosen], list(range(total)))
            at = 0
            for s, c in zip(chosen, counts, strict=True):
                right, allowed = (part[done[s] : done[s] + c] for part in wanted[s])
                off = np.abs(got[at : at + c] - right)
                assert (off <= allowed + 1e-5 * np.abs(right).max()).all(), (layer, threads, done[s], c, off.max())
                at, done[s] = at + c, done[s] + c


# ----------------------------------------------------------------------------------------------------- sparse attention
def _policy(rng: np.random.Generator, layer: AttentionLayer, **fields: Any) -> str:
    heads = None
    if rng.random() < 0.5:
        heads = [rng.choice([0.0, 0.5, 1.0, 2.0], layer.kv_heads).tolist()]
    if not fields and rng.random() < 0.3:
        unit = int(rng.choice([8, 16, 32, 64]))
        fields = {
            "score": "mean",
            "columns": 0,
            "unit": unit,
            "node": int(rng.choice([8, 16, 32, 64][: unit.bit_length() - 3])),
        }
    numbers: dict[str, Any] = {
        "coverage": float(rng.uniform(0.3, 0.99)), "local_window": int(rng.choice([1, 64, 65, 128])),
        "columns": int(rng.choice([0, 1, 4, 20, 64])), "unit": int(rng.choice([8, 16, 32, 64])),
        "rows": int(rng.choice([1, 2, 4, 8, 16])), "dense_below": int(rng.choice([0, 64, 200])), "heads": heads,
        "max_density": float(rng.choice([0.1, 0.5, 0.6, 1.0])),
    }  # fmt: skip
    return Sparsity(**(numbers | fields)).to_string()


@each_level
@pytest.mark.parametrize("cache", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("everything", [True, False], ids=["which reads everything", "of any kind"])
def test_attention_by_a_sparsity_policy(everything: bool, cache: str, level: str, rng: np.random.Generator) -> None:
    """One that reads everything gives what dense attention gives, and any other one means of the values.

    With a window none reads everything: what the rows that it looks at do not see has no mass.
    """
    kv_heads, group = _size(rng, 2), int(rng.choice([1, 2, 3, 8]))
    head, value = (int(rng.choice([16, 32, 48, 64])) for _ in range(2))
    layer = AttentionLayer(
        kv_heads * group, kv_heads, head, value, 0 if everything else int(rng.choice([0, 0, 100, 230])),
        float(np.float32(head**-0.5 * rng.uniform(0.5, 2))), float(rng.choice([0.0, 15.0])), -1,
    )  # fmt: skip
    sinks = rng.standard_normal(layer.heads).astype(np.float32) if rng.random() < 0.5 else None
    length = int(rng.integers(250, 600))
    widths = (layer.heads * head, kv_heads * head, kv_heads * value)
    table = rng.standard_normal((length, sum(widths))).astype(np.float32) * 1.5
    draft = Draft()
    x, out = draft.rows(table), draft.buffer(layer.heads * value)
    views = [View(x.buffer, at) for at in (0, widths[0], widths[0] + widths[1])]
    draft.add("attend", out, layer.heads * value, a=views[0], b=views[1], c=views[2], index=draft.layer(layer, sinks))
    q, k, v = np.split(table, np.cumsum(widths[:2]), 1)
    wanted, allowed = _attention(q, k, v, layer, sinks, cache)
    count = -(-length // 64)
    pages = rng.permutation(count).tolist()
    all_units = {"top_k": 1 << 20, "max_density": 0.6}
    with Machine(draft.program(out, cache=cache), level, threads=_size(rng, 3), pages=count) as machine:
        engine, done = machine.engine, 0
        text = _policy(rng, layer, **(all_units if everything else {}))
        route = engine.new_route()
        while done < length:
            new = min(int(rng.choice([1, 1, 2, 5, 16, 17, 64, 100, 300])), length - done)
            if rng.random() < 0.2:
                old, route = route, engine.copy_route(route)
                engine.free_route(old)
            got = engine.step(
                [np.arange(done, done + new)], [done], [pages], list(range(new)), [engine.policy(text)], [route]
            )
            if everything:
                off = np.abs(got - wanted[done : done + new])
                assert (off <= allowed[done : done + new] + 1e-5 * np.abs(wanted).max()).all(), (layer, text, done, new)
            assert np.isfinite(got).all()
            assert np.abs(got).max() <= np.abs(v).max() * 1.01
            done += new
        read, seen = engine.take_counts(route)
        assert (read > 0).all()
        assert (read <= seen + 1e-6).all()
        engine.free_route(route)

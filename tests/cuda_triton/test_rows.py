"""Kernels that go row by row, in Triton's interpreter: normalization, gates, and choosing a token.

Draws: float32 sums in another order differ by about 1e-6 of their size; the tolerances are ten times that or more.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from calls import packed

from transom.ops import rms_normalization, rotary_embedding
from transom_cuda_triton.kernels.elementwise import combine
from transom_cuda_triton.kernels.embed import embed, embed_blocks
from transom_cuda_triton.kernels.gate import gate
from transom_cuda_triton.kernels.norm import rms_norm
from transom_cuda_triton.kernels.rotary import rotate
from transom_cuda_triton.kernels.sample import sample

SILU, GELU, GELU_TANH = 0, 1, 2
"""As `transom_cuda_triton.kernels.gate` numbers them."""


@pytest.mark.parametrize("add", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize(("columns", "groups"), [(1, 1), (64, 3), (100, 2)])
def test_rows_are_normalized(add: bool, columns: int, groups: int, rng: np.random.Generator) -> None:
    width = columns * groups
    x, before = (rng.standard_normal((5, width)).astype(np.float32) for _ in range(2))
    weight = rng.standard_normal(columns).astype(np.float32)
    residual, out = torch.from_numpy(before.copy()), torch.empty((5, width))
    rows = int(rng.choice([1, 2, 8]))
    rms_norm[(-(-5 * groups // rows),)](
        torch.from_numpy(x), residual, torch.from_numpy(weight), out, 5 * groups, groups, columns, width, width, width,
        1e-5, ROWS=rows, WIDTH=1 << (columns - 1).bit_length(), ADD=add,
    )  # fmt: skip
    total = (x + before if add else x).reshape(5, groups, columns)
    wanted = rms_normalization.reference((total, weight), {"axis": -1, "epsilon": 1e-5})[0]
    np.testing.assert_allclose(out.numpy().reshape(total.shape), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(residual.numpy(), x + before if add else before)


@pytest.mark.parametrize("act", [SILU, GELU, GELU_TANH], ids=["silu", "gelu", "gelu_tanh"])
def test_gates(act: int, rng: np.random.Generator) -> None:
    columns = int(rng.integers(1, 200))
    x = (4 * rng.standard_normal((3, 2 * columns))).astype(np.float32)
    both, out = torch.from_numpy(x), torch.empty((3, columns))
    sizes = 3, columns, 2 * columns, 2 * columns, columns
    rows = int(rng.choice([1, 2, 8]))
    grid = -(-3 // rows), -(-columns // 64)
    gate[grid](both, both[:, columns:], out, *sizes, ROWS=rows, WIDTH=64, ACT=act)
    a = x[:, :columns].astype(np.float64)
    activated = {
        SILU: a / (1 + np.exp(-a)),
        GELU: a / 2 * (1 + np.vectorize(math.erf)(a / 2**0.5)),
        GELU_TANH: a / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (a + 0.044715 * a**3))),
    }
    np.testing.assert_allclose(out.numpy(), activated[act] * x[:, columns:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cap", [0.0, 3.0], ids=["plain", "capped"])
@pytest.mark.parametrize("parts", ["", "bias", "other", "bias and other"])
def test_scales_biases_and_sums(cap: float, parts: str, rng: np.random.Generator) -> None:
    columns, factor = int(rng.integers(1, 150)), float(rng.uniform(-3, 3))
    x, other = (rng.standard_normal((4, columns)).astype(np.float32) for _ in range(2))
    bias = rng.standard_normal(columns).astype(np.float32)
    out = torch.from_numpy(x.copy())
    rows = int(rng.choice([1, 2, 8]))
    combine[(-(-4 // rows), -(-columns // 64))](
        out, torch.from_numpy(bias), torch.from_numpy(other), out, 4, columns, factor, cap, columns, columns, columns,
        ROWS=rows, WIDTH=64, WITH_BIAS="bias" in parts, WITH_OTHER="other" in parts, CAPPED=cap > 0,
    )  # fmt: skip
    wanted = x.astype(np.float64) * factor + ("bias" in parts) * bias + ("other" in parts) * other
    wanted = cap * np.tanh(wanted / cap) if cap else wanted
    np.testing.assert_allclose(out.numpy(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbors"])
@pytest.mark.parametrize(("head", "rotated", "heads"), [(16, 16, 3), (80, 32, 5), (96, 96, 1)])
def test_queries_are_rotated(head: int, rotated: int, heads: int, interleaved: bool, rng: np.random.Generator) -> None:
    x = rng.standard_normal((7, heads * head)).astype(np.float32)
    angles = rng.random((50, rotated // 2)).astype(np.float32) * 6
    positions = rng.permutation(50)[:7].astype(np.int32)
    out, cos, sin = torch.from_numpy(x.copy()), np.cos(angles), np.sin(angles)
    tables = (torch.from_numpy(t) for t in (positions, cos, sin))
    rows = int(rng.choice([1, 4, 64]))
    rotate[(-(-7 * heads // rows),)](
        out, *tables, 7 * heads, heads, out.stride(0), HEAD=head, ROTATED=rotated, INTERLEAVED=interleaved, ROWS=rows,
        WIDTH=1 << (rotated // 2 - 1).bit_length(),
    )  # fmt: skip
    attributes = {"num_heads": heads, "interleaved": int(interleaved), "rotary_embedding_dim": rotated}
    wanted = rotary_embedding.reference((x[None], cos, sin, positions[None].astype(np.int64)), attributes)[0][0]
    np.testing.assert_allclose(out.numpy(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("offset", [False, True], ids=["symmetric", "offsets"])
def test_rows_of_the_embedding(bits: int, offset: bool, rng: np.random.Generator) -> None:
    vocabulary, block, factor = 30, 16, float(rng.uniform(0.5, 2))
    columns, tokens = block * int(rng.integers(1, 7)), int(rng.integers(1, 9))
    ids = rng.integers(0, vocabulary, tokens)
    out, rows = torch.full((tokens, columns), float("nan")), int(rng.choice([1, 2, 8]))
    grid = -(-tokens // rows), -(-columns // 32)
    sizes: dict[str, Any] = {"rows": tokens, "columns": columns, "factor": factor, "out_token": columns, "ROWS": rows}
    if bits:
        quants = rng.integers(0, 1 << bits, (vocabulary, columns))
        scales, offsets = (rng.standard_normal((vocabulary, columns // block)).astype(np.float32) for _ in range(2))
        spread, zero = scales.repeat(block, 1), 1 << bits - 1
        table = quants * spread + offsets.repeat(block, 1) if offset else (quants - zero) * spread
        tensors = [torch.from_numpy(a) for a in (ids, packed(quants, bits, block), scales, offsets)]
        embed_blocks[grid](*tensors, out, **sizes, BITS=bits, BLOCK=block, OFFSET=offset, ZERO=zero, WIDTH=32)
    else:
        table = rng.standard_normal((vocabulary, columns)).astype(np.float32)
        embed[grid](torch.from_numpy(ids), torch.from_numpy(table), out, **sizes, WIDTH=32)
    np.testing.assert_allclose(out.numpy(), table[ids] * factor, rtol=1e-5, atol=1e-5)


def _wanted(logits: np.ndarray, temperature: float, k: int, p: float, drawn: float) -> int:
    """By sorting, in float64."""
    if temperature == 0:
        return int(logits.argmax())
    x = logits.astype(np.float64)
    kept = x >= (np.sort(x)[::-1][k - 1] if 0 < k < len(x) else -np.inf)
    mass = np.where(kept, np.exp((x - x.max()) / temperature), 0)
    if p < 1:
        order = np.argsort(-mass, kind="stable")
        enough = np.searchsorted(np.cumsum(mass[order]), p * mass.sum())
        mass = np.where(x >= x[order[enough]], mass, 0)
    return int(np.searchsorted(np.cumsum(mass), drawn * mass.sum(), side="right"))


@pytest.mark.parametrize("k", [0, 1, 7, 1000])
@pytest.mark.parametrize("p", [1.0, 0.9, 0.3])
@pytest.mark.sweep(but=("1.0-0", "1.0-7", "0.9-7", "0.3-0", "0.3-1000"))  # interpreted
def test_a_token_is_chosen_as_by_sorting(k: int, p: float, rng: np.random.Generator) -> None:
    rows, vocabulary = 6, int(rng.integers(2, 150))
    logits = (3 * rng.standard_normal((rows, vocabulary))).astype(np.float32)
    logits[0, rng.integers(vocabulary)] = -np.inf
    temperature = np.array([0, 1, 0.5, 2, 1, 0.7], np.float32)
    drawn = rng.random(rows).astype(np.float32)
    tokens = torch.full((rows,), -1, dtype=torch.int64)
    sample[(rows,)](
        torch.from_numpy(logits), torch.from_numpy(temperature), torch.full((rows,), k, dtype=torch.int32),
        torch.full((rows,), p), torch.from_numpy(drawn), tokens, vocabulary, vocabulary, WIDTH=64,
    )  # fmt: skip
    cases = zip(logits, temperature.tolist(), drawn.tolist(), strict=True)
    wanted = [_wanted(row, t, k, p, d) for row, t, d in cases]
    assert tokens.tolist() == wanted

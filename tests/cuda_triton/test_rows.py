"""Kernels that go row by row, in Triton's interpreter: normalisation, gates, and choosing a token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from transom.ops import rms_normalization
from transom_cuda_triton.kernels.gate import gate
from transom_cuda_triton.kernels.norm import rms_norm
from transom_cuda_triton.kernels.sample import sample


@pytest.mark.parametrize("add", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("columns", [1, 64, 100])
def test_rows_are_normalised(add: bool, columns: int, rng: np.random.Generator) -> None:
    x, before = (rng.standard_normal((5, columns)).astype(np.float32) for _ in range(2))
    weight = rng.standard_normal(columns).astype(np.float32)
    residual, out = torch.from_numpy(before.copy()), torch.empty((5, columns))
    width = 1 << (columns - 1).bit_length()
    rms_norm[(5,)](
        torch.from_numpy(x), residual, torch.from_numpy(weight), out, columns, columns, columns, columns, 1e-5,
        WIDTH=width, ADD=add,
    )  # fmt: skip
    total = x + before if add else x
    wanted = rms_normalization.reference((total, weight), {"axis": -1, "epsilon": 1e-5})[0]
    np.testing.assert_allclose(out.numpy(), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(residual.numpy(), total if add else before)


@pytest.mark.parametrize("gelu", [False, True], ids=["silu", "gelu"])
def test_gates(gelu: bool, rng: np.random.Generator) -> None:
    columns = int(rng.integers(1, 200))
    x = (4 * rng.standard_normal((3, 2 * columns))).astype(np.float32)
    out = torch.empty((3, columns))
    gate[(3, -(-columns // 64))](torch.from_numpy(x), out, columns, 2 * columns, columns, WIDTH=64, GELU=gelu)
    a, b = x[:, :columns].astype(np.float64), x[:, columns:]
    act = a / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (a + 0.044715 * a**3))) if gelu else a / (1 + np.exp(-a))
    np.testing.assert_allclose(out.numpy(), act * b, rtol=1e-5, atol=1e-5)


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

"""Weights: rows selected and stacked without loss, and dequantized as documented.

Draws: float32 sums in another order differ by about 1e-6 of their size; the tolerances are ten times that or more.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from transom.graph import Blocked, BlockedArrays, Dense
from transom.graph.weights import ScaleLevels, concat_rows, dense, dequantize, take_rows


def blocked(rng: np.random.Generator, rows: int = 8, *, minimums: bool = True, zeros: bool = True) -> Blocked:
    parts = BlockedArrays(
        rng.integers(0, 16, (rows, 64)).astype(np.uint8),
        rng.random((rows, 2)).astype(np.float16),
        rng.random((rows, 2)).astype(np.float16) if minimums else None,
        rng.integers(0, 16, (rows, 2)).astype(np.uint8) if zeros else None,
    )
    return Blocked((rows, 64), 32, "uint4", "float16", lambda: parts, minimums, zeros)


def in_two_levels(rng: np.random.Generator, rows: int = 8, *, minimums: bool = True) -> Blocked:
    """Two superblocks of two blocks."""
    count = 2 if minimums else 1
    halves = rng.random((count, rows, 2)).astype(np.float16)
    codes = rng.integers(-128, 128, (count, rows, 4)).astype(np.int8)
    folded = np.repeat(halves.astype(np.float32), 2, -1) * codes
    levels = ScaleLevels(halves[0], codes[0], *((halves[1], codes[1]) if minimums else ()))
    quants = rng.integers(0, 16, (rows, 64)).astype(np.uint8)
    parts = BlockedArrays(quants, folded[0], folded[1] if minimums else None, levels=levels)
    return Blocked((rows, 64), 16, "uint4", "float32", lambda: parts, minimums, outer=32)


def same_levels(weight: Blocked) -> bool:
    """Whether the two levels still give the scales and the minimums."""
    _, scales, minimums, _, levels = weight.load()
    if levels is None or (minimums is None) != (levels.minimums is None):
        return False
    products = [np.repeat(levels.scales.astype(np.float32), 2, -1) * levels.scale_codes]
    if levels.minimums is not None:
        products.append(np.repeat(levels.minimums.astype(np.float32), 2, -1) * levels.minimum_codes)
    return all(np.array_equal(a, b) for a, b in zip(products, (scales, minimums), strict=False))


def in_float8(rng: np.random.Generator, rows: int = 8) -> Blocked:
    quants = rng.standard_normal((rows, 64)).astype(ml_dtypes.float8_e4m3fn)
    parts = BlockedArrays(quants, rng.random((rows, 1)).astype(np.float32))
    return Blocked((rows, 64), 64, "float8e4m3fn", "float32", lambda: parts)


def test_dequantizing_follows_the_formula(rng: np.random.Generator) -> None:
    weight = blocked(rng)
    q, s, m, z, _ = weight.load()
    out = dequantize(weight)
    assert out.dtype == np.float32
    assert m is not None
    assert z is not None
    for _ in range(50):
        n, k = int(rng.integers(8)), int(rng.integers(64))
        block = k // 32
        wanted = float(s[n, block]) * (int(q[n, k]) - int(z[n, block])) + float(m[n, block])
        assert abs(out[n, k] - wanted) <= 1e-6 * max(1, abs(wanted))
    rows = np.array([5, 0, 5])
    np.testing.assert_array_equal(dequantize(weight, rows), out[rows])


@pytest.mark.parametrize("index", [slice(2, 7), slice(None, None, -1), np.array([3, 3, 0, 7])])
def test_rows_are_taken_without_loss(index: Any, rng: np.random.Generator) -> None:
    plain = dense(rng.standard_normal((8, 64)).astype(np.float16))
    for weight in (blocked(rng), in_float8(rng), in_two_levels(rng), in_two_levels(rng, minimums=False), plain):
        taken = take_rows(weight, index)
        assert not (isinstance(taken, Blocked) and taken.outer) or same_levels(taken)
        wanted = dequantize(weight)[index]
        assert taken.shape == wanted.shape
        np.testing.assert_array_equal(dequantize(taken), wanted)


def test_rows_of_one_form_are_stacked_and_others_refused(rng: np.random.Generator) -> None:
    a, b = blocked(rng, 8), blocked(rng, 4)
    both = concat_rows([a, b])
    assert both is not None
    assert both.shape == (12, 64)
    np.testing.assert_array_equal(dequantize(both), np.concatenate([dequantize(a), dequantize(b)]))
    f, g = in_float8(rng, 8), in_float8(rng, 4)
    floats = concat_rows([f, g])
    assert floats is not None
    np.testing.assert_array_equal(dequantize(floats), np.concatenate([dequantize(f), dequantize(g)]))
    for minimums in (True, False):
        pair = [in_two_levels(rng, 8, minimums=minimums), in_two_levels(rng, 4, minimums=minimums)]
        stacked_levels = concat_rows(pair)
        assert isinstance(stacked_levels, Blocked)
        assert same_levels(stacked_levels)
        np.testing.assert_array_equal(dequantize(stacked_levels), np.concatenate([dequantize(w) for w in pair]))
    # A stack of which one part has lost its levels has none.
    lost = replace(pair[0], load=lambda: pair[0].load()._replace(levels=None))
    mixed = concat_rows([lost, pair[1]])
    assert isinstance(mixed, Blocked)
    assert mixed.load().levels is None
    assert concat_rows([a, f]) is None
    d = dense(rng.standard_normal((3, 64)).astype(np.float32))
    stacked = concat_rows([d, d])
    assert isinstance(stacked, Dense)
    assert stacked.shape == (6, 64)
    assert concat_rows([a, d]) is None
    assert concat_rows([d, a]) is None
    assert concat_rows([a, blocked(rng, minimums=False)]) is None
    assert concat_rows([a, blocked(rng, zeros=False)]) is None
    assert concat_rows([d, dense(np.ones((3, 32), np.float32))]) is None


def test_sizes_are_those_of_the_stored_form(rng: np.random.Generator) -> None:
    assert dense(np.ones((3, 5), np.float16)).nbytes == 30
    assert blocked(rng, 8, minimums=False, zeros=False).nbytes == 8 * 64 // 2 + 16 * 2
    assert blocked(rng, 8).nbytes == 8 * 64 // 2 + 16 * (2 + 2) + 8
    assert in_float8(rng, 8).nbytes == 8 * 64 + 8 * 4


def test_other_element_types_are_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        dense(np.ones(3))

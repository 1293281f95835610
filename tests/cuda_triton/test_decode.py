"""Attention of single queries in Triton's interpreter, against the registry's reference.

Draws: float32 sums in another order differ by about 1e-6 of their size; the tolerances are ten times that or more.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from calls import KINDS, RULE, Array, Call, Tensors

from transom_cuda_triton.kernels.decode import attend_splits, merge_splits

RAGGED = [(0, 1), (63, 1), (64, 1), (199, 1), (330, 1)]


def run(call: Call, rng: np.random.Generator, dtype: torch.dtype, splits: int, tile: int = 64, **others: Any) -> Array:
    t = Tensors(call, rng, dtype)
    rows = max(16, 1 << (call.group - 1).bit_length())
    grid = (t.blocks, call.kv_heads, splits)
    shares = torch.full((*grid, 2, rows), float("nan"))
    between = torch.full((*grid, rows, call.value_dim), float("nan"))
    arguments = {**t.reading, **t.values, **others}
    attend_splits[grid](PARTS=between, SHARES=shares, **arguments, ROWS=rows, KEYS=tile)
    merge_splits[grid[:2]](
        PARTS=between, SHARES=shares, BLOCKS=t.lists["BLOCKS"], splits=splits, ROWS=rows, **t.values, **t.ending
    )
    return t.out.float().numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("splits", [1, 3, 16])
@pytest.mark.sweep(but=[f"3-{kind}" for kind in KINDS] + ["1-dense", "1-sparse"])  # interpreted
def test_any_number_of_splits_gives_the_same(kind: str, splits: int, rng: np.random.Generator) -> None:
    """Sixteen are more than some queries have tiles."""
    call = Call(RAGGED, **KINDS[kind]).draw(rng, np.float16)
    for dtype, bound in ((torch.float32, 2e-6), (torch.float16, 2e-3)):
        got, wanted = run(call, rng, dtype, splits, int(rng.choice([16, 32, 64]))), call.wanted()
        assert np.abs(got - wanted).max() < bound * max(1.0, float(np.abs(wanted).max()))


@pytest.mark.parametrize("head_dim", [16, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("group", [1, 3, 24])
def test_any_head_size_and_group(head_dim: int, group: int, rng: np.random.Generator) -> None:
    value_dim = int(rng.choice([16, 64, 80]))
    call = Call([(140, 1)], group=group, head_dim=head_dim, value_dim=value_dim, kv_heads=1, policy=RULE)
    call.draw(rng, np.float16)
    got, wanted = run(call, rng, torch.float32, 2), call.wanted()
    assert np.abs(got - wanted).max() < 5e-6 * max(1.0, float(np.abs(wanted).max()))


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("tile", [16, 64])
def test_lists_of_many_tiles_and_columns_anywhere(splits: int, tile: int, rng: np.random.Generator) -> None:
    """A list of which some whole tiles are taken, and a rest; single keys in any order, with gaps."""
    policy = replace(RULE, coverage=0.55, columns=40)
    call = Call([(700, 1), (811, 1)], head_dim=16, value_dim=16, policy=policy).draw(rng, np.float16)
    while call.lists()["FAR_COUNT"].max() < 6:  # what is chosen is chance: more than one tile of 64 keys
        call.draw(rng, np.float16)
    columns = torch.from_numpy(call.lists()["COLUMNS"])[..., rng.permutation(64)].contiguous()
    got, wanted = run(call, rng, torch.float32, splits, tile, COLUMNS=columns), call.wanted()
    assert np.abs(got - wanted).max() < 5e-6 * max(1.0, float(np.abs(wanted).max()))


def test_a_head_in_equal_parts(rng: np.random.Generator) -> None:
    call = Call([(140, 1)], head_dim=64, value_dim=64, kv_heads=1, policy=RULE).draw(rng, np.float16)
    got, wanted = run(call, rng, torch.float32, 2, HEAD=32, HEAD_REST=32), call.wanted()
    assert np.abs(got - wanted).max() < 5e-6 * max(1.0, float(np.abs(wanted).max()))

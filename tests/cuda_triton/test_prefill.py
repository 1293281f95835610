"""Attention of query blocks in Triton's interpreter, against the registry's reference.

Draws: float32 sums in another order differ by about 1e-6 of their size; the tolerances are ten times that or more.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from calls import KINDS, RULE, Array, Call, Tensors

from transom_cuda_triton.kernels.prefill import attend_blocks

RAGGED = [(0, 1), (0, 70), (199, 1), (130, 90)]


def run(
    call: Call, rng: np.random.Generator, dtype: torch.dtype, rows: int = 32, tile: int = 64, **others: Any
) -> Array:
    t = Tensors(call, rng, dtype)
    arguments = {**t.reading, **t.values, **t.ending, **others}
    attend_blocks[(t.blocks * -(-64 * call.group // rows), call.kv_heads)](**arguments, ROWS=rows, KEYS=tile)
    return t.out.float().numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.sweep(only=[f"float32-{kind}" for kind in KINDS if kind not in ("dense", "sparse")])  # interpreted
def test_what_the_lists_name_is_attended_to(kind: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
    call = Call(RAGGED, **KINDS[kind]).draw(rng, np.float16)
    got, wanted = run(call, rng, dtype, tile=int(rng.choice([16, 32, 64]))), call.wanted()
    bound = 2e-6 if dtype is torch.float32 else 2e-3
    assert np.abs(got - wanted).max() < bound * max(1.0, float(np.abs(wanted).max()))


@pytest.mark.parametrize("head_dim", [16, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("group", [1, 3, 7])
def test_any_head_size_and_group(head_dim: int, group: int, rng: np.random.Generator) -> None:
    value_dim = int(rng.choice([16, 64, 80]))
    call = Call([(90, 20)], group=group, head_dim=head_dim, value_dim=value_dim, kv_heads=1, policy=RULE)
    call.draw(rng, np.float16)
    got, wanted = run(call, rng, torch.float32, rows=16), call.wanted()
    assert np.abs(got - wanted).max() < 5e-6 * max(1.0, float(np.abs(wanted).max()))


@pytest.mark.parametrize("tile", [16, 32, 64])
def test_lists_of_many_tiles_and_columns_anywhere(tile: int, rng: np.random.Generator) -> None:
    """A list of which some whole tiles are taken, and a rest; single keys in any order, with gaps."""
    policy = replace(RULE, coverage=0.55, columns=40)
    call = Call([(700, 40)], kv_heads=1, head_dim=16, value_dim=16, policy=policy).draw(rng, np.float16)
    while call.lists()["FAR_COUNT"].max() < 6:  # what is chosen is chance: more than one tile of 64 keys
        call.draw(rng, np.float16)
    columns = torch.from_numpy(call.lists()["COLUMNS"])[..., rng.permutation(64)].contiguous()
    got, wanted = run(call, rng, torch.float32, rows=64, tile=tile, COLUMNS=columns), call.wanted()
    assert np.abs(got - wanted).max() < 5e-6 * max(1.0, float(np.abs(wanted).max()))


def test_empty_lists_give_numbers(rng: np.random.Generator) -> None:
    """A block that reads its own positions alone."""
    call = Call([(0, 70), (130, 20), (63, 64)], policy=RULE).draw(rng, np.float16)
    lists = {name: torch.from_numpy(array) for name, array in call.lists().items()}
    near = (lists["BLOCKS"][:, 2] // 64 * 64)[:, None].expand_as(lists["NEAR"]).contiguous()
    none = {"FAR_COUNT": torch.zeros_like(lists["FAR_COUNT"]), "COLUMNS": torch.full_like(lists["COLUMNS"], -1)}
    assert np.isfinite(run(call, rng, torch.float32, NEAR=near, **none)).all()


def test_a_head_in_equal_parts(rng: np.random.Generator) -> None:
    call = Call([(90, 20)], head_dim=64, value_dim=128, kv_heads=1, policy=RULE).draw(rng, np.float16)
    equal = {"HEAD": 32, "HEAD_REST": 32, "VALUE": 64, "VALUE_REST": 64}
    got, wanted = run(call, rng, torch.float32, **equal), call.wanted()
    assert np.abs(got - wanted).max() < 5e-6 * max(1.0, float(np.abs(wanted).max()))

"""Attention as a function: what it gives, and that wrong lists, pages and shapes are refused before anything runs.

Draws: float32 sums in another order differ by about 1e-6 of their size; the tolerances are ten times that or more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from calls import KINDS, RULE, Call, Tensors

from transom_cuda_triton.functional import Lists, attention

CHOOSY = replace(RULE, top_k=3, max_density=0.6)
"""Three units of each block that may choose, whatever they weigh."""
RAGGED = [(0, 70), (130, 20), (63, 64)]


def given(call: Call, rng: np.random.Generator, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    t = Tensors(call, rng, dtype)
    names = {"far": "FAR", "far_count": "FAR_COUNT", "columns": "COLUMNS", "near": "NEAR"}
    lists = Lists(**{field: t.lists[name] for field, name in names.items()}) if call.policy is not None else None
    q = t.q.view(len(t.q), -1, call.head_dim)
    return {
        "q": q, "k": t.k, "v": t.v, "blocks": t.lists["BLOCKS"], "pages": t.pages, "lists": lists, "sinks": t.sinks,
        "softcap": call.softcap, "window": call.window,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["dense", "sparse", "sparse window", "soft cap and sinks"])
@pytest.mark.parametrize("lengths", [RAGGED, [(0, 1), (130, 1), (199, 1)]], ids=["prompts", "single"])
def test_it_is_the_references(kind: str, lengths: list[tuple[int, int]], rng: np.random.Generator) -> None:
    call = Call(lengths, **KINDS[kind]).draw(rng)
    got, wanted = attention(**given(call, rng)).numpy(), call.wanted()
    assert np.abs(got - wanted).max() < 5e-6 * max(1.0, float(np.abs(wanted).max()))


def test_no_blocks_are_no_work(rng: np.random.Generator) -> None:
    arguments = given(Call(RAGGED).draw(rng), rng)
    assert not attention(**{**arguments, "blocks": arguments["blocks"][:0]}).any()


def test_empty_lists_give_numbers(rng: np.random.Generator) -> None:
    """A block that reads its own positions alone."""
    arguments = given(Call(RAGGED, policy=RULE).draw(rng), rng)
    lists, blocks = arguments["lists"], arguments["blocks"]
    near = (blocks[:, 2] // 64 * 64)[:, None].expand_as(lists.near).contiguous()
    none = Lists(lists.far, torch.zeros_like(lists.far_count), torch.full_like(lists.columns, -1), near)
    assert torch.isfinite(attention(**{**arguments, "lists": none})).all()


def _sparse(lists: Lists, blocks: torch.Tensor) -> tuple[int, int]:
    """A block and head with two far units or more."""
    at = (lists.far_count >= 2).nonzero()
    assert len(at)
    return int(at[0, 0]), int(at[0, 1])


def _swapped(a: dict[str, Any]) -> None:
    b, h = _sparse(a["lists"], a["blocks"])
    a["lists"].far[b, h, :2] = a["lists"].far[b, h, :2].flip(0)


def _twice(a: dict[str, Any]) -> None:
    b, h = _sparse(a["lists"], a["blocks"])
    a["lists"].far[b, h, 1] = a["lists"].far[b, h, 0]


def _beyond(a: dict[str, Any]) -> None:
    b, h = _sparse(a["lists"], a["blocks"])
    a["lists"].far[b, h, 1] = 10_000


def _negative(a: dict[str, Any]) -> None:
    b, h = _sparse(a["lists"], a["blocks"])
    a["lists"].far[b, h, 0] = -3


def _column_in_unit(a: dict[str, Any]) -> None:
    b, h = _sparse(a["lists"], a["blocks"])
    a["lists"].columns[b, h, 0] = int(a["lists"].far[b, h, 0]) * 16 + 3


def _column_twice(a: dict[str, Any]) -> None:
    b, h = _sparse(a["lists"], a["blocks"])
    near, far = int(a["lists"].near[b, h]), set(a["lists"].far[b, h, : int(a["lists"].far_count[b, h])].tolist())
    free = next(p for p in range(near) if p // 16 not in far)
    a["lists"].columns[b, h] = -1
    a["lists"].columns[b, h, :2] = free


def _set(name: str, at: Any, value: int) -> Callable[[dict[str, Any]], None]:
    def change(a: dict[str, Any]) -> None:
        of = getattr(a["lists"], name) if hasattr(a["lists"], name) else a[name]
        of[at] = value

    return change


def _replaced(**values: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    def change(a: dict[str, Any]) -> None:
        a.update({name: make(a) for name, make in values.items()})

    return change


WRONG: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "units out of order": (_swapped, "out of order"),
    "a unit twice": (_twice, "twice"),
    "a unit out of range": (_beyond, "out of range"),
    "a negative unit": (_negative, "out of range"),
    "more units than the list has": (_set("far_count", (0, 0), 999), "outside the list"),
    "a column in a unit": (_column_in_unit, "count twice"),
    "a column twice": (_column_twice, "a column is there twice"),
    "a column out of range": (_set("columns", (0, 0, 0), 5000), "a column is out of range"),
    "near within a page": (_set("near", (0, 0), 7), "no multiple of 64"),
    "a page that is none": (_set("pages", (0, 0), 99), "has a page that is none"),
    "no page": (_set("pages", (1, 0), -1), "has a page that is none"),
    "lengths past the page table": (_replaced(pages=lambda a: a["pages"][:, :1].contiguous()), "longer than the table"),
    "a sequence that is none": (_set("blocks", (0, 0), 9), "no pages"),
    "rows that are none": (_set("blocks", (0, 1), 900), "rows that q has not"),
    "a block over two pages": (_set("blocks", (0, 2), 30), "beyond its 64 positions"),
    "an empty block": (_set("blocks", (0, 3), 0), "no queries"),
    "mixed devices": (_replaced(k=lambda a: a["k"].to("meta")), "different devices: cpu, meta"),
    "mixed types": (_replaced(k=lambda a: a["k"].half()), "float16, bfloat16 and float32"),
    "int64 pages": (_replaced(pages=lambda a: a["pages"].long()), "not int32"),
    "heads that no tile serves": (
        _replaced(q=lambda a: torch.zeros(len(a["q"]), 4, 112), k=lambda a: torch.zeros(*a["k"].shape[:3], 112)),
        "A head of 112",
    ),
    "heads that do not divide": (_replaced(q=lambda a: a["q"][:, :3].contiguous()), "no multiple of 2 KV heads"),
    "lists of another shape": (
        _replaced(lists=lambda a: replace(a["lists"], near=a["lists"].near[:-1].contiguous())), "lists.near is",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_refused(what: str, rng: np.random.Generator) -> None:
    change, says = WRONG[what]
    arguments = given(Call([(0, 70), (300, 64)], policy=CHOOSY).draw(rng), rng)
    change(arguments)
    with pytest.raises(ValueError, match=says):
        attention(**arguments)

"""Rules by which tests draw again: for properties that no bound on rounding can give for every random model.

- `one_within`: the divergence of a quantized model, whose size depends on the model in a way that has no formula.
- `without_close_choices`: sparse attention, where rounding decides between two units with almost equal scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest

from transom.ops import sparse_attention

Found = TypeVar("Found")
DRAWS = 8
"""Of one property. A bound belongs here if it holds for thirty draws of thirty (`--fresh-seeds 30`, with 1 for 8): then
it fails for fewer than one draw in ten, with a confidence of 95 %, eight draws in a row fail once in 10^8 runs,
and any of a hundred tests once in 10^6. What is wrong in every model fails for all eight."""


def one_within(measure: Callable[[int], Found], bound: Callable[[Found], bool]) -> None:
    """At least one of eight draws is within the bound; a draw is made only if all before it were out of bounds.

    Args:
        measure: draws everything anew and measures it. It is called with the number of the draw, to name files by.
        bound: whether a measurement is within the bound.
    """
    found = []
    for i in range(DRAWS):
        found.append(measure(i))
        if bound(found[-1]):
            return
    pytest.fail(f"all of {DRAWS} draws are out of bounds: {'; '.join(map(str, found))}")


def without_close_choices(draw: Callable[[], Found], close: float, most: int = 200) -> Found:
    """The first draw in which the reference makes no sparse choice that rounding could change.

    Args:
        draw: draws inputs and runs the reference on them in this process.
        close: the smallest margin (`sparse_routing.Route.margin`) that is above the rounding error.
        most: how many draws to make. If one in ten is clear, 200 fail once in 10^9 runs.
    """
    choose, margins = sparse_attention.choose, [0.0]

    def watched(*arguments: object, **options: object) -> object:
        found = choose(*arguments, **options)  # type: ignore[arg-type]
        margins.extend(choice.route.margin for choice in found)
        return found

    for _ in range(most):
        margins.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sparse_attention, "choose", watched)
            found = draw()
        assert margins, "the reference made no sparse choice"
        if min(margins) > close:
            return found
    pytest.fail(f"every one of {most} draws had a choice with a margin below {close:g}")

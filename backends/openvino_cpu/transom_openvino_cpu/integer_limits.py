"""Checks the integers of each run against what OpenVINO computes with; `integers` finds the limits.

A warm start imports this module, and not the one that walks through graphs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from transom.errors import EngineError

Array = np.ndarray[Any, np.dtype[Any]]

LEAST, MOST = -(2**31), 2**31 - 1
EXACT = 2**24
"""Up to it float32 holds all integers."""
CUT = 2**31 - 128
"""A cast gives it for all greater floats; see `frontend.bounded`."""
COMPUTED = frozenset({"INT32", "INT64", "UINT32", "UINT64"})
"""Types that OpenVINO computes in int32."""


def least(limit: int) -> int:
    """The least integer of an input with this limit."""
    return LEAST if limit == MOST else -limit


def check_inputs(arrays: Mapping[str, Array], limit: int, summed: Sequence[str]) -> None:
    """Refuse integers for which OpenVINO would compute something else.

    Raises:
        EngineError: a number is too large; the message names the input.
    """
    for name, array in arrays.items():
        if array.dtype.name.upper() not in COMPUTED or not array.size:
            continue
        low, high = int(array.min()), int(array.max())
        most = min(limit, EXACT) if name in summed else limit
        if high > most or low < least(most):
            worst = high if high > most else low
            raise EngineError(
                f"The input {name} holds {worst}, and OpenVINO computes this model's integers up to {most} only",
                "Choose another backend, such as backend='reference'",
            )
        if name in summed and int(np.abs(array).sum()) > EXACT:
            raise EngineError(
                f"The elements of the input {name} have a sum above {EXACT}, which OpenVINO does not compute exactly",
                "Choose another backend, such as backend='reference'",
            )


def check_outputs(arrays: Mapping[str, Array], cut: Iterable[str]) -> None:
    """Refuse casts of floats that int32 does not hold.

    Raises:
        EngineError: there is such a number; the message names the output.
    """
    for name in cut:
        array = arrays.get(name)
        if array is not None and array.size and (int(array.min()) <= LEAST or int(array.max()) >= CUT):
            raise EngineError(
                f"The output {name} has numbers that int32 does not hold, in which OpenVINO computes it",
                "Choose another backend, such as backend='reference'",
            )

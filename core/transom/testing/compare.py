"""Comparing a backend's outputs with the reference: the error and its limits.

The error is the norm of the difference divided by the norm of the reference, so it does not depend on the magnitude of
the numbers. Integers and booleans must be equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from transom.testing.result import Failed

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Tolerance:
    """The largest allowed normalized errors."""

    operator: float
    """The limit for one operator."""
    logits: float
    """The limit for each row of logits of a small decoder."""


PRECISIONS = {
    "float32": Tolerance(2e-5, 1e-4),
    "float16": Tolerance(4e-3, 1.5e-2),
    "bfloat16": Tolerance(2e-2, 8e-2),
}
"""What an exact claim promises, by the compute precision that the backend reports for this device."""

INEXACT = Tolerance(1e-1, 2.5e-1)
"""For claims with `exact=False`. This limit catches only garbage; the result has the measured error, and the host's
accuracy gate checks the real model."""


def tolerance(precision: str, exact: bool) -> Tolerance:
    """The limits for a precision. Raises ValueError for an unknown precision."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, not {precision!r}")
    return PRECISIONS[precision] if exact else INEXACT


def normalized_error(got: Array, wanted: Array) -> float:
    """‖got - wanted‖ / ‖wanted‖; the plain norm where `wanted` is zero; infinite where finiteness differs."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    finite = np.isfinite(wanted)
    if not np.array_equal(np.isfinite(got), finite) or not np.array_equal(got[~finite], wanted[~finite], True):
        return float("inf")
    size = float(np.linalg.norm(wanted[finite]))
    difference = float(np.linalg.norm(got[finite] - wanted[finite]))
    return difference / size if size else difference


def compare(got: Any, wanted: Array, limit: float, what: str) -> float:
    """The normalized error of one output.

    Raises:
        Failed: the shape or element type differs, or the error is above `limit`.
    """
    array = np.asarray(got)
    if array.shape != wanted.shape:
        raise Failed(f"{what} has shape {array.shape}, the reference {wanted.shape}")
    if array.dtype != wanted.dtype:
        raise Failed(f"{what} is {array.dtype}, the reference {wanted.dtype}")
    if wanted.dtype.kind in "iub":
        if not np.array_equal(array, wanted):
            raise Failed(f"{what}: {int((array != wanted).sum())} of {wanted.size} values differ")
        return 0.0
    error = normalized_error(array, wanted)
    if not error <= limit:
        raise Failed(f"{what}: normalized error {error:.2g}, allowed {limit:.2g}")
    return error


def compare_rows(got: Any, wanted: Array, limit: float, what: str) -> float:
    """Like `compare`, but row by row, so that many right rows do not hide a wrong one. float32 [..., vocabulary]."""
    array = np.asarray(got)
    if array.shape != wanted.shape or array.dtype != np.float32:
        raise Failed(f"{what}: {array.dtype} {array.shape}, not float32 {wanted.shape}")
    rows = zip(array.reshape(-1, wanted.shape[-1]), wanted.reshape(-1, wanted.shape[-1]), strict=True)
    errors = [normalized_error(a, b) for a, b in rows]
    worst = int(np.argmax(errors))
    if not errors[worst] <= limit:
        raise Failed(f"{what}, row {worst} of {len(errors)}: normalized error {errors[worst]:.2g}, allowed {limit:.2g}")
    return errors[worst]

"""Sparsity policies: which keys attention reads. One object for all backends; see `docs/sparsity.md`.

Imports nothing but the standard library, so that contract, command line and a warm start may read a policy.
"""

from __future__ import annotations

from transom.sparsity.calibration import (
    FILE_NAME,
    Calibration,
    beside,
    place_beside,
    read_calibration,
    shape_of,
    shipped,
)
from transom.sparsity.joining import joined
from transom.sparsity.policy import DENSE, PRESETS, Heads, LayerSparsity, Sparsity

__all__ = [
    "DENSE",
    "FILE_NAME",
    "PRESETS",
    "Calibration",
    "Heads",
    "LayerSparsity",
    "Sparsity",
    "beside",
    "joined",
    "place_beside",
    "read_calibration",
    "shape_of",
    "shipped",
]

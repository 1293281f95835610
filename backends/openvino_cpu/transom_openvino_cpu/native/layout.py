"""The layout of a matrix in the file of weights: its description, as in `tr_matrix`, and its size.

What opens a compiled model needs; `packing` writes. On the warm path: imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass

TILE = 16
"""Rows in a tile."""
ALIGNMENT = 64
"""Bytes."""
KINDS = {"float32": 0, "float16": 1, "bfloat16": 2, "uint4": 3, "uint8": 4, "uint5": 5, "uint6": 6}
QUANT_BITS = {KINDS[f"uint{bits}"]: bits for bits in (4, 5, 6, 8)}
"""Kind of a matrix in blocks -> bits of a quant."""


@dataclass(frozen=True)
class NativeMatrix:
    """A matrix as in `tr_matrix`; `at` is its offset in the file."""

    kind: int
    rows: int
    columns: int
    block: int
    zero: int
    has_minimums: bool
    wide_scales: bool
    outer: int
    at: int


def matrix_bytes(m: NativeMatrix) -> int:
    """Size of a matrix in the file."""
    tiles = -(-m.rows // TILE)
    if m.kind in QUANT_BITS:
        quants = TILE * m.block * QUANT_BITS[m.kind] // 8
        if m.outer:
            codes = TILE * (2 if m.has_minimums else 1)
            return tiles * (m.columns // m.outer) * (4 * TILE + m.outer // max(m.block, 1) * (codes + quants))
        scales = TILE * (4 if m.wide_scales else 2) * (2 if m.has_minimums else 1)
        return tiles * (m.columns // max(m.block, 1)) * (quants + scales)
    if m.kind == KINDS["bfloat16"]:
        return tiles * TILE * 4 * (-(-m.columns // 2))
    return tiles * TILE * m.columns * (2 if m.kind == KINDS["float16"] else 4)

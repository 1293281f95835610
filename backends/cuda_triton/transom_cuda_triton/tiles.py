"""Which tiles the kernels take on each architecture, by head size.

Chosen by what the compiled code takes: no register is spilled, the tensor cores are used where there are any, and then
the larger tile, which reads keys and values less often. No card has confirmed the choice.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """How one kernel is cut up."""

    rows: int
    """Rows of queries in a program."""
    keys: int
    """Keys in a tile."""
    warps: int
    stages: int
    """Of the software pipeline that loads tiles ahead."""


HEAD_SIZES = (64, 80, 96, 128, 192, 256)

_AMPERE = {
    64: Tile(64, 64, 4, 2),
    80: Tile(128, 32, 8, 2),
    96: Tile(128, 32, 8, 2),
    128: Tile(64, 32, 4, 2),
    192: Tile(32, 32, 8, 2),
    256: Tile(64, 32, 8, 2),
}
_HOPPER = {size: Tile(128, 64, 8, 2) for size in HEAD_SIZES} | {256: Tile(128, 32, 8, 2)}
PREFILL: dict[int, dict[int, Tile]] = {80: _AMPERE, 86: _AMPERE, 89: _AMPERE, 90: _HOPPER}
"""Of `kernels.prefill`, by architecture and head size."""

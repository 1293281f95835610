"""The cost of a whole model from models with fewer layers: the cost of each layer, and of the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Separated:
    """rest + layers x layer."""

    layer: float
    rest: float

    def of(self, layers: int) -> float:
        return self.rest + layers * self.layer

    def arithmetic(self, layers: int, scale: float, unit: str) -> str:
        """`"computed: 0.61 ms + 32 layers x 0.295 ms"`."""
        return f"computed: {self.rest * scale:.3g} {unit} + {layers} layers x {self.layer * scale:.3g} {unit}"


def separate(found: Mapping[int, float]) -> Separated:
    """Separate figures by number of layers; for more than two, a least-squares line.

    Raises:
        ValueError: there are fewer than two.
    """
    if len(found) < 2:
        raise ValueError("one depth cannot be separated into layers and the rest")
    layer, rest = np.polyfit(list(found), list(found.values()), 1)
    return Separated(float(layer), float(rest))


@dataclass(frozen=True)
class BytesRead:
    """The minimum number of bytes that a decoded token reads."""

    matrices: int
    """Bytes of the matrices of all products."""
    keys: int
    """Positions of the cache that each sequence reads in each layer."""
    position: int
    """Bytes of a position over all layers, keys and values."""
    nodes: int = 0
    """Bytes of means and variances that a policy reads to choose, over all layers, for each sequence."""
    sequences: int = 1

    @property
    def total(self) -> int:
        return self.matrices + self.sequences * (self.keys * self.position + self.nodes)

    def arithmetic(self) -> str:
        """The calculation, human-readable."""
        cache = f"{self.keys} x {self.position} bytes of keys and values"
        if self.nodes:
            cache = f"({cache} + {self.nodes / 1e6:.1f} MB of means and variances)"
        times = f"{self.sequences} x " if self.sequences > 1 else ""
        return f"{self.matrices / 1e6:.1f} MB of matrices + {times}{cache} = {self.total / 1e6:.1f} MB"

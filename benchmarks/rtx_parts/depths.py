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
    """From figures by the number of layers; of more than two, the line that is nearest to all.

    Raises:
        ValueError: there are fewer than two.
    """
    if len(found) < 2:
        raise ValueError("one depth cannot be separated into layers and the rest")
    layer, rest = np.polyfit(list(found), list(found.values()), 1)
    return Separated(float(layer), float(rest))


@dataclass(frozen=True)
class BytesRead:
    """Bytes that a decoded token reads at least."""

    matrices: int
    """Of all products, once."""
    keys: int
    """Positions of the cache that each sequence reads in each layer."""
    position: int
    """Bytes of a position over all layers, keys and values."""
    nodes: int = 0
    """What a policy looks at to choose: means and variances, over all layers, of each sequence."""
    sequences: int = 1

    @property
    def total(self) -> int:
        return self.matrices + self.sequences * (self.keys * self.position + self.nodes)

    def arithmetic(self) -> str:
        """In words, for people."""
        cache = f"{self.keys} x {self.position} bytes of keys and values"
        if self.nodes:
            cache = f"({cache} + {self.nodes / 1e6:.1f} MB of means and variances)"
        times = f"{self.sequences} x " if self.sequences > 1 else ""
        return f"{self.matrices / 1e6:.1f} MB of matrices + {times}{cache} = {self.total / 1e6:.1f} MB"

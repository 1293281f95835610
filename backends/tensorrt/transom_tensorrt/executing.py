"""What runs a network once: over neighbouring slots, whose caches it keeps.

A *slot* holds what is kept of one sequence: of each kept tensor, [slots, heads, rows, columns] on the device, its own
[heads, rows, columns]. Neighbouring slots are one batch without copying anything. Two things can execute: a card
(`transom_tensorrt.rtx`), and ONNX Runtime in its place (`transom_tensorrt.emulating`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import numpy as np

from transom_tensorrt.network import KeptTensor, Network, ShapeProfile

Array = np.ndarray[Any, np.dtype[Any]]
Way = Literal["prefill", "decode"]
WAYS: tuple[Way, ...] = ("prefill", "decode")
"""In the order of the engine's optimisation profiles."""


class NetworkExecutor(Protocol):
    """Runs a network over slots. Its methods may be called from any thread, from one at a time."""

    @property
    def weight_bytes(self) -> int:
        """What every run reads, whatever its batch."""

    def allocate(self, most: int) -> int:
        """Make room for slots, all of them zeros. Called once, before anything runs.

        Args:
            most: slots that are of use.

        Returns:
            How many there are: as many as fit, at least one.

        Raises:
            DoesNotFit: not even one fits.
        """

    def run(self, way: Way, ids: Array, past: Array, rows: Array, first: int) -> Array:
        """Run the network over the slots from `first` on, and write the new tokens to their caches.

        Args:
            ids: int64 [slots, tokens]; slots, tokens and rows are within the profile of `way`.
            past: int64 [slots], tokens that each has cached.
            rows: int64 [rows], the tokens whose logits are wanted, counted over all slots.

        Returns:
            float32 [rows, vocabulary], which the next run may write to.

        Raises:
            EngineError: it cannot be run. What lies behind `past` is then anything.
        """

    def copy_slot(self, source: int, target: int, positions: int) -> None:
        """Copy what is kept of the first positions of a slot."""

    def clear_slot(self, slot: int, start: int) -> None:
        """Fill a slot with zeros from a position on."""

    def read_slot(self, slot: int, positions: int) -> Mapping[str, Array]:
        """What is kept of the first positions of a slot, on the host: `stored` [heads, `rows_of`, columns] by the
        input's name."""

    def write_slot(self, slot: int, arrays: Mapping[str, Array]) -> None:
        """What `read_slot` gave, into a slot."""

    def warm_up(self) -> None:
        """Whatever makes the first run as fast as the later ones. Uses the first slot, and leaves it as it was made."""

    def close(self) -> None:
        """Give everything back. Closing twice does nothing; nothing else may be called afterwards."""


def stored(kept: KeptTensor) -> np.dtype[Any]:
    """How a kept tensor lies in host memory: float32, or the bits of 16-bit numbers, which are never computed with."""
    return np.dtype(np.float32 if kept.number == "float32" else np.uint16)


def rows_of(network: Network, kept: KeptTensor, positions: int) -> int:
    """How many rows of a kept tensor its first positions need. A cache has one for each; what is kept of blocks of a
    cache has few rows, and they are needed together."""
    if kept.shape[1] >= network.context:
        return positions
    return kept.shape[1] if positions else 0


def profile_of(network: Network, way: Way) -> ShapeProfile:
    return network.prefill if way == "prefill" else network.decode

"""The interface that runs a network once, over adjacent slots whose caches it owns.

A *slot* holds the kept tensors of one sequence: its own [heads, rows, columns] of each [slots, heads, rows, columns] on
the device. Adjacent slots form a batch without any copying. There are two executors: a card (`transom_tensorrt.rtx`)
and ONNX Runtime in its place (`transom_tensorrt.emulating`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import numpy as np

from transom_tensorrt.network import KeptTensor, Network, ShapeProfile

Array = np.ndarray[Any, np.dtype[Any]]
Way = Literal["prefill", "decode"]
WAYS: tuple[Way, ...] = ("prefill", "decode")
"""In the order of the engine's optimization profiles."""


class NetworkExecutor(Protocol):
    """Runs a network over slots. Its methods may be called from any thread, but only one at a time."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that every run reads, for any batch size."""

    def allocate(self, most: int) -> int:
        """Allocate zeroed slots. Called once, before any run.

        Args:
            most: largest number of slots that are of use.

        Returns:
            The number of slots: as many as fit, at least one.

        Raises:
            DoesNotFit: not even one slot fits.
        """

    def run(self, way: Way, ids: Array, past: Array, rows: Array, first: int) -> Array:
        """Run the network over the slots starting at `first`, and write the new tokens to their caches.

        Args:
            ids: int64 [slots, tokens]; slots, tokens and rows are within the profile of `way`.
            past: int64 [slots], cached tokens of each slot.
            rows: int64 [rows], the tokens whose logits are wanted, counted over all slots.

        Returns:
            float32 [rows, vocabulary], which the next run may overwrite.

        Raises:
            EngineError: the run failed. Cache contents after `past` are then undefined.
        """

    def copy_slot(self, source: int, target: int, positions: int) -> None:
        """Copy the kept tensors of the first `positions` of a slot to another slot."""

    def clear_slot(self, slot: int, start: int) -> None:
        """Zero a slot from position `start` on."""

    def read_slot(self, slot: int, positions: int) -> Mapping[str, Array]:
        """Kept tensors of the first `positions` of a slot, on the host, by input name: [heads, `rows_of`, columns] with
        the dtype `stored`."""

    def write_slot(self, slot: int, arrays: Mapping[str, Array]) -> None:
        """Write the result of `read_slot` to a slot."""

    def warm_up(self) -> None:
        """Prepare, so that the first run is as fast as later ones. Uses the first slot and leaves it zeroed."""

    def close(self) -> None:
        """Release everything. Closing twice does nothing; no other call may follow."""


def stored(kept: KeptTensor) -> np.dtype[Any]:
    """The host dtype of a kept tensor: float32, or the raw bits of 16-bit floats; the host never computes with them."""
    return np.dtype(np.float32 if kept.number == "float32" else np.uint16)


def rows_of(network: Network, kept: KeptTensor, positions: int) -> int:
    """How many rows of a kept tensor its first positions take. A cache has one row for each position; tensors kept for
    blocks of a cache have few rows, which are needed together."""
    if kept.shape[1] >= network.context:
        return positions
    return kept.shape[1] if positions else 0


def profile_of(network: Network, way: Way) -> ShapeProfile:
    return network.prefill if way == "prefill" else network.decode

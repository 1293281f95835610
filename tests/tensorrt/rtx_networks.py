"""Tiny decoders as the backend compiles them, and an executor that is easy to reason about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from transom.contract import Artifact, Device
from transom.graph import Graph
from transom.graph.sparse import with_sparsity
from transom.programs.reading import GraphReader
from transom.signature import Decoder
from transom.sparsity import Sparsity
from transom.testing.models import tiny_decoder
from transom_tensorrt.executing import Array, Way
from transom_tensorrt.lowering import RtxKernels, lower
from transom_tensorrt.network import (
    DECODER_FILE,
    ENGINE_FILE,
    MODEL_FILE,
    NETWORK_FILE,
    WEIGHTS_FILE,
    KeptTensor,
    Network,
    ShapeProfile,
)
from transom_tensorrt.precision import RtxPrecision

CPU = Device("cpu", "cpu", "x86_64", 8 << 30, identity="some CPU", cores=2)


@dataclass(frozen=True)
class Compiled:
    """A decoder, and the files that an emulated artifact has."""

    graph: Graph
    decoder: Decoder
    network: Network
    files: Mapping[str, Path]

    @property
    def model(self) -> Path:
        return self.files[MODEL_FILE]

    def artifact(self) -> Artifact:
        return Artifact(dict(self.files), {"sdk": "onnxruntime"})

    def on_card(self, sdk: str = "tensorrt-rtx 1.7.1") -> Artifact:
        """The same with an engine's file, which for a made-up TensorRT is the ONNX model."""
        files: dict[str, bytes | Path] = {name: path for name, path in self.files.items() if name != MODEL_FILE}
        return Artifact({**files, ENGINE_FILE: self.model}, {"sdk": sdk})


def compiled(
    rng: np.random.Generator, folder: Path, *, number: Any = "float16", context: int = 64, tokens: int = 16,
    rows: int = 8, batch: int = 4, least: int = 1, policy: Sparsity | None = None, **form: Any,
) -> Compiled:  # fmt: skip
    """A random decoder that takes so many `tokens` and `rows` of one sequence at most, and sequences in a `batch`.

    Args:
        least: tokens of one sequence, at least.
    """
    graph = tiny_decoder(rng, **form)
    if policy is not None:
        graph = with_sparsity(graph, policy)
    decoder = graph.decoder
    assert decoder is not None
    lowered = lower(GraphReader(graph, RtxKernels()), RtxPrecision(number), context)
    network = Network(
        number, context, decoder.vocabulary, lowered.kept,
        ShapeProfile((1, 1, 1), (least, tokens, tokens), (1, 1, rows)),
        ShapeProfile((1, 1, batch), (1, 1, 1), (1, 1, batch)), lowered.queries,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / name for name in (NETWORK_FILE, DECODER_FILE, MODEL_FILE, WEIGHTS_FILE)}
    files[NETWORK_FILE].write_text(network.to_json())
    files[DECODER_FILE].write_text(decoder.to_json())
    ir.save(lowered.model, files[MODEL_FILE], external_data=WEIGHTS_FILE, size_threshold_bytes=1024)
    return Compiled(graph, decoder, network, files)


VOCABULARY = 50


def counting_network(context: int = 8, tokens: int = 4, rows: int = 2, batch: int = 3, least: int = 1) -> Network:
    """What `CountingExecutor` runs."""
    return Network(
        "float32", context, VOCABULARY, (KeptTensor("past", "present", (1, context, 1), "float32"),),
        ShapeProfile((1, 1, 1), (least, tokens, tokens), (1, 1, rows)),
        ShapeProfile((1, 1, batch), (1, 1, 1), (1, 1, batch)),
    )  # fmt: skip


def logits_of(tokens: list[int]) -> Array:
    """What `CountingExecutor` gives for the last of these tokens: each place tells one of them."""
    found = np.zeros(VOCABULARY, np.float32)
    found[: len(tokens)] = tokens
    found[-1] = len(tokens)
    return found


class CountingExecutor:
    """An `Executor` whose cache holds the tokens themselves and whose logits are all that a token sees.

    Positions that no token sees are multiplied by nought, as in attention: what is not finite there spoils the logits.
    """

    def __init__(self, network: Network, weight_bytes: int = 1 << 20) -> None:
        self.network, self.weight_bytes = network, weight_bytes
        self.cache = np.zeros((0, network.context), np.float32)
        self.ran: list[tuple[Way, int, int, int]] = []
        """How, the first slot, slots, tokens of each."""
        self.fail: BaseException | None = None
        """Raised by the next run, after it has written."""
        self.closed = 0

    def allocate(self, most: int) -> int:
        self.cache = np.zeros((most, self.network.context), np.float32)
        return most

    def run(self, way: Way, ids: Array, past: Array, rows: Array, first: int) -> Array:
        profile = self.network.prefill if way == "prefill" else self.network.decode
        (count, tokens), wanted = ids.shape, len(rows)
        for size, (least, _, most) in ((count, profile.batch), (tokens, profile.tokens), (wanted, profile.rows)):
            assert least <= size <= most
        assert ids.dtype == past.dtype == np.int64
        self.ran.append((way, first, count, tokens))
        found = []
        for i in range(count):
            own = self.cache[first + i]
            assert 0 <= past[i] <= len(own) - tokens
            own[past[i] : past[i] + tokens] = ids[i]
            for t in range(tokens):
                seen = int(past[i]) + t + 1
                row = np.zeros(VOCABULARY, np.float32)
                row[: len(own)] = own * (np.arange(len(own)) < seen)
                row[-1] = seen
                found.append(row)
        if self.fail is not None:
            failed, self.fail = self.fail, None
            raise failed
        return np.stack(found)[rows]

    def copy_slot(self, source: int, target: int, positions: int) -> None:
        self.cache[target, :positions] = self.cache[source, :positions]

    def clear_slot(self, slot: int, start: int) -> None:
        self.cache[slot, start:] = 0

    def read_slot(self, slot: int, positions: int) -> Mapping[str, Array]:
        return {"past": self.cache[slot, :positions].reshape(1, -1, 1).copy()}

    def write_slot(self, slot: int, arrays: Mapping[str, Array]) -> None:
        self.cache[slot, : arrays["past"].shape[1]] = arrays["past"].reshape(-1)

    def warm_up(self) -> None:
        self.ran.clear()

    def close(self) -> None:
        self.closed += 1

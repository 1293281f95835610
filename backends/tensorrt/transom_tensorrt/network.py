"""The description of a compiled network beside its engine: inputs and outputs, caches, and shapes.

An artifact holds the engine as `ENGINE_FILE`. For emulation it holds the ONNX model that the engine would be built from
instead, as `MODEL_FILE` with its weights in `WEIGHTS_FILE`. Imports nothing heavy.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

NETWORK_FILE = "network.json"
DECODER_FILE = "decoder.json"
ENGINE_FILE = "engine.plan"
MODEL_FILE = "model.onnx"
WEIGHTS_FILE = "model.weights"
BUILD_FILE = "build.json"
"""The cost of building, and the engine's memory on its card: see `transom_tensorrt.compiling.build_facts`."""
LAYERS_FILE = "layers.json"
"""The engine's layers as the builder lists them: see `transom_tensorrt.inspecting`."""

LENGTHS = "lengths"
"""In the ONNX model, int32 [batch]: filled positions of each sequence's cache after the step. No node reads it; the
builder connects it to attention."""

QUERY = "query"
"""Prefix of the outputs that hold a layer's queries. They are written one after the other and read only by the layer's
own attention, so they may all share the same memory."""

ALIGNMENT = 256
"""Bytes: `cudaMalloc` returns multiples of it, and TensorRT requires every tensor to start at one."""
CHUNK = 1024
"""Tokens of the longest step of one sequence."""
ROWS = 256
"""Largest number of tokens of one run whose logits are computed. Scoring a text needs more, and takes several runs."""
SEQUENCES = 16
"""Largest number of sequences that decode together."""

Shape = tuple[int | str, ...]
"""Numbers, and the symbols `batch`, `tokens` and `rows`."""
Range = tuple[int, int, int]
"""Minimum, optimum and maximum."""


@dataclass(frozen=True)
class KeptTensor:
    """A tensor that persists from step to step: the network reads it as `input` and updates it in place as `output`."""

    input: str
    output: str
    shape: tuple[int, ...]
    """Shape for one sequence: [heads, positions, columns]. The network adds the batch axis before it."""
    number: str
    """`"float16"`, `"bfloat16"`, `"float32"`."""

    @property
    def nbytes(self) -> int:
        """Bytes for one sequence."""
        size = 4 if self.number == "float32" else 2
        for count in self.shape:
            size *= count
        return size


@dataclass(frozen=True)
class ShapeProfile:
    """Shapes accepted by one way of running: an optimization profile of TensorRT."""

    batch: Range
    tokens: Range
    rows: Range

    def shapes(self, shape: Shape) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """A shape at its minimum, optimum and maximum."""
        sizes: dict[str, Range] = {"batch": self.batch, "tokens": self.tokens, "rows": self.rows}
        least, usual, most = (tuple(sizes[n][k] if isinstance(n, str) else n for n in shape) for k in range(3))
        return least, usual, most


@dataclass(frozen=True)
class Network:
    """Inputs `input_ids` int64 [batch, tokens], `past` int64 [batch], `rows` int64 [rows] and every `KeptTensor.input`;
    outputs `logits` float32 [rows, vocabulary], every `KeptTensor.output`, and `query.N` for N = 0, 1, …: see
    `QUERY`."""

    number: str
    context: int
    """Largest number of tokens of a sequence; the caches may have a few more positions."""
    vocabulary: int
    kept: tuple[KeptTensor, ...]
    prefill: ShapeProfile
    """One sequence with up to `CHUNK` tokens. Steps shorter than its minimum are decoded token by token."""
    decode: ShapeProfile
    """Up to `SEQUENCES` sequences with one token each."""
    queries: tuple[int, ...] = ()
    """Heads times columns of each output `query.N`, which is [batch, heads, tokens, columns] in the network's dtype. In
    sparse attention it is [blocks, heads, places, columns], with up to 126 more places than tokens."""
    sparsity: str = "dense"
    """The sparsity policy that is built in."""

    @property
    def slot_bytes(self) -> int:
        """Bytes of the caches of one sequence."""
        return sum(k.nbytes for k in self.kept)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Network:
        """Raises ValueError, KeyError or TypeError for text that `to_json` did not write."""
        raw: dict[str, Any] = json.loads(text)
        raw["kept"] = tuple(KeptTensor(k["input"], k["output"], tuple(k["shape"]), k["number"]) for k in raw["kept"])
        raw["queries"] = tuple(raw["queries"])
        for name in ("prefill", "decode"):
            raw[name] = ShapeProfile(**{key: tuple(value) for key, value in raw[name].items()})
        return cls(**raw)

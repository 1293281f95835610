"""What a compiled network is, beside its engine: its inputs and outputs, the caches it keeps, the shapes it takes.

The engine lies in an artifact as `ENGINE_FILE`; emulated, the ONNX model that the engine would be built from does, as
`MODEL_FILE` with its weights in `WEIGHTS_FILE`. Imports nothing heavy.
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
"""What building took, and what the engine takes on its card: see `transom_tensorrt.compiling.build_facts`."""
LAYERS_FILE = "layers.json"
"""What the builder says of the engine's layers: `transom_tensorrt.inspecting`."""

LENGTHS = "lengths"
"""In the ONNX model, int32 [batch]: positions of each sequence's cache that are filled after the step. Nothing in the
model reads it; the builder gives it to attention."""

QUERY = "query"
"""How the outputs are named that hold a layer's queries. They are written one after the other, and read by the layer's
own attention alone: all of them may lie in the same memory."""

ALIGNMENT = 256
"""Bytes: at multiples of it `cudaMalloc` begins, and TensorRT wants every tensor to."""
CHUNK = 1024
"""Tokens of the longest step of one sequence."""
ROWS = 256
"""Tokens of one run whose logits are computed. More are wanted when texts are scored, which takes several runs then."""
SEQUENCES = 16
"""Sequences that decode together."""

Shape = tuple[int | str, ...]
"""Numbers, and the symbols `batch`, `tokens` and `rows`."""
Range = tuple[int, int, int]
"""Least, usual and most."""


@dataclass(frozen=True)
class KeptTensor:
    """A tensor that lasts from step to step: the network reads it as `input` and writes it, in place, as `output`."""

    input: str
    output: str
    shape: tuple[int, ...]
    """Of one sequence: [heads, positions, columns]. The network has the batch before it."""
    number: str
    """`"float16"`, `"bfloat16"`, `"float32"`."""

    @property
    def nbytes(self) -> int:
        """Of one sequence."""
        size = 4 if self.number == "float32" else 2
        for count in self.shape:
            size *= count
        return size


@dataclass(frozen=True)
class ShapeProfile:
    """Shapes that one way of running takes: an optimisation profile of TensorRT's."""

    batch: Range
    tokens: Range
    rows: Range

    def shapes(self, shape: Shape) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """A shape at its least, usual and most."""
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
    """Tokens that a sequence may have; the caches may hold a few positions more."""
    vocabulary: int
    kept: tuple[KeptTensor, ...]
    prefill: ShapeProfile
    """One sequence with up to `CHUNK` tokens. Steps that are shorter than its least are decoded token by token."""
    decode: ShapeProfile
    """Up to `SEQUENCES` sequences with one token each."""
    queries: tuple[int, ...] = ()
    """Of each output `query.N`, [batch, heads, tokens, columns]: heads times columns. Where blocks choose what they
    read it is [blocks, heads, places, columns], with up to 126 places more than tokens. It has the network's number."""
    sparsity: str = "dense"
    """The policy that is built in."""

    @property
    def slot_bytes(self) -> int:
        """What the caches of one sequence take."""
        return sum(k.nbytes for k in self.kept)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Network:
        """Raises ValueError, KeyError or TypeError for what is none."""
        raw: dict[str, Any] = json.loads(text)
        raw["kept"] = tuple(KeptTensor(k["input"], k["output"], tuple(k["shape"]), k["number"]) for k in raw["kept"])
        raw["queries"] = tuple(raw["queries"])
        for name in ("prefill", "decode"):
            raw[name] = ShapeProfile(**{key: tuple(value) for key, value in raw[name].items()})
        return cls(**raw)

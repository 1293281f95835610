"""A program as it lies in an artifact: operators over buffers, matrices and vectors by their place in the weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from transom.programs.placing import Buffer
from transom.programs.written import NOWHERE, View, lean, operator
from transom_openvino_cpu.native.packing import Packed

KINDS = (
    "embed", "norm", "linear", "add", "glu", "rope", "attend", "rows", "scale", "softcap", "bias",
)  # fmt: skip
"""In the order of TR_OP_ in `src/abi.h`."""
ACTIVATIONS = ("", "silu", "gelu", "gelu_tanh")
BY = ("f32", "int8", "bf16")
"""In what numbers activations meet a matrix."""
CACHES = ("f32", "bf16", "int8")
"""In what numbers keys and values are kept: TR_CACHE_…"""


@dataclass(frozen=True)
class Op:
    """tr_op; `vector` is a place in the weights, or -1."""

    kind: str
    width: int
    dst: View = NOWHERE
    a: View = NOWHERE
    b: View = NOWHERE
    c: View = NOWHERE
    matrix: int = -1
    groups: int = 1
    index: int = 0
    act: str = ""
    by: str = "f32"
    scale: float = 1.0
    vector: int = -1


@dataclass(frozen=True)
class Rope:
    """Frequencies at a place in the weights."""

    at: int
    count: int
    factor: float


@dataclass(frozen=True)
class Layer:
    """tr_layer; `sinks` is a place in the weights, or -1."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int
    scale: float
    softcap: float
    sinks: int


@dataclass(frozen=True)
class Program:
    ops: tuple[Op, ...]
    matrices: tuple[Packed, ...]
    ropes: tuple[Rope, ...]
    layers: tuple[Layer, ...]
    buffers: tuple[Buffer, ...]
    cache: str
    """One of `CACHES`."""
    output: int
    """The buffer of the logits."""
    weight_bytes: int
    """Size of the file that all places are in."""
    sparsity: str
    """The policy to read the cache by where a step names none, in canonical form."""

    def to_json(self) -> str:
        raw = asdict(self)
        raw["ops"] = [lean(op) for op in self.ops]
        return json.dumps(raw, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Program:
        """Raises ValueError, KeyError or TypeError for a text that is no program."""
        raw: dict[str, Any] = json.loads(text)
        if raw["cache"] not in CACHES:
            raise ValueError(f"no cache is of {raw['cache']!r}")
        return cls(
            tuple(operator(Op, op) for op in raw["ops"]),
            tuple(Packed(**m) for m in raw["matrices"]),
            tuple(Rope(**r) for r in raw["ropes"]),
            tuple(Layer(**x) for x in raw["layers"]),
            tuple(Buffer(**b) for b in raw["buffers"]),
            str(raw["cache"]),
            int(raw["output"]),
            int(raw["weight_bytes"]),
            str(raw["sparsity"]),
        )

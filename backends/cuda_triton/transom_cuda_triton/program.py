"""A program as it lies in an artifact: operators over buffers, matrices and vectors by their place in the weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from transom.programs.written import NOWHERE, View, lean, operator
from transom_cuda_triton.packing import Packed

KINDS = ("embed", "norm", "linear", "combine", "gate", "rotate", "attend", "rows", "reduce")


@dataclass(frozen=True)
class Op:
    """One operator. Rows are the step's tokens, and after `rows` those whose logits are wanted."""

    kind: str
    width: int
    """Columns of `dst`."""
    dst: View = NOWHERE
    a: View = NOWHERE
    """`attend`: queries."""
    b: View = NOWHERE
    """`norm`: the residual; `combine`: what is added; `gate`: the other factor; `attend`: keys."""
    c: View = NOWHERE
    """`attend`: values."""
    matrix: int = -1
    vector: int = -1
    """A place in the weights, float32: the gain of `norm`, the bias of `combine`."""
    groups: int = 1
    """`norm`: rows within a row; `rotate`: heads."""
    index: int = 0
    """`rotate`: the rope; `attend`: the layer."""
    rope: int = -1
    """`attend`: the rope of the keys; -1: they are not rotated."""
    neighbours: bool = False
    """`rotate`, `attend`: pairs lie side by side."""
    act: str = ""
    scale: float = 1.0
    """`embed`, `combine`: a factor; `norm`: epsilon."""
    cap: float = 0.0
    late: bool = False
    """It runs over the rows whose logits are wanted."""


@dataclass(frozen=True)
class Rope:
    """Frequencies, float32, at a place in the weights; cosines and sines are multiplied by `factor`."""

    at: int
    count: int
    factor: float


@dataclass(frozen=True)
class Layer:
    """One attention layer; `sinks` is a place in the weights, or -1."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int
    scale: float
    softcap: float
    sinks: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Program:
    number: str
    """Of activations and cache: Triton's name."""
    ops: tuple[Op, ...]
    matrices: tuple[Packed, ...]
    ropes: tuple[Rope, ...]
    layers: tuple[Layer, ...]
    buffers: tuple[int, ...]
    """Columns of each."""
    output: int
    """The buffer of the logits, float32; no other buffer is."""
    vocabulary: int
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
        return cls(
            str(raw["number"]),
            tuple(_op(op) for op in raw["ops"]),
            tuple(Packed(**m) for m in raw["matrices"]),
            tuple(Rope(**r) for r in raw["ropes"]),
            tuple(Layer(**x) for x in raw["layers"]),
            tuple(int(b) for b in raw["buffers"]),
            int(raw["output"]),
            int(raw["vocabulary"]),
            int(raw["weight_bytes"]),
            str(raw["sparsity"]),
        )


def _op(raw: dict[str, Any]) -> Op:
    op = operator(Op, raw)
    if op.kind not in KINDS:
        raise ValueError(f"no operator is called {op.kind!r}")
    return op

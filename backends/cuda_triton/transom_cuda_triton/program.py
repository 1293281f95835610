"""A program as it lies in an artifact: operators over buffers, matrices and vectors by their place in the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transom.programs.written import NOWHERE, AttentionLayer, RopeTable, View, from_json, operator, to_json
from transom_cuda_triton.packing import TritonMatrix

KINDS = ("embed", "norm", "linear", "combine", "gate", "rotate", "attend", "rows", "reduce")


@dataclass(frozen=True)
class TritonOp:
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
class TritonProgram:
    number: str
    """Of activations and cache: Triton's name."""
    ops: tuple[TritonOp, ...]
    matrices: tuple[TritonMatrix, ...]
    ropes: tuple[RopeTable, ...]
    layers: tuple[AttentionLayer, ...]
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
        return to_json(self)

    @classmethod
    def from_json(cls, text: str) -> TritonProgram:
        """Raises ValueError, KeyError or TypeError for a text that is no program."""
        parts: dict[str, Callable[[Any], Any]] = {
            "ops": _op, "matrices": lambda raw: TritonMatrix(**raw), "ropes": lambda raw: RopeTable(**raw),
            "layers": lambda raw: AttentionLayer(**raw), "buffers": int,
        }  # fmt: skip
        return from_json(cls, text, parts)


def _op(raw: dict[str, Any]) -> TritonOp:
    op = operator(TritonOp, raw)
    if op.kind not in KINDS:
        raise ValueError(f"no operator is called {op.kind!r}")
    return op

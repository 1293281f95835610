"""A program as stored in an artifact: operators over buffers; matrices and vectors are offsets in the weights."""

from __future__ import annotations

from dataclasses import dataclass

from transom.programs.written import NOWHERE, AttentionLayer, RopeTable, View, from_json, to_json
from transom_cuda_triton.packing import TritonMatrix

KINDS = ("embed", "norm", "linear", "combine", "gate", "rotate", "attend", "rows", "reduce")


@dataclass(frozen=True)
class TritonOp:
    """One operator. Rows are the step's tokens, and after `rows` the tokens that need logits."""

    kind: str
    width: int
    """Columns of `dst`."""
    dst: View = NOWHERE
    a: View = NOWHERE
    """`attend`: queries."""
    b: View = NOWHERE
    """`norm`: the residual; `combine`: the addend; `gate`: the other factor; `attend`: keys."""
    c: View = NOWHERE
    """`attend`: values."""
    matrix: int = -1
    vector: int = -1
    """Offset of a float32 vector in the weights: the gain of `norm`, the bias of `combine`."""
    groups: int = 1
    """`norm`: independent parts of a row; `rotate`: heads."""
    index: int = 0
    """`rotate`: the rope; `attend`: the layer."""
    rope: int = -1
    """`attend`: the rope of the keys; -1: they are not rotated."""
    interleaved: bool = False
    """`rotate`, `attend`: whether pairs are interleaved."""
    act: str = ""
    scale: float = 1.0
    """`embed`, `combine`: a factor; `norm`: epsilon."""
    cap: float = 0.0
    late: bool = False
    """Whether it runs on the rows that need logits."""


@dataclass(frozen=True)
class TritonProgram:
    number: str
    """Triton's name of the number format of activations and cache."""
    ops: tuple[TritonOp, ...]
    matrices: tuple[TritonMatrix, ...]
    ropes: tuple[RopeTable, ...]
    layers: tuple[AttentionLayer, ...]
    buffers: tuple[int, ...]
    """Columns of each buffer."""
    output: int
    """The buffer of the logits, always float32; all others have the type `number`."""
    vocabulary: int
    weight_bytes: int
    """Size of the file of weights."""
    sparsity: str
    """The sparsity policy for steps that have none of their own, in canonical form."""

    def to_json(self) -> str:
        return to_json(self)

    @classmethod
    def from_json(cls, text: str) -> TritonProgram:
        """Raises ValueError, KeyError or TypeError if the text is not a program."""
        program = from_json(cls, text)
        if unknown := {op.kind for op in program.ops} - {*KINDS}:
            raise ValueError(f"the operator {min(unknown)!r} is unknown")
        return program

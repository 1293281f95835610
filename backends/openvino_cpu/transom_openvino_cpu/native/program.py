"""A program as it lies in an artifact: operators over buffers, matrices and vectors by their place in the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transom.programs.buffers import Buffer
from transom.programs.written import NOWHERE, AttentionLayer, RopeTable, View, from_json, operator, to_json
from transom_openvino_cpu.native.packing import NativeMatrix

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
class NativeOp:
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
class NativeProgram:
    ops: tuple[NativeOp, ...]
    matrices: tuple[NativeMatrix, ...]
    ropes: tuple[RopeTable, ...]
    layers: tuple[AttentionLayer, ...]
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
        return to_json(self)

    @classmethod
    def from_json(cls, text: str) -> NativeProgram:
        """Raises ValueError, KeyError or TypeError for a text that is no program."""
        parts: dict[str, Callable[[Any], Any]] = {
            "ops": lambda raw: operator(NativeOp, raw), "matrices": lambda raw: NativeMatrix(**raw),
            "ropes": lambda raw: RopeTable(**raw), "layers": lambda raw: AttentionLayer(**raw),
            "buffers": lambda raw: Buffer(**raw),
        }  # fmt: skip
        program = from_json(cls, text, parts)
        if program.cache not in CACHES:
            raise ValueError(f"no cache is of {program.cache!r}")
        return program

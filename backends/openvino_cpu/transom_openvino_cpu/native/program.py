"""A program as stored in an artifact: operators over buffers; matrices and vectors are offsets in the weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transom.programs.buffers import Buffer
from transom.programs.written import NOWHERE, AttentionLayer, RopeTable, View, from_json, to_json
from transom.signature import Decoder, LayerCache
from transom_openvino_cpu.native.layout import NativeMatrix

KINDS = (
    "embed", "norm", "linear", "add", "glu", "rope", "attend", "rows", "scale", "softcap", "bias",
)  # fmt: skip
"""In the order of TR_OP_… in `src/abi.h`."""
ACTIVATIONS = ("", "silu", "gelu", "gelu_tanh")
BY = ("f32", "int8", "bf16")
"""Number formats of the activations in a product: TR_BY_…"""
CACHES = ("f32", "bf16", "int8")
"""Number formats of keys and values in the cache: TR_CACHE_…"""


@dataclass(frozen=True)
class NativeOp:
    """tr_op; `vector` is an offset in the weights, or -1."""

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
    """Size of the file of weights."""
    sparsity: str
    """The sparsity policy for steps that have none of their own, in canonical form."""

    def check(self, decoder: Decoder) -> None:
        """Check that the program computes a model of this signature: a session trusts it for ids and cache shapes.

        Raises:
            ValueError: it does not.
        """
        if (width := self.buffers[self.output].width) != decoder.vocabulary:
            raise ValueError(f"the program has {width} logits for a vocabulary of {decoder.vocabulary}")
        for op in self.ops:
            if op.kind == "embed" and (rows := self.matrices[op.matrix].rows) < decoder.vocabulary:
                raise ValueError(f"an embedding has {rows} rows for a vocabulary of {decoder.vocabulary}")
        layers = tuple(LayerCache(x.heads, x.kv_heads, x.head_dim, x.value_dim, x.window) for x in self.layers)
        if layers != decoder.layers:
            raise ValueError("the program has other attention layers than the model")

    def without_int8_products(self, form: str) -> NativeProgram:
        """The same with products in `"bf16"` or `"f32"` in place of int8."""
        return replace(self, ops=tuple(replace(op, by=form) if op.by == "int8" else op for op in self.ops))

    def to_json(self) -> str:
        return to_json(self)

    @classmethod
    def from_json(cls, text: str) -> NativeProgram:
        """Raises ValueError, KeyError or TypeError if the text is not a program."""
        program = from_json(cls, text)
        if program.cache not in CACHES:
            raise ValueError(f"the cache format {program.cache!r} is unknown")
        return program

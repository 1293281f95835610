"""Groups the layers of a decoder into parts: context binaries no larger than the HTP can map.

A decoder is cut only where later operators read nothing but the hidden state, so that a part takes `hidden` and returns
`hidden_out`. A planned part is not compiled yet: its size is that of its weights, which are nearly all of a context
binary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from transom.errors import DoesNotFit, UnsupportedError, option
from transom.graph.weights import Weight
from transom_mobile_export.qnn.layout import LARGEST
from transom_mobile_export.qnn.storage import F16, INT4, INT8

if TYPE_CHECKING:
    from transom.programs.reading import Op, Value
    from transom_mobile_export.qnn.precision import QnnPrecision

_FORMS = {"float16": F16, "int8": INT8, "int4": INT4}


@dataclass(frozen=True)
class GraphPart:
    """Consecutive layers."""

    first: int
    layers: tuple[tuple[Op, ...], ...]
    """The operators of each layer; those after the model's last layer belong to it."""
    source: Value
    """The hidden state that is the input."""
    result: Value
    """The output: the hidden state, or the logits of the last part."""
    last: bool
    bytes: int
    """Bytes of its weights."""

    @property
    def end(self) -> int:
        """One past its last layer."""
        return self.first + len(self.layers)

    @property
    def name(self) -> str:
        return f"layers {self.first} to {self.end - 1}" if self.end - self.first > 1 else f"layer {self.first}"


def plan_parts(layers: Sequence[GraphPart], *, largest: int = LARGEST) -> tuple[GraphPart, ...]:
    """The parts of a decoder, each as large as allowed; nothing is read or compiled.

    Args:
        layers: the result of `layers_of`.
        largest: largest number of bytes of weights in a part.

    Raises:
        DoesNotFit: a single layer exceeds `largest`.
    """
    parts: list[GraphPart] = []
    for unit in layers:
        if unit.bytes > largest:
            raise DoesNotFit(
                f"{unit.name} of this model has {unit.bytes / 1e9:.2f} GB of weights, and one context of the HTP "
                f"holds {largest / 1e9:.2f} GB of them",
                f"Use {option('precision', 'int4')}, or a model with a smaller vocabulary",
            )
        if parts and parts[-1].bytes + unit.bytes <= largest:
            parts[-1] = joined(parts[-1], unit)
        else:
            parts.append(unit)
    return tuple(parts)


def joined(a: GraphPart, b: GraphPart) -> GraphPart:
    """Two adjacent parts as one."""
    return GraphPart(a.first, a.layers + b.layers, a.source, b.result, b.last, a.bytes + b.bytes)


def layers_of(ops: Sequence[Op], logits: Value, precision: QnnPrecision) -> tuple[GraphPart, ...]:
    """Every layer as a part of its own; operators after the last layer belong to it.

    Args:
        ops: operators of the whole decoder; the first is its embedding.
        logits: the decoder's output.

    Raises:
        UnsupportedError: later layers read more than the hidden state.
    """
    attends = [i for i, op in enumerate(ops) if op.kind == "attend"]
    begins = [1, *(cut(ops, a, b, logits) for a, b in pairwise(attends))]
    found = []
    for layer, (begin, end) in enumerate(zip(begins, [*begins[1:], len(ops)], strict=True)):
        own = tuple(ops[begin:end])
        last = end == len(ops)
        source = ops[begin - 1].dst
        result = logits if last else ops[end - 1].dst
        found.append(GraphPart(layer, (own,), source, result, last, sum(weight_bytes(d, precision) for d in own)))
    return tuple(found)


def cut(ops: Sequence[Op], after: int, before: int, result: Value) -> int:
    """The last index between two attentions after which only the result of the operator before it is read.

    Raises:
        UnsupportedError: there is no such index.
    """
    for place in range(before, after, -1):
        made = {id(d.dst.root()[0]) for d in ops[place:]}
        read = {id(v.root()[0]) for d in ops[place:] for v in d.reads()} | {id(result.root()[0])}
        if read - made == {id(ops[place - 1].dst)}:
            return place
    raise UnsupportedError(
        f"Between the attention layers at {ops[after].node} and {ops[before].node} more than one value is "
        "passed on, and parts of a model pass on only one",
        "Use another backend",
    )


def weight_bytes(op: Op, precision: QnnPrecision) -> int:
    """Bytes that the matrix of a product takes in a context binary."""
    if op.kind != "linear" or op.weight is None:
        return 0
    return matrix_bytes(op.weight, precision.weights_of(op))


def matrix_bytes(weight: Weight, form: str) -> int:
    """Bytes of a matrix in one of the forms of `precision.Form`, as `transom export --plan` counts them."""
    return _FORMS[form].bytes(*weight.shape)

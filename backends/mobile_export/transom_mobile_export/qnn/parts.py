"""Which layers of a decoder make one part: a context binary that is no larger than the HTP can map.

A decoder is cut only where nothing but the rows of its hidden state goes from one operator to a later one, so that a
part takes `hidden` and gives `hidden_out`. A part that is planned here is not compiled yet: its bytes are those of its
weights, which are nearly all of a context binary.
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
    """Some layers, one after the other."""

    first: int
    layers: tuple[tuple[Op, ...], ...]
    """The operators of each; those behind the last layer of the model are with it."""
    source: Value
    """The hidden state that goes in."""
    result: Value
    """What comes out: the hidden state, or the logits of the last part."""
    last: bool
    bytes: int
    """Of its weights."""

    @property
    def end(self) -> int:
        """The first layer that is no longer in it."""
        return self.first + len(self.layers)

    @property
    def name(self) -> str:
        return f"layers {self.first} to {self.end - 1}" if self.end - self.first > 1 else f"layer {self.first}"


def plan_parts(layers: Sequence[GraphPart], *, largest: int = LARGEST) -> tuple[GraphPart, ...]:
    """The parts of a decoder, each as large as fits; nothing is read or compiled.

    Args:
        layers: what `layers_of` gave.
        largest: bytes of weights that a part may have.

    Raises:
        DoesNotFit: a single layer is larger than a part may be.
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
    """Two neighbours as one."""
    return GraphPart(a.first, a.layers + b.layers, a.source, b.result, b.last, a.bytes + b.bytes)


def layers_of(ops: Sequence[Op], logits: Value, precision: QnnPrecision) -> tuple[GraphPart, ...]:
    """Every layer as a part of its own; what comes after the last layer is with it.

    Args:
        drafts: of the whole decoder; the first one is its embedding.
        logits: what it gives.

    Raises:
        UnsupportedError: more goes from layer to layer than the rows of the hidden state.
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
    """The last place between two attentions behind which only what the operator before it gave is read.

    Raises:
        UnsupportedError: there is none.
    """
    for place in range(before, after, -1):
        made = {id(d.dst.root()[0]) for d in ops[place:]}
        read = {id(v.root()[0]) for d in ops[place:] for v in d.reads()} | {id(result.root()[0])}
        if read - made == {id(ops[place - 1].dst)}:
            return place
    raise UnsupportedError(
        f"Between the attention layers at {ops[after].node} and {ops[before].node} more than one value is "
        "carried on, and parts of a model hand on one",
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

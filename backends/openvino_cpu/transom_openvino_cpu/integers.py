"""Which integers a graph may reach: OpenVINO 2026.4 computes int64, uint64 and uint32 in int32, and says nothing when
it cuts them; some operators it computes in float32, which holds integers up to 2^24 exactly.

A walk through the graph gives every value a span, as interval arithmetic has it. A node is refused if its result may
leave what OpenVINO computes with. Three things make that useful for real models:

- The graph's own inputs are checked at each run. The limit is the largest under which most nodes are claimed.
- Sizes, positions and counts, and sums and products of them with small numbers, are taken to stay below `SIZE`: they
  count the elements of a tensor.
- A cast of a float of unknown size gives the nearest integer that int32 holds, from which only such operators are
  claimed as choose among values. Outputs of the graph with such numbers are checked at each run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from transom.graph.editing import subgraphs
from transom.graph.reading import constant_of
from transom_openvino_cpu.integer_limits import COMPUTED, CUT, EXACT, LEAST, MOST, least

if TYPE_CHECKING:
    import onnx_ir as ir

    from transom.graph import Graph

SIZE = 2**23
"""What the size of an axis, a position and a count are taken to stay below. (Twice that is exact in float32.)"""
STEP = 4096
"""Constants up to it may be added to sizes and multiplied with them."""
LIMITS = (MOST, 2**30 - 1, 2**24, 2**20)
"""Limits of the graph's inputs that are tried. Ids of tokens and positions are below the last."""
AXES = 64
"""Sums and products of up to so many sizes are sizes: no shape has more."""
HUGE = 2**100
"""Spans beyond it have no bounds."""
ELEMENTS = 4096
"""Constants of floats are read up to this many."""

_RANGES = {
    "BOOL": (0, 1), "UINT8": (0, 255), "INT8": (-128, 127), "UINT16": (0, 2**16 - 1), "INT16": (-(2**15), 2**15 - 1),
    "INT32": (LEAST, MOST), "UINT32": (0, MOST), "INT64": (LEAST, MOST), "UINT64": (0, MOST),
}  # fmt: skip
"""Type -> what OpenVINO computes with."""
_WIDE = frozenset({"INT64", "UINT64", "UINT32"})
_IN_FLOATS = frozenset({
    "BitShift", "Div", "Einsum", "Gemm", "MatMul", "Mod", "Pad", "Pow", "ReduceL1", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu", "Trilu",
})  # fmt: skip
"""Operators on integers that OpenVINO computes in float32."""
_SAME = frozenset({
    "CenterCropPad", "Compress", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND",
    "Identity", "Reshape", "ReverseSequence", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose",
    "Unsqueeze",
})  # fmt: skip
"""Operators whose results are elements of the first input."""
_ONCE = frozenset({
    "Compress", "DepthToSpace", "Flatten", "Identity", "Reshape", "ReverseSequence", "Slice", "SpaceToDepth", "Split",
    "Squeeze", "Transpose", "Unsqueeze",
})  # fmt: skip
"""Those that take no element twice."""
_CHOOSING = frozenset({
    "Clip", "Concat", "Equal", "Greater", "GreaterOrEqual", "If", "Less", "LessOrEqual", "Max", "Min", "Where",
}) | _SAME  # fmt: skip
"""Operators that a cast of a float of unknown size may go into: what they give for the nearest integer is right, or
again the nearest integer."""
_INDEXING = {
    "ConstantOfShape": (0,), "Expand": (1,), "Gather": (1,), "GatherElements": (1,), "GatherND": (1,),
    "NonMaxSuppression": (2,), "OneHot": (0, 1), "Pad": (1,), "Range": (0, 1, 2), "Reshape": (1,), "Resize": (3,),
    "ReverseSequence": (1,), "ScatterElements": (1,), "ScatterND": (1,), "Slice": (1, 2, 3, 4), "Split": (1,),
    "Tile": (1,), "TopK": (1,),
}  # fmt: skip
"""Operator -> inputs that are indices and sizes: ONNX has no result for those that int32 does not hold, except for the
ends of a Slice, which mean the same as the largest that it holds."""
_JOINING = frozenset({"Concat", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
"""Operators that put the ends of a Slice together."""
_CARRIED = 2**30
"""What a value that a Loop counts up stays below."""


@dataclass(frozen=True)
class Span:
    """What a value may be."""

    low: float
    high: float
    size: bool = False
    """A size, a position or a count."""
    place: bool = False
    """A position or a count: the product of two is not the number of elements of anything."""
    source: str = ""
    """The input of the graph whose elements these are, each once at the most."""
    cut: bool = False
    """Floats of unknown size that were cast."""
    carried: bool = False
    """A value that a Loop or Scan hands from turn to turn."""

    @property
    def most(self) -> float:
        return max(abs(self.low), abs(self.high))

    def within(self, low: float, high: float) -> bool:
        return low <= self.low and self.high <= high


PLACE = Span(0, SIZE, size=True, place=True)


@dataclass
class Integers:
    """The result of the walk."""

    refused: dict[str, str] = field(default_factory=dict)
    """Node -> reason."""
    limit: int = MOST
    """The limit of the graph's inputs of `COMPUTED` types."""
    summed: tuple[str, ...] = ()
    """Inputs whose absolute elements stay up to `EXACT` in sum."""
    cut: tuple[str, ...] = ()
    """Outputs that hold casts of floats of unknown size."""


def integers(graph: Graph) -> Integers:
    """The nodes whose integers OpenVINO would cut, and the limits of inputs and outputs under which no other does."""
    best: Integers | None = None
    for limit in LIMITS:
        found = _Walk(limit).walk(graph.model.graph)
        if best is None or len(found.refused) < len(best.refused):
            best = found
        if not best.refused:
            break
    assert best is not None
    return best


def _kind(value: ir.Value | None) -> str:
    return "" if value is None or value.dtype is None else value.dtype.name


def _default(value: ir.Value | None) -> Span:
    return Span(*_RANGES.get(_kind(value), (-math.inf, math.inf)))


def _hull(spans: Iterable[Span]) -> Span:
    found = list(spans)
    low, high = min(s.low for s in found), max(s.high for s in found)
    place, cut, carried = (any(getattr(s, what) for s in found) for what in ("place", "cut", "carried"))
    return Span(low, high, _sizes(found), place, cut=cut, carried=carried)


def _sizes(spans: Sequence[Span]) -> bool:
    """Whether they are sizes and small constants."""
    return any(s.size for s in spans) and all(_sizeable(s) for s in spans)


def _sizeable(span: Span) -> bool:
    return span.size or span.most <= STEP


def _corners(a: Span, b: Span) -> Span:
    """The products."""
    found = [0 if not x or not y else x * y for x in (a.low, a.high) for y in (b.low, b.high)]
    return Span(min(found), max(found))


def _count(value: ir.Value | None) -> int:
    """The number of elements; 0 if it is not known."""
    if value is None or value.shape is None or not all(isinstance(d, int) for d in value.shape):
        return 0
    return math.prod(int(d) for d in value.shape if isinstance(d, int))


def _times(span: Span, count: int) -> Span:
    """Sums of up to so many such numbers; of an unknown number if it is 0."""
    if not count and span.most <= 1:
        return Span(-SIZE if span.low < 0 else 0, SIZE, size=True, place=True)
    most = span.most * (count or math.inf) if span.most else 0
    return Span(-most if span.low < 0 else 0, most)


class _Walk:
    """One walk, under one limit of the graph's inputs."""

    def __init__(self, limit: int) -> None:
        self.found = Integers(limit=limit)
        self._spans: dict[int, Span] = {}
        self._summed: dict[str, None] = {}

    def walk(self, graph: ir.Graph) -> Integers:
        for value in graph.inputs:
            if value.const_value is None and _kind(value) in COMPUTED:
                low = 0 if _kind(value).startswith("U") else least(self.found.limit)
                self._spans[id(value)] = Span(low, self.found.limit, source=str(value.name))
        for node in graph:
            self._visit(node, str(node.name))
        self.found.cut = tuple(str(v.name) for v in graph.outputs if _kind(v) in _WIDE and self._span(v).cut)
        self.found.summed = tuple(self._summed)
        return self.found

    def _span(self, value: ir.Value | None) -> Span:
        if value is None:
            return Span(0, 0)
        if id(value) not in self._spans:
            self._spans[id(value)] = self._constant(value)
        return self._spans[id(value)]

    @staticmethod
    def _constant(value: ir.Value) -> Span:
        small = _kind(value) in COMPUTED or 0 < _count(value) <= ELEMENTS
        array = constant_of(value) if small else None
        if array is None or not array.size or array.dtype.kind not in "iuf" or not np.isfinite(array).all():
            return _default(value)
        return Span(array.min().item(), array.max().item())

    def _visit(self, node: ir.Node, top: str) -> None:
        """Find the spans of a node's outputs; `top` is the node of the main graph that it is part of."""
        inputs = [self._span(v) for v in node.inputs]
        if node.domain not in ("", "ai.onnx"):
            spans = [_default(v) for v in node.outputs]
        elif node.op_type in ("If", "Loop", "Scan"):
            spans = self._inside(node, inputs, top)
        else:
            spans = self._outputs(node, inputs)
        if reason := self._reason(node, inputs, spans):
            self.found.refused.setdefault(top, reason)
        for value, span in zip(node.outputs, spans, strict=True):
            whole = _default(value)
            if node.op_type != "Constant" and not span.within(whole.low, whole.high):  # int32 wraps in ONNX, too
                span = replace(span, low=whole.low, high=whole.high)
            if span.most > HUGE:  # of floats; no float holds an integer of a thousand bits
                span = replace(span, low=-math.inf, high=math.inf)
            self._spans[id(value)] = span

    # what is refused --------------------------------------------------------------------------------------------------
    def _reason(self, node: ir.Node, inputs: Sequence[Span], spans: Sequence[Span]) -> str:
        for i, (value, span) in enumerate(zip(node.inputs, inputs, strict=True)):
            if _kind(value) not in _WIDE or value is None:
                continue
            if not span.within(LEAST, MOST) and not self._ends_slices(node, i):
                return f"OpenVINO computes {_kind(value).lower()} in int32, which does not hold a constant of it"
            chooses = node.op_type in _CHOOSING or i in _INDEXING.get(node.op_type, ())
            to_bool = node.op_type == "Cast" and _kind(node.outputs[0]) == "BOOL"
            if span.cut and not chooses and not to_bool and not all(self._indexes(v) for v in node.outputs):
                return "OpenVINO computes int64 in int32, which may not hold a float that was cast to it"
        wide = [(v, s) for v, s in zip(node.outputs, spans, strict=True) if _kind(v) in _WIDE]
        for value, span in wide:
            if node.op_type != "Constant" and not span.within(*_RANGES[_kind(value)]) and not self._is_end(value):
                return f"OpenVINO computes {_kind(value).lower()} in int32, which may not hold the result"
        if node.op_type in _IN_FLOATS and node.outputs and _kind(node.outputs[0]) in COMPUTED:
            looked = [s for v, s in zip(node.inputs, inputs, strict=True) if _kind(v) in COMPUTED]
            if node.op_type == "Pad":
                looked = list(inputs[2:3])
            elif node.op_type.startswith("Reduce"):
                looked = [spans[0] if inputs[0].source in self._summed else inputs[0], spans[0]]
            else:
                looked.append(spans[0])
            if not all(s.within(-EXACT, EXACT) for s in looked):
                return f"OpenVINO computes {node.op_type} of integers in float32, which may not hold them"
        return ""

    def _ends_slices(self, node: ir.Node, index: int) -> bool:
        """Whether an input is the start or the end of a Slice, or part of one."""
        if node.op_type == "Slice":
            return index in (1, 2)
        return node.op_type in _JOINING and self._is_end(node.outputs[0])

    @staticmethod
    def _is_end(value: ir.Value) -> bool:
        """Whether a value is only used so."""
        waiting, seen = [value], {id(value)}
        while waiting:
            part = waiting.pop()
            if part.is_graph_output():
                return False
            for node, index in part.uses():
                if node.op_type == "Slice" and index in (1, 2):
                    continue
                if node.op_type not in _JOINING:
                    return False
                if id(node.outputs[0]) not in seen:
                    seen.add(id(node.outputs[0]))
                    waiting.append(node.outputs[0])
        return True

    @staticmethod
    def _indexes(value: ir.Value) -> bool:
        """Whether a value is used as an index or a size only, perhaps after arithmetic."""
        waiting, seen = [value], {id(value)}
        while waiting:
            part = waiting.pop()
            if part.is_graph_output() or _kind(part) not in _WIDE:
                return False
            for node, index in part.uses():
                if index in _INDEXING.get(node.op_type, ()):
                    continue
                if len(node.outputs) != 1:
                    return False
                if id(node.outputs[0]) not in seen:
                    seen.add(id(node.outputs[0]))
                    waiting.append(node.outputs[0])
        return True

    # what the results may be ------------------------------------------------------------------------------------------
    def _inside(self, node: ir.Node, inputs: Sequence[Span], top: str) -> list[Span]:
        """The outputs of control flow, after a walk through its graphs."""
        results = []
        for graph in subgraphs(node):
            given = list(inputs) if node.op_type != "If" else []
            states = len(given)
            if node.op_type == "Loop":
                given[:2] = [PLACE, Span(0, 1)]
            elif node.op_type == "Scan":
                states -= node.attributes.get_int("num_scan_inputs", 0)
            for i, value in enumerate(graph.inputs):
                span = replace(given[i], source="") if i < len(given) else _default(value)
                if i < states and not (node.op_type == "Loop" and i < 2):
                    low = 0 if _kind(value).startswith("U") else -_CARRIED
                    span = Span(low, _CARRIED, carried=True) if _kind(value) in _WIDE else _default(value)
                self._spans[id(value)] = span
            for inner in graph:
                self._visit(inner, top)
            results.append([replace(self._span(v), source="", carried=False) for v in graph.outputs])
        if node.op_type == "If":
            return [_hull(both) for both in zip(*results, strict=True)]
        made = results[0][1:] if node.op_type == "Loop" else results[0]
        first = inputs[2:] if node.op_type == "Loop" else inputs
        carried = len(first) - (node.attributes.get_int("num_scan_inputs", 0) if node.op_type == "Scan" else 0)
        return [_hull([first[i], s]) if i < carried else s for i, s in enumerate(made)]

    def _outputs(self, node: ir.Node, inputs: Sequence[Span]) -> list[Span]:
        op, first = node.op_type, inputs[0] if inputs else Span(0, 0)
        if op in _SAME:
            kept = first if op in _ONCE else replace(first, source="")
            return [kept] * len(node.outputs)
        if op in ("Shape", "Size"):
            return [replace(PLACE, place=False)]
        if op in ("ArgMax", "ArgMin", "NonZero", "NonMaxSuppression"):
            return [PLACE]
        if op == "TopK":
            return [replace(first, source=""), PLACE]
        integral = bool(node.outputs) and _kind(node.outputs[0]) in COMPUTED
        arithmetic = _integer_div if op == "Div" and integral else _ARITHMETIC.get(op)
        if arithmetic is None:
            result = self._other(node, inputs)
        else:
            result = arithmetic(inputs)
            if any(s.carried for s in inputs):
                others = [s for s in inputs if not s.carried]
                if op in ("Add", "Sub") and len(others) == 1 and _sizeable(others[0]):
                    result = Span(-_CARRIED, _CARRIED, carried=True)
                elif op in ("Add", "Sub", "Sum"):
                    result = Span(-math.inf, math.inf)
            elif op not in ("BitShift", "Pow") and _sizes(inputs):
                places = sum(s.place for s in inputs)
                if op != "Mul" or places < 2:
                    result = Span(max(result.low, -SIZE), min(result.high, SIZE), size=True, place=places > 0)
            if any(s.cut for s in inputs):
                result = replace(result, cut=True)
        return [result, *(_default(v) for v in node.outputs[1:])]

    def _other(self, node: ir.Node, inputs: Sequence[Span]) -> Span:
        op, first, out = node.op_type, inputs[0] if inputs else Span(0, 0), node.outputs[0]
        if op == "Constant":
            return self._constant(out)
        if op in ("Cast", "CastLike"):
            return self._cast(node.inputs[0], first, out)
        if op in ("Concat", "Max", "Mean", "Min"):
            return _hull(inputs)
        if op == "Range":
            return replace(_hull(inputs[:2]), place=True)
        if op == "Where":
            return _hull(inputs[1:])
        if op == "Clip":
            return self._clip(node, inputs)
        if op in ("ReduceMax", "ReduceMin", "ReduceMean", "Trilu", "Pad"):
            return _hull([first, *([inputs[2] if len(inputs) > 2 else Span(0, 0)] if op == "Pad" else ())])
        if op in ("CumSum", "ReduceSum", "ReduceL1"):
            if first.source and _kind(out) in COMPUTED:
                self._summed[first.source] = None
                return Span(-EXACT, EXACT)
            if op == "ReduceL1":
                first = Span(0, first.most)
            total = _times(first, _count(node.inputs[0]))
            if first.size and 0 < _count(node.inputs[0]) <= AXES:
                total = Span(max(total.low, -SIZE), min(total.high, SIZE), size=True, place=first.place)
            return total
        if op == "ReduceSumSquare":
            return _times(_corners(Span(0, first.most), Span(0, first.most)), _count(node.inputs[0]))
        if op == "ReduceProd":
            count = _count(node.inputs[0])
            if first.size and not first.place and 0 < count <= AXES:
                return Span(-SIZE, SIZE, size=True)
            power = first.most**count if 0 < count <= AXES and first.most < math.inf else math.inf
            return Span(-power, power)
        if op == "MatMul" and len(inputs) == 2:
            return _times(_corners(*inputs), _count(node.inputs[0]))
        if op in ("ScatterElements", "ScatterND"):
            adds = node.attributes.get_string("reduction", "none") in ("add", "mul")
            return Span(-math.inf, math.inf) if adds else _hull([first, inputs[2]])
        if op == "OneHot":
            return replace(inputs[2], source="")
        if op == "ConstantOfShape":
            filled = node.attributes["value"].as_tensor().numpy() if "value" in node.attributes else np.zeros(1)
            return Span(filled.min().item(), filled.max().item())
        if op in _FIXED:
            return Span(*_FIXED[op])
        # An operator on integers that is not listed gives anything.
        return Span(-math.inf, math.inf) if _kind(out) in _WIDE else _default(out)

    @staticmethod
    def _clip(node: ir.Node, inputs: Sequence[Span]) -> Span:
        span = inputs[0]
        low, high = span.low, span.high
        if len(inputs) > 1 and node.inputs[1] is not None:
            low, high = max(low, inputs[1].low), max(high, inputs[1].high)
        if len(inputs) > 2 and node.inputs[2] is not None:
            low, high = min(low, inputs[2].low), min(high, inputs[2].high)
        cut = span.cut and (low <= LEAST or high >= CUT)
        sizes = _sizes(inputs) or (span.size and high <= SIZE)
        return Span(low, high, sizes, span.place, cut=cut, carried=span.carried)

    @staticmethod
    def _cast(source: ir.Value | None, span: Span, out: ir.Value) -> Span:
        floating = source is not None and source.dtype is not None and source.dtype.is_floating_point()
        if not floating or _kind(out) not in _WIDE:
            whole = _default(out)
            return span if span.within(whole.low, whole.high) or _kind(out) in _WIDE else whole
        if _kind(out) != "INT64" or span.within(LEAST, CUT - 1):
            return replace(span, low=math.ceil(span.low) if math.isfinite(span.low) else span.low)
        return Span(max(span.low, LEAST), min(span.high, CUT), cut=True)


def _add(spans: Sequence[Span]) -> Span:
    return Span(sum(s.low for s in spans), sum(s.high for s in spans))


def _sub(spans: Sequence[Span]) -> Span:
    return Span(spans[0].low - spans[1].high, spans[0].high - spans[1].low)


def _mul(spans: Sequence[Span]) -> Span:
    return _corners(spans[0], spans[1])


def _div(spans: Sequence[Span]) -> Span:
    a, b = spans
    if b.low <= 0 <= b.high:
        return Span(-math.inf, math.inf)
    return _corners(a, Span(min(1 / b.low, 1 / b.high), max(1 / b.low, 1 / b.high)))


def _integer_div(spans: Sequence[Span]) -> Span:
    """No divisor is zero."""
    a, b = spans
    return Span(0 if a.low >= 0 and b.low >= 0 else -a.most, a.most)


def _mod(spans: Sequence[Span]) -> Span:
    a, b = spans
    return Span(0, min(a.high, b.high)) if a.low >= 0 and b.low >= 0 else Span(-b.most, b.most)


def _neg(spans: Sequence[Span]) -> Span:
    return Span(-spans[0].high, -spans[0].low)


def _abs(spans: Sequence[Span]) -> Span:
    return Span(0, spans[0].most)


def _pow(spans: Sequence[Span]) -> Span:
    base, exponent = spans
    if exponent.low < 0 or exponent.high > 15 or base.most > 2**64:
        return Span(-math.inf, math.inf)
    most = max(base.most, 1) ** exponent.high
    return Span(0 if base.low >= 0 else -most, most)


def _bits(spans: Sequence[Span]) -> Span:
    """And, Or and Xor need no bit that neither input has."""
    low, high = min(s.low for s in spans), max(s.high for s in spans)
    most = 2 ** math.ceil(math.log2(max(high, -low - 1, 0) + 1))
    return Span(0 if low >= 0 else -most, most - 1)


def _not(spans: Sequence[Span]) -> Span:
    return Span(-spans[0].high - 1, -spans[0].low - 1)


def _shift(spans: Sequence[Span]) -> Span:
    a, b = spans
    return Span(0, a.high * 2 ** min(b.high, 64))


def _round(spans: Sequence[Span]) -> Span:
    return Span(spans[0].low - 1, spans[0].high + 1)


def _sqrt(spans: Sequence[Span]) -> Span:
    return Span(0, max(spans[0].high, 0) ** 0.5)


def _relu(spans: Sequence[Span]) -> Span:
    return Span(max(spans[0].low, 0), max(spans[0].high, 0))


_ARITHMETIC = {
    "Abs": _abs, "Add": _add, "BitShift": _shift, "BitwiseAnd": _bits, "BitwiseNot": _not, "BitwiseOr": _bits,
    "BitwiseXor": _bits, "Ceil": _round, "Div": _div, "Floor": _round, "Mod": _mod, "Mul": _mul, "Neg": _neg,
    "Pow": _pow, "Relu": _relu, "Round": _round, "Sqrt": _sqrt, "Sub": _sub, "Sum": _add,
}  # fmt: skip
_FIXED = {
    "Cos": (-1, 1), "Erf": (-1, 1), "EyeLike": (0, 1), "HardSigmoid": (0, 1), "Log": (-math.inf, 89),
    "Sigmoid": (0, 1), "Sign": (-1, 1), "Sin": (-1, 1), "Softmax": (0, 1), "Tanh": (-1, 1),
}  # fmt: skip

"""Backends that compute or return the wrong thing, each in one way: the conformance kit must catch every one of them.

Each class says in `caught_by` which checks must fail. They are the reference backend with one thing changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from changed_reference import Changed, ChangedLogits

from transom.contract import Limits, Work
from transom.graph import Graph
from transom.reference.executor import Executor
from transom.sessions import PackedSession, best

Results = list[Any]


# what is computed -----------------------------------------------------------------------------------------------------
class GarbageLogits(ChangedLogits):
    caught_by = ("logits.gqa", "step.ragged", "artifact.another_process", "walk.gqa")

    def alter(self, results: Results, work: Sequence[Work]) -> Results:
        return [r if r is None or isinstance(r, tuple) else np.full_like(r, 0.5) for r in results]


class NotANumber(ChangedLogits):
    caught_by = ("logits.gqa",)

    def alter(self, results: Results, work: Sequence[Work]) -> Results:
        for r in results:
            if isinstance(r, np.ndarray):
                r[..., 7] = np.nan
        return results


class OnePercentOff(ChangedLogits):
    caught_by = ("logits.gqa", "logits.int4")

    def alter(self, results: Results, work: Sequence[Work]) -> Results:
        return [r * np.float32(1.01) if isinstance(r, np.ndarray) else r for r in results]


class AddsInAnotherOrder(ChangedLogits):
    """The last bits differ each time, as they do where threads add what they have in the order in which they end."""

    caught_by = ("step.deterministic",)
    calls = 0

    def alter(self, results: Results, work: Sequence[Work]) -> Results:
        self.calls += 1
        return [r * np.float32(1 + 1e-6 * self.calls) if isinstance(r, np.ndarray) else r for r in results]


class RoundsByTheBatch(ChangedLogits):
    """The last bits depend on the size of the step, although the session is said to be batch-invariant."""

    caught_by = ("step.batch_invariant",)
    limits = Limits(64, 4096, 0, 0, batch_invariant=True)

    def alter(self, results: Results, work: Sequence[Work]) -> Results:
        size = sum(len(w.tokens) for w in work)
        return [r * np.float32(1 + 1e-6 * size) if isinstance(r, np.ndarray) else r for r in results]


class LastRowOff(ChangedLogits):
    """One wrong row among many right ones."""

    caught_by = ("logits.gqa",)

    def alter(self, results: Results, work: Sequence[Work]) -> Results:
        for r in results:
            if isinstance(r, np.ndarray) and r.ndim == 2:
                r[-1] *= np.float32(1.02)
        return results


class WideLogits(ChangedLogits):
    caught_by = ("logits.gqa",)

    def alter(self, results: Results, work: Sequence[Work]) -> Results:
        return [r.astype(np.float64) if isinstance(r, np.ndarray) else r for r in results]


class _Ignores(Changed):
    """Ignores an attribute or an input of attention."""

    attribute = ""
    value: Any = 0

    def edit(self, graph: Graph) -> Graph:
        for node in graph.nodes():
            if node.op_type == "CachedAttention" and self.attribute in node.attributes:
                node.attributes[self.attribute] = ir.convenience.convert_attribute(self.attribute, self.value)
        return graph


class IgnoresWindow(_Ignores):
    caught_by = ("logits.window", "operator.transom.CachedAttention", "state.truncate_window", "walk.window")
    attribute = "sliding_window"


class WindowOffByOne(Changed):
    caught_by = ("logits.window", "operator.transom.CachedAttention")

    def edit(self, graph: Graph) -> Graph:
        for node in graph.nodes():
            if (size := node.attributes.get_int("sliding_window", 0)) > 0:
                node.attributes["sliding_window"] = ir.AttrInt64("sliding_window", size + 1)
        return graph


class IgnoresSoftcap(_Ignores):
    caught_by = ("logits.softcap", "operator.transom.CachedAttention")
    attribute, value = "softcap", 0.0


class IgnoresScale(_Ignores):
    caught_by = ("logits.scale", "operator.transom.CachedAttention")
    attribute, value = "scale", 0.0


class _Drops(Changed):
    position = 9

    def edit(self, graph: Graph) -> Graph:
        for node in graph.nodes():
            if node.op_type == "CachedAttention" and len(node.inputs) > self.position:
                node.replace_input_with(self.position, None)
        return graph


class IgnoresBias(_Drops):
    caught_by = ("logits.attention_bias", "operator.transom.CachedAttention")


class IgnoresSinks(_Drops):
    caught_by = ("logits.sinks", "operator.transom.CachedAttention", "step.ragged_windows")
    position = 10


class MixesHeads(Changed):
    """Takes key heads in turn where grouped queries share them in runs."""

    caught_by = ("logits.gqa", "operator.transom.CachedAttention")

    def outputs(self, executor: Executor, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        return executor.run(inputs)

    def edit(self, graph: Graph) -> Graph:
        for node in graph.nodes():
            if node.op_type == "CachedAttention":
                heads = node.attributes.get_int("kv_num_heads", 1)
                node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", 1 if heads > 1 else heads)
        return graph


class SwishIsSigmoid(Changed):
    caught_by = ("operator.Swish", "logits.gqa")

    def edit(self, graph: Graph) -> Graph:
        for node in graph.nodes():
            if node.op_type == "Swish":
                node.op_type = "Sigmoid"
        return graph


class RotatesNeighbors(Changed):
    caught_by = ("operator.RotaryEmbedding", "logits.gqa", "logits.partial_rotary")

    def edit(self, graph: Graph) -> Graph:
        for node in graph.nodes():
            if node.op_type == "RotaryEmbedding":
                node.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)
        return graph


class IgnoresZeroPoints(Changed):
    caught_by = ("operator.DequantizeLinear", "logits.uint4_zero_points")

    def edit(self, graph: Graph) -> Graph:
        for node in graph.nodes():
            if node.op_type == "DequantizeLinear" and len(node.inputs) > 2:
                node.replace_input_with(2, None)
        return graph


class MixesSequences(Changed):
    """Forgets which token belongs to which sequence: right alone, wrong in a batch."""

    caught_by = ("step.ragged", "walk.gqa", "operator.transom.CachedAttention")

    def outputs(self, executor: Executor, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        zeros = {n: np.zeros_like(x) for n, x in inputs.items() if n in ("sequences", "past_sequences", "x5", "x7")}
        return executor.run(dict(inputs) | zeros)


class ReversedResults(ChangedLogits):
    caught_by = ("step.ragged", "step.forms")

    def alter(self, results: Results, work: Sequence[Work]) -> Results:
        return results[::-1]


# the form of an answer ------------------------------------------------------------------------------------------------
class WorstFirst(ChangedLogits):
    caught_by = ("step.top_k",)

    def alter(self, results: Results, work: Sequence[Work]) -> Results:
        return [tuple(p[..., ::-1] for p in r) if isinstance(r, tuple) else r for r in results]


class NotTheBest(Changed):
    caught_by = ("step.top_k",)

    class session(PackedSession):
        def step(self, work: Sequence[Work]) -> Results:
            full = super().step([replace(w, top_k=0) for w in work])
            return [
                tuple(p[..., 1:] for p in best(r, min(w.top_k + 1, 61))) if w.top_k else r
                for r, w in zip(full, work, strict=True)
            ]


class NarrowIds(ChangedLogits):
    caught_by = ("step.top_k",)

    def alter(self, results: Results, work: Sequence[Work]) -> Results:
        return [(r[0].astype(np.int32), r[1]) if isinstance(r, tuple) else r for r in results]


class AlwaysAllRows(Changed):
    caught_by = ("step.forms",)

    class session(PackedSession):
        def step(self, work: Sequence[Work]) -> Results:
            return list(super().step([replace(w, logits="all") for w in work]))


class AliasingOutputs(ChangedLogits):
    """Returns views of one buffer that every step writes to."""

    caught_by = ("step.outputs_belong_to_caller",)
    buffer: ClassVar[Any] = np.zeros(200 * 61, np.float32)

    def alter(self, results: Results, work: Sequence[Work]) -> Results:
        shared, at = [], 0
        for r in results:
            if isinstance(r, np.ndarray):
                view = self.buffer[at : at + r.size].reshape(r.shape)
                view[...] = r
                at += r.size
                r = view
            shared.append(r)
        return shared


class AliasingRun(Changed):
    caught_by = ("operator.Add",)
    buffers: ClassVar[dict[Any, Any]] = {}

    def outputs(self, executor: Executor, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        outputs = executor.run(inputs)
        for name, array in outputs.items():
            buffer = self.buffers.setdefault((name, array.shape, array.dtype), array)
            buffer[...] = array
            outputs[name] = buffer
        return outputs

"""Sparse attention in static shapes: the same units as the reference, and the same numbers.

Draws: texts and operators' inputs are drawn again until no choice is nearer to another one than rounding (`CLEAR`,
`CLOSE`, `CLOSE_HALF`); of int8 the median row is judged.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from qnn_models import CPU, draw, needs_qnn, opened, options
from redraws import without_close_choices

from transom.contract import Limits, Work
from transom.errors import OptionError
from transom.graph import Graph
from transom.graph.sparse import with_sparsity
from transom.ops.sparse_attention import OBSERVER, attend
from transom.ops.sparse_routing import HeadRoute
from transom.preparation.agreement import compare
from transom.programs.onnx_writing import FLOAT, IR_VERSION, OnnxWriter
from transom.reference.executor import Executor
from transom.sessions import PackedSession
from transom.sparsity import Sparsity
from transom.sparsity.static import static_refusal
from transom.testing.models import tiny_decoder
from transom_mobile_export.qnn.backend import Qnn
from transom_mobile_export.qnn.claims import HtpDecoder, read_decoder
from transom_mobile_export.qnn.layout import PartFiles, QnnVariant, cache_layers
from transom_mobile_export.qnn.loading import session_over
from transom_mobile_export.qnn.lowering import lower
from transom_mobile_export.qnn.observing import rows_of
from transom_mobile_export.qnn.parts import plan_parts
from transom_mobile_export.qnn.precision import QnnPrecision
from transom_mobile_export.qnn.running import PartGraphs, QnnEngine
from transom_mobile_export.qnn.sparse import Head, Marks, SparseAttention, StepInputs
from transom_mobile_export.qnn.sparse_inputs import base_of, first_node, step_inputs
from transom_mobile_export.qnn.sparse_sizes import ChoiceSizes, sparse_heads, unfit

Array = np.ndarray[Any, np.dtype[Any]]
LOW = -1e4
CONTEXT = 384


@dataclass(frozen=True)
class Form:
    """Heads of one layer."""

    kv_heads: int = 2
    group: int = 3
    head_dim: int = 16
    value_dim: int = 8
    softcap: float = 0.0
    sinks: bool = False
    dense: tuple[int, ...] = ()


class Operator:
    """The graphs of one layer's attention in onnxruntime, with the host's part of the work."""

    def __init__(self, policy: Sparsity, form: Form, sinks: Array | None, chunk: int) -> None:
        import onnxruntime

        self.form, self.policy = form, policy
        self.heads = sparse_heads(policy.layer(0), form.kv_heads)
        self.sizes = {tokens: ChoiceSizes(policy, CONTEXT, tokens) for tokens in (1, chunk)}
        self.chunk = chunk
        self.sessions = {}
        for tokens, sizes in self.sizes.items():
            model = self._model(sizes, sinks)
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            self.sessions[tokens] = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
        kv, count = form.kv_heads, len(self.heads)
        self.keys = np.full((1, kv, CONTEXT, form.head_dim), 7, np.float32)  # what is not filled must not matter
        self.values = np.full((1, kv, CONTEXT, form.value_dim), 7, np.float32)
        shape = 1, count, self.sizes[1].nodes, form.head_dim
        self.means, self.variances = np.full(shape, 3, np.float32), np.full(shape, 3, np.float32)
        self.length = 0

    def _model(self, sizes: ChoiceSizes, sinks: Array | None) -> ir.Model:
        w, form, marks, tokens = OnnxWriter("attention"), self.form, Marks(), sizes.tokens
        count = len(self.heads)
        step = StepInputs(w, sizes, LOW, marks)
        q = w.input("q", FLOAT, (1, count * form.group, tokens, form.head_dim))
        new = tuple(w.input(f"new_{n}", FLOAT, (1, count, tokens, c)) for n, c in self._columns())
        past = tuple(w.input(f"past_{n}", FLOAT, (1, form.kv_heads, CONTEXT, c)) for n, c in self._columns())
        nodes = tuple(w.input(n, FLOAT, (1, count, sizes.nodes, form.head_dim)) for n in ("means", "variances"))
        head = Head(self.heads, form.kv_heads, form.group, form.head_dim, form.value_dim, form.softcap, sinks)
        layer = SparseAttention(step, "", head, past, nodes)  # type: ignore[arg-type]
        w.output(layer.attend(q, new), "out", (1, count * form.group, tokens, form.value_dim))  # type: ignore[arg-type]
        for value, name in zip(layer.renewed(new[0]), ("new_means", "new_variances"), strict=True):
            w.output(value, name, (1, count, sizes.renewed_nodes, form.head_dim))
        top = next(node for node in w.graph if node.op_type == "TopK")
        w.graph.outputs.extend(top.outputs)
        return ir.Model(w.graph, ir_version=IR_VERSION)

    def _columns(self) -> tuple[tuple[str, int], tuple[str, int]]:
        return ("keys", self.form.head_dim), ("values", self.form.value_dim)

    def step(self, q: Array, keys: Array, values: Array) -> tuple[Array, list[tuple[int, Array, Array]]]:
        """[heads that choose * G, T, Dv], and of each block its first position, scores and units.

        Args:
            q: [all heads, T, D], scaled. keys, values: [KV, T, columns].
        """
        count, outs, choices = q.shape[1], [], []
        done = 0
        while done < count:
            tokens = 1 if count < 16 else self.chunk
            sizes = self.sizes[tokens]
            base = base_of(sizes, self.length)
            size = min(count - done, base + tokens - self.length)
            at = self.length - base
            new = [np.full((1, x.shape[0], tokens, x.shape[2]), 5, np.float32) for x in (q, keys, values)]
            for array, x in zip(new, (q, keys, values), strict=True):
                array[0, :, at : at + size] = x[:, done : done + size]
            group = self.form.group
            chosen = [h * group + g for h in self.heads for g in range(group)]
            feeds = step_inputs(sizes, self.length, size, LOW) | {
                "q": new[0][:, chosen], "new_keys": new[1][:, self.heads], "new_values": new[2][:, self.heads],
                "past_keys": self.keys, "past_values": self.values, "means": self.means, "variances": self.variances,
            }  # fmt: skip
            session = self.sessions[tokens]
            wanted = {v.name for v in session.get_inputs()}
            out, means, variances, scores, units = session.run(None, {k: v for k, v in feeds.items() if k in wanted})
            outs.append(out[0, :, at : at + size])
            choices += [
                (max(base + b * 64, self.length), scores[:, b, 0], units[:, b, 0])
                for b in range(sizes.blocks)
                if base + b * 64 < self.length + size
            ]
            first = first_node(sizes, self.length)
            for kept, renewed in ((self.means, means), (self.variances, variances)):
                kept[:, :, first : first + renewed.shape[2]] = renewed[:, :, : kept.shape[2] - first]
            end = self.length + size
            self.keys[0, :, self.length : end] = keys[:, done : done + size]
            self.values[0, :, self.length : end] = values[:, done : done + size]
            self.length, done = end, done + size
        return np.concatenate(outs, 1), choices


def reference(
    policy: Sparsity, form: Form, q: Array, keys: Array, values: Array, past: int, sinks: Array | None
) -> tuple[Array, list[HeadRoute]]:
    """The operator's for the rows from `past` on of q [heads, n, D], keys and values [KV, n, columns]."""

    def rows(x: Array) -> Array:
        return x.transpose(1, 0, 2).reshape(x.shape[1], -1)

    total, zeros = q.shape[1], np.zeros(q.shape[1], np.int64)
    positions = np.arange(total)
    inputs = [
        rows(q)[past:], rows(keys)[past:], rows(values)[past:], rows(keys)[:past], rows(values)[:past],
        zeros[past:], positions[past:], zeros[:past], positions[:past], None, sinks,
    ]  # fmt: skip
    found: list[HeadRoute] = []
    attributes = {
        "scale": 1.0, "softcap": form.softcap, "sliding_window": 0, "is_causal": 1, "layer": 0,
        "kv_num_heads": form.kv_heads, "q_num_heads": form.kv_heads * form.group,
        "sparsity": policy.layer(0).to_string(), OBSERVER: found.append,
    }  # fmt: skip
    out = attend(inputs, attributes).reshape(total - past, -1, form.value_dim)
    return out.transpose(1, 0, 2), found


SMALL: dict[str, Any] = {"columns": 0, "dense_below": 0, "max_density": 0.6, "top_k": 3}
POLICIES = {
    "small": Sparsity(**SMALL),
    "wide units": Sparsity(columns=0, dense_below=100, top_k=2, unit=32, node=8, local_window=100),
    "nodes are units": Sparsity(columns=0, dense_below=0, top_k=4, unit=16, node=16, rows=8),
    "dense start": Sparsity(columns=0, dense_below=250, top_k=2, unit=16, max_density=0.6),
}
FORMS = {
    "grouped": Form(),
    "alone, sinks": Form(kv_heads=3, group=1, sinks=True),
    "softcap": Form(softcap=3.0, group=2),
    "a dense head": Form(kv_heads=3, group=2, dense=(1,)),
}


def drawn(rng: np.random.Generator, form: Form) -> tuple[Array, Array, Array, Array | None]:
    """Keys with directions that some queries ask for, so that the choice is a clear one."""
    q_heads = form.kv_heads * form.group
    topics = rng.standard_normal((form.kv_heads, CONTEXT // 16, form.head_dim)) * 1.5
    keys = np.repeat(topics, 16, 1) + rng.standard_normal((form.kv_heads, CONTEXT, form.head_dim)) * 0.5
    q = rng.standard_normal((q_heads, CONTEXT, form.head_dim))
    values = rng.standard_normal((form.kv_heads, CONTEXT, form.value_dim))
    sinks = rng.standard_normal(q_heads).astype(np.float32) if form.sinks else None
    return q.astype(np.float32), keys.astype(np.float32), values.astype(np.float32), sinks


def parts(steps: Sequence[int]) -> Iterator[tuple[int, int]]:
    begin = 0
    for size in steps:
        yield begin, begin + size
        begin += size


STEPS = (128, 70, 1, 1, 60, 1, 3, 72, 1, 1, 1, 1)
"""A prompt in chunks, chunks that begin and end inside a block, tokens by themselves."""
CLEAR = 1e-5
"""A choice that was nearer than this to another one may fall otherwise in other sums."""
CLOSE = 1e-4
"""The same in a decoder, where layers add to what differs."""
CLOSE_HALF = 1e-3
"""The same where scores are float16."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("policy", POLICIES)
def test_it_chooses_and_gives_what_the_reference_does(rng: np.random.Generator, policy: str, form: str) -> None:
    shape, rule = FORMS[form], POLICIES[policy]
    if shape.dense:
        heads = tuple(0.0 if h in shape.dense else 1.0 for h in range(shape.kv_heads))
        rule = rule.with_heads((heads,))
    while True:
        q, keys, values, sinks = drawn(rng, shape)
        wanted = [reference(rule, shape, q[:, :e], keys[:, :e], values[:, :e], b, sinks) for b, e in parts(STEPS)]
        if min(choice.route.margin for _, choices in wanted for choice in choices) > CLEAR:
            break
    operator = Operator(rule, shape, sinks, 128)
    compared = 0
    for (begin, end), (out, choices) in zip(parts(STEPS), wanted, strict=True):
        got, found = operator.step(q[:, begin:end], keys[:, begin:end], values[:, begin:end])
        sizes = operator.sizes[1 if end - begin < 16 else 128]
        routes = {choice.head: choice.route for choice in choices}
        for place, head in enumerate(operator.heads):
            assert [f[0] for f in found] == [block.begin for block in routes[head].blocks]
            for (_, scores, units), block in zip(found, routes[head].blocks, strict=True):
                most = sizes.far if sizes.reads_all(block.end) else sizes.chosen
                read = np.sort(units[place][:most][scores[place][:most] >= 0])
                far = sizes.far_end(block.begin) // rule.unit
                np.testing.assert_array_equal(read, block.units[block.units < far])
                compared += len(read) > 0
        rows = [h * shape.group + g for h in operator.heads for g in range(shape.group)]
        np.testing.assert_allclose(got, out[rows], atol=1e-4)
    assert compared > 10


class Wide:
    """A float graph in onnxruntime, with caches of the session's types."""

    def __init__(self, model: HtpDecoder, tokens: int) -> None:
        import onnxruntime

        (part,) = plan_parts(model.layers)
        lowered = lower(model.reader, part, tokens=tokens, cached=CONTEXT, context=CONTEXT)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        written = ir.to_proto(ir.Model(lowered.graph, ir_version=IR_VERSION)).SerializeToString()
        self._session = onnxruntime.InferenceSession(written, options)
        self.get_inputs, self.get_outputs = self._session.get_inputs, self._session.get_outputs

    def run(self, names: None, feeds: Mapping[str, Array]) -> list[Array]:
        wide = {n: x.astype(np.float32) if x.dtype == np.float16 else x for n, x in feeds.items()}
        found: list[Array] = self._session.run(names, wide)
        return found


def sparse_decoder(rng: np.random.Generator, **form: Any) -> tuple[Graph, Graph]:
    """A dense one, and the same with a policy."""
    heads = form.pop("heads", None)
    dense = tiny_decoder(rng, vocabulary=128, context=CONTEXT, **{"q_heads": 4, "kv_heads": 2, **form})
    return dense, with_sparsity(dense, Sparsity(**SMALL, heads=heads))


def wanted(graph: Graph, chunks: Sequence[Sequence[int]]) -> Array:
    """The reference's logits of the last token of each chunk."""
    assert graph.decoder is not None
    session = PackedSession(Executor(graph, keep_weights=True).run, graph.decoder, Limits(1, 128, CONTEXT, 0))
    return rows(session, session.new_state(), chunks)


def clearly_wanted(
    rng: np.random.Generator, graph: Graph, begin: Sequence[Sequence[int]] = (), close: float = CLOSE
) -> tuple[Any, Array]:
    """Random chunks that begin with some, in the sizes of `STEPS`, and their `wanted`; no choice is a near one."""

    def drawn_chunks() -> tuple[list[Sequence[int]], Array]:
        chunks = [*begin, *cut(draw(rng, graph, sum(STEPS)))[len(begin) :]]
        return chunks, wanted(graph, chunks)

    return without_close_choices(drawn_chunks, close)


def rows(session: Any, state: Any, chunks: Sequence[Sequence[int]]) -> Array:
    return np.stack([np.asarray(session.step([Work(state, chunk)])[0]).reshape(-1) for chunk in chunks])


def cut(ids: Sequence[int]) -> list[Sequence[int]]:
    return [ids[b:e] for b, e in parts(STEPS)]


@pytest.mark.parametrize(
    "form", [{}, {"heads": ((0.0, 1.0), (0.0, 0.0))}, {"sinks": True, "softcap": 4.0, "kv_heads": 4}], ids=str
)
def test_float_graphs_of_a_decoder_are_the_reference(rng: np.random.Generator, form: dict[str, Any]) -> None:
    """The session's own part included: chunks, nodes, and what is kept of a state."""
    dense, graph = sparse_decoder(rng, **form)
    model = read_decoder(graph, QnnPrecision("float16", "float16"))
    decoder = model.reader.decoder
    variant = QnnVariant(
        CONTEXT, 128, 128, decoder.hidden, float(model.embed.scale), cache_layers(decoder), "float32", LOW,
        (PartFiles("", "", (0, len(model.layers))),), 43, 73, model.reader.sparsity.to_string(),
    )  # fmt: skip
    assert QnnVariant.from_json(variant.to_json()) == variant
    assert model.embed.weight is not None
    table = rows_of(model.embed.weight, range(128))
    session = session_over(QnnEngine(variant, table, [PartGraphs(Wide(model, 128), Wide(model, 1))]), CONTEXT)
    chunks, expected = clearly_wanted(rng, graph)
    state = session.new_state()
    np.testing.assert_allclose(rows(session, state, chunks[:4]), expected[:4], atol=1e-3)
    kept = session.restore(state.length, session.save(state))
    other = state.fork(150)
    np.testing.assert_allclose(rows(session, kept, chunks[4:]), expected[4:], atol=1e-3)
    back, again = clearly_wanted(rng, graph, [chunks[0], chunks[1][:22]])  # from within a node, and a block
    np.testing.assert_allclose(rows(session, other, back[2:]), again[2:], atol=1e-3)
    assert np.abs(expected - wanted(dense, chunks)).max() > 1e-2  # the policy shows


def divergence(expected: Array, got: Array) -> float:
    """Of half of the rows at most, in nats: where codes of int8 choose another unit than their reference would, one row
    is far off, and says nothing of the others."""
    pairs = zip(expected, got, strict=True)
    return float(np.median([compare(one[None], other[None]).kl_mean for one, other in pairs]))


@needs_qnn
@pytest.mark.parametrize("precision", ["f16", "int8"])
@pytest.mark.sweep(but=("int8",))
def test_the_emulated_htp_reads_by_the_policy(rng: np.random.Generator, tmp_path: Path, precision: str) -> None:
    """Every node is on the HTP: without that nothing is compiled."""
    dense, graph = sparse_decoder(rng)
    asked = options(rng, graph, precision, context=CONTEXT)
    artifact = Qnn(chunk=128).compile(graph, CPU, asked, lambda stage, share: None)
    (said,) = (note for note in artifact.notes if note.startswith("sparse attention"))
    assert f"a token reads {(3 + 4) * 16 + 128} of {CONTEXT} keys in the cache" in said
    session = opened(artifact, tmp_path, asked)
    chunks, expected = clearly_wanted(rng, graph, close=CLOSE_HALF)
    found = divergence(expected, rows(session, session.new_state(), chunks))
    session.close()
    assert found < {"f16": 1e-4, "int8": 3e-4}[precision], found
    assert found < {"f16": 0.1, "int8": 0.5}[precision] * divergence(expected, wanted(dense, chunks))


def test_policies_without_static_shapes_are_refused_with_a_way_out(rng: np.random.Generator) -> None:
    good = Sparsity(**SMALL)
    assert static_refusal(good) == static_refusal(Sparsity.parse("off")) == ""
    for policy, way in ((Sparsity(), "top_k"), (Sparsity(top_k=3), "columns=0"), (replace(good, score="mean"), "rms")):
        assert way in static_refusal(policy)
        graph = with_sparsity(tiny_decoder(rng), policy)
        reasons = [c.reason for c in Qnn().claim(graph, CPU, options(rng, graph, "f16")) if not c.ok]
        assert any(way in reason for reason in reasons)
    graph = with_sparsity(tiny_decoder(rng, window=20), good)
    reasons = [c.reason for c in Qnn().claim(graph, CPU, options(rng, graph, "f16")) if not c.ok]
    assert any("sliding window" in reason for reason in reasons)
    assert unfit(good, 100, 128)
    assert unfit(good, 128, 192)
    assert not unfit(good, 128, 128)
    with pytest.raises(OptionError, match="multiple of 64"):
        Qnn(chunk=64).compile(sparse_decoder(rng)[1], CPU, options(rng, graph, "f16", context=100), lambda s, x: None)


def test_far_units_are_those_that_any_block_needs() -> None:
    """By the rule of the reference, position by position."""
    for policy in POLICIES.values():
        sizes = ChoiceSizes(policy, CONTEXT, 1)
        for end in range(CONTEXT):
            assert sizes.far_read(end) <= sizes.far
        assert any(sizes.far_read(end) == sizes.far for end in range(CONTEXT))
        assert sizes.ranked == (sizes.far > policy.top_k + 64 // policy.unit)


def test_a_dense_context_has_no_word_of_sparse_attention(rng: np.random.Generator) -> None:
    """Apps that know dense attention alone read the first version, and refuse the second."""
    decoder = read_decoder(tiny_decoder(rng), QnnPrecision("float16", "float16")).reader.decoder
    known = CONTEXT, 64, 61, decoder.hidden, 1.0, cache_layers(decoder), "float16", LOW, (), 43, 73
    plain, chosen = QnnVariant(*known), QnnVariant(*known, Sparsity(**SMALL).to_string())
    raw = [json.loads(v.to_json()) for v in (plain, chosen)]
    assert [r["qnn_variant"] for r in raw] == [1, 2]
    assert "sparse" not in raw[0]
    assert raw[1]["sparse"]["heads"] == [list(range(layer.kv_heads)) for layer in decoder.layers]
    assert raw[1]["sparse"]["far"] == raw[1]["sparse"]["chosen"] == 7

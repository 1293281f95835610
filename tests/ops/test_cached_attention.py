"""`transom::CachedAttention`: reference and body against an oracle that processes one token and head at a time.

Draws: float32 sums in another order differ by about 1e-6 of their size; the tolerances are ten times that or more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from transom.graph import Graph
from transom.graph.passes import decompose
from transom.ops import Array, Sample, TensorSpec, find
from transom.ops.cached_attention import SCHEMA, infer, reference
from transom.reference.executor import Executor
from transom.testing.checks.operators import expected
from transom.testing.one_node import NODE, one_node


def oracle(inputs: Sequence[Array | None], attributes: Mapping[str, Any]) -> Array:
    """The oracle: token by token, head by head, key by key, in float64, from the operator's documentation only."""
    q, k, v, past_k, past_v, seq, pos, past_seq, past_pos = (np.asarray(x) for x in inputs[:9])
    bias, sinks = (inputs[i] if len(inputs) > i else None for i in (9, 10))
    q_heads, kv_heads = attributes["q_num_heads"], attributes["kv_num_heads"]
    dim, value_dim = q.shape[1] // q_heads, v.shape[1] // kv_heads
    scale = attributes.get("scale") or 1 / math.sqrt(dim)
    window, cap = attributes.get("sliding_window", 0), attributes.get("softcap", 0.0)
    keys = [(past_k[j], past_v[j], past_seq[j], past_pos[j]) for j in range(len(past_k))]
    keys += [(k[j], v[j], seq[j], pos[j]) for j in range(len(k))]
    out = np.zeros((len(q), q_heads, value_dim))
    for i, head in itertools.product(range(len(q)), range(q_heads)):
        kv = head // (q_heads // kv_heads)
        query = q[i, head * dim : (head + 1) * dim].astype(np.float64)
        scores, values = [], []
        for j, (key, value, key_seq, key_pos) in enumerate(keys):
            if key_seq != seq[i]:
                continue
            if attributes.get("is_causal", 1) and key_pos > pos[i]:
                continue
            if window and pos[i] - key_pos >= window:
                continue
            score = float(query @ key[kv * dim : (kv + 1) * dim].astype(np.float64)) * scale
            if cap:
                score = cap * math.tanh(score / cap)
            if bias is not None:
                score += float(bias[head if len(bias) > 1 else 0, i, j])
            scores.append(score)
            values.append(value[kv * value_dim : (kv + 1) * value_dim].astype(np.float64))
        weights = [math.exp(s) for s in scores]
        total = sum(weights) + (math.exp(float(sinks[head])) if sinks is not None else 0.0)
        for weight, value in zip(weights, values, strict=True):
            out[i, head] += weight / total * value
    return out.reshape(len(q), -1).astype(np.float32)


def call(
    rng: np.random.Generator,
    new: Sequence[int],
    old: Sequence[int],
    *,
    bias: int = 0,
    sinks: bool = False,
    **attributes: Any,
) -> Sample:
    """A random call; `bias`: number of heads of its bias, 0 for none."""
    heads = {"q_num_heads": 6, "kv_num_heads": 3} | attributes
    q_heads, kv_heads, dim, value_dim = heads["q_num_heads"], heads["kv_num_heads"], 8, 4
    names = rng.permutation(40)[: len(new)]
    seq, past_seq = np.repeat(names, new).astype(np.int64), np.repeat(names, old).astype(np.int64)
    pos = np.concatenate([o + np.arange(n, dtype=np.int64) for n, o in zip(new, old, strict=True)])
    past_pos = np.concatenate([np.arange(o, dtype=np.int64) for o in old])
    mix = rng.permutation(len(past_seq))

    def floats(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    t, p = len(seq), len(past_seq)
    inputs: list[Array | None] = [
        floats(t, q_heads * dim), floats(t, kv_heads * dim), floats(t, kv_heads * value_dim),
        floats(p, kv_heads * dim), floats(p, kv_heads * value_dim),
        seq, pos, past_seq[mix], past_pos[mix],
    ]  # fmt: skip
    if bias or sinks:
        inputs.append(floats(bias, t, t + p) if bias else None)
    if sinks:
        inputs.append(floats(q_heads))
    return Sample("call", tuple(inputs), heads, outputs=3)


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 3},
    "window of one": {"sliding_window": 1},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": 0.7},
    "not causal": {"is_causal": 0},
    "not causal, window": {"is_causal": 0, "sliding_window": 3},
    "bias": {"bias": 6},
    "one bias for all heads": {"bias": 1},
    "sinks": {"sinks": True},
    "bias and sinks": {"bias": 6, "sinks": True},
    "all": {"bias": 1, "sinks": True, "softcap": 2.0, "sliding_window": 4, "scale": 0.4},
    "one head": {"q_num_heads": 1, "kv_num_heads": 1},
    "multi-query": {"q_num_heads": 4, "kv_num_heads": 1},
    "multi-head": {"q_num_heads": 4, "kv_num_heads": 4},
}
BATCHES = {
    "ragged": ((1, 5, 1, 3), (7, 0, 2, 4)),
    "first step": ((4, 2), (0, 0)),
    "one token, no past": ((1,), (0,)),
    "decodes": ((1, 1, 1), (3, 9, 1)),
    "chunk on a past": ((6,), (5,)),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("form", FORMS)
def test_reference_agrees_with_the_oracle(form: str, batch: str, rng: np.random.Generator) -> None:
    sample = call(rng, *BATCHES[batch], **FORMS[form])
    out, present_key, present_value = expected(SCHEMA, sample)
    np.testing.assert_allclose(out, oracle(sample.inputs, sample.attributes), rtol=2e-5, atol=2e-6)
    k, v, past_k, past_v = (np.asarray(sample.inputs[i]) for i in (1, 2, 3, 4))
    np.testing.assert_array_equal(present_key, np.concatenate([past_k, k]))
    np.testing.assert_array_equal(present_value, np.concatenate([past_v, v]))


@pytest.mark.parametrize("form", FORMS)
def test_body_agrees_with_the_reference_in_onnx_runtime(form: str, rng: np.random.Generator, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for batch in BATCHES.values():
        sample = call(rng, *batch, **FORMS[form])
        graph, inputs = one_node(SCHEMA, sample)
        graph.save(tmp_path / "graph.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "graph.onnx", options, providers=["CPUExecutionProvider"])
        for got, wanted in zip(session.run(None, inputs), expected(SCHEMA, sample), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
def test_body_agrees_with_the_reference_in_numpy(form: str, rng: np.random.Generator) -> None:
    for batch in BATCHES.values():
        sample = call(rng, *batch, **FORMS[form])
        graph, inputs = one_node(SCHEMA, sample)
        flat = decompose(graph, [NODE])
        assert {n.domain for n in flat.nodes()} == {""}
        flat.check()
        outputs = Executor(flat).run(inputs)
        for i, wanted in enumerate(expected(SCHEMA, sample)):
            np.testing.assert_allclose(outputs[f"y{i}"], wanted, rtol=2e-5, atol=2e-6)


def test_order_of_the_packed_cache_does_not_matter(rng: np.random.Generator) -> None:
    sample = call(rng, (2, 1), (5, 6), sliding_window=4, softcap=3.0)
    mixed = list(sample.inputs)
    order = rng.permutation(11)
    for i in (3, 4, 7, 8):
        mixed[i] = np.asarray(mixed[i])[order]
    attributes = SCHEMA.attributes_with_defaults(sample.attributes)
    np.testing.assert_allclose(reference(mixed, attributes)[0], reference(sample.inputs, attributes)[0], atol=1e-6)


def test_sequences_do_not_see_each_other(rng: np.random.Generator) -> None:
    sample = call(rng, (3, 4), (5, 2))
    attributes = SCHEMA.attributes_with_defaults(sample.attributes)
    before = reference(sample.inputs, attributes)[0]
    changed = [None if x is None else x.copy() for x in sample.inputs]
    seq, past_seq = changed[5], changed[7]
    assert seq is not None
    assert past_seq is not None
    other = seq[-1]
    for i, ids in ((0, seq), (1, seq), (2, seq), (3, past_seq), (4, past_seq)):
        array = changed[i]
        assert array is not None
        array[ids == other] = 1e3
    np.testing.assert_array_equal(reference(changed, attributes)[0][:3], before[:3])


def test_large_scores_do_not_overflow(rng: np.random.Generator) -> None:
    sample = call(rng, (3,), (4,), sinks=True)
    inputs = [x * np.float32(200) if x is not None and i < 2 else x for i, x in enumerate(sample.inputs)]
    graph, _ = one_node(SCHEMA, sample)
    named = {f"x{i}": x for i, x in enumerate(inputs) if x is not None}
    for outputs in (reference(inputs, SCHEMA.attributes_with_defaults(sample.attributes)),
                    list(Executor(decompose(graph, [NODE])).run(named).values())):  # fmt: skip
        assert np.isfinite(outputs[0]).all()


@pytest.mark.parametrize("heads", [(4, 3), (4, 0), (3, 6)])
def test_heads_that_do_not_divide_are_refused(heads: tuple[int, int], rng: np.random.Generator) -> None:
    spec = TensorSpec("float32", ("tokens", 24))
    attributes = SCHEMA.attributes_with_defaults({"q_num_heads": heads[0], "kv_num_heads": heads[1]})
    with pytest.raises(ValueError, match="multiple"):
        infer([spec] * 5, attributes)


def test_unknown_policies_and_attributes_are_refused(rng: np.random.Generator) -> None:
    sample = call(rng, (2,), (1,))
    with pytest.raises(ValueError, match="sparsity"):
        reference(sample.inputs, SCHEMA.attributes_with_defaults({**sample.attributes, "sparsity": "clever"}))
    with pytest.raises(ValueError, match="no attribute windows"):
        SCHEMA.attributes_with_defaults({**sample.attributes, "windows": 3})
    with pytest.raises(ValueError, match="q_num_heads"):
        SCHEMA.attributes_with_defaults({"kv_num_heads": 2})


def test_shape_rule_names_what_is_wrong() -> None:
    good = TensorSpec("float32", ("tokens", 48))
    attributes = SCHEMA.attributes_with_defaults({"q_num_heads": 6, "kv_num_heads": 3})
    assert [s.shape for s in infer([good] * 5, attributes)] == [
        ("tokens", 96), ("present", 48), ("present", 48),
    ]  # fmt: skip
    fixed = [TensorSpec("float32", (n, 48)) for n in (2, 2, 2, 7, 7)]
    assert [s.shape for s in infer(fixed, attributes)] == [(2, 96), (9, 48), (9, 48)]
    with pytest.raises(ValueError, match="query must have rank 2"):
        infer([TensorSpec("float32", (1, "tokens", 48)), good, good, good, good], attributes)
    with pytest.raises(ValueError, match="key has 47 columns"):
        infer([good, TensorSpec("float32", ("tokens", 47)), good, good, good], attributes)
    unknown = TensorSpec("float32", None)
    assert infer([unknown] * 5, attributes)[0].shape == (None, None)


def test_calls_of_one_form_share_a_body_and_others_do_not(rng: np.random.Generator) -> None:
    def identifier(**form: Any) -> Any:
        graph: Graph = one_node(SCHEMA, call(rng, (2,), (1,), **form))[0]
        return next(iter(graph.model.functions))

    assert identifier(layer=0) == identifier(layer=7)
    different = [identifier(**form) for form in FORMS.values()]
    # biases for one head and for all heads differ in shape, but have the same body
    assert len(set(different)) == len(FORMS) - 1


def test_operator_is_found_by_its_domain_only() -> None:
    assert find("transom", "CachedAttention") is SCHEMA
    assert find("", "CachedAttention") is None
    assert find("elsewhere", "CachedAttention") is None

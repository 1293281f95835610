"""ONNX decoders generate: every form is raised to a neutral decoder and computes the same as the file.

Draws: float32 agrees to 2e-5 of the largest logit; a file in float16 to 2e-2, tens of times its rounding.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import add_tokenizer, assert_agrees, reference_session, tiny
from onnx import TensorProto, helper
from onnx_models import (
    CONTEXT,
    DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    VOCABULARY,
    RuntimeOracle,
    Writer,
    cache_values,
    group_query_decoder,
    runtime,
    save,
    value,
)

from transom.contract import Work
from transom.errors import TransomError
from transom.graph import Graph
from transom.graph.raising import CannotRaise, DecoderHints, raise_decoder
from transom.reference.executor import Executor
from transom.sources.base import SourceModel
from transom.sources.onnx import OnnxSource
from transom.sources.resolve import resolve


def draw(rng: np.random.Generator, count: int) -> list[int]:
    return [int(t) for t in rng.integers(0, VOCABULARY, count)]


def opened(path: Path) -> SourceModel:
    source = resolve(path)
    assert isinstance(source, OnnxSource)
    return source.open(path)


def assert_like_file(graph: Graph, path: Path, rng: np.random.Generator, tolerance: float = 2e-5) -> None:
    """A ragged batch, prefill and decode mixed, against onnxruntime running the file."""
    graph.check()
    assert graph.decoder is not None, graph.notes
    assert graph.output_names[0] == "logits"
    assert {n.op_type for n in graph.nodes() if n.domain} == {"CachedAttention"}
    oracle = RuntimeOracle(path)
    sequences = [draw(rng, 19), draw(rng, 11), draw(rng, 1)]
    firsts = [9, 4, 1]
    session = reference_session(graph)
    states = [session.new_state() for _ in sequences]
    first = session.step([Work(s, t[:n], "all") for s, t, n in zip(states, sequences, firsts, strict=True)])
    second = session.step([Work(states[1], sequences[1][4:], "all"), Work(states[0], sequences[0][9:15], "all")])
    third = [session.step([Work(states[0], [t], "last")])[0] for t in sequences[0][15:]]
    got = [np.concatenate([first[0], second[1], np.stack(third)]), np.concatenate([first[1], second[0]]), first[2]]
    for rows, ids in zip(got, sequences, strict=True):
        wanted = oracle.logits(ids, steps=min(3, len(ids) - 1))
        assert np.abs(rows - wanted).max() < tolerance * max(1.0, np.abs(wanted).max())


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"packed": True},
        {"rotary": False},
        {"rotary_interleaved": 1},
        {"position_ids": True, "scale": 0.4},
        {"local_window_size": 4},
        {"softcap": 5.0},
        {"sinks": True},
        {"smooth_softmax": 1, "local_window_size": 3},
    ],
    ids=lambda form: ",".join(map(str, form)) or "plain",
)
def test_group_query_attention_becomes_cached_attention(
    form: dict[str, Any], tmp_path: Path, rng: np.random.Generator
) -> None:
    path = save(group_query_decoder(rng, **form), tmp_path / "model.onnx")
    model = opened(path)
    assert_like_file(model.graph, path, rng)
    assert model.graph.decoder is not None
    cache = model.graph.decoder.layers[0]
    assert (cache.q_heads, cache.kv_heads, cache.head_dim) == (HEADS, KV_HEADS, DIM)
    assert cache.sliding_window == form.get("local_window_size", 0)


def test_the_context_is_the_length_of_the_rotary_tables_where_no_file_says_it(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    model = opened(save(group_query_decoder(rng, position_ids=True), tmp_path / "model.onnx"))
    assert model.graph.decoder is not None
    assert model.graph.decoder.context == CONTEXT
    assert any("context" in note for note in model.notes)


def test_a_half_precision_decoder_computes_in_float32_with_its_weights_as_they_are(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    path = save(group_query_decoder(rng, dtype=np.float16), tmp_path / "model.onnx")
    model = opened(path)
    assert_like_file(model.graph, path, rng, tolerance=2e-2)
    kinds = {str(v.dtype) for v in model.graph.model.graph.initializers.values() if v.const_value.size > 1024}  # type: ignore[union-attr]
    assert kinds == {"FLOAT16"}


def standard_decoder(
    rng: np.random.Generator, *, mask: str = "none", opset: int = 23, sequence: Any = "sequence"
) -> Any:
    """A decoder with ONNX's own `Attention` and its past."""
    w = Writer(rng)
    x = w.op("Gather", w.random(VOCABULARY, HIDDEN, scale=1.0), "input_ids")
    attributes: dict[str, Any] = {"is_causal": 1}
    bias = ""
    if mask == "hidden":
        bias = w.op("ReduceMean", x, w.constant([2]), keepdims=1)
        attributes = {"is_causal": 1}
    for i in range(LAYERS):
        q, k, v = (w.op("MatMul", x, w.random(HIDDEN, n * DIM)) for n in (HEADS, KV_HEADS, KV_HEADS))
        inputs = [q, k, v, bias, f"past_key_values.{i}.key", f"past_key_values.{i}.value"]
        out = w.op("Attention", *inputs, outputs=[f"a{i}", f"present.{i}.key", f"present.{i}.value"],
                   q_num_heads=HEADS, kv_num_heads=KV_HEADS, **attributes)[0]  # fmt: skip
        x = w.op("Add", x, w.op("MatMul", out, w.random(HEADS * DIM, HIDDEN)))
    w.op("MatMul", x, w.random(HIDDEN, VOCABULARY), outputs=["logits"])
    past, present = cache_values()
    ids = [value("input_ids", TensorProto.INT64, ["batch", sequence])]
    return w.model([*ids, *past], [value("logits", shape=["batch", sequence, VOCABULARY]), *present], opset=opset)


@pytest.mark.parametrize("opset", [23, 24])
def test_standard_attention_with_past_becomes_cached_attention(
    opset: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    path = save(standard_decoder(rng, opset=opset), tmp_path / "model.onnx")
    assert_like_file(opened(path).graph, path, rng)


def test_the_branch_with_a_cache_is_taken_out_of_a_merged_decoder(tmp_path: Path, rng: np.random.Generator) -> None:
    plain = standard_decoder(rng)
    names = [o.name for o in plain.graph.output]

    def branch(name: str, first: bool) -> Any:
        """The decoder's nodes under other names; the branch without a cache starts from an empty one."""
        nodes = []
        for node in plain.graph.node:
            copy = helper.make_node(node.op_type, [], [])
            copy.CopyFrom(node)
            copy.name = f"{name}.{node.name}"
            del copy.input[:], copy.output[:]
            own = {o for n in plain.graph.node for o in n.output}
            for i in node.input:
                copy.input.append("" if first and i.startswith("past") else f"{name}.{i}" if i in own else i)
            copy.output.extend(f"{name}.{o}" for o in node.output)
            nodes.append(copy)
        outputs = [value(f"{name}.{o.name}") for o in plain.graph.output]
        for made, o in zip(outputs, plain.graph.output, strict=True):
            made.CopyFrom(o)
            made.name = f"{name}.{o.name}"
        return helper.make_graph(nodes, name, [], outputs)

    w = Writer(rng)
    w.op("If", w.op("Squeeze", "use_cache_branch"), outputs=names, then_branch=branch("cached", False),
         else_branch=branch("first", True))  # fmt: skip
    inputs = [*plain.graph.input, value("use_cache_branch", TensorProto.BOOL, [1])]
    merged = w.model(inputs, list(plain.graph.output), opset=23)
    merged.graph.initializer.extend(plain.graph.initializer)
    graph = opened(save(merged, tmp_path / "decoder_model_merged.onnx")).graph
    assert_like_file(graph, save(plain, tmp_path / "plain.onnx"), rng)


def test_an_attention_with_a_bias_out_of_the_hidden_state_still_runs_but_says_why_it_cannot_generate(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    path = save(standard_decoder(rng, mask="hidden"), tmp_path / "model.onnx")
    model = opened(path)
    assert model.graph.decoder is None
    assert any("cannot generate" in n and "one query" in n for n in model.notes), model.notes
    inputs: dict[str, Any] = {"input_ids": np.asarray([draw(rng, 1)])}
    for i in range(LAYERS):
        for part in ("key", "value"):
            inputs[f"past_key_values.{i}.{part}"] = np.zeros((1, KV_HEADS, 0, DIM), np.float32)
    wanted = runtime(path).run(["logits"], inputs)[0]
    assert np.abs(Executor(model.graph).run(inputs)["logits"] - wanted).max() < 1e-4


# written out by torch ------------------------------------------------------------------------------------------------
def optimum_export(model: Any, path: Path) -> Path:
    """A decoder in Optimum's naming, traced by torch's older exporter as Optimum does."""
    import torch

    from transom.sources.torch_decoder import as_decoder

    parts = as_decoder(model)
    free = {0: "batch", 1: "sequence"}
    axes = {"input_ids": free, "attention_mask": {0: "batch", 1: "total"}, "position_ids": free}
    axes |= {name: {0: "batch", 2: "past"} for name in parts["input_names"][3:]}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            parts["module"].eval(),
            parts["args"],
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=parts["input_names"],
            output_names=parts["output_names"],
            dynamic_axes=axes,
        )
    return path


@pytest.mark.parametrize(("family", "attention"), [("llama", "eager"), ("llama", "sdpa"), ("mistral", "eager")])
def test_attention_written_out_as_optimum_exports_it_becomes_cached_attention(
    family: str, attention: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    checkpoint = tiny(family, tmp_path / "hf", rng)
    checkpoint.model.set_attn_implementation(attention)
    folder = tmp_path / "exported"
    folder.mkdir()
    optimum_export(checkpoint.model, folder / "model.onnx")
    (folder / "config.json").write_text((tmp_path / "hf" / "config.json").read_text())
    add_tokenizer(folder)
    model = opened(folder)
    assert model.graph.decoder is not None, model.notes
    assert model.graph.decoder.family == family
    assert model.graph.decoder.context == 128
    assert model.graph.decoder.layers[0].sliding_window == (5 if family == "mistral" else 0)
    assert model.tokenizer is not None
    assert model.generation.eos_ids == (257,)
    assert_agrees(model.graph, checkpoint.model, rng)
    structural = {n.op_type for n in model.graph.nodes()} & {"Shape", "Range", "Where", "Expand", "Softmax"}
    assert not structural  # the arithmetic on lengths is gone


def test_alibi_is_recognized_and_computed_from_positions(tmp_path: Path, rng: np.random.Generator) -> None:
    import torch
    from checkpoints import randomize
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=48, n_layer=2, n_head=6, attn_implementation="eager")
    bloom = BloomForCausalLM(config).to(torch.float32).eval()
    randomize(bloom, rng)
    path = optimum_export(bloom, tmp_path / "model.onnx")
    model = opened(path)
    assert model.graph.decoder is not None, model.notes
    attention = next(n for n in model.graph.nodes() if n.op_type == "CachedAttention")
    assert len(attention.inputs) == 10
    assert_agrees(model.graph, bloom, rng)


def test_a_graph_that_gives_only_the_last_logits_says_so(rng: np.random.Generator, tmp_path: Path) -> None:
    model = standard_decoder(rng)
    model.graph.node.append(helper.make_node("Gather", ["logits", "last"], ["next_logits"], axis=1))
    model.graph.initializer.append(helper.make_tensor("last", TensorProto.INT64, [1], [-1]))
    model.graph.output[0].CopyFrom(value("next_logits", shape=["batch", 1, VOCABULARY]))
    found = opened(save(model, tmp_path / "model.onnx"))
    assert found.graph.decoder is None
    assert any("last token only" in n for n in found.notes), found.notes


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("unknown input", "speed is unknown"),
        ("no ids", "no input of token ids, only embeddings"),
        ("mask of three", "neither causal nor a sliding window"),
        ("bias", "neither a window nor ALiBi"),
        ("place", "index in the batch"),
    ],
)
def test_what_cannot_be_raised_is_refused_with_the_reason(
    change: str, reason: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    graph = odd_decoder(rng, change)
    with pytest.raises(CannotRaise, match=reason):
        raise_decoder(graph, DecoderHints("odd", CONTEXT))


def odd_decoder(rng: np.random.Generator, change: str) -> Graph:
    import onnx_ir as ir

    from transom.graph.importing import import_model

    w = Writer(rng)
    if change == "no ids":
        x = "inputs_embeds"
    else:
        x = w.op("Gather", w.random(VOCABULARY, HIDDEN, scale=1.0), "input_ids")
    extra: list[Any] = []
    if change == "unknown input":
        extra, x = [value("speed", shape=[1])], w.op("Mul", x, "speed")
    if change == "place":
        tokens = w.op("Squeeze", w.op("Shape", x, start=1, end=2))
        place = w.op("Cast", w.op("Range", w.constant(np.int64(0)), tokens, w.constant(np.int64(1))), to=1)
        x = w.op("Add", x, w.op("Unsqueeze", place, w.constant([0, 2])))
    for i in range(LAYERS):
        q, k, v = (w.op("MatMul", x, w.random(HIDDEN, n * DIM)) for n in (HEADS, KV_HEADS, KV_HEADS))
        tokens = w.op("Squeeze", w.op("Shape", q, start=1, end=2))
        past = w.op("Squeeze", w.op("Shape", f"past_key_values.{i}.key", start=2, end=3))
        total = w.op("Add", past, tokens)
        zero, one = w.constant(np.int64(0)), w.constant(np.int64(1))
        rows = w.op("Unsqueeze", w.op("Range", past, total, one), w.constant([1]))
        columns = w.op("Unsqueeze", w.op("Range", zero, total, one), w.constant([0]))
        distance = w.op("Sub", rows, columns)
        mask = w.op("GreaterOrEqual", distance, zero)
        if change == "mask of three":  # every third token only
            mask = w.op("And", mask, w.op("Equal", w.op("Mod", distance, w.constant(np.int64(3))), zero))
        if change == "bias":
            squared = w.op("Cast", w.op("Mul", distance, distance), to=1)
            mask = w.op(
                "Where", mask, w.op("Mul", squared, w.constant(np.float32(-0.01))), w.constant(np.float32(-np.inf))
            )
        inputs = [q, k, v, mask, f"past_key_values.{i}.key", f"past_key_values.{i}.value"]
        out = w.op("Attention", *inputs, outputs=[f"a{i}", f"present.{i}.key", f"present.{i}.value"],
                   q_num_heads=HEADS, kv_num_heads=KV_HEADS)[0]  # fmt: skip
        x = w.op("Add", x, w.op("MatMul", out, w.random(HEADS * DIM, HIDDEN)))
    w.op("MatMul", x, w.random(HIDDEN, VOCABULARY), outputs=["logits"])
    past_inputs, present = cache_values()
    first = (
        value("inputs_embeds", shape=["batch", "sequence", HIDDEN])
        if change == "no ids"
        else value("input_ids", TensorProto.INT64, ["batch", "sequence"])
    )
    outputs = [value("logits", shape=["batch", "sequence", VOCABULARY]), *present]
    model = w.model([first, *extra, *past_inputs], outputs, opset=24)
    return import_model(ir.from_proto(model), name="odd", weights_hash="")


def test_generation_settings_come_from_the_genai_file(tmp_path: Path, rng: np.random.Generator) -> None:
    save(group_query_decoder(rng), tmp_path / "decoder.onnx")
    save(group_query_decoder(rng), tmp_path / "another.onnx")
    genai = """{"model": {"context_length": 48, "eos_token_id": [257, 3], "decoder": {"filename": "decoder.onnx"}},
                "search": {"do_sample": true, "temperature": 0.6, "top_k": 7}}"""
    (tmp_path / "genai_config.json").write_text(genai)
    add_tokenizer(tmp_path)
    model = opened(tmp_path)
    assert model.graph.decoder is not None
    assert model.graph.decoder.context == 48
    assert model.generation.eos_ids == (3, 257)
    assert (model.generation.temperature, model.generation.top_k, model.generation.sample) == (0.6, 7, True)


def test_a_folder_of_several_graphs_asks_which(tmp_path: Path, rng: np.random.Generator) -> None:
    for name in ("a.onnx", "b.onnx"):
        save(group_query_decoder(rng), tmp_path / name)
    with pytest.raises(TransomError, match=r"2 ONNX files \(a.onnx, b.onnx\)"):
        opened(tmp_path)


def test_equal_files_have_equal_fingerprints_and_changed_weights_another(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    source = OnnxSource()
    model = group_query_decoder(rng)
    a, b = save(model, tmp_path / "a.onnx"), save(model, tmp_path / "b.onnx")
    assert source.fingerprint(a) == source.fingerprint(b)
    raw = bytearray(model.graph.initializer[-1].raw_data)
    raw[0] ^= 1
    model.graph.initializer[-1].raw_data = bytes(raw)
    assert source.fingerprint(save(model, tmp_path / "c.onnx")) != source.fingerprint(a)

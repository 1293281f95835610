"""Compiled contexts on Qualcomm's emulator of the HTP, held to the NumPy reference.

Draws: what each precision costs a random model has no formula: one of eight draws must be within its bounds
(`redraws.one_within`). A wrong layer costs more than a nat.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from qnn_models import CHUNK, CONTEXT, CPU, PHONE, compiled, draw, logits, needs_qnn, opened, options
from redraws import one_within

from transom.contract import Cancelled, SavingSession, Work
from transom.errors import EngineError, UnsupportedError
from transom.graph.weights import Blocked, BlockedArrays, dequantize
from transom.preparation.agreement import Agreement, compare
from transom.preparation.reference_outputs import reference_logits
from transom.programs.onnx_writing import FLOAT, IR_VERSION, OnnxWriter
from transom.programs.reading import Op, Value
from transom.testing.models import tiny_decoder
from transom_mobile_export.qnn import sdk
from transom_mobile_export.qnn.backend import Qnn
from transom_mobile_export.qnn.claims import read_decoder
from transom_mobile_export.qnn.encoding import QuantizedMatrices, add_quantization
from transom_mobile_export.qnn.layout import LARGEST, VARIANT_FILE, QnnVariant
from transom_mobile_export.qnn.lowering import LoweredPart, lower
from transom_mobile_export.qnn.observing import RunningPart, Seen, embedded, observe
from transom_mobile_export.qnn.precision import QnnPrecision
from transom_mobile_export.qnn.probing import EMULATED

pytestmark = needs_qnn

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"q_heads": 4, "kv_heads": 2},
    "gemma": {"q_heads": 16, "kv_heads": 1, "window": 5, "softcap": 8.0, "final_softcap": 6.0, "scale": 0.3},
    "gpt-oss": {"q_heads": 4, "kv_heads": 4, "window": 4, "sinks": True, "linear_bias": True, "rotated": 8},
}
"""Forms that families have, each with what the others lack; 16 rows of one head are what a soft cap gets wrong."""
BOUNDS = {"f16": (1e-4, 0.999, 0.9), "int8": (4e-3, 0.985, 0.8), "int4": (0.06, 0.9, 0.75)}
"""Largest mean divergence in nats, smallest correlation of any position, smallest share of positions with the same best
token: in a model with random weights many tokens are almost equally likely, and rounding decides between them."""


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.sweep(
    but=(
        "llama-int8",
        "gemma-int4",
        "gpt-oss-f16",
    )
)
def test_logits_are_close_to_the_reference(
    rng: np.random.Generator, tmp_path: Path, family: str, precision: str
) -> None:
    """A chunk that is full, one that is short, and tokens by themselves."""
    divergence, correlation, same = BOUNDS[precision]

    def measure(number: int) -> Agreement:
        graph = tiny_decoder(rng, vocabulary=128, **FAMILIES[family])
        asked = options(rng, graph, precision)
        artifact = compiled(graph, asked)
        assert artifact.notes[0].startswith("precision: ")
        session = opened(artifact, tmp_path / str(number), asked)
        ids = draw(rng, graph, 16)
        got = logits(session, [ids[:8], ids[8:13], *([i] for i in ids[13:])])
        session.close()
        return compare(reference_logits(graph, ids), got)

    one_within(measure, lambda a: a.kl_mean < divergence and a.correlation_min > correlation and a.top1 >= same)


def test_a_prompt_of_many_chunks_fills_the_context(rng: np.random.Generator, tmp_path: Path) -> None:
    graph = tiny_decoder(rng, vocabulary=128)
    asked = options(rng, graph, "f16")
    session = opened(compiled(graph, asked), tmp_path, asked)
    ids = draw(rng, graph, CONTEXT)
    state = session.new_state()
    rows = {}
    for start, end in ((0, 8), (8, 16), (16, 21), (21, 29), (29, 30), (30, 31), (31, 32)):
        rows[end - 1] = np.asarray(session.step([Work(state, ids[start:end])])[0])
    np.testing.assert_allclose(np.stack(list(rows.values())), reference_logits(graph, ids)[list(rows)], atol=0.05)
    assert state.length == CONTEXT
    with pytest.raises(ValueError, match="context"):
        session.step([Work(state, [1])])
    session.close()


def test_two_parts_give_what_one_gives(rng: np.random.Generator, tmp_path: Path) -> None:
    def measure(number: int) -> float:
        graph = tiny_decoder(rng, layers=3, window=4)
        asked = options(rng, graph, "int8")
        ids = draw(rng, graph, 12)
        found, variants = [], []
        layers = read_decoder(graph, QnnPrecision("int8", "uint8")).layers
        for name, largest in (("one", LARGEST), ("two", layers[0].bytes + layers[1].bytes)):
            artifact = compiled(graph, asked, largest=largest)
            session = opened(artifact, tmp_path / f"{name} {number}", asked)
            described = artifact.files[VARIANT_FILE]
            assert isinstance(described, bytes)
            variants.append(QnnVariant.from_json(described.decode()))
            found.append(logits(session, [ids[:7], ids[7:11], ids[11:]]))
            if name == "two":
                assert any("2 parts" in note and "layers 0 to 1" in note for note in artifact.notes), artifact.notes
            session.close()
        assert [[part.layers for part in variant.parts] for variant in variants] == [[(0, 3)], [(0, 2), (2, 3)]]
        return float(np.abs(found[0] - found[1]).max() / np.abs(found[0]).max())

    one_within(measure, lambda difference: difference < 0.02)


def test_states_are_forked_cut_saved_and_freed(rng: np.random.Generator, tmp_path: Path) -> None:
    graph = tiny_decoder(rng)
    asked = options(rng, graph, "f16", context=24)
    session = opened(compiled(graph, asked), tmp_path, asked)
    assert isinstance(session, SavingSession)
    ids, other = draw(rng, graph, 12), draw(rng, graph, 3)
    state = session.new_state()
    session.step([Work(state, ids[:8], "none")])
    session.step([Work(state, ids[8:], "none")])
    fork = state.fork(5)
    state.truncate(9)
    again = session.restore(9, session.save(state))
    with pytest.raises(ValueError, match="vocabulary"):
        session.step([Work(state, [1, 10**6])])
    assert [state.length, fork.length, again.length] == [9, 5, 9]
    for one, kept in ((state, 9), (fork, 5), (again, 9)):
        got = np.asarray(session.step([Work(one, other)])[0])
        np.testing.assert_allclose(got, reference_logits(graph, ids[:kept] + other)[-1], atol=0.05)
    state.free()
    state.free()
    with pytest.raises(RuntimeError, match="freed"):
        session.step([Work(state, [1])])
    with pytest.raises(ValueError, match="9 tokens"):
        session.restore(9, {})
    session.close()
    with pytest.raises(RuntimeError, match="closed"):
        session.new_state()


def test_the_files_are_those_that_an_app_reads(rng: np.random.Generator) -> None:
    """Graphs for a phone share their weights: their binary is little larger than that of one graph."""
    graph = tiny_decoder(rng, hidden=256, inner=1024, vocabulary=256, window=5)
    asked = options(rng, graph, "int8")
    phone, emulated = (compiled(graph, asked, device) for device in (PHONE, CPU))
    sizes = [
        {n: p.stat().st_size for n, p in a.files.items() if isinstance(p, Path) and n.endswith(".bin") and "part" in n}
        for a in (phone, emulated)
    ]
    assert list(sizes[0]) == ["part0_prefill_qnn.bin"]
    assert set(sizes[1]) == {"part0_prefill_qnn.bin", "part0_decode_qnn.bin"}
    assert sizes[0]["part0_prefill_qnn.bin"] < 0.7 * sum(sizes[1].values())
    raw = phone.files[VARIANT_FILE]
    assert isinstance(raw, bytes)
    said = json.loads(raw)
    assert {key: said[key] for key in ("qnn_variant", "context", "chunk", "vocabulary", "hidden", "soc_model")} == {
        "qnn_variant": 1, "context": CONTEXT, "chunk": CHUNK, "vocabulary": 256, "hidden": 256, "soc_model": 43,
    }  # fmt: skip
    assert said["embedding"] == {"file": "shared/embedding.bin", "dtype": "float16", "scale": 16.0}
    assert said["layers"][0] == {"kv_heads": 2, "head_dim": 16, "value_dim": 16, "window": 5}
    assert said["cache"] == {"dtype": "uint8"}
    assert said["parts"] == [{"prefill": "part0_prefill.onnx", "decode": "part0_decode.onnx", "layers": [0, 2]}]
    assert QnnVariant.from_json(raw.decode()).to_json() == raw.decode()
    table = phone.files["shared/embedding.bin"]
    assert isinstance(table, Path)
    assert table.stat().st_size == 256 * 256 * 2
    for name, tokens in (("part0_prefill.onnx", CHUNK), ("part0_decode.onnx", 1)):
        path = phone.files[name]
        assert isinstance(path, Path)
        written = onnx.load(path, load_external_data=False)
        assert [node.op_type for node in written.graph.node] == ["EPContext"]
        facts = {fact.key: fact.value for fact in written.metadata_props}
        assert ":73:43:" in facts["ep_compatibility_info.QNNExecutionProvider"]  # what the binary says it is for
        shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in written.graph.input}
        shapes |= {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in written.graph.output}
        assert shapes["hidden"] == [1, tokens, 256]
        assert shapes["positions"] == [1, tokens]
        assert shapes["mask"] == shapes["mask_window"] == [1, 1, tokens, CONTEXT + tokens]
        assert shapes["past_key.1"] == [1, 2, CONTEXT, 16]
        assert shapes["new_value.0"] == [1, 2, tokens, 16]
        assert (shapes["row"], shapes["logits"]) == ([1], [1, 1, 256])
    assert phone.requires["weights"] == "shared"
    from onnxruntime_qnn.build_and_package_info import qnn_version

    assert phone.requires["qnn_sdk"] == qnn_version  # what the binary says is what the package was built with
    assert Qnn().check(phone, PHONE).state == "ok"
    assert Qnn().check(phone, CPU).state == "never"
    assert Qnn().check(emulated, CPU).state == "ok"
    errors = phone.files["errors.json"]
    assert isinstance(errors, bytes)
    assert {"node", "layer", "what", "error"} == set(json.loads(errors)[0])


def test_an_operator_is_never_left_to_the_cpu(tmp_path: Path) -> None:
    """It is named, with the node: a compiled model that runs elsewhere would be slow and say nothing."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale"], ["q"], name="rounding"),  # on the CPU wherever that may be
        helper.make_node("DequantizeLinear", ["q", "scale"], ["r"], name="rounding_back"),
        helper.make_node("Add", ["r", "r"], ["a"], name="fine"),
        helper.make_node("Det", ["a"], ["y"], name="determinant"),
    ]
    saved_model(nodes, [], tmp_path / "model.onnx")
    with pytest.raises(UnsupportedError, match=r"determinant \(Det\)") as caught:
        sdk.compile_context(tmp_path / "model.onnx", tmp_path / "out.onnx", EMULATED)
    assert "fine" not in str(caught.value)
    assert "rounding" not in str(caught.value)


def test_a_full_disk_is_no_fault_of_the_model(tmp_path: Path) -> None:
    """QNN says that it could not write; which precision or backend is asked for has nothing to do with it."""
    saved_model([helper.make_node("Add", ["x", "x"], ["y"])], [4, 4], tmp_path / "model.onnx")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            sdk.compile_context(tmp_path / "model.onnx", tmp_path / "out.onnx", EMULATED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_the_standard_output_is_the_users(tmp_path: Path) -> None:
    """The emulator writes a line of its own there, in front of `transom run --json` say."""
    saved_model([helper.make_node("Add", ["x", "x"], ["y"])], [4, 4], tmp_path / "model.onnx")
    code = (
        "import sys; from pathlib import Path; from transom_mobile_export.qnn import probing, sdk; print('before');"
        "sdk.open_context(Path(sys.argv[1]), probing.EMULATED); print('behind')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "model.onnx"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "before\nbehind\n"
    assert "LIBNATIVE" in done.stderr


def saved_model(nodes: list[onnx.NodeProto], shape: list[int], path: Path) -> None:
    """Of a matrix `x` [4, 4]; gives `y`. There is a `scale`."""
    given, found = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [4, 4]), ("y", shape)))
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [], [0.1])
    graph = helper.make_graph(nodes, "g", [given], [found], [scale])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)])
    model.ir_version = 10
    onnx.save(model, path)


def test_stored_codes_come_out_right_whatever_their_scales_and_zero_points(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    """The HTP computes zero points of 4 bits and negative scales of 8 bits wrong, and says nothing."""
    rows, columns = 48, 64
    x = rng.standard_normal((1, 8, columns)).astype(np.float32)
    write, wanted, ranges = OnnxWriter("products"), {}, {"x": (float(x.min()), float(x.max()))}
    given = write.input("x", FLOAT, x.shape)
    for dtype, zero_points in (("int8", False), ("int4", False), ("int4", True)):
        weight = stored_codes(rng, dtype, rows, columns, zero_points=zero_points)
        precision = QnnPrecision("int8" if dtype == "int8" else "int4", "uint8")
        name = f"{dtype}.{zero_points}"
        op = Op("linear", Value(rows), weight=weight)
        matrix = QuantizedMatrices(precision, {}, tmp_path)(write, op, f"{name}.weight")
        write.output(write("MatMul", given, matrix, dtype=FLOAT), name, (1, 8, rows))
        wanted[name] = x @ dequantize(weight).T
        ranges[name] = float(wanted[name].min()), float(wanted[name].max())
    add_quantization(LoweredPart(write.graph), Seen(ranges, -1.0), ir.DataType.UINT8)
    ir.save(write.model(), tmp_path / "model.onnx")
    made = sdk.compile_context(tmp_path / "model.onnx", tmp_path / "out.onnx", EMULATED)
    del made
    session = sdk.open_context(tmp_path / "out.onnx", EMULATED)
    for name, found in zip(wanted, session.run(list(wanted), {"x": x}), strict=True):
        error = np.linalg.norm(found - wanted[name]) / np.linalg.norm(wanted[name])
        assert error < (0.12 if name == "int4.True" else 0.01), (name, error)


def stored_codes(rng: np.random.Generator, dtype: Any, rows: int, columns: int, *, zero_points: bool) -> Blocked:
    """A matrix in a form that is kept as it is, but for zero points; half of its scales are negative."""
    block, high = (columns, 128) if dtype == "int8" else (32, 8)
    blocks = rows, columns // block
    scales = (rng.uniform(0.5, 1.5, blocks) * np.where(np.arange(rows) % 2, 1, -1)[:, None]).astype(np.float16)
    quants = rng.integers(-high, high, (rows, columns)).astype(np.int8)
    zeros = rng.integers(1, 4, blocks).astype(np.int8) if zero_points else None
    parts = BlockedArrays(quants, scales, None, zeros)
    return Blocked((rows, columns), block, dtype, "float16", lambda: parts, has_zero_points=zero_points)


def test_a_cancelled_compile_leaves_nothing(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    graph = tiny_decoder(rng, layers=1)

    def cancel(stage: str, share: float | None) -> None:
        if stage == "compile":
            raise Cancelled

    with pytest.raises(Cancelled):
        Qnn(chunk=CHUNK).compile(graph, CPU, options(rng, graph, "int8"), cancel)
    assert list(tmp_path.iterdir()) == []


def test_without_texts_random_tokens_are_looked_at_and_said_so(rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng, layers=1)
    artifact = compiled(graph, options(rng, graph, "auto", calibration=()))
    assert any("random tokens" in note for note in artifact.notes)
    assert artifact.notes[0].startswith("precision: int8 weights, uint16 activations")


def test_damaged_files_are_an_error_for_people(rng: np.random.Generator, tmp_path: Path) -> None:
    graph = tiny_decoder(rng, layers=1)
    asked = options(rng, graph, "f16")
    artifact = compiled(graph, asked)
    broken = dict(artifact.files) | {VARIANT_FILE: b'{"qnn_variant": 99}'}
    with pytest.raises(EngineError, match="qnn_variant is 99"):
        opened(type(artifact)(broken, artifact.requires, artifact.notes), tmp_path / "a", asked)
    del broken["part0_decode.onnx"]
    with pytest.raises(EngineError, match="damaged"):
        opened(type(artifact)(broken, artifact.requires, artifact.notes), tmp_path / "b", asked)


def test_a_long_prefill_is_what_its_rounded_graph_says(rng: np.random.Generator, tmp_path: Path) -> None:
    """QNN's compiler gets such graphs wrong without a word where it is asked to try hard."""
    tokens, cached = 128, 64
    graph = tiny_decoder(rng, layers=1, q_heads=4, kv_heads=1, head_dim=32)
    precision = QnnPrecision("int8", "uint8")
    model = read_decoder(graph, precision)
    seen = observe(model, [draw(rng, graph, 100) for _ in range(2)], lambda share: None)
    (part,) = model.layers
    matrices = QuantizedMatrices(precision, seen.squares, tmp_path)
    lowered = lower(model.reader, part, tokens=tokens, cached=cached, context=tokens + cached, matrices=matrices)
    add_quantization(lowered, seen, ir.DataType.UINT8)
    own = np.arange(tokens)
    unseen = np.concatenate([np.ones((tokens, cached), bool), own[:, None] < own], axis=1)
    past = np.zeros((1, 1, cached, 32), np.uint8)
    inputs = {
        "hidden": embedded(model.embed, draw(rng, graph, tokens)), "positions": own[None].astype(np.int32),
        "mask": np.where(unseen, seen.mask_low, 0).astype(np.float32)[None, None],
        "row": np.array([tokens - 1], np.int32), "past_key.0": past, "past_value.0": past,
    }  # fmt: skip
    with RunningPart(lowered) as running:
        wanted = running(inputs)["logits"]
    ir.save(ir.Model(lowered.graph, ir_version=IR_VERSION), tmp_path / "model.onnx")
    made = sdk.compile_context(tmp_path / "model.onnx", tmp_path / "out.onnx", EMULATED)
    del made
    (found,) = sdk.open_context(tmp_path / "out.onnx", EMULATED).run(["logits"], inputs)
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert error < 0.01, error


def test_the_compiler_is_asked_for_its_least_alone(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its most, too, some graphs come out wrong without a word."""
    asked = set()
    session = sdk.session

    def seen(model: Path, chip: Any, settings: Any, provider: Any) -> Any:
        asked.add(provider["htp_graph_finalization_optimization_mode"])
        return session(model, chip, settings, provider)

    monkeypatch.setattr(sdk, "session", seen)
    graph = tiny_decoder(rng, layers=1)
    compiled(graph, options(rng, graph, "int8"))
    assert asked == {"1"}

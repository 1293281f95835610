"""Invalid ONNX files: each gives one clear error with a fix, and nothing outside the model's folder is read.

Draws: float32 sums in another order differ by about 1e-6 of their size; the tolerances are ten times that or more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_models import Writer, save, value

from transom.errors import SourceError, TransomError, UnsupportedError
from transom.reference.executor import Executor
from transom.sources.finite import require_finite_graph
from transom.sources.onnx import OnnxSource
from transom.sources.resolve import resolve


def small(rng: np.random.Generator) -> Any:
    w = Writer(rng)
    w.op("MatMul", "x", w.random(64, 32), outputs=["y"])
    return w.model([value("x", shape=["n", 64])], [value("y", shape=["n", 32])])


def external(rng: np.random.Generator, folder: Path, location: str = "weights.bin") -> Path:
    """A model whose weights lie beside it."""
    path = folder / "model.onnx"
    onnx.save(small(rng), str(path), save_as_external_data=True, location="weights.bin", size_threshold=0)
    if location != "weights.bin":
        model = onnx.load(str(path), load_external_data=False)
        for entry in model.graph.initializer[0].external_data:
            if entry.key == "location":
                entry.value = location
        path.write_bytes(model.SerializeToString())
    return path


def failure(path: Path) -> str:
    with pytest.raises(TransomError) as caught:
        OnnxSource().open(path)
    error = caught.value
    assert error.cause, error
    assert error.fix, error
    assert str(path) in error.cause or "node" in error.cause or "operator" in error.cause
    return str(error)


def test_weights_beside_the_model_are_mapped_not_read(tmp_path: Path, rng: np.random.Generator) -> None:
    import onnx_ir as ir

    model = OnnxSource().open(external(rng, tmp_path))
    (weight,) = [v.const_value for v in model.graph.model.graph.initializers.values()]
    assert isinstance(weight, ir.ExternalTensor)
    assert weight.raw is None  # nothing was mapped yet
    x = rng.standard_normal((3, 64)).astype(np.float32)
    assert Executor(model.graph).run({"x": x})["y"].shape == (3, 32)


@pytest.mark.parametrize(
    "location",
    ["../secret.bin", "a/../../secret.bin", "/etc/hostname", "C:\\secret.bin", "..\\secret.bin", "\\\\host\\share"],
)
def test_weights_outside_the_folder_are_refused(location: str, tmp_path: Path, rng: np.random.Generator) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(64 * 32 * 4))
    folder = tmp_path / "model"
    folder.mkdir()
    text = failure(external(rng, folder, location))
    assert "outside the model's folder" in text


def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(64 * 32 * 4))
    folder = tmp_path / "model"
    folder.mkdir()
    path = external(rng, folder)
    (folder / "weights.bin").unlink()
    (folder / "weights.bin").symlink_to(secret)
    assert "outside the model's folder" in failure(path)


def test_links_as_the_hub_makes_them_are_followed(tmp_path: Path, rng: np.random.Generator) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    external(rng, blobs)
    for name in ("model.onnx", "weights.bin"):
        (snapshot / name).symlink_to(blobs / name)
    model = OnnxSource().open(snapshot / "model.onnx")
    assert model.graph.input_names == ["x"]


def test_missing_weights_are_named(tmp_path: Path, rng: np.random.Generator) -> None:
    path = external(rng, tmp_path)
    (tmp_path / "weights.bin").unlink()
    text = failure(path)
    assert "weights.bin, which is missing" in text


def test_weights_cut_short_are_found_before_anything_runs(tmp_path: Path, rng: np.random.Generator) -> None:
    path = external(rng, tmp_path)
    data = (tmp_path / "weights.bin").read_bytes()
    (tmp_path / "weights.bin").write_bytes(data[:-100])
    assert "cut short" in failure(path)


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    data = save(small(rng), tmp_path / "whole.onnx").read_bytes()
    path = tmp_path / "cut.onnx"
    for share in (0.01, 0.3, 0.9, 0.99, 0.999):
        path.write_bytes(data[: int(len(data) * share)])
        failure(path)
    path.write_bytes(b"")
    assert "empty" in failure(path)


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04" + bytes(99), b"<html>not found</html>", b"\x80\x02}q\x00.", bytes(500)]
)
def test_other_files_named_onnx_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert "ONNX" in failure(path)


Damage = Callable[[Any], None]


def _wrong_bytes(model: Any) -> None:
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]


def _wrong_shape(model: Any) -> None:
    model.graph.initializer[0].dims[0] = 65


def _wrong_type(model: Any) -> None:
    model.graph.initializer[0].data_type = 99


def _nothing_makes_it(model: Any) -> None:
    model.graph.node[0].input[0] = "z"


def _no_output(model: Any) -> None:
    del model.graph.output[:]


def _output_of_nobody(model: Any) -> None:
    model.graph.output[0].name = "q"


def _unknown_domain(model: Any) -> None:
    model.graph.node[0].domain = "com.example"


def _unknown_operator(model: Any) -> None:
    model.graph.node[0].op_type = "MatMall"


def _contrib_without_expansion(model: Any) -> None:
    model.graph.node[0].domain = "com.microsoft"
    model.graph.node[0].op_type = "SparseAttention"


def _contradicting_shapes(model: Any) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 63


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_wrong_bytes, "bytes; its shape"),
        (_wrong_shape, "bytes; its shape"),
        (_wrong_type, "unknown element type 99"),
        (_nothing_makes_it, "reads z, which no node before it produces"),
        (_no_output, "no outputs"),
        (_output_of_nobody, "No node in"),
        (_unknown_domain, "com.example::MatMul"),
        (_unknown_operator, "ai.onnx::MatMall"),
        (_contrib_without_expansion, "com.microsoft::SparseAttention"),
        (_contradicting_shapes, "not valid ONNX"),
    ],
    ids=lambda v: v.__name__.strip("_") if callable(v) else "",
)
def test_damage_inside_the_file_is_named(damage: Damage, words: str, tmp_path: Path, rng: np.random.Generator) -> None:
    model = small(rng)
    damage(model)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises((SourceError, UnsupportedError)) as caught:
        OnnxSource().open(path)
    assert words in caught.value.cause, caught.value
    assert caught.value.fix
    if "::" in words:
        assert "MatMul_2" in caught.value.cause  # the node's name


def test_an_operator_of_the_future_is_named_with_its_opset(tmp_path: Path, rng: np.random.Generator) -> None:
    model = small(rng)
    model.opset_import[0].version = onnx.defs.onnx_opset_version() + 5
    model.graph.node[0].op_type = "MatMulOfTomorrow"
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert "upgrade onnx" in failure(path)


def test_external_data_without_a_location_or_with_a_wrong_place_is_refused(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    path = external(rng, tmp_path)
    model = onnx.load(str(path), load_external_data=False)
    for key, text, words in (
        ("location", "", "does not name"),
        ("offset", "x", "no valid offset"),
        ("offset", "-5", "should be at bytes"),
    ):
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        found = False
        for entry in changed.graph.initializer[0].external_data:
            if entry.key == key:
                entry.value, found = text, True
        if not found:
            changed.graph.initializer[0].external_data.add(key=key, value=text)
        path.write_bytes(changed.SerializeToString())
        assert words in failure(path)


def test_the_data_file_itself_points_to_its_model(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx_data"
    path.write_bytes(bytes(16))
    with pytest.raises(SourceError, match=r"Load the model itself: .*model\.onnx"):
        resolve(path).open(path)


def test_a_function_of_the_model_itself_needs_no_registered_operator(tmp_path: Path, rng: np.random.Generator) -> None:
    body = [helper.make_node("Mul", ["a", "a"], ["s"]), helper.make_node("Sqrt", ["s"], ["b"])]
    function = helper.make_function("com.example", "Magnitude", ["a"], ["b"], body, [helper.make_opsetid("", 21)])
    w = Writer(rng)
    w.op("Magnitude", "x", domain="com.example", outputs=["y"])
    model = w.model([value("x", TensorProto.FLOAT, [5])], [value("y", shape=[5])], functions=[function])
    x = rng.standard_normal(5).astype(np.float32)
    graph = OnnxSource().open(save(model, tmp_path / "model.onnx")).graph
    graph.check()
    assert np.allclose(Executor(graph).run({"x": x})["y"], np.abs(x), atol=1e-6)


def test_linked_weights_are_read_as_the_hub_and_a_hard_link_give_them(tmp_path: Path, rng: np.random.Generator) -> None:
    blobs, snapshot, twice = tmp_path / "blobs", tmp_path / "snapshots" / "main", tmp_path / "twice"
    for folder in (blobs, snapshot, twice):
        folder.mkdir(parents=True)
    external(rng, blobs)
    for name in ("model.onnx", "weights.bin"):
        (snapshot / name).symlink_to(Path("../../blobs") / name)
        (twice / name).hardlink_to(blobs / name)
    x = rng.standard_normal((3, 64)).astype(np.float32)
    want = x @ onnx.numpy_helper.to_array(onnx.load(str(save_inside(blobs, tmp_path))).graph.initializer[0])
    for folder in (snapshot, twice):
        got = Executor(OnnxSource().open(folder / "model.onnx").graph).run({"x": x})["y"]
        assert np.allclose(got, want, rtol=1e-4, atol=1e-4)


def save_inside(folder: Path, where: Path) -> Path:
    """The model once more, its weights read from the file and put into its body."""
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    tensor = model.graph.initializer[0]
    tensor.raw_data = (folder / "weights.bin").read_bytes()[: 64 * 32 * 4]
    del tensor.external_data[:]
    tensor.data_location = TensorProto.DEFAULT
    return save(model, where / "inside.onnx")


@pytest.mark.parametrize(("number", "word"), [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")])
def test_weights_that_are_no_numbers_are_refused(
    number: float, word: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    weights = rng.standard_normal((64, 32)).astype(np.float32)
    weights[tuple(rng.integers(0, 32, 2))] = number
    w = Writer(rng)
    turned = w.op("Transpose", w.constant(weights), perm=[1, 0])
    w.op("MatMul", "x", w.op("Transpose", turned, perm=[1, 0]), outputs=["y"])
    model = w.model([value("x", shape=["n", 64])], [value("y", shape=["n", 32])])
    path = save(model, tmp_path / "model.onnx")
    graph = OnnxSource().open(path).graph
    with pytest.raises(SourceError, match=rf"in {path} has {word} values \(1 of 2048\)"):
        require_finite_graph(graph, path)


def test_infinity_in_a_mask_is_meant(tmp_path: Path, rng: np.random.Generator) -> None:
    w = Writer(rng)
    mask = np.where(np.tri(8, dtype=bool), np.float32(0), np.float32(-np.inf))
    w.op("Softmax", w.op("Add", "x", w.constant(mask)), outputs=["y"])
    model = w.model([value("x", shape=[8, 8])], [value("y", shape=[8, 8])])
    path = save(model, tmp_path / "model.onnx")
    graph = OnnxSource().open(path).graph
    require_finite_graph(graph, path)
    x = rng.standard_normal((8, 8)).astype(np.float32)
    shares = np.exp(x) * np.tri(8)
    np.testing.assert_allclose(Executor(graph).run({"x": x})["y"], shares / shares.sum(-1, keepdims=True), rtol=1e-5)

"""The option `calibration`: filled when a backend compiles, from the user's or default texts; empty on a warm load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_up import MadeUp

import transom
from transom.errors import OptionError
from transom.preparation import calibration_texts, stages


class Watching(MadeUp):
    """Notes the texts that each call is given."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.texts: list[tuple[str, Any]] = []

    def claim(self, graph: Any, device: Any, options: Any) -> Any:
        self.texts.append(("claim", options["calibration"]))
        return super().claim(graph, device, options)

    def compile(self, part: Any, device: Any, options: Any, progress: Any) -> Any:
        self.texts.append(("compile", options["calibration"]))
        return super().compile(part, device, options, progress)

    def load(self, artifact: Any, device: Any, options: Any, scratch: Any) -> Any:
        self.texts.append(("load", options["calibration"]))
        return super().load(artifact, device, options, scratch)


@pytest.fixture
def watching(here: Any) -> Watching:
    backend = Watching("watching")
    here.use(backend)
    return backend


def test_a_backend_sees_passages_when_it_compiles_and_none_when_it_loads(here: Any, watching: Watching) -> None:
    here.load(context=100).close()
    assert [call for call, _ in watching.texts] == ["claim", "compile", "load", "load"]
    seen = dict(watching.texts)
    assert seen["claim"] == seen["compile"]
    assert [len(piece) for piece in seen["compile"]] == [100] * calibration_texts.DEFAULT_PIECES
    assert all(0 <= i < 262 for piece in seen["compile"] for i in piece)
    assert seen["load"] == ()


def test_a_warm_start_tokenizes_nothing(here: Any, watching: Watching, monkeypatch: pytest.MonkeyPatch) -> None:
    here.load(calibration=["my text"]).close()

    def never(*arguments: Any) -> None:
        raise AssertionError("it is compiled already")

    monkeypatch.setattr(stages, "pieces", never)
    here.load(calibration=["my text"]).close()
    assert watching.calls.count("compile") == 1


def test_the_user_s_texts_are_part_of_the_artifact_and_the_others_are_not(
    here: Any, watching: Watching, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    for count, given in ((1, []), (2, ["my text"]), (2, [path]), (3, [path]), (4, [path, "more"]), (4, [])):
        path.write_text("my text" if count == 2 else "another text")
        here.load(calibration=given).close()
        assert watching.calls.count("compile") == count
    seen = [texts for call, texts in watching.texts if call == "compile"]
    assert seen[1] == (tuple(b"my text"),)
    assert seen[3] == (tuple(b"another text"), tuple(b"more"))


def test_an_export_is_calibrated_too(here: Any, watching: Watching, tmp_path: Path) -> None:
    transom.export(here.model, target="cpu", out=tmp_path / "bundle", calibration=["my text"], cache=here.cache)
    assert dict(watching.texts)["compile"] == (tuple(b"my text"),)
    watching.texts.clear()
    here.load(tmp_path / "bundle").close()
    assert dict(watching.texts) == {"load": ()}


def test_a_graph_that_is_no_decoder_has_no_texts(here: Any, watching: Watching, tmp_path: Path) -> None:
    import onnx

    value = lambda name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2])  # noqa: E731
    graph = onnx.helper.make_graph([onnx.helper.make_node("Abs", ["x"], ["y"])], "plain", [value("x")], [value("y")])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), tmp_path / "plain.onnx")
    here.load(tmp_path / "plain.onnx", backend="watching").close()
    assert dict(watching.texts)["compile"] == ()


def test_texts_that_are_none_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="not a list"):
        transom.load(tmp_path / "missing.gguf", calibration="one text")

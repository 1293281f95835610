"""Head calibration: measured effects decide which heads stay dense, and `load` finds the file.

Draws: the numbers are only carried along; what is checked does not depend on them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import byte_llama
import numpy as np
import pytest

import transom
from transom.errors import OptionError, SourceError
from transom.evaluation import head_calibration, head_effects
from transom.evaluation.head_effects import LOOSE, Effect, head_multipliers
from transom.evaluation.passages import NEARBY, NEEDLES, REPEATED, passages
from transom.sparsity import Sparsity

CONTEXT = 2048


def _effects(divergences: list[list[tuple[float, ...]]]) -> list[list[Effect]]:
    return [[Effect(head, 0.2) for head in layer] for layer in divergences]


def test_a_head_that_stands_out_on_any_passage_stays_dense() -> None:
    heads = head_multipliers(_effects([[(1.0, 1.0)] * 30 + [(9.0, 1.0), (1.0, 9.0)]]))
    assert heads == ((1.0,) * 30 + (0.0, 0.0),)


def test_in_a_small_model_a_tenth_is_nothing_special() -> None:
    assert head_multipliers(_effects([[(1.0,), (2.0,)], [(1.0,), (1.5,)]])) == ((1.0, 1.0), (1.0, 1.0))
    assert head_multipliers(_effects([[(1.0,), (40.0,)], [(1.0,), (1.5,)]])) == ((1.0, 0.0), (1.0, 1.0))


def test_a_head_that_matters_nowhere_is_loose() -> None:
    heads = head_multipliers(_effects([[(0.01, 0.02), (1.0, 1.0)] * 10, [(0.01, 0.9), (1.0, 1.0)] * 10]))
    assert heads == ((LOOSE, 1.0) * 10, (1.0, 1.0) * 10)


def test_a_dense_head_does_not_make_the_others_loose() -> None:
    heads = head_multipliers(_effects([[(100.0,)] + [(1.0,)] * 20]))
    assert heads == ((0.0,) + (1.0,) * 20,)


def test_without_any_effect_nothing_is_dense() -> None:
    assert head_multipliers(_effects([[(0.0, 0.0)] * 4])) == ((LOOSE,) * 4,)


@pytest.fixture
def here(tmp_path: Path, rng: np.random.Generator) -> dict[str, Any]:
    """A model, its folder and a cache of its own."""
    path = byte_llama.write_gguf(tmp_path / "tiny.gguf", rng, context=CONTEXT)
    return {"path": path, "device": "cpu", "cache": transom.Cache(tmp_path / "cache")}


def test_passages_are_as_long_as_asked_and_ask_for_what_is_hidden(here: dict[str, Any]) -> None:
    with transom.load(here["path"], device="cpu", cache=here["cache"], verify="off") as model:
        tokenizer = model._loaded.tokenizer
        assert tokenizer is not None
        found = passages(tokenizer, {"a": "some words of a text " * 400, "b": "others " * 900}, 1600)
        assert list(found) == ["a", "b", "recall", "copy nearby", "copy from afar"]
        assert {len(ids) for ids in found.values()} == {1600}
        text = tokenizer.decode(found["recall"])
        for i in range(NEEDLES):
            told, asked = (part.split(".")[0] for part in text.split(f"box {i} is ")[1:])
            assert told == asked
        for name, back in (("copy nearby", NEARBY), ("copy from afar", 800)):
            assert found[name][-REPEATED:] == found[name][-REPEATED - back : 1600 - back]
        with pytest.raises(OptionError, match="The text a has 3 tokens"):
            passages(tokenizer, {"a": "abc"}, 1600)


def test_passages_begin_as_the_tokenizer_begins_a_text(here: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with transom.load(here["path"], device="cpu", cache=here["cache"], verify="off") as model:
        tokenizer = model._loaded.tokenizer
        assert tokenizer is not None
        monkeypatch.setattr(type(tokenizer), "beginning", property(lambda tokenizer: [7]))
        found = passages(tokenizer, {"a": "some words of a text " * 400}, 1600)
        assert {ids[0] for ids in found.values()} == {7}
        assert {len(ids) for ids in found.values()} == {1600}


def test_a_calibration_is_kept_and_found(here: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_effects, "MEASURED", 10.0)  # the attention of random weights is flat
    outcome = head_calibration.calibrate_file(**here)
    target = here["path"].with_name("tiny.transom-sparsity.json")
    assert outcome.where == str(target)
    written = json.loads(target.read_text())
    assert Sparsity.from_dict({"heads": written["heads"]}).heads == outcome.calibrated.heads
    assert "calibrated on documentation, code, recall" in written["about"]
    found = outcome.calibrated
    assert [len(layer) for layer in found.effects] == [byte_llama.KV_HEADS] * byte_llama.LAYERS
    assert all(e.density < 1 and min(e.divergences) > 0 for layer in found.effects for e in layer)
    with transom.load(here["path"], device="cpu", cache=here["cache"], sparsity="balanced") as model:
        assert model.report.sparsity.endswith(f"heads calibrated: {target}")
        assert model._loaded.sparsity.heads == found.heads


def test_an_interrupted_one_goes_on_where_it_was(here: dict[str, Any]) -> None:
    def stop(stage: str, share: float | None) -> None:
        if stage == "calibrate" and share is not None and share > 0.4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        head_calibration.calibrate_file(**here, progress=stop)
    assert not here["path"].with_name("tiny.transom-sparsity.json").exists()
    shares: list[float] = []
    measured: list[Any] = []
    original = head_effects._Measure.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_effects._Measure, "__call__", lambda self, *a: measured.append(a) or original(self, *a))
        head_calibration.calibrate_file(**here, progress=lambda s, x: shares.append(x) if s == "calibrate" else None)
    heads = byte_llama.LAYERS * byte_llama.KV_HEADS
    assert shares == [(i + 1) / heads for i in range(heads)]
    assert len(measured) == heads - 2 + 2  # two were known; before and after


def test_a_folder_that_cannot_be_written_leaves_the_cache(
    here: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(head_calibration, "replace_atomically", refuse)
    outcome = head_calibration.calibrate_file(**here)
    assert outcome.where.startswith("the cache, because")
    with transom.load(here["path"], device="cpu", cache=here["cache"], sparsity="balanced") as model:
        assert model.report.sparsity.endswith("heads calibrated: the cache")
    with pytest.raises(PermissionError):
        head_calibration.calibrate_file(**here, out=here["path"].with_name("x.json"))


def test_what_cannot_be_calibrated_is_refused(here: dict[str, Any], tmp_path: Path, rng: np.random.Generator) -> None:
    with pytest.raises(SourceError, match=r"none\.txt cannot be read"):
        head_calibration.calibrate_file(**here, texts=[tmp_path / "none.txt"])
    (tmp_path / "latin.txt").write_bytes(b"\xe4\xf6")
    with pytest.raises(SourceError, match="not UTF-8"):
        head_calibration.calibrate_file(**here, texts=[tmp_path / "latin.txt"])
    with pytest.raises(OptionError, match="There is no folder"):
        head_calibration.calibrate_file(**here, out=tmp_path / "none" / "x.json")
    short = byte_llama.write_gguf(tmp_path / "short.gguf", rng, context=512)
    with pytest.raises(OptionError, match="needs no calibration"):
        head_calibration.calibrate_file(**(here | {"path": short}))

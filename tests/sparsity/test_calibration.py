"""Calibrated heads: beside the model, in the cache, and those that ship with Transom."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from transom.artifacts import Cache
from transom.errors import OptionError
from transom.preparation import heads
from transom.signature import Decoder, LayerCache
from transom.sparsity import FILE_NAME, PRESETS, Sparsity, beside, shipped
from transom.sparsity.calibration import shape_of

SMOLLM2 = Decoder("llama", 49152, 576, 8192, (LayerCache(9, 3, 64, 64),) * 30)
HEADS = ((1.0, 0.0), (4.0, 4.0))


def write(path: Path, **values: object) -> Path:
    path.write_text(json.dumps({"format": 1, "heads": HEADS, **values}))
    return path


def test_a_file_in_the_models_folder_is_found(tmp_path: Path) -> None:
    assert beside(tmp_path) is None
    path = write(tmp_path / FILE_NAME, about="measured")
    found = beside(tmp_path)
    assert found is not None
    assert (found.heads, found.source) == (HEADS, str(path))


def test_a_file_of_the_models_own_name_comes_first(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.touch()
    assert beside(model) is None
    write(tmp_path / FILE_NAME)
    own = write(tmp_path / f"model.{FILE_NAME}", heads=[[2.0]])
    found = beside(model)
    assert found is not None
    assert (found.heads, found.source) == (((2.0,),), str(own))


def test_a_policy_without_heads_is_no_calibration(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text('{"preset": "safe"}')
    assert beside(tmp_path) is None


def test_a_file_with_an_unknown_key_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / FILE_NAME, hedas=[])
    with pytest.raises(OptionError, match="hedas") as caught:
        beside(tmp_path)
    assert str(tmp_path) in caught.value.cause


# --------------------------------------------------------------------------------------------------------------- cache
def test_the_cache_remembers_heads_by_content(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    assert heads.local(None, cache, "content") is None
    heads.remember(cache, "content", HEADS)
    found = heads.local(None, Cache(tmp_path / "cache"), "content")
    assert found is not None
    assert (found.heads, found.source) == (HEADS, "the cache")
    assert heads.local(None, cache, "other content") is None


def test_a_file_beside_the_model_is_stronger_than_the_cache(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    heads.remember(cache, "content", HEADS)
    write(tmp_path / FILE_NAME, heads=[[3.0]])
    found = heads.local(tmp_path, cache, "content")
    assert found is not None
    assert found.heads == ((3.0,),)


@pytest.mark.parametrize("kept", ["nonsense", {"heads": [[-1]]}, {"heads": None}, {}])
def test_what_the_cache_has_wrong_is_as_good_as_not_there(tmp_path: Path, kept: object) -> None:
    cache = Cache(tmp_path / "cache")
    cache.remember(heads.NOTEBOOK, "content", kept)
    assert heads.local(None, cache, "content") is None


# ------------------------------------------------------------------------------------------------------------- shipped
@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct", "Smollm2 135M 8k Lc100K Mix1 Ep2", "smollm2_135m"])
def test_the_sample_models_table_ships(name: str) -> None:
    found = shipped(SMOLLM2, name)
    assert found is not None
    loose = {(i, h): x for i, layer in enumerate(found.heads) for h, x in enumerate(layer) if x != 1}
    assert loose == {(0, 0): 4, (0, 1): 4, (0, 2): 4, (7, 2): 0, (8, 0): 0, (18, 2): 0}
    policy, source = heads.with_shipped_heads(PRESETS["balanced"], SMOLLM2, name)
    assert policy.heads == found.heads
    assert "SmolLM2-135M" in source


@pytest.mark.parametrize(
    ("decoder", "name"),
    [
        (SMOLLM2, "SmolLM-135M"),
        (SMOLLM2, ""),
        (replace(SMOLLM2, hidden=960), "SmolLM2-135M"),
        (replace(SMOLLM2, layers=SMOLLM2.layers[1:]), "SmolLM2-135M"),
        (replace(SMOLLM2, layers=(LayerCache(9, 3, 64, 64, 128),) * 30), "SmolLM2-135M"),
    ],
)
def test_another_name_or_shape_gets_no_table(decoder: Decoder, name: str) -> None:
    assert shipped(decoder, name) is None
    assert heads.with_shipped_heads(PRESETS["balanced"], decoder, name) == (PRESETS["balanced"], "")


def test_every_shipped_table_fits_the_shape_it_names() -> None:
    import transom.sparsity.calibration as module

    tables = [json.loads(p.read_text()) for p in module._TABLES.glob("*.json")]
    assert tables
    for table in tables:
        heads = Sparsity.from_dict({"heads": table["heads"]}).heads
        assert heads is not None
        assert f", {len(heads)}x" in table["model"]["shape"]
        assert {len(layer) for layer in heads} == {int(table["model"]["shape"].split("/")[1].split("x")[0])}


def test_a_shape_tells_layers_apart() -> None:
    narrow, wide = LayerCache(4, 2, 8, 8), LayerCache(4, 2, 8, 16, 32)
    assert shape_of(Decoder("x", 10, 4, 99, (narrow, narrow))) == "x 10x4, 2x4/2x8"
    assert shape_of(Decoder("x", 10, 4, 99, (narrow, wide))) == "x 10x4, 4/2x8 4/2x8+16w32"


def test_heads_of_the_policy_must_fit_the_model() -> None:
    with pytest.raises(OptionError, match="1 layers, and the model has 30"):
        heads.with_shipped_heads(PRESETS["safe"].with_heads(((1.0,),)), SMOLLM2, "SmolLM2-135M")

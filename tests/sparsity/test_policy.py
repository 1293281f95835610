"""`Sparsity`: what may be said, what is refused and how, and that its text means the same again.

Draws: what is compared must be equal, whatever the numbers are.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transom.errors import OptionError
from transom.signature import Decoder, LayerCache
from transom.sparsity import PRESETS, LayerSparsity, Sparsity

DECODER = Decoder("llama", 100, 32, 512, (LayerCache(4, 2, 8, 8), LayerCache(4, 2, 8, 8)))
CANONICAL = (
    '{"columns":64,"coverage":0.94,"dense_below":1024,"heads":%s,"local_window":64,"max_density":1.0,'
    '"min_density":0.0,"node":8,"rows":16,"score":"rms","top_k":0,"unit":16}'
)


def random_policy(rng: np.random.Generator, *, heads: bool = True) -> Sparsity:
    unit = int(rng.choice([4, 8, 16, 64]))
    table = tuple(tuple(float(h) for h in rng.choice([0.0, 1.0, 1.5, 4.0], 2)) for _ in range(2))
    return Sparsity(
        float(rng.uniform(0.3, 0.99)),
        int(rng.integers(1, 600)),
        int(rng.integers(0, 100)),
        unit // int(rng.choice([1, 2, 4])),
        unit,
        int(rng.choice([1, 4, 8, 16, 64])),
        float(rng.uniform(0, 0.2)),
        float(rng.uniform(0.3, 1)),
        int(rng.integers(0, 3000)),
        int(rng.integers(0, 3)),
        table if heads and rng.random() < 0.7 else None,
        score=str(rng.choice(["rms", "mean"])),
    )


# ------------------------------------------------------------------------------------------------------------- presets
def test_presets_are_found_by_name_and_print_it() -> None:
    assert set(PRESETS) == {"off", "classic", "safe", "balanced", "fast"}
    for name, preset in PRESETS.items():
        assert Sparsity.parse(name) == preset
        assert str(preset) == name
        assert preset.heads is None
    assert Sparsity.parse(None) == PRESETS["off"]
    assert [n for n, p in PRESETS.items() if p.dense] == ["off"]


def test_a_preset_reads_the_more_the_safer_it_is() -> None:
    safe, balanced, fast = (PRESETS[n] for n in ("safe", "balanced", "fast"))
    assert safe.coverage > balanced.coverage > fast.coverage
    assert (safe.rows, fast.rows) == (16, 8)


def test_classic_is_the_textbook_form() -> None:
    classic = PRESETS["classic"]
    assert (classic.local_window, classic.node, classic.unit, classic.columns) == (512, 64, 64, 0)
    assert classic.score == "mean"


@pytest.mark.parametrize("given", [0.9, "0.9", " 0.9 ", {"coverage": 0.9}])
def test_a_coverage_alone_is_the_balanced_policy_with_it(given: Any) -> None:
    policy = Sparsity.parse(given)
    assert policy == replace(PRESETS["balanced"], coverage=0.9)
    assert str(policy) == "balanced with coverage=0.9"


def test_a_mapping_starts_from_the_preset_it_names() -> None:
    assert Sparsity.parse({"preset": "fast", "columns": 32}) == replace(PRESETS["fast"], columns=32)


# ------------------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize("name", ["coverage", "max_density"])
@pytest.mark.parametrize("value", [0, -0.1, 1.01, float("nan"), float("inf"), "0.9", True, None])
def test_a_share_outside_its_range_is_refused(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=name) as caught:
        Sparsity.from_dict({name: value})
    assert "above 0, up to 1" in caught.value.fix


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ({"local_window": 0}, "local_window=0"),
        ({"local_window": 1.5}, "local_window=1.5"),
        ({"columns": -1}, "columns=-1"),
        ({"node": 7}, "node=7 does not divide 64"),
        ({"unit": 128}, "unit=128 does not divide 64"),
        ({"rows": 0}, "rows=0"),
        ({"rows": 24}, "rows=24 does not divide 64"),
        ({"node": 16, "unit": 8}, "node=16 does not divide unit=8"),
        ({"top_k": -1}, "top_k=-1"),
        ({"dense_below": "many"}, "dense_below='many'"),
        ({"min_density": 0.5, "max_density": 0.4}, "min_density=0.5 is above max_density=0.4"),
        ({"score": "max"}, "score='max'"),
        ({"heads": []}, "heads"),
        ({"heads": [1.0]}, "layer 0"),
        ({"heads": [[1.0], [-1.0]]}, "layer 1, head 0"),
        ({"heads": [[float("nan")]]}, "layer 0, head 0"),
        ({"heads": "all"}, "heads is a str"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_by_name(values: dict[str, Any], cause: str) -> None:
    with pytest.raises(OptionError) as caught:
        Sparsity.from_dict(values)
    assert cause in caught.value.cause
    assert caught.value.fix


def test_an_unknown_key_is_told_with_the_nearest() -> None:
    with pytest.raises(OptionError, match="coverge") as caught:
        Sparsity.parse({"coverge": 0.9})
    assert 'Did you mean "coverage"?' in caught.value.fix


@pytest.mark.parametrize("given", ["balancd", "", "nonsense", "{}x", "[1]"])
def test_a_text_that_is_no_policy_is_refused(given: str) -> None:
    with pytest.raises(OptionError):
        Sparsity.parse(given)


def test_a_misspelt_preset_is_told_with_the_nearest() -> None:
    with pytest.raises(OptionError) as caught:
        Sparsity.parse("balancd")
    assert 'Did you mean "balanced"?' in caught.value.fix
    with pytest.raises(OptionError, match="preset"):
        Sparsity.parse({"preset": "quick"})


@pytest.mark.parametrize("given", [True, [0.9], object()])
def test_another_kind_of_value_is_refused(given: Any) -> None:
    with pytest.raises(OptionError, match=type(given).__name__):
        Sparsity.parse(given)


# --------------------------------------------------------------------------------------------------------------- files
def test_a_file_is_a_policy_with_words_for_people(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"format": 1, "about": {"made": "by hand"}, "preset": "safe", "rows": 8}')
    for given in (path, str(path)):
        assert Sparsity.parse(given) == replace(PRESETS["safe"], rows=8)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("{", "is not JSON"),
        ("[1]", "does not contain a JSON object"),
        ('{"format": 2}', "has format 2"),
        ('{"colums": 3}', "unknown key 'colums'"),
        ('{"coverage": 2}', "coverage=2"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_its_name_or_the_key(tmp_path: Path, text: str, cause: str) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(OptionError) as caught:
        Sparsity.parse(path)
    assert cause in caught.value.cause


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="No such file"):
        Sparsity.parse(str(tmp_path / "none.json"))
    path = tmp_path / "bytes.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(OptionError, match="not UTF-8"):
        Sparsity.parse(path)


# ----------------------------------------------------------------------------------------------------- canonical texts
def test_the_canonical_text_is_as_documented() -> None:
    assert PRESETS["off"].to_string() == "dense"
    assert PRESETS["balanced"].to_string() == CANONICAL % "null"
    table = PRESETS["balanced"].with_heads(((4.0, 4.0), (1.0, 0.0)))
    assert table.to_string() == CANONICAL % "[[4.0,4.0],[1.0,0.0]]"
    assert table.layer(0).to_string() == CANONICAL % "[4.0,4.0]"
    assert table.layer(1).to_string() == CANONICAL % "[1.0,0.0]"


def test_text_means_the_same_again(rng: np.random.Generator) -> None:
    for _ in range(50):
        policy = random_policy(rng)
        text = policy.to_string()
        assert Sparsity.from_string(text) == policy
        assert Sparsity.parse(text) == policy
        for layer in range(2):
            view = policy.layer(layer)
            again = LayerSparsity.from_string(view.to_string())
            assert again.to_string() == view.to_string()
            assert [again.coverage(h) for h in range(2)] == [view.coverage(h) for h in range(2)]


def test_equal_views_have_equal_texts_however_they_were_said() -> None:
    balanced = PRESETS["balanced"]
    assert balanced.with_heads(((1.0, 1.0),)).layer(0).to_string() == balanced.layer(0).to_string()
    assert balanced.with_heads(((0.0, 0.0),)).layer(0).to_string() == "dense"
    assert Sparsity(1.0, rows=4).to_string() == "dense"
    assert Sparsity.from_dict({"columns": 64.0, "min_density": 0}) == balanced
    json.loads(balanced.to_string())


@pytest.mark.parametrize("text", ["", "clever", "{}x", "[]", "null", '{"coverage":2}', '{"heads":[-1]}', "[" * 9999])
def test_a_text_that_is_no_view_of_a_layer_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="sparsity policy"):
        LayerSparsity.from_string(text)


# --------------------------------------------------------------------------------------------------------------- heads
def test_a_multiplier_loosens_a_head_and_zero_makes_it_dense() -> None:
    layer = PRESETS["balanced"].with_heads(((1.0, 4.0, 0.0, 100.0),)).layer(0)
    assert [layer.coverage(h) for h in range(4)] == pytest.approx([0.94, 0.76, 1.0, 0.0])
    assert [layer.dense_head(h) for h in range(4)] == [False, False, True, False]
    assert not layer.dense


def test_a_table_of_another_model_is_refused_with_both_numbers() -> None:
    fits = PRESETS["safe"].with_heads(((1.0, 1.0), (0.0, 2.0)))
    assert fits.for_model(DECODER) is fits
    assert PRESETS["safe"].for_model(DECODER) == PRESETS["safe"]
    with pytest.raises(OptionError, match="heads for 3 layers, and the model has 2"):
        PRESETS["safe"].with_heads(((1.0, 1.0),) * 3).for_model(DECODER)
    with pytest.raises(OptionError, match="3 heads for layer 1, and the model has 2"):
        PRESETS["safe"].with_heads(((1.0, 1.0), (1.0,) * 3)).for_model(DECODER)
    with pytest.raises(OptionError, match="heads for 2 layers, and there is a layer 2"):
        fits.layer(2)


def test_heads_of_ones_own_are_kept() -> None:
    mine = PRESETS["safe"].with_heads(((2.0,),))
    assert mine.with_heads(((3.0,),)) is mine
    assert mine.calibrated
    assert not PRESETS["safe"].calibrated


@pytest.mark.parametrize("value", [10**400, float("inf"), float("nan"), "x", True, [[1]], None, -1], ids=range(8))
@pytest.mark.parametrize("key", ["coverage", "rows", "heads"])
def test_a_value_of_another_kind_or_size_is_an_error(key: str, value: object) -> None:
    if key == "heads":
        value = [[value]]
    elif value is None:
        value = {}
    with pytest.raises(OptionError) as caught:
        Sparsity.from_dict({key: value})
    assert key in str(caught.value)
    assert len(str(caught.value)) < 300

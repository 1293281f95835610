"""Loading with a sparsity policy: the policy that runs, its cache key, its calibrated heads and its report.

Draws: a prompt is drawn again until no sparse choice is closer to another one than `CLOSE`; then all rows agree.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up import MadeUp
from redraws import without_close_choices

import transom
from transom.errors import OptionError
from transom.preparation import heads
from transom.sparsity import FILE_NAME, Sparsity

POLICY = Sparsity(0.3, columns=4, dense_below=0, max_density=0.6)
HEADS = ((1.0, 0.0), (4.0, 4.0))
CLOSE = 1e-4
"""Smallest margin of a choice that float32 rounding cannot change: see tests/graph/test_sparse.py."""


def prompt(rng: np.random.Generator, count: int = 400) -> list[int]:
    return [int(t) for t in rng.integers(0, 256, count)]


def clear_prompt(here: Any, rng: np.random.Generator) -> tuple[list[int], Any]:
    """As many tokens as the made-up backend takes in one step, and the reference's logits [tokens, vocabulary]."""
    with here.load(sparsity=POLICY, backend="reference") as model:

        def draw() -> tuple[list[int], Any]:
            tokens = prompt(rng, 200)
            return tokens, model.logits(tokens)

        return without_close_choices(draw, CLOSE)


@pytest.fixture
def own_model(here: Any, tmp_path: Path) -> Path:
    """The tiny model in a folder of the test's own."""
    path = tmp_path / "own" / "tiny.gguf"
    path.parent.mkdir()
    shutil.copy2(here.model, path)
    return path


# ---------------------------------------------------------------------------------------------------------------- loads
def test_nothing_is_sparse_unless_asked_for(here: Any, rng: np.random.Generator) -> None:
    with here.load() as model:
        assert model.report.sparsity == ""
        assert "sparsity" not in str(model.report)
        assert model.generate(prompt(rng), max_new_tokens=2).densities is None


def test_a_policy_runs_and_the_report_says_which(here: Any, rng: np.random.Generator) -> None:
    tokens = prompt(rng)
    with here.load() as dense, here.load(sparsity=POLICY) as model:
        assert not model.report.cache_hit
        assert model.report.sparsity == (
            "balanced with coverage=0.3, columns=4, max_density=0.6, dense_below=0, heads not calibrated"
        )
        assert "sparsity:   balanced with" in str(model.report)
        assert model.report.to_dict()["sparsity"] == model.report.sparsity
        assert np.abs(model.logits(tokens) - dense.logits(tokens)).max() > 1e-3
    with here.load(sparsity="balanced") as model:
        assert model.report.sparsity == "balanced (coverage 0.94), heads not calibrated"


def test_each_policy_is_compiled_once_and_kept_apart(here: Any) -> None:
    for sparsity in ("off", POLICY, "fast"):
        with here.load(sparsity=sparsity) as model:
            assert not model.report.cache_hit
    here.jobs.clear()
    for sparsity in ("off", POLICY, "fast", Sparsity(0.9, rows=8)):
        with here.load(sparsity=sparsity) as model:
            assert model.report.cache_hit
    assert here.jobs == []


def test_a_backend_that_obeys_the_attribute_alone_computes_the_same(here: Any, rng: np.random.Generator) -> None:
    tokens, wanted = clear_prompt(here, rng)
    here.use(MadeUp("plain"))
    with here.load(sparsity=POLICY, backend="plain") as model:
        np.testing.assert_allclose(model.logits(tokens), wanted, rtol=1e-4, atol=1e-4)
        assert model.generate(tokens, max_new_tokens=1).densities is None


def test_a_backend_that_refuses_the_operator_runs_its_body(here: Any, rng: np.random.Generator) -> None:
    tokens, wanted = clear_prompt(here, rng)
    here.use(MadeUp("without", "refuse:CachedAttention"))
    with here.load(sparsity=POLICY, backend="without") as model:
        assert any("2 nodes run in simpler operators" in note for note in model.report.notes)
        np.testing.assert_allclose(model.logits(tokens), wanted, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------- calls
def test_a_call_may_have_a_policy_of_its_own(here: Any, rng: np.random.Generator) -> None:
    tokens = prompt(rng)
    with here.load(sparsity=POLICY) as sparse, here.load() as dense:
        for call in ("logits", "generate"):
            options = {} if call == "logits" else {"max_new_tokens": 3}
            results = [
                getattr(sparse, call)(tokens, **options), getattr(dense, call)(tokens, sparsity=POLICY, **options),
                getattr(dense, call)(tokens, **options), getattr(sparse, call)(tokens, sparsity="off", **options),
            ]  # fmt: skip
            if call == "logits":
                np.testing.assert_array_equal(results[0], results[1])
                np.testing.assert_array_equal(results[2], results[3])
            else:
                np.testing.assert_array_equal(results[0].densities, results[1].densities)
                assert results[2].densities is results[3].densities is None


def test_densities_come_by_layer_and_head(here: Any, rng: np.random.Generator) -> None:
    with here.load(sparsity=POLICY.with_heads(((1.0, 0.0), (1.0, 1.0)))) as model:
        result = model.generate(prompt(rng), max_new_tokens=3)
        assert result.densities.shape == (2, 2)
        assert result.densities[0, 1] == 1
        assert (result.densities.ravel()[[0, 2, 3]] < 1).all()
        assert result.density == pytest.approx(result.densities.mean())
        assert result.to_dict()["densities"] == result.densities.tolist()
        json.dumps(result.to_dict())
        short = model.generate(prompt(rng, 20), max_new_tokens=2)
        assert (short.densities == 1).all()


def test_answers_to_one_prompt_share_the_count(here: Any, rng: np.random.Generator) -> None:
    with here.load(sparsity=POLICY) as model:
        tokens = prompt(rng)
        three = model.generate(tokens, max_new_tokens=2, n=3, temperature=1.0, seed=1)
        assert len(three.choices) == 3
        assert (three.densities > 0).all()
        assert (three.densities < 1).all()
    answer = three.to_dict()
    assert len(answer["densities"]) == 2


def test_chat_and_streams_take_a_policy_too(here: Any) -> None:
    with here.load() as model:
        text = "word " * 70
        assert model.chat(text, max_new_tokens=1, sparsity=POLICY).densities is not None
        stream = model.stream(text, max_new_tokens=1, sparsity=POLICY)
        assert stream.result.densities is not None
        assert model.stream_chat(text, max_new_tokens=1, sparsity="off").result.densities is None


def test_a_backend_that_cannot_change_it_refuses_before_computing(here: Any) -> None:
    here.use(MadeUp("plain"))
    with here.load(backend="plain", sparsity=POLICY) as model:
        model.generate("x", max_new_tokens=1, sparsity=POLICY)  # as it was loaded
        for other in ("off", "fast"):
            with pytest.raises(OptionError, match="plain supports only the policy with which the model was loaded"):
                model.generate("x", max_new_tokens=1, sparsity=other)
            with pytest.raises(OptionError, match="plain"):
                model.logits("x", sparsity=other)


# ---------------------------------------------------------------------------------------------------------------- heads
def test_heads_beside_the_model_are_used_and_named(here: Any, own_model: Path, rng: np.random.Generator) -> None:
    file = own_model.with_name(FILE_NAME)
    file.write_text(json.dumps({"format": 1, "about": "measured", "heads": HEADS}))
    with here.load(own_model, sparsity=POLICY) as model:
        assert model.report.sparsity.endswith(f"heads calibrated: {file}")
        found = model.generate(prompt(rng), max_new_tokens=1).densities
        assert found[0, 1] == 1
        assert (found.ravel()[[0, 2, 3]] < 1).all()
    here.jobs.clear()
    file.write_text(json.dumps({"heads": [[0.0, 0.0], [1.0, 1.0]]}))
    with here.load(own_model, sparsity=POLICY) as model:
        assert here.jobs == ["prepare"]
        assert (model.generate(prompt(rng), max_new_tokens=1).densities[0] == 1).all()


def test_heads_from_the_cache_are_used_for_calls_too(here: Any, own_model: Path, rng: np.random.Generator) -> None:
    from transom.loading.identity import fingerprint_of

    heads.remember(here.cache, fingerprint_of(own_model, here.cache), HEADS)
    with here.load(own_model, sparsity="safe") as model:
        assert model.report.sparsity == "safe (coverage 0.96), heads calibrated: the cache"
    with here.load(own_model) as model:
        assert model.generate(prompt(rng), max_new_tokens=1, sparsity=POLICY).densities[0, 1] == 1


def test_heads_of_the_policy_come_before_all_others(here: Any, own_model: Path) -> None:
    own_model.with_name(FILE_NAME).write_text(json.dumps({"heads": HEADS}))
    with here.load(own_model, sparsity=POLICY.with_heads(((2.0, 2.0), (1.0, 1.0)))) as model:
        assert model.report.sparsity.endswith("heads calibrated: given with the policy")


@pytest.mark.parametrize(
    ("text", "cause"),
    [('{"heads": [[1.0, 1.0]]}', "1 layers, and the model has 2"), ('{"heds": []}', "heds"), ("{", "is not JSON")],
)
def test_a_wrong_file_beside_the_model_is_an_error_where_it_matters(
    here: Any, own_model: Path, text: str, cause: str
) -> None:
    own_model.with_name(FILE_NAME).write_text(text)
    here.load(own_model).close()  # dense: nobody looks at it
    with pytest.raises(OptionError, match=cause):
        here.load(own_model, sparsity="fast")


# -------------------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize("given", ["balancd", 1.5, {"columns": -1}, True])
def test_an_invalid_policy_is_refused_before_anything_is_read(here: Any, given: Any) -> None:
    with pytest.raises(OptionError):
        here.load("no-such.gguf", sparsity=given)
    with here.load() as model, pytest.raises(OptionError):
        model.generate("x", sparsity=given)


def test_a_policy_with_more_layers_than_the_model_is_refused(here: Any) -> None:
    with pytest.raises(OptionError, match="heads for 3 layers, and the model has 2"):
        here.load(sparsity=POLICY.with_heads(((1.0, 1.0),) * 3))
    with here.load() as model, pytest.raises(OptionError, match="heads for 3 layers"):
        model.generate("x", sparsity=POLICY.with_heads(((1.0, 1.0),) * 3))


def test_a_graph_without_attention_refuses_a_policy(here: Any, tmp_path: Path) -> None:
    from transom.graph import GraphBuilder

    b = GraphBuilder("plain")
    b.output(b.op("Neg", b.input("x", "float32", ["n"])), "y", ["n"])
    b.finish(weights_hash="").save(tmp_path / "plain.onnx")
    with pytest.raises(OptionError, match="no attention over a cache"):
        here.load(tmp_path / "plain.onnx", sparsity="fast")


def test_explain_asks_about_the_policy(here: Any) -> None:
    here.use(MadeUp("without", "refuse:CachedAttention"))
    found = transom.explain(here.model, "cpu", sparsity="fast")
    outcomes = {
        a.backend: {n.outcome for n in a.nodes if n.operator == "transom::CachedAttention"} for a in found.answers
    }
    assert outcomes == {"without": {"decomposed"}, "reference": {"runs"}}

"""Verifying a model against another program: agreement and every kind of difference are detected.

Draws: two programs of float32 agree to 1e-6; the changes that must be seen are a thousand times as large.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import reference_session, tiny, write_gguf

from transom.contract import Limits
from transom.errors import MissingExtra, SourceError
from transom.evaluation import verify
from transom.evaluation.verify import TransformersOracle, oracle_for, verify_session
from transom.graph import Graph
from transom.reference.executor import Executor
from transom.sessions import PackedSession
from transom.sources import resolve
from transom.sources.gguf_original import misread_settings
from transom.sources.hf import HfSource


def check(graph: Graph, oracle: Any, seed: int, **options: Any) -> verify.Verification:
    return verify_session(reference_session(graph), oracle, vocabulary=256, context=128, seed=seed, **options)


def test_a_directory_agrees_with_transformers(tmp_path: Path, rng: np.random.Generator, seed: int) -> None:
    tiny("mistral", tmp_path, rng)
    result = check(resolve(tmp_path).open(tmp_path).graph, oracle_for(tmp_path), seed)
    assert result.agrees, str(result)
    assert result.relative < 1e-5
    assert result.decode.positions > 3
    assert result.prefill.top1 == 1.0
    assert "agrees with transformers" in str(result)
    assert result.to_dict()["agrees"] is True


def test_a_gguf_file_is_read_by_transformers_too(tmp_path: Path, rng: np.random.Generator, seed: int) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(tiny("llama", tmp_path / "hf", rng), path)
    result = check(resolve(path).open(path).graph, oracle_for(path), seed)
    assert result.agrees, str(result)


def test_a_file_that_transformers_cannot_read_says_so_plainly(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(tiny("llama", tmp_path / "hf", rng), path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"llama", b"llamo"))
    with pytest.raises(SourceError, match="nothing to compare with") as caught:
        oracle_for(path)
    assert "Hugging Face directory" in caught.value.fix


class Changed:
    """An oracle that is off in one way."""

    name = "a changed model"

    def __init__(self, inner: Any, change: str) -> None:
        self._inner, self._change = inner, change

    def logits(self, ids: Sequence[int]) -> Any:
        rows = np.array(self._inner.logits(ids))
        if self._change == "last token":
            rows[-1] = rows[0]
        elif self._change == "temperature":
            rows *= 1.02
        elif self._change == "nan":
            rows[0, 0] = np.nan
        elif self._change == "one logit":
            rows[3, 7] += 0.5
        return rows


@pytest.mark.parametrize("change", ["last token", "temperature", "one logit"])
def test_a_small_difference_is_seen_and_measured(
    change: str, tmp_path: Path, rng: np.random.Generator, seed: int
) -> None:
    checkpoint = tiny("qwen2", tmp_path, rng)
    oracle = Changed(TransformersOracle.of(checkpoint.model), change)
    result = check(resolve(tmp_path).open(tmp_path).graph, oracle, seed, prompts=2)
    assert not result.agrees
    assert result.relative > 1e-3
    assert "DIFFERS" in str(result)
    if change == "last token":
        assert result.prefill.max_abs < 1e-3 < result.decode.max_abs


def test_values_that_are_not_finite_never_agree(tmp_path: Path, rng: np.random.Generator, seed: int) -> None:
    checkpoint = tiny("llama", tmp_path, rng)
    graph = resolve(tmp_path).open(tmp_path).graph

    def broken(inputs: Any) -> Any:
        outputs = dict(Executor(graph).run(inputs))
        outputs["logits"] = np.full_like(outputs["logits"], np.nan)
        return outputs

    assert graph.decoder is not None
    session = PackedSession(broken, graph.decoder, Limits(8, 512, 512, 0))
    oracle = TransformersOracle.of(checkpoint.model)
    result = verify_session(session, oracle, vocabulary=256, context=128, seed=seed, precision="int4", longest=12)
    assert not result.agrees


def test_one_sequence_at_a_time_and_small_steps_are_enough(tmp_path: Path, rng: np.random.Generator, seed: int) -> None:
    tiny("gemma2", tmp_path, rng)
    graph = resolve(tmp_path).open(tmp_path).graph
    assert graph.decoder is not None
    run = Executor(graph, keep_weights=True).run
    for limits in (Limits(1, 5, 128, 0), Limits(2, 64, 128, 0, (1, 4))):
        session = PackedSession(run, graph.decoder, limits)
        result = verify_session(
            session, oracle_for(tmp_path), vocabulary=256, context=128, seed=seed, prompts=3, longest=20
        )
        assert result.agrees, str(result)


def test_an_onnx_file_is_compared_with_its_own_graph(tmp_path: Path, rng: np.random.Generator, seed: int) -> None:
    from onnx_models import group_query_decoder, save

    path = save(group_query_decoder(rng), tmp_path / "model.onnx")
    oracle = oracle_for(path)
    result = check(resolve(path).open(path).graph, oracle, seed, longest=30)
    assert result.agrees, str(result)
    assert "model.onnx as exported" in oracle.name


def test_without_transformers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"transom\[verify\]"):
        TransformersOracle.read(HfSource().original(tmp_path))


def test_the_reported_seed_repeats_the_prompts(tmp_path: Path, rng: np.random.Generator) -> None:
    checkpoint = tiny("llama", tmp_path, rng)
    oracle = TransformersOracle.of(checkpoint.model)
    graph = resolve(tmp_path).open(tmp_path).graph
    first = verify_session(reference_session(graph), oracle, vocabulary=256, context=128, longest=12)
    again = verify_session(reference_session(graph), oracle, vocabulary=256, context=128, longest=12, seed=first.seed)
    assert first == again


def test_settings_that_transformers_drops_are_reported_instead_of_a_difference(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(tiny("mistral", tmp_path / "hf", rng), path)
    decoder = resolve(path).open(path).graph.decoder
    assert decoder is not None
    oracle = oracle_for(path)
    window = max(layer.sliding_window for layer in decoder.layers)
    assert oracle.misread(decoder) == [f"the sliding window of {window} tokens is left out"]


def test_what_transformers_reads_as_the_file_says_is_no_excuse(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(tiny("llama", tmp_path / "hf", rng), path)
    decoder = resolve(path).open(path).graph.decoder
    assert decoder is not None
    assert oracle_for(path).misread(decoder) == []


def test_every_setting_that_matters_is_compared() -> None:
    stated = {
        "attn_logit_softcapping": 50.0,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.key_length": 64,
        "rope.freq_base": 1e6,
        "rope.scaling.type": "linear",
    }
    metadata = {"general.architecture": "a", **{f"a.{k}": v for k, v in stated.items()}}
    config = {"rms_norm_eps": 1e-6, "head_dim": 64, "query_pre_attn_scalar": 256, "sliding_window": 9}
    rope = {"rope_theta": 1e4, "rope_type": "default"}
    found = "; ".join(misread_settings(metadata, {**config, "rope_parameters": rope}, [0, 0]))
    for words in ("soft cap of attention", "epsilon", "scale of attention", "base of", "scaling", "window is off"):
        assert words in found
    assert "size of a head" not in found


@pytest.mark.parametrize("error", [AssertionError("Padding_idx"), IndexError(), ZeroDivisionError("x")])
def test_whatever_fails_inside_transformers_is_one_sentence(
    error: Exception, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(SourceError, match=r"transformers .* cannot read"):
        TransformersOracle.read(HfSource().original(tmp_path))

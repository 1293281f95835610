"""ONNX Runtime GenAI takes the folder as it is, and says what Transom's own session says.

Draws: one engine runs the same graph twice; greedy tokens are the same but for ties nearer than the rounding of
float32.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import pytest
from models import sample_model
from onnx_making import Made, app_files, genai_greedy, genai_logits, greedy, logits, made
from parted import parted, reference

from transom.preparation.agreement import compare
from transom.sources import resolve
from transom.testing.models import tiny_decoder
from transom.text.defaults import GenerationDefaults
from transom.text.to_hf import hf_files

FORMS: dict[str, dict[str, Any]] = {
    "exact": {},
    "windows": {"window": 5, "softcap": 4.0, "final_softcap": 6.0},
    "sinks": {"sinks": True, "linear_bias": True},
    "rotated_before": {"head_dim": 24, "window": 7},
    "stored": {"weights": "uint4_minimums"},
    "int4": {},
    "f16": {},
}
CHUNK = 16
"""Of prompts, in place of the 512 that these are too short for."""
PAD, END, FIRST = 0, 3, 4
"""Ids. Prompts here have those from `FIRST` on: GenAI takes a padding token at their end for filling."""


def opened(rng: np.random.Generator, form: str, folder: Path) -> tuple[Made, og.Model]:
    graph = tiny_decoder(rng, **FORMS[form])
    precision = {"stored": "auto", "int4": "int4", "f16": "f16"}.get(form, "exact")
    it = made(graph, folder, precision=precision)
    config = app_files(graph, it, GenerationDefaults(eos_ids=(END,), pad_id=PAD))["genai_config.json"]
    (folder / "genai_config.json").write_bytes(config)
    return it, og.Model(str(folder))


def prompts(rng: np.random.Generator, lengths: list[int]) -> list[list[int]]:
    return [[FIRST + token for token in part] for part in parted(rng, 61 - FIRST, lengths)]


@pytest.mark.parametrize("form", FORMS)
def test_genai_and_the_session_compute_the_same(form: str, rng: np.random.Generator, tmp_path: Path) -> None:
    it, model = opened(rng, form, tmp_path)
    parts = prompts(rng, [40, 1, 1, 1, 5, 1])
    ends = np.cumsum([len(part) for part in parts]) - 1
    wanted = logits(it.session, parts)[ends]
    assert np.abs(np.diff(wanted, axis=0)).max() > 0.1  # each of them is another one
    size = np.abs(wanted).max()
    for search in ({}, {"past_present_share_buffer": False}):
        assert np.abs(genai_logits(model, parts, **search) - wanted).max() < 1e-5 * size
    in_pieces = genai_logits(model, parts, chunk_size=CHUNK)
    assert np.abs(in_pieces - wanted).max() < (1e-5 if form not in ("stored", "int4", "f16") else 0.1) * size
    assert genai_greedy(model, parts[0], 12) == greedy(it.session, parts[0], 12, (END,))


@pytest.mark.parametrize("form", ["exact", "windows", "rotated_before"])
def test_prompts_of_a_batch_are_filled_up_behind(form: str, rng: np.random.Generator, tmp_path: Path) -> None:
    it, model = opened(rng, form, tmp_path)
    long, short = prompts(rng, [20, 9])
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=21, batch_size=2)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([long, short + [PAD] * 11], np.int32))
    for got, prompt in zip(np.asarray(generator.get_logits())[:, -1], (long, short), strict=True):
        assert np.abs(got - logits(it.session, [prompt])[-1]).max() < 1e-4


def test_a_token_that_ends_the_answer_is_not_appended(rng: np.random.Generator, tmp_path: Path) -> None:
    """The Kotlin lines of the README have only the sequence to read, and would give the token before it twice."""
    graph = tiny_decoder(rng, layers=1)
    it = made(graph, tmp_path, precision="exact")
    (prompt,) = prompts(rng, [9])
    answer = greedy(it.session, prompt, 12)
    end = answer[-1]
    texts = {"tokenizer.json": b"{}"}
    files = app_files(graph, it, GenerationDefaults(eos_ids=(end,), pad_id=PAD), texts)
    (tmp_path / "genai_config.json").write_bytes(files["genai_config.json"])
    model = og.Model(str(tmp_path))
    generator = og.Generator(model, og.GeneratorParams(model))
    generator.append_tokens(prompt)
    found = []
    while not generator.is_done():
        length = generator.token_count()
        generator.generate_next_token()
        if generator.token_count() > length:
            found.append(int(generator.get_sequence(0)[-1]))
    assert found == answer[: answer.index(end)]
    assert int(generator.get_next_tokens()[0]) == end
    assert "if (generator.tokenCount() > length)" in files["README.md"].decode()


# ------------------------------------------------------------------------------------------------------ the real model


@pytest.fixture(scope="module")
def source() -> Any:
    path = sample_model()
    return resolve(path).open(path)


@pytest.fixture(scope="module")
def bundle(source: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """SmolLM2-135M with all that an app needs."""
    folder = tmp_path_factory.mktemp("smollm2") / "bundle"
    it = made(source.graph, folder, context=2048)
    texts = hf_files(source.tokenizer, source.chat_template, source.generation)
    for name, content in {**texts, **app_files(source.graph, it, source.generation, texts)}.items():
        (folder / name).write_bytes(content)
    return it


@pytest.mark.sweep  # a real model
def test_the_real_model_answers_alike(source: Any, bundle: Made) -> None:
    model = og.Model(str(bundle.folder))
    tokenizer = og.Tokenizer(model)
    messages = [{"role": "user", "content": "Why is the sky blue? Überlege (2×3) 🌌"}]
    prompt = tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
    assert prompt == source.chat_template.render(messages, add_generation_prompt=True)
    ids = [int(token) for token in tokenizer.encode(prompt)]
    assert ids == source.tokenizer.encode(prompt, add_special=False)
    answer = greedy(bundle.session, ids, 40, source.generation.eos_ids)
    assert genai_greedy(model, ids, 40) == answer
    assert tokenizer.decode(answer) == source.tokenizer.decode(answer)


@pytest.mark.sweep  # a real model
def test_the_real_model_is_near_the_reference(source: Any, bundle: Made) -> None:
    """Its 4-bit blocks with minimums and its 8-bit vocabulary are as stored; inputs of products are rounded."""
    ids = source.tokenizer.encode("The capital of France is Paris, and two plus two is four. Water boils at")
    near = compare(reference(source.graph, [ids]), logits(bundle.session, [ids]))
    assert near.kl_mean < 0.02, near
    assert near.correlation_min > 0.99, near
    assert bundle.artifact.notes[0].startswith("precision: int4 and int8 weights")
    assert len(bundle.artifact.notes) == 1  # nothing was rounded anew
    assert bundle.files["model.onnx.data"].stat().st_size < 115e6


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.sweep  # a real model
def test_the_lines_in_its_readme_run(chat: bool, source: Any, bundle: Made) -> None:
    texts = hf_files(source.tokenizer, source.chat_template if chat else None, source.generation)
    text = app_files(source.graph, bundle, source.generation, texts)["README.md"].decode()
    assert text.startswith("## ")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    assert "max_length=1024" in code[1]
    lines = code[1].replace("max_length=1024", f"max_length={70 if chat else 20}, do_sample=False")
    done = subprocess.run(
        [sys.executable, "-c", lines], cwd=bundle.folder.parent, capture_output=True, text=True, check=True
    )
    assert "The sky is" in done.stdout
    for language in ("kotlin", "swift", "csharp", "cpp"):
        assert f"```{language}\n" in text
    assert "$" not in text

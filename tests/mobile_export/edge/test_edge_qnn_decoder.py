"""The variant `qnn` in the runner: what it does outside the graphs, with graphs that are not compiled, on the CPU.

Masks, windows, chunks of a prompt, rows of the embedding, and the cache are right where the tokens are those of NumPy,
which computes the whole text at once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bundles import variant, write_bundle
from edge_models import Tiny, greedy, qnn_files, reference, tiny

Run = Callable[..., Any]
SCALE = 1.5
FOLDER = "qnn-snapdragon-8-gen-2"


def make(folder: Path, model: Tiny, kind: str = "float32", *, chunk: int = 4, parts: Any = ((0, 1), (1, 2))) -> None:
    inside = qnn_files(model, chunk=chunk, parts=parts, kind=kind, scale=SCALE)
    places = {name: name if name.startswith("shared/") else f"{FOLDER}/{name}" for name in inside}
    prompt = [1, 2, 3, 4, 5, 6, 7]
    best = [int(token) for token in np.argmax(reference(model, prompt, kind, SCALE), -1)]
    write_bundle(
        folder,
        [variant(FOLDER, "qnn", places, requires={"soc_model": "43", "htp_arch": "73"}, context=model.context)],
        {places[name]: content for name, content in inside.items()},
        tokens=prompt,
        best=best,
    )


def tokens(edge: Run, folder: Path, prompt: list[int], count: int) -> list[int]:
    words = ("--variant", FOLDER, "--qnn-on-cpu", "--ids", ",".join(map(str, prompt)), "--print-ids")
    said = edge(folder, *words, "--max-tokens", str(count))
    assert said.returncode == 0, said.stderr
    return [int(token) for token in said.stdout.split(",")]


@pytest.mark.parametrize("kind", ["float32", "float16", "uint8"])
@pytest.mark.parametrize("windows", [(0, 0), (5, 0), (3, 3)], ids=["all seen", "one window", "windows only"])
def test_tokens_are_the_references(
    edge: Run, tmp_path: Path, rng: np.random.Generator, kind: str, windows: tuple[int, ...]
) -> None:
    model = tiny(rng, windows=windows)
    make(tmp_path, model, kind)
    prompt = [int(token) for token in rng.integers(model.vocabulary, size=int(rng.integers(9, 13)))]
    wanted = greedy(lambda ids: reference(model, ids, kind, SCALE), prompt, 20)
    assert tokens(edge, tmp_path, prompt, 20) == wanted


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8])
def test_prompts_of_any_length(edge: Run, tmp_path: Path, rng: np.random.Generator, length: int) -> None:
    """Shorter than a chunk, as long as one, one token more, and two full ones."""
    model = tiny(rng, windows=(0, 6))
    make(tmp_path, model)
    prompt = [int(token) for token in rng.integers(model.vocabulary, size=length)]
    wanted = greedy(lambda ids: reference(model, ids, scale=SCALE), prompt, 8)
    assert tokens(edge, tmp_path, prompt, 8) == wanted


def test_one_part_gives_what_two_give(edge: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    model = tiny(rng)
    make(tmp_path / "one", model, parts=((0, 2),), chunk=8)
    make(tmp_path / "two", model)
    prompt = [int(token) for token in rng.integers(model.vocabulary, size=11)]
    assert tokens(edge, tmp_path / "one", prompt, 15) == tokens(edge, tmp_path / "two", prompt, 15)


def test_the_context_is_filled_to_its_end(edge: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    model = tiny(rng, context=16, windows=(0, 4))
    make(tmp_path, model)
    prompt = [int(token) for token in rng.integers(model.vocabulary, size=11)]
    assert tokens(edge, tmp_path, prompt, 99) == greedy(lambda ids: reference(model, ids, scale=SCALE), prompt, 5)


def test_the_reference_is_compared_with(edge: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    make(tmp_path, tiny(rng), "uint8")
    said = edge(tmp_path, "--variant", FOLDER, "--qnn-on-cpu", "--verify")
    assert said.stdout == f"{FOLDER}: 7 of 7 most likely tokens are the reference's\n"


def test_without_qnn_it_says_what_is_missing(edge: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    make(tmp_path, tiny(rng))
    said = edge(tmp_path, "--variant", FOLDER, "--ids", "1", "--print-ids")
    assert said.returncode == 2
    assert "This ONNX Runtime has no QNN" in said.stderr
    assert "onnxruntime-android-qnn" in said.stderr
    said = edge(tmp_path, "--ids", "1", "--print-ids")
    assert said.returncode == 2
    assert "No variant of the bundle" in said.stderr


@pytest.mark.parametrize("name", ["embedding.bin", "qnn.json"])
def test_files_that_were_cut(edge: Run, tmp_path: Path, rng: np.random.Generator, name: str) -> None:
    make(tmp_path, tiny(rng))
    path = next(tmp_path.rglob(name))
    path.write_bytes(path.read_bytes()[:-2])
    said = edge(tmp_path, "--variant", FOLDER, "--qnn-on-cpu", "--ids", "1", "--print-ids")
    assert said.returncode == 2
    assert str(path) in said.stderr


def test_a_token_outside_the_vocabulary(edge: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    make(tmp_path, tiny(rng))
    said = edge(tmp_path, "--variant", FOLDER, "--qnn-on-cpu", "--ids", "96", "--print-ids")
    assert said.returncode == 2
    assert "The token id 96 is not in the vocabulary of 96" in said.stderr

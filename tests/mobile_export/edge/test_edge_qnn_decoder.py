"""The variant `qnn` in the runner: what it does outside the graphs, with graphs that are not compiled, on the CPU.

Masks, windows, chunks of a prompt, rows of the embedding, and the cache are right where the tokens are those of NumPy,
which computes the whole text at once.

Draws: `clear_answer` draws models again until no greedy token depends on rounding.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from edge_bundles import variant, write_bundle
from edge_models import CHECKED, Tiny, clear_answer, qnn_files, reference, tiny, verified
from onnx import helper, numpy_helper

Run = Callable[..., Any]
SCALE = 1.5
FOLDER = "qnn-snapdragon-8-gen-2"


def make(folder: Path, model: Tiny, kind: str = "float32", *, chunk: int = 4, parts: Any = ((0, 1), (1, 2))) -> None:
    inside = qnn_files(model, chunk=chunk, parts=parts, kind=kind, scale=SCALE)
    places = {name: name if name.startswith("shared/") else f"{FOLDER}/{name}" for name in inside}
    prompt = list(CHECKED)
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
def test_greedy_tokens_agree_with_numpy(
    edge: Run, tmp_path: Path, rng: np.random.Generator, kind: str, windows: tuple[int, ...]
) -> None:
    length = int(rng.integers(9, 13))
    model, prompt, wanted = clear_answer(rng, length, 20, kind=kind, scale=SCALE, windows=windows)
    make(tmp_path, model, kind)
    assert tokens(edge, tmp_path, prompt, 20) == wanted


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8])
def test_a_prompt_may_have_any_length(edge: Run, tmp_path: Path, rng: np.random.Generator, length: int) -> None:
    """Shorter than a chunk, as long as one, one token more, and two full ones."""
    model, prompt, wanted = clear_answer(rng, length, 8, scale=SCALE, windows=(0, 6))
    make(tmp_path, model)
    assert tokens(edge, tmp_path, prompt, 8) == wanted


def test_one_part_gives_what_two_give(edge: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    model, prompt, _ = clear_answer(rng, 11, 15, scale=SCALE)
    make(tmp_path / "one", model, parts=((0, 2),), chunk=8)
    make(tmp_path / "two", model)
    assert tokens(edge, tmp_path / "one", prompt, 15) == tokens(edge, tmp_path / "two", prompt, 15)


def test_the_context_is_filled_to_its_end(edge: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    model, prompt, wanted = clear_answer(rng, 11, 5, scale=SCALE, context=16, windows=(0, 4))
    make(tmp_path, model)
    assert tokens(edge, tmp_path, prompt, 99) == wanted


def test_verify_compares_with_the_bundles_reference(edge: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    make(tmp_path, verified(rng, "uint8", SCALE), "uint8")
    said = edge(tmp_path, "--variant", FOLDER, "--qnn-on-cpu", "--verify")
    assert said.stdout == f"{FOLDER}: 7 of 7 most likely tokens match the reference\n"


def test_an_onnxruntime_without_qnn_is_reported(edge: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    make(tmp_path, tiny(rng))
    said = edge(tmp_path, "--variant", FOLDER, "--ids", "1", "--print-ids")
    assert said.returncode == 2
    assert "This ONNX Runtime has no QNN" in said.stderr
    assert "--qnn-provider" in said.stderr
    said = edge(tmp_path, "--ids", "1", "--print-ids")
    assert said.returncode == 2
    assert "No variant of the bundle" in said.stderr


@pytest.mark.parametrize("name", ["embedding.bin", "qnn.json"])
def test_truncated_files_are_refused(edge: Run, tmp_path: Path, rng: np.random.Generator, name: str) -> None:
    make(tmp_path, tiny(rng))
    path = next(tmp_path.rglob(name))
    path.write_bytes(path.read_bytes()[:-2])
    said = edge(tmp_path, "--variant", FOLDER, "--qnn-on-cpu", "--ids", "1", "--print-ids")
    assert said.returncode == 2
    assert str(path) in said.stderr


_HUGE = (0, -1, 1.5, 1e300, 1 << 31, (1 << 33) + 5, 1 << 62, (1 << 64) - 1, "4", None)
"""Numbers that are no sizes, or whose products wrap."""


@pytest.mark.parametrize(
    "path",
    [
        ("qnn_variant",), ("context",), ("chunk",), ("vocabulary",), ("hidden",), ("layers", 1, "kv_heads"),
        ("layers", 0, "head_dim"), ("layers", 0, "value_dim"), ("layers", 1, "window"),
    ],
    ids=str,
)  # fmt: skip
def test_sizes_that_are_impossible_are_refused(
    edge: Run, tmp_path: Path, rng: np.random.Generator, path: tuple[Any, ...]
) -> None:
    make(tmp_path, tiny(rng))
    file = next(tmp_path.rglob("qnn.json"))
    whole = file.read_text()
    allowed = {("layers", 1, "window"): (0, 1 << 31, (1 << 33) + 5, 1 << 62)}.get(path, ())
    for value in rng.permutation(np.array(_HUGE, object))[:5]:
        data = inner = json.loads(whole)
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        file.write_text(json.dumps(data))
        said = edge(tmp_path, "--variant", FOLDER, "--qnn-on-cpu", "--ids", "1,2", "--print-ids", "--max-tokens", "1")
        assert said.returncode == (0 if value in allowed else 2), value
        assert said.stderr.count("\n") == (0 if value in allowed else 1), value


@pytest.mark.parametrize("kind", ["cache", "embedding"])
def test_types_that_do_not_fit_the_graph_are_refused(
    edge: Run, tmp_path: Path, rng: np.random.Generator, kind: str
) -> None:
    """Codes in the embedding would be read behind its end; a cache of another type than the graph's is refused."""
    make(tmp_path, tiny(rng))
    file = next(tmp_path.rglob("qnn.json"))
    data = json.loads(file.read_text())
    data[kind]["dtype"] = "uint8"
    file.write_text(json.dumps(data))
    if kind == "embedding":
        data = next(tmp_path.rglob("embedding.bin"))
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    said = edge(tmp_path, "--variant", FOLDER, "--qnn-on-cpu", "--ids", "95,95", "--print-ids", "--max-tokens", "1")
    assert said.returncode == 2


def test_a_graph_with_too_few_logits_is_refused(edge: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    """They are not read behind their end."""
    make(tmp_path, tiny(rng))
    path = tmp_path / FOLDER / "part1_prefill.onnx"
    model = onnx.load(path)
    (last,) = (node for node in model.graph.node if "logits" in node.output)
    last.output[:] = ["whole"]
    model.graph.initializer.append(numpy_helper.from_array(np.arange(3), "few"))
    model.graph.node.append(helper.make_node("Gather", ["whole", "few"], ["logits"], axis=2))
    (logits,) = (value for value in model.graph.output if value.name == "logits")
    logits.type.tensor_type.shape.dim[2].dim_param = "some"
    onnx.save(model, path)
    said = edge(tmp_path, "--variant", FOLDER, "--qnn-on-cpu", "--ids", "1,2", "--print-ids", "--max-tokens", "1")
    assert said.returncode == 2
    assert "A graph gives logits in another form than qnn.json says" in said.stderr


def test_a_newer_version_of_the_format_is_refused(edge: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    make(tmp_path, tiny(rng))
    file = next(tmp_path.rglob("qnn.json"))
    file.write_text(json.dumps({**json.loads(file.read_text()), "qnn_variant": 3}))
    said = edge(tmp_path, "--variant", FOLDER, "--qnn-on-cpu", "--ids", "1", "--print-ids")
    assert said.returncode == 2
    assert f"{file} has a newer version than this program reads" in said.stderr


def test_a_token_outside_the_vocabulary_is_refused(edge: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    make(tmp_path, tiny(rng))
    said = edge(tmp_path, "--variant", FOLDER, "--qnn-on-cpu", "--ids", "96", "--print-ids")
    assert said.returncode == 2
    assert "The token id 96 is not in the vocabulary of 96" in said.stderr

"""The variant `onnx` in the runner: its tokens are those of the same graph in Python, which has no cache there.

Draws: `clear_answer` draws models again until no greedy token depends on rounding.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from edge_bundles import PHONE, variant, write_bundle
from edge_models import (
    CHECKED,
    COLUMNS,
    KV_HEADS,
    NUMPY,
    Tiny,
    clear_answer,
    genai_graph,
    greedy,
    reference,
    tiny,
    verified,
)
from tokenizers import Tokenizer, decoders, models

Run = Callable[..., Any]


def letters(vocabulary: int) -> bytes:
    """A tokenizer of one character for each id."""
    tokens = {chr(0x100 + i): i for i in range(vocabulary)}
    tokenizer = Tokenizer(models.BPE(tokens, []))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer.to_str().encode()


def make(folder: Path, model: Tiny, *, kind: str = "float32", generation: dict[str, Any] | None = None) -> None:
    prompt = list(CHECKED)
    best = [int(token) for token in np.argmax(reference(model, prompt, kind), -1)]
    files = {
        "onnx/model.onnx": genai_graph(model, kind),
        "tokenizer.json": letters(model.vocabulary),
        "generation.json": json.dumps(generation or {"eos_ids": []}).encode(),
    }
    write_bundle(
        folder,
        [variant("onnx", "onnx", {"model.onnx": "onnx/model.onnx"}, context=model.context)],
        files,
        tokens=prompt,
        best=best,
    )


def python_greedy(model: Tiny, kind: str, prompt: list[int], count: int) -> list[int]:
    """The whole text anew for each token, in onnxruntime's Python."""
    options = onnxruntime.SessionOptions()
    session = onnxruntime.InferenceSession(genai_graph(model, kind), options, ["CPUExecutionProvider"])
    empty = np.zeros((1, KV_HEADS, 0, COLUMNS), NUMPY[kind])
    past = {i.name: empty for i in session.get_inputs() if i.name.startswith("past")}

    def logits(ids: list[int]) -> Any:
        feeds = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64), **past}
        return session.run(["logits"], feeds)[0][0]

    return greedy(logits, prompt, count)


@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_greedy_tokens_are_those_of_onnxruntime_in_python(
    edge: Run, tmp_path: Path, rng: np.random.Generator, kind: str
) -> None:
    model, prompt, _ = clear_answer(rng, 9, 25, kind=kind)
    make(tmp_path, model, kind=kind)
    said = edge(tmp_path, "--ids", ",".join(map(str, prompt)), "--print-ids", "--max-tokens", "25", "--stats")
    assert said.returncode == 0, said.stderr
    assert [int(token) for token in said.stdout.split(",")] == python_greedy(model, kind, prompt, 25)
    assert "prompt: 9 tokens" in said.stderr
    assert "(length)" in said.stderr


def test_a_long_prompt_goes_in_chunks(edge: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    model, prompt, _ = clear_answer(rng, 523, 5, context=600)
    make(tmp_path, model)
    said = edge(tmp_path, "--ids", ",".join(map(str, prompt)), "--print-ids", "--max-tokens", "5")
    assert [int(token) for token in said.stdout.split(",")] == python_greedy(model, "float32", prompt, 5)


def test_text_in_and_text_out(edge: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    model, prompt, _ = clear_answer(rng, 5, 10)
    make(tmp_path, model)
    said = edge(tmp_path, "--prompt", "".join(chr(0x100 + i) for i in prompt), "--max-tokens", "10")
    assert said.stdout == "".join(chr(0x100 + i) for i in python_greedy(model, "float32", prompt, 10)) + "\n"


def test_an_answer_ends_at_the_bundles_end_token_or_stop_string(
    edge: Run, tmp_path: Path, rng: np.random.Generator
) -> None:
    def first_new(answer: list[int]) -> int | None:
        """The place of the first token behind the third that has not come before; some models repeat a single one."""
        return next((i for i, token in enumerate(answer) if i > 2 and token not in answer[:i]), None)

    model, prompt, wanted = clear_answer(rng, 3, 20, wanted=lambda answer: first_new(answer) is not None)
    end, ids = first_new(wanted), ",".join(map(str, prompt))
    assert end is not None
    make(tmp_path, model, generation={"eos_ids": [wanted[end]]})
    said = edge(tmp_path, "--ids", ids, "--print-ids", "--max-tokens", "20", "--stats")
    assert [int(token) for token in said.stdout.split(",")] == wanted[:end]
    assert "(end)" in said.stderr
    make(tmp_path, model, generation={"eos_ids": [], "stop": [chr(0x100 + wanted[end])], "max_new_tokens": 20})
    said = edge(tmp_path, "--ids", ids, "--stats")
    assert said.stdout == "".join(chr(0x100 + i) for i in wanted[:end]) + "\n"
    assert "(stop)" in said.stderr


def test_an_answer_ends_with_the_context_and_a_longer_prompt_is_refused(
    edge: Run, tmp_path: Path, rng: np.random.Generator
) -> None:
    model = tiny(rng, context=12)
    make(tmp_path, model)
    said = edge(tmp_path, "--ids", "1,2,3,4", "--print-ids", "--stats")
    assert len(said.stdout.split(",")) == 8
    assert "(context)" in said.stderr
    said = edge(tmp_path, "--ids", ",".join(["1"] * 12), "--print-ids")
    assert said.returncode == 2
    assert said.stderr == "transom-edge: The prompt has 12 tokens, and the context holds 12. Give a shorter prompt.\n"


def test_sampling_defaults_out_of_range_are_ignored(edge: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    """As Transom leaves them out; none of them keeps an answer from being drawn."""
    model, prompt, _ = clear_answer(rng, 2, 8)
    ids = ",".join(map(str, prompt))
    wild = {"min_p": 7, "top_p": -1, "top_k": -1, "temperature": 1e300, "repetition_penalty": 0}
    make(tmp_path, model, generation={"eos_ids": [], "stop": [""], "max_new_tokens": 0, **wild})
    words = (tmp_path, "--ids", ids, "--print-ids", "--max-tokens", "8")
    assert edge(*words).stdout == ",".join(map(str, python_greedy(model, "float32", prompt, 8))) + "\n"
    assert edge(*words, "--temperature", "0.8").returncode == 0
    assert len(edge(tmp_path, "--ids", ids).stdout) == model.context - 2 + 1
    for damage in ({"suppress_ids": [-1]}, {"eos_ids": [1e300]}, {"top_k": "many"}, {"stop": [1]}):
        make(tmp_path, model, generation=damage)
        said = edge(*words)
        assert said.returncode == 2
        assert "generation.json is damaged" in said.stderr


def test_a_seed_gives_the_same_tokens_again(edge: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    make(tmp_path, tiny(rng))
    sampled = ("--ids", "1,2", "--print-ids", "--max-tokens", "20", "--temperature", "1.5", "--top-p", "0.9")
    first, again = (edge(tmp_path, *sampled, "--seed", "7").stdout for _ in range(2))
    assert first == again
    assert len({edge(tmp_path, *sampled, "--seed", str(seed)).stdout for seed in range(4)}) > 1


def test_verify_compares_with_the_bundles_reference(edge: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    model = verified(rng)
    make(tmp_path, model)
    said = edge(tmp_path, "--verify")
    assert said.stdout == "onnx: 7 of 7 most likely tokens match the reference\n"
    assert said.returncode == 0
    model.head = np.roll(model.head, 1, axis=1)
    (tmp_path / "onnx/model.onnx").write_bytes(genai_graph(model))
    said = edge(tmp_path, "--verify")
    assert said.stdout == "onnx: 0 of 7 most likely tokens match the reference\n"
    assert said.returncode == 1


def test_a_model_that_cannot_be_opened_is_reported_in_one_sentence(
    edge: Run, tmp_path: Path, rng: np.random.Generator
) -> None:
    make(tmp_path, tiny(rng))
    path = tmp_path / "onnx/model.onnx"
    path.write_bytes(path.read_bytes()[:1000])
    said = edge(tmp_path, "--ids", "1", "--print-ids")
    assert said.returncode == 2
    assert f"{path} cannot be opened" in said.stderr
    assert "--check" in said.stderr


def test_a_missing_onnxruntime_is_reported(built: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    import subprocess

    make(tmp_path, tiny(rng))
    line = [str(built / "transom-edge"), str(tmp_path), "--ids", "1", "--print-ids", "--onnxruntime", "/nowhere.so"]
    said = subprocess.run(line, capture_output=True, text=True, check=False)
    assert said.returncode == 2
    assert "ONNX Runtime cannot be opened" in said.stderr
    assert "--onnxruntime PATH" in said.stderr


@pytest.mark.sweep  # qemu
def test_arm64_gives_the_same_tokens(edge_arm64: Run, edge: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    model, prompt, wanted = clear_answer(rng, 9, 20)
    make(tmp_path, model)
    words = (tmp_path, "--check", "--ids", ",".join(map(str, prompt)), "--print-ids", "--max-tokens", "20")
    said = edge_arm64(*words)
    assert said.returncode == 0, said.stderr
    assert said.stdout == edge(*words).stdout
    assert [int(t) for t in said.stdout.split("\n")[1].split(",")] == wanted


def test_judge_works_for_a_device_described_in_a_file(edge: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    make(tmp_path, tiny(rng))
    device = tmp_path.parent / "device.json"
    from transom.hardware.probe_file import to_json

    device.write_text(json.dumps(to_json([PHONE])))
    said = edge(tmp_path, "--judge", "--device", device)
    assert said.returncode == 0
    assert said.stdout.startswith("onnx: fits. ")

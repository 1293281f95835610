"""The sample model, SmolLM2-135M: exported as it is for a phone, the runner answers what Transom answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from models import sample_model

import transom
from transom.sources import resolve
from transom.text.proving import corpus

Run = Callable[..., Any]
PROMPT = "<|im_start|>user\nWhy is the sky blue? 🙂<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("real") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRANSOM_CACHE", str(folder.parent / "cache"))
        transom.export(
            sample_model(), target="snapdragon-8-gen-2", format="onnx", context=512, out=folder, verify="off"
        )
        yield folder


@pytest.mark.sweep  # a real model
def test_ids_are_transoms(call: Run, bundle: Path) -> None:
    """Of the bundle's tokenizer.json, which is written for other programs."""
    tokenizer = resolve(sample_model()).open(sample_model()).tokenizer
    assert tokenizer is not None
    texts = corpus(tokenizer)
    found = call("encode", tokenizer=str(bundle / "tokenizer.json"), texts=texts)
    assert found == [tokenizer.encode(text) for text in texts]


@pytest.mark.sweep  # a real model
def test_the_runner_answers_what_transom_answers(edge: Run, bundle: Path) -> None:
    said = edge(bundle, "--judge", "--check", "--verify", "--rendered", "--prompt", PROMPT, "--max-tokens", "40")
    assert said.returncode == 0, said.stderr
    judged, checked, verified, answer = said.stdout.split("\n", 3)
    assert judged.startswith("onnx: fits. Needs ")
    assert checked.endswith("files match the manifest")
    assert verified.startswith("onnx: 1")
    with transom.load(bundle, backend="onnx", verify="off") as model:
        assert model.tokenizer is not None
        ids = model.tokenizer.encode(PROMPT, add_special=False)
        wanted = model.generate(ids, max_new_tokens=40, temperature=0)
    assert answer == wanted.text + "\n"

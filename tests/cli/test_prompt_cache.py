"""`transom run --prompt-cache`: a prompt that was read is not read again, and no work is done for nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

LONG = "word " * 60
"""More than a page of the cache."""


def test_a_prompt_is_read_once(bare: Any, model: Path, tmp_path: Path) -> None:
    command = ("run", model, LONG, "--max-tokens", "4", "--ignore-eos", "--prompt-cache", "p.cache", "--json")
    answers = []
    for _ in range(2):
        status, out, err = bare(*command)
        assert status == 0, err
        answers.append(json.loads(out))
    first, second = answers
    assert (tmp_path / "p.cache").is_file()
    assert first["usage"]["cached_tokens"] == 0
    assert second["usage"]["cached_tokens"] >= 256
    assert second["choices"] == first["choices"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--prompt-cache", "none/p.cache"), "There is no folder for the prompt cache none/p.cache"),
        (("--prompt-cache", "notes.txt"), "notes.txt is not a prompt cache, or it is damaged"),
        (("--prompt-cache", "p.cache", "--backend", "reference"), "cannot write prompt caches."),
        (
            ("--prompt-cache", "p.cache", "--backend", "reference", "--deterministic"),
            "cannot write prompt caches with --deterministic",
        ),
    ],
)
def test_what_cannot_be_one_is_refused_before_the_answer(
    bare: Any, model: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    status, out, err = bare("run", model, LONG, "--max-tokens", "2", *arguments)
    assert status == 2
    assert said in err
    assert out == ""
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_prompt_that_is_too_short_to_keep_is_said_to_be(bare: Any, model: Path, tmp_path: Path) -> None:
    status, _, err = bare("run", model, "Hi", "--max-tokens", "2", "--prompt-cache", "p.cache")
    assert status == 0
    assert "too short for a prompt cache" in err
    assert not (tmp_path / "p.cache").exists()

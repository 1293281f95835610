"""Answers that a limit cut off: each says so, and one that was to conform to a grammar is an error.

Draws: the numbers are only carried along; what is checked does not depend on them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

ENDLESS = {"TOY_ENDLESS": "1"}


def test_max_tokens_is_named_where_it_cut_the_answer(say: Callable[..., Any]) -> None:
    say("x")
    status, out, err = say("x", "--max-tokens", "4")
    assert (status, out) == (0, "Hell\n")
    assert err.splitlines()[0] == "The answer was cut off after 4 tokens. A larger --max-tokens allows more."
    assert len(err.splitlines()) == 2
    (choice,) = json.loads(say("x", "--max-tokens", "4", "--json").out)["choices"]
    assert (choice["finish_reason"], choice["cut_by"], choice["conforms"]) == ("length", "max_new_tokens", None)
    assert say("x", "--max-tokens", "4", "--quiet").err == ""


def test_the_context_is_named_where_it_cut_the_answer(say: Callable[..., Any]) -> None:
    status, _, err = say("x", "--context", "64", env=ENDLESS)
    assert status == 0
    assert "because the context of 64 tokens is full" in err
    assert "more than --context 64" in err
    (choice,) = json.loads(say("x", "--context", "64", "--json", env=ENDLESS).out)["choices"]
    assert choice["cut_by"] == "context"


def test_an_answer_that_ends_by_itself_is_not_cut(say: Callable[..., Any]) -> None:
    (choice,) = json.loads(say("x", "--json").out)["choices"]
    assert (choice["finish_reason"], choice["cut_by"]) == ("stop", None)
    assert "cut off" not in say("x").err


@pytest.mark.parametrize(
    "guide", [("--json-schema", '{"type": "string", "minLength": 9}'), ("--regex", "[a-z]{9}"), ("--choice", "x" * 9)]
)
def test_a_guided_answer_that_was_cut_is_an_error(say: Callable[..., Any], guide: tuple[str, str]) -> None:
    status, out, err = say("x", *guide, "--max-tokens", "4", "--quiet")
    assert status == 2
    assert len(out) == 5  # what there was of it, and a line break
    assert err.startswith("Error: The answer was cut off after 4 tokens, before the text conformed to what was asked")
    status, out, err = say("x", *guide, "--max-tokens", "4", "--json")
    found = json.loads(out)
    assert status == 2
    assert found["choices"][0]["conforms"] is False
    assert found["error"]["cause"] in err


@pytest.mark.parametrize(
    ("end", "cause"),
    [(("--stop", "c"), "The stop string 'c' ended the answer"), (("--stop-token-id", "99"), "The stop token 99 ended")],
)
def test_a_guided_answer_that_stops_early_is_an_error(
    say: Callable[..., Any], end: tuple[str, str], cause: str
) -> None:
    status, out, err = say("x", "--choice", "abcabc", *end, "--quiet")
    assert (status, out) == (2, "ab\n")
    assert err.startswith(f"Error: {cause}")
    assert f"Leave out {end[0]}, or" in err
    status, out, err = say("x", "--choice", "abcabc", *end, "--json")
    found = json.loads(out)
    assert (status, found["choices"][0]["conforms"]) == (2, False)
    assert found["error"]["cause"] in err
    status, out, _ = say("x", "--choice", "abcabc", "--choice", "ab", *end)
    assert (status, out) == (0, "ab\n")  # what is left conforms


def test_a_guided_answer_that_was_cut_where_it_may_end_is_none(say: Callable[..., Any]) -> None:
    status, out, _ = say("x", "--regex", "[a-z]{1,9}", "--max-tokens", "4", "--json")
    (choice,) = json.loads(out)["choices"]
    assert (status, choice["cut_by"], choice["conforms"]) == (0, "max_new_tokens", True)
    (choice,) = json.loads(say("x", "--choice", "abc", "--json").out)["choices"]
    assert (choice["text"], choice["cut_by"], choice["conforms"]) == ("abc", None, True)


def test_several_answers_without_an_end_have_a_limit(say: Callable[..., Any]) -> None:
    several = ("x", "--n", "2", "--temperature", "1")
    found = json.loads(say(*several, "--json", env=ENDLESS).out)
    assert [len(choice["token_ids"]) for choice in found["choices"]] == [512, 512]
    assert "2 of 2 answers were cut off after 512 tokens" in say(*several, env=ENDLESS).err
    found = json.loads(say(*several, "--json", "--context", "64", env=ENDLESS).out)
    assert [choice["cut_by"] for choice in found["choices"]] == ["context", "context"]

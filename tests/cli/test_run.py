"""`transom run`: the answer on stdout, one line about it on stderr, and every way to end it.

Draws: the numbers are only carried along; what is checked does not depend on them.
"""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import byte_llama
import pytest
import toy


def test_the_answer_goes_to_stdout_and_one_line_about_it_to_stderr(say: Callable[..., Any]) -> None:
    say("Hello")  # whoever runs first compiles, which may take long enough to be said
    status, out, err = say("Hello")
    assert status == 0
    assert out == toy.TEXT + "\n"
    assert len(err.splitlines()) == 1
    assert re.fullmatch(r"cpu · toy · [\d.]+ m?s to first token · [\d.]+ tokens/s\n", err)


def test_the_reasons_are_told_to_those_who_ask(say: Callable[..., Any]) -> None:
    status, out, err = say("Hello", "--verbose")
    assert (status, out) == (0, toy.TEXT + "\n")
    for part in (" to first token", "tokens: 8 of the prompt", "why:", "made up", "artifact:", "not used:"):
        assert part in err


def test_the_template_is_used_where_there_is_one_and_raw_leaves_it_out(say: Callable[..., Any]) -> None:
    plain = json.loads(say("ab", "--json").out)
    raw = json.loads(say("ab", "--raw", "--json").out)
    system = json.loads(say("ab", "--system", "xyz", "--json").out)
    counts = [found["usage"]["prompt_tokens"] for found in (plain, raw, system)]
    assert counts == [len("<u>ab<e><a>") - 6, 2, 10]  # each special token is one: user, end, assistant; system and end


def test_a_model_without_a_template_completes_the_text(transom: Any, tmp_path: Path, rng: Any) -> None:
    model = byte_llama.write_gguf(tmp_path / "plain.gguf", rng, template=None)
    options = ("--backend", "toy", "--verify", "off")
    found = json.loads(transom("run", model, "ab", *options, "--json").out)
    assert found["usage"]["prompt_tokens"] == 2
    assert "has no chat template, so it continues the prompt" in transom("run", model, "ab", *options).err
    assert "no chat template" not in transom("run", model, "ab", *options, "--raw").err
    assert transom("run", model, "ab", *options, "--quiet").err == ""
    done = transom("run", model, "ab", *options, "--system", "x")
    assert done.status == 2
    assert "no chat template" in done.err


def test_json_gives_the_whole_result_and_the_report(say: Callable[..., Any]) -> None:
    status, out, err = say("Hello", "--json", "--logprobs", "2", "--max-tokens", "3")
    assert status == 0
    found = json.loads(out)
    assert found["choices"][0]["text"] == "Hel"
    assert found["choices"][0]["finish_reason"] == "length"
    assert len(found["choices"][0]["logprobs"]) == 3
    assert found["report"]["backend"] == "toy"
    assert found["report"]["device"]["id"] == "cpu"
    assert found["timings"]["time_to_first_token"] > 0
    assert err == ""


def test_the_module_is_the_command(transom: Any, say: Callable[..., Any]) -> None:
    start = (
        "import runpy, sys; sys.argv[0] = 'transom'; runpy.run_module('transom', run_name='__main__', alter_sys=True)"
    )
    assert transom("--version", start=start) == transom("--version")
    assert transom("nosuch", start=start).status == 2


def test_deterministic_takes_only_backends_that_promise_it(bare: Any, transom: Any, model: Path) -> None:
    command = ("run", model, "Hi", "--max-tokens", "2", "--deterministic")
    status, out, err = bare(*command, "--json")
    assert status == 0, err
    assert json.loads(out)["report"]["determinism"] == "the same bits whatever else runs"
    status, _, err = transom(*command, "--backend", "toy")
    assert status == 2
    assert "Leave out --deterministic" in err


def test_quiet_says_nothing_beside_the_answer(say: Callable[..., Any]) -> None:
    status, out, err = say("Hello", "--quiet")
    assert (status, out, err) == (0, toy.TEXT + "\n", "")


@pytest.mark.parametrize("arguments", [(), ("-",)])
def test_the_prompt_may_be_piped_in(say: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    found = json.loads(say(*arguments, "--json", input="añb\n").out)
    assert found["usage"]["prompt_tokens"] == 4 + 3  # the last line break is no part of the prompt


def test_raw_input_is_kept_to_the_last_byte(say: Callable[..., Any]) -> None:
    found = json.loads(say("--raw", "--json", input="ab\n").out)
    assert found["usage"]["prompt_tokens"] == 3


def test_sampling_options_reach_the_model(say: Callable[..., Any]) -> None:
    assert say("x", "--stop", "wor", "--quiet").out == "Hellö 🙂, \n"
    assert say("x", "--logit-bias", f"{ord('H')}=-inf", "--max-tokens", "1", "--quiet").out != "H\n"
    assert say("x", "--stop-token-id", str(ord("o")), "--quiet").out == "Hellö 🙂, w\n"
    drawn = say("x", "--n", "2", "--temperature", "0.01", "--seed", "1", "--quiet").out
    assert drawn == f"[1 of 2]\n{toy.TEXT}\n[2 of 2]\n{toy.TEXT}\n"


def test_the_answer_can_be_held_to_a_form(say: Callable[..., Any], tmp_path: Path) -> None:
    assert say("x", "--regex", "[0-9]{3}", "--quiet").out.strip().isdigit()
    schema = tmp_path / "schema.json"
    form = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    schema.write_text(json.dumps(form))
    for given in (str(schema), schema.read_text()):
        assert json.loads(say("x", "--json-schema", given, "--quiet", "--max-tokens", "99").out)["a"] == 1
    assert say("x", "--choice", "yes", "--choice", "Hellas", "--quiet").out == "Hellas\n"


def test_warnings_of_the_report_are_said_aloud(fresh: Any, model: Path) -> None:
    status, _, err = fresh("run", model, "ab", "--max-tokens", "2")
    assert status == 0
    assert "Warning: toy on cpu was set aside: " in err


def test_template_variables_are_passed_on(transom: Any, tmp_path: Path, rng: Any) -> None:
    template = "{% if think %}<|system|>{% endif %}{{ messages[0].content }}{{ word }}"
    model = byte_llama.write_gguf(tmp_path / "thinks.gguf", rng, template=template)
    options = ("--backend", "toy", "--verify", "off", "--json")
    given = ("--template-variable", "think=true", "--template-variable", "word=xyz")
    assert json.loads(transom("run", model, "ab", *options, *given).out)["usage"]["prompt_tokens"] == 6
    given = ("--template-variable", "think=false")
    assert json.loads(transom("run", model, "ab", *options, *given).out)["usage"]["prompt_tokens"] == 2


def test_text_comes_while_it_is_generated(transom: Any, model: Path) -> None:
    environment = {"TOY_DELAY": "0.3", "TOY_ENDLESS": "1"}
    child = transom.begin("run", model, "x", "--backend", "toy", "--verify", "off", env=environment)
    assert child.stdout.read(3) == b"Hel"
    assert child.poll() is None


def test_ctrl_c_stops_cleanly_and_leaves_what_was_generated(transom: Any, model: Path) -> None:
    environment = {"TOY_DELAY": "0.05", "TOY_ENDLESS": "1"}
    child = transom.begin("run", model, "x", "--backend", "toy", "--verify", "off", env=environment)
    first = child.stdout.read(4)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=20)
    assert child.returncode == 130
    assert (first + out).decode().startswith("Hell")
    assert out.endswith(b"\n")
    assert b"Traceback" not in err
    assert "to first token" in err.decode().splitlines()[-2]
    assert err.decode().splitlines()[-1] == "Interrupted."


def test_ctrl_c_while_the_model_is_prepared_leaves_nothing_half_done(fresh: Any, model: Path) -> None:
    child = fresh.begin("run", model, "x", "--backend", "toy", env={"TOY_SLOW_COMPILE": "60"})
    for _ in range(400):
        if (fresh.folder / "compiling").exists():
            break
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert (out, err.decode().splitlines()[-1]) == (b"", "Interrupted.")
    assert b"Traceback" not in err
    assert fresh("cache", "list", "--json").out.count('"artifacts/') == 0
    assert not list((fresh.cache / "building").glob("*"))


def test_ctrl_c_before_anything_is_imported_is_no_traceback(transom: Any) -> None:
    start = (
        "import sys, signal; from transom.cli import main; find = type('', (), {'find_spec': staticmethod("
        "lambda name, *rest: signal.raise_signal(signal.SIGINT) if name == 'click' else None)}); "
        "sys.meta_path.insert(0, find); main()"
    )
    assert tuple(transom("devices", start=start)) == (130, "", "Interrupted.\n")


def test_a_reader_that_goes_away_ends_the_answer_in_silence(transom: Any, model: Path) -> None:
    environment = {"TOY_DELAY": "0.02", "TOY_ENDLESS": "1"}
    child = transom.begin("run", model, "x", "--backend", "toy", "--verify", "off", env=environment)
    assert child.stdout.read(1) == b"H"
    child.stdout.close()
    assert child.wait(timeout=20) == 0
    said = child.stderr.read().decode()
    assert "Traceback" not in said
    assert "Exception" not in said


def test_a_reader_that_goes_away_ends_a_table_in_silence(transom: Any) -> None:
    child = transom.begin("devices", "--all")
    child.stdout.close()
    assert child.wait(timeout=20) == 0
    assert child.stderr.read() == b""


def test_a_broken_template_is_refused_before_anything_is_compiled(fresh: Any, tmp_path: Path, rng: Any) -> None:
    path = byte_llama.write_gguf(tmp_path / "broken.gguf", rng, template="{% if ")
    options = ("--backend", "toy", "--verify", "off")
    for command in ("run", "chat"):
        status, _, err = fresh(command, path, *(("Hi",) if command == "run" else ()), *options)
        assert status == 2
        assert "not valid Jinja" in err
        assert not list(fresh.cache.glob("artifacts/*"))
    assert fresh("run", path, "Hi", "--raw", *options).status == 0

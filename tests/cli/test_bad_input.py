"""What a user can get wrong: one clear sentence with a way out, exit status 2, and never a traceback."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import toy


@pytest.fixture
def refused(bare: Any) -> Callable[..., str]:
    """Runs a command that must be refused; returns what was said."""

    def run(*arguments: Any, **options: Any) -> str:
        status, out, err = bare(*arguments, **options)
        assert status == 2, (status, out, err)
        assert out == ""
        assert "Traceback" not in err
        assert "bug in Transom" not in err
        return str(err)

    return run


@pytest.mark.parametrize("verb", ["run", "inspect", "explain", "bench", "chat"])
def test_no_such_path(refused: Callable[..., str], tmp_path: Path, verb: str) -> None:
    prompt = ("Hello",) if verb == "run" else ()
    said = refused(verb, tmp_path / "none.gguf", *prompt)
    assert f"There is no {tmp_path / 'none.gguf'}" in said
    assert ".gguf file" in said


def test_an_unknown_device_is_told_with_the_nearest(refused: Callable[..., str], model: Path) -> None:
    assert 'Unknown device "cpuu". Did you mean "cpu"?' in refused("run", model, "x", "--device", "cpuu")


def test_a_device_that_is_not_here_is_no_reason_to_take_another(refused: Callable[..., str], model: Path) -> None:
    said = refused("run", model, "x", "--device", "cuda:7")
    assert 'This machine has no device "cuda:7"' in said
    assert "cpu" in said


def test_a_device_without_a_backend_lists_what_each_said(transom: Any, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "probe.json"
    file.write_text(
        '{"devices": [{"kind": "cpu", "id": "cpu", "arch": "x86_64", "memory_bytes": 8000000000},'
        ' {"kind": "cuda", "id": "cuda:0", "arch": "sm_90", "memory_bytes": 80000000000}]}'
    )
    status, _, err = transom("run", model, "x", "--device", "cuda:0", "--probe-file", file)
    assert status == 2
    assert 'No installed backend can run on the device "cuda:0"' in err
    assert "toy on cuda:0: the toy needs a toy driver" in err
    assert "pip install toy-driver" in err


def test_the_device_of_the_environment_is_named_with_its_variable(refused: Callable[..., str], model: Path) -> None:
    assert "TRANSOM_DEVICE" in refused("run", model, "x", env={"TRANSOM_DEVICE": "gpuu"})


def test_an_unknown_backend_is_told_with_the_nearest(refused: Callable[..., str], model: Path) -> None:
    assert 'Unknown backend "refrence". Did you mean "reference"?' in refused(
        "run", model, "x", "--backend", "refrence"
    )


def test_an_unknown_option_is_told_with_the_nearest(refused: Callable[..., str], model: Path) -> None:
    said = refused("run", model, "x", "--temprature", "1")
    assert "--temprature" in said
    assert "--temperature" in said.replace("--temprature", "")


def test_an_unknown_command_is_told_with_the_nearest(refused: Callable[..., str]) -> None:
    assert "There is no command 'inspct'. Did you mean \"inspect\"?" in refused("inspct", "x")


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--top-p", "2"), "--top-p 2.0 is not allowed"),
        (("--n", "2", "--temperature", "0"), "Set temperature above 0"),
        (("--json-schema", "none.json"), "none.json cannot be read"),
        (("--json-schema", "{"), "not JSON"),
        (("--logit-bias", "a=b"), "--logit-bias a=b"),
        (("--regex", "a", "--choice", "b"), "at once"),
        (("--precision", "f99"), "f99"),
        (("--raw", "--system", "x"), "--raw uses no chat template"),
        (("--context", "0"), "--context 0"),
        (("--template-variable", "x"), "NAME=VALUE"),
    ],
)
def test_a_wrong_value_is_refused(refused: Callable[..., str], model: Path, option: tuple[str, ...], said: str) -> None:
    assert said in refused("run", model, "x", *option, "--backend", "reference")


def test_a_context_longer_than_the_model_names_its_limit(refused: Callable[..., str], model: Path) -> None:
    said = refused("run", model, "x", "--context", "99999", "--backend", "reference")
    assert "99999" in said
    assert "4096" in said


def test_a_prompt_longer_than_the_context_says_both(refused: Callable[..., str], model: Path) -> None:
    said = refused("run", model, "x" * 100, "--context", "64", "--backend", "reference")
    assert "The prompt has 103 tokens" in said
    assert "context of 64" in said


@pytest.mark.parametrize("arguments", [("",), ("-",), ()])
def test_an_empty_prompt_is_refused(refused: Callable[..., str], model: Path, arguments: tuple[str, ...]) -> None:
    assert "The prompt is empty" in refused("run", model, *arguments)


def test_raw_starts_from_nothing(bare: Any, model: Path) -> None:
    status, out, _ = bare("run", model, "--raw", "", "--backend", "reference", "--max-tokens", "2", "--json")
    assert status == 0
    # Not the text: random weights may well say a special token, which is none.
    usage = json.loads(out)["usage"]
    assert usage["prompt_tokens"] == 1  # the one that begins a text
    assert usage["completion_tokens"] in (1, 2)


def test_bytes_that_are_not_utf8_are_named(refused: Callable[..., str], model: Path) -> None:
    said = refused("run", model, input=b"caf\xe9")
    assert "byte 0xe9 at position 3" in said
    assert "iconv" in said


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("caf\udce9",), "The argument PROMPT"),
        (("--raw", "caf\udce9"), "The argument PROMPT"),
        (("x", "--system", "caf\udce9"), "--system"),
        (("x", "--stop", "caf\udce9"), "--stop"),
        (("x", "--choice", "caf\udce9"), "--choice"),
        (("x", "--template-variable", "caf\udce9"), "--template-variable"),
    ],
)
def test_an_argument_that_is_not_utf8_is_refused(
    refused: Callable[..., str], model: Path, arguments: tuple[str, ...], name: str
) -> None:
    said = refused("run", model, *arguments, "--backend", "reference")
    assert f"{name} is not UTF-8 text: byte 0xe9 at position 3" in said
    assert "iconv" in said


def test_log_probabilities_that_nothing_would_print_are_refused(refused: Callable[..., str], model: Path) -> None:
    assert "--logprobs prints nothing without --json" in refused("run", model, "x", "--logprobs", "2")


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (("run", "none.gguf", "x"), "SourceError"),
        (("run", "none.gguf", "x", "--top-p", "2"), "OptionError"),
        (("run", "none.gguf", "x", "--nosuch"), "NoSuchOption"),
        (("run",), "MissingParameter"),
        (("chat", "none.gguf"), "SourceError"),
        (("inspect", "none.gguf"), "SourceError"),
        (("cache", "prune", "--size", "lots"), "OptionError"),
        (("devices", "--probe-file", "none.json"), "OptionError"),
    ],
)
def test_with_json_an_error_is_an_object_on_stdout_too(bare: Any, arguments: tuple[str, ...], kind: str) -> None:
    status, out, err = bare(*arguments, "--json")
    error = json.loads(out)["error"]
    assert (error["type"], error["status"], status) == (kind, 2, 2)
    assert error["cause"].split(".")[0] in err
    assert bare(*arguments).out == ""


@pytest.mark.skipif(os.name != "posix", reason="closes streams as a shell does")
@pytest.mark.parametrize("verb", [("run", "x"), ("chat",), ("inspect",)])
def test_a_closed_output_is_one_sentence_before_any_work(transom: Any, model: Path, verb: tuple[str, ...]) -> None:
    arguments = (verb[0], model, *verb[1:])
    child = transom.begin(*arguments, stdout=None, preexec_fn=lambda: os.close(1))
    _, err = child.communicate(timeout=60)
    assert child.returncode == 2
    assert err.decode().startswith("Error: Standard output is closed")
    assert len(err.splitlines()) == 1


@pytest.mark.skipif(os.name != "posix", reason="closes streams as a shell does")
def test_closed_input_and_closed_messages_do_no_harm(transom: Any, model: Path) -> None:
    arguments = ("run", model, "x", "--backend", "toy", "--verify", "off")
    for options in (
        {"stdin": None, "preexec_fn": lambda: os.close(0)},
        {"stderr": None, "preexec_fn": lambda: os.close(2)},
    ):
        child = transom.begin(*arguments, **options)
        out, _ = child.communicate(timeout=60)
        assert (child.returncode, out.decode()) == (0, toy.TEXT + "\n")


def test_a_probe_file_that_is_none_is_named(refused: Callable[..., str], model: Path) -> None:
    assert "toy.gguf is not" in refused("devices", "--probe-file", model)
    assert "cannot be read" in refused("devices", "--probe-file", "none.json")


def test_a_cache_that_cannot_be_written_warns_and_runs(bare: Any, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    arguments = ("run", model, "ab", "--backend", "reference", "--max-tokens", "2", "--json")
    status, out, err = bare(*arguments, env={"TRANSOM_CACHE": str(tmp_path / "file")})
    assert status == 0
    assert json.loads(out)["usage"]["completion_tokens"] in (1, 2)
    (warning,) = (line for line in err.splitlines() if line.startswith("Warning: "))
    assert "TRANSOM_CACHE" in warning


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="needs a device that is always full")
def test_an_output_that_is_full_is_said(transom: Any, model: Path) -> None:
    with open("/dev/full", "wb") as full:
        child = transom.begin("run", model, "ab", "--backend", "toy", "--verify", "off", stdout=full)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 2
    assert b"No space left on device" in err
    assert b"Traceback" not in err


def test_a_full_cache_warns_and_runs(fresh: Any, model: Path) -> None:
    arguments = ("run", model, "ab", "--backend", "toy", "--verify", "off")
    status, out, err = fresh(*arguments, env={"TOY_FAIL": "full"})
    assert (status, out) == (0, toy.TEXT + "\n")
    (warning,) = (line for line in err.splitlines() if line.startswith("Warning: "))
    assert "No space left on device" in warning
    assert "TRANSOM_CACHE" in warning
    assert fresh(*arguments, "--quiet", env={"TOY_FAIL": "full"}).err == ""
    assert fresh(*arguments).err.count("\n") == 1  # with room again it is as always


def test_no_room_to_compile_in_anywhere_is_one_sentence(fresh: Any, model: Path) -> None:
    arguments = ("run", model, "ab", "--backend", "toy", "--verify", "off")
    status, _, err = fresh(*arguments, env={"TOY_FAIL": "full everywhere"})
    assert status == 2
    (error,) = (line for line in err.splitlines() if line.startswith("Error: "))
    assert "fits neither in the cache" in error
    assert "Free space on the disk" in error
    assert "Traceback" not in err


def test_a_backend_that_breaks_in_the_middle_of_an_answer_is_one_sentence(transom: Any, model: Path) -> None:
    prepared = ("run", model, "x", "--backend", "toy", "--verify", "off")
    assert transom(*prepared).status == 0
    status, _, err = transom(*prepared, env={"TOY_FAIL": "step"})
    assert status == 2
    assert "the toy broke" in err
    assert "Traceback" not in err


def test_a_name_that_is_near_to_none_gets_no_suggestion(refused: Callable[..., str]) -> None:
    for word in ("nosuch", "xyzzy", "serve"):
        assert "Did you mean" not in refused(word)
    for word, meant in (("benhc", "bench"), ("devcs", "devices"), ("benchmark", "bench"), ("exlpain", "explain")):
        assert f'Did you mean "{meant}"' in refused(word)


def test_the_traceback_is_there_for_those_who_ask(bare: Any) -> None:
    assert "Traceback" in bare("inspect", "none.gguf", env={"TRANSOM_DEBUG": "1"}).err


def test_a_bug_is_said_to_be_one(bare: Any, model: Path) -> None:
    start = (
        "import sys; import transom.cli.inspection as i; i.inspect_model = lambda *a: 1 / 0; sys.argv[0] = 'transom';"
        "from transom.cli import main; main()"
    )
    status, _, err = bare("inspect", model, start=start)
    assert status == 1
    assert "This is a bug in Transom: ZeroDivisionError" in err
    assert "TRANSOM_DEBUG=1" in err


@pytest.mark.parametrize(
    ("verb", "name", "value", "in_python", "here"),
    [
        ("run", "context", 812, "context=812", "--context 812"),
        ("run", "precision", "int8", "precision='int8'", "--precision 'int8'"),
        ("run", "backend", ..., "backend=…", "--backend …"),
        ("run", "max_new_tokens", 4000, "max_new_tokens=4000", "--max-tokens 4000"),
        ("run", "top_k", 5, "top_k=5", "--top-k 5"),
        ("run", "max_kl", 0.1, "max_kl=0.1", "--max-kl 0.1"),
        ("run", "stop_token_ids", 5, "stop_token_ids=5", "--stop-token-id 5"),
        ("export", "calibration", ..., "calibration=…", "--text …"),
        ("export", "max_kl", 0.1, "max_kl=0.1", "--max-kl 0.1"),
        ("export", "overwrite", True, "overwrite=True", "--overwrite"),
        ("bundle", "probe_file", ..., "probe_file=…", "--probe-file …"),
        ("inspect", "max_kl", 0.1, "max_kl=0.1", "--max-kl 0.1"),
    ],
)
def test_errors_name_options_as_their_reader_writes_them(
    verb: str, name: str, value: object, in_python: str, here: str
) -> None:
    from transom.cli.app import flags_of, transom
    from transom.errors import name_options, option

    assert option(name, value) == in_python
    name_options(flags_of(transom.get_command(click.Context(transom), verb)))
    try:
        assert option(name, value) == here
    finally:
        name_options(None)

"""Help, completion, and what is imported when: `--help` and a warm start must stay light."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from transom.cli import options
from transom.cli.app import COMMANDS, run
from transom.loading.options import PRECISIONS, VERIFY

HEAVY = frozenset(
    {
        *("onnx", "onnx_ir", "onnxruntime", "gguf", "safetensors", "sympy", "jinja2", "rich", "prompt_toolkit"),
        *("torch", "transformers", "openvino", "mobius", "llguidance", "ml_dtypes", "pytest"),
    }
)
TELL = (
    "import sys, atexit; sys.argv[0] = 'transom';"
    "atexit.register(lambda: sys.stderr.write('\\n' + ' '.join({m.split('.')[0] for m in sys.modules})));"
    "from transom.cli import main; main()"
)


def imported(done: Any) -> set[str]:
    assert done.status == 0, done.err
    return set(done.err.splitlines()[-1].split())


def test_help_imports_nothing_heavy_not_even_numpy(bare: Any) -> None:
    for arguments in (("--help",), ("run", "--help"), ("--version",)):
        modules = imported(bare(*arguments, start=TELL))
        assert not modules & (HEAVY | {"numpy", "tokenizers", "platformdirs", "filelock"})


def test_a_warm_start_imports_no_format_and_no_template_unless_it_needs_one(transom: Any, model: Path) -> None:
    past = time.time() - 60
    os.utime(model, (past, past))  # a file that may still be written to is read again at each start
    arguments = ("run", model, "x", "--backend", "toy", "--verify", "off")
    transom(*arguments)
    transom(*arguments)  # tries the template, once
    raw = imported(transom(*arguments, "--raw", start=TELL))
    assert not raw & HEAVY
    assert "numpy" in raw
    templated = imported(transom(*arguments, start=TELL))
    assert templated & HEAVY == {"jinja2"}


@pytest.mark.parametrize("command", ["", *COMMANDS, "cache list", "cache verify", "cache prune", "cache clear"])
def test_every_command_has_help_with_a_line_that_says_what_it_does(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Usage: " in shown
    if " " not in command:
        assert "Examples:" in shown
        assert "\n  transom" in shown.replace("    transom", "  transom") or command == "completion"


def test_every_command_that_reports_has_json(capsys: pytest.CaptureFixture[str]) -> None:
    of_cache, of_bundle = ("list", "verify", "prune", "clear"), ("verify", "judge", "libraries")
    groups = [*(f"cache {c}" for c in of_cache), *(f"bundle {c}" for c in of_bundle)]
    for command in [c for c in COMMANDS if c not in ("bundle", "cache", "completion")] + groups:
        run([*command.split(), "--help"])
        assert "--json" in capsys.readouterr().out, command


def test_the_choices_of_the_command_line_are_those_of_load() -> None:
    assert options.PRECISIONS == PRECISIONS
    assert options.VERIFIES == VERIFY


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_each_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    assert "_TRANSOM_COMPLETE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "at", "expected"),
    [
        ("transom ins", 1, "inspect"),
        ("transom run model --ba", 3, "--backend"),
        ("transom run model --backend ref", 4, "reference"),
        ("transom run model --device cp", 4, "cpu"),
        ("transom run model --precision bf", 4, "bf16"),
        ("transom cache cl", 2, "clear"),
    ],
)
def test_a_shell_completes_commands_options_and_values(bare: Any, words: str, at: int, expected: str) -> None:
    environment = {"_TRANSOM_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(at)}
    assert expected in [line.partition(",")[2] for line in bare(env=environment).out.splitlines()]


def test_a_shell_that_completes_after_a_wrong_command_gets_no_sentences(bare: Any) -> None:
    environment = {"_TRANSOM_COMPLETE": "bash_complete", "COMP_WORDS": "transom rn x", "COMP_CWORD": "2"}
    status, out, err = bare(env=environment)
    assert (status, out.strip(), err) == (0, "", "")


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        ("devices", {"devices", "notes"}),
        ("backends", {"backends", "failures"}),
        ("cache list", {"root", "entries", "stats"}),
    ],
)
def test_json_output_is_one_document_and_stands_alone(bare: Any, command: str, keys: set[str]) -> None:
    status, out, err = bare(*command.split(), "--json")
    assert (status, err) == (0, "")
    assert json.loads(out).keys() == keys

"""`--sparsity`: a policy by name, share or file, and what is said of one that is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

EAGER = '{"coverage": 0.3, "columns": 4, "dense_below": 0, "max_density": 0.6}'


def test_a_policy_runs_and_is_in_the_report(bare: Any, model: Path, tmp_path: Path) -> None:
    (tmp_path / "eager.json").write_text(EAGER)
    long = "word " * 60
    command = ("run", model, long, "--backend", "reference", "--max-tokens", "2", "--sparsity", "eager.json")
    status, out, err = bare(*command, "--json")
    assert status == 0, err
    answer = json.loads(out)
    assert answer["report"]["sparsity"].startswith("balanced with coverage=0.3")
    assert answer["report"]["sparsity"].endswith("heads not calibrated")
    assert all(0 < share < 1 for layer in answer["densities"] for share in layer)
    status, _, err = bare(*command)
    assert status == 0
    assert "of the keys read" in err


def test_without_one_every_key_is_read(bare: Any, model: Path) -> None:
    status, out, _ = bare("run", model, "Hello", "--backend", "reference", "--max-tokens", "2", "--json")
    assert status == 0
    answer = json.loads(out)
    assert answer["report"]["sparsity"] == ""
    assert answer["densities"] is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("balancd", 'Did you mean "balanced"?'),
        ("1.5", "coverage=1.5 is not allowed"),
        ("0", "Allowed: a number above 0, up to 1"),
        ("none.json", "none.json cannot be read"),
        ("wrong.json", "unknown key 'colums'"),
    ],
)
@pytest.mark.parametrize("verb", ["run", "explain", "bench", "chat"])
def test_what_is_no_policy_is_refused(bare: Any, model: Path, tmp_path: Path, verb: str, given: str, said: str) -> None:
    (tmp_path / "wrong.json").write_text('{"colums": 3}')
    prompt = ("Hello",) if verb == "run" else ()
    status, out, err = bare(verb, model, *prompt, "--sparsity", given)
    assert status == 2
    assert said in err
    assert out == ""


def test_explain_asks_about_the_policy(bare: Any, model: Path) -> None:
    status, out, _ = bare("explain", model, "--sparsity", "fast", "--device", "cpu", "--json")
    assert status == 0
    answers = {a["backend"]: a for a in json.loads(out)["answers"]}
    assert answers["reference"]["runs"]

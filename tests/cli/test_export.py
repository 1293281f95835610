"""`transom export`: the bundle, its list of targets, and what is said where there can be none."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import toy

TOY = ("--format", "toy", "--verify", "off")


def test_a_model_becomes_a_bundle_that_explain_knows(transom: Any, model: Path, tmp_path: Path) -> None:
    status, out, err = transom("export", model, "--target", "cpu", "--out", "bundle", *TOY)
    assert (status, err) == (0, "")
    assert "for cpu (" in out
    assert ", by toy 1.0\n" in out
    assert "precision:  wood" in out
    status, out, err = transom("explain", "bundle", "--device", "cpu")
    assert status == 0, err
    assert "toy on cpu: yes" in out
    status, out, _ = transom("explain", "bundle", "--json")
    assert json.loads(out)["answers"][0]["verdict"] == {"state": "ok", "reason": ""}


def test_run_chat_and_bench_open_a_bundle(transom: Any, model: Path, tmp_path: Path) -> None:
    assert transom("export", model, "--target", "cpu", "--out", "bundle", *TOY, "--context", "256").status == 0
    for _ in range(2):
        status, out, err = transom("run", "bundle", "ab", "--verify", "off")
        assert (status, out) == (0, toy.TEXT + "\n"), err
        assert "cpu" in err
        assert " · toy · " in err
    status, out, err = transom("chat", "bundle", "--verify", "off", input="Hello\n")
    assert status == 0, err
    assert toy.TEXT in out
    status, _, err = transom("run", "bundle", "ab", "--precision", "bf16")
    assert status == 2
    assert "--precision 'bf16' does not fit the bundle" in err
    status, _, err = transom("run", "bundle", "ab", "--backend", "reference")
    assert status == 2
    assert "--backend 'reference' does not fit the bundle" in err
    status, _, err = transom("bench", "bundle", "--prompt-tokens", "1000")
    assert status == 2
    assert "more than the model's context of 256" in err


def test_bench_times_the_bundle_s_own_backend(bare: Any, model: Path) -> None:
    assert bare("export", model, "--target", "cpu", "--out", "bundle", "--format", "reference").status == 0
    command = ("bench", "bundle", "--prompt-tokens", "8", "--new-tokens", "2", "--rounds", "1", "--json")
    status, out, err = bare(*command)
    assert status == 0, err
    [row] = json.loads(out)["results"]
    assert (row["backend"], row["error"]) == ("reference", None)
    assert row["decode_tokens_per_second"]


def test_json_is_one_document(transom: Any, model: Path, tmp_path: Path) -> None:
    status, out, err = transom("export", model, "--target", "cpu", "--out", "bundle", *TOY, "--json", "--context", "64")
    assert (status, err) == (0, "")
    made = json.loads(out)
    assert made["variants"][0]["context"] == 64
    assert made["folder"] == str(tmp_path / "bundle")
    assert set(made["files"]) >= {"manifest.json", "golden.npz", "toy/toy.json"}


def test_a_plan_writes_nothing_and_says_each_target_and_format(transom: Any, model: Path, tmp_path: Path) -> None:
    before = sorted(os.listdir(tmp_path))
    command = ("export", model, "--target", "snapdragon-8-gen-2,snapdragon-8-gen-3", "--format", "qnn,onnx", "--plan")
    status, out, err = transom(*command, "--precision", "int4", "--context", "64")
    assert (status, err) == (0, "")
    assert out.count("Tiny for remote:snapdragon-8-gen-2") == 1
    assert out.count("Tiny for remote:snapdragon-8-gen-3") == 1
    assert out.count("\nqnn, int4:") == out.count("\nonnx, int4:") == 2
    assert "a bound and not a measurement" in out
    status, out, _ = transom(*command, "--context", "64", "--json")
    assert [plan["target"] for plan in json.loads(out)["plans"]] == [
        "remote:snapdragon-8-gen-2",
        "remote:snapdragon-8-gen-3",
    ]
    assert sorted(os.listdir(tmp_path)) == before
    status, _, err = transom("export", model, "--target", "b200", "--plan")
    assert status == 2
    assert "pip install toy-driver" in err
    status, _, err = transom(*command, "--context", "99999")
    assert (status, "--context 99999" in err) == (2, True)


def test_the_list_of_targets_says_who_compiles_for_them(transom: Any) -> None:
    status, out, err = transom("export", "--target", "list")
    assert (status, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines()[1:] if line}
    assert "toy" in lines["cpu"]
    assert "onnx" in lines["snapdragon-8-gen-2"]
    assert "none: see (1)" in lines["b200"]
    assert "cuda_triton: " in lines["(1)"]
    assert out.count("toy: the toy needs a toy driver (pip install toy-driver)") == 1
    status, out, _ = transom("export", "--target", "list", "--json")
    answers = {t["target"]: {a["backend"]: a for a in t["answers"]} for t in json.loads(out)["targets"]}
    assert answers["cpu"]["toy"]["offer"] is True
    assert answers["snapdragon-8-gen-2"]["toy"]["fix"] == "pip install toy-driver"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--out", "b"), "Name one with --target: cpu, "),
        (("--target", "cpu"), "Name it with --out"),
        (("--target", "rtx-409", "--out", "b"), 'Did you mean "rtx-4090"?'),
        (("--target", "auto", "--out", "b"), "--target 'auto' names no device"),
        (("--target", "b200", "--out", "b"), "pip install toy-driver"),
        (("--target", "cpu", "--out", "none/b"), "There is no folder"),
        (("--target", "cpu", "--out", "full"), "is not empty"),
        (("--target", "cpu", "--out", "b", "--text", "none.txt"), "none.txt cannot be read"),
        (("--target", "cpu", "--out", "b", "--text", "empty.txt"), "is empty"),
        (("--target", "cpu", "--out", "b", "--context", "99999"), "--context 99999"),
        (("--target", "cpu", "--out", "b", "--format", "toyy"), 'Did you mean "toy"?'),
        (("--target", "cpu", "--out", "b", "--precision", "f99"), "f99"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    transom: Any, model: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "empty.txt").write_text("")
    before = sorted(os.listdir(tmp_path))
    status, out, err = transom("export", model, *arguments)
    assert (status, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
    assert sorted(os.listdir(tmp_path)) == before


def test_without_a_model_there_is_nothing_to_export(transom: Any, tmp_path: Path) -> None:
    status, _, err = transom("export", "--target", "cpu", "--out", "b")
    assert status == 2
    assert "No model is given" in err
    status, _, err = transom("export", tmp_path / "none.gguf", "--target", "cpu", "--out", "b")
    assert status == 2
    assert "There is no" in err


def test_a_bundle_is_replaced_only_when_told(transom: Any, model: Path) -> None:
    command = ("export", model, "--target", "cpu", "--out", "bundle", *TOY)
    assert transom(*command).status == 0
    status, _, err = transom(*command)
    assert status == 2
    assert "or replace it with --overwrite" in err
    assert transom(*command, "--overwrite").status == 0
    status, _, err = transom("export", "bundle", "--target", "cpu", "--out", "second")
    assert status == 2
    assert "is a bundle" in err


@pytest.mark.parametrize("command", ["inspect", "verify", "calibrate-sparsity"])
def test_what_needs_the_model_itself_says_so_of_a_bundle(transom: Any, model: Path, command: str) -> None:
    assert transom("export", model, "--target", "cpu", "--out", "bundle", *TOY).status == 0
    status, out, err = transom(command, "bundle")
    assert (status, out) == (2, "")
    assert err == "Error: bundle is a bundle, which is compiled already. Give the model that it was made from.\n"


def test_texts_are_given_by_file(transom: Any, model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a text to calibrate on")
    command = ("export", model, "--target", "cpu", "--out", "bundle", "--text", "text.txt", *TOY)
    assert transom(*command).status == 0


def test_an_interrupt_leaves_nothing(fresh: Any, model: Path, tmp_path: Path) -> None:
    child = fresh.begin("export", model, "--target", "cpu", "--out", "bundle", *TOY, env={"TOY_SLOW_COMPILE": "60"})
    end = time.monotonic() + 60
    while not (tmp_path / "compiling").exists() and time.monotonic() < end:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert b"Interrupted." in err
    assert not [name for name in os.listdir(tmp_path) if "bundle" in name]


def test_a_damaged_bundle_is_one_sentence(transom: Any, model: Path, tmp_path: Path) -> None:
    assert transom("export", model, "--target", "cpu", "--out", "bundle", *TOY).status == 0
    (tmp_path / "bundle" / "manifest.json").write_text('{"transom_bundle": 1')
    status, out, err = transom("explain", "bundle")
    assert (status, out) == (2, "")
    assert err.startswith("Error: The manifest of the bundle")

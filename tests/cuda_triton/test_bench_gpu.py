"""`benchmarks/gpu.py` without a card: a dry run through all of it, and the section that it writes.

Draws: a density is that of thousands of units drawn on their own, and stays within 0.12 by more than ten deviations.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_scripts import assert_no_card_is_reported, assert_no_time_is_reported

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
PARTS = ["kernels", "conformance", "bounds", "products", "decode", "model", "prefill"]


def started(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("gpu") / "gpu-{card}.json"
    done = started("--dry-run", "--out", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = path.parent.iterdir()
    assert "{" not in written.name, "the card's name is in the file's"
    found: dict[str, Any] = json.loads(written.read_text())
    return found


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from parts import report

    return report


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu

    return gpu


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from gpu_parts import lists

    return lists


def rows(result: dict[str, Any], part: str) -> list[dict[str, Any]]:
    (found,) = (p for p in result["parts"] if p["name"] == part)
    return [row for table in found["tables"] for row in table["rows"]]


@pytest.mark.sweep  # a whole benchmark
def test_every_part_runs_without_a_card(result: dict[str, Any]) -> None:
    assert [(p["name"], p["state"]) for p in result["parts"]] == [(name, "done") for name in PARTS]
    assert (result["script"], result["dry"], result["status"]) == ("gpu", True, 0)
    assert result["card"]["arch"] == "interpreted"
    assert {"python", "torch", "triton", "transom"} <= set(result["versions"])
    assert set(result["bounds"]) == {"copy_bytes_per_second", "product_flops"}


@pytest.mark.sweep  # a whole benchmark
def test_numbers_are_checked_first(result: dict[str, Any]) -> None:
    assert {c["outcome"] for c in result["checks"]} == {"passed"}
    names = {c["name"].split(",")[0] for c in result["checks"]}
    assert {
        "prefill", "decode", "append", "norm", "gate", "combine", "rotate", "embed", "product", "sample", "routing",
        "conformance", "generation",
    } <= names  # fmt: skip


@pytest.mark.sweep  # a whole benchmark
def test_every_figure_stands_beside_its_bound_and_its_peers(result: dict[str, Any]) -> None:
    for part in ("prefill", "decode", "products"):
        timed = [r for r in rows(result, part) if r.get("ms") or r.get("us")]
        assert timed
        assert all(r["of the bound"] for r in timed)
    said = {r["what"] for r in rows(result, "prefill")}
    assert {"ours, dense", "ours, fine lists", "torch SDPA, FlashAttention", "flex_attention, coarse lists"} <= said
    assert any(r["efficiency"] for r in rows(result, "decode"))
    assert any(r["what"].startswith("torch int4") and r["us"] for r in rows(result, "products"))


@pytest.mark.sweep  # a whole benchmark
def test_what_is_not_installed_says_so(result: dict[str, Any]) -> None:
    for part in ("prefill", "decode"):
        found = [r for r in rows(result, part) if r["what"] == "FlashInfer"]
        assert found
        assert all(r["note"] or r.get("ms") or r.get("us") for r in found)


@pytest.mark.sweep  # a whole benchmark
def test_the_whole_model_is_compared(result: dict[str, Any]) -> None:
    found = rows(result, "model")
    ways = {(r["weights"], r["attention"], r["sequences"]) for r in found if "attention" in r}
    assert len(ways) == 8, "two weights, two ways to read, alone and in a batch"
    assert all(r["prefill density"] < 1 for r in found if r.get("attention") == "sparse")
    assert any("ratio" in r for r in found)
    assert any("cache GiB" in r for r in found)
    assert any("first token s" in r for r in found)


def test_a_missing_card_is_reported_in_one_sentence(tmp_path: Path) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert_no_card_is_reported(done, tmp_path)


def test_a_time_limit_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    done = started("--dry-run", "--limit", "0", "--out", str(path))
    assert_no_time_is_reported(done, path)


def test_an_interrupted_run_stops_its_watchdog(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = threading.Timer(1000, print)

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "bench_for", lambda arguments, command: None)
    monkeypatch.setattr(script, "begin", lambda bench, path: watch)
    monkeypatch.setattr(script, "perform", interrupted)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(KeyboardInterrupt):
        script.main(["--dry-run"])
    assert watch.finished.is_set(), "nothing writes a result and ends the process later"


# lists of keys --------------------------------------------------------------------------------------------------------
def _read(arrays: dict[str, Any], block: int, head: int, begin: int, queries: int, length: int) -> np.ndarray[Any, Any]:
    """Which keys each query of a block reads, by the meaning of the lists: bool [queries, length]."""
    near, count = int(arrays["NEAR"][block, head]), int(arrays["FAR_COUNT"][block, head])
    far = arrays["FAR"][block, head, :count].numpy()
    columns = arrays["BLOCK_COLUMNS"][block, head].numpy()
    columns = columns[columns >= 0]
    assert (np.diff(far) > 0).all(), "ascending, each once"
    assert ((far >= 0) & (far < near // 16)).all()
    assert (columns < max(near, 1)).all()
    assert not np.isin(columns // 16, far).any()
    assert len(np.unique(columns)) == len(columns)
    mask = np.zeros((queries, length), bool)
    mask[:, near:] = True
    for unit in far:
        mask[:, unit * 16 : unit * 16 + 16] = True
    mask[:, columns] = True
    return mask & (np.arange(length) <= begin + np.arange(queries)[:, None])


@pytest.mark.parametrize("density", [0.1, 0.3, 0.9])
def test_lists_have_the_density_that_they_say(density: float, drawing: Any, seed: int) -> None:
    import torch

    length, heads = 4096, 2
    prompt, token = torch.arange(length // 64) * 64, torch.tensor([length - 9])
    for begin, queries, near in ((prompt, torch.full_like(prompt, 64), 128), (token, torch.tensor([1]), 64)):
        drawn = drawing.fine(begin, queries, heads, density, near, seed)
        read = seen = 0
        for i, (first, count) in enumerate(zip(begin.tolist(), queries.tolist(), strict=True)):
            read += sum(_read(drawn.arrays, i, h, first, count, length).sum() for h in range(heads))
            seen += heads * int(sum(first + j + 1 for j in range(count)))
        assert drawn.density == pytest.approx(read / seen, rel=1e-6)
        assert abs(drawn.density - density) < 0.12


def test_the_block_mask_is_the_list(drawing: Any, seed: int) -> None:
    length, heads, group = 2048, 2, 2
    drawn = drawing.coarse(length, heads, 0.4, 256, seed, "cpu")
    blocks = drawing.block_mask(drawn, length, group).to_dense()[0].bool().numpy()
    whole = blocks.repeat(128, 1).repeat(128, 2) & np.tri(length, dtype=bool)
    read = 0
    for h in range(heads):
        own = np.concatenate([_read(drawn.arrays, i, h, 64 * i, 64, length) for i in range(length // 64)])
        for g in range(group):
            np.testing.assert_array_equal(whole[h * group + g], own)
        read += own.sum()
    assert drawn.density == pytest.approx(read / heads / np.tri(length).sum(), rel=1e-6)
    assert 0.3 < drawn.density < 0.5


# the section of docs/performance.md -----------------------------------------------------------------------------------
@pytest.mark.sweep  # a whole benchmark
def test_a_result_becomes_tables(report: Any, result: dict[str, Any]) -> None:
    made = report.section([result])
    assert report.NO_CARD not in made
    for part in result["parts"]:
        for table in part["tables"]:
            assert f"#### {table['title']}\n" in made
    result = result | {"card": {"name": "X", "arch": "sm_90"}}
    sampled = [
        p | {"clocks": [{"sm_mhz": 1500, "watts": 300.5}, {"sm_mhz": 1980, "watts": 650}]} for p in result["parts"]
    ]
    assert "the card had 1500 to 1980 MHz, 300 to 650 W." in report.section([result | {"parts": sampled}])
    lines = [line for line in report.section([result]).splitlines() if line.startswith("|")]
    assert len(lines) > 50
    assert report.section([]) == report.NO_CARD

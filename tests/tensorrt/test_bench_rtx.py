"""`benchmarks/rtx.py` without a card: a dry run through all of it, what it computes, and the section that it writes.

Draws: the numbers are only carried along; what is checked does not depend on them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import rtx_made_up
from bench_scripts import assert_no_card_is_reported, assert_no_time_is_reported

from transom.contract import Device
from transom_tensorrt import TensorRt
from transom_tensorrt.network import MODEL_FILE
from transom_tensorrt.probing import EMULATE

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "rtx.py"
PARTS = ["card", "fidelity", "build", "dense", "sparse", "cold"]
CPU = Device("cpu", "cpu", "x86_64", 8 << 30, identity="some CPU", cores=2)


def started(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ, **environment}
    )  # fmt: skip


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("rtx")
    scratch = tmp_path_factory.mktemp("scratch")
    done = started("--dry-run", "--scratch", str(scratch), "--out", str(folder / "rtx-{card}.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(scratch.iterdir()), "engines go with the run"
    (written,) = folder.iterdir()
    assert "{" not in written.name, "the card's name is in the file's"
    found: dict[str, Any] = json.loads(written.read_text())
    return found


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark's modules."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import shaped
    from parts import report, running, timing
    from rtx_parts import bench, building, card, children, decoders, decoding, depths

    return SimpleNamespace(
        bench=bench, building=building, card=card, children=children, decoders=decoders, decoding=decoding,
        depths=depths, report=report, running=running, shaped=shaped, timing=timing,
    )  # fmt: skip


def bench_for(parts: Any, folder: Path, card: Any = None, limit: float = 60.0) -> Any:
    card = card or parts.card.RtxCard(CPU, True)
    about = parts.report.Document("rtx", card.describe(), {}, card.dry, [], parts=[parts.report.PartReport("some")])
    return parts.bench.RtxBench(card, parts.timing.Clock(limit), about, 0, parts.bench.TOY, PARTS, folder)


def rows(result: dict[str, Any], part: str) -> list[dict[str, Any]]:
    (found,) = (p for p in result["parts"] if p["name"] == part)
    return [row for table in found["tables"] for row in table["rows"]]


# a dry run ------------------------------------------------------------------------------------------------------------
@pytest.mark.sweep  # a whole benchmark
def test_every_part_runs_without_a_card(result: dict[str, Any]) -> None:
    assert [(p["name"], p["state"]) for p in result["parts"]] == [(name, "done") for name in PARTS]
    assert (result["script"], result["dry"], result["status"]) == ("rtx", True, 0)
    assert result["card"]["arch"] == "emulated"
    assert {"python", "tensorrt-rtx", "onnxruntime", "transom"} <= set(result["versions"])
    assert set(result["bounds"]) == {"copy_bytes_per_second"}


@pytest.mark.sweep  # a whole benchmark
def test_numbers_are_checked_in_every_precision(result: dict[str, Any]) -> None:
    assert {c["outcome"] for c in result["checks"]} == {"passed"}
    found = rows(result, "fidelity")
    tiny = {r["precision"]: r for r in found if r["model"] == "tiny"}
    assert set(tiny) == {"f16", "fp8", "int8", "int4", "auto"}
    assert tiny["f16"]["KL"] < tiny["int8"]["KL"] < tiny["int4"]["KL"] < 1
    assert tiny["auto"]["note"] == "the engine of fp8"
    assert any(r["model"] == "SmolLM2-135M" and r["correlation"] > 0.99 for r in found)


@pytest.mark.sweep  # a whole benchmark
def test_fp8_stands_beside_float16_at_every_depth(result: dict[str, Any]) -> None:
    found = [r for r in rows(result, "dense") if "ms" in r]
    assert {(r["weights"], r["layers"]) for r in found} == {(w, n) for w in ("f16", "fp8") for n in (1, 2, 4)}
    assert all(r["of the bound"] and r["MB read"] for r in found)
    assert {(r["weights"], r["layers"]) for r in rows(result, "dense") if "s" in r} == {
        (w, n) for w in ("f16", "fp8") for n in (1, 2, 4)
    }
    assert sum("times as long" in r.get("note", "") for r in rows(result, "dense")) == 2


@pytest.mark.sweep  # a whole benchmark
def test_the_whole_model_is_computed_and_the_arithmetic_is_shown(result: dict[str, Any]) -> None:
    (one, two, four) = (
        next(r for r in rows(result, "dense") if "ms" in r and (r["weights"], r["layers"]) == ("fp8", n))
        for n in (1, 2, 4)
    )
    layer = two["ms"] - one["ms"]
    assert four["ms"] == pytest.approx(one["ms"] + 3 * layer, rel=1e-6)
    assert four["MB read"] == pytest.approx(one["MB read"] + 3 * (two["MB read"] - one["MB read"]), rel=1e-6)
    assert four["note"].startswith("computed: ")
    assert "of matrices" in four["note"]
    assert four["times 28"] == pytest.approx(four["tokens per s"] / 28)
    assert four["times 84"] == pytest.approx(four["tokens per s"] / 84)
    assert not any("times 28" in r for r in (one, two)), "only the whole model is held against the marks"


@pytest.mark.sweep  # a whole benchmark
def test_sparse_attention_and_batches_stand_beside_dense(result: dict[str, Any]) -> None:
    found = [r for r in rows(result, "sparse") if "ms" in r]
    ways = {(r["attention"], r["sequences"]) for r in found}
    assert ways == {("dense", 1), ("dense", 2), ("sparse", 1)}
    assert all({r["layers"] for r in found if (r["attention"], r["sequences"]) == way} == {1, 2, 4} for way in ways)


@pytest.mark.sweep  # a whole benchmark
def test_cold_starts_are_without_and_with_kernels(result: dict[str, Any]) -> None:
    found = rows(result, "cold")
    assert [r["kernels"] for r in found] == ["compiled", "kept"]
    assert all(r["whole s"] == pytest.approx(r["imports s"] + r["load s"] + r["first token s"]) for r in found)


def test_a_missing_card_is_reported_in_one_sentence(tmp_path: Path) -> None:
    done = started("--out", str(tmp_path / "out.json"), CUDA_VISIBLE_DEVICES="", TRANSOM_TENSORRT_EMULATE="1")
    assert_no_card_is_reported(done, tmp_path)


def test_a_time_limit_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    done = started("--dry-run", "--limit", "0", "--out", str(path))
    assert_no_time_is_reported(done, path)


@pytest.mark.parametrize("layers", [["4"], ["4", "4"], ["0", "4"]])
def test_one_depth_is_not_enough(layers: list[str]) -> None:
    done = started("--dry-run", "--layers", *layers)
    assert done.returncode == 2
    assert "two or more different depths" in done.stderr


# what is built --------------------------------------------------------------------------------------------------------
def test_a_drawn_model_is_the_network_that_rounding_gives(
    parts: Any, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    monkeypatch.setenv(EMULATE, "1")

    def network(form: str, **options: Any) -> list[tuple[str, tuple[Any, ...]]]:
        graph = parts.decoders.shaped("tiny", 2, 128, form)
        given = {"precision": "f16", "context": None, "threads": None, "calibration": (), **options}
        path = TensorRt().compile(graph, CPU, given, lambda stage, share: None).files[MODEL_FILE]
        model = ir.load(str(path))
        return [(n.op_type, tuple((v.dtype, v.shape) for v in n.inputs if v is not None)) for n in model.graph]

    text = rng.integers(0, 1024, 32).tolist()
    assert network("fp8") == network("f16", precision="fp8", calibration=[text])
    assert network("fp8") != network("f16")


def test_drawn_models_are_of_any_depth_and_share_one_table_of_numbers(parts: Any) -> None:
    from transom.graph.weights import dequantize

    for layers, found in ((None, 2), (3, 3)):
        assert len(parts.shaped.decoder("tiny", 128, "float16", layers).decoder.layers) == found
    assert len(parts.decoders.shaped("tiny", 3, 128, "fp8").decoder.layers) == 3
    numbers = parts.shaped.table()
    assert parts.decoders.table() is numbers
    first = dequantize(parts.shaped.DrawnWeights(None, "float32", 0).matrix(2, 4))
    np.testing.assert_array_equal(first.ravel(), numbers[-parts.shaped.STRIDE :][:8] / 2)


def test_drawn_matrices_are_as_large_as_rounded_ones(parts: Any) -> None:
    from transom.graph.weights import dense, dequantize

    weight = dense(np.zeros((96, 64), np.float32))
    for make in (parts.decoders.drawn_float8, parts.decoders.drawn_int8, parts.decoders.drawn_float16):
        drawn = make(weight, 3)
        assert drawn.shape == weight.shape
        numbers = dequantize(drawn)
        assert numbers.std() == pytest.approx(64**-0.5, rel=0.05)
        assert not np.array_equal(numbers, dequantize(make(weight, 4)))


def test_only_what_the_parts_need_is_built(parts: Any) -> None:
    sizes, models = parts.bench.RtxSizes(), parts.bench.models
    assert [m.name for m in models(sizes, ["dense"])] == ["fp8-2", "fp8-6", "f16-2", "f16-6"]
    assert [m.name for m in models(sizes, ["sparse"])] == ["fp8-2", "fp8-6", "fp8-2-sparse", "fp8-6-sparse"]
    assert [m.name for m in models(sizes, ["cold"])] == ["fp8-6"]
    assert models(sizes, ["fidelity"]) == []


def test_a_build_that_fails_leaves_the_others(parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_for(parts, tmp_path)

    def ask(bench: Any, what: str, *, model: dict[str, Any], **more: Any) -> dict[str, Any]:
        if model["form"] == "f16":
            raise RuntimeError("the process ended with status -6: aborted")
        return {"seconds": 1.0, "bytes": 10, "peak": 10, "notes": []}

    monkeypatch.setattr(parts.building, "ask", ask)
    parts.building.run(bench)
    assert {m.form for m in bench.built} == {"fp8"}
    assert [(c["name"], c["outcome"]) for c in bench.document.checks] == [
        ("build f16-1", "failed"), ("build f16-2", "failed"),
    ]  # fmt: skip
    assert parts.running.status_of(bench.document) == parts.running.WRONG


def test_a_disk_that_is_too_small_is_reported(parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_for(parts, tmp_path)
    monkeypatch.setattr(parts.building.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    parts.building.run(bench)
    assert not bench.built
    assert all("--scratch" in row["note"] for row in bench.part.tables[0].rows)


# children -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def child(parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a text the script of children."""

    def write(text: str) -> None:
        path = tmp_path / "child.py"
        path.write_text(text)
        monkeypatch.setattr(parts.children, "SCRIPT", path)

    return write


def test_a_child_process_gets_a_request_and_returns_a_result(parts: Any, tmp_path: Path, child: Any) -> None:
    child("import sys; print('words'); print('RESULT ' + sys.argv[3])")
    found = parts.children.ask(bench_for(parts, tmp_path), "build", folder=tmp_path / "a")
    assert found == {"dry": True, "folder": str(tmp_path / "a")}


def test_the_last_output_of_a_failed_child_is_reported(parts: Any, tmp_path: Path, child: Any) -> None:
    child("import sys; sys.exit('no memory left')")
    with pytest.raises(RuntimeError, match="status 1: no memory left"):
        parts.children.ask(bench_for(parts, tmp_path), "build")


def test_an_error_in_a_child_is_reported_with_its_cause(
    parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(EMULATE, "1")
    nowhere = {"form": "f16", "layers": 1, "sparse": False}
    with pytest.raises(RuntimeError, match="OptionError: The sparsity policy has the unknown key 'nothing'"):
        parts.children.ask(
            bench_for(parts, tmp_path), "build", model=nowhere, shape="tiny", context=64, folder=tmp_path / "a",
            policy={"nothing": 1},
        )  # fmt: skip


def test_a_child_that_exceeds_its_time_is_killed(parts: Any, tmp_path: Path, child: Any) -> None:
    child("import time; time.sleep(1000)")
    bench = bench_for(parts, tmp_path, limit=0.2)
    with pytest.raises(parts.timing.OutOfTime):
        parts.children.ask(bench, "build")
    assert bench.child is None


def test_an_interrupted_run_kills_its_child_and_removes_its_folder(parts: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    bench = bench_for(parts, folder)
    bench.child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], text=True)
    bench.abandon()
    assert bench.child.wait(timeout=60) < 0
    assert not folder.exists()


# arithmetic -----------------------------------------------------------------------------------------------------------
def test_layers_are_told_apart_from_the_rest(parts: Any) -> None:
    found = parts.depths.separate({2: 0.7, 6: 1.9})
    assert (found.layer, found.rest) == (pytest.approx(0.3), pytest.approx(0.1))
    assert found.of(32) == pytest.approx(9.7)
    assert found.arithmetic(32, 1e3, "ms") == "computed: 100 ms + 32 layers x 300 ms"
    assert parts.depths.separate({1: 2.0, 2: 3.0, 3: 4.0}).of(10) == pytest.approx(11.0)
    with pytest.raises(ValueError, match="cannot be separated"):
        parts.depths.separate({2: 1.0})


def test_bytes_of_a_step_are_those_of_an_8b_model(parts: Any, tmp_path: Path) -> None:
    bench = bench_for(parts, tmp_path)
    bench.sizes = parts.bench.RtxSizes()
    Model, Way = parts.bench.BenchModel, parts.decoding.TimedWay
    layer, head = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096, 128256 * 4096
    cache = 16384 * 2 * 2 * 8 * 128
    plain = parts.decoding.read_by(bench, Way(Model("f16", 32)))
    assert plain.total == 2 * (32 * layer + head) + 32 * cache
    rounded = parts.decoding.read_by(bench, Way(Model("fp8", 32), 8))
    scales = 32 * 4 * (3 * 4096 + 2 * 1024 + 2 * 14336) + 2 * 128256
    assert rounded.total == 32 * layer + head + scales + 8 * 32 * cache
    assert "8 x 16384 x 131072 bytes of keys and values" in rounded.arithmetic()
    sparse = parts.decoding.read_by(bench, Way(Model("fp8", 32, sparse=True)))
    assert sparse.keys == 64 * 16 + 64 + 128, "chosen units, the first block, the nearest two"
    assert sparse.nodes == 32 * 8 * 128 * 2 * 4 * (16384 + 64 + 64) // 8


def test_models_share_the_card_as_far_as_they_fit(parts: Any) -> None:
    Model, groups = parts.bench.BenchModel, parts.decoding.groups
    needs = {Model(form, n): n for n in (2, 6) for form in ("f16", "fp8")}
    every, pairs = list(needs), [[Model("f16", n), Model("fp8", n)] for n in (2, 6)]
    assert groups(needs, 16) == [every]
    assert groups(needs, 15) == pairs
    assert groups(needs, 12) == pairs
    assert groups(needs, 11) == [[model] for model in every]
    assert groups({}, 11) == []


class Session:
    """Holds states in so many slots, and counts what it does.

    Args:
        slots: that there are.
    """

    def __init__(self, slots: int) -> None:
        self.slots, self.steps, self.closed = slots, [], False  # type: ignore[var-annotated]
        self.limits = SimpleNamespace(max_tokens=100)

    def pages(self) -> tuple[int, int]:
        return self.slots, self.slots

    def new_state(self) -> Any:
        return State(0)

    def step(self, work: Any) -> list[Any]:
        self.steps.append(([w.state.length for w in work], [len(w.tokens) for w in work], work[0].logits))
        for w in work:
            w.state.length += len(w.tokens)
        return [None if w.logits == "none" else np.arange(7.0) for w in work]

    def close(self) -> None:
        self.closed = True


class State:
    def __init__(self, length: int) -> None:
        self.length = length

    def fork(self, length: int) -> State:
        return State(length)

    def truncate(self, length: int) -> None:
        self.length = length

    def free(self) -> None:
        self.length = -1


@pytest.mark.parametrize("room", [2, 3])
def test_prompts_are_read_in_chunks_and_every_step_follows_the_same_tokens(
    parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    bench, session = bench_for(parts, tmp_path), Session(room)
    model = parts.bench.BenchModel("fp8", 1)
    one, two = parts.decoding.TimedWay(model), parts.decoding.TimedWay(model, 2)
    bench.built[model] = tmp_path
    monkeypatch.setattr(parts.decoding, "_need", lambda folder, count: 1)
    monkeypatch.setattr(parts.decoding, "load", lambda folder, device, slots: session)
    found: Any = {}
    parts.decoding.measure(bench, [one, two], found)
    assert session.closed
    tokens, rounds, decodes = bench.sizes.tokens, bench.sizes.rounds, bench.sizes.decodes
    chunks = [([0], [100], "none"), ([100], [tokens - 100], "last")]
    assert session.steps[: 2 * (rounds + 1)] == chunks * (rounds + 1)
    steps = [lengths for lengths, _, _ in session.steps[2 * (rounds + 1) :]]
    assert all(set(lengths) <= set(range(tokens, tokens + decodes)) for lengths in steps)
    assert len(found[one].prompts) == rounds
    assert len(found[one].steps) == rounds * decodes, "the first round does not count"
    assert (two in found) == (room == 3), "a fork is copied while the prompt's own cache is still there"
    left_out = [c["name"] for c in bench.document.checks if c["outcome"] == "left out"]
    assert left_out == ([] if room == 3 else ["2 sequences of fp8-1"])
    assert parts.running.status_of(bench.document) != parts.running.WRONG


# the card -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def cuda(parts: Any, monkeypatch: pytest.MonkeyPatch) -> rtx_made_up.Cuda:
    """A card that is made up, and that the probe shows."""
    made = rtx_made_up.Cuda(memory=1 << 24)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", made)  # type: ignore[arg-type]
    monkeypatch.setattr(parts.card.hardware, "probe_devices", lambda: (CPU, rtx_made_up.CARD))
    return made


def test_the_bandwidth_is_that_of_copies_on_the_card(parts: Any, tmp_path: Path, cuda: rtx_made_up.Cuda) -> None:
    bench = bench_for(parts, tmp_path, parts.card.here(False))
    parts.card.run(bench)
    (row,) = bench.part.tables[0].rows
    assert bench.document.bounds["copy_bytes_per_second"] == pytest.approx(row["GB per s"] * 1e9)
    copies = cuda.named("cudaMemcpyAsync")
    assert len(copies) == parts.card.COPIES * (parts.card.ROUNDS + 1)
    assert {call[3:5] for call in copies} == {(1 << 16, "across")}
    assert not cuda.blocks, "the memory is given back"


def test_a_card_that_cuda_hides_is_not_used(parts: Any, cuda: rtx_made_up.Cuda) -> None:
    assert parts.card.here(False).device == rtx_made_up.CARD
    cuda.failing["cudaDeviceGetByPCIBusId"] = rtx_made_up.Status.LAUNCH_FAILED
    with pytest.raises(parts.card.NoCard, match="CUDA does not show cuda:0"):
        parts.card.here(False)


# the section of docs/performance.md -----------------------------------------------------------------------------------
@pytest.mark.sweep  # a whole benchmark
def test_a_result_becomes_tables_in_its_own_section(parts: Any, result: dict[str, Any]) -> None:
    section = parts.report.section([result])
    assert parts.report.NO_CARD not in section
    for part in result["parts"]:
        for table in part["tables"]:
            assert f"#### {table['title']}\n" in section
    assert "Copying on the card reaches" in section

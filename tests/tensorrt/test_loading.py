"""Opening artifacts: damaged files, where an artifact runs, and the context of a session.

Draws: float16 agrees to 3e-2, tens of times its rounding.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rtx_made_up import CARD, Cuda, Trt
from rtx_networks import CPU, Compiled, compiled

from transom.contract import Artifact, Work
from transom.errors import DoesNotFit, EngineError
from transom.preparation.reference_outputs import reference_logits
from transom_tensorrt import emulating, loading
from transom_tensorrt.loading import MOST_SLOTS, load_artifact
from transom_tensorrt.network import CHUNK, DECODER_FILE, ENGINE_FILE, NETWORK_FILE


@pytest.fixture
def made(rng: np.random.Generator, tmp_path: Path) -> Compiled:
    return compiled(rng, tmp_path / "model")


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Trt:
    """A made-up TensorRT and its card in place of the real ones."""
    made_up = Trt(Cuda())
    imported = importlib.import_module
    modules: dict[str, Any] = {"cuda.bindings.runtime": made_up.cuda, "tensorrt_rtx": made_up, "tensorrt": made_up}
    monkeypatch.setattr(importlib, "import_module", lambda name: modules.get(name) or imported(name))
    return made_up


def test_an_emulated_session_says_what_it_holds(made: Compiled, tmp_path: Path) -> None:
    session = load_artifact(made.artifact(), CPU, {"context": 64, "threads": 1}, tmp_path)
    limits = session.limits
    assert (limits.context, limits.page_tokens, limits.max_tokens) == (64, 64, CHUNK)
    assert session.pages() == (emulating.SLOTS, emulating.SLOTS)
    assert limits.max_sequences == emulating.SLOTS
    session.close()


@pytest.mark.parametrize(("asked", "expected"), [(40, 40), (64, 64), (1000, 64), (None, 64)])
def test_a_session_has_the_context_asked_for_and_no_more_than_the_network(
    made: Compiled, tmp_path: Path, asked: int | None, expected: int
) -> None:
    session = load_artifact(made.artifact(), CPU, {"context": asked}, tmp_path)
    assert session.limits.context == expected
    assert session.limits.page_tokens == 64
    session.close()


@pytest.mark.parametrize("name", [NETWORK_FILE, DECODER_FILE])
@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_damaged_files_are_errors(made: Compiled, tmp_path: Path, name: str, damage: str) -> None:
    path = made.files[name]
    if damage == "missing":
        path.unlink()
    else:
        path.write_text("[1, 2]" if damage == "other" else path.read_text()[:40])
    with pytest.raises(EngineError, match="damaged") as error:
        load_artifact(made.artifact(), CPU, {}, tmp_path)
    assert "transom cache clear" in error.value.fix


@pytest.mark.parametrize("sdk", ["tensorrt-rtx 1.7.1.116", "tensorrt 10.15.1"])
def test_on_a_card_a_session_computes_what_the_reference_does(
    rng: np.random.Generator, made: Compiled, tmp_path: Path, trt: Trt, sdk: str
) -> None:
    session = load_artifact(made.on_card(sdk), CARD, {"context": 64}, tmp_path)
    assert session.pages() == (MOST_SLOTS, MOST_SLOTS)
    text = rng.integers(0, made.network.vocabulary, 20).tolist()
    a, b = session.new_state(), session.new_state()
    session.step([Work(a, text[:18], "none"), Work(b, text[:3], "none")])
    got = session.step([Work(a, text[18:19]), Work(b, text[3:4])])
    twin = a.fork(10)
    (last,) = session.step([Work(twin, text[10:12])])
    for row, length in ((got[0], 19), (got[1], 4), (last, 12)):
        np.testing.assert_allclose(row, reference_logits(made.graph, text[:length])[-1], atol=3e-2, rtol=3e-2)
    copied = {call[4] for call in trt.cuda.named("cudaMemcpyAsync")}
    assert copied == {"up", "down"}
    assert {call[7] for call in trt.cuda.named("cudaMemcpy2DAsync")} == {"across"}, "no cache went to the host"
    session.close()
    assert not trt.cuda.blocks


@pytest.mark.parametrize(
    ("sdk", "file"), [("onnxruntime", ENGINE_FILE), ("", ENGINE_FILE), ("tensorrt-rtx 1", "other")]
)
def test_an_artifact_without_an_engine_is_damaged(
    made: Compiled, tmp_path: Path, trt: Trt, sdk: str, file: str
) -> None:
    files = dict(made.on_card().files)
    files[file] = files.pop(ENGINE_FILE)
    with pytest.raises(EngineError, match="has no engine"):
        load_artifact(Artifact(files, {"sdk": sdk}), CARD, {}, tmp_path)


@pytest.mark.parametrize("why", ["engine", "slots", "session"])
def test_a_load_that_fails_gives_the_cards_memory_back(
    made: Compiled, tmp_path: Path, trt: Trt, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    error: type[Exception] = EngineError
    if why == "engine":
        trt.refusing = "context"
    elif why == "slots":
        error = DoesNotFit
        monkeypatch.setattr("transom_tensorrt.rtx.SHARE", 0.0)
    else:
        error = ValueError
        monkeypatch.setattr(loading, "MOST_SLOTS", 2)
        monkeypatch.setattr("transom_tensorrt.engine.SlotEngine.bind_pages", lambda self, pages: int("no"))
    with pytest.raises(error):
        load_artifact(made.on_card(), CARD, {}, tmp_path)
    assert not trt.cuda.blocks
    assert trt.cuda.calls[-1][0] == "cudaStreamDestroy"

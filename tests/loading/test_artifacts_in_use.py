"""Compiled models in the cache: reused, rebuilt, refused, damaged, or impossible to keep.

Draws: float32 sums in another order differ by about 1e-6 of their size; the tolerances are ten times that or more.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import byte_llama
import numpy as np
import pytest
from load_fixtures import fill_disk
from made_up import CPU, MadeUp

from transom.contract import Cancelled
from transom.errors import CacheError, EngineError

Log = pytest.LogCaptureFixture


def compiles(backend: MadeUp) -> int:
    return backend.calls.count("compile")


def test_context_and_threads_may_change_without_compiling_again(here: Any) -> None:
    sound = MadeUp("sound")
    here.use(sound)
    for options in ({}, {"context": 100}, {"context": 50, "threads": 1}, {}):
        with here.load(**options) as model:
            assert model.context == options.get("context", byte_llama.CONTEXT)
        assert sound.loaded_with["context"] == model.context
        assert sound.loaded_with["threads"] == options.get("threads")
    assert compiles(sound) == 1


def test_another_precision_is_another_artifact(here: Any) -> None:
    sound = MadeUp("sound")
    here.use(sound)
    here.load().close()
    here.load(precision="f32").close()
    here.load().close()
    assert compiles(sound) == 2


def test_an_artifact_bound_to_its_context_is_rebuilt_for_another(here: Any, caplog: Log) -> None:
    bound = MadeUp("bound", "bound")
    here.use(bound)
    for count, options in ((1, {"context": 100}), (1, {"context": 100}), (2, {"context": 50}), (3, {}), (3, {})):
        with here.load(**options) as model:
            assert model.context == options.get("context", byte_llama.CONTEXT)
        assert bound.loaded_with["context"] == model.context
        assert compiles(bound) == count
    assert [r.message for r in caplog.records if "context=100, and 50 is wanted" in r.getMessage()]


def test_an_artifact_bound_to_its_threads_is_rebuilt_for_others(here: Any) -> None:
    bound = MadeUp("bound", "bound:threads")
    here.use(bound)
    for count, options in ((1, {}), (1, {"context": 50}), (2, {"threads": 1}), (2, {"threads": 1}), (3, {})):
        here.load(**options).close()
        assert bound.loaded_with["threads"] == options.get("threads")
        assert compiles(bound) == count


def test_an_artifact_bound_to_a_context_that_auto_cut_is_kept_while_it_fits(here: Any) -> None:
    bound = MadeUp("bound", "bound", band="fallback", why="made up")
    contexts = []
    for free in [here.needed(context) for context in (400, 470, 300)]:
        here.use(bound, devices=[replace(CPU, free_bytes=free)])
        with here.load(backend="bound") as model:
            contexts.append(model.context)
            assert bound.loaded_with["context"] == model.context
    assert contexts == [384, 384, 256]
    assert compiles(bound) == 2


@pytest.mark.parametrize("state", ["ok", "slower", "rebuild", "never", "raise"])
def test_the_backend_s_verdict_on_an_artifact_is_obeyed(here: Any, state: str) -> None:
    backend = MadeUp("judge")
    here.use(backend)
    here.load().close()
    backend.does = f"check:{state}"
    if state in ("ok", "slower"):
        with here.load(backend="judge") as model:
            assert model.report.cache_hit
            assert any("said slower" in w for w in model.report.warnings) == (state == "slower")
        assert compiles(backend) == 1
        return
    with pytest.raises(EngineError) as caught:
        here.load(backend="judge")
    said = {"rebuild": "said rebuild", "never": "said never", "raise": "check fails"}[state]
    assert said in caught.value.cause
    assert compiles(backend) == (2 if state == "rebuild" else 1)
    with here.load() as model:
        assert model.report.backend == "reference"


def test_an_artifact_that_must_be_rebuilt_once_is(here: Any, monkeypatch: pytest.MonkeyPatch, caplog: Log) -> None:
    from transom.contract import Verdict

    backend = MadeUp("judge")
    here.use(backend)
    here.load().close()
    verdicts = [Verdict("rebuild", "the SDK is another one"), Verdict("ok")]
    monkeypatch.setattr(backend, "check", lambda artifact, device: verdicts.pop(0))
    with here.load() as model:
        assert model.report.backend == "judge"
        assert not model.report.cache_hit
    assert compiles(backend) == 2
    assert ["the SDK is another one" in r.getMessage() for r in caplog.records] == [True]


def test_an_artifact_that_cannot_be_loaded_any_more_is_compiled_anew(here: Any) -> None:
    backend = MadeUp("moody")
    here.use(backend)
    here.load().close()
    once = backend.load

    def fail_once(*arguments: Any) -> Any:
        backend.load = once  # type: ignore[method-assign]
        raise OSError("stale")

    backend.load = fail_once  # type: ignore[method-assign]
    with here.load(backend="moody") as model:
        assert not model.report.cache_hit
    assert compiles(backend) == 2


@pytest.mark.parametrize("made_of_it", ["an error", "nothing"])
def test_an_interrupt_that_the_engine_swallows_ends_the_load_and_costs_no_artifact(here: Any, made_of_it: str) -> None:
    backend = MadeUp("native")
    here.use(backend)
    here.load().close()
    sound = backend.load

    def swallow(*arguments: Any) -> Any:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            if made_of_it == "an error":
                raise RuntimeError("KeyboardInterrupt: <EMPTY MESSAGE>") from None
        return sound(*arguments)

    backend.load = swallow  # type: ignore[method-assign]
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        here.load()
    assert signal.getsignal(signal.SIGINT) is handler
    backend.load = sound  # type: ignore[method-assign]
    with here.load() as model:
        assert model.report.cache_hit
    assert compiles(backend) == 1


def test_an_interrupt_that_an_import_swallows_ends_the_load(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def swallow(*arguments: Any) -> Any:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("numpy._core.umath failed to import") from None

    here.use(MadeUp("sound"))
    monkeypatch.setattr("transom.loading.identity.fingerprint_of", swallow)
    with pytest.raises(KeyboardInterrupt):
        here.load()


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
def test_a_damaged_artifact_is_compiled_again_with_one_line_in_the_log(here: Any, caplog: Log, damage: str) -> None:
    backend = MadeUp("sound")
    here.use(backend)
    with here.load() as model:
        wanted = model.logits([1, 2, 3])
    [entry] = (here.cache.root / "artifacts").iterdir()
    data = entry / "files" / "graph.onnx.data"
    if damage == "flip":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 255
        data.write_bytes(content)
        os.utime(data, (1, 1))
    elif damage == "cut":
        data.write_bytes(data.read_bytes()[:-10])
    elif damage == "remove":
        data.unlink()
    else:
        (entry / "manifest.json").write_text("{")
    with here.load() as model:
        assert not model.report.cache_hit
        np.testing.assert_allclose(model.logits([1, 2, 3]), wanted, atol=1e-6)
        assert model.report.warnings == ()
    assert compiles(backend) == 2
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
    with here.load() as model:
        assert model.report.cache_hit


def test_a_damaged_source_entry_is_read_again(here: Any) -> None:
    backend = MadeUp("sound")
    here.use(backend)
    here.load().close()
    for entry in (here.cache.root / "sources").iterdir():
        (entry / "files" / "tokenizer.json").write_text("{}")
    with here.load() as model:
        assert model.tokenize("a")
    assert compiles(backend) == 1


def test_a_model_file_that_changes_on_the_disk_is_compiled_again(here: Any, tmp_path: Path, rng: Any) -> None:
    backend = MadeUp("sound")
    here.use(backend)
    path = byte_llama.write_gguf(tmp_path / "model.gguf", rng)
    with here.load(path) as model:
        before = model.logits([5])
    os.utime(path)  # the same content
    here.load(path).close()
    assert compiles(backend) == 1
    byte_llama.write_gguf(path, rng)
    with here.load(path) as model:
        assert not model.report.cache_hit
        assert np.abs(model.logits([5]) - before).max() > 0.1
    assert compiles(backend) == 2
    shutil.move(path, tmp_path / "moved.gguf")  # known by its content, not by its name
    with here.load(tmp_path / "moved.gguf") as model:
        assert model.report.cache_hit


def test_a_cancelled_compile_leaves_nothing_half_done(here: Any) -> None:
    backend = MadeUp("sound")
    here.use(backend)

    def stop(stage: str, share: float | None) -> None:
        if stage == "compile":
            raise Cancelled

    with pytest.raises(Cancelled):
        here.load(progress=stop)
    assert list((here.cache.root / "building").iterdir()) == []
    assert not list((here.cache.root / "artifacts").glob("*"))
    with here.load() as model:
        assert model.report.backend == "sound"
        assert not model.report.warnings


def test_stages_are_reported_as_they_begin(here: Any) -> None:
    seen: list[str] = []
    here.use(MadeUp("sound"))
    here.load(progress=lambda stage, share: seen.append(stage)).close()
    order = list(dict.fromkeys(seen))
    assert order.index("read") < order.index("compile") < order.index("reference") < order.index("check")


# a cache that cannot keep anything ------------------------------------------------------------------------------------


def warnings_about(cache: Any, model: Any, log: Log) -> set[str]:
    """What is said of the cache: in the report, and in the log, which the command line shows too."""
    said = [*model.report.warnings, *(r.getMessage() for r in log.records if r.levelno >= logging.WARNING)]
    return {text for text in said if str(cache.root) in text}


def test_a_cache_folder_that_cannot_be_written_costs_one_warning_and_a_compile(
    here: Any, tmp_path: Path, caplog: Log
) -> None:
    from transom.artifacts import Cache

    (tmp_path / "file").write_text("not a folder")
    backend = MadeUp("sound")
    here.use(backend)
    here.cache = Cache(tmp_path / "file")
    with here.load() as model:
        assert model.report.backend == "sound"
        [warning] = warnings_about(here.cache, model, caplog)
        assert "cannot be written" in warning
        assert "TRANSOM_CACHE" in warning
        assert warning in model.report.warnings
        assert model.generate("Hello", max_new_tokens=2, ignore_eos=True).usage.completion_tokens == 2
    assert compiles(backend) == 1


@pytest.mark.parametrize("room", [0, 10, 3000, 6000])
def test_a_full_disk_costs_one_warning_and_another_compile(
    here: Any, monkeypatch: pytest.MonkeyPatch, caplog: Log, room: int
) -> None:
    here.use(MadeUp("sound"))
    fill_disk(monkeypatch, here.cache.root, room)
    with here.load() as model:
        assert model.report.backend == "sound", str(model.report)
        [warning] = warnings_about(here.cache, model, caplog)
        assert "No space left on device" in warning
        assert "TRANSOM_CACHE" in warning
        assert warning in model.report.warnings
        assert model.generate("Hello", max_new_tokens=2, ignore_eos=True).usage.completion_tokens == 2


def test_the_temporary_cache_goes_when_the_model_is_closed(
    here: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import gc
    import tempfile

    from transom.artifacts import Cache

    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    (tmp_path / "file").write_text("not a folder")
    here.use(MadeUp("sound"))
    here.cache = Cache(tmp_path / "file")
    model = here.load()
    assert os.listdir(folder)
    model.close()
    del model
    here.cache = None
    gc.collect()
    assert os.listdir(folder) == []


def test_no_room_anywhere_is_one_clear_error(here: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here.use(MadeUp("sound"))
    fill_disk(monkeypatch, Path("/"), 0)
    with pytest.raises(CacheError) as caught:
        here.load()
    assert "TRANSOM_CACHE" in caught.value.fix


def test_a_cache_too_small_for_the_model_keeps_what_is_in_use(here: Any, tmp_path: Path) -> None:
    from transom.artifacts import Cache

    here.use(MadeUp("sound"))
    here.cache = Cache(tmp_path / "small", limit=1000)
    with here.load() as model:
        assert model.generate("Hello", max_new_tokens=2, ignore_eos=True).usage.completion_tokens == 2

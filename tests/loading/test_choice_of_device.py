"""The choice between kinds of device by measurement, named devices and backends, and the check of options.

Draws: the numbers are only carried along; what is checked does not depend on them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import byte_llama
import pytest
from made_up import CPU, NPU, MadeUp

import transom
from transom.errors import DoesNotFit, OptionError, SelectionError, SourceError


def two_kinds(here: Any, *, cpu: float = 0.0, npu: float = 0.0, **more: Any) -> None:
    here.use(MadeUp("on_cpu", delay=cpu), MadeUp("on_npu", kind="npu", delay=npu, **more), devices=[CPU, replace(NPU)])


def test_kinds_of_device_are_measured_once_and_the_fastest_is_taken(here: Any) -> None:
    two_kinds(here, cpu=0.03)
    with here.load() as model:
        assert model.report.device.id == "npu:0"
        assert "measured npu:0" in model.report.why.lower()
        assert {"measure cpu", "measure npu:0"} <= set(model.report.startup)
    assert sorted(here.jobs) == ["measure", "measure", "read"]
    here.jobs.clear()
    with here.load() as model:
        assert model.report.device.id == "npu:0"
        assert model.report.cache_hit
    assert here.jobs == []


def test_the_slower_npu_is_left_alone(here: Any) -> None:
    two_kinds(here, npu=0.03)
    with here.load() as model:
        assert model.report.device.id == "cpu"


def test_a_measurement_serves_models_of_about_the_same_size_and_no_others(
    here: Any, tmp_path: Path, rng: Any, monkeypatch: Any
) -> None:
    two_kinds(here, cpu=0.03)
    here.load().close()
    here.jobs.clear()
    other = byte_llama.write_gguf(tmp_path / "other.gguf", rng)
    here.load(other).close()
    assert sorted(here.jobs) == ["prepare", "read"]
    here.jobs.clear()
    monkeypatch.setattr(byte_llama, "INNER", 960)
    here.load(byte_llama.write_gguf(tmp_path / "larger.gguf", rng)).close()
    assert sorted(here.jobs) == ["measure", "measure", "read"]


@pytest.mark.parametrize(
    "change", [{"identity": "another NPU"}, {"drivers": {"npu": "2.0"}}], ids=["another machine", "another driver"]
)
def test_another_machine_or_driver_is_measured_again(here: Any, change: dict[str, Any]) -> None:
    two_kinds(here, cpu=0.03)
    here.load().close()
    here.jobs.clear()
    here.devices[1] = replace(here.devices[1], **change)
    here.load().close()
    assert here.jobs == ["measure"]  # the NPU alone: the CPU is the one that was measured


def test_static_order_is_taken_where_the_environment_asks_for_it(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    two_kinds(here, cpu=0.03)
    monkeypatch.setenv("TRANSOM_AUTO", "static")
    with here.load() as model:
        assert model.report.device.id == "cpu"
    assert here.jobs == ["prepare"]
    monkeypatch.setenv("TRANSOM_AUTO", "statik")
    with pytest.raises(OptionError, match="TRANSOM_AUTO") as caught:
        here.load()
    assert '"static"' in caught.value.fix


@pytest.mark.parametrize("does", ["garbage", "load:raise", "refuse:Gather"])
def test_a_kind_whose_measurement_fails_comes_last(here: Any, does: str) -> None:
    two_kinds(here, does=does)
    with here.load() as model:
        assert model.report.device.id == "cpu"
        assert "npu:0 0.0 tokens/s" in model.report.why
    two_kinds(here, does=does)
    here.jobs.clear()
    with here.load() as model:
        assert model.report.device.id == "cpu"
    # What crashed or computed garbage is remembered; what merely raised may have been a bad day.
    assert here.jobs == (["measure"] if does == "load:raise" else [])


def test_a_named_device_is_not_measured_and_never_falls_back(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    two_kinds(here, does="garbage")
    with pytest.raises(transom.TransomError, match="on_npu does not compute"):
        here.load(device="npu")
    assert here.jobs == ["prepare"]
    monkeypatch.setenv("TRANSOM_DEVICE", "npu:0")
    with pytest.raises(transom.TransomError, match="on_npu does not compute"):
        here.load()
    with here.load(device="cpu") as model:  # the argument comes first
        assert model.report.device.id == "cpu"


def test_a_named_device_leaves_the_choice_among_its_backends(here: Any) -> None:
    here.use(MadeUp("a_shady", "garbage", band="tuned"), MadeUp("b_sound"))
    with here.load(device="cpu") as model:
        assert model.report.backend == "b_sound"


def test_a_named_backend_never_falls_back(here: Any) -> None:
    here.use(MadeUp("shady", "compile:raise"))
    with pytest.raises(transom.TransomError, match="shady failed while compiling"):
        here.load(backend="shady")
    with pytest.raises(SelectionError):
        here.load(backend="shady", device="remote:v100")


@pytest.mark.parametrize(
    ("options", "nearest"),
    [
        ({"contxt": 3}, '"context"'),
        ({"precision": "int9"}, '"int8"'),
        ({"verify": "of"}, '"off"'),
        ({"device": "cpuu"}, '"cpu"'),
        ({"backend": "referense"}, '"reference"'),
        ({"context": 0}, "default"),
        ({"context": True}, "default"),
        ({"threads": -1}, "default"),
        ({"threads": "2"}, "default"),
        ({"context": byte_llama.CONTEXT + 1}, "Ask for less"),
    ],
)
def test_an_option_that_is_not_one_is_refused_with_the_nearest(here: Any, options: Any, nearest: str) -> None:
    with pytest.raises(OptionError) as caught:
        here.load(**options)
    assert nearest in caught.value.fix
    (name,) = options
    assert name in caught.value.cause


def test_a_model_that_does_not_fit_is_refused_with_a_context_that_then_loads(here: Any) -> None:
    import re

    here.use(devices=[replace(CPU, free_bytes=here.needed(300))])
    with pytest.raises(DoesNotFit) as caught:
        here.load(context=byte_llama.CONTEXT)
    found = re.search(r"context=(\d+)", caught.value.fix)
    assert found
    assert 0 < int(found[1]) < byte_llama.CONTEXT
    with here.load(context=int(found[1])) as model:
        assert model.context == int(found[1])
        assert model.generate("Hello", max_new_tokens=2).usage.completion_tokens


def test_auto_cuts_the_context_to_the_memory_that_is_free_and_says_so(here: Any) -> None:
    room = here.needed(400)
    here.use(devices=[replace(CPU, free_bytes=room)])
    with here.load() as model:
        assert model.context == 384  # a multiple of 64
        assert model.report.context == model.context
        assert model.report.model_context == byte_llama.CONTEXT
        assert any(
            f"reduced to {model.context} of the model's {byte_llama.CONTEXT} tokens" in w for w in model.report.warnings
        )
        assert model.report.memory["available"] == room


def test_a_model_that_fits_nowhere_is_reported_as_too_large(here: Any) -> None:
    here.use(MadeUp("sound"), devices=[replace(CPU, free_bytes=1000)])
    with pytest.raises(DoesNotFit, match="needs"):
        here.load()


def test_a_model_that_cannot_be_read_is_no_fault_of_a_backend(here: Any, tmp_path: Path, rng: Any) -> None:
    here.use(MadeUp("sound"))
    with pytest.raises(SourceError, match="There is no"):
        here.load(tmp_path / "missing.gguf")
    bad = byte_llama.write_gguf(tmp_path / "bad.gguf", rng, not_a_number=True)
    with pytest.raises(SourceError, match="NaN") as caught:
        here.load(bad)
    assert "again" in caught.value.fix
    assert here.jobs == ["prepare"]


def test_a_cache_or_progress_of_the_wrong_type_is_refused_with_the_fix(here: Any, tmp_path: Path) -> None:
    for folder in (str(tmp_path), tmp_path):
        with pytest.raises(OptionError, match=r"is not a transom\.Cache") as caught:
            transom.load(here.model, cache=folder)  # type: ignore[arg-type]
        assert f"transom.Cache({str(tmp_path)!r})" in caught.value.fix
    with pytest.raises(OptionError, match="progress=5 cannot be called"):
        transom.load(here.model, progress=5)  # type: ignore[arg-type]


def test_a_cache_may_be_made_of_a_path_as_text(tmp_path: Path) -> None:
    assert transom.Cache(str(tmp_path)).root == tmp_path


@pytest.mark.parametrize("threads", [1, 4, 5, 10_000])
def test_no_more_threads_are_used_than_there_are_cores(here: Any, threads: int) -> None:
    backend = MadeUp("engine")
    here.use(backend, devices=[replace(CPU, cores=4)])
    with here.load(threads=threads, backend="engine", verify="off") as model:
        assert backend.loaded_with["threads"] == min(threads, 4)
        said = [text for text in model.report.warnings if "threads" in text]
    lowered = [f"threads={threads} is more than this process has cores: 4 threads are used"]
    assert said == (lowered if threads > 4 else [])


def test_a_bundle_uses_no_more_threads_than_there_are_cores(here: Any, export: Any) -> None:
    backend = MadeUp("engine")
    here.use(backend, devices=[replace(CPU, cores=4)])
    made = export(verify="off")
    with here.load(made.folder, threads=10_000, verify="off") as model:
        assert backend.loaded_with["threads"] == 4
        assert any("threads=10000" in text for text in model.report.warnings)

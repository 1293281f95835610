"""What host and child process share: runtime identities, keys, jobs as JSON, plugin operators; and failing hooks."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pluggy
import pytest
from made_up import CPU, NPU, MadeUp

from transom.contract import Cancelled, Offer, Specs, hookimpl
from transom.errors import EngineError, SourceError
from transom.loading import machine
from transom.ops import OpSchema, find, registry
from transom.plugins import LoadedBackend, PluginFailure, Plugins, _Plugin
from transom.preparation.cached_source import variant
from transom.preparation.jobs import Job
from transom.preparation.plugin_calls import guarded
from transom.preparation.plugin_operators import register_operators
from transom.selection import Candidate
from transom.signature import Decoder

JOB = Job(
    model="/m.gguf",
    content="c",
    graph="",
    backend="b",
    backend_version="1",
    band="native",
    device=replace(NPU, features=frozenset({"x", "y"}), numa=((0, 1),)),
    options={"context": None, "precision": "auto", "threads": 2},
    cache="/cache",
    cache_limit=None,
    runtime_identity="p",
    verify=True,
)


def test_a_job_crosses_as_json() -> None:
    back = Job.from_payload(json.loads(json.dumps(JOB.to_payload())))
    assert back == JOB
    assert (back.artifact_key, back.failure_key) == (JOB.artifact_key, JOB.failure_key)


@pytest.mark.parametrize(
    "change",
    [
        {"backend": "other"},
        {"backend_version": "2"},
        {"device": replace(JOB.device, features=frozenset({"x"}))},
        {"device": replace(JOB.device, arch="npu_4000")},
        {"options": {**JOB.options, "precision": "f32"}},
    ],
)
def test_what_makes_an_artifact_another_one_changes_its_key(change: Any) -> None:
    assert replace(JOB, **change).artifact_key != JOB.artifact_key


@pytest.mark.parametrize("option", [{"context": 5}, {"threads": 1}])
def test_context_and_threads_leave_the_key_alone(option: Any) -> None:
    assert replace(JOB, options={**JOB.options, **option}).artifact_key == JOB.artifact_key


def test_a_verdict_is_enough_or_not() -> None:
    unchecked = {"checked": False, "ran_only": True}
    off = replace(JOB, verify=False)
    assert JOB.accepts({"checked": True})
    assert JOB.accepts({"checked": False, "reason": "not possible"})
    assert not JOB.accepts(unchecked)
    assert off.accepts(unchecked)
    assert not JOB.accepts(None)
    assert not off.accepts(None)


def test_only_a_context_beyond_the_source_s_own_is_a_variant() -> None:
    decoder = Decoder("phi3", 10, 8, 4096, ())
    assert [variant("c", n, decoder) for n in (None, 1, 4096)] == ["c"] * 3
    assert len({variant("c", n, decoder) for n in (None, 4097, 4098)}) == 3
    assert variant("c", 5000, None) == "c"


def test_a_place_changes_with_hardware_driver_backend_and_version() -> None:
    def place(device: Any = CPU, name: str = "b", version: str = "1", why: str = "why") -> str:
        plugins = Plugins([], [LoadedBackend(MadeUp(name), name, "d", version, name)], [])
        found: Any = None
        return machine.Machine(found, plugins, ()).runtime_identity(
            Candidate(name, device, Offer(device.id, "native", why))
        )

    places = [
        place(),
        place(replace(CPU, identity="another")),
        place(replace(CPU, drivers={"kernel": "7"})),
        place(name="other"),
        place(version="2"),
        place(why="SDK 2"),
    ]
    assert len(set(places)) == len(places)
    assert place(replace(CPU, free_bytes=1, cores=1)) == places[0]


def test_a_hook_that_fails_while_choosing_gives_a_warning(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = PluginFailure("policy", "site-policy", "hook", "transom_choose: KeyError", "pip uninstall site-policy")

    class Moody(Plugins):
        def choose(self, offers: Any) -> None:
            self.failures.append(failure)

    backend = MadeUp("sound")
    plugins = Moody([], [LoadedBackend(backend, "sound", "made-up", "1.0", "sound")], [])
    here.use(backend)
    monkeypatch.setattr(machine, "load_plugins", lambda: plugins)
    with here.load() as model:
        assert any("site-policy" in w for w in model.report.warnings)


# guarding -------------------------------------------------------------------------------------------------------------


def raising(error: BaseException) -> Any:
    def call() -> None:
        raise error

    return call


def test_transom_errors_and_cancelled_pass_unchanged() -> None:
    assert guarded("b", "doing", lambda: 5) == 5
    for error in (SourceError("x"), Cancelled(), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught:
            guarded("b", "doing", raising(error))
        assert caught.value is error


@pytest.mark.parametrize(
    ("error", "said"),
    [(KeyError("k"), "KeyError: 'k'"), (MemoryError(), "MemoryError"), (SystemExit(3), "SystemExit: 3")],
)
def test_anything_else_becomes_a_sentence_that_names_the_backend(error: BaseException, said: str) -> None:
    with pytest.raises(EngineError) as caught:
        guarded("b", "loading this model", raising(error))
    assert caught.value.cause == f"The backend b failed while loading this model: {said}"
    assert "authors of b" in caught.value.fix
    assert caught.value.__cause__ is error


# operators ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@pytest.mark.usefixtures("clean_registry")
def test_a_plugin_s_operators_are_registered_and_a_bad_one_is_recorded() -> None:
    def schema(name: str, **parts: Any) -> OpSchema:
        return OpSchema("com.example", name, 1, "doc", (), (), (), lambda i, a: (np.zeros(1),), **parts)

    whole: Any = {"samples": lambda rng: iter(()), "infer": lambda *a: (), "body": lambda *a: None}
    good, bad = schema("Good", **whole), schema("Bad")

    class Bringing:
        @hookimpl
        def transom_ops(self) -> list[OpSchema]:
            return [bad, good]

    manager = pluggy.PluginManager("transom")
    manager.add_hookspecs(Specs)
    manager.register(Bringing(), "acme")
    plugins = Plugins([_Plugin("acme", "acme-ops", "1.0", manager)], [], [])
    for _ in range(2):
        register_operators(plugins)
    assert find("com.example", "Good") is good
    assert find("com.example", "Bad") is None
    [failure] = plugins.failures
    assert (failure.stage, failure.entry_point, failure.distribution) == ("ops", "acme", "acme-ops")
    assert "com.example::Bad needs a shape rule, a function body" in failure.error

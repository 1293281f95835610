"""Backends that hang while they load a compiled model in the program's own process: given up, remembered, left behind.

The made-up backend loads in the jobs of the child process, which the fixture `here` runs in the main thread, and hangs
in the host's load until the test releases it. A limit of 0 seconds is over at once, and no test waits for another one.
"""

from __future__ import annotations

import _thread
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from made_up import MadeUp

from transom.errors import EngineError
from transom.preparation import plugin_calls

JOIN_SECONDS = 60


class Stuck(MadeUp):
    """Hangs in the host's load until `release` is set. `meanwhile` is called in the thread that hangs."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, **options)
        self.release, self.meanwhile = threading.Event(), lambda: None
        self.threads: list[threading.Thread] = []
        self.closed: list[str] = []

    def load(self, artifact: Any, device: Any, options: Any, scratch: Any) -> Any:
        here = threading.current_thread()
        if here is not threading.main_thread():
            self.threads.append(here)
            self.meanwhile()
            self.release.wait()
        session = super().load(artifact, device, options, scratch)
        close, session.close = session.close, lambda: (self.closed.append(here.name), close())
        return session

    def go_on(self) -> None:
        """Release the loads that hang, and wait for their threads."""
        self.closed.clear()
        self.release.set()
        for thread in [one for one in threading.enumerate() if one.name == "transom-load"]:
            thread.join(JOIN_SECONDS)
            assert not thread.is_alive()
        assert not plugin_calls.loads_run_on()


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    made = Stuck("a_stuck", band="tuned")
    yield made
    made.go_on()


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the time limits of the next loads, in seconds."""

    def use(*seconds: float) -> None:
        left = list(seconds)
        monkeypatch.setattr(plugin_calls, "silence_limit", lambda: left.pop(0))

    return use


def test_a_load_that_hangs_is_set_aside_and_remembered(here: Any, stuck: Stuck, limits: Any) -> None:
    here.use(stuck, MadeUp("b_sound"))
    limits(0.0, math.inf, math.inf)
    said = "a_stuck on cpu was set aside: The backend a_stuck did not finish loading this model on cpu within 0 s"
    with here.load() as model:
        assert (model.report.backend, model.report.warnings) == ("b_sound", (said,))
    with here.load() as model:
        assert (model.report.backend, model.report.warnings) == ("b_sound", (f"{said} (at an earlier load)",))
    assert plugin_calls.loads_run_on()
    stuck.go_on()
    assert len(stuck.threads) == 1
    assert stuck.closed == ["transom-load"], "the session that came too late is open"


def test_a_named_backend_that_hangs_fails_the_load_and_is_not_compiled_again(
    here: Any, stuck: Stuck, limits: Any
) -> None:
    here.use(stuck, MadeUp("b_sound"))
    limits(0.0, 0.0)
    for _ in ("newly compiled", "from the cache"):
        with pytest.raises(EngineError) as caught:
            here.load(backend="a_stuck")
        assert caught.value.cause == "The backend a_stuck did not finish loading this model on cpu within 0 s"
        assert caught.value.fix == "Choose another with backend=…, or set TRANSOM_TIME_LIMIT to more seconds"
    assert stuck.calls.count("compile") == 1


def test_a_bundle_that_hangs_fails_the_load(here: Any, stuck: Stuck, limits: Any, export: Any) -> None:
    here.use(stuck)
    path = export(format="a_stuck").folder
    limits(0.0)
    with pytest.raises(EngineError, match="did not finish loading this model on cpu within 0 s"):
        here.load(path)


@pytest.mark.parametrize("grace", ["no time", "time enough"])
def test_ctrl_c_ends_a_load_and_its_session_is_closed(
    here: Any, stuck: Stuck, limits: Any, monkeypatch: pytest.MonkeyPatch, grace: str
) -> None:
    here.use(stuck)
    limits(math.inf)
    monkeypatch.setattr(plugin_calls, "GRACE_SECONDS", 0.0 if grace == "no time" else math.inf)

    def interrupt() -> None:
        _thread.interrupt_main()  # first, or the load may end before it
        if grace == "time enough":
            stuck.release.set()

    stuck.meanwhile = interrupt
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            here.load()
    finally:
        signal.signal(signal.SIGINT, previous)
    if grace == "no time":
        stuck.go_on()
    assert stuck.closed[-1] == "transom-load"
    assert not plugin_calls.loads_run_on()


def test_an_error_beside_the_load_waits_for_the_session_and_closes_it(here: Any, limits: Any) -> None:
    order: list[str] = []

    class Session:
        def close(self) -> None:
            order.append("closed")

    class Backend:
        name = "sound"
        failed = threading.Event()

        def load(self, *arguments: Any) -> Any:
            self.failed.wait()
            order.append("loaded")
            return Session()

    class Model:
        artifact = scratch = None

    backend: Any = Backend()
    model: Any = Model()

    def text() -> None:
        order.append("failed")
        backend.failed.set()
        raise LookupError("no tokenizer")

    limits(math.inf)
    with pytest.raises(LookupError, match="no tokenizer"):
        plugin_calls.open_session_beside(backend, model, here.devices[0], {}, text)
    assert order == ["failed", "loaded", "closed"]


STUCK = """
import math, threading
import made_up
from transom.preparation import plugin_calls
from transom.cli import main

class Stuck(made_up.MadeUp):
    def load(self, *arguments):
        if self.name == "a_stuck":
            # What a library starts may be no daemon, and then Python waits for it at the end.
            helper = threading.Thread(target=threading.Event().wait)
            helper.start()
            helper.join()
        return super().load(*arguments)

made_up.MadeUp = Stuck
limits = [0.0, math.inf]
plugin_calls.silence_limit = lambda: limits.pop(0)
main(["run", model, "Hello", "--max-tokens", "2", "--verbose"])
"""


def test_the_command_ends_although_a_load_hangs(packages: Any) -> None:
    packages.use({"name": "a_stuck", "band": "tuned"}, {"name": "b_sound", "band": "native"})
    status, _, err = packages.fork(STUCK)
    assert status == 0, err
    assert "a_stuck on cpu was set aside" in " ".join(err.split())
    with suppress(FileNotFoundError):
        assert os.listdir(packages.cache / "running") == []

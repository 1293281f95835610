"""A model in a fork of the process that loaded it: an error at once, whatever the other threads did."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import pytest
from fakes import BYTE_VOCABULARY, FakeSession, loaded

from transom.generation.engine import ModelForked
from transom.generation.model import Model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
SECONDS = 20
"""After which a child that hangs is ended by a signal, and the test fails."""


def in_a_fork(act: Callable[[], object]) -> str:
    """The name of the error that `act` raises in a forked child; empty for none."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - another process
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        raised = ""
        try:
            act()
        except BaseException as error:  # noqa: BLE001 - whatever it is goes to the parent
            raised = type(error).__name__
        finally:
            os.write(writer, raised.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        raised = said.read()
    assert os.waitpid(child, 0)[1] == 0
    return raised


def test_a_model_that_is_idle_cannot_be_used_in_a_fork() -> None:
    with Model(loaded(FakeSession(vocabulary=BYTE_VOCABULARY))) as model:
        wanted = model.generate("ab", max_new_tokens=4).token_ids
        assert in_a_fork(lambda: model.generate("ab", max_new_tokens=4)) == ModelForked.__name__
        assert in_a_fork(model.close) == ""
        assert model.generate("ab", max_new_tokens=4).token_ids == wanted


def test_a_model_that_another_thread_uses_during_the_fork_raises_too() -> None:
    """The child has a copy of a lock, and of a leader, whose thread it does not have."""
    inside, go_on = threading.Event(), threading.Event()
    session = FakeSession(vocabulary=BYTE_VOCABULARY)
    step = session.step

    def slow(work):  # type: ignore[no-untyped-def]
        inside.set()
        go_on.wait(SECONDS)
        return step(work)

    session.step = slow  # type: ignore[method-assign]
    with Model(loaded(session)) as model:
        stream = model.stream("abc", max_new_tokens=2)
        thread = threading.Thread(target=lambda: stream.result)
        thread.start()
        assert inside.wait(SECONDS)
        model._engine._lock.acquire()  # as if the fork came in the middle of what another thread does
        try:
            for act in (lambda: model.generate("ab"), lambda: stream.result, lambda: model.logits("ab")):
                assert in_a_fork(act) == ModelForked.__name__
            assert in_a_fork(model.close) == ""
        finally:
            model._engine._lock.release()
            go_on.set()
            thread.join(SECONDS)
        assert len(stream.result.token_ids) <= 2

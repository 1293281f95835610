"""Generations that are cancelled, interrupted by Ctrl-C or closed end at once and do not affect others."""

from __future__ import annotations

import _thread
import contextlib
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
from engine_drive import alone, read, request, settled
from fakes import FakeSession

from transom.contract import Work
from transom.generation.engine import Engine, ModelClosed
from transom.generation.params import SamplingParams
from transom.generation.requests import Request


def test_cancelling_from_another_thread_takes_one_step() -> None:
    session = FakeSession(context=10_000)
    engine = Engine(session)
    running, steps_at_cancel = threading.Event(), []

    def before(works: Sequence[Work]) -> None:
        running.set()
        time.sleep(0.002)

    session.before = before
    asked = request(session, [1], SamplingParams(), 5000)
    engine.submit(asked)

    def cancel() -> None:
        running.wait()
        time.sleep(0.02)
        engine.cancel(asked)
        steps_at_cancel.append(len(session.steps))

    thread = threading.Thread(target=cancel)
    thread.start()
    read(engine, asked)
    thread.join()
    assert len(session.steps) <= steps_at_cancel[0] + 1
    assert asked.branches[0].finish == "cancelled"
    settled(session, engine)


def test_an_event_that_is_set_cancels_too() -> None:
    session = FakeSession(context=10_000)
    engine = Engine(session)
    stop = threading.Event()
    asked = request(session, [1], SamplingParams(), 5000, cancel=stop)
    engine.submit(asked)
    for _ in range(3):
        engine.next_event(asked)
    stop.set()
    assert read(engine, asked) == [[]]
    settled(session, engine)


def test_cancelling_one_answer_leaves_the_others() -> None:
    session = FakeSession()
    engine = Engine(session)
    params = SamplingParams(temperature=1.0, seed=5, n=3)
    asked = request(session, [4, 5], params, 8)
    engine.submit(asked)
    engine.cancel(asked, branch=0)  # before the prompt is read: another one has to read it
    expected = alone(session, [4, 5], params, 8)
    assert read(engine, asked) == [[], *expected[1:]]
    settled(session, engine)


def test_a_forgotten_request_is_given_up_without_blocking() -> None:
    session = FakeSession()
    engine = Engine(session)
    asked = request(session, [1], SamplingParams(), 8)
    engine.submit(asked)
    engine.next_event(asked)

    def forget() -> None:
        with engine._lock:
            engine.abandon(asked)  # as a finalizer would, in a thread that holds the lock

    thread = threading.Thread(target=forget, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it waits for the lock that its own thread holds"
    assert engine.requests == 1, "nobody may touch the list of requests without the lock"
    other = request(session, [2], SamplingParams(), 3)
    engine.submit(other)
    assert read(engine, other) == alone(session, [2], SamplingParams(), 3)
    assert asked.branches[0].finish == "cancelled"
    assert engine.requests == 0
    settled(session, engine)


@contextlib.contextmanager
def interrupts() -> Any:
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_ctrl_c_in_a_step_ends_the_callers_generation_and_no_other(moment: str) -> None:
    session = FakeSession()
    engine = Engine(session)
    mine, other = request(session, [1, 2], SamplingParams(), 10), request(session, [3, 4], SamplingParams(), 10)
    engine.submit(mine)
    engine.submit(other)
    engine.next_event(mine)

    def interrupt(works: Sequence[Work]) -> None:
        session.before = session.after = None
        raise KeyboardInterrupt

    setattr(session, moment, interrupt)
    with pytest.raises(KeyboardInterrupt):
        read(engine, mine)
    engine.cancel(mine)
    assert read(engine, other) == alone(session, [3, 4], SamplingParams(), 10)
    settled(session, engine)


def endlessly(engine: Engine, asked: Request) -> None:
    while True:
        if engine.next_event(asked) is None:
            time.sleep(1)


def test_ctrl_c_while_waiting_for_another_threads_step_hangs_nobody() -> None:
    session = FakeSession(step_seconds=0.01)
    engine = Engine(session)
    answers: dict[int, Any] = {}
    asked = [request(session, [i], SamplingParams(), 40) for i in range(3)]
    for one in asked:
        engine.submit(one)
    threads = [threading.Thread(target=lambda i=i: answers.update({i: read(engine, asked[i])})) for i in (1, 2)]
    for thread in threads:
        thread.start()
    timer = threading.Timer(0.1, _thread.interrupt_main)
    timer.start()
    with interrupts(), pytest.raises(KeyboardInterrupt):
        endlessly(engine, asked[0])
    engine.cancel(asked[0])
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert answers == {i: alone(session, [i], SamplingParams(), 40) for i in (1, 2)}
    settled(session, engine)


def test_the_lead_passes_on_when_the_one_who_was_to_lead_is_cancelled() -> None:
    session = FakeSession()
    engine = Engine(session)
    asked = [request(session, [i], SamplingParams(), 5) for i in range(2)]
    for one in asked:
        engine.submit(one)
    threads = [threading.Thread(target=read, args=(engine, one)) for one in asked]
    with engine.exclusive():
        for thread in threads:
            thread.start()
        while not all(one.wake for one in asked):
            time.sleep(0.001)
        engine._exclusive += 1  # the end of this block must wake no one
    with engine._lock:
        engine._exclusive -= 1
        engine._hand_over()  # to the first, who is cancelled before it can wake up
        asked[0].cancelled = True
        engine._remove_ended()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert [one.branches[0].finish for one in asked] == ["cancelled", "length"]


def test_closing_ends_running_generations_with_a_clear_error() -> None:
    session = FakeSession(context=100_000, step_seconds=0.001)
    engine = Engine(session)
    errors: list[Exception] = []

    def work(i: int) -> None:
        asked = request(session, [i], SamplingParams(), 90_000)
        try:
            engine.submit(asked)
            read(engine, asked)
        except ModelClosed as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    while len(session.steps) < 5:
        time.sleep(0.001)
    engine.close()
    assert session.closed == 1
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert len(errors) == 4
    assert "closed" in str(errors[0])
    settled(session, engine)
    engine.close()
    assert session.closed == 1
    with pytest.raises(ModelClosed):
        engine.submit(request(session, [1], SamplingParams(), 1))
    with pytest.raises(ModelClosed), engine.exclusive():
        pass

"""The owner of a session: runs the steps of all generations, one at a time, whoever asks.

There is no worker thread. A reader who wants its next event and finds nobody stepping becomes the leader: it plans a
step for every request, runs it, hands out the tokens, and goes on until its own event is there. The others wait and
one of them takes over. A single generation therefore pays for two lock operations and no thread switch.

The leader alone touches the session and its states; the lock guards the list of requests and who leads, and is never
held during a step. Whatever is raised in a step, the session promises that all states are as they were. How far a
branch has come is read from its state, so an interrupted step is simply repeated.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from transom.contract import OutOfPages, Session, State, Work
from transom.contract_optional import SavingSession, SparseSession
from transom.errors import DoesNotFit, EngineError, OptionError, TransomError
from transom.generation.prefixes import Kept, Prefixes
from transom.generation.requests import Branch, Event, Prefilled, Request, Token
from transom.generation.results import FinishReason
from transom.generation.scheduling import Fair, Policy, Slice


class ModelClosed(TransomError):
    """The model was closed before or while it was used."""

    def __init__(self) -> None:
        super().__init__("The model is closed", "Load it again, and close it after its last generation has ended.")


class Engine:
    """Runs requests on a session. Every method may be called from any thread.

    Args:
        session: becomes the engine's own; `close` closes it.
        policy: decides what a step holds.
    """

    def __init__(self, session: Session, policy: Policy | None = None) -> None:
        self._session = session
        self._policy = policy or Fair()
        self._sparse = session if isinstance(session, SparseSession) else None
        self._limits = session.limits
        self.context = _usable_context(session)
        """Tokens that one sequence may have, prompt and answer together."""
        self._prefixes = Prefixes(self._limits.page_tokens, min(self._limits.max_tokens, Fair.chunk), self.context)
        self._lock = threading.Lock()
        self._free = threading.Condition(self._lock)
        """Signalled when nobody leads any more."""
        self._leader: int | None = None
        self._exclusive = 0
        """Callers waiting for the session as a whole."""
        self._requests: list[Request] = []
        self._arrivals = 0
        self._steps = 0
        self._preemptions = 0
        self._closed = self._shut = False
        self._busy = self._led_since = 0.0

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def sparse(self) -> bool:
        """Whether the session obeys a policy for each request, and counts the keys it reads."""
        return self._sparse is not None

    @property
    def saves(self) -> bool:
        """Whether the session can write its states down."""
        return isinstance(self._session, SavingSession)

    @property
    def requests(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    @property
    def preemptions(self) -> int:
        """How often a sequence lost its cache because the pool was full, and was computed again."""
        return self._preemptions

    def submit(self, request: Request) -> None:
        """Queue a request; it runs when somebody calls `next_event` for it or for another one.

        Raises:
            ModelClosed: the engine is closed.
        """
        with self._lock:
            if self._closed:
                raise ModelClosed
            self._arrivals += 1
            request.arrival = self._arrivals
            request.submitted = request.submitted or time.perf_counter()
            self._requests.append(request)

    def next_event(self, request: Request) -> Event | None:
        """The request's next event, driving the session as long as it takes; None when the request has ended.

        Raises:
            TransomError: what ended the request: a failed step, a full pool, a closed model.
        """
        while True:
            if request.events:
                return request.events.popleft()
            if request.done:
                if request.events:
                    continue  # the last event came between the two questions
                if request.error is not None:
                    raise request.error
                return None
            with self._lock:
                if request.events or request.done:
                    continue
                if self._leader is not None or self._exclusive:
                    self._wait(request)
                    continue
                self._take_lead()
            try:
                while not (request.events or request.done or self._exclusive or self._closed):
                    self._advance()
            finally:
                self._release()

    def cancel(self, request: Request, branch: int | None = None) -> None:
        """End a request, or one of its branches, within the running step. Ending it twice does nothing."""
        self._mark(request, branch)
        with self._lock:
            if self._leader is None:
                self._reap()

    def abandon(self, request: Request) -> None:
        """`cancel` that never blocks, for finalizers: these may run while this very thread holds the lock."""
        self._mark(request, None)
        if self._lock.acquire(blocking=False):
            try:
                if self._leader is None:
                    self._reap()
            finally:
                self._lock.release()

    @staticmethod
    def _mark(request: Request, branch: int | None) -> None:
        if branch is None:
            request.cancelled = True
        else:
            request.branches[branch].cancelled = True

    @contextlib.contextmanager
    def exclusive(self, *, keep: bool = False) -> Iterator[Session]:
        """The session for this thread alone, between two steps; generations wait.

        Args:
            keep: leave the caches of ended sequences as they are, and their pages with them.

        Raises:
            ModelClosed: the engine is closed.
        """
        with self._lock:
            self._exclusive += 1
            try:
                while self._leader is not None and not self._closed:
                    self._free.wait()
                if self._closed:
                    raise ModelClosed
                self._take_lead()
            finally:
                self._exclusive -= 1
                if self._leader is None:
                    self._hand_over()
        try:
            if not keep:
                self._prefixes.clear()
            yield self._session
        finally:
            self._release()

    @property
    def kept(self) -> int:
        """Ended sequences whose caches are kept for prompts that begin alike."""
        return len(self._prefixes)

    def save_latest(self) -> tuple[Kept, dict[str, np.ndarray[Any, np.dtype[Any]]]] | None:
        """The sequence that ended last, and what the session holds of it; None where nothing is kept.

        Raises:
            OptionError: the backend cannot write its states down.
            ModelClosed: the engine is closed.
        """
        with self.exclusive(keep=True) as session:
            saving = _saving(session)
            kept = self._prefixes.latest
            return None if kept is None else (kept, {n: np.asarray(a) for n, a in saving.save(kept.state).items()})

    def restore(self, tokens: Sequence[int], sparsity: str | None, arrays: Mapping[str, Any]) -> None:
        """Keep a sequence that was saved, as if it had just ended.

        Raises:
            OptionError: the backend cannot make it again, or these are no arrays of such a sequence.
            DoesNotFit: the cache is too small for it.
            ModelClosed: the engine is closed.
        """
        with self.exclusive() as session:
            saving = _saving(session)
            try:
                state = saving.restore(len(tokens), arrays)
            except OutOfPages as error:
                raise DoesNotFit(
                    f"The saved prompt has {len(tokens)} tokens, and the cache has room for {self.context}",
                    "Load the model with a larger context.",
                ) from error
            except ValueError as error:
                raise OptionError(f"The saved prompt does not fit this model: {error}", "Make it again.") from error
            self._prefixes.keep(tokens, state, sparsity)

    def forget(self) -> None:
        """Give up the caches that are kept of ended sequences.

        Raises:
            ModelClosed: the engine is closed.
        """
        with self.exclusive():
            pass

    def close(self) -> None:
        """Close the session after the running step; requests that have not ended raise ModelClosed. Idempotent."""
        with self._lock:
            self._closed = True
            if self._leader == threading.get_ident():
                return  # closed from within a step: _release does the rest
            while self._leader is not None:
                self._free.wait()
            self._shut_down()

    # Leading: who may touch the session.

    def _take_lead(self) -> None:
        self._leader = threading.get_ident()
        self._led_since = time.perf_counter()

    def _release(self) -> None:
        with self._lock:
            self._busy += time.perf_counter() - self._led_since
            self._leader = None
            if self._closed:
                self._shut_down()
            else:
                self._reap()
            self._free.notify_all()
            self._hand_over()

    def _hand_over(self) -> None:
        """Wake one reader who has nothing to read, to lead. Called whenever the lead may have been left vacant."""
        if self._exclusive:
            return
        for request in self._requests:
            if request.wake is not None and not request.events:
                request.wake.notify()
                return

    def _wait(self, request: Request) -> None:
        request.wake = threading.Condition(self._lock)
        will_lead = False
        try:
            request.wake.wait()
            will_lead = not (request.events or request.done)
        finally:
            request.wake = None
            if self._leader is None and not will_lead:
                self._hand_over()  # woken to lead, but its event came first, or Ctrl-C did

    def _reap(self) -> None:
        """Carry out cancellations and forget what has ended. Needs the lock, and the lead or nobody leading."""
        ended = False
        for request in self._requests:
            whole = request.cancel_requested
            for branch in request.branches:
                if branch.finish is None and (whole or branch.cancelled):
                    self._finish(branch, "cancelled")
                    self._wake(request)
            ended = ended or request.done
        if ended:
            self._requests = [request for request in self._requests if not request.done]

    def _shut_down(self) -> None:
        if self._shut:
            return
        self._shut = True
        for request in self._requests:
            if not request.done:
                self._fail(request, ModelClosed())
            self._wake(request)
        self._requests = []
        self._prefixes.clear()
        self._session.close()

    @staticmethod
    def _wake(request: Request) -> None:
        if request.wake is not None:
            request.wake.notify()

    # Stepping: everything below runs in the leader.

    def _advance(self) -> None:
        """Run one step, or make room for one."""
        with self._lock:
            self._reap()
            branches = [b for request in self._requests for b in request.branches if b.finish is None]
        if not branches:
            return
        self._make_room_for_the_next(branches)
        plan = self._policy.plan(branches, self._limits, self._session.pages)
        if not plan:
            raise RuntimeError(f"{type(self._policy).__name__} planned no step for {len(branches)} sequences")
        self._steps += 1
        try:
            self._step(plan)
        except OutOfPages as error:
            self._make_room(branches, plan, error)
        except Exception as error:  # noqa: BLE001 - a session may raise anything; it goes to those concerned
            self._step_apart(plan, error)
        finally:
            with self._lock:
                for part in plan:
                    self._wake(part.branch.request)

    def _step(self, plan: Sequence[Slice]) -> None:
        plan = [self._begun(part) for part in plan]
        works = [self._work(part) for part in plan]
        outputs = self._session.step(works)
        if len(outputs) != len(works):
            raise RuntimeError(f"the session returned {len(outputs)} outputs for {len(works)} works")
        for part, output in zip(plan, outputs, strict=True):
            request = part.branch.request
            try:
                self._commit(part, output)
            except Exception as error:  # noqa: BLE001 - one sequence's trouble is not another's
                self._fail(request, _step_failed(error))
            except BaseException:
                # Ctrl-C in the leader's thread while this outcome, maybe another thread's, was half written.
                self._fail(request, EngineError("The generation was interrupted", "Start it again."))
                raise

    def _work(self, part: Slice) -> Work:
        branch, count, width = part
        request = branch.request
        state = branch.state
        assert state is not None
        if not request.started:
            request.started = time.perf_counter()
            request.busy_started = self._busy_now()
        branch.served = self._steps
        done = branch.computed
        if state.length > done:
            state.truncate(done)  # computed, but its logits were lost with an interrupted step
        tokens = branch.tokens[done : done + count]
        if branch.chooser is None:
            return Work(state, _padded(tokens, width), "all", sparsity=request.sparsity)
        if done + count < len(branch.tokens):
            return Work(state, _padded(tokens, width), "none", sparsity=request.sparsity)
        wanted: Literal["last", "all"] = "last" if width == count else "all"
        return Work(state, _padded(tokens, width), wanted, branch.chooser.top_k, request.sparsity)

    def _begun(self, part: Slice) -> Slice:
        """The same part of a step, its branch with a state; what is kept of its beginning need not be computed."""
        branch, count, width = part
        if branch.state is not None:
            return part
        branch.state = self._begin(branch)
        branch.preempted = False
        left = min(count, branch.pending)
        return Slice(branch, left, left if width == count else width)

    def _begin(self, branch: Branch) -> State:
        """A state for a branch: what is kept of the same beginning, or an empty one."""
        request = branch.request
        if branch.chooser is not None:
            kept = self._prefixes.take(branch.tokens, request.sparsity, chosen=request.chosen)
            if kept is not None:
                if branch.index == 0 and len(branch.tokens) == request.prompt_tokens:
                    request.cached_tokens = kept.length
                return kept
        return self._session.new_state()

    def _commit(self, part: Slice, output: Any) -> None:
        """Write a step's outcome into its branch."""
        branch, count, width = part
        request = branch.request
        state = branch.state
        assert state is not None
        if width > count:
            state.truncate(state.length - (width - count))
        length = state.length
        if branch.chooser is None:
            self._store_logits(branch, np.asarray(output)[:count], length - count)
        if request.progress and length <= request.prompt_tokens == len(branch.tokens):
            request.events.append(Prefilled(length, request.prompt_tokens))
        if length < len(branch.tokens):
            return
        if branch.chooser is None:
            self._finish(branch, "stop")
            return
        if width > count:
            output = _row(output, count - 1)
        for other in request.branches:
            if other.unforked and other.finish is None:
                self._fork(branch, other)
                if other.state is not None and not other.cancelled:
                    self._choose(other, output)
        self._choose(branch, output)

    def _fork(self, branch: Branch, other: Branch) -> None:
        assert branch.state is not None
        other.unforked = False
        other.served = branch.served
        try:
            other.state = branch.state.fork(len(branch.tokens))
        except (OutOfPages, MemoryError):
            other.preempted = True  # it reads the prompt by itself when there is room

    def _choose(self, branch: Branch, output: Any) -> None:
        assert branch.chooser is not None
        request = branch.request
        token, logprobs, complete = branch.chooser.sample(output)
        branch.tokens.append(token)
        finish: FinishReason | None = None
        if complete or token in request.stop_ids:
            finish = "stop"
        elif len(branch.tokens) - request.prompt_tokens >= request.max_new_tokens:
            finish = "length"
        request.events.append(Token(branch.index, token, logprobs, finish))
        request.busy_last = self._busy_now()
        if not request.first_token:
            request.first_token = time.perf_counter()
            request.busy_first = request.busy_last
        if finish is not None:
            self._finish(branch, finish)

    @staticmethod
    def _store_logits(branch: Branch, rows: Any, start: int) -> None:
        request = branch.request
        if request.logits is None:
            request.logits = np.empty((len(branch.tokens), rows.shape[-1]), dtype=np.float32)
        request.logits[start : start + len(rows)] = rows

    def _step_apart(self, plan: Sequence[Slice], error: Exception) -> None:
        """After a step failed for reasons unknown: each sequence by itself, so that only the guilty one fails."""
        if len(plan) == 1:
            self._fail(plan[0].branch.request, _step_failed(error))
            return
        for part in plan:
            if part.branch.finish is not None:
                continue  # fell with another branch of its request
            try:
                self._step([part])
            except OutOfPages:
                continue  # an ordinary matter for the next step
            except Exception as own:  # noqa: BLE001 - as above
                self._fail(part.branch.request, _step_failed(own))

    def _make_room_for_the_next(self, branches: Sequence[Branch]) -> None:
        """What is kept gives way to sequences that wait beside running ones; one that is alone starts in any case."""
        if not len(self._prefixes) or not any(branch.state is not None for branch in branches):
            return
        waiting = [branch for branch in branches if branch.state is None and branch.runnable]
        if not waiting:
            return
        oldest = min(waiting, key=lambda b: b.age)
        needed = len(oldest.tokens) // max(self._limits.page_tokens, 1) + 1 + len(branches)
        while self._session.pages()[1] < needed and self._prefixes.give_up():
            continue

    def _make_room(self, branches: Sequence[Branch], plan: Sequence[Slice], error: OutOfPages) -> None:
        if self._prefixes.give_up():
            return
        victim = self._policy.victim(branches, plan)
        if victim is not None:
            self._preemptions += 1
            victim.preempted = True
            self._drop_state(victim)
            return
        branch = min((part.branch for part in plan), key=lambda b: b.age)
        total, free = self._session.pages()
        where = f"the cache pool has {total} pages of {self._limits.page_tokens} tokens, {free} of them free"
        failure = DoesNotFit(
            f"A sequence of {len(branch.tokens)} tokens does not fit into the cache by itself"
            + (f": {where}" if total else f" ({error})"),
            "Use a shorter prompt or max_new_tokens, or load the model with a larger context.",
        )
        failure.__cause__ = error
        self._fail(branch.request, failure)

    def _fail(self, request: Request, error: Exception) -> None:
        request.error = request.error or error
        for branch in request.branches:
            if branch.finish is None:
                self._finish(branch, "cancelled")

    def _finish(self, branch: Branch, reason: FinishReason) -> None:
        branch.finish = reason
        request = branch.request
        self._drop_state(branch, keep=branch.index == 0 and branch.chooser is not None and request.error is None)
        if request.done:
            request.ended = time.perf_counter()
        if branch.index == 0:
            for other in request.branches:
                other.unforked = False  # nobody is left to share a prompt with
        for waiting in self._requests:
            for other in waiting.branches:
                other.preempted = False  # room was made

    def _drop_state(self, branch: Branch, *, keep: bool = False) -> None:
        state, branch.state = branch.state, None
        if state is None:
            return
        try:
            if self._sparse is not None and branch.request.counted:
                read = np.asarray(self._sparse.keys_read(state), np.float64)
                known = branch.request.keys_read
                branch.request.keys_read = read.copy() if known is None else known + read
        except Exception as error:  # noqa: BLE001 - a session may raise anything; it goes to who asked for the count
            branch.request.error = branch.request.error or _step_failed(error)
        finally:
            if keep and not self._shut and branch.request.error is None:
                self._prefixes.keep(branch.tokens, state, branch.request.sparsity)
            else:
                state.free()

    def _busy_now(self) -> float:
        """A clock that runs only while somebody leads: readers who dawdle do not count."""
        return self._busy + time.perf_counter() - self._led_since


def _saving(session: Session) -> SavingSession:
    if not isinstance(session, SavingSession):
        raise OptionError("This backend cannot write prompt caches", "Leave the prompt cache out.")
    return session


def _padded(tokens: list[int], width: int) -> list[int]:
    return tokens if len(tokens) == width else tokens + [tokens[-1]] * (width - len(tokens))


def _row(output: Any, row: int) -> Any:
    if isinstance(output, tuple):
        return tuple(np.asarray(part)[row] for part in output)
    return np.asarray(output)[row]


def _usable_context(session: Session) -> int:
    limits = session.limits
    context = limits.context
    if limits.token_classes:
        context -= min(limits.token_classes) - 1  # the last step must find room for its padding
    if limits.page_tokens:
        context = min(context, session.pages()[0] * limits.page_tokens)
    return max(context, 0)


def _step_failed(error: Exception) -> TransomError:
    if isinstance(error, TransomError):
        return error
    said = str(error).strip() or type(error).__name__
    failure = EngineError(
        f"The backend failed while computing: {said}",
        "Other generations are not concerned; see __cause__ for its trace.",
    )
    failure.__cause__ = error
    return failure

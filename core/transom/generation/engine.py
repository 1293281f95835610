"""The engine owns a session and runs the steps of all generations on it, one step at a time.

There is no worker thread. A reader that needs its next event while nobody runs steps becomes the leader: it plans a
step for all requests, runs it, distributes the tokens, and continues until its own event arrives. The other readers
wait; then one of them takes over. A single generation therefore costs two lock operations and no thread switch.

Only the leader uses the session and its states. The lock guards the list of requests and the leader, and is never held
during a step. If a step raises, the session guarantees that all states are unchanged. A branch's progress is read from
its state, so an interrupted step is simply repeated.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from transom.contract import OutOfPages, Session, State, Work
from transom.contract_optional import SavingSession, SparseSession
from transom.errors import DoesNotFit, EngineError, OptionError, TransomError, option
from transom.generation.prefixes import CachedPrefix, PrefixCache
from transom.generation.requests import Branch, Event, PrefillEvent, Request, TokenEvent
from transom.generation.results import FinishReason
from transom.generation.scheduling import FairPolicy, SchedulingPolicy, SeparatePolicy, StepSlice


class ModelClosed(TransomError):
    """The model was closed before or during use."""

    def __init__(self) -> None:
        super().__init__("The model is closed", "Load it again, and close it only after its last generation has ended.")


class ModelForked(TransomError):
    """The process is a fork of the one that loaded the model."""

    def __init__(self) -> None:
        super().__init__(
            "The process was forked after this model was loaded, which belongs to the process that loaded it",
            "Load the model in the new process, or start that with multiprocessing's 'spawn' method.",
        )


class Engine:
    """Runs requests on a session. Every method may be called from any thread.

    Args:
        session: owned by the engine; `close` closes it.
        policy: decides which tokens each step computes.
        watch: entered around each call that computes.
        deterministic: what a request gives follows from the request alone, to the last bit; see `SeparatePolicy`.
    """

    def __init__(
        self,
        session: Session,
        policy: SchedulingPolicy | None = None,
        watch: contextlib.AbstractContextManager[None] | None = None,
        *,
        deterministic: bool = False,
    ) -> None:
        self._session = session
        self.watch = watch or contextlib.nullcontext()
        self._sparse = session if isinstance(session, SparseSession) else None
        self._limits = session.limits
        self._deterministic = deterministic
        self._separate = deterministic and not self._limits.batch_invariant
        """Whether every sequence has steps of its own."""
        self._policy = policy or (SeparatePolicy(every=self._separate) if deterministic else FairPolicy())
        self.context = _usable_context(session)
        """Maximum number of tokens of a sequence, prompt and answer together."""
        chunk = min(self._limits.max_tokens, FairPolicy.chunk)
        # The bits of a kept prefix depend on the steps that computed it. Other steps would read this prompt.
        self._prefixes = PrefixCache(0 if self._separate else self._limits.page_tokens, chunk, self.context)
        self._lock = threading.Lock()
        self._free = threading.Condition(self._lock)
        """Signalled when the leader steps down."""
        self._leader: int | None = None
        self._exclusive = 0
        """Number of callers that wait for exclusive use of the session."""
        self._requests: list[Request] = []
        self._arrivals = 0
        self._steps = 0
        self._preemptions = 0
        self._closed = self._shut = self._forked = False
        _engines.add(self)
        self._busy = self._led_since = 0.0

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def sparse(self) -> bool:
        """Whether the session supports a sparsity policy per request, and counts the keys it reads."""
        return self._sparse is not None

    @property
    def saves(self) -> bool:
        """Whether the session can save its states, and sequences may begin with a state that was saved."""
        return isinstance(self._session, SavingSession) and not self._separate

    @property
    def requests(self) -> int:
        """Number of requests that have not ended."""
        return len(self._requests)

    @property
    def preemptions(self) -> int:
        """How often a sequence lost its cache because the pool was full. It is then computed again."""
        return self._preemptions

    def submit(self, request: Request) -> None:
        """Queue a request. It runs while any thread is in `next_event`, for this or another request.

        Raises:
            ModelClosed: the engine is closed.
            ModelForked: this is a fork of the process that loaded the model.
        """
        self._need_own_process()
        with self._lock:
            if self._closed:
                raise ModelClosed
            self._arrivals += 1
            request.arrival = self._arrivals
            request.submitted = request.submitted or time.perf_counter()
            self._requests.append(request)

    def next_event(self, request: Request) -> Event | None:
        """The request's next event, running steps until it arrives; None if the request has ended.

        Raises:
            TransomError: the request ended with an error: a failed step, a full pool, a closed model.
            ModelForked: this is a fork of the process that loaded the model.
        """
        self._need_own_process()
        while True:
            if request.events:
                return request.events.popleft()
            if request.done:
                if request.events:
                    continue  # the last event arrived between the two checks
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
        """End a request, or one of its branches, with the current step. Ending it twice has no effect."""
        self._mark(request, branch)
        with self._lock:
            if self._leader is None:
                self._remove_ended()

    def abandon(self, request: Request) -> None:
        """`cancel` that never blocks, for finalizers, which may run while the same thread holds the lock."""
        self._mark(request, None)
        if self._lock.acquire(blocking=False):
            try:
                if self._leader is None:
                    self._remove_ended()
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
        """Exclusive use of the session by this thread, between two steps; generations wait.

        Args:
            keep: do not free the caches of ended sequences.

        Raises:
            ModelClosed: the engine is closed.
            ModelForked: this is a fork of the process that loaded the model.
        """
        self._need_own_process()
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
        """Number of ended sequences whose caches are kept for prompts with the same beginning."""
        return len(self._prefixes)

    def save_latest(self) -> tuple[CachedPrefix, dict[str, np.ndarray[Any, np.dtype[Any]]]] | None:
        """The sequence that ended last and its saved state; None if no sequence is kept.

        Raises:
            OptionError: the backend cannot save states.
            ModelClosed: the engine is closed.
        """
        with self.exclusive(keep=True) as session:
            saving = self._saving(session)
            kept = self._prefixes.latest
            return None if kept is None else (kept, {n: np.asarray(a) for n, a in saving.save(kept.state).items()})

    def restore(self, tokens: Sequence[int], sparsity: str | None, arrays: Mapping[str, Any]) -> None:
        """Restore a saved sequence, as if it had just ended.

        Raises:
            OptionError: the backend cannot restore states, or the arrays do not match the model or the tokens.
            DoesNotFit: the cache is too small for the sequence.
            ModelClosed: the engine is closed.
        """
        with self.exclusive() as session:
            saving = self._saving(session)
            try:
                state = saving.restore(len(tokens), arrays)
            except OutOfPages as error:
                raise DoesNotFit(
                    f"The saved prompt has {len(tokens)} tokens, but the cache has room for {self.context}",
                    "Load the model with a larger context.",
                ) from error
            except ValueError as error:
                raise OptionError(f"The saved prompt does not fit this model: {error}", "Create it again.") from error
            self._prefixes.keep(tokens, state, sparsity)

    def _saving(self, session: Session) -> SavingSession:
        if not isinstance(session, SavingSession):
            raise OptionError("This backend cannot save prompt caches", "Do not use a prompt cache.")
        if self._separate:
            asked = option("deterministic", True)
            raise OptionError(
                f"With {asked}, this backend reads every prompt anew, because the bits of a prompt cache depend on the "
                "steps that made it",
                f"Leave out {asked}, or do not use a prompt cache.",
            )
        return session

    def forget(self) -> None:
        """Free the caches of ended sequences.

        Raises:
            ModelClosed: the engine is closed.
        """
        with self.exclusive():
            pass

    def close(self) -> None:
        """Close the session after the current step. Requests that have not ended raise ModelClosed. Idempotent.

        In a fork of the process that loaded the model this leaves the session alone, which is that process's."""
        with self._lock:
            self._closed = True
            if self._forked:
                return
            if self._leader == threading.get_ident():
                return  # called from within a step: _release does the rest
            while self._leader is not None:
                self._free.wait()
            self._shut_down()

    # Forks: only the thread that forked lives on in the child. Another one may have held the lock, or led a step.

    def _leave_behind(self) -> None:
        """In a forked child: nothing may wait for threads that do not exist there."""
        self._forked = True
        self._lock = threading.Lock()
        self._free = threading.Condition(self._lock)
        self._leader, self._exclusive, self._requests = None, 0, []

    def _need_own_process(self) -> None:
        if self._forked:
            raise ModelForked

    # Leadership: the leader may use the session.

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
                self._remove_ended()
            self._free.notify_all()
            self._hand_over()

    def _hand_over(self) -> None:
        """Wake one reader without events so that it leads. Called whenever there may be no leader."""
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
                self._hand_over()  # woken to lead, but its event or a Ctrl-C came first

    def _remove_ended(self) -> None:
        """Apply cancellations and remove ended requests. The caller holds the lock and leads, or there is no leader."""
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
        with self.watch:
            self._prefixes.clear()
            self._session.close()

    @staticmethod
    def _wake(request: Request) -> None:
        if request.wake is not None:
            request.wake.notify()

    # Steps: only the leader runs the methods below.

    def _advance(self) -> None:
        """Run one step, or make room in the cache for one."""
        with self._lock:
            self._remove_ended()
            branches = [b for request in self._requests for b in request.branches if b.finish is None]
        if not branches:
            return
        for branch in branches:
            _undo_interrupted(branch)
        self._make_room_for_waiting(branches)
        plan = self._policy.plan(branches, self._limits, self._session.pages)
        if not plan:
            raise RuntimeError(f"{type(self._policy).__name__} planned no step for {len(branches)} sequences")
        self._steps += 1
        try:
            self._step(plan)
        except OutOfPages as error:
            self._make_room(branches, plan, error)
        except Exception as error:  # noqa: BLE001 - a session may raise anything; the affected requests report it
            self._step_separately(plan, error)
        finally:
            with self._lock:
                for part in plan:
                    self._wake(part.branch.request)

    def _step(self, plan: Sequence[StepSlice]) -> None:
        with self.watch:
            plan = [self._with_state(part) for part in plan]
            works = [self._work(part) for part in plan]
            outputs = self._session.step(works)
        if len(outputs) != len(works):
            raise RuntimeError(f"the session returned {len(outputs)} outputs for {len(works)} works")
        for part, output in zip(plan, outputs, strict=True):
            request = part.branch.request
            try:
                self._commit(part, output)
            except Exception as error:  # noqa: BLE001 - an error of one sequence must not affect others
                self._fail(request, _step_failed(error))
            except BaseException:
                # Ctrl-C in the leader's thread while this result, maybe another thread's, was half written.
                self._fail(request, EngineError("The generation was interrupted", "Start it again."))
                raise

    def _work(self, part: StepSlice) -> Work:
        branch, count, width = part
        request = branch.request
        state = branch.state
        assert state is not None
        if not request.started:
            request.started = time.perf_counter()
            request.busy_started = self._busy_now()
        branch.served = self._steps
        done = branch.began = branch.computed
        tokens = branch.tokens[done : done + count]
        if branch.sampler is None:
            return Work(state, _padded(tokens, width), "all", sparsity=request.sparsity)
        if done + count < len(branch.tokens):
            return Work(state, _padded(tokens, width), "none", sparsity=request.sparsity)
        wanted: Literal["last", "all"] = "last" if width == count else "all"
        return Work(state, _padded(tokens, width), wanted, branch.sampler.top_k, request.sparsity)

    def _with_state(self, part: StepSlice) -> StepSlice:
        """The same part of a step, after giving its branch a state. Kept prefixes are not computed again."""
        branch, count, width = part
        if branch.state is not None:
            return part
        branch.state = self._new_state(branch)
        branch.preempted = False
        left = min(count, branch.pending)
        return StepSlice(branch, left, left if width == count else width)

    def _new_state(self, branch: Branch) -> State:
        """A state for a branch: a kept prefix, or an empty state."""
        request = branch.request
        if branch.sampler is not None and not (self._deterministic and request.selects_keys):
            kept = self._prefixes.take(branch.tokens, request.sparsity, request.salt, selects_keys=request.selects_keys)
            if kept is not None:
                if branch.index == 0 and len(branch.tokens) == request.prompt_tokens:
                    request.cached_tokens = kept.length
                return kept
        return self._session.new_state()

    def _commit(self, part: StepSlice, output: Any) -> None:
        """Apply the result of a step to its branch."""
        branch, count, width = part
        request = branch.request
        state = branch.state
        assert state is not None
        branch.began = None
        if width > count:
            state.truncate(state.length - (width - count))
        length = state.length
        if branch.sampler is None:
            self._store_logits(branch, np.asarray(output)[:count], length - count)
        if request.progress and length <= request.prompt_tokens == len(branch.tokens):
            request.events.append(PrefillEvent(length, request.prompt_tokens))
        if length < len(branch.tokens):
            return
        if branch.sampler is None:
            self._finish(branch, "stop")
            return
        if width > count:
            output = _row(output, count - 1)
        for other in request.branches:
            if other.awaiting_fork and other.finish is None:
                self._fork(branch, other)
                if other.state is not None and not other.cancelled:
                    self._choose(other, output)
        self._choose(branch, output)

    def _fork(self, branch: Branch, other: Branch) -> None:
        assert branch.state is not None
        other.awaiting_fork = False
        other.served = branch.served
        try:
            other.state = branch.state.fork(len(branch.tokens))
        except (OutOfPages, MemoryError):
            other.preempted = True  # it reads the prompt itself once there is room

    def _choose(self, branch: Branch, output: Any) -> None:
        assert branch.sampler is not None
        request = branch.request
        token, logprobs, complete = branch.sampler.sample(output)
        branch.tokens.append(token)
        finish: FinishReason | None = None
        if complete or token in request.stop_ids:
            finish = "stop"
        elif len(branch.tokens) - request.prompt_tokens >= request.max_new_tokens:
            finish = "length"
        request.events.append(TokenEvent(branch.index, token, logprobs, finish))
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

    def _step_separately(self, plan: Sequence[StepSlice], error: Exception) -> None:
        """After a failed step, run each sequence separately, so that only the one that causes the failure fails."""
        if len(plan) == 1:
            self._fail(plan[0].branch.request, _step_failed(error))
            return
        for part in plan:
            if part.branch.finish is not None:
                continue  # already failed with another branch of its request
            try:
                self._step([part])
            except OutOfPages:
                continue  # the next step makes room
            except Exception as own:  # noqa: BLE001 - as above
                self._fail(part.branch.request, _step_failed(own))

    def _make_room_for_waiting(self, branches: Sequence[Branch]) -> None:
        """Evict kept prefixes for sequences that wait while others run; a sequence alone starts in any case."""
        if not len(self._prefixes) or not any(branch.state is not None for branch in branches):
            return
        waiting = [branch for branch in branches if branch.state is None and branch.runnable]
        if not waiting:
            return
        oldest = min(waiting, key=lambda b: b.age)
        needed = len(oldest.tokens) // max(self._limits.page_tokens, 1) + 1 + len(branches)
        while self._session.pages()[1] < needed and self._prefixes.evict_oldest():
            continue

    def _make_room(self, branches: Sequence[Branch], plan: Sequence[StepSlice], error: OutOfPages) -> None:
        if self._prefixes.evict_oldest():
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
            f"A sequence of {len(branch.tokens)} tokens does not fit into the cache, even alone"
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
        self._drop_state(branch, keep=branch.index == 0 and branch.sampler is not None and request.error is None)
        if request.done:
            request.ended = time.perf_counter()
        if branch.index == 0:
            for other in request.branches:
                other.awaiting_fork = False  # no branch is left to fork from
        for waiting in self._requests:
            for other in waiting.branches:
                other.preempted = False  # there is room now

    def _drop_state(self, branch: Branch, *, keep: bool = False) -> None:
        state, branch.state = branch.state, None
        if state is None:
            return
        try:
            if self._sparse is not None and branch.request.count_keys:
                read = np.asarray(self._sparse.keys_read(state), np.float64)
                known = branch.request.keys_read
                branch.request.keys_read = read.copy() if known is None else known + read
        except Exception as error:  # noqa: BLE001 - a session may raise anything; the request reports it
            branch.request.error = branch.request.error or _step_failed(error)
        finally:
            if keep and not self._shut and branch.request.error is None:
                self._prefixes.keep(branch.tokens, state, branch.request.sparsity, branch.request.salt)
            else:
                state.free()

    def _busy_now(self) -> float:
        """A clock that runs only while there is a leader, so that slow readers do not count."""
        return self._busy + time.perf_counter() - self._led_since


def _undo_interrupted(branch: Branch) -> None:
    """Remove from a state what a step computed that Ctrl-C interrupted: its logits are lost, and it is repeated."""
    if branch.began is not None and branch.state is not None and branch.state.length > branch.began:
        branch.state.truncate(branch.began)
    branch.began = None


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
        context -= min(limits.token_classes) - 1  # the last step needs room for its padding
    if limits.page_tokens:
        context = min(context, session.pages()[0] * limits.page_tokens)
    return max(context, 0)


def _step_failed(error: Exception) -> TransomError:
    if isinstance(error, TransomError):
        return error
    message = str(error).strip() or type(error).__name__
    failure = EngineError(
        f"The backend failed while computing: {message}",
        "Other generations are not affected; __cause__ has the traceback.",
    )
    failure.__cause__ = error
    return failure


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
"""Every engine of this process."""


def _leave_all_behind() -> None:
    for engine in list(_engines):
        engine._leave_behind()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_all_behind)

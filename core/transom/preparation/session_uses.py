"""What generation asks of a session besides the logits of every token of a prompt, checked in the steps of one prompt.

Generation asks for the last row of a chunk and for the best tokens of a row. It forks states, cuts them, frees them and
has others take their place, restores saved ones, and runs several in one step, or one token alone. `checked_rows` does
all of it in three steps more than a plain prompt with `DECODES` decoded tokens takes, if the session runs four
sequences in a step; those three have single tokens. Only when something differs is each use tried alone, to name the
one that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from transom.contract import OutOfPages, Session, State, Work
from transom.contract_optional import SavingSession
from transom.errors import EngineError
from transom.generation.scheduling import fit
from transom.preparation.agreement import DECODES, SAME

Array = np.ndarray[Any, np.dtype[Any]]
Wanted = Literal["none", "last", "all"]

GREEDY, BEST, MANY = 1, 8, 40
"""Tokens that are asked for as `top_k`: by greedy decoding, and by sampling."""
BACK = 2
"""Tokens that a cut or a fork takes back."""
SHORT = 4
"""Tokens of the second prompt, which gets the memory of a freed state."""
LEAST = 0.05
"""Smallest tolerance, relative to the spread of a row: what bfloat16 arithmetic in one of two kernels makes."""
LARGER = 3
"""The tolerance, as a multiple of the session's own error: both rows may have it, and one more than another."""
FEWEST = DECODES + BACK + 1
"""Tokens of the shortest prompt in which states are forked and cut."""
NO_FORK = (OutOfPages, MemoryError, NotImplementedError)
"""What `fork` and `restore` raise where there is no room or no such thing: generation then reads the prompt again."""


class Best(NamedTuple):
    """The `top_k` of a row, and how many were asked for."""

    ids: Array
    values: Array
    asked: int


@dataclass
class SessionTask:
    """Tokens for a state."""

    state: State
    tokens: Sequence[int]
    logits: Wanted = "all"
    top_k: int = 0


class Use(NamedTuple):
    """The logits that one use of the session gave for the token at a position of the prompt."""

    position: int
    got: Array | Best


class WrongResult(Exception):
    """A session gave something that is not a row of logits, or a state has a wrong length; the message says what."""


# steps ----------------------------------------------------------------------------------------------------------------
def advance(session: Session, tasks: Sequence[SessionTask]) -> list[Any]:
    """Append the tokens of each task to its state, in as few steps as the session's limits allow.

    Static shapes are padded as the engine pads them. Returns, for each task: float32 [tokens, vocabulary] for `"all"`,
    [vocabulary] for `"last"`, None for `"none"`; with `top_k` the best of the last token.

    Raises:
        ValueError: the limits allow no step for these tokens.
        WrongResult: a result has the wrong form.
    """
    limits, done = session.limits, [0] * len(tasks)
    found: list[list[Any]] = [[] for _ in tasks]
    while any(at < len(task.tokens) for at, task in zip(done, tasks, strict=True)):
        room, chosen = limits.max_tokens, list[tuple[int, int, int]]()
        for index, task in enumerate(tasks):
            left = len(task.tokens) - done[index]
            if not left or len(chosen) == limits.max_sequences:
                continue
            fitted = fit(left, room, limits.context - task.state.length, limits.token_classes)
            if fitted is None and not chosen:
                raise ValueError(f"no step of its limits takes {left} tokens after {task.state.length}")
            if fitted is not None:
                chosen.append((index, *fitted))
                room -= fitted[1]
        works = [_work(tasks[index], done[index], take, width) for index, take, width in chosen]
        results = session.step(works)
        if len(results) != len(works):
            raise WrongResult(f"step() returned {len(results)} results for {len(works)} sequences")
        for (index, take, width), work, result in zip(chosen, works, results, strict=True):
            state = tasks[index].state
            if width > take:
                state.truncate(state.length - (width - take))
            done[index] += take
            if work.logits != "none":
                found[index].append(_taken(work, result, take, tasks[index].logits))
    return [
        None if task.logits == "none" else np.concatenate(parts) if task.logits == "all" else parts[-1]
        for task, parts in zip(tasks, found, strict=True)
    ]


def _work(task: SessionTask, done: int, take: int, width: int) -> Work:
    tokens = list(task.tokens[done : done + take])
    tokens += tokens[-1:] * (width - take)
    if task.logits == "all":
        return Work(task.state, tokens, "all")
    if task.logits == "none" or done + take < len(task.tokens):
        return Work(task.state, tokens, "none")
    return Work(task.state, tokens, "last" if width == take else "all", task.top_k)


def _taken(work: Work, result: Any, take: int, wanted: Wanted) -> Any:
    """The part of a result that belongs to the first `take` tokens of its work, or to the last of these."""
    if result is None:
        raise WrongResult(f"step() returned None for logits={work.logits!r}")
    if work.top_k:
        if not isinstance(result, tuple) or len(result) != 2:
            raise WrongResult(f"step() returned {type(result).__name__} for top_k, not a pair of ids and values")
        ids, values = (np.array(part) for part in result)
        if work.logits == "all" and ids.ndim == values.ndim == 2:
            ids, values = ids[take - 1], values[take - 1]
        return Best(ids, values, work.top_k)
    rows = np.array(result)
    if rows.ndim != (1 if work.logits == "last" else 2) or (work.logits == "all" and len(rows) != len(work.tokens)):
        tokens = len(work.tokens)
        raise WrongResult(
            f"step() returned logits of the shape {rows.shape} for logits={work.logits!r} of {tokens} tokens"
        )
    if work.logits == "last":
        return rows
    return rows[:take] if wanted == "all" else rows[take - 1]


def whole_prompt(session: Session, ids: Sequence[int], backend: str) -> Array:
    """The logits of a prefill and of `DECODES` single-token steps; float32 [positions, vocabulary].

    Raises:
        EngineError: they have different shapes.
    """
    head = max(1, len(ids) - DECODES)
    with _states() as held:
        state = held(session.new_state())
        parts = [advance(session, [SessionTask(state, ids[:head])])[0]]
        parts += [advance(session, [SessionTask(state, [token])])[0] for token in ids[head:]]
    return _joined(parts, backend)


def _joined(parts: Sequence[Array], backend: str) -> Array:
    if any(part.ndim != 2 or part.shape[1:] != parts[0].shape[1:] for part in parts):
        shapes = [part.shape for part in parts]
        raise EngineError(f"The backend {backend} returned logits of the shapes {shapes} on the check prompt")
    return np.concatenate(parts).astype(np.float32)


@contextmanager
def _states() -> Iterator[Callable[[State], State]]:
    """A function that notes states; they are freed at the end."""
    held: list[State] = []

    def hold(state: State) -> State:
        held.append(state)
        return state

    try:
        yield hold
    finally:
        for state in held:
            state.free()


def _need_length(state: State, length: int, what: str) -> None:
    if state.length != length:
        raise WrongResult(f"{what} has {state.length} tokens, not {length}")


def _fork(state: State, length: int) -> State:
    found = state.fork(length)
    _need_length(found, length, f"a fork of {length} tokens")
    return found


def _cut(state: State, length: int) -> None:
    state.truncate(length)
    _need_length(state, length, f"a state that was truncated to {length} tokens")


# all uses together ----------------------------------------------------------------------------------------------------
def checked_rows(session: Session, ids: Sequence[int], backend: str) -> tuple[Array, list[Use]]:
    """The logits of the prompt, as of `whole_prompt`, and what the other uses gave for single positions.

    A prompt that is too short, or a pool without room for other states, leaves the list empty. Uses that the session
    does not offer are left out: several sequences in a step, forks (`NO_FORK`), saved states.

    Raises:
        EngineError: the logits have different shapes.
        WrongResult: a result has the wrong form.
    """
    if len(ids) < FEWEST:
        return whole_prompt(session, ids, backend), []
    try:
        return _all_uses(session, ids, backend)
    except OutOfPages:
        return whole_prompt(session, ids, backend), []


def _all_uses(session: Session, ids: Sequence[int], backend: str) -> tuple[Array, list[Use]]:
    """Seven steps. Some of them write tokens that are wrong on purpose, which nothing may read later."""
    end = len(ids) - DECODES
    back, uses = end - BACK, list[Use]()
    with _states() as held:
        parent = held(session.new_state())
        rows = advance(session, [SessionTask(parent, ids[:end])])
        vocabulary = np.shape(rows[0])[-1]
        wrong = _others(ids[back:end], vocabulary)

        # A fork writes over tokens of its parent, which then goes on.
        fork = _fork_or_none(parent, back)
        second = held(session.new_state() if fork is None else fork)
        before = ids[:back] if fork is None else []
        tasks = [SessionTask(second, [*before, *wrong], "none"), SessionTask(parent, [ids[end]], "last")]
        rows.append(advance(session, tasks)[1][None])

        # The fork forgets them. The parent writes over tokens of another fork, which then goes on.
        _cut(second, back)
        tasks = [SessionTask(second, ids[back:end], "last")]
        fork = _fork_or_none(parent, end + 1)
        third = parent if fork is None else held(fork)
        if third is not parent:
            _cut(parent, back)
            tasks.append(SessionTask(parent, wrong, "none"))
        *others, row = advance(session, [*tasks, SessionTask(third, [ids[end + 1]])])
        rows.append(row)
        uses.append(Use(end - 1, others[0]))

        # The forks outlive their parent, whose memory another state gets.
        if third is not parent:
            parent.free()
        short, foreign = held(session.new_state()), held(session.new_state())
        others = _others(ids[:SHORT], vocabulary)
        tasks = [
            SessionTask(short, ids[:SHORT], "last", min(BEST, vocabulary)),
            SessionTask(second, ids[end : end + 2], "last", min(MANY, vocabulary)),
            SessionTask(foreign, others, "none"),
        ]
        first, again, _ = advance(session, tasks)
        uses += [Use(SHORT - 1, first), Use(end + 1, again)]

        # Most steps of generation have one token of each sequence, for which engines have code of their own.
        rows.append(advance(session, [SessionTask(third, [ids[end + 2]], "last")])[0][None])
        _cut(third, end + 2)
        if (restored := _restored(session, third)) is not None:
            third.free()
            third = held(restored)
        tasks = [
            SessionTask(second, [ids[end + 2]], "last", GREEDY),
            SessionTask(short, [ids[SHORT]], "last", min(MANY, vocabulary)),
            SessionTask(third, [ids[end + 2]], "last"),
            SessionTask(foreign, others[:1], "none"),
        ]
        best, many, row, _ = advance(session, tasks)
        uses += [Use(end + 2, best), Use(SHORT, many), Use(end + 2, row)]
        (best,) = advance(session, [SessionTask(short, [ids[SHORT + 1]], "last", GREEDY)])
        uses.append(Use(SHORT + 1, best))
    return _joined(rows, backend), uses


def _fork_or_none(state: State, length: int) -> State | None:
    try:
        return _fork(state, length)
    except NO_FORK:
        return None


def _others(ids: Sequence[int], vocabulary: int) -> list[int]:
    """As many tokens, each another one: nothing may be left of them."""
    return [(token + 1) % vocabulary for token in ids]


def _restored(session: Session, state: State) -> State | None:
    if not isinstance(session, SavingSession):
        return None
    try:
        restored = session.restore(state.length, session.save(state))
    except NO_FORK:
        return None
    _need_length(restored, state.length, "a restored state")
    return restored


# one use alone --------------------------------------------------------------------------------------------------------
def tolerance(expected: Array, rows: Array) -> float:
    """How far the logits of a use may be from those of the same token in the prompt, relative to the spread of a row.

    The errors of a low precision are nearly the same in both, so that this is a closer comparison than one with the
    reference: an error of a use that is small beside the limits of the self-check still shows.

    Args:
        expected, rows: the logits of the reference and of the session, whose median distance is the session's error.
    """
    return max(LEAST, LARGER * float(np.median([distance(*pair) for pair in zip(expected, rows, strict=True)])))


def distance(expected: Array, row: Array) -> float:
    """The root mean square difference of two rows, relative to the spread of the first."""
    with np.errstate(invalid="ignore", over="ignore"):
        off = float(np.sqrt(np.square(row - expected, dtype=np.float64).mean()))
    return 0.0 if off <= SAME else off / max(float(expected.std()), SAME)


def difference(use: Use, rows: Array, most: float) -> str:
    """How a use differs from the row of its token; empty if it agrees.

    Args:
        rows: the logits of the prompt.
        most: the tolerance.
    """
    row = rows[use.position]
    if isinstance(use.got, Best):
        return _wrong_best(use.got, row, most)
    if use.got.shape != row.shape:
        return f"a row of the shape {use.got.shape}, not {row.shape}"
    if (off := distance(row, use.got)) <= most:
        return ""
    return f"logits that are off by {off:.2g} of their spread, and {most:.2g} are allowed"


def _wrong_best(best: Best, row: Array, most: float) -> str:
    """What is wrong with the best tokens of a row; empty if nothing is."""
    ids, values, asked = best
    if ids.shape != (asked,) or values.shape != (asked,):
        return f"ids and values of the shapes {ids.shape} and {values.shape}, not {asked} of each"
    if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= len(row) or len(set(ids.tolist())) < asked:
        return "ids that are not different tokens of the vocabulary"
    if not (np.diff(values) <= 0).all():
        return "values that are not in order, best first"
    near = max(SAME, 2 * most * float(row.std()))  # twice, as it is the largest error of several values
    if not (np.abs(row[ids] - values) <= near).all():
        return "values that are not those of their ids"
    return "" if row[ids].min() >= np.sort(row)[-asked] - near else "ids that are not the best"


def named_difference(session: Session, ids: Sequence[int], rows: Array, most: float) -> str:
    """Which use of the session gives other numbers than the prompt alone, as the predicate of a sentence.

    Args:
        rows: the logits of `whole_prompt`, which are right.
        most: the tolerance.

    Returns an empty text if each use alone gives the right numbers.
    """
    for predicate, use_alone in _ALONE:
        try:
            with _states() as held:
                found = list(use_alone(_Trial(session, ids, rows.shape[-1], held)))
        except NO_FORK:
            continue
        for use in found:
            if text := difference(use, rows, most):
                return f"{predicate} (token {use.position + 1} of the check prompt: {text})"
    return ""


class _Trial:
    """A session, and the check prompt: `end` tokens are read at once, and `back` are left after a cut."""

    def __init__(self, session: Session, ids: Sequence[int], vocabulary: int, held: Callable[[State], State]) -> None:
        self.session, self.ids, self.vocabulary, self.held = session, ids, vocabulary, held
        self.end = len(ids) - DECODES
        self.back = self.end - BACK
        self.wrong = _others(ids[self.back : self.end], vocabulary)

    def state(self, length: int) -> State:
        """A state that holds the first tokens of the prompt."""
        state = self.held(self.session.new_state())
        self.put(state, self.ids[:length])
        return state

    def put(self, state: State, tokens: Sequence[int]) -> None:
        advance(self.session, [SessionTask(state, tokens, "none")])

    def next(self, state: State, end: int) -> Use:
        """The row of token `end`, after the tokens up to it are appended to a state."""
        rows = advance(self.session, [SessionTask(state, self.ids[state.length : end + 1])])[0]
        return Use(end, rows[-1])

    def last(self, start: int, end: int, top_k: int = 0) -> Use:
        """What only the last token from `start` up to `end` is asked for, after the tokens before `start`."""
        (got,) = advance(self.session, [SessionTask(self.state(start), self.ids[start:end], "last", top_k)])
        return Use(end - 1, got)


def _last(t: _Trial) -> Iterator[Use]:
    yield t.last(0, t.end)
    yield t.last(t.end, t.end + 1)


def _top_k(t: _Trial) -> Iterator[Use]:
    for start, end in ((0, SHORT), (t.end, t.end + 1)):
        for count in (GREEDY, BEST, MANY):
            yield t.last(start, end, min(count, t.vocabulary))


def _top_k_of_a_chunk(t: _Trial) -> Iterator[Use]:
    yield t.last(t.back, t.end, min(MANY, t.vocabulary))


def _chunks(t: _Trial) -> Iterator[Use]:
    yield t.next(t.state(t.back), t.end)


def _forked(t: _Trial) -> Iterator[Use]:
    state = t.state(t.end)
    for length in (t.end, t.back):
        yield t.next(t.held(_fork(state, length)), t.end)


def _shared(t: _Trial) -> Iterator[Use]:
    state = t.state(t.end)
    fork = t.held(_fork(state, t.back))
    t.put(fork, t.wrong)
    yield t.next(state, t.end)
    fork = t.held(_fork(state, t.end + 1))
    _cut(state, t.back)
    t.put(state, t.wrong)
    yield t.next(fork, t.end + 1)


def _truncated(t: _Trial) -> Iterator[Use]:
    state = t.state(t.back)
    t.put(state, t.wrong)
    _cut(state, t.back)
    yield t.next(state, t.end)
    yield t.next(state, t.end + 1)


def _outlived(t: _Trial) -> Iterator[Use]:
    state = t.state(t.end)
    fork = t.held(_fork(state, t.end))
    state.free()
    t.state(t.back)
    yield t.next(fork, t.end)


def _reused(t: _Trial) -> Iterator[Use]:
    state = t.held(t.session.new_state())
    t.put(state, _others(t.ids[: t.end], t.vocabulary))
    state.free()
    yield t.next(t.held(t.session.new_state()), t.end)


def _saved(t: _Trial) -> Iterator[Use]:
    if (restored := _restored(t.session, t.state(t.end))) is not None:
        yield t.next(t.held(restored), t.end)


def _beside(t: _Trial) -> Iterator[Use]:
    one, other, foreign = t.state(t.end), t.state(t.back), t.held(t.session.new_state())
    rows = advance(
        t.session, [SessionTask(other, t.ids[t.back : t.end], "last"), SessionTask(one, [t.ids[t.end]], "last")]
    )
    yield from (Use(at, row) for at, row in zip((t.end - 1, t.end), rows, strict=True))
    tokens = _others(t.ids[: t.end], t.vocabulary)
    yield Use(
        t.end + 1,
        advance(t.session, [SessionTask(foreign, tokens, "none"), SessionTask(one, [t.ids[t.end + 1]], "last")])[1],
    )
    tasks = [SessionTask(one, [t.ids[t.end + 2]], "last", GREEDY), SessionTask(other, [t.ids[t.end]], "last")]
    *rows, _ = advance(t.session, [*tasks, SessionTask(foreign, tokens[:1], "none")])
    yield from (Use(at, row) for at, row in zip((t.end + 2, t.end), rows, strict=True))


WRONG_BEST = "gives wrong tokens or values where the best are asked for (top_k)"
REUSED = "computes otherwise in a state that has the memory of a freed one"
_ALONE: tuple[tuple[str, Callable[[_Trial], Iterator[Use]]], ...] = (
    (REUSED, _reused),
    ("gives wrong logits where only those of the last token are asked for", _last),
    (WRONG_BEST, _top_k),
    ("reads a prompt in two chunks otherwise than in one", _chunks),
    (WRONG_BEST, _top_k_of_a_chunk),
    ("forgets tokens of a truncated state, or not all that it has to", _truncated),
    ("goes on from a fork of a state otherwise than from the state", _forked),
    ("lets a state and its fork change each other", _shared),
    ("changes a fork of a state that is freed", _outlived),
    ("restores a saved state otherwise than it was", _saved),
    ("computes two sequences in one step otherwise than each alone", _beside),
)
"""A sentence's predicate, and what it is about; the first that differs is named, so the simplest come first."""

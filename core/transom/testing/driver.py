"""Drives a session and compares every step with the reference, so that a check only lists its operations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from transom.contract import Limits, Session, State, Work
from transom.sessions import best
from transom.testing.bench import Bench, TinyModel
from transom.testing.compare import compare_rows, normalized_error
from transom.testing.models import BASE
from transom.testing.result import Failed, Refused

Want = Literal["none", "last", "all"]


@dataclass
class Track:
    """A sequence state and the tokens that it must hold."""

    state: State
    tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Move:
    """The part of one sequence in a step."""

    track: Track
    tokens: Sequence[int]
    logits: Want = "all"
    top_k: int = 0
    sparsity: str | None = None


class SessionDriver:
    """A session with its model. `error` is the largest normalized error so far."""

    def __init__(self, session: Session, model: TinyModel, rng: np.random.Generator) -> None:
        self.session, self.model, self.rng = session, model, rng
        self.limits: Limits = session.limits
        self.context = min(self.limits.context, model.oracle.decoder.context)
        self.vocabulary = model.oracle.decoder.vocabulary
        self.error = 0.0

    def new(self) -> Track:
        return Track(self.session.new_state())

    def draw(self, count: int) -> list[int]:
        """`count` random token ids."""
        return [int(t) for t in self.rng.integers(0, self.vocabulary, count)]

    def chunk(self, wanted: int) -> int:
        """The length nearest to `wanted` that one step accepts."""
        wanted = max(1, min(wanted, self.limits.max_tokens))
        return min(self.limits.token_classes or (wanted,), key=lambda c: abs(c - wanted))

    def several(self, wanted: int) -> int:
        """The number of sequences for one step, at most `wanted`. Raises Refused if the session runs one at a time."""
        if self.limits.max_sequences < 2:
            raise Refused("the session runs one sequence at a time (max_sequences is 1)")
        return min(wanted, self.limits.max_sequences)

    def step(self, moves: Sequence[Move]) -> Sequence[Any]:
        """Run the step, compare its outputs, and add the new tokens to the tracks.

        Raises:
            Failed: the logits, their shape and type, or a state's length differ from the reference.
        """
        outputs = self.session.step([Work(m.track.state, m.tokens, m.logits, m.top_k, m.sparsity) for m in moves])
        if len(outputs) != len(moves):
            raise Failed(f"a step of {len(moves)} works returned {len(outputs)} results")
        for i, (move, output) in enumerate(zip(moves, outputs, strict=True)):
            self.compare(move, output, f"work {i + 1} of {len(moves)} at position {len(move.track.tokens)}")
            move.track.tokens += list(move.tokens)
            self.expect_length(move.track)
        return outputs

    def expect_length(self, track: Track) -> None:
        if track.state.length != len(track.tokens):
            raise Failed(f"the length of a state is {track.state.length}, but {len(track.tokens)} tokens were appended")

    def compare(self, move: Move, output: Any, what: str) -> None:
        if move.logits == "none":
            if output is not None:
                raise Failed(f"{what}: logits='none' returned {type(output).__name__}, not None")
            return
        rows = self.model.oracle.logits([*move.track.tokens, *move.tokens])[-len(move.tokens) :]
        wanted = rows if move.logits == "all" else rows[-1]
        if move.top_k:
            self.error = max(self.error, compare_best(output, wanted, move.top_k, self.model.limit, what))
        else:
            self.error = max(self.error, compare_rows(output, wanted, self.model.limit, what))

    def feed(self, track: Track, tokens: Sequence[int], logits: Want = "all") -> None:
        """Append the tokens in as few steps as the limits allow."""
        left = list(tokens)
        while left:
            count = max(
                (c for c in self.limits.token_classes or (len(left),) if c <= min(len(left), self.limits.max_tokens)),
                default=min(len(left), self.limits.max_tokens) if not self.limits.token_classes else 0,
            )
            if not count:
                raise Refused(f"{len(left)} tokens cannot be fed in chunks of {self.limits.token_classes}")
            self.step([Move(track, left[:count], logits)])
            left = left[count:]

    def grown(self, count: int) -> Track:
        """A new track with about `count` random tokens."""
        track = self.new()
        target = min(count, self.context - 1)
        while len(track.tokens) < target:
            size = self.chunk(target - len(track.tokens))
            if len(track.tokens) + size > self.context:
                break
            self.step([Move(track, self.draw(size))])
        return track

    def probe(self, *tracks: Track) -> None:
        """One decode on each track, to check that its cache is intact."""
        for track in tracks:
            self.step([Move(track, self.draw(self.chunk(1)))])


@contextlib.contextmanager
def session_driver(bench: Bench, name: str, variant: str = BASE) -> Iterator[SessionDriver]:
    """A driver of a new session on a model; its random numbers depend on the bench's seed and on `name`."""
    model = bench.model(variant)
    with bench.session(model.artifact) as session:
        yield SessionDriver(session, model, bench.rng(name))


def compare_best(output: Any, logits: Any, k: int, limit: float, what: str) -> float:
    """Compare a `top_k` output with full logits [..., vocabulary]: shape, type, order, values, and the choice of ids.

    Ids may differ from the reference only where its logits are within the tolerance of each other.
    """
    if not isinstance(output, tuple) or len(output) != 2:
        raise Failed(f"{what}: top_k must return a pair (ids, values), not {type(output).__name__}")
    ids, values = (np.asarray(part) for part in output)
    shape = (*logits.shape[:-1], k)
    if ids.shape != shape or values.shape != shape:
        raise Failed(f"{what}: top_k returned shapes {ids.shape} and {values.shape}, not {shape}")
    if ids.dtype != np.int64 or values.dtype != np.float32:
        raise Failed(f"{what}: top_k returned {ids.dtype} and {values.dtype}, not int64 and float32")
    if ids.size and (ids.min() < 0 or ids.max() >= logits.shape[-1]):
        raise Failed(f"{what}: top_k returned ids outside the vocabulary")
    if (np.diff(values, axis=-1) > 0).any():
        raise Failed(f"{what}: top_k values are not best first")
    if any(len(set(row)) != k for row in ids.reshape(-1, k).tolist()):
        raise Failed(f"{what}: top_k returned an id twice")
    scale = float(np.sqrt(np.mean(np.square(logits, dtype=np.float64)))) or 1.0
    slack = 8 * limit * scale
    own = np.take_along_axis(logits, ids, -1)
    if np.abs(own - values).max(initial=0.0) > slack:
        raise Failed(f"{what}: top_k values are not the logits of their ids")
    top = best(logits, k)[1]
    if np.abs(np.sort(own, -1)[..., ::-1] - top).max(initial=0.0) > slack:
        raise Failed(f"{what}: top_k did not return the {k} best")
    return normalized_error(values, top)

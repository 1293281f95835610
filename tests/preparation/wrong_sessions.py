"""Sessions that are right for the logits of a whole prompt and wrong in one other use. Each class says how."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from transom.contract import OutOfPages, Work
from transom.sessions import PackedSession, PackedState


class Changed(PackedSession):
    said: ClassVar[str] = ""
    """Part of the sentence that names it."""
    state: type[PackedState] = PackedState

    def new_state(self) -> PackedState:
        return self.state(super().new_state().cache, 0)


# results --------------------------------------------------------------------------------------------------------------
class WrongLastRow(Changed):
    """`"last"` of a chunk gives the row before it."""

    said = "only those of the last token"

    def step(self, work: Sequence[Work]) -> Any:
        shifted = [w.logits == "last" and not w.top_k and len(w.tokens) > 1 for w in work]
        found = super().step([replace(w, logits="all") if s else w for w, s in zip(work, shifted, strict=True)])
        return [np.asarray(r)[-2] if s else r for r, s in zip(found, shifted, strict=True)]


class WrongLastOfOne(Changed):
    """A single token, as each step of decoding has it."""

    said = "only those of the last token"

    def step(self, work: Sequence[Work]) -> Any:
        single = [w.logits == "last" and not w.top_k and len(w.tokens) == 1 for w in work]
        return [-r if s else r for r, s in zip(super().step(work), single, strict=True)]


class _WrongTop(Changed):
    said = "(top_k)"

    def wrong(self, w: Work) -> bool:
        raise NotImplementedError  # each subclass says which

    def step(self, work: Sequence[Work]) -> Any:
        wrong = [self.wrong(w) for w in work]  # before the states are longer
        found = super().step(work)
        return [(r[0], -r[1]) if bad else r for r, bad in zip(found, wrong, strict=True)]


class WrongGreedy(_WrongTop):
    def wrong(self, w: Work) -> bool:
        return w.top_k == 1


class WrongBestOfOne(_WrongTop):
    def wrong(self, w: Work) -> bool:
        return w.top_k > 0 and len(w.tokens) == 1


class WrongMany(_WrongTop):
    def wrong(self, w: Work) -> bool:
        return w.top_k > 8


class WrongBestOfSecondChunk(_WrongTop):
    def wrong(self, w: Work) -> bool:
        return w.top_k > 0 and len(w.tokens) > 1 and w.state.length > 0


class ChangedBest(Changed):
    said = "(top_k)"

    def change(self, ids: Any, values: Any, vocabulary: int) -> Any:
        raise NotImplementedError  # each subclass makes one change

    def step(self, work: Sequence[Work]) -> Any:
        vocabulary = self._need_decoder().vocabulary
        return [self.change(*r, vocabulary) if isinstance(r, tuple) else r for r in super().step(work)]


class WrongIds(ChangedBest):
    def change(self, ids: Any, values: Any, vocabulary: int) -> Any:
        return (ids + 1) % vocabulary, values


class WorstFirst(ChangedBest):
    def change(self, ids: Any, values: Any, vocabulary: int) -> Any:
        return ids[..., ::-1], values[..., ::-1]


class IdsInAnotherOrder(ChangedBest):
    def change(self, ids: Any, values: Any, vocabulary: int) -> Any:
        return ids[..., ::-1], values


class SameIdTwice(ChangedBest):
    def change(self, ids: Any, values: Any, vocabulary: int) -> Any:
        return np.full_like(ids, ids[..., 0]), values


class NotTheBest(ChangedBest):
    """Leaves the best one out."""

    def step(self, work: Sequence[Work]) -> Any:
        found = super(ChangedBest, self).step([replace(w, top_k=w.top_k + 8) if w.top_k else w for w in work])
        return [tuple(part[8:] for part in r) if isinstance(r, tuple) else r for r in found]


class ValuesOfAnotherScale(ChangedBest):
    def change(self, ids: Any, values: Any, vocabulary: int) -> Any:
        return ids, values * np.float32(3)


class MixedSequences(Changed):
    """In a step with several sequences, each reads the keys of all."""

    said = "two sequences in one step"

    def _compute(self, work: Sequence[Work], run: Callable[..., Mapping[str, Any]]) -> Any:
        def mixed(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
            zeros = {n: np.zeros_like(x) for n, x in inputs.items() if n in ("sequences", "past_sequences")}
            return run({**inputs, **zeros})

        return super()._compute(work, mixed)


class DecodesMixed(MixedSequences):
    """Only in steps that have single tokens alone."""

    def _compute(self, work: Sequence[Work], run: Callable[..., Mapping[str, Any]]) -> Any:
        decodes = all(len(w.tokens) == 1 for w in work)
        return super()._compute(work, run) if decodes else PackedSession._compute(self, work, run)


class SwappedResults(Changed):
    said = "two sequences in one step"

    def step(self, work: Sequence[Work]) -> Any:
        found = list(super().step(work))
        alike = [i for i, w in enumerate(work) if len(w.tokens) == 1 or w.logits == "last"]
        shown = [found[i] for i in alike if isinstance(found[i], np.ndarray)]
        at = [i for i in alike if isinstance(found[i], np.ndarray)]
        for i, row in zip(at, [*shown[1:], *shown[:1]], strict=True):
            found[i] = row.reshape(np.shape(found[i]))
        return found


class SecondChunkAlone(Changed):
    """A chunk of several tokens does not read the keys of the chunk before."""

    said = "in two chunks"

    def step(self, work: Sequence[Work]) -> Any:
        found = list(super().step(work))
        for i, w in enumerate(work):
            past = w.state.length - len(w.tokens)
            if past and len(w.tokens) > 1 and w.logits != "none":
                alone = PackedSession.new_state(self)
                cut = super().step([replace(w, state=alone)])
                found[i] = cut[0]
        return found


# states ---------------------------------------------------------------------------------------------------------------
class _LastLost(PackedState):
    def fork(self, length: int) -> PackedState:
        cache = [part.copy() for part in super().fork(length).cache]
        if length == self.length:
            for part in cache:
                part[-1] = 0
        return type(self)(cache, length)


class StaleFork(Changed):
    """A fork lacks the token that the state computed last."""

    said = "from a fork of a state"
    state = _LastLost


class _Rows(PackedState):
    """Keeps the rows of its tokens in a table, as pages are; forks share the table."""

    copies: ClassVar[tuple[bool, bool]] = (False, False)
    """Whether the state that was forked, and its fork, get a table of their own when they write."""

    def __init__(self, cache: list[Any], length: int, table: dict[int, list[Any]] | None = None) -> None:
        super().__init__(cache, length)
        self.table = {} if table is None else table
        self.copy = False

    @property
    def cache(self) -> list[Any]:
        empty = super().cache
        rows = [self.table[i] for i in range(self.length)] if self.length else []
        return [np.stack([row[p] for row in rows]) if rows else part[:0] for p, part in enumerate(empty)]

    def fork(self, length: int) -> PackedState:
        found = type(self)(super().cache, length, self.table)
        self.copy, found.copy = self.copies
        return found

    def truncate(self, length: int) -> None:
        self._length = length

    def append(self, cache: list[Any], tokens: int) -> None:
        if self.copy:
            self.table, self.copy = {i: self.table[i] for i in range(self.length)}, False
        for i in range(self.length, self.length + tokens):
            self.write(i, [part[i] for part in cache])
        self._length += tokens

    def write(self, at: int, row: list[Any]) -> None:
        self.table[at] = row


class SharingFork(Changed):
    """A fork and its state write into the same pages."""

    said = "change each other"
    state = _Rows


class _ForkInPlace(_Rows):
    copies = (True, False)


class SharingForkOneWay(Changed):
    """A fork writes into the pages of its state."""

    said = "change each other"
    state = _ForkInPlace


class _ParentInPlace(_Rows):
    copies = (False, True)


class SharingForkOtherWay(Changed):
    """A state writes into the pages that its fork reads."""

    said = "change each other"
    state = _ParentInPlace


class _FreedWithForks(_Rows):
    copies = (True, True)

    def free(self) -> None:
        if self._cache is not None:
            for row in self.table.values():
                for part in row:
                    part[...] = 0
        super().free()


class FreedWithItsForks(Changed):
    """Freeing a state clears the pages that its forks still read."""

    said = "fork of a state that is freed"
    state = _FreedWithForks


class _KeepsOld(_Rows):
    copies = (True, True)

    def write(self, at: int, row: list[Any]) -> None:
        self.table.setdefault(at, row)


class CutKeepsTokens(Changed):
    """After a cut, the old tokens stay where new ones are appended."""

    said = "truncated state"
    state = _KeepsOld


class _Ghosts(PackedState):
    """Has a length that leaves out the tokens that a cut should have removed."""

    hidden = 0

    @property
    def length(self) -> int:
        return self._length - self.hidden

    def truncate(self, length: int) -> None:
        self.hidden += self.length - length

    def fork(self, length: int) -> PackedState:
        found = type(self)([part[: self._length].copy() for part in self.cache], self._length)
        found.hidden = self.hidden
        if length < self.length:
            found = type(self)([part[:length].copy() for part in self.cache], length)
        return found


class CutForgetsNothing(Changed):
    """Tokens that were cut off are still read."""

    said = "truncated state"
    state = _Ghosts

    def step(self, work: Sequence[Work]) -> Any:
        hidden = [w.state.hidden for w in work]
        for w in work:
            w.state.hidden = 0
        try:
            return super().step(work)
        finally:
            for w, count in zip(work, hidden, strict=True):
                w.state.hidden = count


class NotCleared(CutForgetsNothing):
    """A new state still reads the tokens of a freed one."""

    said = "the memory of a freed one"

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        session = self
        self.freed: list[Any] = []

        class Freed(_Ghosts):
            def free(self) -> None:
                if self._cache is not None and self.length > 4:
                    session.freed = [part[:4] for part in self._cache]
                super().free()

            def truncate(self, length: int) -> None:
                hidden, self.hidden = self.hidden, 0
                PackedState.truncate(self, length + hidden)
                self.hidden = hidden

        self.state = Freed

    def new_state(self) -> PackedState:
        if not self.freed:
            return super().new_state()
        state = self.state(self.freed, 4)
        state.hidden = 4
        return state


class Saving(Changed):
    def save(self, state: Any) -> Mapping[str, Any]:
        return {str(i): part.copy() for i, part in enumerate(state.cache)}

    def restore(self, length: int, arrays: Mapping[str, Any]) -> PackedState:
        return self.state([arrays[str(i)] for i in range(len(arrays))], length)


class RestoresZeros(Saving):
    """Restores keys and values of the first layer only."""

    said = "restores a saved state"

    def restore(self, length: int, arrays: Mapping[str, Any]) -> PackedState:
        return super().restore(length, {n: a if int(n) < 2 else np.zeros_like(a) for n, a in arrays.items()})


# right ----------------------------------------------------------------------------------------------------------------
class _NoFork(PackedState):
    error: ClassVar[type[Exception]] = OutOfPages

    def fork(self, length: int) -> PackedState:
        raise self.error


class WithoutForks(Changed):
    state = _NoFork


def wrong() -> list[type[Changed]]:
    """All sessions of this module that say what is wrong with them."""
    kinds = [k for k in globals().values() if isinstance(k, type) and issubclass(k, Changed) and k.said]
    return [kind for kind in kinds if kind not in (ChangedBest, _WrongTop)]

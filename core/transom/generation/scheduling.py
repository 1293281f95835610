"""The scheduling policy: which sequences run in a step, and which one is preempted when the cache is full.

`FairPolicy` is the default: decodes first, then prompts in order of arrival, in chunks, within the session's limits. A
policy reads branches but never changes them; the engine acts. Any object with the methods of `SchedulingPolicy` is a
policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from transom.contract import Limits
from transom.generation.requests import Branch

Pages = Callable[[], tuple[int, int]]
"""Returns the (total, free) pages of the cache pool."""


class StepSlice(NamedTuple):
    """The part of a step that belongs to one branch."""

    branch: Branch
    take: int
    """Number of the branch's tokens to compute."""
    width: int
    """Number of tokens to pass to the session; larger than `take` if a static shape is padded at the end."""


class SchedulingPolicy(Protocol):
    def plan(self, branches: Sequence[Branch], limits: Limits, pages: Pages) -> list[StepSlice]:
        """The next step. Not empty if any branch is runnable. A branch without a state is thereby admitted."""
        ...

    def victim(self, branches: Sequence[Branch], plan: Sequence[StepSlice]) -> Branch | None:
        """The branch to preempt after `plan` did not fit; None if none may be preempted and the oldest must fail."""
        ...


@dataclass(frozen=True)
class FairPolicy:
    """Decodes first, least recently served first; then prompts by arrival, in chunks. Preempts the least computed
    branch.

    The oldest runnable branch is never preempted, so that there is always progress.
    """

    chunk: int = 1024
    """Maximum number of prompt tokens in a step without decodes. It bounds the delay of a cancellation."""
    mixed_chunk: int = 512
    """Maximum number of prompt tokens in a step with decodes, so that running answers do not stall."""
    max_interleaved: int = 4
    """Maximum number of sequences with a cache if the session runs one sequence per step."""
    spare: float = 0.01
    """Fraction of the pool that is kept free when a new sequence is admitted."""

    def plan(self, branches: Sequence[Branch], limits: Limits, pages: Pages) -> list[StepSlice]:
        ready = [branch for branch in branches if branch.runnable]
        running = [branch for branch in ready if branch.state is not None]
        if len(running) < len(ready):
            running += self._admit(ready, running, limits, pages)
        if limits.max_sequences == 1:
            order = sorted(running, key=lambda b: (b.served, b.age))
        elif len(running) > 1:
            order = sorted(running, key=lambda b: (b.pending > 1, b.age if b.pending > 1 else (b.served, 0)))
        else:
            order = running
        return self._fill(order, limits)

    def _fill(self, order: Sequence[Branch], limits: Limits) -> list[StepSlice]:
        plan: list[StepSlice] = []
        room = limits.max_tokens
        prompt_room = self.chunk
        for branch in order:
            if len(plan) == limits.max_sequences or room <= 0:
                break
            pending = branch.pending
            most = room if pending == 1 else min(room, max(prompt_room, 1))
            if pending > 1 and prompt_room <= 0:
                break
            fitted = fit(pending, most, limits.context - branch.computed, limits.token_classes)
            if fitted is None:
                # A static shape beyond the chunk size but within the limits is better than none.
                fitted = fit(pending, room, limits.context - branch.computed, limits.token_classes)
            if fitted is None:
                continue
            take, width = fitted
            plan.append(StepSlice(branch, take, width))
            room -= width
            if pending > 1:
                prompt_room -= width
            else:
                prompt_room = min(prompt_room, self.mixed_chunk)
        return plan

    def _admit(
        self, ready: Sequence[Branch], running: Sequence[Branch], limits: Limits, pages: Pages
    ) -> Iterable[Branch]:
        """The branches without a cache that may start, strictly in order of arrival."""
        slots = max(limits.max_sequences, self.max_interleaved) - len(running)
        admitted: list[Branch] = []
        free = 0
        if limits.page_tokens:
            total, free = pages()
            free -= int(total * self.spare)
            free -= sum(_pages(b.pending, limits.page_tokens) for b in running)
        for branch in sorted((b for b in ready if b.state is None), key=lambda b: b.age):
            alone = not running and not admitted
            if limits.page_tokens:
                # A preempted branch waits for headroom, or it would soon be preempted again.
                free -= _pages(len(branch.tokens) + 1, limits.page_tokens)
                fits = free >= (len(running) if branch.preempted else 0)
            else:
                fits = not branch.preempted
            if not alone and (len(admitted) >= slots or not fits):
                break
            admitted.append(branch)
        return admitted

    def victim(self, branches: Sequence[Branch], plan: Sequence[StepSlice]) -> Branch | None:
        oldest = min((part.branch for part in plan), key=lambda b: b.age)
        holders = [branch for branch in branches if branch.state is not None and branch is not oldest]
        if not holders:
            return None
        return min(holders, key=lambda b: (b.runnable, b.computed, (-b.age[0], -b.age[1])))


@dataclass(frozen=True)
class SeparatePolicy(FairPolicy):
    """Steps that follow from one sequence alone, so that its numbers do too: no other sequence shares them, the prompt
    is cut at multiples of `chunk`, and each token after it has a step, also when it is computed again after a
    preemption.
    """

    every: bool = True
    """Whether all sequences need it. False: only those whose policy selects keys, for a batch-invariant session."""

    def plan(self, branches: Sequence[Branch], limits: Limits, pages: Pages) -> list[StepSlice]:
        if not self.every and not any(branch.request.selects_keys for branch in branches):
            return super().plan(branches, limits, pages)
        return [self._cut(part, limits) for part in super().plan(branches, replace(limits, max_sequences=1), pages)[:1]]

    def _cut(self, part: StepSlice, limits: Limits) -> StepSlice:
        branch, done = part.branch, part.branch.computed
        prompt, space = branch.request.prompt_tokens, limits.context - done
        if done >= prompt:
            pending = room = 1
        else:
            pending = prompt - done
            room = min(self.chunk - done % self.chunk, limits.max_tokens)
        fitted = fit(pending, room, space, limits.token_classes)
        fitted = fitted or fit(pending, limits.max_tokens, space, limits.token_classes)
        return part if fitted is None else StepSlice(branch, *fitted)


def fit(pending: int, room: int, space: int, classes: tuple[int, ...]) -> tuple[int, int] | None:
    """How many of `pending` tokens to compute, and the width of the shape; None if no shape fits.

    If `classes` is empty, any length is possible. Otherwise: the smallest static shape that holds all tokens, if at
    most three quarters of it are padding or no smaller shape can be filled; else the largest shape that the tokens
    fill.

    Args:
        pending: number of tokens to compute, at least 1.
        room: widest shape for which the step has room.
        space: number of tokens that the sequence's cache can still take, including temporary padding.
        classes: the widths of the static shapes; empty: any width.
    """
    if not classes:
        count = min(pending, room)
        return (count, count) if count > 0 else None
    usable = [c for c in sorted(classes) if c <= min(room, space)]
    above = next((c for c in usable if c >= pending), None)
    below = max((c for c in usable if c <= pending), default=None)
    if above is not None and (below is None or above <= 4 * pending):
        return pending, above
    return None if below is None else (below, below)


def _pages(tokens: int, page_tokens: int) -> int:
    return -(-tokens // page_tokens)

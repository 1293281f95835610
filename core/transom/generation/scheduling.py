"""Which sequences a step holds, and who gives way when the cache is full: the policy, and nothing but the policy.

`Fair` is the default: decodes first, then prompts in order of arrival, in chunks, within the session's limits. It reads
branches and never changes them; the engine acts. Another policy is any object with the two methods of `Policy`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from transom.contract import Limits
from transom.generation.requests import Branch

Pages = Callable[[], tuple[int, int]]
"""Gives (total, free) pages of the cache pool."""


class Slice(NamedTuple):
    """One branch's part of a step."""

    branch: Branch
    take: int
    """Tokens of the branch to compute."""
    width: int
    """Tokens to hand to the session; more than `take` where a static shape is filled up. Padding comes last."""


class Policy(Protocol):
    def plan(self, branches: Sequence[Branch], limits: Limits, pages: Pages) -> list[Slice]:
        """What to run next. Not empty when any branch is runnable; those without a state are admitted by it."""
        ...

    def victim(self, branches: Sequence[Branch], plan: Sequence[Slice]) -> Branch | None:
        """Whose cache to give up after `plan` did not fit; None when nobody may lose it and the oldest must fail."""
        ...


@dataclass(frozen=True)
class Fair:
    """Decodes first, least recently served first; prompts by arrival, in chunks; the least computed gives way.

    The oldest runnable branch never gives way, so that something always finishes.
    """

    chunk: int = 1024
    """Most tokens of one prompt in a step when nobody decodes: a cancel waits for one step."""
    mixed_chunk: int = 512
    """Most prompt tokens in a step that also decodes, so that running answers do not stall."""
    most_looped: int = 4
    """How many sequences hold a cache at once where a session runs one at a time."""
    spare: float = 0.01
    """Share of the pool left free when a new sequence is admitted."""

    def plan(self, branches: Sequence[Branch], limits: Limits, pages: Pages) -> list[Slice]:
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

    def _fill(self, order: Sequence[Branch], limits: Limits) -> list[Slice]:
        plan: list[Slice] = []
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
                # A static shape larger than what the policy likes but within the limits is better than none.
                fitted = fit(pending, room, limits.context - branch.computed, limits.token_classes)
            if fitted is None:
                continue
            take, width = fitted
            plan.append(Slice(branch, take, width))
            room -= width
            if pending > 1:
                prompt_room -= width
            else:
                prompt_room = min(prompt_room, self.mixed_chunk)
        return plan

    def _admit(
        self, ready: Sequence[Branch], running: Sequence[Branch], limits: Limits, pages: Pages
    ) -> Iterable[Branch]:
        """Those without a cache that may start: in order of arrival, none overtakes."""
        slots = max(limits.max_sequences, self.most_looped) - len(running)
        admitted: list[Branch] = []
        free = 0
        if limits.page_tokens:
            total, free = pages()
            free -= int(total * self.spare)
            free -= sum(_pages(b.pending, limits.page_tokens) for b in running)
        for branch in sorted((b for b in ready if b.state is None), key=lambda b: b.age):
            alone = not running and not admitted
            if limits.page_tokens:
                # One that gave way once waits for headroom, or it would soon have to again.
                free -= _pages(len(branch.tokens) + 1, limits.page_tokens)
                fits = free >= (len(running) if branch.preempted else 0)
            else:
                fits = not branch.preempted
            if not alone and (len(admitted) >= slots or not fits):
                break
            admitted.append(branch)
        return admitted

    def victim(self, branches: Sequence[Branch], plan: Sequence[Slice]) -> Branch | None:
        oldest = min((part.branch for part in plan), key=lambda b: b.age)
        holders = [branch for branch in branches if branch.state is not None and branch is not oldest]
        if not holders:
            return None
        return min(holders, key=lambda b: (b.runnable, b.computed, (-b.age[0], -b.age[1])))


def fit(pending: int, room: int, space: int, classes: tuple[int, ...]) -> tuple[int, int] | None:
    """How many of `pending` tokens to compute and in how wide a shape, or None when no shape fits.

    Any length goes where `classes` is empty. Among static shapes: the smallest that holds all, if at most three
    quarters of it would be padding or nothing smaller is full; else the largest that the tokens fill.

    Args:
        pending: tokens to compute, at least 1.
        room: widest shape that the step has room for.
        space: tokens that the sequence's cache can still take, padding included until it is cut off.
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

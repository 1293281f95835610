"""What the engine works on: a `Request` with one `Branch` per answer, and the events it sends back.

Plain bookkeeping. Only the thread that leads the engine changes a branch; the reader takes events and asks to cancel.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from transom.contract import State
from transom.generation.results import FinishReason, TokenLogprobs
from transom.generation.sampling import Sampled


class Token(NamedTuple):
    """A token was chosen for one of the answers."""

    branch: int
    id: int
    logprobs: TokenLogprobs | None
    finish: FinishReason | None
    """Set on the last one of an answer."""


class Prefilled(NamedTuple):
    """So many of the prompt's tokens are in the cache."""

    done: int
    total: int


Event = Token | Prefilled


class Chooser(Protocol):
    """What a branch asks for its next token; `transom.generation.sampling.Sampler` is one."""

    top_k: int

    def sample(self, logits: Any) -> Sampled: ...


class Branch:
    """One sequence of tokens: the prompt and what was generated after it."""

    __slots__ = (
        "cancelled",
        "chooser",
        "finish",
        "index",
        "preempted",
        "request",
        "served",
        "state",
        "tokens",
        "unforked",
    )

    def __init__(self, request: Request, index: int, tokens: list[int], chooser: Chooser | None, unforked: bool):
        self.request = request
        self.index = index
        self.tokens = tokens
        self.chooser = chooser
        """None: the request wants logits, not tokens."""
        self.state: State | None = None
        self.unforked = unforked
        """Waits for the first branch to have read the prompt, then shares its cache."""
        self.finish: FinishReason | None = None
        self.cancelled = False
        self.preempted = False
        """Lost its cache to others; it comes back when there is room for all it had."""
        self.served = 0
        """The number of the last step it was part of."""

    @property
    def computed(self) -> int:
        """Tokens that need no computing: those cached, but for the last, whose logits are wanted."""
        return 0 if self.state is None else min(self.state.length, len(self.tokens) - 1)

    @property
    def pending(self) -> int:
        """Tokens still to be computed before the next one can be chosen: 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def runnable(self) -> bool:
        return self.finish is None and not self.unforked and not self.request.paused

    @property
    def age(self) -> tuple[int, int]:
        """Sorts by arrival, oldest first."""
        return self.request.arrival, self.index


class Request:
    """One prompt and `len(choosers)` answers to it, or with no chooser its logits.

    Args:
        prompt: token ids, at least one.
        choosers: one for each answer.
        stop_ids: tokens that end an answer.
        max_new_tokens: at least 1.
        progress: send `Prefilled` events.
        cancel: is looked at before and after each step.
        read_ahead: how many events may wait unread before this request pauses.
        sparsity: the policy for its steps, in canonical form; None: as the model was loaded.
        counted: have the session tell how many keys were read.
        chosen: a policy chooses keys, so that it matters where steps begin.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        choosers: Sequence[Chooser],
        *,
        stop_ids: frozenset[int] = frozenset(),
        max_new_tokens: int = 1,
        progress: bool = False,
        cancel: threading.Event | None = None,
        read_ahead: int = 256,
        sparsity: str | None = None,
        counted: bool = False,
        chosen: bool = False,
    ) -> None:
        self.prompt_tokens = len(prompt)
        self.stop_ids = stop_ids
        self.max_new_tokens = max_new_tokens
        self.progress = progress
        self.sparsity = sparsity
        self.counted = counted
        self.chosen = chosen
        self.cached_tokens = 0
        """Of the prompt: taken from what an earlier sequence had computed."""
        self.branches = [
            Branch(self, i, list(prompt), chooser, unforked=i > 0) for i, chooser in enumerate(choosers or (None,))
        ]
        self.events: deque[Event] = deque()
        self.logits: NDArray[np.float32] | None = None
        """float32 [tokens, vocabulary], filled as far as the branch is computed; for a request without choosers."""
        self.keys_read: NDArray[np.float64] | None = None
        """float64 [2, layers, kv_heads] over all steps, as `SparseSession.keys_read`; None: not counted."""
        self.error: Exception | None = None
        self.cancelled = False
        self._cancel = cancel
        self._room = read_ahead * len(self.branches)
        self.arrival = 0
        self.wake: threading.Condition | None = None
        """Set while a reader waits in the engine."""
        self.submitted = self.started = self.first_token = self.ended = 0.0
        """Moments by the wall clock (`time.perf_counter`); 0 until they happen."""
        self.busy_started = self.busy_first = self.busy_last = 0.0
        """The start, the first and the latest token by the engine's busy clock."""

    @property
    def done(self) -> bool:
        return self.error is not None or all(branch.finish is not None for branch in self.branches)

    @property
    def paused(self) -> bool:
        """Its reader does not keep up, or has been forgotten."""
        return len(self.events) >= self._room

    @property
    def cancel_requested(self) -> bool:
        return self.cancelled or (self._cancel is not None and self._cancel.is_set())

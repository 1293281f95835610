"""The engine's unit of work: a `Request` with one `Branch` per answer, and the events that it sends.

Plain bookkeeping. Only the engine's leader changes a branch; the reader takes events and requests cancellation.
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


class TokenEvent(NamedTuple):
    """A token was chosen for one of the answers."""

    branch: int
    id: int
    logprobs: TokenLogprobs | None
    finish: FinishReason | None
    """Set for the last token of an answer."""


class PrefillEvent(NamedTuple):
    """`done` of the prompt's `total` tokens are in the cache."""

    done: int
    total: int


Event = TokenEvent | PrefillEvent


class TokenSampler(Protocol):
    """Chooses the tokens of a branch; `transom.generation.sampling.Sampler` implements it."""

    top_k: int

    def sample(self, logits: Any) -> Sampled: ...


class Branch:
    """One sequence of tokens: the prompt and the tokens generated after it."""

    __slots__ = (
        "awaiting_fork",
        "began",
        "cancelled",
        "finish",
        "index",
        "preempted",
        "request",
        "sampler",
        "served",
        "state",
        "tokens",
    )

    def __init__(
        self, request: Request, index: int, tokens: list[int], sampler: TokenSampler | None, awaiting_fork: bool
    ):
        self.request = request
        self.index = index
        self.tokens = tokens
        self.sampler = sampler
        """None: the request is for logits, not tokens."""
        self.state: State | None = None
        self.began: int | None = None
        """Tokens in the cache when the step began that computes this sequence; None between steps."""
        self.awaiting_fork = awaiting_fork
        """Whether it waits until the first branch has read the prompt, to share its cache."""
        self.finish: FinishReason | None = None
        self.cancelled = False
        self.preempted = False
        """Whether it lost its cache to others. It continues when there is room for its whole sequence."""
        self.served = 0
        """The number of the last step it was part of."""

    @property
    def computed(self) -> int:
        """Number of tokens that need not be computed: the cached ones, except the last, whose logits are needed."""
        return 0 if self.state is None else min(self.state.length, len(self.tokens) - 1)

    @property
    def pending(self) -> int:
        """Number of tokens to compute before the next one can be chosen: 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def runnable(self) -> bool:
        return self.finish is None and not self.awaiting_fork and not self.request.paused

    @property
    def age(self) -> tuple[int, int]:
        """Sort key: by arrival, oldest first."""
        return self.request.arrival, self.index


class Request:
    """One prompt and `len(samplers)` answers to it, or its logits if there is no sampler.

    Args:
        prompt: token ids, at least one.
        samplers: one per answer.
        stop_ids: tokens that end an answer.
        max_new_tokens: at least 1.
        progress: send `PrefillEvent` events.
        cancel: checked before and after each step.
        read_ahead: how many unread events per answer pause the request.
        sparsity: the policy for its steps, in canonical form; None: the loaded model's policy.
        count_keys: count the keys that are read.
        selects_keys: a policy selects keys, so that results depend on where steps begin.
        salt: caches are shared with requests of the same salt.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        samplers: Sequence[TokenSampler],
        *,
        stop_ids: frozenset[int] = frozenset(),
        max_new_tokens: int = 1,
        progress: bool = False,
        cancel: threading.Event | None = None,
        read_ahead: int = 256,
        sparsity: str | None = None,
        count_keys: bool = False,
        selects_keys: bool = False,
        salt: str = "",
    ) -> None:
        self.prompt_tokens = len(prompt)
        self.stop_ids = stop_ids
        self.max_new_tokens = max_new_tokens
        self.progress = progress
        self.sparsity = sparsity
        self.count_keys = count_keys
        self.selects_keys = selects_keys
        self.salt = salt
        self.cached_tokens = 0
        """Number of prompt tokens taken from the cache of an earlier sequence."""
        self.branches = [
            Branch(self, i, list(prompt), sampler, awaiting_fork=i > 0) for i, sampler in enumerate(samplers or (None,))
        ]
        self.events: deque[Event] = deque()
        self.logits: NDArray[np.float32] | None = None
        """float32 [tokens, vocabulary], filled as far as the branch is computed; only for requests without samplers."""
        self.keys_read: NDArray[np.float64] | None = None
        """float64 [2, layers, kv_heads] over all steps, see `SparseSession.keys_read`; None: not counted."""
        self.error: Exception | None = None
        self.cancelled = False
        self._cancel = cancel
        self._room = read_ahead * len(self.branches)
        self.arrival = 0
        self.wake: threading.Condition | None = None
        """Set while a reader waits in the engine."""
        self.submitted = self.started = self.first_token = self.ended = 0.0
        """Times of the wall clock (`time.perf_counter`); 0 until they happen."""
        self.busy_started = self.busy_first = self.busy_last = 0.0
        """Times of the start, the first and the latest token, by the engine's busy clock."""

    @property
    def done(self) -> bool:
        return self.error is not None or all(branch.finish is not None for branch in self.branches)

    @property
    def paused(self) -> bool:
        """Whether its reader is too slow, or is gone."""
        return len(self.events) >= self._room

    @property
    def cancel_requested(self) -> bool:
        return self.cancelled or (self._cancel is not None and self._cancel.is_set())

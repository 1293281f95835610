"""What a generation gives back: text, tokens, usage, timings, log-probabilities. Plain data, no behaviour.

Also `Piece`, what a stream yields: a `str` that carries where it belongs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FinishReason = Literal["stop", "length", "cancelled"]
"""`stop`: the model, a stop string, a stop token or the guide ended it; `length`: `max_new_tokens` or the context is
full; `cancelled`: somebody asked to stop."""


class TokenAlternative(NamedTuple):
    """A token that might have been chosen, and the natural log of its probability."""

    id: int
    logprob: float
    bytes: bytes | None = None
    """The token's bytes; None without a tokenizer. They need not be whole UTF-8 characters."""


class TokenLogprobs(NamedTuple):
    """The log-probability of a chosen token and of the likeliest ones, best first, as the model gave them: before
    penalties, bias, guide and temperature."""

    id: int
    logprob: float
    top: tuple[TokenAlternative, ...]
    bytes: bytes | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens paid for."""

    prompt_tokens: int
    """Tokens of the prompt, counted once however many answers were asked for."""
    completion_tokens: int
    """Tokens generated over all answers, end-of-text tokens included."""
    cached_tokens: int = 0
    """Tokens of the prompt that were not read: an earlier call, or a prompt cache, had read the same beginning."""

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timings:
    """Seconds and rates of one generation. Rates count the time in which the engine worked, whoever drove it: a
    reader that dawdles over a stream does not slow them."""

    queued: float
    """Seconds from the call until the first step with this prompt."""
    time_to_first_token: float
    """Seconds from the call until the first token was chosen; queueing and tokenizing included."""
    prefill_tokens_per_second: float
    """Prompt tokens per second; 0 when nothing was generated."""
    decode_tokens_per_second: float
    """Tokens after the first, over all answers, per second; 0 when there were none."""
    total: float
    """Seconds from the call until the end."""


@dataclass(frozen=True)
class Choice:
    """One answer."""

    index: int
    text: str
    """Without end-of-text tokens and without the stop string. Empty for a model without a tokenizer."""
    token_ids: tuple[int, ...]
    """All generated ids, the one that ended the output included."""
    finish_reason: FinishReason
    stop: str | int | None = None
    """The stop string or the token id that ended it."""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One for each id of `token_ids`; None unless asked for."""


@dataclass(frozen=True)
class Generation:
    """The result of a call. The properties speak of the first answer; `str()` is its text."""

    choices: tuple[Choice, ...]
    usage: Usage
    timings: Timings
    prompt_token_ids: tuple[int, ...] = field(default=(), repr=False)
    densities: NDArray[np.float64] | None = field(default=None, repr=False, compare=False)
    """[layers, KV heads]: the share of the keys that was read, over prompt and answers; NaN where a layer has no such
    head. None: all of them, or the backend does not count."""

    @property
    def density(self) -> float | None:
        """The mean of `densities`."""
        if self.densities is None:
            return None
        known = self.densities[self.densities == self.densities]  # NaN equals nothing
        return float(known.mean()) if known.size else None

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        return self.choices[0].logprobs

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """For JSON: bytes become text where they are UTF-8 and lists of numbers where not."""
        return {
            "choices": [
                {
                    "index": choice.index,
                    "text": choice.text,
                    "token_ids": list(choice.token_ids),
                    "finish_reason": choice.finish_reason,
                    "stop": choice.stop,
                    "logprobs": None if choice.logprobs is None else [_logprobs_dict(t) for t in choice.logprobs],
                }
                for choice in self.choices
            ],
            "usage": {
                "prompt_tokens": self.usage.prompt_tokens,
                "completion_tokens": self.usage.completion_tokens,
                "cached_tokens": self.usage.cached_tokens,
                "total_tokens": self.usage.total_tokens,
            },
            "timings": {name: getattr(self.timings, name) for name in Timings.__dataclass_fields__},
            "densities": None
            if self.densities is None
            else [[None if share != share else share for share in layer] for layer in self.densities.tolist()],
        }


def densities_of(keys_read: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
    """Shares [layers, KV heads] out of keys read and keys there, [2, layers, KV heads]; NaN where there are none."""
    if keys_read is None:
        return None
    import numpy as np

    read, there = keys_read
    shares: NDArray[np.float64] = np.divide(read, there, out=np.full_like(read, np.nan), where=there > 0)
    return shares


class Piece(str):
    """A stretch of text that is final: whole characters, and no part of a stop string that may still come."""

    choice: int
    """Which answer it belongs to: its place in `Generation.choices`."""
    token_ids: tuple[int, ...]
    """The ids that became final with it; may be several, or none."""
    logprobs: tuple[TokenLogprobs, ...] | None
    """One for each of `token_ids`; None unless asked for."""

    __slots__ = ("choice", "logprobs", "token_ids")

    def __new__(
        cls,
        text: str,
        choice: int = 0,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] | None = None,
    ) -> Piece:
        piece = super().__new__(cls, text)
        piece.choice = choice
        piece.token_ids = token_ids
        piece.logprobs = logprobs
        return piece


def _token_dict(id: int, logprob: float, data: bytes | None) -> dict[str, Any]:
    text: str | list[int] | None = None
    if data is not None:
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = list(data)
    return {"id": id, "logprob": logprob, "token": text}


def _logprobs_dict(entry: TokenLogprobs) -> dict[str, Any]:
    top = [_token_dict(t.id, t.logprob, t.bytes) for t in entry.top]
    return {**_token_dict(entry.id, entry.logprob, entry.bytes), "top": top}

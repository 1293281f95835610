"""The results of a generation: text, tokens, usage, timings, log-probabilities. Plain data.

Also `StreamPiece`, the item of a stream: a `str` with its answer, tokens and log-probabilities.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from transom.text.tool_calls import ToolCall

FinishReason = Literal["stop", "length", "cancelled"]
"""`stop`: the model, a stop string, a stop token or the guide ended the answer; `length`: it reached `max_new_tokens`
or the end of the context; `cancelled`: it was cancelled."""

Limit = Literal["max_new_tokens", "model_default", "context"]
"""What bounds an answer: the option `max_new_tokens`, the model's own default for it, or the end of the context."""


class TokenAlternative(NamedTuple):
    """A candidate token, and the natural log of its probability."""

    id: int
    logprob: float
    bytes: bytes | None = None
    """The token's bytes, not necessarily whole UTF-8 characters; None without a tokenizer."""


class TokenLogprobs(NamedTuple):
    """The log-probabilities of a chosen token and of the most likely ones, best first. They are the model's,
    before penalties, bias, guide and temperature."""

    id: int
    logprob: float
    top: tuple[TokenAlternative, ...]
    bytes: bytes | None = None


@dataclass(frozen=True)
class Usage:
    """Token counts."""

    prompt_tokens: int
    """Tokens of the prompt, counted once for any number of answers."""
    completion_tokens: int
    """Tokens generated in all answers, including end-of-text tokens."""
    cached_tokens: int = 0
    """Tokens of the prompt that were not computed: an earlier call, or a prompt cache, had the same beginning."""

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timings:
    """Seconds and rates of one generation. Rates use only the time in which the engine ran, so a slow reader of a
    stream does not reduce them."""

    queued: float
    """Seconds from the call until the first step with this prompt."""
    time_to_first_token: float
    """Seconds from the call until the first token was chosen, including queueing and tokenization."""
    prefill_tokens_per_second: float
    """Prompt tokens per second; 0 if nothing was generated."""
    decode_tokens_per_second: float
    """Tokens per second in all answers, without the first of each; 0 if there were none."""
    total: float
    """Seconds from the call until the end."""


@dataclass(frozen=True)
class Choice:
    """One answer."""

    index: int
    text: str
    """The text, without end-of-text tokens and stop string. Empty for a model without a tokenizer."""
    token_ids: tuple[int, ...]
    """All generated ids, including the one that ended the output."""
    finish_reason: FinishReason
    stop: str | int | None = None
    """The stop string or the token id that ended it."""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One entry per id of `token_ids`; None unless requested."""
    cut_by: Limit | None = None
    """The limit that ended it, if `finish_reason` is "length"; otherwise None."""
    conforms: bool | None = None
    """Whether the answer, without the stop string or token that ended it, is complete by its schema, expression, choice
    or grammar; False if it was cancelled. None: the output was not guided."""
    tool_calls: tuple[ToolCall, ...] | None = None
    """The complete calls of functions in the answer, which `text` contains as the model wrote them. None: the call had
    no tools, or the form that the chat template gives to tool calls is not known."""


@dataclass(frozen=True)
class Generation:
    """The result of a call. The properties are those of the first answer; `str()` is its text."""

    choices: tuple[Choice, ...]
    usage: Usage
    timings: Timings
    prompt_token_ids: tuple[int, ...] = field(default=(), repr=False)
    densities: NDArray[np.float64] | None = field(default=None, repr=False, compare=False)
    """[layers, KV heads]: the fraction of keys read, over prompt and answers; NaN if a layer has fewer heads. None: all
    keys were read, or the backend does not count."""

    @property
    def density(self) -> float | None:
        """The mean of `densities`."""
        if self.densities is None:
            return None
        known = self.densities[self.densities == self.densities]  # drops NaN
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
        """The result as JSON types: bytes become text if they are UTF-8, otherwise lists of numbers."""
        return {
            "choices": [
                {
                    "index": choice.index,
                    "text": choice.text,
                    "token_ids": list(choice.token_ids),
                    "finish_reason": choice.finish_reason,
                    "stop": choice.stop,
                    "cut_by": choice.cut_by,
                    "conforms": choice.conforms,
                    "tool_calls": None
                    if choice.tool_calls is None
                    else [_tool_call_dict(i, call) for i, call in enumerate(choice.tool_calls)],
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
    """Fractions [layers, KV heads] from the counts of keys read and of all keys, [2, layers, KV heads]; NaN for 0
    keys."""
    if keys_read is None:
        return None
    import numpy as np

    read, there = keys_read
    shares: NDArray[np.float64] = np.divide(read, there, out=np.full_like(read, np.nan), where=there > 0)
    return shares


class StreamPiece(str):
    """A piece of final text: whole characters, and no part of a possible stop string."""

    choice: int
    """Index of its answer in `Generation.choices`."""
    token_ids: tuple[int, ...]
    """The ids that became final with this piece; may be empty."""
    logprobs: tuple[TokenLogprobs, ...] | None
    """One entry per id of `token_ids`; None unless requested."""

    __slots__ = ("choice", "logprobs", "token_ids")

    def __new__(
        cls,
        text: str,
        choice: int = 0,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] | None = None,
    ) -> StreamPiece:
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


def _tool_call_dict(index: int, call: ToolCall) -> dict[str, Any]:
    """As OpenAI's clients expect it, and as a message of the next call may contain it."""
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {"id": f"call{index:05d}", "type": "function", "function": function}


def _logprobs_dict(entry: TokenLogprobs) -> dict[str, Any]:
    top = [_token_dict(t.id, t.logprob, t.bytes) for t in entry.top]
    return {**_token_dict(entry.id, entry.logprob, entry.bytes), "top": top}

"""The options of a generation: `SamplingParams`, with checks, and the merging of defaults.

Sources of a value, in order of precedence:

1. the argument of the call;
2. the model's generation defaults (`generation_config.json`, GGUF metadata); with `do_sample: false`, their
   temperature, top-k, top-p and min-p are ignored, as in transformers;
3. greedy: temperature 0.

In two cases without a temperature it is 1, since sampling is implied: the model states `do_sample: true`, or the caller
passes `top_k`, `top_p`, `min_p` or an `n` above 1. Independent of models and sessions.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from transom.errors import OptionError, nearest, option

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them gives the same result as argmax."""

_SAMPLING_DEFAULTS = ("temperature", "top_k", "top_p", "min_p")
_OTHER_DEFAULTS = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_IMPLY_SAMPLING = ("top_k", "top_p", "min_p")
_GUIDES = ("json_schema", "regex", "choice", "grammar")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Immutable; every value is checked on creation.

    Raises:
        OptionError: a value is outside its range; the message names option, value and range.
    """

    temperature: float = 0.0
    """0: greedy (the most likely token). Above 0: logits are divided by it before drawing."""
    top_k: int = 0
    """Draw among the k most likely tokens only; 0: off."""
    top_p: float = 1.0
    """Draw among the fewest tokens whose probabilities reach this sum (nucleus sampling); 1: off."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one; 0: off."""
    repetition_penalty: float = 1.0
    """Above 1: tokens of the prompt and of the output become less likely (CTRL, arXiv:1909.05858); 1: off."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token that occurs in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each occurrence in the output."""
    seed: int | None = None
    """Same seed, model and device: same tokens. On some engines other generations may change the rounding. None: a
    random seed."""
    stop: tuple[str, ...] = ()
    """Strings that end the output; they are not part of the text."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the output, in addition to the model's end-of-text tokens."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids; `-inf` bans a token."""
    max_new_tokens: int | None = None
    """Maximum number of tokens to generate; None: until the model stops or its context is full."""
    n: int = 1
    """Number of answers to the same prompt, drawn independently; the first equals that of n=1."""
    logprobs: int | None = None
    """None: no log-probabilities. N: those of each chosen token and of the N most likely ones, before penalties,
    bias, guide and temperature."""
    cache_salt: str = ""
    """A prompt reuses the beginning of an earlier prompt only if both have the same salt. The time to the first token
    shows whether a prompt was used before: give each tenant a salt that others cannot guess."""
    ignore_eos: bool = False
    """Continue after the model's end-of-text tokens (for benchmarks)."""
    json_schema: Mapping[str, Any] | str | bool | None = None
    """The output is JSON that matches this schema (a dictionary, JSON text, or a pydantic model class)."""
    regex: str | None = None
    """The whole output matches this regular expression (Rust syntax)."""
    choice: tuple[str, ...] | None = None
    """The output is one of these strings."""
    grammar: str | None = None
    """The output follows this context-free grammar, in Lark or GBNF syntax."""

    def __post_init__(self) -> None:
        put = partial(object.__setattr__, self)  # the dataclass is frozen
        for name, low, high in (("temperature", 0.0, 100.0), ("min_p", 0.0, 1.0)):
            put(name, _number(name, getattr(self, name), low, high))
        put("top_p", _number("top_p", self.top_p, 0.0, 1.0, open_low=True))
        put("repetition_penalty", _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True))
        for name in ("presence_penalty", "frequency_penalty"):
            put(name, _number(name, getattr(self, name), -2.0, 2.0))
        put("top_k", _integer("top_k", self.top_k, 0, hint=" (0 turns it off)"))
        put("n", _integer("n", self.n, 1, 1024))
        if self.seed is not None:
            put("seed", _integer("seed", self.seed, 0, 2**64 - 1))
        if self.max_new_tokens is not None:
            put("max_new_tokens", _integer("max_new_tokens", self.max_new_tokens, 1))
        if self.logprobs is not None:
            put("logprobs", _integer("logprobs", self.logprobs, 0))
        if not isinstance(self.cache_salt, str):
            raise _refused("cache_salt", self.cache_salt, "a string")
        if not isinstance(self.ignore_eos, bool):
            raise _refused("ignore_eos", self.ignore_eos, "True or False")
        put("stop", _strings("stop", self.stop))
        put("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        put("logit_bias", _bias(self.logit_bias))
        self._check_guides(put)
        if self.n > 1 and self.greedy:
            greedy = option("temperature", self.temperature or 0)
            raise OptionError(
                f"{option('n', self.n)} with {greedy} would give the same answer {self.n} times",
                f"Set temperature above 0, or {option('n', 1)}.",
            )

    def _check_guides(self, put: Any) -> None:
        if self.json_schema is not None:
            put("json_schema", _schema(self.json_schema))
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise _refused(name, value, "a string that is not empty")
        if self.choice is not None:
            put("choice", _strings("choice", self.choice))
            if not self.choice:
                raise _refused("choice", (), "at least one string")
        given = [name for name in _GUIDES if getattr(self, name) is not None]
        if len(given) > 1:
            raise OptionError(f"The output cannot follow {' and '.join(given)} at once", "Pass only one of them.")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def guided(self) -> bool:
        """Whether a schema, regular expression, choice or grammar restricts the output."""
        return any(getattr(self, name) is not None for name in _GUIDES)


def resolve(
    options: Mapping[str, Any],
    *,
    params: SamplingParams | None = None,
    defaults: object | None = None,
) -> SamplingParams:
    """Merge a call's options with the model's defaults, by the rules in this module's docstring.

    Args:
        options: keyword arguments of the call; None means not given.
        params: a complete set of options. The model's defaults are then ignored, and `options` override single fields.
        defaults: any object with attributes named like the fields (and `sample`, a bool); None means absent.

    Raises:
        OptionError: an option is unknown, or a value is out of range.
    """
    unknown = [name for name in options if name not in _FIELDS]
    if unknown:
        raise OptionError(f'"{unknown[0]}" is not an option of a generation', nearest(unknown[0], _FIELDS))
    given = {name: value for name, value in options.items() if value is not None}
    if params is not None:
        if not isinstance(params, SamplingParams):
            raise OptionError(
                f"params is a {type(params).__name__}, not SamplingParams",
                f"Pass the prompt first, then SamplingParams, or pass options by name: {option('temperature', 0.7)}.",
            )
        return dataclasses.replace(params, **given)
    values: dict[str, Any] = {}
    skipped = _SAMPLING_DEFAULTS if getattr(defaults, "sample", None) is False else ()
    for name in _SAMPLING_DEFAULTS + _OTHER_DEFAULTS:
        if name in skipped:
            continue
        value = getattr(defaults, name, None)
        if value is not None and _is_allowed(name, value):
            values[name] = value
    values.update(given)
    implied = (
        getattr(defaults, "sample", None) or any(name in given for name in _IMPLY_SAMPLING) or given.get("n", 1) != 1
    )
    if implied and "temperature" not in values:
        values["temperature"] = 1.0
    return SamplingParams(**values)


def _is_allowed(name: str, value: object) -> bool:
    """Whether a model's default is valid. An invalid one (top_k=-1) is ignored, since the caller cannot fix the
    file."""
    try:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    except OptionError:
        return False
    return True


def _refused(name: str, value: object, allowed: str) -> OptionError:
    return OptionError(f"{option(name, value)} is not allowed", f"Allowed: {allowed}.")


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> float:
    allowed = f"a number above {low:g}, up to {high:g}" if open_low else f"a number from {low:g} to {high:g}"
    if isinstance(value, bool) or not hasattr(value, "__float__") or isinstance(value, str):
        raise _refused(name, value, allowed)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise _refused(name, value, allowed) from None
    if math.isnan(number) or number > high or number < low or (open_low and number <= low):
        raise _refused(name, value, allowed)
    return number


def _integer(name: str, value: object, low: int, high: int | None = None, *, hint: str = "") -> int:
    allowed = (f"a whole number of {low} or more" if high is None else f"a whole number from {low} to {high}") + hint
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise _refused(name, value, allowed)
    number = int(value.__index__())
    if number < low or (high is not None and number > high):
        raise _refused(name, value, allowed)
    return number


def _strings(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, Iterable) or isinstance(value, (bytes, Mapping)):
        raise _refused(name, value, "a string or a list of strings")
    strings = tuple(value)
    for item in strings:
        if not isinstance(item, str) or not item:
            raise _refused(name, item, "strings that are not empty")
    return strings


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if hasattr(value, "__index__"):
        value = (value,)
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes)):
        raise _refused(name, value, "a list of token ids")
    return tuple(_integer(name, item, 0) for item in value)


def _bias(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise _refused("logit_bias", value, "a mapping from token id to number")
    bias: dict[int, float] = {}
    for key, amount in value.items():
        # JSON has no integer keys: OpenAI clients send {"50256": -100}.
        token = int(key) if isinstance(key, str) and key.isdecimal() else _integer("logit_bias", key, 0)
        if isinstance(amount, bool) or not isinstance(amount, (int, float)) or math.isnan(amount) or amount == math.inf:
            raise _refused(f"logit_bias[{token}]", amount, "a finite number, or -inf to ban the token")
        bias[token] = float(amount)
    return bias


def _schema(value: object) -> Mapping[str, Any] | bool:
    describe = getattr(value, "model_json_schema", None)
    if callable(describe):
        value = describe()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise OptionError(f"json_schema is not JSON: {error}", "Pass a dictionary or JSON text.") from None
    if isinstance(value, (bool, Mapping)):
        return value
    raise _refused("json_schema", value, "a dictionary, JSON text, True (any JSON), or a pydantic model class")


_FIELDS = frozenset(f.name for f in dataclasses.fields(SamplingParams))

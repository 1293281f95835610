"""Output that follows a JSON schema, regular expression, choice or grammar, enforced by `llguidance`.

A `GuideCompiler` holds the tokenizer in the library's form, created once per model. It compiles the caller's constraint
into a `Guide`; each answer gets its own copy, which determines the tokens that may come next.

Needs the extra `transom[guided]`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from transom.errors import MissingExtra, OptionError, TransomError
from transom.generation.params import SamplingParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from transom.text import Tokenizer

_JSON_DEFAULTS: Any = {"whitespace_pattern": r"\n?[ ]{0,16}"}
"""Enough for indentation; small models tend to generate endless white space. `x-guidance` in the schema overrides
it."""


class GuideFailed(TransomError):
    """The guide failed during an output, for example because the grammar is too ambiguous."""


class Guide:
    """The position of one answer in its grammar. Not shared between answers: use `copy`."""

    def __init__(self, matcher: LLMatcher, vocabulary: int, grammar: str, eos_ids: tuple[int, ...]) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._grammar = grammar
        self.eos_ids = eos_ids
        """Tokens that end an output; allowed once the grammar is satisfied."""

    def copy(self) -> Guide:
        return Guide(self._matcher.deep_copy(), self._vocabulary, self._grammar, self.eos_ids)

    def restrict(self, scores: NDArray[np.float32]) -> None:
        """Set the logits of all tokens that may not come next to -inf, in place; float32 [vocabulary]."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.unpackbits(packed, count=min(self._vocabulary, packed.size * 8), bitorder="little").view(np.bool_)
        scores[: allowed.size][~allowed] = -np.inf
        scores[allowed.size :] = -np.inf  # ids that the model has but the tokenizer does not

    def accept(self, token: int) -> bool:
        """Advance past a chosen token. Returns whether the output is complete and nothing may follow."""
        if not self._matcher.consume_token(token):
            self._check()
            raise GuideFailed(f"The guide does not allow token {token}", "This is a bug in Transom; please report it.")
        return bool(self._matcher.is_stopped())

    @property
    def satisfied(self) -> bool:
        """Whether the output so far is complete, even if more may follow."""
        return bool(self._matcher.is_stopped() or self._matcher.is_accepting())

    def matches(self, text: bytes) -> bool:
        """Whether these bytes are a complete output; False for a grammar that names special tokens."""
        from llguidance import LLMatcher, LLTokenizer

        matcher = LLMatcher(LLTokenizer("byte"), self._grammar, log_level=0)
        return bool(matcher.consume_tokens(list(text)) and matcher.is_accepting())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GuideFailed(
                f"The guide failed: {_first_line(self._matcher.get_error())}", "Simplify the schema or grammar."
            )


class GuideCompiler:
    """Compiles guides for one model.

    Args:
        tokenizer: the model's tokenizer.
        vocabulary: size of a row of logits; may be larger than the tokenizer's.
        eos_ids: tokens that end an output; allowed once the grammar is satisfied.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, eos_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._eos_ids = tuple(eos_ids)
        self._lock = threading.Lock()
        self._made: LLTokenizer | None = None

    def compile(self, params: SamplingParams) -> Guide:
        """A new guide for the constraint in the parameters.

        Raises:
            MissingExtra: `llguidance` is not installed.
            OptionError: the schema, expression or grammar is not valid; the message quotes the library.
        """
        if find_spec("llguidance") is None:
            raise MissingExtra("Guided output (json_schema, regex, choice, grammar) needs llguidance", "guided")
        from llguidance import LLMatcher

        option, text = _grammar(params)
        matcher = LLMatcher(self._ll_tokenizer(), text, log_level=0)
        if matcher.is_error():
            raise OptionError(
                f"{option} is not usable: {_first_line(matcher.get_error())}", "Correct it, or simplify it."
            )
        return Guide(matcher, self._vocabulary, text, self._eos_ids)

    def _ll_tokenizer(self) -> LLTokenizer:
        with self._lock:
            if self._made is None:
                self._made = _make_tokenizer(self._tokenizer, self._vocabulary, self._eos_ids)
            return self._made


def _grammar(params: SamplingParams) -> tuple[str, str]:
    """The option that is set, and its grammar in the library's form."""
    from llguidance import LLMatcher, grammar_from

    if params.json_schema is not None:
        try:
            schema = json.dumps(params.json_schema if params.json_schema is not True else {})
            return "json_schema", LLMatcher.grammar_from_json_schema(schema, defaults=_JSON_DEFAULTS)
        except (RecursionError, ValueError, TypeError) as error:  # nested too deep for Python or for the library
            raise OptionError(f"json_schema cannot be used: {_first_line(str(error))}", "Simplify it.") from None
    if params.regex is not None:
        return "regex", LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        # Lark strings support JSON's escapes.
        return "choice", LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(c) for c in params.choice))
    assert params.grammar is not None
    try:
        return "grammar", grammar_from("grammar", params.grammar)
    except ValueError as error:
        raise OptionError(f"grammar cannot be read: {_first_line(str(error))}", "Use Lark or GBNF.") from error


def _make_tokenizer(tokenizer: Tokenizer, vocabulary: int, eos_ids: Sequence[int]) -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    eos = list(eos_ids)
    size = vocabulary
    if not eos:
        # The library requires one; an id past the end of the logits is never allowed.
        eos, size = [vocabulary], vocabulary + 1
    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, vocabulary, eos[0], size)), n_vocab=size, eos_token=eos)


class _Vocabulary:
    """A tokenizer in the form that `llguidance.TokenizerWrapper` requires."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, eos: int, size: int) -> None:
        self._encode: Callable[..., list[int]] = tokenizer.encode
        self.eos_token_id = eos
        self.bos_token_id = None
        self.tokens: list[bytes] = []
        self.special_token_ids: list[int] = []
        special_ids = tokenizer.special_ids
        for token in range(size):
            # The logits may be padded beyond the tokenizer's vocabulary.
            data = tokenizer.token_bytes(token) if token < vocabulary else b""
            if token in special_ids or not data:
                self.special_token_ids.append(token)
            self.tokens.append(data or b"<unused%d>" % token)

    def __call__(self, text: Any) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", errors="replace")
        return self._encode(text, add_special=False, parse_special=False)


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:300] if lines else "unknown error"

"""Streams text from a model: one `Stream` per call, on top of the engine and the tokenizer.

The engine handles only tokens. This module converts them to final text (whole characters, no part of a stop string),
and ends an answer at a stop string.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from transom.errors import OptionError
from transom.generation.engine import Engine
from transom.generation.guided import Guide, GuideCompiler
from transom.generation.params import SamplingParams
from transom.generation.prompts import check_fits, require_tokenizer
from transom.generation.requests import PrefillEvent, Request, TokenEvent
from transom.generation.results import (
    Choice,
    FinishReason,
    Generation,
    Limit,
    StreamPiece,
    Timings,
    TokenLogprobs,
    Usage,
    densities_of,
)
from transom.generation.sampling import Sampler
from transom.generation.stops import StopStrings

if TYPE_CHECKING:
    from transom.text import GenerationDefaults, Tokenizer
    from transom.text.tool_calls import ToolCall, ToolForm

PrefillProgress = Callable[[int, int], None]
"""Called in the caller's thread with (prompt tokens read, prompt tokens) after each chunk of the prompt."""


class Generator:
    """Starts generations on one model.

    Args:
        engine: runs the generations.
        tokenizer: None for a model that uses only token ids.
        defaults: the model's generation defaults.
        vocabulary: size of a row of logits.
        context: maximum number of tokens of prompt and answer together; the engine's limit also applies.
        model_context: the context that the model supports, for error messages.
        built_in: the context is fixed in a bundle, for error messages.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        defaults: GenerationDefaults,
        *,
        vocabulary: int,
        context: int,
        model_context: int | None = None,
        built_in: bool = False,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._defaults = defaults
        self._vocabulary = vocabulary
        self.context = min(context, engine.context)
        self._model_context, self._built_in = model_context, built_in
        self._guides = None if tokenizer is None else GuideCompiler(tokenizer, vocabulary, defaults.eos_ids)

    def start(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        continues: bool,
        progress: PrefillProgress | None = None,
        cancel: threading.Event | None = None,
        sparsity: str | None = None,
        count_keys: bool = False,
        selects_keys: bool = False,
        began: float | None = None,
        tool_calls: ToolForm | None = None,
    ) -> Stream:
        """Check everything, then queue a generation.

        Args:
            prompt: token ids, at least one.
            continues: the answer continues the prompt's text, so a leading space is part of it.
            sparsity: the policy for its steps, in canonical form; None: the loaded model's policy.
            count_keys: include the fraction of keys read in the result.
            selects_keys: a policy selects keys.
            began: time of the call (`time.perf_counter`), for the timings.
            tool_calls: the form in which to look for tool calls.

        Raises:
            ContextExceeded: prompt and `max_new_tokens` exceed the context.
            OptionError: the model does not support a guide, bias or stop string.
            ModelClosed: the model is closed.
        """
        began = time.perf_counter() if began is None else began
        defaults, tokenizer = self._defaults, self._tokenizer
        room = check_fits(
            len(prompt), params.max_new_tokens, self.context, self._model_context, built_in=self._built_in
        )
        limit: Limit = "context" if params.max_new_tokens is None else "max_new_tokens"
        if params.max_new_tokens is None and defaults.max_new_tokens and defaults.max_new_tokens < room:
            room, limit = defaults.max_new_tokens, "model_default"
        params = self._for_this_model(params)
        if params.stop:
            tokenizer = require_tokenizer(tokenizer)
        stops, stop_ids = self._stops(params)
        guide = None
        if params.guided:
            require_tokenizer(tokenizer)
            assert self._guides is not None
            guide = self._guides.compile(params)
        guides = [guide.copy() if guide else None for _ in range(params.n)]
        samplers = [
            Sampler(params, self._vocabulary, prompt=prompt, index=i, guide=own) for i, own in enumerate(guides)
        ]
        request = Request(
            prompt,
            samplers,
            stop_ids=stop_ids,
            max_new_tokens=room,
            progress=progress is not None,
            cancel=cancel,
            sparsity=sparsity,
            count_keys=count_keys,
            selects_keys=selects_keys,
            salt=params.cache_salt,
        )
        request.submitted = began
        answers = [
            _Answer(i, tokenizer, stops, stop_ids, params, continues, limit, own, tool_calls)
            for i, own in enumerate(guides)
        ]
        self._engine.submit(request)
        return Stream(self._engine, request, answers, progress, tuple(prompt))

    def _for_this_model(self, params: SamplingParams) -> SamplingParams:
        """Add the model's suppressed tokens and stop strings."""
        outside = [token for token in params.logit_bias if token >= self._vocabulary]
        if outside:
            raise OptionError(
                f"logit_bias names the token {outside[0]}, which the model does not have",
                f"Ids range from 0 to {self._vocabulary - 1}.",
            )
        changes: dict[str, object] = {}
        if self._defaults.suppress_ids:
            bans = {token: float("-inf") for token in self._defaults.suppress_ids if token < self._vocabulary}
            changes["logit_bias"] = bans | dict(params.logit_bias)
        if self._defaults.stop and not params.ignore_eos and self._tokenizer is not None:
            changes["stop"] = tuple(dict.fromkeys((*params.stop, *self._defaults.stop)))
        return dataclasses.replace(params, **changes) if changes else params  # type: ignore[arg-type]

    def _stops(self, params: SamplingParams) -> tuple[tuple[str, ...], frozenset[int]]:
        """Stop strings and stop tokens. Special tokens never occur in the text, so their names become token ids."""
        ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            ids.update(self._defaults.eos_ids)
        strings = []
        for stop in params.stop:
            assert self._tokenizer is not None
            token = self._tokenizer.token_to_id(stop)
            if token is not None and token in self._tokenizer.special_ids:
                ids.add(token)
            else:
                strings.append(stop)
        return tuple(strings), frozenset(ids)


class Stream:
    """A running generation: iterate over it for its text, piece by piece.

    The pieces of an answer form its text, and their `token_ids` its tokens; a last piece without text contains the
    end-of-text token. With `n` above 1 the answers are interleaved; `StreamPiece.choice` identifies the answer. Only
    one thread may iterate; any thread may call `cancel`. Leaving a `with` block cancels the rest.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        answers: list[_Answer],
        progress: PrefillProgress | None,
        prompt: tuple[int, ...],
    ) -> None:
        self._engine = engine
        self._request = request
        self._answers = answers
        self._progress = progress
        self._prompt = prompt
        self._ready: deque[StreamPiece] = deque()
        self._open = len(answers)
        self._error: BaseException | None = None
        self._ended = 0.0

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> StreamPiece:
        while not self._ready:
            if not self._open:
                raise StopIteration
            self._process_event()
        return self._ready.popleft()

    @property
    def done(self) -> bool:
        """Whether everything is generated; pieces may still be unread."""
        return not self._open

    @property
    def result(self) -> Generation:
        """The whole result; first generates the rest. Unread pieces remain readable.

        Raises:
            TransomError: an error, other than a cancellation, ended the generation early.
        """
        while self._open:
            self._process_event()
        if self._error is not None:
            raise self._error
        usage = Usage(
            self._request.prompt_tokens,
            sum(len(answer.token_ids) for answer in self._answers),
            self._request.cached_tokens,
        )
        choices = tuple(answer.choice() for answer in self._answers)
        if self._request.count_keys and self._request.error is not None:
            raise self._request.error  # the error came after its last tokens
        densities = densities_of(self._request.keys_read)
        return Generation(choices, usage, self._timings(usage), self._prompt, densities)

    def cancel(self) -> None:
        """Stop with the current step. The iteration ends, with `finish_reason` "cancelled". Any thread may call
        this."""
        self._engine.cancel(self._request)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()
        self._end_all()

    def __del__(self) -> None:
        # Dropped before its end: free its cache. `_request` is missing if __init__ failed.
        request = getattr(self, "_request", None)
        if request is not None and not request.done:
            self._engine.abandon(request)

    def __repr__(self) -> str:
        tokens = sum(len(answer.token_ids) for answer in self._answers)
        return f"<Stream {'done' if self.done else 'running'}, {tokens} tokens>"

    def _process_event(self) -> None:
        """Take and process one event from the engine."""
        try:
            event = self._engine.next_event(self._request)
            if event is None or (self._request.cancel_requested and isinstance(event, TokenEvent)):
                self._engine.cancel(self._request)
                self._end_all()
            elif isinstance(event, PrefillEvent):
                if self._progress is not None:
                    self._progress(event.done, event.total)
            else:
                self._take(event)
        except BaseException as error:
            # After Ctrl-C the partial result remains available; after an error it does not.
            if isinstance(error, Exception):
                self._error = error
            self._engine.cancel(self._request)
            self._end_all()
            raise

    def _take(self, event: TokenEvent) -> None:
        answer = self._answers[event.branch]
        if answer.finish_reason is not None:
            return  # computed before its stop string was found
        self._put(answer.push(event))
        if answer.finish_reason is not None:
            self._open -= 1
            if event.finish is None:
                self._engine.cancel(self._request, event.branch)
            if not self._open:
                self._ended = time.perf_counter()

    def _end_all(self) -> None:
        if not self._open:
            return
        for answer in self._answers:
            if answer.finish_reason is None:
                self._put(answer.end("cancelled"))
        self._open = 0
        self._ended = time.perf_counter()

    def _put(self, piece: StreamPiece | None) -> None:
        if piece is not None:
            self._ready.append(piece)

    def _timings(self, usage: Usage) -> Timings:
        request = self._request
        begun, first = request.started, request.first_token
        prefill = request.busy_first - request.busy_started if first else 0.0
        decode = request.busy_last - request.busy_first
        later = usage.completion_tokens - sum(bool(answer.token_ids) for answer in self._answers)
        return Timings(
            queued=(begun or self._ended) - request.submitted,
            time_to_first_token=(first or self._ended) - request.submitted,
            prefill_tokens_per_second=(request.prompt_tokens - request.cached_tokens) / prefill if prefill > 0 else 0.0,
            decode_tokens_per_second=later / decode if decode > 0 and later > 0 else 0.0,
            total=self._ended - request.submitted,
        )


class _Answer:
    """Converts the tokens of one answer to text."""

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer | None,
        stops: Iterable[str],
        stop_ids: frozenset[int],
        params: SamplingParams,
        continues: bool,
        limit: Limit,
        guide: Guide | None,
        tool_calls: ToolForm | None,
    ) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._stop: str | int | None = None
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._limit = limit
        self._guide = guide
        """The guide of its sampler, which the engine no longer uses once the answer has ended."""
        self._tool_form = tool_calls
        self._text: list[str] = []
        self._logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self._shown = 0
        """Number of tokens that the pieces so far have covered."""
        self._stops = StopStrings(tuple(stops))
        self._detokenizer = None if tokenizer is None else tokenizer.stream(continues=continues)

    def push(self, event: TokenEvent) -> StreamPiece | None:
        """Process a token; sets `finish_reason` if it ends the answer."""
        self.token_ids.append(event.id)
        if self._logprobs is not None and event.logprobs is not None:
            self._logprobs.append(_with_bytes(event.logprobs, self._tokenizer))
        ends = event.id in self._stop_ids
        text = ""
        if self._detokenizer is not None and not ends:
            text, found = self._stops.push(self._detokenizer.push(event.id))
            if found is not None:
                self._stop = found
                return self._piece(text, "stop")
        if ends:
            self._stop = event.id
        if event.finish is not None:
            return self.end(event.finish, text)
        return self._piece(text, None) if text or self._tokenizer is None else None

    def end(self, reason: FinishReason, text: str = "") -> StreamPiece | None:
        """The last piece: `text` and the text that was held back."""
        if self._detokenizer is not None:
            rest, found = self._stops.push(self._detokenizer.finish())
            text += rest
            if found is None:
                text += self._stops.finish()
            else:
                self._stop, reason = found, "stop"
        return self._piece(text, reason)

    def _piece(self, text: str, reason: FinishReason | None) -> StreamPiece | None:
        self.finish_reason = reason
        if text:
            self._text.append(text)
        start, self._shown = self._shown, len(self.token_ids)
        if not text and start == self._shown:
            return None
        logprobs = None if self._logprobs is None else tuple(self._logprobs[start:])
        return StreamPiece(text, self.index, tuple(self.token_ids[start:]), logprobs)

    def choice(self) -> Choice:
        assert self.finish_reason is not None
        logprobs = None if self._logprobs is None else tuple(self._logprobs)
        return Choice(
            self.index,
            "".join(self._text),
            tuple(self.token_ids),
            self.finish_reason,
            self._stop,
            logprobs,
            cut_by=self._limit if self.finish_reason == "length" else None,
            conforms=self._conforms(),
            tool_calls=self._tool_calls(),
        )

    def _tool_calls(self) -> tuple[ToolCall, ...] | None:
        if self._tool_form is None or self._tokenizer is None:
            return None
        # Special tokens mark the calls of some families, and are not in the text.
        return tuple(self._tool_form.find(self._tokenizer.decode(self.token_ids, skip_special=False)))

    def _conforms(self) -> bool | None:
        if self._guide is None:
            return None
        if self.finish_reason == "length":
            return self._guide.satisfied
        if self.finish_reason != "stop":
            return False
        if self._stop is None or self._stop in self._guide.eos_ids:
            return True  # the guide allows neither before the end
        # A stop string, or a stop token of the caller, may end the text anywhere, and is no part of it.
        assert self._tokenizer is not None  # without one, there is no guide
        text = b"".join(self._tokenizer.token_bytes(token) for token in self.token_ids)
        end = self._stop.encode() if isinstance(self._stop, str) else self._tokenizer.token_bytes(self._stop)
        before = text.partition(end)[0] if isinstance(self._stop, str) else text.removesuffix(end)
        return self._guide.matches(before)


def _with_bytes(entry: TokenLogprobs, tokenizer: Tokenizer | None) -> TokenLogprobs:
    if tokenizer is None:
        return entry
    top = tuple(t._replace(bytes=tokenizer.token_bytes(t.id)) for t in entry.top)
    return entry._replace(bytes=tokenizer.token_bytes(entry.id), top=top)

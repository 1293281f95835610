"""Text from a model: one `Stream` per call, on top of the engine and the tokenizer.

The engine knows tokens only. Here they become text that is final (whole characters, nothing of a stop string), and
the text decides with its stop strings when an answer is over.
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
from transom.generation.guided import Guides
from transom.generation.params import SamplingParams
from transom.generation.prompts import check_fits, require_tokenizer
from transom.generation.requests import Prefilled, Request, Token
from transom.generation.results import (
    Choice,
    FinishReason,
    Generation,
    Piece,
    Timings,
    TokenLogprobs,
    Usage,
    densities_of,
)
from transom.generation.sampling import Sampler
from transom.generation.stops import StopStrings

if TYPE_CHECKING:
    from transom.text import GenerationDefaults, Tokenizer

PrefillProgress = Callable[[int, int], None]
"""Called in the caller's thread with (prompt tokens read, prompt tokens) after each chunk of the prompt."""


class Generator:
    """Starts generations on one model.

    Args:
        engine: runs them.
        tokenizer: None for a model that speaks in token ids only.
        defaults: the model's own.
        vocabulary: size of a row of logits.
        context: tokens that prompt and answer may have together; the engine's own limit holds too.
        model_context: what the model was made for, to advise by.
        built_in: the context is that of a bundle, which a load cannot change; to advise by, too.
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
        self._guides = None if tokenizer is None else Guides(tokenizer, vocabulary, defaults.eos_ids)

    def start(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        continues: bool,
        progress: PrefillProgress | None = None,
        cancel: threading.Event | None = None,
        sparsity: str | None = None,
        counted: bool = False,
        chosen: bool = False,
        began: float | None = None,
    ) -> Stream:
        """Check everything, then queue a generation.

        Args:
            prompt: token ids, at least one.
            continues: the answer goes on from the prompt's text, so a leading space is part of it.
            sparsity: the policy for its steps, in canonical form; None: as the model was loaded.
            counted: the result says how many of the keys were read.
            chosen: a policy chooses keys.
            began: when the call was made (`time.perf_counter`), for the timings.

        Raises:
            ContextExceeded: prompt and `max_new_tokens` are longer than the context.
            OptionError: a guide, bias or stop string that this model cannot follow.
            ModelClosed: the model is closed.
        """
        began = time.perf_counter() if began is None else began
        defaults, tokenizer = self._defaults, self._tokenizer
        room = check_fits(
            len(prompt), params.max_new_tokens, self.context, self._model_context, built_in=self._built_in
        )
        if params.max_new_tokens is None and defaults.max_new_tokens:
            room = min(room, defaults.max_new_tokens)
        params = self._for_this_model(params)
        if params.stop:
            tokenizer = require_tokenizer(tokenizer)
        stops, stop_ids = self._stops(params)
        guide = None
        if params.guided:
            require_tokenizer(tokenizer)
            assert self._guides is not None
            guide = self._guides.compile(params)
        samplers = [
            Sampler(params, self._vocabulary, prompt=prompt, index=i, guide=guide.copy() if guide else None)
            for i in range(params.n)
        ]
        request = Request(
            prompt,
            samplers,
            stop_ids=stop_ids,
            max_new_tokens=room,
            progress=progress is not None,
            cancel=cancel,
            sparsity=sparsity,
            counted=counted,
            chosen=chosen,
        )
        request.submitted = began
        answers = [_Answer(i, tokenizer, stops, stop_ids, params, continues) for i in range(params.n)]
        self._engine.submit(request)
        return Stream(self._engine, request, answers, progress, tuple(prompt))

    def _for_this_model(self, params: SamplingParams) -> SamplingParams:
        """Add what the model's authors always want: tokens never generated, strings to stop at."""
        outside = [token for token in params.logit_bias if token >= self._vocabulary]
        if outside:
            raise OptionError(
                f"logit_bias names the token {outside[0]}, which the model does not have",
                f"Ids go from 0 to {self._vocabulary - 1}.",
            )
        changes: dict[str, object] = {}
        if self._defaults.suppress_ids:
            bans = {token: float("-inf") for token in self._defaults.suppress_ids if token < self._vocabulary}
            changes["logit_bias"] = bans | dict(params.logit_bias)
        if self._defaults.stop and not params.ignore_eos and self._tokenizer is not None:
            changes["stop"] = tuple(dict.fromkeys((*params.stop, *self._defaults.stop)))
        return dataclasses.replace(params, **changes) if changes else params  # type: ignore[arg-type]

    def _stops(self, params: SamplingParams) -> tuple[tuple[str, ...], frozenset[int]]:
        """Stop strings, and stop tokens: special tokens never show in the text, so their names become ids."""
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

    The pieces of an answer make up its text, and their `token_ids` its tokens; a last piece without text brings the
    end-of-text token. With `n` above 1 the answers come interleaved; `Piece.choice` tells them apart. One thread may
    iterate; `cancel` may be called from any. Leaving a `with` block cancels what is left.
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
        self._ready: deque[Piece] = deque()
        self._open = len(answers)
        self._error: BaseException | None = None
        self._ended = 0.0

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Piece:
        while not self._ready:
            if not self._open:
                raise StopIteration
            self._pump()
        return self._ready.popleft()

    @property
    def done(self) -> bool:
        """Whether all is generated; pieces may still wait to be read."""
        return not self._open

    @property
    def result(self) -> Generation:
        """The whole result; generates what is left first. Pieces not read yet stay readable.

        Raises:
            TransomError: what ended the generation early, other than a cancel.
        """
        while self._open:
            self._pump()
        if self._error is not None:
            raise self._error
        usage = Usage(
            self._request.prompt_tokens,
            sum(len(answer.token_ids) for answer in self._answers),
            self._request.cached_tokens,
        )
        choices = tuple(answer.choice() for answer in self._answers)
        if self._request.counted and self._request.error is not None:
            raise self._request.error  # its last tokens came all the same
        densities = densities_of(self._request.keys_read)
        return Generation(choices, usage, self._timings(usage), self._prompt, densities)

    def cancel(self) -> None:
        """Stop within the running step; the iteration ends, with `finish_reason` "cancelled". Any thread may call."""
        self._engine.cancel(self._request)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()
        self._end_all()

    def __del__(self) -> None:
        # Forgotten half-read: its cache must not stay. `_request` is missing where __init__ did not finish.
        request = getattr(self, "_request", None)
        if request is not None and not request.done:
            self._engine.abandon(request)

    def __repr__(self) -> str:
        tokens = sum(len(answer.token_ids) for answer in self._answers)
        return f"<Stream {'done' if self.done else 'running'}, {tokens} tokens>"

    def _pump(self) -> None:
        """Take one event from the engine and act on it."""
        try:
            event = self._engine.next_event(self._request)
            if event is None or (self._request.cancel_requested and isinstance(event, Token)):
                self._engine.cancel(self._request)
                self._end_all()
            elif isinstance(event, Prefilled):
                if self._progress is not None:
                    self._progress(event.done, event.total)
            else:
                self._take(event)
        except BaseException as error:
            # Ctrl-C ends the generation here and keeps what there is of it; an error has nothing to keep.
            if isinstance(error, Exception):
                self._error = error
            self._engine.cancel(self._request)
            self._end_all()
            raise

    def _take(self, event: Token) -> None:
        answer = self._answers[event.branch]
        if answer.finish_reason is not None:
            return  # computed ahead, before its stop string was seen
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

    def _put(self, piece: Piece | None) -> None:
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
    """One answer on its way from tokens to text."""

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer | None,
        stops: Iterable[str],
        stop_ids: frozenset[int],
        params: SamplingParams,
        continues: bool,
    ) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._stop: str | int | None = None
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._text: list[str] = []
        self._logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self._shown = 0
        """How many tokens the pieces handed out so far have covered."""
        self._stops = StopStrings(tuple(stops))
        self._detokenizer = None if tokenizer is None else tokenizer.stream(continues=continues)

    def push(self, event: Token) -> Piece | None:
        """Take a token; sets `finish_reason` when it ends the answer."""
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

    def end(self, reason: FinishReason, text: str = "") -> Piece | None:
        """The last piece: what was held back follows `text`."""
        if self._detokenizer is not None:
            rest, found = self._stops.push(self._detokenizer.finish())
            text += rest
            if found is None:
                text += self._stops.finish()
            else:
                self._stop, reason = found, "stop"
        return self._piece(text, reason)

    def _piece(self, text: str, reason: FinishReason | None) -> Piece | None:
        self.finish_reason = reason
        if text:
            self._text.append(text)
        start, self._shown = self._shown, len(self.token_ids)
        if not text and start == self._shown:
            return None
        logprobs = None if self._logprobs is None else tuple(self._logprobs[start:])
        return Piece(text, self.index, tuple(self.token_ids[start:]), logprobs)

    def choice(self) -> Choice:
        assert self.finish_reason is not None
        logprobs = None if self._logprobs is None else tuple(self._logprobs)
        return Choice(self.index, "".join(self._text), tuple(self.token_ids), self.finish_reason, self._stop, logprobs)


def _with_bytes(entry: TokenLogprobs, tokenizer: Tokenizer | None) -> TokenLogprobs:
    if tokenizer is None:
        return entry
    top = tuple(t._replace(bytes=tokenizer.token_bytes(t.id)) for t in entry.top)
    return entry._replace(bytes=tokenizer.token_bytes(entry.id), top=top)

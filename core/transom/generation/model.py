"""`Model`, the result of `transom.load`: text, chat, logits and plain graphs, from any thread.

Built from a `Loaded`, which the loading pipeline provides; independent of sources, backends and artifacts. On the warm
start-up path.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from transom.contract import Session
from transom.errors import ContextExceeded, EngineError, OptionError, TransomError, nearest, option
from transom.generation.engine import Engine
from transom.generation.params import SamplingParams, resolve
from transom.generation.prompts import (
    Prompt,
    chat_ids,
    checked_messages,
    larger_context,
    prompt_ids,
    require_tokenizer,
    token_ids,
)
from transom.generation.report import Report
from transom.generation.requests import PrefillEvent, Request
from transom.generation.results import Generation
from transom.generation.scheduling import SchedulingPolicy
from transom.generation.streams import Generator, PrefillProgress, Stream
from transom.signature import Decoder
from transom.sparsity import PRESETS, Heads, Sparsity
from transom.text import GenerationDefaults

if TYPE_CHECKING:
    from transom.generation.async_streams import AsyncStream
    from transom.text import ChatTemplate, Tokenizer
    from transom.text.tool_calls import ToolForm


class _SparsityArguments(TypedDict):
    """Arguments of `Generator.start` that determine which keys are read."""

    sparsity: str | None
    count_keys: bool
    selects_keys: bool


class InputSpec(NamedTuple):
    """One input of a graph without a cache."""

    dtype: str
    """The NumPy name of the dtype."""
    shape: tuple[int | str | None, ...]
    """A name or None means any length."""


@dataclass
class Loaded:
    """The parts of a loaded model."""

    session: Session
    report: Report
    decoder: Decoder | None
    """None for a graph that is not a decoder, which supports only `Model.run`."""
    context: int = 0
    """Maximum number of tokens of prompt and answer together; 0: the session's limit."""
    tokenizer: Tokenizer | None = None
    chat_template: ChatTemplate | None = None
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    inputs: Mapping[str, InputSpec] = field(default_factory=dict)
    """The inputs of a graph without a cache; empty: unknown and not checked."""
    policy: SchedulingPolicy | None = None
    sparsity: Sparsity = field(default_factory=lambda: PRESETS["off"])
    """Which keys attention reads, with the model's calibrated heads if they are known."""
    identity: str = ""
    """Identity of the compiled model, which a prompt cache must match."""
    heads: Callable[[], Heads | None] = lambda: None
    """Finds the model's calibrated heads, for the policy of a single call."""
    deterministic: bool = False
    """Whether the same request gives the same bits whatever else runs."""
    watch: AbstractContextManager[None] | None = None
    """Entered around each call that computes: notes a step that ends the process."""
    on_close: Callable[[], None] | None = None
    """Called once after the session is closed: locks and temporary files of the loading pipeline."""


class Model:
    """A loaded model. Every method may be called from any thread; concurrent generations share the engine's steps.

    Use it in a `with` block, or call `close`.
    """

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self._engine = Engine(loaded.session, loaded.policy, loaded.watch, deterministic=loaded.deterministic)
        self._generator: Generator | None = None
        self._closing = threading.Lock()
        self._tool_forms: tuple[ToolForm | None, ...] = ()
        """The form of tool calls, once it was tried."""
        if loaded.decoder is not None:
            self._generator = Generator(
                self._engine,
                loaded.tokenizer,
                loaded.defaults,
                vocabulary=loaded.decoder.vocabulary,
                context=loaded.context or loaded.session.limits.context,
                model_context=loaded.decoder.context,
                built_in=loaded.report.context_built_in,
            )

    @property
    def report(self) -> Report:
        """Which device and backend run the model and why, and why the others do not."""
        return self._loaded.report

    @property
    def name(self) -> str:
        return self._loaded.report.model

    @property
    def context(self) -> int:
        """Maximum number of tokens of prompt and answer together; 0 for a graph that is not a decoder."""
        return self._generator.context if self._generator else 0

    @property
    def decoder(self) -> Decoder | None:
        """Sizes of the decoder; None for any other graph."""
        return self._loaded.decoder

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._loaded.tokenizer

    @property
    def chat_template(self) -> ChatTemplate | None:
        return self._loaded.chat_template

    @property
    def generation_defaults(self) -> GenerationDefaults:
        """The model's end tokens, and the sampling that its authors recommend."""
        return self._loaded.defaults

    @property
    def saves_prompts(self) -> bool:
        """Whether prompt caches can be saved and loaded: the backend can, and `deterministic` does not exclude it."""
        return self._engine.saves

    @property
    def closed(self) -> bool:
        return self._engine.closed

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        sparsity: Any = None,
        progress: PrefillProgress | None = None,
        cancel: threading.Event | None = None,
        **options: Any,
    ) -> Generation:
        """Complete plain text, without a chat template.

        Args:
            prompt: text, UTF-8 bytes or token ids. The tokenizer adds the beginning-of-text token to text; an empty
                text consists of that token.
            params: how to choose tokens; None: from the options and the model's defaults
                (`transom.generation.params`).
            sparsity: which keys attention reads in this call, see `transom.load`; None: the loaded model's policy.
            progress: called with (tokens read, tokens) after each chunk of the prompt.
            cancel: set it from any thread to stop with the current step.
            options: fields of `SamplingParams`, such as `temperature=0.7`.

        Raises:
            OptionError: the prompt or an option is invalid.
            ContextExceeded: prompt and `max_new_tokens` exceed the context; nothing was computed.
            EngineError: the backend failed.
            DoesNotFit: the cache is too small for this sequence, even alone.
            ModelClosed: the model is closed, or was closed during the call.
        """
        return self.stream(prompt, params, sparsity=sparsity, progress=progress, cancel=cancel, **options).result

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        sparsity: Any = None,
        progress: PrefillProgress | None = None,
        cancel: threading.Event | None = None,
        **options: Any,
    ) -> Stream:
        """Like `generate`, but iterate over the result for pieces of text. Arguments are checked in this call.

        Raises:
            TransomError: as for `generate`; the iteration raises errors of the computation.
        """
        began = time.perf_counter()
        generator = self._require_generator()
        sampling = resolve(options, params=params, defaults=self._loaded.defaults)
        ids = prompt_ids(prompt, self._loaded.tokenizer, self._vocabulary, self._bos_id)
        reading = self._sparsity_arguments(sparsity)
        return generator.start(ids, sampling, continues=True, progress=progress, cancel=cancel, began=began, **reading)

    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        sparsity: Any = None,
        progress: PrefillProgress | None = None,
        cancel: threading.Event | None = None,
        **options: Any,
    ) -> Generation:
        """Answer a conversation, which the model's chat template formats.

        Args:
            messages: `[{"role": "user", "content": "Hello"}]`; a string is a single user message. A content may be a
                list of parts, `[{"type": "text", "text": "Hello"}]`, whose texts are joined by line breaks.
            tools: JSON schemas of functions that the model may call. The calls in an answer are in `Choice.tool_calls`.
            template_variables: variables for the template, such as `{"enable_thinking": False}`.
            params, sparsity, progress, cancel, options: as for `generate`.

        Raises:
            OptionError: there is no chat template, a message is malformed, or as for `generate`.
            ChatTemplateError: the template rejects the messages or fails.
            TransomError: as for `generate`.
        """
        return self.stream_chat(
            messages,
            params,
            tools=tools,
            template_variables=template_variables,
            sparsity=sparsity,
            progress=progress,
            cancel=cancel,
            **options,
        ).result

    def stream_chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        sparsity: Any = None,
        progress: PrefillProgress | None = None,
        cancel: threading.Event | None = None,
        **options: Any,
    ) -> Stream:
        """Like `chat`, but iterate over the result for pieces of text.

        Raises:
            TransomError: as for `chat`; the iteration raises errors of the computation.
        """
        began = time.perf_counter()
        generator = self._require_generator()
        sampling = resolve(options, params=params, defaults=self._loaded.defaults)
        ids = self._chat_ids(messages, tools, template_variables)
        form = self._tool_form() if tools else None
        reading = self._sparsity_arguments(sparsity)
        return generator.start(
            ids, sampling, continues=False, progress=progress, cancel=cancel, began=began, tool_calls=form, **reading
        )

    def _tool_form(self) -> ToolForm | None:
        """The form in which the chat template writes tool calls, tried once."""
        if not self._tool_forms:
            from transom.text.tool_calls import form_of

            template = self._loaded.chat_template
            self._tool_forms = (None if template is None else form_of(template),)
        return self._tool_forms[0]

    def astream(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> AsyncStream:
        """Like `stream`, for asyncio: `async for piece in model.astream(prompt)`.

        Cancelling the task cancels the generation. Arguments and errors are those of `stream`; errors are raised where
        the stream is awaited, and `progress` is called in another thread.
        """
        from transom.generation.async_streams import AsyncStream

        return AsyncStream(partial(self.stream, prompt, params, **options))

    async def agenerate(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> Generation:
        """Like `generate`, for asyncio. Cancelling the task cancels the generation."""
        return await self.astream(prompt, params, **options).result()

    def astream_chat(
        self, messages: str | Sequence[Mapping[str, Any]], params: SamplingParams | None = None, **options: Any
    ) -> AsyncStream:
        """Like `stream_chat`, for asyncio, in the same way as `astream`."""
        from transom.generation.async_streams import AsyncStream

        return AsyncStream(partial(self.stream_chat, messages, params, **options))

    async def achat(
        self, messages: str | Sequence[Mapping[str, Any]], params: SamplingParams | None = None, **options: Any
    ) -> Generation:
        """Like `chat`, for asyncio. Cancelling the task cancels the generation."""
        return await self.astream_chat(messages, params, **options).result()

    def count_tokens(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> int:
        """How many tokens of prompt `chat` would read for these arguments, the start of the answer included.

        Raises:
            OptionError, ChatTemplateError: as for `chat`.
        """
        self._require_generator()
        return len(self._chat_ids(messages, tools, template_variables))

    def _chat_ids(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
    ) -> list[int]:
        tokenizer, template = self._loaded.tokenizer, self._loaded.chat_template
        if template is not None and not isinstance(messages, str):
            messages = checked_messages(messages)
            if any(m.get("tool_calls") for m in messages) and (form := self._tool_form()) is not None:
                messages = form.adapted(messages)
        ids = chat_ids(messages, tokenizer, template, tools=tools, variables=variables or {})
        # A template may render an empty text, which is handled like an empty prompt.
        return ids or prompt_ids((), None, self._vocabulary, self._bos_id)

    def logits(
        self,
        tokens: Prompt,
        *,
        sparsity: Any = None,
        progress: PrefillProgress | None = None,
        cancel: threading.Event | None = None,
    ) -> NDArray[np.float32]:
        """The model's logits after each token.

        Args:
            tokens: token ids, or text, which is encoded as for `generate`.
            sparsity: as for `generate`.

        Returns:
            float32 [tokens, vocabulary]; row i scores the token that follows token i.

        Raises:
            OptionError: there are no tokens, or an id is outside the vocabulary.
            ContextExceeded: the tokens exceed the context.
            TransomError: the call was cancelled, or as for `generate`.
        """
        generator = self._require_generator()
        if isinstance(tokens, (str, bytes)):
            ids = prompt_ids(tokens, self._loaded.tokenizer, self._vocabulary, self._bos_id)
        else:
            ids = token_ids(tokens, self._vocabulary, "The argument of logits")
        if not ids:
            raise OptionError("There are no tokens to compute logits for", "Pass at least one token id.")
        if len(ids) > generator.context:
            more = larger_context("a larger context", built_in=self.report.context_built_in)
            raise ContextExceeded(
                f"There are {len(ids)} tokens; the model was loaded with a context of {generator.context}",
                f"Pass fewer, or {more}.",
            )
        policy = self._sparsity_arguments(sparsity)["sparsity"]
        request = Request(ids, (), progress=progress is not None, cancel=cancel, sparsity=policy)
        self._engine.submit(request)
        try:
            while (event := self._engine.next_event(request)) is not None:
                if isinstance(event, PrefillEvent) and progress is not None:
                    progress(event.done, event.total)
        finally:
            self._engine.cancel(request)
        if request.branches[0].finish != "stop" or request.logits is None:
            raise TransomError("The computation of logits was cancelled")
        # Requests are in reference cycles; do not wait for the garbage collector to free gigabytes.
        logits, request.logits = request.logits, None
        return logits

    def run(self, inputs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Run a graph that has no cache, once.

        Args:
            inputs: arrays by name. Arrays must have the dtype of the graph's input; lists of Python numbers are
                converted if the dtype can represent them.

        Returns:
            Arrays by the names of the graph's outputs.

        Raises:
            OptionError: the model is a decoder, or an input is missing, unknown, or has the wrong dtype or shape.
            EngineError: the backend failed.
            ModelClosed: the model is closed.
        """
        if self._loaded.decoder is not None:
            raise OptionError(
                "This model is a decoder with a cache, so it cannot be run as a plain graph",
                "Use generate(), stream(), chat() or logits().",
            )
        arrays = _checked_inputs(inputs, self._loaded.inputs)
        with self._engine.exclusive() as session:
            try:
                with self._engine.watch:
                    outputs = session.run(arrays)
            except TransomError:
                raise
            except Exception as error:
                raise EngineError(
                    f"The backend {self.report.backend} failed while running the graph: {error}",
                    "Check the shapes and values of the inputs.",
                ) from error
        return {name: np.asarray(value) for name, value in outputs.items()}

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """Token ids of a text; `add_special` adds the tokens at its ends as `generate` does.

        Raises:
            OptionError: the model has no tokenizer, or the text is not valid Unicode.
        """
        return require_tokenizer(self._loaded.tokenizer).encode(text, add_special=add_special)

    def detokenize(self, tokens: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of token ids. Bytes that are not UTF-8 become U+FFFD.

        Raises:
            OptionError: the model has no tokenizer, or the argument is not a list of token ids.
        """
        tokenizer = require_tokenizer(self._loaded.tokenizer)
        ids = token_ids(tokens, max(self._vocabulary, tokenizer.vocabulary_size), "The argument of detokenize")
        return tokenizer.decode(ids, skip_special=skip_special)

    def save_prompt_cache(self, path: str | Path) -> int:
        """Save the cache of the last generated sequence, prompt and answer, for `load_prompt_cache` in another process.
        The file contains the text, so it is as private as the text.

        Returns:
            Number of tokens saved; 0, without a file, if the sequence was shorter than a page of the cache.

        Raises:
            OptionError: the backend cannot save caches.
            OSError: the file cannot be written.
            ModelClosed: the model is closed.
        """
        from transom.generation import prompt_cache

        found = self._engine.save_latest()
        if found is None:
            return 0
        kept, arrays = found
        policy = self._loaded.sparsity.to_string() if kept.sparsity is None else kept.sparsity
        saved = prompt_cache.SavedPrompt(kept.tokens, policy, arrays)
        prompt_cache.write(Path(path), saved, self._loaded.identity)
        return len(kept.tokens)

    def load_prompt_cache(self, path: str | Path) -> int:
        """Restore a cache that `save_prompt_cache` wrote. A prompt with the same beginning is then read only from where
        it differs.

        Returns:
            Number of tokens restored.

        Raises:
            OptionError: the file cannot be read, is damaged or belongs to another compiled model, or the backend
                cannot restore caches.
            DoesNotFit: the cache is too small for it.
            ModelClosed: the model is closed.
        """
        from transom.generation import prompt_cache

        saved = prompt_cache.read(Path(path), self._loaded.identity)
        if self._loaded.deterministic and saved.sparsity != PRESETS["off"].to_string():
            asked = option("deterministic", True)
            raise OptionError(
                f"The prompt cache {path} was made with sparse attention, which depends on the steps that made it",
                f"Leave out {asked}, or do not use it.",
            )
        same = saved.sparsity == self._loaded.sparsity.to_string()
        self._engine.restore(saved.tokens, None if same else saved.sparsity, saved.arrays)
        return len(saved.tokens)

    def close(self) -> None:
        """Release all resources after the current step. Generations that have not ended raise ModelClosed. Closing
        twice has no effect."""
        try:
            self._engine.close()
        finally:
            with self._closing:
                on_close, self._loaded.on_close = self._loaded.on_close, None
            if on_close is not None:
                on_close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        report = self.report
        context = f", context {self.context}" if self._generator else ""
        closed = ", closed" if self.closed else ""
        return f"<Model {report.model or 'model'} on {report.device.id} by {report.backend}{context}{closed}>"

    @property
    def _vocabulary(self) -> int:
        return self._loaded.decoder.vocabulary if self._loaded.decoder else 0

    @property
    def _bos_id(self) -> int | None:
        if self._loaded.defaults.bos_id is not None:
            return self._loaded.defaults.bos_id
        return self._loaded.tokenizer.bos_id if self._loaded.tokenizer else None

    def _sparsity_arguments(self, sparsity: Any) -> _SparsityArguments:
        """The arguments of a request for the policy of a call.

        Raises:
            OptionError: the policy is invalid, or the backend supports only the loaded model's policy.
        """
        loaded = self._loaded.sparsity
        as_loaded: _SparsityArguments = {
            "sparsity": None,
            "count_keys": self._engine.sparse and not loaded.dense,
            "selects_keys": not loaded.dense,
        }
        if sparsity is None:
            return as_loaded
        policy = Sparsity.parse(sparsity)
        if not policy.dense and policy.heads is None:
            policy = policy.with_heads(self._loaded.heads())
        if self._loaded.decoder is not None and not policy.dense:
            policy.for_model(self._loaded.decoder)
        text = policy.to_string()
        if text == loaded.to_string():
            return as_loaded
        if not self._engine.sparse:
            raise OptionError(
                f"The backend {self.report.backend} supports only the policy with which the model was loaded, {loaded}",
                f"Load the model with {option('sparsity')} instead.",
            )
        return {"sparsity": text, "count_keys": not policy.dense, "selects_keys": not policy.dense}

    def _require_generator(self) -> Generator:
        if self._generator is None:
            raise OptionError(
                "This model is a plain graph, not a decoder, so it cannot generate text",
                "Use run({...}) with its inputs.",
            )
        return self._generator


def _checked_inputs(inputs: Mapping[str, Any], specs: Mapping[str, InputSpec]) -> dict[str, NDArray[Any]]:
    if not isinstance(inputs, Mapping):
        raise OptionError(f"inputs is a {type(inputs).__name__}, not a mapping", 'Pass {"name": array}.')
    if not specs:
        return {name: np.asarray(value) for name, value in inputs.items()}
    for name in inputs:
        if name not in specs:
            raise OptionError(f'The graph has no input "{name}"', nearest(str(name), specs))
    missing = [name for name in specs if name not in inputs]
    if missing:
        forms = ", ".join(f"{name}: {specs[name].dtype}{_shape(specs[name].shape)}" for name in missing)
        raise OptionError(f'The input "{missing[0]}" is missing', f"Pass {forms}.")
    return {name: _checked_input(name, inputs[name], spec) for name, spec in specs.items()}


def _checked_input(name: str, value: Any, spec: InputSpec) -> NDArray[Any]:
    array = np.asarray(value)
    wanted = f"Expected: {spec.dtype}{_shape(spec.shape)}."
    if str(array.dtype) != spec.dtype:
        array = _as_dtype(name, array, spec.dtype, wanted, typed=hasattr(value, "dtype"))
    fits = len(spec.shape) == array.ndim and all(
        not isinstance(want, int) or want == have for want, have in zip(spec.shape, array.shape, strict=True)
    )
    if not fits:
        raise OptionError(f'The input "{name}" has the shape {_shape(array.shape)}', wanted)
    return array


def _as_dtype(name: str, array: NDArray[Any], dtype: str, wanted: str, *, typed: bool) -> NDArray[Any]:
    """Convert Python numbers to the dtype of the graph's input; the dtype of an array must match."""
    wrong = OptionError(f'The input "{name}" is of dtype {array.dtype}', wanted)
    try:
        target = np.dtype(dtype)
    except TypeError:
        import ml_dtypes

        if not hasattr(ml_dtypes, dtype):
            raise wrong from None
        target = np.dtype(getattr(ml_dtypes, dtype))
    if typed:
        if array.dtype.newbyteorder("=") != target:
            raise wrong
        return array.astype(target)
    kinds = {"b": "b", "i": "iufV", "u": "iufV", "f": "fV", "U": "UO"}  # V: bfloat16 and such
    if target.kind not in kinds.get(array.dtype.kind, ""):
        raise wrong
    with np.errstate(over="ignore", invalid="ignore"):
        converted = array.astype(target)
    if target.kind in "iu":
        kept = bool((converted == array).all())
    elif array.dtype.kind in "iuf":
        kept = bool((np.isfinite(converted.astype(np.float64)) == np.isfinite(array)).all())
    else:
        kept = True
    if not kept:
        raise OptionError(f'The input "{name}" has numbers that {dtype} cannot represent', wanted)
    return converted


def _shape(shape: tuple[int | str | None, ...]) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"

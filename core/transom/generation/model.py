"""`Model`: what `transom.load` returns. Text, chat, logits and plain graphs, from any thread.

Built from a `Loaded`, which the loading pipeline fills; knows nothing of sources, backends and artifacts. On the warm
start-up path.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from transom.contract import Session
from transom.errors import ContextExceeded, EngineError, OptionError, TransomError, nearest, option
from transom.generation.engine import Engine
from transom.generation.params import SamplingParams, resolve
from transom.generation.prompts import Prompt, chat_ids, larger_context, prompt_ids, require_tokenizer, token_ids
from transom.generation.report import Report
from transom.generation.requests import Prefilled, Request
from transom.generation.results import Generation
from transom.generation.scheduling import Policy
from transom.generation.streams import Generator, PrefillProgress, Stream
from transom.signature import Decoder
from transom.sparsity import PRESETS, Heads, Sparsity
from transom.text import GenerationDefaults

if TYPE_CHECKING:
    from transom.text import ChatTemplate, Tokenizer


class _Reading(TypedDict):
    """Arguments of `Generator.start` that say which keys are read."""

    sparsity: str | None
    counted: bool
    chosen: bool


class InputSpec(NamedTuple):
    """One input of a graph without a cache."""

    dtype: str
    """As NumPy names it."""
    shape: tuple[int | str | None, ...]
    """A name or None stands for any length."""


@dataclass
class Loaded:
    """Everything a model is made of once it is loaded."""

    session: Session
    report: Report
    decoder: Decoder | None
    """None for a graph that is not a decoder: `Model.run` alone works."""
    context: int = 0
    """Tokens that prompt and answer may have together; 0: what the session allows."""
    tokenizer: Tokenizer | None = None
    chat_template: ChatTemplate | None = None
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    inputs: Mapping[str, InputSpec] = field(default_factory=dict)
    """Of a graph without a cache; empty: not known, and not checked."""
    policy: Policy | None = None
    sparsity: Sparsity = field(default_factory=lambda: PRESETS["off"])
    """Which keys its attention reads, with the model's own heads where they are known."""
    identity: str = ""
    """Of the compiled model: what a prompt cache must be of."""
    heads: Callable[[], Heads | None] = lambda: None
    """Finds the model's calibrated heads, for policies of single calls."""
    on_close: Callable[[], None] | None = None
    """Called once after the session is closed: locks and temporary files of the loading pipeline."""


class Model:
    """A loaded model. Every method may be called from any thread; generations then share the steps of the engine.

    Use it in a `with` block, or call `close`.
    """

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self._engine = Engine(loaded.session, loaded.policy)
        self._generator: Generator | None = None
        self._closing = threading.Lock()
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
        """Which device and backend run it, why, and why the others do not."""
        return self._loaded.report

    @property
    def name(self) -> str:
        return self._loaded.report.model

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together; 0 for a graph that is not a decoder."""
        return self._generator.context if self._generator else 0

    @property
    def decoder(self) -> Decoder | None:
        """Sizes of the decoder; None for another graph."""
        return self._loaded.decoder

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._loaded.tokenizer

    @property
    def chat_template(self) -> ChatTemplate | None:
        return self._loaded.chat_template

    @property
    def generation_defaults(self) -> GenerationDefaults:
        """Where the model's generations end, and the sampling its authors recommend."""
        return self._loaded.defaults

    @property
    def saves_prompts(self) -> bool:
        """Whether its backend can write prompt caches."""
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
        """Complete a text as it is, without a chat template.

        Args:
            prompt: text, UTF-8 bytes or token ids. Text gets the tokenizer's beginning-of-text token; an empty one is
                that token alone.
            params: how to choose tokens; without it, the options and the model's defaults say so
                (`transom.generation.params`).
            sparsity: which keys attention reads for this call, as for `transom.load`; None: as the model was loaded.
            progress: called with (tokens read, tokens) after each chunk of the prompt.
            cancel: set it from any thread to stop within the running step.
            options: fields of `SamplingParams`, such as `temperature=0.7`.

        Raises:
            OptionError: a prompt or option that is not allowed.
            ContextExceeded: prompt and `max_new_tokens` are longer than the context; nothing was computed.
            EngineError: the backend failed.
            DoesNotFit: the cache is too small for this sequence alone.
            ModelClosed: the model is closed, or was closed meanwhile.
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
        """`generate`, piece by piece: iterate over the result. Arguments are checked now, not at the first piece.

        Raises:
            TransomError: as `generate`; what happens while computing is raised by the iteration.
        """
        began = time.perf_counter()
        generator = self._require_generator()
        sampling = resolve(options, params=params, defaults=self._loaded.defaults)
        ids = prompt_ids(prompt, self._loaded.tokenizer, self._vocabulary, self._bos_id)
        reading = self._reading(sparsity)
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
        """Answer a conversation, written in the form of the model's chat template.

        Args:
            messages: `[{"role": "user", "content": "Hello"}]`; a string stands for one message of the user.
            tools: JSON schemas of functions that the model may call.
            template_variables: for the template, such as `{"enable_thinking": False}`.
            params, sparsity, progress, cancel, options: as for `generate`.

        Raises:
            OptionError: no chat template, a malformed message, or as `generate`.
            ChatTemplateError: the template refuses the messages or fails.
            TransomError: as `generate`.
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
        """`chat`, piece by piece: iterate over the result.

        Raises:
            TransomError: as `chat`; what happens while computing is raised by the iteration.
        """
        began = time.perf_counter()
        generator = self._require_generator()
        sampling = resolve(options, params=params, defaults=self._loaded.defaults)
        ids = chat_ids(
            messages,
            self._loaded.tokenizer,
            self._loaded.chat_template,
            tools=tools,
            variables=template_variables or {},
        )
        # A template that renders to nothing leaves nothing to answer to, as an empty prompt does.
        ids = ids or prompt_ids((), None, self._vocabulary, self._bos_id)
        reading = self._reading(sparsity)
        return generator.start(ids, sampling, continues=False, progress=progress, cancel=cancel, began=began, **reading)

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
            tokens: token ids; or text, which the tokenizer encodes as for `generate`.
            sparsity: as for `generate`.

        Returns:
            float32 [tokens, vocabulary]; row i scores the token that follows token i.

        Raises:
            OptionError: no tokens, or ids that the model does not have.
            ContextExceeded: more tokens than the context holds.
            TransomError: it was cancelled, or as `generate`.
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
        policy = self._reading(sparsity)["sparsity"]
        request = Request(ids, (), progress=progress is not None, cancel=cancel, sparsity=policy)
        self._engine.submit(request)
        try:
            while (event := self._engine.next_event(request)) is not None:
                if isinstance(event, Prefilled) and progress is not None:
                    progress(event.done, event.total)
        finally:
            self._engine.cancel(request)
        if request.branches[0].finish != "stop" or request.logits is None:
            raise TransomError("The computation of logits was cancelled")
        # Requests go when Python looks for cycles; gigabytes cannot wait for that.
        logits, request.logits = request.logits, None
        return logits

    def run(self, inputs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Run a graph that has no cache, once.

        Args:
            inputs: arrays by name; arrays must have the dtype that the graph wants; lists of Python numbers
                take it on where it can hold them.

        Returns:
            arrays by the names of the graph's outputs.

        Raises:
            OptionError: the model is a decoder, or an input is missing, unknown, or of the wrong dtype or shape.
            EngineError: the backend failed.
            ModelClosed: the model is closed.
        """
        if self._loaded.decoder is not None:
            raise OptionError(
                "This model is a decoder with a cache of its own, so it cannot be run as a plain graph",
                "Use generate(), stream(), chat() or logits().",
            )
        arrays = _checked_inputs(inputs, self._loaded.inputs)
        with self._engine.exclusive() as session:
            try:
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
        """Token ids of a text; with `add_special`, begun and ended as `generate` does it.

        Raises:
            OptionError: the model has no tokenizer, or the text is not valid Unicode.
        """
        return require_tokenizer(self._loaded.tokenizer).encode(text, add_special=add_special)

    def detokenize(self, tokens: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of token ids. Bytes that are no UTF-8 become U+FFFD.

        Raises:
            OptionError: the model has no tokenizer, or these are no token ids.
        """
        tokenizer = require_tokenizer(self._loaded.tokenizer)
        ids = token_ids(tokens, max(self._vocabulary, tokenizer.vocabulary_size), "The argument of detokenize")
        return tokenizer.decode(ids, skip_special=skip_special)

    def save_prompt_cache(self, path: str | Path) -> int:
        """Write the cache of the sequence that was generated last, prompt and answer, for `load_prompt_cache` in
        another process. The file holds the text, so it is as private as that.

        Returns:
            how many tokens were saved; 0, and no file, where the sequence was shorter than a page of the cache.

        Raises:
            OptionError: the backend cannot write caches.
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
        """Take up what `save_prompt_cache` wrote: a prompt that begins alike is read from where it differs.

        Returns:
            how many tokens were taken up.

        Raises:
            OptionError: the file cannot be read, is damaged, is of another compiled model, or the backend cannot.
            DoesNotFit: the cache has no room for it.
            ModelClosed: the model is closed.
        """
        from transom.generation import prompt_cache

        saved = prompt_cache.read(Path(path), self._loaded.identity)
        same = saved.sparsity == self._loaded.sparsity.to_string()
        self._engine.restore(saved.tokens, None if same else saved.sparsity, saved.arrays)
        return len(saved.tokens)

    def close(self) -> None:
        """Give everything back, after the running step; generations that have not ended raise ModelClosed. Closing
        twice does nothing."""
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

    def _reading(self, sparsity: Any) -> _Reading:
        """The policy of a call as a request takes it.

        Raises:
            OptionError: it is none, or the backend cannot read by another one than the model was loaded with.
        """
        loaded = self._loaded.sparsity
        as_loaded: _Reading = {
            "sparsity": None,
            "counted": self._engine.sparse and not loaded.dense,
            "chosen": not loaded.dense,
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
                f"The backend {self.report.backend} reads by the policy that the model was loaded with, here {loaded}",
                f"Load the model with {option('sparsity')} instead.",
            )
        return {"sparsity": text, "counted": not policy.dense, "chosen": not policy.dense}

    def _require_generator(self) -> Generator:
        if self._generator is None:
            raise OptionError(
                "This model is a plain graph, not a decoder, so it generates no text",
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
        raise OptionError(f'The input "{missing[0]}" is missing', f"Give it: {forms}.")
    return {name: _checked_input(name, inputs[name], spec) for name, spec in specs.items()}


def _checked_input(name: str, value: Any, spec: InputSpec) -> NDArray[Any]:
    array = np.asarray(value)
    wanted = f"Wanted: {spec.dtype}{_shape(spec.shape)}."
    if str(array.dtype) != spec.dtype:
        array = _as_dtype(name, array, spec.dtype, wanted, typed=hasattr(value, "dtype"))
    fits = len(spec.shape) == array.ndim and all(
        not isinstance(want, int) or want == have for want, have in zip(spec.shape, array.shape, strict=True)
    )
    if not fits:
        raise OptionError(f'The input "{name}" has the shape {_shape(array.shape)}', wanted)
    return array


def _as_dtype(name: str, array: NDArray[Any], dtype: str, wanted: str, *, typed: bool) -> NDArray[Any]:
    """Plain Python numbers in the dtype that the graph wants; an array has a dtype, which must be the right one."""
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
        raise OptionError(f'The input "{name}" has numbers that {dtype} cannot hold', wanted)
    return converted


def _shape(shape: tuple[int | str | None, ...]) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"

"""Verifies a loaded decoder against another program that runs the same files: `transom verify MODEL`.

The source determines the other program (`Source.original`): transformers for Hugging Face directories, GGUF files of
architectures that it knows and models in memory; for ONNX files the NumPy reference, with the graph as exported.

Random prompts of different lengths are run in one ragged batch, their beginnings in one step and the rest token by
token. This compares every position in prefill and cached decode, and shows whether sequences are kept separate.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from transom.contract import Progress, Session, State, Work
from transom.errors import MissingExtra, SourceError, UnsupportedError, message_lines
from transom.plugins import load_plugins
from transom.preparation.agreement import Agreement, compare
from transom.preparation.plugin_operators import register_operators
from transom.preparation.selfcheck import Array

if TYPE_CHECKING:
    from transom.generation.model import Model
    from transom.signature import Decoder
    from transom.sources.base import OriginalGraph, Pretrained

Precision = Literal["exact", "bf16", "int8", "int4"]


@dataclass(frozen=True)
class Bounds:
    """How far logits may differ before the models count as different."""

    kl_mean: float
    """Mean divergence, nats."""
    correlation_min: float
    """Lowest correlation at any position."""
    relative: float
    """Largest difference of a logit, as a share of the largest logit."""


BOUNDS: Mapping[Precision, Bounds] = {
    "exact": Bounds(1e-6, 0.99999, 1e-3),
    "bf16": Bounds(0.01, 0.995, 0.1),
    "int8": Bounds(0.05, 0.98, 0.3),
    "int4": Bounds(0.5, 0.9, 1.0),
}
"""Bounds by the least exact step between the two programs.

`exact`: both compute in float32 from the same numbers; what is left is the order of additions, below 1e-5 of the
largest logit on all families tried, while a forgotten norm, a wrong rotary base or a window one token off is above
1e-2. `bf16`: activations or weights were rounded to 8 bits of mantissa (2⁻⁹ each, growing with the root of the depth).
`int8`, `int4`: weights were rounded again, so only gross errors show; the fidelity itself is the quantizer's to report.
"""


@dataclass(frozen=True)
class Verification:
    """The result of a comparison."""

    model: str
    oracle: str
    """Name and version of the other program."""
    precision: Precision
    bounds: Bounds
    seed: int
    prompts: int
    prefill: Agreement
    decode: Agreement
    largest_logit: float
    agrees: bool
    vocabulary: int
    """Columns compared: the smaller of both vocabularies."""

    @property
    def relative(self) -> float:
        """The largest difference of a logit as a share of the largest logit."""
        return max(self.prefill.max_abs, self.decode.max_abs) / max(self.largest_logit, 1e-30)

    def __str__(self) -> str:
        head = "agrees with" if self.agrees else "DIFFERS from"
        return (
            f"{self.model} {head} {self.oracle} ({self.precision}): logits are off by at most {self.relative:.2g} of "
            f"the largest. Prefill: {self.prefill}. Cached decode: {self.decode}."
        )

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "relative": self.relative}


class Oracle(Protocol):
    """Another program that runs the same model."""

    @property
    def name(self) -> str:
        """Human-readable name with the version."""

    def logits(self, ids: Sequence[int]) -> Array:
        """float32 [tokens, vocabulary] of one sequence, without a cache."""


def verify_model(model: Model, spec: Any, **options: Any) -> Verification:
    """Compare a loaded model with the files (or the object) it was loaded from; options as in `verify_session`.

    To compare the model rather than its rounding, load it with `precision="exact"`; else say by `precision=` here what
    the backend rounded to.

    Raises:
        UnsupportedError: it is not a decoder.
        SourceError: they differ, and transformers reads the file with other settings. Others: as `oracle_for`.
    """
    if model.decoder is None:
        raise UnsupportedError(f"{model.name} is not a decoder, so there are no logits to compare", "Use model.run()")
    oracle = oracle_for(spec, progress=options.get("progress"))
    with model._engine.exclusive() as session:
        found = verify_session(
            session, oracle, vocabulary=model.decoder.vocabulary, context=model.context, name=model.name, **options
        )
    if not found.agrees and isinstance(oracle, TransformersOracle) and (unlike := oracle.misread(model.decoder)):
        raise SourceError(
            f"{oracle.name} reads {oracle.path} with other settings than the file has, so comparing with it means "
            f"nothing: {'; '.join(unlike)}",
            "Verify the Hugging Face directory that the file was made from",
        )
    return found


def verify_session(
    session: Session,
    oracle: Oracle,
    *,
    vocabulary: int,
    context: int,
    name: str = "the model",
    precision: Precision = "exact",
    prompts: int = 3,
    longest: int = 48,
    seed: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compare a session with an oracle on random prompts.

    Args:
        session: a loaded decoder.
        oracle: the program to compare with.
        vocabulary: token ids below this are drawn.
        context: longest sequence, in tokens.
        precision: the least exact step between the two; chooses the bounds.
        prompts: sequences, of different lengths, in one ragged batch as far as the session takes it.
        longest: tokens of the longest prompt. A model with a sliding window wants more than the window.
        seed: for the prompts; None draws one, and the result names it.

    Raises:
        ValueError: fewer than one prompt, or prompts too short to have a decode part.
    """
    if prompts < 1 or longest < 8:
        raise ValueError("verify needs at least one prompt of at least 8 tokens")
    number = secrets.randbits(32) if seed is None else seed
    rng = np.random.default_rng(number)
    top = max(8, min(longest, context))
    lengths = [max(6, top - int(rng.integers(0, max(top // 2, 1))) * (i > 0)) for i in range(prompts)]
    sequences = [[int(t) for t in rng.integers(0, vocabulary, n)] for n in lengths]
    firsts = [max(1, n - max(3, n // 4)) for n in lengths]
    if progress is not None:
        progress("compute", None)
    got = _through(session, sequences, firsts)
    wants = []
    for i, ids in enumerate(sequences):
        if progress is not None:
            progress("compare", i / len(sequences))
        wants.append(np.asarray(oracle.logits(ids), np.float32))
    width = min(vocabulary, *(w.shape[1] for w in wants))

    def gather(part: Callable[[Array, int], Array]) -> Agreement:
        want = np.concatenate([part(w, f)[:, :width] for w, f in zip(wants, firsts, strict=True)])
        have = np.concatenate([part(g, f)[:, :width] for g, f in zip(got, firsts, strict=True)])
        return compare(want, have)

    prefill, decode = gather(lambda rows, first: rows[:first]), gather(lambda rows, first: rows[first:])
    largest = max(float(np.abs(w[:, :width]).max()) for w in wants)
    bounds = BOUNDS[precision]
    agrees = all(
        a.kl_mean <= bounds.kl_mean
        and a.correlation_min >= bounds.correlation_min
        and a.max_abs <= bounds.relative * largest
        for a in (prefill, decode)
    )
    return Verification(name, oracle.name, precision, bounds, number, prompts, prefill, decode, largest, agrees, width)


def _through(session: Session, sequences: Sequence[Sequence[int]], firsts: Sequence[int]) -> list[Array]:
    """The logits of every position: beginnings in one step, the rest token by token, all sequences side by side."""
    limits = session.limits
    together = max(1, min(limits.max_sequences, len(sequences)))
    results: list[list[Array]] = [[] for _ in sequences]
    for start in range(0, len(sequences), together):
        group = list(range(start, min(start + together, len(sequences))))
        states = {i: session.new_state() for i in group}
        try:
            done = dict.fromkeys(group, 0)
            while any(done[i] < firsts[i] for i in group):
                _one_step(session, group, states, sequences, firsts, done, results)
            ends = [len(s) for s in sequences]
            while any(done[i] < ends[i] for i in group):
                _one_step(session, group, states, sequences, [min(done.get(i, 0) + 1, e) for i, e in enumerate(ends)],
                          done, results)  # fmt: skip
        finally:
            for state in states.values():
                state.free()
    return [np.concatenate(rows) for rows in results]


def _one_step(
    session: Session,
    group: Sequence[int],
    states: Mapping[int, State],
    sequences: Sequence[Sequence[int]],
    until: Sequence[int],
    done: dict[int, int],
    results: list[list[Array]],
) -> None:
    """Run one step that advances each sequence towards `until`, within the session's limits."""
    limits = session.limits
    room = limits.max_tokens
    work, steps = [], []
    for i in group:
        count = min(until[i] - done[i], room)
        if limits.token_classes:
            count = max((c for c in limits.token_classes if c <= count), default=0)
        if count <= 0:
            continue
        work.append(Work(states[i], sequences[i][done[i] : done[i] + count], "all"))
        steps.append((i, count))
        room -= count
    if not work:
        raise UnsupportedError(
            f"the session takes only chunks of {limits.token_classes} tokens", "Verify it on another backend"
        )
    for (i, count), rows in zip(steps, session.step(work), strict=True):
        results[i].append(np.asarray(rows, np.float32))
        done[i] += count


# oracles -------------------------------------------------------------------------------------------------------------
def oracle_for(spec: Any, *, progress: Progress | None = None) -> Oracle:
    """The program to compare a model with.

    Raises:
        MissingExtra: transformers or torch is not installed.
        SourceError: transformers cannot read the model.
    """
    from transom.sources import resolve
    from transom.sources.base import InMemory, OriginalGraph

    original = resolve(spec).original(spec)
    if progress is not None:
        progress("reference", None)
    if isinstance(original, OriginalGraph):
        register_operators(load_plugins())  # before a graph that uses them is read
        return GraphOracle(original)
    return (
        TransformersOracle.of(original.model) if isinstance(original, InMemory) else TransformersOracle.read(original)
    )


class GraphOracle:
    """A file's own graph, as exported, with an empty cache, run by the NumPy reference."""

    def __init__(self, original: OriginalGraph) -> None:
        from transom.graph.importing import import_model
        from transom.graph.raising.abstract import Fact
        from transom.reference.executor import Executor

        graph = import_model(original.read(), name=Path(original.file).stem, weights_hash="")
        self.name = f"the graph in {original.file} as exported, run by the NumPy reference"
        self._executor, self._fact = Executor(graph, keep_weights=True), Fact
        self._graph = graph.model.graph

    def logits(self, ids: Sequence[int]) -> Array:
        from transom.graph.raising.lengths import Lengths, facts_of_inputs, find_caches, find_ids

        tokens = find_ids(self._graph)
        facts = facts_of_inputs(self._graph, tokens, find_caches(self._graph), Lengths(len(ids), 0))
        inputs: dict[str, Any] = {}
        for value in self._graph.inputs:
            fact = facts[str(value.name)]
            if value is tokens:
                inputs[str(value.name)] = np.asarray([ids], value.dtype.numpy() if value.dtype else np.int64)
            elif fact.array is not None:
                inputs[str(value.name)] = fact.array
            else:
                assert fact.shape is not None
                inputs[str(value.name)] = np.zeros(fact.shape, fact.dtype.numpy() if fact.dtype else np.float32)
        outputs = self._executor.run(inputs)
        name = next((n for n in outputs if n.endswith("logits")), next(iter(outputs)))
        rows: Array = np.asarray(outputs[name], np.float32)
        return rows.reshape(len(ids), -1)


class TransformersOracle:
    """A model of the transformers package, in float32 on the CPU."""

    def __init__(self, model: Any, name: str, original: Pretrained | None = None) -> None:
        self._model, self.name, self._original = model, name, original
        self.path = None if original is None else original.path

    def misread(self, decoder: Decoder) -> list[str]:
        """Settings of the files that transformers takes for something else, in words."""
        if self._original is None or self._original.misread is None:
            return []
        windows = [layer.sliding_window for layer in decoder.layers]
        return self._original.misread(self._model.config.to_dict(), windows)

    @classmethod
    def of(cls, model: Any) -> TransformersOracle:
        """A model in memory, compared with itself as torch runs it."""
        transformers, _ = _transformers()
        if not isinstance(model, transformers.PreTrainedModel):
            raise SourceError(
                f"A {type(model).__name__} is not a transformers model, so there is nothing to compare it with",
                "Compare its outputs with model.run() yourself",
            )
        return cls(model, f"transformers {transformers.__version__} ({type(model).__name__})")

    @classmethod
    def read(cls, original: Pretrained) -> TransformersOracle:
        """The model in files, weights as float32.

        Raises:
            MissingExtra: transformers or torch is not installed.
            SourceError: transformers cannot read it.
        """
        transformers, torch = _transformers()
        kept = transformers.utils.logging.get_verbosity()
        transformers.utils.logging.set_verbosity_error()
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                **original.arguments, dtype=torch.float32, local_files_only=True, trust_remote_code=False
            )
        except Exception as e:  # any exception means that transformers cannot read it
            if "accelerate" in str(e):  # transformers needs it for some kinds of files alone
                raise MissingExtra(f"Comparing {original.kind} with transformers needs accelerate", "verify") from e
            lines = message_lines(e)
            raise SourceError(
                f"transformers {transformers.__version__} cannot read {original.path}, so there is nothing to compare "
                f"with: {lines[0]}",
                original.fix,
                lines[1:8],
            ) from e
        finally:
            transformers.utils.logging.set_verbosity(kept)
        name = f"transformers {transformers.__version__} ({type(model).__name__})"
        return cls(model.eval(), name, original)

    def logits(self, ids: Sequence[int]) -> Array:
        _, torch = _transformers()
        modes = [(part, part.training) for part in self._model.modules()]
        self._model.eval()
        try:
            with torch.no_grad():
                rows: Array = self._model(torch.tensor([list(ids)])).logits[0].float().cpu().numpy()
        except Exception as e:
            raise SourceError(
                f"{self.name} fails to run the model, so there is nothing to compare with: {message_lines(e)[0]}",
                "Update transformers, or verify on shorter prompts: --longest 16",
            ) from e
        finally:
            for part, training in modes:
                part.training = training
        return rows


def _transformers() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as e:
        raise MissingExtra("Comparing a model with transformers needs torch and transformers", "verify") from e
    return transformers, torch

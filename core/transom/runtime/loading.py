"""`transom.load`: from a path to a model that answers, on the best device there is, with the reason.

On a warm start nothing but the artifact is read: the probe, the choice, the manifest's checks, the engine's import. On
a cold one a child process reads the source, compiles, and compares the result with the reference; only what it
believed is opened here. Imports nothing heavier than the warm start needs. `Loader` also makes what `transom.export`
writes, and opens bundles (`transom.runtime.unbundling`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from transom.artifacts import Cache, Overflow, artifact_key
from transom.artifacts.files import remove_unless_held
from transom.contract import Progress
from transom.errors import (
    CacheError,
    DoesNotFit,
    EngineError,
    SelectionError,
    TransomError,
)
from transom.runtime import calibrations, failures, memory, prepared
from transom.runtime.arguments import check_arguments, check_objects
from transom.runtime.bundles import bundle_at
from transom.runtime.guarding import guarded, interrupts_kept
from transom.runtime.identity import content_key, fingerprint_of, may_use_operators
from transom.runtime.jobs import ENTRY, Job
from transom.runtime.machine import Machine, choose, survey
from transom.runtime.operators import explaining_rejected, operators_identity, register_operators
from transom.runtime.pieces import given_texts
from transom.runtime.prepared import Compiled, Prepared
from transom.runtime.report import Report
from transom.runtime.trial import run_in_child
from transom.selection import Candidate, Choice
from transom.sources import SourceModel, local_path, resolve
from transom.sparsity import Sparsity, shipped

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transom.contract import Session, Verdict
    from transom.plugins import Plugins
    from transom.runtime.model import Model
    from transom.sparsity import Heads
    from transom.text import ChatTemplate, GenerationDefaults, Tokenizer

T = TypeVar("T")

PRECISION = "precision: "
"""How an artifact's note begins that says in what numbers it computes."""


@dataclass
class Stages:
    """Seconds of each stage of a load, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - start)

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


@interrupts_kept()
def load(
    model: Any,
    *,
    device: str = "auto",
    backend: str = "auto",
    context: int | None = None,
    precision: str = "auto",
    threads: int | None = None,
    sparsity: Any = "off",
    calibration: Sequence[str | Path] = (),
    verify: str = "auto",
    probe_file: str | Path | None = None,
    cache: Cache | None = None,
    progress: Progress | None = None,
    **unknown: Any,
) -> Model:
    """Load a model onto a device.

    Args:
        model: a GGUF file, a Hugging Face directory, an ONNX file, a `torch.nn.Module` wrapped in
            `transom.TorchSource`, a transformers model, or a bundle that `transom.export` wrote. A bundle's backend is
            the one that it names, and `precision`, `sparsity` and what else is built into it are its own: `"auto"` and
            `"off"` leave them as they are, another value is an OptionError.
        device: `"auto"`, or an id that `transom.devices()` lists (`"cpu"`, `"cuda:0"`), or several for one model on all
            of them (`"cuda:0,cuda:1"`). Named, it never falls back.
        backend: `"auto"`, or a name that `transom.backends()` lists. Named, it never falls back.
        context: tokens that one sequence may have; None for the model's own, cut to what fits and said so in
            `report.warnings`.
        precision: `"auto"`, `"exact"`, `"fast"`, or a form by name; what they mean is the backend's to say, in
            `model.report.precision`.
        threads: processor threads; None for every core this process may use.
        sparsity: which keys attention reads (`transom.sparsity.Sparsity.parse`): `"off"` for all, `"safe"`,
            `"balanced"`, `"fast"`, `"classic"`, a coverage such as 0.94, a JSON file, or a `Sparsity`.
        calibration: texts, or paths of text files, that are like what the model will read, for a backend that rounds
            activations; empty for passages that come with Python.
        verify: `"auto"` compares a new artifact with the reference once on each device, `"always"` at every load,
            `"off"` never.
        probe_file: devices from a JSON file in place of the probe (`transom doctor --json` writes one).
        cache: the artifact cache; None for the default one.
        progress: called with (stage, share done or None); may raise `transom.Cancelled`, which leaves nothing
            half-done.

    Raises:
        SourceError: the model cannot be read.
        BundleError: the bundle is damaged, or of a newer Transom.
        SelectionError: nothing can run it as asked; the details say what each backend answered.
        DoesNotFit: it needs more memory than there is.
        SelfCheckFailed, EngineError, UnsupportedError: a named backend cannot run it. `auto` moves on to the next
            offer and says so in `report.warnings`.
        OptionError: an unknown option or value.
    """
    options = {"context": context, "precision": precision, "threads": threads}
    policy = os.environ.get("TRANSOM_AUTO", "").strip() or "measure"
    check_arguments(options, verify, policy, unknown)
    check_objects(cache, progress)
    asked = Asked(options, Sparsity.parse(sparsity), given_texts(calibration), verify)
    kept, told = cache or Cache.default(), progress or (lambda stage, share: None)
    if (bundle := bundle_at(model)) is not None:
        from transom.runtime.unbundling import load_bundle

        return load_bundle(
            bundle, asked, device=device, backend=backend, probe_file=probe_file, cache=kept, progress=told
        )
    loader = Loader(model, asked, cache=kept, progress=told)
    with loader.stages.time("probe"):
        machine = survey(probe_file, target=device)
        choice = choose(machine, device=device, backend=backend)
    with loader.stages.time("read"):
        loader.identify(machine.plugins)
    if choice.kinds_to_measure and policy == "measure":
        speeds = loader.speeds(machine, choice.kinds_to_measure)
        choice = choose(machine, device=device, backend=backend, measured=speeds)
    return loader.first_that_works(machine, choice, lambda turn: loader.open(machine, choice, turn))


@dataclass(frozen=True)
class Asked:
    """What the user asked for, checked."""

    options: Mapping[str, Any]
    """`precision`, `context` (None: the model's own), `threads` (None: all)."""
    sparsity: Sparsity
    texts: tuple[str, ...]
    """To calibrate on; empty for those that come with Python."""
    verify: str


@dataclass(frozen=True)
class Turn:
    """A candidate that is to be tried now, and those before it that could not."""

    candidate: Candidate
    set_aside: Sequence[tuple[Candidate, TransomError]]

    def warnings(self) -> list[str]:
        return [f"{c.backend} on {c.device.id} was set aside: {error.cause}" for c, error in self.set_aside]


@dataclass(frozen=True)
class Ready:
    """A compiled model that may be opened here, or that is only compiled for another machine."""

    source: Prepared
    stored: Compiled
    verdict: object
    plan: memory.MemoryPlan | None
    """None for a graph that is not a decoder."""
    slower: str = ""
    """Why the backend says that a fresh one would be faster."""


class _Text(NamedTuple):
    """What turns text into tokens and back."""

    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    defaults: GenerationDefaults


class Loader:
    """The state of one call of `load` or `export`."""

    bundle = ""
    """The folder that the compiled model comes from, where it is not the cache."""

    def __init__(self, model: Any, asked: Asked, *, cache: Cache, progress: Progress) -> None:
        self.options, self.verify, self.cache, self.progress = asked.options, asked.verify, cache, progress
        self.sparsity = asked.sparsity
        """As asked for; with the heads that lie beside the model or in the cache, once it is identified."""
        self.texts = asked.texts
        self._heads_from = "given with the policy" if asked.sparsity.heads else ""
        self.stages = Stages()
        self.warnings: list[str] = []
        self._model = model
        self._path = ""
        self._content = ""
        self.fingerprint = ""
        self._uses_operators = False
        """Whether the graph may use operators that plugins bring."""
        self._in_memory: SourceModel | None = None
        self._held: list[object] = []
        """Cache entries and a temporary cache that must outlive the load."""

    def identify(self, plugins: Plugins) -> None:
        """Find the source and name its content, without reading it where the content is known already."""
        path = local_path(self._model)
        if path is not None:
            self._path = str(path.absolute())
            self.fingerprint = fingerprint_of(path, self.cache)
            self._uses_operators = bool(plugins.bringing_operators()) and may_use_operators(path)
            operators = operators_identity(plugins) if self._uses_operators else ""
            self._content = content_key(self.fingerprint, operators)
            self._find_heads()
            return
        source = resolve(self._model)
        self._uses_operators = bool(plugins.bringing_operators())
        register_operators(plugins)  # before a graph that uses them is read
        # A model in memory cannot be read again by the child process: its graph goes there through the cache.
        with explaining_rejected(plugins):
            self._in_memory = source.open(self._model, context=self.options["context"], progress=self.progress)
        self._path = self._in_memory.name
        self.fingerprint = self._in_memory.graph.digest()
        self._content = content_key(self.fingerprint, operators_identity(plugins))
        self._find_heads()
        self._held.append(prepared.keep(self.cache, self._content, self._in_memory))

    def _find_heads(self) -> None:
        """Give the policy the heads that lie beside the model or in the cache, where it has none of its own."""
        if self.sparsity.dense or self.sparsity.heads is not None:
            return
        if (found := calibrations.local(self._local_path(), self.cache, self.fingerprint)) is not None:
            self.sparsity, self._heads_from = self.sparsity.with_heads(found.heads), found.source

    def _heads_finder(self, sparsity: Sparsity, source: Prepared) -> Callable[[], Heads | None]:
        """Finds the model's heads for policies of single calls, when the first one comes.

        It lives as long as the model, so it holds no `source`, which would keep its entry of the cache in use.
        """
        path, cache, fingerprint = self._local_path(), self.cache, self.fingerprint
        decoder, name = source.decoder, source.name

        def find() -> Heads | None:
            if sparsity.heads is not None or decoder is None:
                return sparsity.heads
            found = calibrations.local(path, cache, fingerprint) or shipped(decoder, name)
            return None if found is None else found.heads

        return find

    def _local_path(self) -> Path | None:
        return None if self._in_memory is not None else Path(self._path)

    # choosing by measurement ------------------------------------------------------------------------------------------
    def speeds(self, machine: Machine, candidates: Sequence[Candidate]) -> dict[str, float]:
        """Tokens per second by candidate, as remembered or measured now; 0 for one that fails.

        Empty for a graph that is not a decoder: there is no decode to time.
        """
        if self._source(self._job(machine, candidates[0])) is None:
            with self.stages.time("read"):
                self._child("read", machine, candidates[0])
        source = self._source(self._job(machine, candidates[0]))
        if source is not None and source.decoder is None:
            return {}
        # The same choice serves models of about the same size: within a power of two.
        scale = source.decoder.weight_bytes.bit_length() if source is not None and source.decoder else 0
        found: dict[str, float] = {}
        for candidate in candidates:
            place = artifact_key({"place": machine.place(candidate), "bits": scale, "as": self.options["precision"]})
            known = self.cache.recall("speeds", place)
            if not isinstance(known, int | float):
                known = self._measure(machine, candidate)
                if known:
                    self.cache.remember("speeds", place, known)
            found[candidate.key] = float(known)
        return found

    def _measure(self, machine: Machine, candidate: Candidate) -> float:
        if self._known_failure(machine, candidate) is not None:
            return 0.0
        with self.stages.time(f"measure {candidate.device.id}"):
            try:
                return float(self._child("measure", machine, candidate))
            except failures.MOVES_ON as error:  # the ranking puts it last; should its turn come, loading says why
                failures.remember(self.cache, self._job(machine, candidate), error)
                return 0.0

    # one candidate after the other ------------------------------------------------------------------------------------
    def first_that_works(self, machine: Machine, choice: Choice, use: Callable[[Turn], T]) -> T:
        """What `use` makes of the first candidate that can be used. All are within what the user named, so a promise is
        never broken."""
        set_aside: list[tuple[Candidate, TransomError]] = []
        for candidate in choice.ranked:
            alone = len(choice.ranked) == 1
            if not alone and (known := self._known_failure(machine, candidate)) is not None:
                set_aside.append((candidate, known))
                continue
            try:
                return use(Turn(candidate, set_aside))
            except failures.MOVES_ON as error:
                if alone:
                    raise
                failures.remember(self.cache, self._job(machine, candidate), error)
                set_aside.append((candidate, error))
        if all(isinstance(error, DoesNotFit) for _, error in set_aside):
            raise set_aside[0][1]
        raise SelectionError(
            "No backend could run this model",
            set_aside[0][1].fix or "Mend one of these, or try another model",
            [line for c, error in set_aside for line in f"{c.backend} on {c.device.id}: {error}".splitlines()],
        )

    def _known_failure(self, machine: Machine, candidate: Candidate) -> TransomError | None:
        return failures.remembered(self.cache, self._job(machine, candidate)) if self.verify == "auto" else None

    def open(self, machine: Machine, choice: Choice, turn: Turn) -> Model:
        """The model, opened in this process."""
        candidate = turn.candidate
        ready, cached = self.ready(machine, candidate)
        try:
            session, text = self._load(machine, candidate, ready)
        except EngineError as error:
            if not cached:
                raise
            # What an earlier process could open: the SDK has changed, or what it keeps beside the artifact has.
            ready.stored.discard(error.cause)
            ready, cached = self._prepare(machine, candidate), False
            session, text = self._load(machine, candidate, ready)
        try:
            if self.verify == "always":
                with self.stages.time("check"):
                    ready = replace(ready, verdict=self._check_here(machine, candidate, ready, session))
            return self._model_of(machine, choice, turn, ready, session, text, cached)
        except BaseException:
            session.close()
            ready.stored.release()
            raise

    # the artifact -----------------------------------------------------------------------------------------------------
    def ready(self, machine: Machine, candidate: Candidate) -> tuple[Ready, bool]:
        """The compiled model, and whether it was there already."""
        found = self._find(machine, candidate)
        return (self._prepare(machine, candidate), False) if isinstance(found, str) else (found, True)

    def drop(self, stored: Compiled) -> None:
        """Take a compiled model whose files have gone elsewhere out of the cache, unless another process uses it."""
        stored.release()
        remove_unless_held(self.cache.root / "artifacts" / stored.key, self.cache.root / "trash")

    def _source(self, job: Job) -> Prepared | None:
        return prepared.find(self.cache, job.content, job.source_context)

    def _find(self, machine: Machine, candidate: Candidate, told: object = None) -> Ready | str:
        """What the cache has and may be opened here; or why not, empty where there is simply nothing.

        Args:
            told: the verdict as a child process just gave it, in case the cache could not keep it.

        Raises:
            DoesNotFit, OptionError: as `memory.plan`.
            EngineError: the backend says that the artifact can never run here, or failed at saying anything.
        """
        job = self._job(machine, candidate)
        source = self._source(job)
        if source is None:
            return ""
        plan = self._plan(source, candidate)
        stored = self.cache.lookup(source.artifact_key(job), progress=self.progress)
        if stored is None:
            return ""
        backend = machine.plugins.backends[candidate.backend].backend
        verdict = guarded(
            candidate.backend, "checking a compiled model", lambda: backend.check(stored.artifact, candidate.device)
        )
        if verdict.state == "never":
            stored.release()
            raise EngineError(
                f"The backend {candidate.backend} cannot open this compiled model on {candidate.device.id}: "
                f"{verdict.reason}",
                "Choose another device or backend",
            )
        if reason := self._stale(stored, plan, verdict):
            stored.discard(reason)
            return reason
        if plan is not None and (bound := _bound_context(stored, plan)):
            plan = replace(plan, context=bound)
        checked = stored.verdict(job.place) or told
        if not job.believes(checked):
            stored.release()
            return "it is not believed here yet"
        return Ready(source, stored, checked, plan, verdict.reason if verdict.state == "slower" else "")

    def _stale(self, stored: Compiled, plan: memory.MemoryPlan | None, verdict: Verdict) -> str:
        """Why the artifact must be compiled anew; empty when it need not."""
        if verdict.state == "rebuild":
            return verdict.reason or "the backend wants it rebuilt"
        bound = stored.artifact.requires.get("context")
        if plan is not None and bound not in (None, str(plan.context)) and not _bound_context(stored, plan):
            return f"it was compiled for context={bound}, and {plan.context} is wanted"
        made, wanted = stored.origin.options.get("threads"), self.options["threads"]
        if "threads" in stored.artifact.requires and made != wanted:
            return f"it was compiled for threads={made}, and {wanted} is wanted"
        return ""

    def _plan(self, source: Prepared, candidate: Candidate) -> memory.MemoryPlan | None:
        if source.decoder is None:
            return None
        return memory.plan(
            source.decoder,
            candidate.device,
            context=self.options["context"],
            precision=self.options["precision"],
            exact_float32=candidate.offer.band == "fallback",
        )

    def _prepare(self, machine: Machine, candidate: Candidate) -> Ready:
        """Have a child process read, compile and check; then find what it left in the cache.

        A cache that cannot keep the artifact (disk full) is replaced by a temporary one for this process, with a
        warning: the model runs, and is compiled again next time.
        """
        for attempt in (1, 2):
            start = time.perf_counter()
            done = self._child("prepare", machine, candidate)
            parts = {f"child {stage}": seconds for stage, seconds in done["seconds"].items()}
            parts["child start"] = time.perf_counter() - start - sum(parts.values())
            for stage, seconds in parts.items():
                self.stages.add(stage, seconds)
            ready = self._find(machine, candidate, told=done["verdict"])
            if not isinstance(ready, str):
                self.warnings += done["warnings"]
                return ready
            if ready and done["kept"]:
                raise EngineError(
                    f"The backend {candidate.backend} compiled this model just now and will not open it: {ready}",
                    f"Report it to the authors of {candidate.backend}, or choose another with backend=…",
                )
            if attempt == 1:
                self._use_temporary_cache(done["warnings"] or [self.cache.keeps_nothing()])
        raise self._no_room("the compiled model")

    def _no_room(self, what: str) -> CacheError:
        return CacheError(
            f"Neither the cache nor the temporary folder {self.cache.root} can keep {what}",
            "Free some disk space, or set TRANSOM_CACHE to a folder with room",
        )

    def _use_temporary_cache(self, why: list[str]) -> None:
        """Go on in a temporary cache, and say so: with the words of the cache where it has said so itself."""
        overflow = Overflow()
        self._held.append(overflow)
        self.warnings += self.cache.warnings or why
        self.cache = Cache(overflow.root, limit=None)
        if self._in_memory is not None:
            self._held.append(prepared.keep(self.cache, self._content, self._in_memory))

    # child processes --------------------------------------------------------------------------------------------------
    def _job(self, machine: Machine, candidate: Candidate) -> Job:
        return Job(
            model=self._path,
            content=self._content,
            graph="" if self._in_memory is None else f"{self._content}-graph",
            backend=candidate.backend,
            backend_version=machine.plugins.backends[candidate.backend].version,
            band=candidate.offer.band,
            device=candidate.device,
            options=self.options,
            cache=str(self.cache.root),
            cache_limit=self.cache.limit,
            place=machine.place(candidate),
            verify=self.verify != "off",
            sparsity=self.sparsity.to_string(),
            texts=self.texts,
            runs=candidate.offer.runs_here,
        )

    def _child(self, work: str, machine: Machine, candidate: Candidate) -> Any:
        """Run a job of `transom.runtime.preparing`, with a cache in which it can leave what it makes."""
        if (error := self.cache.unwritable()) is not None:
            self._use_temporary_cache([self.cache.keeps_nothing(error)])
        job = self._job(machine, candidate)
        if self._in_memory is not None and self.cache.sources.lookup(job.graph) is None:
            self._held.append(prepared.keep_graph(self.cache, job.graph, self._in_memory.graph))
        payload = {"work": work, **job.to_payload()}
        if work == "prepare":
            from transom.runtime.beside import worth_it

            payload["beside"] = worth_it(job, self.cache)
        try:
            result = run_in_child(ENTRY, payload, progress=self.progress)
            return result.unwrap(f"Preparing the model with {candidate.backend}")
        except BaseException:
            self.cache.sweep()  # what a child that was killed had begun to write
            raise

    # opening it here --------------------------------------------------------------------------------------------------
    def _load(self, machine: Machine, candidate: Candidate, ready: Ready) -> tuple[Session, _Text]:
        backend, source = machine.plugins.backends[candidate.backend].backend, ready.source
        context = ready.plan.context if ready.plan else self.options["context"]
        options = {**self.options, "context": context, "calibration": ()}
        if self._uses_operators:
            register_operators(machine.plugins)  # a backend may open a graph that uses them
        with ThreadPoolExecutor(1) as beside, self.stages.time("load"):
            text = beside.submit(lambda: _Text(source.tokenizer(), source.chat_template(), source.generation()))
            session = guarded(
                candidate.backend,
                "loading this model",
                lambda: backend.load(ready.stored.artifact, candidate.device, options, ready.stored.scratch),
            )
            return session, text.result()

    def golden(self, machine: Machine, candidate: Candidate, source: Prepared) -> Mapping[str, Any]:
        """The reference's answers to the check prompt, computed now where the cache has them no more.

        Raises:
            CacheError: neither the cache nor a temporary folder can keep them.
        """
        from transom.runtime import selfcheck

        for attempt in (1, 2):
            if (known := selfcheck.recall_golden(self.cache, source)) is not None:
                return known
            if attempt == 2:
                self._use_temporary_cache([self.cache.keeps_nothing()])
            self._child("golden", machine, candidate)
        if (known := selfcheck.recall_golden(self.cache, source)) is not None:
            return known
        raise self._no_room("the reference's answers")

    def _check_here(self, machine: Machine, candidate: Candidate, ready: Ready, session: Session) -> dict[str, Any]:
        from transom.runtime import selfcheck

        wanted = self.golden(machine, candidate, ready.source)
        exact = bool(ready.stored.origin.ingredients.get("exact", True))
        return selfcheck.verdict(session, wanted, ready.source, backend=candidate.backend, exact=exact)

    def _model_of(
        self,
        machine: Machine,
        choice: Choice,
        turn: Turn,
        ready: Ready,
        session: Session,
        text: _Text,
        cached: bool,
    ) -> Model:
        from transom.runtime.model import InputSpec, Loaded, Model

        candidate, source, stored, plan = turn.candidate, ready.source, ready.stored, ready.plan
        sparsity, heads_from = self.sparsity, self._heads_from
        if source.decoder is not None:
            sparsity, shipped_for = calibrations.calibrated(sparsity, source.decoder, source.name)
            heads_from = heads_from or shipped_for
        warnings = [*choice.warnings, *self.cache.warnings, *self.warnings, *turn.warnings()]
        if plan is not None and plan.note:
            warnings.append(plan.note)
        if ready.slower:
            warnings.append(f"The compiled model is slower here than a fresh one: {ready.slower}")
        precision, notes = notes_of(source, stored)
        why = choice.why
        if candidate is not choice.ranked[0]:
            names = ", ".join(f"{c.backend} on {c.device.id}" for c, _ in turn.set_aside)
            why = f"{candidate.backend} on {candidate.device.id}: {candidate.offer.why}. Set aside before it: {names}."
        report = Report(
            model=source.name,
            backend=candidate.backend,
            backend_version=machine.plugins.backends[candidate.backend].version,
            device=candidate.device,
            why=why,
            source=source.kind,
            precision=precision,
            context=plan.context if plan else 0,
            model_context=source.decoder.context if source.decoder else 0,
            warnings=tuple(dict.fromkeys(warnings)),
            refusals=choice.refusals,
            notes=notes,
            memory=plan.parts() if plan else {},
            check=verdict_text(ready.verdict),
            sparsity=calibrations.described(sparsity, heads_from),
            cache_hit=cached or bool(self.bundle),
            bundle=self.bundle,
            startup=dict(self.stages.seconds),
        )
        return Model(
            Loaded(
                session=session,
                report=report,
                decoder=source.decoder,
                context=report.context,
                tokenizer=text.tokenizer,
                chat_template=text.template,
                defaults=text.defaults,
                inputs={} if source.decoder else {n: InputSpec(*spec) for n, spec in source.inputs.items()},
                sparsity=sparsity,
                identity=stored.key,
                heads=self._heads_finder(sparsity, source),
                on_close=_releaser(stored, self._held),
            )
        )


def _bound_context(stored: Compiled, plan: memory.MemoryPlan) -> int:
    """The context an artifact was compiled for, where it is good enough though not the one planned now; else 0.

    That is when `auto` cut both to the memory that was free: a little more of it today is no reason to compile anew.
    """
    bound = stored.artifact.requires.get("context", "")
    fits = plan.note and stored.origin.options.get("context") is None and bound.isdigit() and int(bound) <= plan.context
    return int(bound) if fits else 0


def _releaser(stored: Compiled, held: list[object]) -> Callable[[], None]:
    def release() -> None:
        stored.release()
        held.clear()

    return release


def notes_of(source: Prepared, stored: Compiled) -> tuple[str, tuple[str, ...]]:
    """In what numbers a compiled model computes, empty where its backend does not say; and the notes on it."""
    notes = [*source.notes, *stored.artifact.notes, *_strings(stored.origin.ingredients.get("decomposed"))]
    precision = next((n.removeprefix(PRECISION) for n in notes if n.startswith(PRECISION)), "")
    return precision, tuple(n for n in dict.fromkeys(notes) if not n.startswith(PRECISION))


def _strings(value: object) -> list[str]:
    return [str(v) for v in value] if isinstance(value, list | tuple) else []


def verdict_text(verdict: object) -> str:
    if not isinstance(verdict, dict):
        return ""
    return f"passed, {verdict['text']}" if verdict.get("checked") else str(verdict.get("reason", ""))

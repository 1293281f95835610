"""The engine of `transom.load`, of `transom.export` and of opening bundles: from a model and a choice of devices to
what is compiled, believed and open.

Where the cache has no artifact that may be opened here, a child process reads the source, compiles, and compares the
result with the reference. What it believed is opened in this process, or written down by who exports it. Imports
nothing heavier than a warm start needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from transom.artifacts import Cache, Overflow, artifact_key
from transom.errors import (
    CacheError,
    DoesNotFit,
    EngineError,
    SelectionError,
    TransomError,
)
from transom.generation.report import Report
from transom.loading import failures
from transom.loading.identity import content_key, fingerprint_of, may_use_operators
from transom.loading.machine import Machine
from transom.preparation import cached_source, heads, memory
from transom.preparation.cached_source import Compiled, Prepared
from transom.preparation.child import run_in_child
from transom.preparation.jobs import ENTRY, GOLDEN, MEASURE, PREPARE, PROVE, READ, RECHECK, Job
from transom.preparation.plugin_calls import guarded
from transom.preparation.plugin_operators import explaining_rejected, operators_identity, register_operators
from transom.selection import Candidate, Choice
from transom.sources import SourceModel, local_path, resolve
from transom.sparsity import shipped

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transom.contract import Device, Progress, Session, Verdict
    from transom.generation.model import Model
    from transom.plugins import Plugins
    from transom.sparsity import Heads, Sparsity
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
        self._held.append(cached_source.keep(self.cache, self._content, self._in_memory))

    def _find_heads(self) -> None:
        """Give the policy the heads that lie beside the model or in the cache, where it has none of its own."""
        if self.sparsity.dense or self.sparsity.heads is not None:
            return
        if (found := heads.local(self._local_path(), self.cache, self.fingerprint)) is not None:
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
            found = heads.local(path, cache, fingerprint) or shipped(decoder, name)
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
                self._child(READ, machine, candidates[0])
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
                return float(self._child(MEASURE, machine, candidate))
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

    def ready_again(self, machine: Machine, candidate: Candidate, ready: Ready) -> Ready:
        """A compiled model that was there already, held against the reference once more."""
        ready.stored.release()
        return self._have(RECHECK, machine, candidate)

    def _source(self, job: Job) -> Prepared | None:
        return cached_source.find(self.cache, job.content, job.source_context)

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
        """Have a child process read, compile and check; then find what it left in the cache."""
        return self._have(PREPARE, machine, candidate)

    def _have(self, work: str, machine: Machine, candidate: Candidate) -> Ready:
        """What a child process brings to the point where it may be opened here.

        A cache that cannot keep the artifact (disk full) is replaced by a temporary one for this process, with a
        warning: the model runs, and is compiled again next time.

        Args:
            work: `PREPARE`, or `RECHECK`, which checks again what has passed before.
        """
        for attempt in (1, 2):
            start = time.perf_counter()
            done = self._child(work, machine, candidate)
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
            self._held.append(cached_source.keep(self.cache, self._content, self._in_memory))

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

    def _child(self, work: str, machine: Machine, candidate: Candidate, **more: Any) -> Any:
        """Run a job in a child process, with a cache in which it can leave what it makes.

        Args:
            more: what it is told besides the job, in JSON types.
        """
        if (error := self.cache.unwritable()) is not None:
            self._use_temporary_cache([self.cache.keeps_nothing(error)])
        job = self._job(machine, candidate)
        if self._in_memory is not None and self.cache.sources.lookup(job.graph) is None:
            self._held.append(cached_source.keep_graph(self.cache, job.graph, self._in_memory.graph))
        payload = {"work": work, **job.to_payload(), **more}
        if work == PREPARE:
            from transom.preparation.reference_process import worth_it

            payload["beside"] = worth_it(job, self.cache, machine.free_bytes)
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
        from transom.preparation import selfcheck

        for attempt in (1, 2):
            if (known := selfcheck.recall_golden(self.cache, source)) is not None:
                return known
            if attempt == 2:
                self._use_temporary_cache([self.cache.keeps_nothing()])
            self._child(GOLDEN, machine, candidate)
        if (known := selfcheck.recall_golden(self.cache, source)) is not None:
            return known
        raise self._no_room("the reference's answers")

    def prove(self, machine: Machine, candidate: Candidate, on: Device, *, remove: bool) -> dict[str, Any]:
        """What `preparing.prove` finds, in a child process: an emulator may abort."""
        from transom.hardware.probe_file import to_json

        found: dict[str, Any] = self._child(PROVE, machine, candidate, on=to_json([on]), remove=remove)
        return found

    def _check_here(self, machine: Machine, candidate: Candidate, ready: Ready, session: Session) -> dict[str, Any]:
        from transom.preparation import selfcheck

        wanted = self.golden(machine, candidate, ready.source)
        exact = bool(ready.stored.origin.ingredients.get("exact", True))
        return selfcheck.verdict(session, wanted, ready.source, backend=candidate.backend, exact=exact)

    def warnings_of(self, choice: Choice, turn: Turn, ready: Ready) -> tuple[str, ...]:
        """What a user must be told of a compiled model and of the way to it."""
        warnings = [*choice.warnings, *self.cache.warnings, *self.warnings, *turn.warnings()]
        if ready.plan is not None and ready.plan.note:
            warnings.append(ready.plan.note)
        if ready.slower:
            where = "here" if turn.candidate.offer.runs_here else f"on {turn.candidate.device.id}"
            warnings.append(f"The compiled model is slower {where} than a fresh one: {ready.slower}")
        return tuple(dict.fromkeys(warnings))

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
        from transom.generation.model import InputSpec, Loaded, Model

        candidate, source, stored, plan = turn.candidate, ready.source, ready.stored, ready.plan
        sparsity, heads_from = self.sparsity, self._heads_from
        if source.decoder is not None:
            sparsity, shipped_for = heads.calibrated(sparsity, source.decoder, source.name)
            heads_from = heads_from or shipped_for
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
            context_built_in=bool(self.bundle) and "context" in stored.artifact.requires,
            warnings=self.warnings_of(choice, turn, ready),
            refusals=choice.refusals,
            notes=notes,
            memory=plan.parts() if plan else {},
            check=verdict_text(ready.verdict),
            sparsity=heads.described(sparsity, heads_from),
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
    notes = [*source.notes, *stored.artifact.notes, *decomposed(stored)]
    precision = next((n.removeprefix(PRECISION) for n in notes if n.startswith(PRECISION)), "")
    return precision, tuple(n for n in dict.fromkeys(notes) if not n.startswith(PRECISION))


def decomposed(stored: Compiled) -> tuple[str, ...]:
    """What was changed in the graph for its backend, for people."""
    said = stored.origin.ingredients.get("decomposed")
    return tuple(map(str, said)) if isinstance(said, list | tuple) else ()


def verdict_text(verdict: object) -> str:
    if not isinstance(verdict, dict):
        return ""
    return f"passed, {verdict['text']}" if verdict.get("checked") else str(verdict.get("reason", ""))

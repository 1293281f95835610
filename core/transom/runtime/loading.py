"""`transom.load`: from a path to a model that answers, on the best device there is, with the reason.

On a warm start nothing but the artifact is read: the probe, the choice, the manifest's checks, the engine's import. On
a cold one a child process reads the source, compiles, and compares the result with the reference; only what it
believed is opened here. Imports nothing heavier than the warm start needs.
"""

from __future__ import annotations

import atexit
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom import hardware
from transom.artifacts import Cache, StoredArtifact, artifact_key
from transom.contract import Device, Progress
from transom.errors import (
    CacheError,
    DoesNotFit,
    EngineError,
    OptionError,
    SelectionError,
    SelfCheckFailed,
    TransomError,
    UnsupportedError,
    nearest,
)
from transom.plugins import LoadedBackend, PluginFailure, Plugins, load_plugins
from transom.runtime import memory, prepared
from transom.runtime.report import Report
from transom.runtime.trial import ChildFailed, run_in_child
from transom.selection import Candidate, Choice, select
from transom.sources import local_path, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transom.runtime.model import Model

PRECISIONS = ("auto", "exact", "fast", "f32", "bf16", "f16", "int8", "int4")
VERIFY = ("auto", "off", "always")
_PRECISION = "precision: "
"""How an artifact's note begins that says in what numbers it computes."""
_MOST_FILES = 300
_MOVES_ON = (SelfCheckFailed, EngineError, UnsupportedError, DoesNotFit, ChildFailed)
"""What makes `auto` try the next offer. Anything else is no fault of the backend and would come back."""


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
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Machine:
    """What is here: devices, plugins, and what the plugins say about the devices."""

    found: hardware.Found
    plugins: Plugins
    answers: tuple[Any, ...]
    failures: tuple[PluginFailure, ...]

    @property
    def devices(self) -> tuple[Device, ...]:
        return self.found.devices


def survey(probe_file: Path | None = None, *, target: str = "auto") -> Machine:
    """Probe the devices and ask every plugin about them; `target` may name a device that is not here."""
    found = hardware.probe(probe_file)
    known = hardware.with_target(found.devices, target, found.notes)
    plugins = load_plugins()
    probed = plugins.probe(known)
    failures = tuple(dict.fromkeys([*plugins.failures, *probed.failures]))
    return Machine(replace(found, devices=known), plugins, probed.answers, failures)


def choose(
    machine: Machine, *, device: str = "auto", backend: str = "auto", measured: Mapping[str, float] | None = None
) -> Choice:
    """The pure selection, with what the environment and the plugins' hooks say."""
    offers = [(name, answer) for name, answer in machine.answers if not hasattr(answer, "code")]
    return select(
        machine.devices,
        machine.answers,
        device=device,
        backend=backend,
        environment_device=os.environ.get("TRANSOM_DEVICE") or None,
        hook=machine.plugins.choose(offers),
        failures=machine.failures,
        measured=measured,
        notes=machine.found.notes,
    )


def check_options(options: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
    """Raise OptionError for an unknown option or a value that is not allowed."""
    for name in extra:
        raise OptionError(f"load() has no option {name!r}", nearest(name, [*options, "device", "backend", "verify"]))
    if options["precision"] not in PRECISIONS:
        raise OptionError(
            f"precision={options['precision']!r} is unknown", nearest(str(options["precision"]), PRECISIONS)
        )
    for name in ("context", "threads"):
        value = options[name]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise OptionError(f"{name}={value!r} is not a positive whole number", "Leave it out for the default")


def load(
    model: Any,
    *,
    device: str = "auto",
    backend: str = "auto",
    context: int | None = None,
    precision: str = "auto",
    threads: int | None = None,
    verify: str = "auto",
    probe_file: str | Path | None = None,
    cache: Cache | None = None,
    progress: Progress | None = None,
    **unknown: Any,
) -> Model:
    """Load a model onto a device.

    Args:
        model: a GGUF file, a Hugging Face directory, an ONNX file, a `torch.nn.Module` wrapped in
            `transom.TorchSource`, or a transformers model.
        device: `"auto"`, or an id that `transom.devices()` lists (`"cpu"`, `"cuda:0"`). Named, it never falls back.
        backend: `"auto"`, or a name that `transom.backends()` lists. Named, it never falls back.
        context: tokens that one sequence may have; None for the model's own, cut to what fits and said so.
        precision: `"auto"`, `"exact"`, `"fast"`, or a form by name; what they mean is the backend's to say, in
            `model.report.notes`.
        threads: processor threads; None for every core this process may use.
        verify: `"auto"` compares a new artifact with the reference once on each device, `"always"` at every load,
            `"off"` never.
        probe_file: devices from a JSON file in place of the probe (`transom doctor --json` writes one).
        cache: the artifact cache; None for the default one.
        progress: called with (stage, share done or None); may raise `transom.contract.Cancelled`.

    Raises:
        SourceError: the model cannot be read.
        SelectionError: nothing can run it as asked; the details say what each backend answered.
        DoesNotFit: it needs more memory than there is.
        SelfCheckFailed, EngineError, UnsupportedError: a named backend cannot run it. `auto` moves on to the next
            offer and says so in `report.warnings`.
        OptionError: an unknown option or value.
    """
    options = {"context": context, "precision": precision, "threads": threads}
    check_options(options, unknown)
    if verify not in VERIFY:
        raise OptionError(f"verify={verify!r} is unknown", nearest(str(verify), VERIFY))
    loader = _Loader(
        model,
        options=options,
        verify=verify,
        cache=cache or Cache.default(),
        progress=progress or (lambda stage, share: None),
        stages=Stages(),
    )
    with loader.stages.time("probe"):
        machine = survey(None if probe_file is None else Path(probe_file), target=device)
        choice = choose(machine, device=device, backend=backend)
    with loader.stages.time("read"):
        loader.identify()
    choice = loader.measured_choice(machine, choice, device, backend)
    return loader.first_that_works(machine, choice, moves_on=len(choice.ranked) > 1 and "auto" in (device, backend))


class _Loader:
    """The state of one call of `load`."""

    def __init__(
        self,
        model: Any,
        *,
        options: Mapping[str, Any],
        verify: str,
        cache: Cache,
        progress: Progress,
        stages: Stages,
    ) -> None:
        self.options, self.verify, self.cache, self.progress, self.stages = options, verify, cache, progress, stages
        self._model = model
        self._path = ""
        self._graph = ""
        self._source_key = ""
        self.warnings: list[str] = []

    def identify(self) -> None:
        """Find the source and name its content, without reading it where the content is known already."""
        path = local_path(self._model)
        if path is not None:
            self._path = str(path.absolute())
            self._source_key = self._key(self._fingerprint(path))
            return
        source = resolve(self._model)
        # A model in memory cannot be read again by the child process: its graph goes there through the cache.
        opened = source.open(self._model, context=self.options["context"], progress=self.progress)
        self._source_key = self._key(opened.graph.digest())
        self._path = opened.name
        prepared.keep(self.cache, self._source_key, opened)
        self._graph = prepared.keep_graph(self.cache, self._source_key, opened.graph)

    def _fingerprint(self, path: Path) -> str:
        """The source's name for the content; remembered while no file of the model changes.

        A warm start thus imports no source: reading models is what needs ONNX, GGUF and the families.
        """
        state = _state_of(path)
        where = artifact_key({"path": self._path, "files": state, "transom": _version()}) if state else ""
        known = self.cache.recall("fingerprints", where) if where else None
        if isinstance(known, str):
            return known
        content = resolve(self._model).fingerprint(self._model)
        if where:
            self.cache.remember("fingerprints", where, content)
        return content

    def _key(self, content: str) -> str:
        return artifact_key({"format": prepared.FORMAT, "transom": _version(), "content": content})

    # choosing by measurement ------------------------------------------------------------------------------------------
    def measured_choice(self, machine: Machine, choice: Choice, device: str, backend: str) -> Choice:
        """Where kinds of device compete, let a short timed decode decide; remembered, so it happens once."""
        policy = os.environ.get("TRANSOM_AUTO", "measure")
        if policy not in ("measure", "static"):
            raise OptionError(f"TRANSOM_AUTO={policy} is unknown", nearest(policy, ("measure", "static")))
        if not choice.kinds_to_measure or policy == "static":
            return choice
        speeds: dict[str, float] = {}
        for candidate in choice.kinds_to_measure:
            where = f"{self._where(machine, candidate)} {self._scale()}"
            known = self.cache.recall("speeds", where)
            if not isinstance(known, int | float):
                try:
                    known = float(self._child("measure", self._job(machine, candidate)))
                except _MOVES_ON:
                    known = 0.0  # tried and failed: the ranking puts it last, and loading says why
                self.cache.remember("speeds", where, known)
            speeds[candidate.key] = float(known)
        return choose(machine, device=device, backend=backend, measured=speeds)

    def _scale(self) -> str:
        """The model's size by powers of two: the same choice serves models of about the same size."""
        known = prepared.find(self.cache, self._source_key)
        if known is None or known.decoder is None:
            return "unknown size"
        return f"2^{max(known.decoder.weight_bytes, 1).bit_length()} bytes"

    # one candidate after the other ------------------------------------------------------------------------------------
    def first_that_works(self, machine: Machine, choice: Choice, *, moves_on: bool) -> Model:
        failures: list[tuple[Candidate, TransomError]] = []
        for candidate in choice.ranked:
            try:
                return self._open(machine, choice, candidate, failures)
            except _MOVES_ON as e:
                if not moves_on:
                    raise
                failures.append((candidate, e))
        if len(failures) == 1:
            raise failures[0][1]
        raise SelectionError(
            "No backend could run this model",
            "Mend one of these, or try another model",
            [f"{c.backend} on {c.device.id}: {e}" for c, e in failures],
        )

    def _open(
        self, machine: Machine, choice: Choice, candidate: Candidate, failures: Sequence[tuple[Candidate, TransomError]]
    ) -> Model:
        plugin = machine.plugins.backends[candidate.backend]
        ready = self._ready(machine, candidate, plugin)
        if cached := ready is not None:
            assert ready is not None
            stored, source = ready
        else:
            stored, source = self._prepare(machine, candidate, plugin)
        verdict = stored.verdict(self._where(machine, candidate))
        return self._finish(choice, candidate, plugin, source, stored, verdict, cached, failures)

    def _ready(
        self, machine: Machine, candidate: Candidate, plugin: LoadedBackend
    ) -> tuple[StoredArtifact, prepared.Prepared] | None:
        """The artifact and its source out of the cache; None where one is missing, stale or not yet believed."""
        job = self._job(machine, candidate)
        stored, source = (
            self._lookup(plugin, candidate, job["artifact_key"]),
            prepared.find(self.cache, self._source_key),
        )
        if stored is None or source is None:
            return None
        if self.verify != "off" and stored.verdict(job["where"]) is None:
            stored.release()
            return None
        return stored, source

    def _prepare(
        self, machine: Machine, candidate: Candidate, plugin: LoadedBackend
    ) -> tuple[StoredArtifact, prepared.Prepared]:
        """Have a child process read, compile and check; then open what it left in the cache.

        A cache that cannot keep the artifact (not writable, disk full) is replaced by a temporary one for this process,
        with a warning: the model runs, and is compiled again next time.
        """
        try:
            self.cache.require_writable()
        except CacheError as e:
            self._use_temporary_cache(e.cause)
        for attempt in (1, 2):
            start = time.perf_counter()
            parts = self._child("prepare", self._job(machine, candidate))
            rest = time.perf_counter() - start - sum(parts.values())
            self.stages.seconds.update({f"child {stage}": s for stage, s in parts.items()} | {"child start": rest})
            ready = self._ready(machine, candidate, plugin)
            if ready is not None:
                return ready
            if attempt == 1:
                self._use_temporary_cache(f"The cache {self.cache.root} could not keep the compiled model")
        raise CacheError(
            f"Neither the cache nor the temporary folder {self.cache.root} can keep the compiled model",
            "Free some disk space, or set TRANSOM_CACHE to a folder with room",
        )

    def _use_temporary_cache(self, why: str) -> None:
        folder = tempfile.mkdtemp(prefix="transom-cache-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        self.cache = Cache(Path(folder), limit=None)
        self.warnings.append(f"{why.rstrip('.')}; this run keeps nothing (set TRANSOM_CACHE to a folder with room)")

    def _lookup(self, plugin: LoadedBackend, candidate: Candidate, key: str) -> StoredArtifact | None:
        """The artifact, if the backend says that it is good here."""
        stored = self.cache.lookup(key)
        if stored is None:
            return None
        for name in ("context", "threads"):
            bound, wanted = stored.artifact.requires.get(name), self.options[name]
            if bound is not None and wanted is not None and bound != str(wanted):
                stored.discard(f"compiled for {name}={bound}, wanted {wanted}")
                return None
        try:
            verdict = plugin.backend.check(stored.artifact, candidate.device)
        except Exception as e:  # a backend is somebody else's code: an artifact it cannot judge is not opened
            stored.release()
            raise EngineError(f"{plugin.name} failed while checking a compiled model: {e}") from e
        if verdict.state == "rebuild":
            stored.discard(verdict.reason or "the backend wants it rebuilt")
            return None
        if verdict.state == "never":
            stored.release()
            raise EngineError(
                f"{plugin.name} cannot open this compiled model on {candidate.device.id}: {verdict.reason}",
                "Choose another device or backend",
            )
        return stored

    def _finish(
        self,
        choice: Choice,
        candidate: Candidate,
        plugin: LoadedBackend,
        source: prepared.Prepared,
        stored: StoredArtifact,
        verdict: object,
        cached: bool,
        failures: Sequence[tuple[Candidate, TransomError]],
    ) -> Model:
        from transom.runtime.model import InputSpec, Loaded, Model

        options, planned = dict(self.options), None
        if source.decoder is not None:
            planned = memory.plan(
                source.decoder,
                candidate.device,
                context=options["context"],
                precision=options["precision"],
                exact_float32=candidate.offer.band == "fallback",
            )
            options["context"] = planned.context
        with ThreadPoolExecutor(1) as beside, self.stages.time("load"):
            text = beside.submit(lambda: (source.tokenizer(), source.chat_template(), source.generation()))
            try:
                session = plugin.backend.load(stored.artifact, candidate.device, options, stored.scratch)
            except TransomError:
                raise
            except Exception as e:  # as in `check`
                raise EngineError(
                    f"{plugin.name} failed while loading this model: {type(e).__name__}: {e}",
                    "Remove its compiled form with: transom cache clear",
                ) from e
            tokenizer, template, generation = text.result()
        if self.verify == "always" and source.decoder is not None:
            with self.stages.time("check"):
                verdict = self._check_here(source, stored, session, candidate.backend)
        warnings = [*choice.warnings, *self.cache.warnings, *self.warnings]
        warnings += [f"{c.backend} on {c.device.id} was tried first and set aside: {e.cause}" for c, e in failures]
        if planned is not None and planned.note:
            warnings.append(planned.note)
        notes = [*source.notes, *stored.artifact.notes, *_strings(stored.origin.ingredients.get("decomposed"))]
        precision = next((n.removeprefix(_PRECISION) for n in notes if n.startswith(_PRECISION)), "")
        report = Report(
            model=source.name,
            backend=candidate.backend,
            backend_version=plugin.version,
            device=candidate.device,
            why=choice.why if candidate is choice.ranked[0] else candidate.offer.why,
            source=source.kind,
            precision=precision,
            context=int(options["context"] or 0),
            model_context=source.decoder.context if source.decoder else 0,
            warnings=tuple(dict.fromkeys(warnings)),
            refusals=choice.refusals,
            notes=tuple(n for n in dict.fromkeys(notes) if not n.startswith(_PRECISION)),
            memory=planned.parts() if planned else {},
            check=_verdict_text(verdict, self.verify),
            cache_hit=cached,
            startup=dict(self.stages.seconds),
        )
        return Model(
            Loaded(
                session=session,
                report=report,
                decoder=source.decoder,
                context=report.context,
                tokenizer=tokenizer,
                chat_template=template,
                defaults=generation,
                inputs={} if source.decoder else {n: InputSpec(*spec) for n, spec in source.inputs.items()},
                on_close=stored.release,
            )
        )

    def _check_here(
        self, source: prepared.Prepared, stored: StoredArtifact, session: Any, backend: str
    ) -> dict[str, Any]:
        from transom.runtime import selfcheck

        entry = self.cache.golden.lookup(source.graph_digest)
        if entry is None:  # evicted since; the verdict that it gave is still there
            raise CacheError(
                "the reference's logits of this model are no longer in the cache",
                "Let them be computed again: transom cache clear, then load once more",
            )
        ids, golden = selfcheck.unpack(entry.read("golden.npz"))
        agreement = selfcheck.compare(golden, selfcheck.session_logits(session, ids))
        selfcheck.judge(agreement, exact=bool(stored.origin.ingredients.get("exact", True)), backend=backend)
        return {"checked": True, **agreement.to_dict(), "text": str(agreement)}

    # child processes --------------------------------------------------------------------------------------------------
    def _where(self, machine: Machine, candidate: Candidate) -> str:
        """Names machine, driver and versions: a verdict or a speed holds for these and no others."""
        device, plugin = candidate.device, machine.plugins.backends[candidate.backend]
        parts = [device.identity or device.name or device.id, *(f"{k} {v}" for k, v in sorted(device.drivers.items()))]
        return artifact_key(
            {"device": parts, "backend": candidate.backend, "version": plugin.version, "why": candidate.offer.why}
        )

    def _job(self, machine: Machine, candidate: Candidate) -> dict[str, Any]:
        from transom.hardware.probe_file import to_json

        plugin, device = machine.plugins.backends[candidate.backend], candidate.device
        key = artifact_key(
            {
                "source": self._source_key,
                "backend": candidate.backend,
                "version": plugin.version,
                "arch": device.arch,
                "features": sorted(device.features),
                "precision": self.options["precision"],
                "transom": _version(),
            }
        )
        return {
            "model": self._path,
            "graph": self._graph,
            "source_key": self._source_key,
            "artifact_key": key,
            "backend": candidate.backend,
            "band": candidate.offer.band,
            "device": to_json([device]),
            "options": dict(self.options),
            "cache": str(self.cache.root),
            "cache_limit": self.cache.limit,
            "where": self._where(machine, candidate),
            "verify": self.verify != "off",
        }

    def _child(self, job: str, payload: Mapping[str, Any]) -> Any:
        result = run_in_child(f"transom.runtime.preparing:{job}", dict(payload), progress=self.progress)
        return result.unwrap(f"Preparing the model with {payload['backend']}")


def _state_of(path: Path) -> list[list[str | int]]:
    """Name, size, time of change and inode of each file that may be part of a model; empty where there are too many.

    A GGUF file stands alone unless its name says that it is one of several; beside any other file may lie its weights.
    """
    try:
        if path.is_dir():
            files = _some_files(path)
        elif path.suffix.lower() == ".gguf" and "-of-" not in path.name:
            files = [path]
        else:
            files = _some_files(path.parent)
        stats = [(str(file), file.stat()) for file in files]
    except OSError:
        return []  # the source says what is wrong
    return [[name, s.st_size, s.st_mtime_ns, s.st_ino] for name, s in stats]


def _some_files(folder: Path) -> list[Path]:
    """The files in a folder and below; none where there are more than a model has."""
    entries = list(itertools.islice(folder.rglob("*"), _MOST_FILES + 1))
    return sorted(e for e in entries if not e.is_dir()) if len(entries) <= _MOST_FILES else []


def _strings(value: object) -> list[str]:
    return [str(v) for v in value] if isinstance(value, list | tuple) else []


def _verdict_text(verdict: object, verify: str) -> str:
    if isinstance(verdict, dict):
        return f"passed, {verdict['text']}" if verdict.get("checked") else str(verdict.get("reason", ""))
    return "switched off" if verify == "off" else ""


def _version() -> str:
    import importlib.metadata

    return importlib.metadata.version("transom")

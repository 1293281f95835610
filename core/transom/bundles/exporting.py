"""`transom.export`: a model compiled for a device that need not be here, as a folder that runs on it.

The same road as `transom.load` as far as the compiled model: the choice, the child process, the cache. It is opened
and checked where its device is one of this machine, and then written down with all that a load needs.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom import hardware
from transom.artifacts import Cache, StoredArtifact
from transom.bundles.manifest import GOLDEN, LICENSES, Manifest, Variant
from transom.bundles.proving import checked_kl, proved, told
from transom.bundles.texts import app_files, licence_of, licences_of, texts_of
from transom.bundles.writing import Piece, now, require_free, write_bundle
from transom.contract import Device, Offer, Progress, Refusal
from transom.errors import OptionError, SelectionError, nearest
from transom.hardware.catalogue import PREFIX
from transom.loading.loader import Asked, Loader, Ready, Turn, decomposed, notes_of, verdict_text
from transom.loading.machine import Machine, can_be_mended, choose, survey
from transom.loading.options import check_arguments, check_objects
from transom.preparation import heads
from transom.preparation.cached_source import Compiled
from transom.preparation.calibration_texts import given_texts
from transom.preparation.jobs import version
from transom.preparation.memory import size
from transom.preparation.plugin_calls import interrupts_kept
from transom.selection import Choice
from transom.sources import bundle_at
from transom.sources.resolve import BUNDLE_MANIFEST
from transom.sparsity import Sparsity

if TYPE_CHECKING:
    from transom.bundles.native_libraries import Library

_FOREIGN = re.compile(r'[\\:*?"<>|]')
"""What names of files cannot have on every system."""
LIBRARIES_FILE = "libraries.json"
"""Of an artifact: a list of file names, of the native libraries that an app needs for it. Backends may write it."""
MEMORY_FILE = "memory.json"
"""Of an artifact: an object with `weights`, `workspace` and `cache_per_token` in bytes, for a backend that knows better
than the plan made beforehand. Backends may write it."""


@dataclass(frozen=True)
class ExportedVariant:
    """What one backend compiled for one target."""

    name: str
    backend: str
    backend_version: str
    device: Device
    """The target."""
    precision: str
    """In what numbers it computes, as the backend says."""
    context: int
    """Tokens that it was compiled for; 0 for a graph that is not a decoder."""
    notes: tuple[str, ...]
    """What was changed on the way."""
    check: str
    """The verdict of the self-check, or what an emulator showed; for a device that is not here, that there was none."""
    fidelity: Mapping[str, Any] | None
    """As in the manifest."""

    def lines(self) -> list[str]:
        where = f"{self.device.id} ({self.device.name})" if self.device.name else self.device.id
        facts = [
            ("precision", self.precision),
            ("context", f"{self.context} tokens" if self.context else ""),
            ("self-check", self.check),
        ]
        lines = [f"  {self.name}: for {where}, by {self.backend} {self.backend_version}"]
        lines += [f"    {name + ':':<12}{text}" for name, text in facts if text]
        return lines + [f"    note:       {text}" for text in self.notes]

    def to_dict(self) -> dict[str, Any]:
        devices: Any = hardware.to_json([self.device])["devices"]
        return {**vars(self), "device": devices[0], "notes": list(self.notes)}


@dataclass(frozen=True)
class Exported:
    """A bundle that was written, for people (`str`) and for programs (`to_dict`)."""

    folder: Path
    model: str
    variants: tuple[ExportedVariant, ...]
    """In the order in which they were asked for."""
    files: Mapping[str, int]
    """Bytes by name, the manifest included."""
    warnings: tuple[str, ...]
    seconds: float

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    def __str__(self) -> str:
        lines = [f"{self.model} in {self.folder}: {size(self.bytes)} in {len(self.files)} files, {self.seconds:.1f} s"]
        for variant in self.variants:
            lines += variant.lines()
        return "\n".join([*lines, *(f"  warning: {text}" for text in self.warnings)])

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        own = {"folder": str(self.folder), "files": dict(self.files), "warnings": list(self.warnings)}
        return {**vars(self), **own, "variants": [variant.to_dict() for variant in self.variants]}


@interrupts_kept()
def export(
    model: Any,
    *,
    target: str | Sequence[str],
    out: str | Path,
    format: str | Sequence[str] = "auto",
    context: int | None = None,
    precision: str = "auto",
    sparsity: Any = "off",
    calibration: Sequence[str | Path] = (),
    verify: str = "auto",
    max_kl: float | None = None,
    app: str | Path | None = None,
    overwrite: bool = False,
    cache: Cache | None = None,
    progress: Progress | None = None,
    probe_file: str | Path | None = None,
    **unknown: Any,
) -> Exported:
    """Compile a model for a device and write it down as a bundle, which `transom.load` opens where that device is.

    Args:
        model: anything that `transom.load` compiles.
        target: a name of the catalogue (`"rtx-4090"`, also `"remote:rtx-4090"`), or the id of a device that is here
            (`"cpu"`, `"cuda:0"`); several as a list, or as one text with commas. The bundle has a variant for each.
        out: the folder to write. It must not exist, or be empty, or be a bundle that is to be overwritten.
        format: `"auto"`, or what the backend is called that compiles (`"qnn"`, `"onnx"`, `"tensorrt"`); several as a
            list, or as one text with commas, for each target. Named, no other is taken.
        context: tokens that one sequence may have; None for the model's own, cut to what fits the target.
        precision, sparsity: as for `transom.load`; built into the bundle.
        calibration: texts, or text files as `pathlib.Path`, for a backend that rounds activations; empty for passages
            that come with Python.
        verify: `"auto"` compares what is compiled for a device of this machine with the reference where that has not
            been done, `"always"` in any case, and `"off"` only runs it. What is compiled for elsewhere is compared
            on what can run it here, an emulator, and where it is loaded.
        max_kl: nats that the logits of what is compiled for elsewhere may diverge by from the reference's (mean over
            the fixed prompt); None for the bound of the self-check. It counts where something here can run it; where
            nothing can, a warning says so.
        app: an APK, AAR, app bundle or folder whose native libraries are compared with what the variants need, before
            anything is written; None: no app is looked at.
        overwrite: whether a bundle that is in `out` may be replaced.
        cache: the artifact cache; None for the default one.
        progress: called with (stage, share done or None); may raise `transom.Cancelled`.
        probe_file: devices from a JSON file in place of the probe.

    Whatever ends it early leaves no bundle and an older one as it was.

    Raises:
        OptionError: an unknown target, option or value, `out` is in use, or the app lacks libraries or has such as
            phones do not load.
        BundleError: the bundle cannot be written.
        SelectionError: no backend compiles for the target; the details say what each answered.
        FidelityError: what was compiled diverges by more than `max_kl`; names the worst products.
        SourceError, UnsupportedError, DoesNotFit, EngineError, SelfCheckFailed: as for `transom.load`.
    """
    start = time.perf_counter()
    options = {"context": context, "precision": precision, "threads": None}
    check_arguments(options, verify, "static", unknown, "export")
    check_objects(cache, progress)
    pairs = pairs_of(target, format)
    _check_bound(max_kl, verify)
    if bundle_at(model) is not None:
        raise OptionError(f"{model} is a bundle, which is compiled already", "Export the model that it was made of")
    folder = _place(out)
    require_free(folder, overwrite=overwrite)
    if app is not None:
        require_libraries(app, ())  # before anything is compiled: what is no app, and what Android would not load
    asked = Asked(options, Sparsity.parse(sparsity), given_texts(calibration), verify)
    loader = Loader(model, asked, cache=cache or Cache.default(), progress=progress or (lambda stage, share: None))
    chosen = [chosen_for(name, backend, probe_file) for name, backend in pairs]
    loader.identify(chosen[0][0].plugins)
    made: list[_Made] = []
    try:
        for machine, choice in chosen:
            use = _user(loader, machine, choice, max_kl)
            made.append(loader.first_that_works(machine, choice, use))
        if app is not None:
            require_libraries(app, [name for one in made for name in _told(one.ready.stored, LIBRARIES_FILE) or ()])
        manifest = _write(loader, made, folder, model, overwrite=overwrite)
        if max_kl is not None:
            loader.warnings += _unproved(manifest.variants, made, max_kl)
        return _exported(loader, made, folder, manifest, time.perf_counter() - start)
    finally:
        for one in made:
            one.ready.stored.release()


@dataclass(frozen=True)
class _Made:
    """What was compiled for one target."""

    machine: Machine
    choice: Choice
    turn: Turn
    ready: Ready
    fidelity: Mapping[str, Any] | None


def _user(loader: Loader, machine: Machine, choice: Choice, max_kl: float | None) -> Callable[[Turn], _Made]:
    """What compiles for a candidate, and proves it where something here can run it."""

    def use(turn: Turn) -> _Made:
        ready, cached = loader.ready(machine, turn.candidate)
        try:
            if cached and loader.verify == "always" and turn.candidate.offer.runs_here:
                ready = loader.ready_again(machine, turn.candidate, ready)
            return _Made(machine, choice, turn, ready, proved(loader, machine, turn.candidate, ready, max_kl))
        except BaseException:
            ready.stored.release()
            raise

    return use


def require_libraries(app: str | Path, needed: Sequence[str], abi: str = "arm64-v8a") -> list[Library]:
    """The native libraries of an app.

    Args:
        needed: file names of those that must be there.

    Raises:
        OptionError: one is missing, or would not be loaded; the details say what is wrong with each.
    """
    from transom.bundles.native_libraries import inspect, judge

    found = inspect(app)
    if problems := judge(found, list(dict.fromkeys(needed)), abi):
        raise OptionError(f"{app} is not good for this bundle", "Mend these, and build the app again", problems)
    return found


def pairs_of(target: str | Sequence[str], format: str | Sequence[str]) -> list[tuple[str, str]]:
    """Each target with each format, in order."""
    lists = []
    for name, given in (("target", target), ("format", format)):
        many = given.split(",") if isinstance(given, str) else list(given) if isinstance(given, Sequence) else [given]
        words = [word.strip() if isinstance(word, str) else word for word in many]
        if not words or not all(isinstance(word, str) and word for word in words):
            raise OptionError(f"{name}={given!r} names none", f"Give a name, or several with commas, as {name}")
        if len(set(words)) < len(words):
            raise OptionError(f"{name}={given!r} names one twice", "Name each once")
        lists.append(words)
    targets, formats = lists
    return [(t, f) for t in targets for f in formats]


def _check_bound(max_kl: object, verify: str) -> None:
    number = isinstance(max_kl, int | float) and not isinstance(max_kl, bool)
    if max_kl is not None and not (number and 0 < max_kl < math.inf):  # type: ignore[operator]
        raise OptionError(f"max_kl={max_kl!r} is no bound", "Give nats above 0, such as 0.1")
    if max_kl is not None and verify == "off":
        raise OptionError(
            f"max_kl={max_kl!r} needs the comparison that verify='off' leaves out", "Leave one of the two out"
        )


def _unproved(variants: Sequence[Variant], made: Sequence[_Made], max_kl: float) -> list[str]:
    """Warnings of those that the bound was not held against."""
    pairs = zip(variants, made, strict=True)
    names = [variant.name for variant, one in pairs if one.fidelity is None and checked_kl(one.ready) is None]
    return [
        f"Nothing here could compare {name} with the reference: max_kl={max_kl:g} says nothing of it" for name in names
    ]


def _place(out: str | Path) -> Path:
    """The folder as an absolute path, its parents' links followed."""
    try:
        path = Path(out).expanduser().absolute()
        if "\0" in path.name:
            raise ValueError("it has a zero byte")
        if path.name and str(out):
            return path.parent.resolve() / path.name
    except TypeError:
        raise OptionError(f"out={out!r} is not a path", "Give the folder to write") from None
    except (OSError, RuntimeError, ValueError) as error:  # no such user, links that go in a circle, a zero byte
        raise OptionError(f"out={str(out)!r} cannot be a folder: {error}", "Give another one") from None
    raise OptionError(f"out={str(out)!r} names no folder", "Give the folder to write")


def chosen_for(target: str, backend: str, probe_file: str | Path | None) -> tuple[Machine, Choice]:
    """The backends that compile for the target. It is named, so what `TRANSOM_DEVICE` names has no say."""
    if not isinstance(target, str) or target.strip().lower() in ("", "auto"):
        raise OptionError(f"target={target!r} names no device", nearest("", known_targets(probe_file)))
    machine = survey(probe_file, target=target)
    try:
        return machine, choose(machine, device=target, backend=backend, purpose="export")
    except SelectionError as error:
        device = hardware.find(machine.devices, target)
        if can_be_mended(answer for _, answer in machine.answers if answer.device_id == device.id):
            raise
        fix = "Choose another target; who compiles for which: transom export --target list"
        raise SelectionError(error.cause, fix, error.details) from None


# -------------------------------------------------------------------------------------------------------------- targets


@dataclass(frozen=True)
class Target:
    """A device that models can be compiled for, and what each backend says of it."""

    device: Device
    answers: tuple[tuple[str, Offer | Refusal], ...]
    """(backend, answer)."""

    @property
    def name(self) -> str:
        """What to give as `target`."""
        return self.device.id.removeprefix(PREFIX)


def targets(probe_file: str | Path | None = None) -> tuple[Target, ...]:
    """The devices of this machine and those of the catalogue, each backend asked about each."""
    machine = survey(probe_file)
    devices = (*machine.devices, *hardware.catalogue())
    answers = machine.plugins.probe(devices).answers
    return tuple(Target(d, tuple((name, a) for name, a in answers if a.device_id == d.id)) for d in devices)


def known_targets(probe_file: str | Path | None = None) -> list[str]:
    """The names of all targets."""
    found = hardware.probe(None if probe_file is None else Path(probe_file))
    return [d.id.removeprefix(PREFIX) for d in (*found.devices, *hardware.catalogue())]


# -------------------------------------------------------------------------------------------------------------- writing


def _write(loader: Loader, made: Sequence[_Made], folder: Path, model: Any, *, overwrite: bool) -> Manifest:
    first = made[0]
    source = first.ready.source
    golden = loader.golden(first.machine, first.turn.candidate, source)
    policy, decoder = loader.sparsity, source.decoder
    if decoder is not None:
        policy, _ = heads.calibrated(policy, decoder, source.name)
    texts, _ = texts_of(source)
    licences = licences_of(model)
    manifest = Manifest(
        transom=version(),
        created=now(),
        name=source.name,
        kind=source.kind,
        fingerprint=loader.fingerprint,
        graph=source.graph_digest,
        foreign=source.foreign,
        license=licence_of(model, licences),
        model_notes=source.notes,
        options={
            "precision": loader.options["precision"],
            "context": loader.options["context"],
            "sparsity": policy.to_string(),
        },
        decoder=decoder,
        inputs=source.inputs,
        tokens=tuple(int(i) for i in golden["ids"]) if decoder else (),
        best=tuple(int(i) for i in golden["logits"].argmax(-1)) if decoder else (),
    )
    names = _names(made)
    pieces = [_piece(name, one) for name, one in zip(names, made, strict=True)]
    files: dict[str, bytes | Path] = {**texts, GOLDEN: _npz(golden)}
    files |= {f"{LICENSES}/{_FOREIGN.sub('_', path.name)}": path for path in licences}
    backends = {one.turn.candidate.backend: one.machine.plugins.backends[one.turn.candidate.backend] for one in made}

    def finish(found: Manifest) -> dict[str, bytes]:
        return app_files(found, {n: plugin.backend for n, plugin in backends.items()}, texts)

    return write_bundle(folder, manifest, files, pieces, finish, overwrite=overwrite, progress=loader.progress)


def _names(made: Sequence[_Made]) -> list[str]:
    """Of the variants: the format, and the target where the format alone would not tell them apart."""
    formats = [one.turn.candidate.backend for one in made]
    names = []
    for name, one in zip(formats, made, strict=True):
        target = one.turn.candidate.device.id.removeprefix(PREFIX).replace(":", "-")
        names.append(name if formats.count(name) == 1 else f"{name}-{target}")
    return names


def _piece(name: str, one: _Made) -> Piece:
    candidate, source, stored, plan = one.turn.candidate, one.ready.source, one.ready.stored, one.ready.plan
    plugin = one.machine.plugins.backends[candidate.backend]
    memory = {}
    if plan is not None:
        memory = {"weights": plan.weights, "cache_per_token": plan.cache // plan.context, "workspace": plan.workspace}
        memory |= {name: int(count) for name, count in (_told(stored, MEMORY_FILE) or {}).items() if name in memory}
    precision, _ = notes_of(source, stored)
    variant = Variant(
        name=name,
        backend=candidate.backend,
        backend_version=plugin.version,
        distribution=plugin.distribution,
        target=candidate.device,
        requires=stored.artifact.requires,
        precision=precision,
        exact=bool(stored.origin.ingredients.get("exact", True)),
        notes=tuple(stored.artifact.notes),
        decomposed=decomposed(stored),
        context=plan.context if plan else 0,
        memory=memory,
        libraries=tuple(map(str, _told(stored, LIBRARIES_FILE) or ())),
        fidelity=one.fidelity,
        files={},
    )
    # Of several GB that nobody opens here, one copy is enough: they move. What runs here stays in the cache for a load.
    take = stored.remove if not candidate.offer.runs_here and isinstance(stored, StoredArtifact) else None
    return Piece(variant, stored.artifact.files, take)


def _told(stored: Compiled, name: str) -> Any:
    """What a file of an artifact says, JSON; None where it is not there."""
    path = stored.artifact.files.get(name)
    return json.loads(path.read_text(encoding="utf-8")) if isinstance(path, Path) else None


def _npz(arrays: Mapping[str, Any]) -> bytes:
    import io

    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _exported(loader: Loader, made: Sequence[_Made], folder: Path, manifest: Manifest, seconds: float) -> Exported:
    files = {name: record.bytes for name, record in manifest.files.items()}
    warnings = [text for one in made for text in loader.warnings_of(one.choice, one.turn, one.ready)]
    return Exported(
        folder=folder,
        model=manifest.name,
        variants=tuple(_result(variant, one) for variant, one in zip(manifest.variants, made, strict=True)),
        files={**files, BUNDLE_MANIFEST: (folder / BUNDLE_MANIFEST).stat().st_size},
        warnings=tuple(dict.fromkeys(warnings)),
        seconds=seconds,
    )


def _result(variant: Variant, one: _Made) -> ExportedVariant:
    precision, notes = notes_of(one.ready.source, one.ready.stored)
    return ExportedVariant(
        name=variant.name,
        backend=variant.backend,
        backend_version=variant.backend_version,
        device=variant.target,
        precision=precision,
        context=variant.context,
        notes=notes,
        check=_check_text(one),
        fidelity=variant.fidelity,
    )


def _check_text(one: _Made) -> str:
    if one.fidelity is not None:
        return told(one.fidelity)
    return verdict_text(one.ready.verdict) or "none here: it is done where the bundle is loaded"

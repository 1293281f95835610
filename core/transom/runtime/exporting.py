"""`transom.export`: a model compiled for a device that need not be here, as a folder that runs on it.

The same road as `transom.load` as far as the compiled model: the choice, the child process, the cache. It is opened
and checked where its device is one of this machine, and then written down with all that a load needs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transom import hardware
from transom.artifacts import Cache, FileRecord, StoredArtifact
from transom.contract import Device, Offer, Progress, Refusal
from transom.errors import OptionError, SelectionError, TransomError, nearest
from transom.hardware.catalogue import PREFIX
from transom.runtime import calibrations
from transom.runtime.arguments import check_arguments, check_objects
from transom.runtime.bundles import ARTIFACT, GOLDEN, Manifest, now, require_free, write_bundle
from transom.runtime.guarding import interrupts_kept
from transom.runtime.jobs import version
from transom.runtime.loader import Asked, Loader, Ready, Turn, decomposed, notes_of, verdict_text
from transom.runtime.machine import Machine, can_be_mended, choose, survey
from transom.runtime.memory import size
from transom.runtime.pieces import given_texts
from transom.selection import Choice
from transom.sources import bundle_at, local_path
from transom.sources.resolve import BUNDLE_MANIFEST
from transom.sparsity import Sparsity

TEXT_FILES = ("tokenizer.json", "chat_template.json", "generation.json")


@dataclass(frozen=True)
class Exported:
    """A bundle that was written, for people (`str`) and for programs (`to_dict`)."""

    folder: Path
    model: str
    backend: str
    backend_version: str
    device: Device
    """The target."""
    files: Mapping[str, int]
    """Bytes by name, the manifest included."""
    precision: str
    """In what numbers it computes, as the backend says."""
    context: int
    """Tokens that it was compiled for; 0 for a graph that is not a decoder."""
    notes: tuple[str, ...]
    """What was changed on the way."""
    warnings: tuple[str, ...]
    check: str
    """The verdict of the self-check; for a device that is not here, that there was none."""
    seconds: float

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    def __str__(self) -> str:
        where = f"{self.device.id} ({self.device.name})" if self.device.name else self.device.id
        lines = [f"{self.model} for {where}, by {self.backend} {self.backend_version}, in {self.folder}"]
        facts = [
            ("precision", self.precision),
            ("context", f"{self.context} tokens" if self.context else ""),
            ("self-check", self.check),
            ("size", f"{size(self.bytes)} in {len(self.files)} files"),
            ("time", f"{self.seconds:.1f} s"),
        ]
        lines += [f"  {name + ':':<12}{text}" for name, text in facts if text]
        lines += [f"  warning:    {text}" for text in self.warnings]
        lines += [f"  note:       {text}" for text in self.notes]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        devices: Any = hardware.to_json([self.device])["devices"]
        own = {"folder": str(self.folder), "device": devices[0], "files": dict(self.files)}
        return {**vars(self), **own, "notes": list(self.notes), "warnings": list(self.warnings)}


@interrupts_kept()
def export(
    model: Any,
    *,
    target: str,
    out: str | Path,
    backend: str = "auto",
    context: int | None = None,
    precision: str = "auto",
    sparsity: Any = "off",
    calibration: Sequence[str | Path] = (),
    verify: str = "auto",
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
            (`"cpu"`, `"cuda:0"`).
        out: the folder to write. It must not exist, or be empty, or be a bundle that is to be overwritten.
        backend: `"auto"`, or the name of one. Named, no other is taken.
        context: tokens that one sequence may have; None for the model's own, cut to what fits the target.
        precision, sparsity: as for `transom.load`; built into the bundle.
        calibration: texts, or text files as `pathlib.Path`, for a backend that rounds activations; empty for passages
            that come with Python.
        verify: `"auto"` compares what is compiled for a device of this machine with the reference where that has not
            been done, `"always"` in any case, and `"off"` only runs it. What is compiled for elsewhere is compared
            where it is loaded.
        overwrite: whether a bundle that is in `out` may be replaced.
        cache: the artifact cache; None for the default one.
        progress: called with (stage, share done or None); may raise `transom.Cancelled`.
        probe_file: devices from a JSON file in place of the probe.

    Whatever ends it early leaves no bundle and an older one as it was.

    Raises:
        OptionError: an unknown target, option or value, or `out` is in use.
        BundleError: the bundle cannot be written.
        SelectionError: no backend compiles for the target; the details say what each answered.
        SourceError, UnsupportedError, DoesNotFit, EngineError, SelfCheckFailed: as for `transom.load`.
    """
    start = time.perf_counter()
    options = {"context": context, "precision": precision, "threads": None}
    check_arguments(options, verify, "static", unknown, "export")
    check_objects(cache, progress)
    if bundle_at(model) is not None:
        raise OptionError(f"{model} is a bundle, which is compiled already", "Export the model that it was made of")
    folder = _place(out)
    require_free(folder, overwrite=overwrite)
    asked = Asked(options, Sparsity.parse(sparsity), given_texts(calibration), verify)
    loader = Loader(model, asked, cache=cache or Cache.default(), progress=progress or (lambda stage, share: None))
    machine, choice = _chosen(target, backend, probe_file)
    loader.identify(machine.plugins)

    def use(turn: Turn) -> Exported:
        ready, cached = loader.ready(machine, turn.candidate)
        if cached and verify == "always" and turn.candidate.offer.runs_here:
            ready = loader.ready_again(machine, turn.candidate, ready)
        try:
            manifest = _write(loader, machine, turn, ready, folder, _licence(model), overwrite=overwrite)
            return _exported(loader, choice, turn, ready, folder, manifest, time.perf_counter() - start)
        finally:
            ready.stored.release()

    return loader.first_that_works(machine, choice, use)


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


def _chosen(target: str, backend: str, probe_file: str | Path | None) -> tuple[Machine, Choice]:
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


def _write(
    loader: Loader, machine: Machine, turn: Turn, ready: Ready, folder: Path, licence: str | None, *, overwrite: bool
) -> Manifest:
    source, stored, candidate = ready.source, ready.stored, turn.candidate
    plugin = machine.plugins.backends[candidate.backend]
    golden = loader.golden(machine, candidate, source)
    files: dict[str, bytes | Path] = {f"{ARTIFACT}/{name}": content for name, content in stored.artifact.files.items()}
    files |= {name: source.files.files[name] for name in TEXT_FILES if name in source.files.files}
    files[GOLDEN] = _npz(golden)
    policy, plan, decoder = loader.sparsity, ready.plan, source.decoder
    if decoder is not None:
        policy, _ = calibrations.calibrated(policy, decoder, source.name)
    memory = {}
    if plan is not None:
        memory = {"weights": plan.weights, "cache_per_token": plan.cache // plan.context, "workspace": plan.workspace}
    precision, _ = notes_of(source, stored)

    def manifest(records: Mapping[str, FileRecord]) -> Manifest:
        return Manifest(
            transom=version(),
            created=now(),
            name=source.name,
            kind=source.kind,
            fingerprint=loader.fingerprint,
            graph=source.graph_digest,
            foreign=source.foreign,
            license=licence,
            model_notes=source.notes,
            backend=candidate.backend,
            backend_version=plugin.version,
            distribution=plugin.distribution,
            target=candidate.device,
            requires=stored.artifact.requires,
            options={
                "precision": loader.options["precision"],
                "context": loader.options["context"],
                "sparsity": policy.to_string(),
            },
            precision=precision,
            exact=bool(stored.origin.ingredients.get("exact", True)),
            notes=tuple(stored.artifact.notes),
            decomposed=decomposed(stored),
            context=plan.context if plan else 0,
            memory=memory,
            decoder=decoder,
            inputs=source.inputs,
            tokens=tuple(int(i) for i in golden["ids"]) if decoder else (),
            best=tuple(int(i) for i in golden["logits"].argmax(-1)) if decoder else (),
            files=records,
        )

    # Of several GB that nobody opens here, one copy is enough: they move. What runs here stays in the cache for a load.
    take = stored.remove if not candidate.offer.runs_here and isinstance(stored, StoredArtifact) else None
    return write_bundle(folder, files, manifest, take=take, overwrite=overwrite, progress=loader.progress)


def _npz(arrays: Mapping[str, Any]) -> bytes:
    import io

    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _licence(model: Any) -> str | None:
    """What the model's files say of their licence: GGUF's `general.license`, or the name of a file; None: nothing."""
    path = local_path(model)
    if path is None:
        return None
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir() if p.name.lower().startswith(("license", "licence", "copying")))
        if names:
            return names[0]
    from transom.sources.gguf import GgufSource, gguf_path
    from transom.sources.gguf_file import open_gguf

    if not GgufSource().matches(path):
        return None
    try:
        found = open_gguf(gguf_path(path)).metadata.get("general.license")
    except TransomError:  # who reads the model says what is wrong with it
        return None
    return found if isinstance(found, str) and found else None


def _exported(
    loader: Loader, choice: Choice, turn: Turn, ready: Ready, folder: Path, manifest: Manifest, seconds: float
) -> Exported:
    precision, notes = notes_of(ready.source, ready.stored)
    files = {name: record.bytes for name, record in manifest.files.items()}
    return Exported(
        folder=folder,
        model=ready.source.name,
        backend=manifest.backend,
        backend_version=manifest.backend_version,
        device=manifest.target,
        files={**files, BUNDLE_MANIFEST: (folder / BUNDLE_MANIFEST).stat().st_size},
        precision=precision,
        context=manifest.context,
        notes=notes,
        warnings=loader.warnings_of(choice, turn, ready),
        check=verdict_text(ready.verdict) or "none here: it is done where the bundle is loaded",
        seconds=seconds,
    )

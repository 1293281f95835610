"""Exports a model: compiles it for devices that need not be in this machine, and writes it as a bundle.

Compiling works as in a load: the choice, the child process, the cache. A model for a device of this machine is checked
here. One for another device is compared with the reference if something here, such as an emulator, can run it. The
bundle is then written with everything that a load needs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from transom.artifacts import StoredArtifact
from transom.authoring.opening import reading_artifact
from transom.bundles.exported import Exported, ExportedVariant
from transom.bundles.fidelity import fidelity_text, measured_fidelity, selfcheck_kl
from transom.bundles.manifest import LICENSES, REFERENCE_FILE, BundleManifest, Variant
from transom.bundles.native_libraries import require_libraries
from transom.bundles.targets import backends_for, pairs_of
from transom.bundles.texts import app_files, license_of, licenses_of, texts_of
from transom.bundles.writing import VariantFiles, now, require_free, write_bundle
from transom.errors import OptionError, option
from transom.hardware.catalogue import PREFIX
from transom.loading.attempts import Attempt, first_that_works
from transom.loading.cached_models import CachedModels
from transom.loading.child_jobs import ChildJobs
from transom.loading.compiled_models import Ready
from transom.loading.identity import identify
from transom.loading.load_state import LoadState
from transom.loading.opening import warnings_of
from transom.preparation import heads
from transom.preparation.compiled import (
    CompiledModel,
    declared_divergence,
    decomposed,
    is_exact,
    precision_and_notes,
    verdict_text,
)
from transom.preparation.jobs import version
from transom.sources import bundle_at
from transom.sources.resolve import BUNDLE_MANIFEST
from transom.typed import from_json

T = TypeVar("T")

_FOREIGN = re.compile(r'[\\:*?"<>|]')
"""Characters that are not allowed in file names on some systems."""
LIBRARIES_FILE = "libraries.json"
"""Optional file of an artifact, written by the backend: a list of native libraries that an app needs, by file name."""
MEMORY_FILE = "memory.json"
"""Optional file of an artifact, written by the backend: an object with `weights`, `workspace` and `cache_per_token` in
bytes, which replace those of the memory plan."""


@dataclass(frozen=True)
class _Compiled:
    """The compiled model for one target."""

    attempt: Attempt
    ready: Ready
    fidelity: Mapping[str, Any] | None
    """As in `Variant.fidelity`."""


def export_model(
    model: Any,
    state: LoadState,
    *,
    target: str | Sequence[str],
    out: str | Path,
    format: str | Sequence[str] = "auto",
    app: str | Path | None = None,
    overwrite: bool = False,
    probe_file: str | Path | None = None,
) -> Exported:
    """Compile a model and write a bundle; arguments and errors are those of `transom.export`."""
    start = time.perf_counter()
    pairs, max_kl = pairs_of(target, format), state.options.max_kl
    if bundle_at(model) is not None:
        raise OptionError(f"{model} is a bundle, which is compiled already", "Export the model that it was made of")
    folder = _place(out)
    require_free(folder, overwrite=overwrite)
    if app is not None:
        require_libraries(app, ())  # before compiling: is it an app, and can Android load its libraries?
    chosen = [backends_for(name, backend, probe_file) for name, backend in pairs]
    models = CachedModels(ChildJobs(state, identify(model, state, chosen[0][0].plugins)))
    made: list[_Compiled] = []
    try:
        for machine, choice in chosen:
            compile_one = lambda attempt: _compile(models, attempt, max_kl)  # noqa: E731
            made.append(first_that_works(models.jobs, machine, choice, compile_one))
        if app is not None:
            needed = [name for one in made for name in _json_file(one.ready.compiled, LIBRARIES_FILE, list[str]) or ()]
            require_libraries(app, needed)
        manifest = _write(models, made, folder, model, overwrite=overwrite)
        if max_kl is not None:
            state.warnings += _uncompared(manifest.variants, made, max_kl)
        return _exported(state, made, folder, manifest, time.perf_counter() - start)
    finally:
        for one in made:
            one.ready.compiled.release()


def _compile(models: CachedModels, attempt: Attempt, max_kl: float | None) -> _Compiled:
    """Compile for one candidate, and compare with the reference if something here can run it."""
    found = models.find(attempt)
    ready = found if isinstance(found, Ready) else models.prepare(attempt)
    try:
        if isinstance(found, Ready) and models.state.options.verify == "always" and attempt.runs_here:
            ready = models.recheck(attempt, ready)
        return _Compiled(attempt, ready, measured_fidelity(models, attempt, ready, max_kl))
    except BaseException:
        ready.compiled.release()
        raise


def _uncompared(variants: Sequence[Variant], made: Sequence[_Compiled], max_kl: float) -> list[str]:
    """Warnings about variants that could not be compared, so that the bound was not applied."""
    pairs = zip(variants, made, strict=True)
    names = [variant.name for variant, one in pairs if one.fidelity is None and selfcheck_kl(one.ready) is None]
    return [
        f"Nothing here could compare {name} with the reference, so {option('max_kl', max_kl)} was not applied to it"
        for name in names
    ]


def _place(out: str | Path) -> Path:
    """The folder as an absolute path, with links in its parents resolved."""
    try:
        path = Path(out).expanduser().absolute()
        if "\0" in path.name:
            raise ValueError("it has a zero byte")
        if path.name and str(out):
            return path.parent.resolve() / path.name
    except TypeError:
        raise OptionError(f"out={out!r} is not a path", "Give the folder to write") from None
    except (OSError, RuntimeError, ValueError) as error:  # unknown user, circular links, a zero byte
        raise OptionError(f"out={str(out)!r} cannot be a folder: {error}", "Give another one") from None
    raise OptionError(f"out={str(out)!r} names no folder", "Give the folder to write")


def _write(
    models: CachedModels, made: Sequence[_Compiled], folder: Path, model: Any, *, overwrite: bool
) -> BundleManifest:  # fmt: skip
    from transom.preparation.reference_outputs import to_npz  # imports NumPy

    state, identity = models.state, models.jobs.identity
    first = made[0]
    source = first.ready.source
    reference = models.reference_outputs(first.attempt, source)
    policy, decoder = identity.sparsity, source.decoder
    if decoder is not None:
        policy, _ = heads.with_shipped_heads(policy, decoder, source.name)
    texts, _ = texts_of(source)
    licenses = licenses_of(model)
    options = state.options.for_backend
    manifest = BundleManifest(
        transom=version(),
        created=now(),
        name=source.name,
        kind=source.kind,
        fingerprint=identity.fingerprint,
        graph=source.graph_digest,
        uses_plugin_operators=source.uses_plugin_operators,
        license=license_of(model, licenses),
        model_notes=source.notes,
        options={"precision": options["precision"], "context": options["context"], "sparsity": policy.to_string()},
        decoder=decoder,
        inputs=source.inputs,
        tokens=tuple(int(i) for i in reference["ids"]) if decoder else (),
        best=tuple(int(i) for i in reference["logits"].argmax(-1)) if decoder else (),
    )
    pieces = [_variant_files(name, one) for name, one in zip(_names(made), made, strict=True)]
    files: dict[str, bytes | Path] = {**texts, REFERENCE_FILE: to_npz(reference)}
    files |= {f"{LICENSES}/{_FOREIGN.sub('_', path.name)}": path for path in licenses}
    backends = {one.attempt.candidate.backend: one.attempt.plugin.backend for one in made}

    def finish(found: BundleManifest) -> dict[str, bytes]:
        return app_files(found, backends, texts)

    return write_bundle(folder, manifest, files, pieces, finish, overwrite=overwrite, progress=state.progress)


def _names(made: Sequence[_Compiled]) -> list[str]:
    """Names of the variants: the backend, with the target where several variants have that backend."""
    backends = [one.attempt.candidate.backend for one in made]
    names = []
    for backend, one in zip(backends, made, strict=True):
        target = one.attempt.device.id.removeprefix(PREFIX).replace(":", "-")
        names.append(backend if backends.count(backend) == 1 else f"{backend}-{target}")
    return names


def _variant_files(name: str, one: _Compiled) -> VariantFiles:
    attempt, source, compiled, plan = one.attempt, one.ready.source, one.ready.compiled, one.ready.plan
    memory = {}
    if plan is not None:
        memory = {"weights": plan.weights, "cache_per_token": plan.cache // plan.context, "workspace": plan.workspace}
        known = _json_file(compiled, MEMORY_FILE, dict[str, int]) or {}
        memory |= {use: int(count) for use, count in known.items() if use in memory}
    precision, _ = precision_and_notes(source.notes, compiled)
    variant = Variant(
        name=name,
        backend=attempt.candidate.backend,
        backend_version=attempt.plugin.version,
        distribution=attempt.plugin.distribution,
        target=attempt.device,
        requires=compiled.artifact.requires,
        precision=precision,
        exact=is_exact(compiled),
        divergence=declared_divergence(compiled),
        notes=tuple(compiled.artifact.notes),
        decomposed=decomposed(compiled),
        context=plan.context if plan else 0,
        memory=memory,
        libraries=tuple(_json_file(compiled, LIBRARIES_FILE, list[str]) or ()),
        fidelity=one.fidelity,
        files={},
    )
    # An artifact that nothing here opens can have several GB: it is moved. One that runs here stays in the cache.
    take = compiled.remove if not attempt.runs_here and isinstance(compiled, StoredArtifact) else None
    return VariantFiles(variant, compiled.artifact.files, take)


def _json_file(compiled: CompiledModel, name: str, kind: type[T]) -> T | None:
    """The content of a JSON file of an artifact; None if the artifact has no such file.

    Raises:
        EngineError: the file is damaged.
    """
    path = compiled.artifact.files.get(name)
    if not isinstance(path, Path):
        return None
    with reading_artifact():
        return from_json(kind, path.read_bytes())


def _exported(
    state: LoadState, made: Sequence[_Compiled], folder: Path, manifest: BundleManifest, seconds: float
) -> Exported:
    files = {name: record.bytes for name, record in manifest.files.items()}
    warnings = [text for one in made for text in warnings_of(state, one.attempt, one.ready)]
    return Exported(
        folder=folder,
        model=manifest.name,
        variants=tuple(_result(variant, one) for variant, one in zip(manifest.variants, made, strict=True)),
        files={**files, BUNDLE_MANIFEST: (folder / BUNDLE_MANIFEST).stat().st_size},
        warnings=tuple(dict.fromkeys(warnings)),
        seconds=seconds,
    )


def _result(variant: Variant, one: _Compiled) -> ExportedVariant:
    precision, notes = precision_and_notes(one.ready.source.notes, one.ready.compiled)
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


def _check_text(one: _Compiled) -> str:
    if one.fidelity is not None:
        return fidelity_text(one.fidelity)
    return verdict_text(one.ready.verdict) or "not possible here; it is done where the bundle is loaded"

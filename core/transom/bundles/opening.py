"""Loads a bundle with the backend that it names, on the device of this machine that fits it best.

Nothing is compiled and no source is read. If the bundle has never run here, a child process first opens it and compares
it with the reference outputs that it contains; the verdict is kept in this machine's cache.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from transom.bundles.bundle import Bundle, open_bundle
from transom.bundles.bundle_models import BundleModels
from transom.bundles.manifest import BundleManifest, Variant
from transom.errors import OptionError, SelectionError, option
from transom.loading.attempts import first_that_works
from transom.loading.child_jobs import ChildJobs
from transom.loading.identity import ModelIdentity
from transom.loading.load_state import LoadState
from transom.loading.machine import Machine, choose, has_fix, limit_threads, survey
from transom.loading.opening import open_model
from transom.loading.options import LoadOptions
from transom.preparation.plugin_calls import check_artifact
from transom.selection import BANDS
from transom.sparsity import Sparsity

if TYPE_CHECKING:
    from transom.contract import Device
    from transom.generation.model import Model
    from transom.selection import Selection


def load_bundle(
    folder: Path,
    state: LoadState,
    *,
    device: str = "auto",
    backend: str = "auto",
    probe_file: str | Path | None = None,
    variant: str = "",
) -> Model:
    """Load a bundle; arguments are those of `transom.load`.

    Args:
        variant: name of a variant; empty for the one that fits best.

    Raises:
        BundleError: it is damaged, or of a newer version.
        OptionError: an option contradicts a value that is built into the bundle.
        SelectionError: its backend is not installed, or fits no device here; the details say why.
        EngineError, SelfCheckFailed: it cannot be opened, or its outputs differ from the reference outputs.
    """
    with state.stages.time("read"):
        bundle = open_bundle(folder, state.cache, state.progress)
    try:
        with state.stages.time("probe"):
            machine = survey(probe_file, target=device)
            deterministic = state.options.deterministic
            bundle, choice = _best_variant(bundle, machine, device, backend, variant, deterministic=deterministic)
        state.options = _merged_options(bundle.manifest, bundle.variant, folder, state.options)
        if "threads" not in bundle.variant.requires:
            limit_threads(state, machine)
        jobs = ChildJobs(state, _identity(bundle, state.options.sparsity))
        models = BundleModels(jobs, bundle)
        return first_that_works(jobs, machine, choice, lambda attempt: open_model(models, attempt))
    except BaseException:
        bundle.release()
        raise


def _identity(bundle: Bundle, sparsity: Sparsity) -> ModelIdentity:
    """The identity of a bundle, from its own content alone."""
    return ModelIdentity(
        path=str(bundle.folder),
        content=bundle.key,
        fingerprint=bundle.manifest.fingerprint,
        uses_plugin_operators=bundle.manifest.uses_plugin_operators,
        sparsity=sparsity,
        heads_from="as the bundle was compiled" if sparsity.heads else "",
    )


# -------------------------------------------------------------------------------------------------------------- options


def _merged_options(manifest: BundleManifest, variant: Variant, folder: Path, options: LoadOptions) -> LoadOptions:
    """The options, completed with the bundle's values. Raises OptionError for a contradiction."""

    def contradicts(name: str, value: object, own: object, fix: str = "Leave the option out") -> OptionError:
        return OptionError(
            f"{option(name, value)} does not fit the bundle {folder}, which has {option(name, own)}", fix
        )

    again = "Leave the option out, or export the model again with it"
    precision = manifest.options["precision"]
    if options.for_backend["precision"] not in ("auto", precision):
        raise contradicts("precision", options.for_backend["precision"], precision, again)
    policy = Sparsity.from_string(manifest.options["sparsity"])
    if not options.sparsity.dense and options.sparsity.with_heads(policy.heads) != policy:
        raise contradicts("sparsity", str(options.sparsity), str(policy), again)
    if options.texts:
        raise OptionError(f"The bundle {folder} is compiled already, so there is nothing to calibrate", "Leave it out")
    context, threads = options.for_backend["context"], options.for_backend["threads"]
    if (bound := variant.requires.get("context")) is not None and bound.isdigit():
        if context not in (None, int(bound)):
            raise contradicts("context", context, int(bound), again)
        context = int(bound)
    if variant.requires.get("threads", str(threads)) != str(threads):
        raise contradicts("threads", threads, variant.requires["threads"])
    context = context or manifest.options["context"]
    for_backend = {**options.for_backend, "context": context, "precision": precision, "threads": threads}
    return replace(options, for_backend=for_backend, sparsity=policy)


# -------------------------------------------------------------------------------------------------------------- devices


def _best_variant(
    bundle: Bundle, machine: Machine, device: str, backend: str, name: str, *, deterministic: bool
) -> tuple[Bundle, Selection]:
    """The variant that fits best, with the devices that it fits. Raises the first variant's error if none does."""
    variants, folder = bundle.manifest.variants, bundle.folder
    wanted = [v for v in variants if backend in ("auto", v.backend) and name in ("", v.name)]
    if not wanted:
        there = ", ".join(f"{v.name} ({option('backend', v.backend)})" for v in variants)
        what = option("backend", backend) if backend != "auto" else f"the variant {name!r}"
        raise OptionError(f"{what} does not fit the bundle {folder}", f"Leave it out, or name one of these: {there}")
    found: list[tuple[Bundle, Selection]] = []
    errors: list[SelectionError] = []
    for variant in wanted:
        one = bundle.of(variant)
        try:
            choice = choice_for(variant, folder, machine, device, deterministic=deterministic)
            found.append((one, _fitting_devices(one, machine, choice)))
        except SelectionError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    # Emulators come last; among equals the bundle's order decides.
    return min(found, key=lambda pair: (pair[1].offer.by_name, -BANDS.index(pair[1].offer.band)))


def choice_for(
    variant: Variant, folder: Path, machine: Machine, device: str, *, deterministic: bool = False
) -> Selection:
    """The devices that a variant's backend offers to run on. Raises OptionError, SelectionError."""
    require_backend(variant, folder, machine)
    try:
        return choose(machine, device=device, backend=variant.backend, deterministic=deterministic)
    except SelectionError as error:
        cause = f"The bundle {folder} was compiled for {_label(variant.target)}. {error.cause}"
        answers = [answer for name, answer in machine.answers if name == variant.backend]
        here = machine.devices[0].id if machine.devices else "NAME"
        fix = error.fix if has_fix(answers) else _ELSEWHERE.format(here)
        raise SelectionError(cause, fix, error.details) from None


def require_backend(variant: Variant, folder: Path, machine: Machine) -> None:
    """Raise SelectionError if a variant's backend is not installed."""
    if variant.backend in machine.plugins.backends:
        return
    what = " ".join(filter(None, (variant.distribution, variant.backend_version)))
    own = variant.distribution == "transom"
    fix = "pip install --upgrade transom" if own else f"pip install {variant.distribution}"
    there = ", ".join(machine.plugins.backends) or "none"
    raise SelectionError(
        f"The bundle {folder} needs the backend {variant.backend} (of {what}), which is not installed",
        f"Install it with: {fix}",
        [f"Installed backends: {there}", *map(str, machine.failures)],
    )


def _fitting_devices(bundle: Bundle, machine: Machine, choice: Selection) -> Selection:
    """The choice without the devices that the bundle does not fit. Raises SelectionError if none is left."""
    variant = bundle.variant
    backend = machine.plugins.backends[variant.backend].backend
    verdicts = [(c, check_artifact(backend, bundle.artifact, c.device)) for c in choice.ranked]
    fitting = tuple(candidate for candidate, verdict in verdicts if verdict.state in ("ok", "slower"))
    if not fitting:
        raise SelectionError(
            f"The bundle {bundle.folder} was compiled for {_label(variant.target)}, and fits no device of this "
            "machine that was requested",
            _ELSEWHERE.format(choice.ranked[0].device.id),
            [f"{variant.backend} on {c.device.id}: {v.reason or v.state}" for c, v in verdicts],
        )
    best = fitting[0]
    label = f" ({best.device.name})" if best.device.name else ""
    why = f"{best.backend} on {best.device.id}{label}: {best.offer.why}. The bundle was compiled for "
    return replace(choice, ranked=fitting, why=f"{why}{_label(variant.target)}.", kinds_to_measure=())


_ELSEWHERE = (
    "Copy it to such a device, or export the model again for this one: transom export MODEL --target {} --out DIR"
)


def _label(device: Device) -> str:
    return f"{device.id} ({', '.join(filter(None, (device.name, device.arch)))})"

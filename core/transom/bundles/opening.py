"""Loading a bundle: the backend that it names, on the device of this machine that the backend says it fits.

Nothing is compiled and no source is read. Where it has never run, a child process opens it first and holds it against
the reference's answers that came with it; the verdict is remembered in this machine's cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.bundles.manifest import Bundle, Manifest, Variant, open_bundle
from transom.errors import EngineError, OptionError, SelectionError
from transom.loading.loader import Asked, Loader, Ready, Stages
from transom.loading.machine import Machine, can_be_mended, choose, survey
from transom.preparation.plugin_calls import guarded
from transom.selection import BANDS
from transom.sparsity import Sparsity

if TYPE_CHECKING:
    from transom.artifacts import Cache
    from transom.contract import Artifact, Device, Progress, Verdict
    from transom.generation.model import Model
    from transom.plugins import Plugins
    from transom.preparation.cached_source import Prepared
    from transom.selection import Candidate, Choice


def load_bundle(
    folder: Path,
    asked: Asked,
    *,
    device: str,
    backend: str,
    probe_file: str | Path | None,
    cache: Cache,
    progress: Progress,
    variant: str = "",
) -> Model:
    """What `transom.load` does with a bundle.

    Args:
        variant: the name of one; empty: the first that fits best.

    Raises:
        BundleError: it is damaged, or of a newer version.
        OptionError: an option contradicts what is built into it.
        SelectionError: its backend is not installed, or fits no device here; the details say why.
        EngineError, SelfCheckFailed: it cannot be opened, or does not compute what the model means.
    """
    stages = Stages()
    with stages.time("read"):
        bundle = open_bundle(folder, cache, progress)
    try:
        with stages.time("probe"):
            machine = survey(probe_file, target=device)
            bundle, choice = _chosen(bundle, machine, device, backend, variant)
        asked = _agreed(bundle.manifest, bundle.variant, folder, asked)
        loader = _Loader(bundle, asked, stages, cache=cache, progress=progress)
        loader.identify(machine.plugins)
        return loader.first_that_works(machine, choice, lambda turn: loader.open(machine, choice, turn))
    except BaseException:
        bundle.release()
        raise


# -------------------------------------------------------------------------------------------------------------- options


def _agreed(manifest: Manifest, variant: Variant, folder: Path, asked: Asked) -> Asked:
    """What was asked for, with the bundle's own values where nothing was. Raises OptionError where they contradict."""

    def contradicts(name: str, value: object, own: object, fix: str = "Leave the option out") -> OptionError:
        return OptionError(f"{name}={value!r} does not fit the bundle {folder}, which has {name}={own!r}", fix)

    again = "Leave the option out, or export the model again with it"
    precision = manifest.options["precision"]
    if asked.options["precision"] not in ("auto", precision):
        raise contradicts("precision", asked.options["precision"], precision, again)
    policy = Sparsity.from_string(manifest.options["sparsity"])
    if not asked.sparsity.dense and asked.sparsity.with_heads(policy.heads) != policy:
        raise contradicts("sparsity", str(asked.sparsity), str(policy), again)
    if asked.texts:
        raise OptionError(f"The bundle {folder} is compiled already, so there is nothing to calibrate", "Leave it out")
    context, threads = asked.options["context"], asked.options["threads"]
    if (bound := variant.requires.get("context")) is not None and bound.isdigit():
        if context not in (None, int(bound)):
            raise contradicts("context", context, int(bound), again)
        context = int(bound)
    if variant.requires.get("threads", str(threads)) != str(threads):
        raise contradicts("threads", threads, variant.requires["threads"])
    context = context or manifest.options["context"]
    return replace(asked, options={"context": context, "precision": precision, "threads": threads}, sparsity=policy)


# -------------------------------------------------------------------------------------------------------------- devices


def _chosen(bundle: Bundle, machine: Machine, device: str, backend: str, name: str) -> tuple[Bundle, Choice]:
    """The variant that fits best, and the devices that it fits. The error where none does is that of the first."""
    variants, folder = bundle.manifest.variants, bundle.folder
    asked = [v for v in variants if backend in ("auto", v.backend) and name in ("", v.name)]
    if not asked:
        there = ", ".join(f"{v.name} (backend={v.backend!r})" for v in variants)
        what = f"backend={backend!r}" if backend != "auto" else f"the variant {name!r}"
        raise OptionError(f"{what} does not fit the bundle {folder}", f"Leave it out, or name one of these: {there}")
    found: list[tuple[Bundle, Choice]] = []
    errors: list[SelectionError] = []
    for variant in asked:
        one = bundle.of(variant)
        try:
            found.append((one, _fitting(one, machine, choice_for(variant, folder, machine, device))))
        except SelectionError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    # An emulator is for who has nothing better; between equals the bundle's order counts.
    return min(found, key=lambda pair: (pair[1].offer.by_name, -BANDS.index(pair[1].offer.band)))


def choice_for(variant: Variant, folder: Path, machine: Machine, device: str) -> Choice:
    """The devices that a variant's backend offers to run on. Raises OptionError, SelectionError."""
    require_backend(variant, folder, machine)
    try:
        return choose(machine, device=device, backend=variant.backend)
    except SelectionError as error:
        cause = f"The bundle {folder} was compiled for {_named(variant.target)}. {error.cause}"
        said = [answer for name, answer in machine.answers if name == variant.backend]
        here = machine.devices[0].id if machine.devices else "NAME"
        fix = error.fix if can_be_mended(said) else _ELSEWHERE.format(here)
        raise SelectionError(cause, fix, error.details) from None


def require_backend(variant: Variant, folder: Path, machine: Machine) -> None:
    """Raise SelectionError where a variant's backend is not installed."""
    if variant.backend in machine.plugins.backends:
        return
    what = " ".join(filter(None, (variant.distribution, variant.backend_version)))
    own = variant.distribution == "transom"
    fix = "pip install --upgrade transom" if own else f"pip install {variant.distribution}"
    there = ", ".join(machine.plugins.backends) or "none"
    raise SelectionError(
        f"The bundle {folder} needs the backend {variant.backend} (of {what}), which is not there",
        f"Install it with: {fix}",
        [f"Backends that are there: {there}", *map(str, machine.failures)],
    )


def verdict_on(name: str, artifact: Artifact, machine: Machine, device: Device) -> Verdict:
    """What a backend says of an artifact on a device."""
    backend = machine.plugins.backends[name].backend
    return guarded(name, "checking a compiled model", lambda: backend.check(artifact, device))


def _fitting(bundle: Bundle, machine: Machine, choice: Choice) -> Choice:
    """The choice without the devices that the bundle does not fit. Raises SelectionError where none is left."""
    variant = bundle.variant
    verdicts = [
        (candidate, verdict_on(variant.backend, bundle.artifact, machine, candidate.device))
        for candidate in choice.ranked
    ]
    fitting = tuple(candidate for candidate, verdict in verdicts if verdict.state in ("ok", "slower"))
    if not fitting:
        raise SelectionError(
            f"The bundle {bundle.folder} was compiled for {_named(variant.target)}, and fits no device that was asked "
            "for here",
            _ELSEWHERE.format(choice.ranked[0].device.id),
            [f"{variant.backend} on {c.device.id}: {v.reason or v.state}" for c, v in verdicts],
        )
    best = fitting[0]
    label = f" ({best.device.name})" if best.device.name else ""
    why = f"{best.backend} on {best.device.id}{label}: {best.offer.why}. The bundle was compiled for "
    return replace(choice, ranked=fitting, why=f"{why}{_named(variant.target)}.", kinds_to_measure=())


_CHECK = "transom.bundles.checking:check"
"""The job of the child process."""
_ELSEWHERE = "Take it there, or export the model again for this machine: transom export MODEL --target {} --out DIR"


def _named(device: Device) -> str:
    return f"{device.id} ({', '.join(filter(None, (device.name, device.arch)))})"


# -------------------------------------------------------------------------------------------------------------- loading


class _Loader(Loader):
    """The state of one load of a bundle."""

    def __init__(self, bundle: Bundle, asked: Asked, stages: Stages, *, cache: Cache, progress: Progress) -> None:
        super().__init__(bundle.folder, asked, cache=cache, progress=progress)
        self.stages = stages
        self.bundle = str(bundle.folder)
        self._bundle = bundle

    def identify(self, plugins: Plugins) -> None:
        """The bundle says all of it, and is known by its own content."""
        self._path = str(self._bundle.folder)
        self.fingerprint = self._bundle.manifest.fingerprint
        self._uses_operators = self._bundle.manifest.foreign
        self._content = self._bundle.key
        self._heads_from = "as the bundle was compiled" if self.sparsity.heads else ""

    def _local_path(self) -> Path | None:
        return None  # nothing lies beside a bundle

    def _find(self, machine: Machine, candidate: Candidate, told: object = None) -> Ready | str:
        bundle, job = self._bundle, self._job(machine, candidate)
        verdict = verdict_on(candidate.backend, bundle.artifact, machine, candidate.device)
        plan = self._plan(bundle.source, candidate)
        checked = bundle.verdict(job.place) or told
        if not job.believes(checked):
            return "it is not believed here yet"
        return Ready(bundle.source, bundle, checked, plan, verdict.reason if verdict.state == "slower" else "")

    def _prepare(self, machine: Machine, candidate: Candidate) -> Ready:
        job = self._job(machine, candidate)
        with self.stages.time("child check"):
            told = self._child(_CHECK, machine, candidate, variant=self._bundle.variant.name)
        self._bundle.record_verdict(job.place, told)
        found = self._find(machine, candidate, told)
        if isinstance(found, str):
            raise EngineError(f"The bundle {self._bundle.folder} was checked just now and is not believed: {found}")
        return found

    def golden(self, machine: Machine, candidate: Candidate, source: Prepared) -> Mapping[str, Any]:
        return self._bundle.golden()

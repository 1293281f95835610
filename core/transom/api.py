"""The functions of the package `transom`: load, export, plan_export, explain, devices, backends. Only this file decides
whether something is a bundle or a model, and calls the room that handles it.

Imports nothing heavier than a warm load needs. On a warm load nothing but the artifact is read: the probe, the choice,
the manifest's checks, the engine's import. On a cold one a child process compiles and checks (`transom.preparation`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom import hardware
from transom.artifacts import Cache
from transom.contract import Backend, Device, Offer, Refusal
from transom.errors import OptionError, UnsupportedError
from transom.loading.load_state import LoadState
from transom.loading.loader import load_model
from transom.loading.machine import has_fix, survey
from transom.loading.options import LoadOptions, auto_policy, check_objects, checked_options
from transom.plugins import PluginFailure
from transom.preparation.plugin_calls import interrupts_kept
from transom.sources import bundle_at
from transom.sparsity import Sparsity

if TYPE_CHECKING:
    from transom.bundles.exported import Exported
    from transom.bundles.plan import ExportPlan
    from transom.contract import Progress
    from transom.generation.model import Model
    from transom.loading.explanation import Explanation


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
        calibration: texts, or text files as `pathlib.Path`, that are like what the model will read, for a backend that
            rounds activations; empty for passages that come with Python.
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
    auto_policy()  # refuses a wrong value of TRANSOM_AUTO, also where it has no effect
    options = checked_options(
        "load",
        context=context,
        precision=precision,
        threads=threads,
        sparsity=sparsity,
        calibration=calibration,
        verify=verify,
        unknown=unknown,
    )
    state = _state(options, cache, progress)
    if (bundle := bundle_at(model)) is not None:
        from transom.bundles.opening import load_bundle  # a model from the cache does not need it

        return load_bundle(bundle, state, device=device, backend=backend, probe_file=probe_file)
    return load_model(model, state, device=device, backend=backend, probe_file=probe_file)


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
    from transom.bundles.exporting import export_model

    options = checked_options(
        "export",
        context=context,
        precision=precision,
        threads=None,
        sparsity=sparsity,
        calibration=calibration,
        verify=verify,
        unknown=unknown,
    )
    return export_model(
        model,
        _state(options, cache, progress),
        target=target,
        out=out,
        format=format,
        max_kl=max_kl,
        app=app,
        overwrite=overwrite,
        probe_file=probe_file,
    )


def plan_export(
    model: Any,
    *,
    target: str | Sequence[str],
    format: str | Sequence[str] = "auto",
    context: int | None = None,
    precision: str = "auto",
    sparsity: Any = "off",
    probe_file: str | Path | None = None,
) -> list[ExportPlan]:
    """What `transom.export` would write for each target, and how fast it could be, without compiling.

    Looks at the shapes of the model's graph, and at no weight; but a model that is opened for the first time is read
    once, for the hash of its files. The arguments are those of `transom.export`; a plan does not need the packages that
    compiling does.

    Raises:
        OptionError: an unknown target, format, option or value, a context beyond the model's, or a policy of sparse
            attention: a plan is for dense attention.
        SelectionError: no backend compiles for the target, or the one that is named does not; a package that is
            missing is no reason.
        SourceError, UnsupportedError: the model cannot be read, or is no decoder.
        DoesNotFit: a layer alone is larger than one compiled part may be.
    """
    from dataclasses import replace

    from transom.bundles.targets import backends_for, pairs_of
    from transom.bundles.weighing import form_of, plan_variants
    from transom.preparation.plugin_operators import explaining_rejected, register_operators
    from transom.sources import resolve

    options = checked_options(
        "export",
        context=context,
        precision=precision,
        threads=None,
        sparsity=sparsity,
        calibration=(),
        verify="auto",
        unknown={},
    )
    if not options.sparsity.dense:
        raise OptionError(
            "A plan is for dense attention, and sparsity names a policy",
            "Leave it out; what a policy reads of the cache is among the notes of an export",
        )
    found: dict[str, tuple[Device, list[Backend]]] = {}
    for name, backend in pairs_of(target, format):
        machine = survey(probe_file, target=name)
        device = hardware.find(machine.devices, name)
        own = [answer for by, answer in machine.answers if by == backend and answer.device_id == device.id]
        if not has_fix(own):
            backend = backends_for(name, backend, probe_file)[1].backend
        found.setdefault(device.id, (device, []))[1].append(machine.plugins.backends[backend].backend)
    plugins = machine.plugins
    register_operators(plugins)
    with explaining_rejected(plugins):
        source = resolve(model).open(model, context=context)
    graph, decoder = source.graph, source.graph.decoder
    if decoder is None:
        raise UnsupportedError(f"{graph.name} has no attention with a cache, so there is nothing to plan")
    plans = []
    for device, formats in found.values():
        forms = [form_of(backend, precision, decoder, device) for backend in formats]
        plans.append(replace(plan_variants(graph, decoder, device, forms, context), model=source.name))
    return plans


def _state(options: LoadOptions, cache: Cache | None, progress: Progress | None) -> LoadState:
    """Raises OptionError for a cache or a progress of the wrong type."""
    check_objects(cache, progress)
    return LoadState(options, cache or Cache.default(), progress or (lambda stage, share: None))


def devices(probe_file: str | Path | None = None) -> tuple[Device, ...]:
    """What the probe found: CPUs, GPUs, NPUs, and the catalogue of targets that can be compiled for.

    Args:
        probe_file: read the devices from this JSON file in place of probing.

    Raises:
        OptionError: the probe file cannot be read; names the key that is wrong.
    """
    return hardware.probe_devices(None if probe_file is None else Path(probe_file))


@dataclass(frozen=True)
class InstalledBackend:
    """A backend that was found, and what it says about the devices here."""

    name: str
    distribution: str
    version: str
    answers: tuple[Offer | Refusal, ...]


@dataclass(frozen=True)
class Backends:
    """Every backend that is installed, and every plugin that failed with its cause and fix."""

    installed: tuple[InstalledBackend, ...]
    failures: tuple[PluginFailure, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "backends": [
                {
                    "name": b.name,
                    "distribution": b.distribution,
                    "version": b.version,
                    "answers": [{"offer": isinstance(a, Offer), **vars(a)} for a in b.answers],
                }
                for b in self.installed
            ],
            "failures": [vars(f) for f in self.failures],
        }


def backends(probe_file: str | Path | None = None) -> Backends:
    """What is installed, what it offers on this machine, what failed to load and how to fix it."""
    from transom.preparation.plugin_operators import register_operators

    machine = survey(probe_file)
    register_operators(machine.plugins)  # asked for here, as it may find more that is broken
    here = {d.id for d in machine.devices if d.kind != "remote"}
    installed = tuple(
        InstalledBackend(
            plugin.name,
            plugin.distribution,
            plugin.version,
            tuple(a for name, a in machine.answers if name == plugin.name and a.device_id in here),
        )
        for plugin in machine.plugins.backends.values()
    )
    return Backends(installed, machine.failures)


def explain(
    model: Any, device: str = "auto", *, sparsity: Any = "off", probe_file: str | Path | None = None
) -> Explanation:
    """Every backend against every device, and against every node of the model, before anything is compiled.

    Args:
        model: anything `load` takes, or a `transom.graph.Graph`. A bundle has no nodes any more: its backend alone is
            asked, whether it fits the device.
        device: `"auto"` for every device that is here, or the name of one (a remote target too).
        sparsity: which keys attention reads, as for `load`.
        probe_file: devices from this JSON file in place of the probe.

    Raises:
        SourceError: the model cannot be read.
        BundleError: a bundle's manifest is damaged, or of a newer Transom.
        OptionError: there is no such device, or the probe file cannot be read.
        SelectionError: a bundle's backend is not installed.
    """
    from transom.bundles.explaining import explain_bundle
    from transom.graph import Graph
    from transom.graph.sparse import with_sparsity
    from transom.loading.explanation import explain_graph
    from transom.preparation.plugin_operators import explaining_rejected, register_operators
    from transom.sources import resolve

    policy = Sparsity.parse(sparsity)

    machine = survey(probe_file, target=device)
    register_operators(machine.plugins)  # before a graph that uses them is read
    if device != "auto":
        device = hardware.find(machine.devices, device).id
    if (bundle := bundle_at(model)) is not None:
        return explain_bundle(bundle, machine, device=device)
    if isinstance(model, Graph):
        return explain_graph(with_sparsity(model, policy), model.name, machine, device=device)
    with explaining_rejected(machine.plugins):
        source = resolve(model).open(model)
    return explain_graph(with_sparsity(source.graph, policy), source.name, machine, device=device)

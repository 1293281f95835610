"""The functions of the package `transom`: load, export, plan_export, explain, devices, backends.

This file alone decides whether its argument is a bundle or a model, and calls the room that handles it. It imports
nothing that a warm load does not need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom import hardware
from transom.artifacts import Cache
from transom.contract import Device, Offer, Refusal
from transom.loading.load_state import LoadState
from transom.loading.loader import load_model
from transom.loading.machine import survey
from transom.loading.options import LoadOptions, auto_policy, check_objects, checked_options
from transom.plugins import PluginFailure
from transom.preparation.plugin_calls import interrupts_kept
from transom.sources import bundle_at, located
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
    deterministic: bool = False,
    max_kl: float | None = None,
    probe_file: str | Path | None = None,
    offline: bool = False,
    cache: Cache | None = None,
    progress: Progress | None = None,
    **unknown: Any,
) -> Model:
    """Load a model onto a device.

    Args:
        model: a GGUF file, a Hugging Face directory, an ONNX file, a `torch.nn.Module` wrapped in
            `transom.TorchSource`, a transformers model, a bundle that `transom.export` wrote, or the id of a model of
            the Hugging Face hub, `"owner/name[:file-or-quantization][@revision]"`. Backend, `precision`, `sparsity` and
            other built-in options of a bundle are fixed: `"auto"` and `"off"` keep them, and a different value is an
            OptionError.
        device: `"auto"`, or an id from `transom.devices()` (`"cpu"`, `"cuda:0"`), or several for one model on all of
            them (`"cuda:0,cuda:1"`). A named device is never replaced by another.
        backend: `"auto"`, or a name from `transom.backends()`. A named backend is never replaced by another.
        context: maximum tokens of a sequence; None for the model's own context, which is reduced to what fits, with a
            warning in `report.warnings`.
        precision: `"auto"`, `"exact"`, `"fast"`, or a format by name. The backend defines what they mean, and reports
            it in `model.report.precision`.
        threads: processor threads, at most one for each core; None for every core that this process may use.
        sparsity: which keys attention reads (`transom.sparsity.Sparsity.parse`): `"off"` for all, `"safe"`,
            `"balanced"`, `"fast"`, `"classic"`, a coverage such as 0.94, a JSON file, or a `Sparsity`.
        calibration: texts, or text files as `pathlib.Path`, similar to the model's later input, for a backend that
            quantizes activations; empty for passages that come with Python.
        verify: `"auto"` compares a new artifact with the reference once on each device, `"always"` at every load,
            `"off"` never.
        deterministic: the same request gives the same tokens whatever else the model runs. Only backends that promise
            the same bits for the same steps are used. Where the steps of an engine change with what shares them, each
            sequence gets steps of its own.
        max_kl: largest mean divergence of the logits from the reference, in nats. A compiled model above it in the
            self-check is not used, and a backend that chooses number formats by measuring keeps it; None for the limits
            of both.
        probe_file: a JSON file that replaces the probe of devices (`transom doctor --json` writes one).
        offline: a model of the hub is taken from the hub's cache, and never downloaded. Without it, a model that is not
            there is downloaded, and a log record says so.
        cache: the artifact cache; None for the default one.
        progress: called with (stage, share done or None). It may raise `transom.Cancelled`, which leaves no partial
            results.

    Raises:
        SourceError: the model cannot be read, or not be downloaded.
        MissingExtra: the id of a model of the hub, and huggingface_hub is not installed.
        BundleError: the bundle is damaged, or of a newer Transom.
        SelectionError: no backend can run it with these options; the details contain the answer of each backend.
        DoesNotFit: it needs more memory than is free.
        SelfCheckFailed, EngineError, UnsupportedError: a named backend cannot run it. `"auto"` tries the next offer
            instead, with a warning in `report.warnings`.
        OptionError: an unknown option or value.
    """
    auto_policy()  # rejects a wrong value of TRANSOM_AUTO, even where it has no effect
    options = checked_options(
        "load",
        context=context,
        precision=precision,
        threads=threads,
        sparsity=sparsity,
        calibration=calibration,
        verify=verify,
        deterministic=deterministic,
        max_kl=max_kl,
        unknown=unknown,
    )
    state = _state(options, cache, progress)
    model = located(model, offline=offline, progress=state.progress)
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
    offline: bool = False,
    cache: Cache | None = None,
    progress: Progress | None = None,
    probe_file: str | Path | None = None,
    **unknown: Any,
) -> Exported:
    """Compile a model for a device and write it as a bundle, which `transom.load` opens on a machine with that device.

    Args:
        model: anything that `transom.load` compiles.
        target: a name of the catalogue (`"rtx-4090"`, also `"remote:rtx-4090"`), or the id of a device of this machine
            (`"cpu"`, `"cuda:0"`); several as a list, or separated by commas. The bundle has a variant for each.
        out: the folder to write. It must not exist, be empty, or hold a bundle if `overwrite` is set.
        format: `"auto"`, or the name of the backend that compiles (`"qnn"`, `"onnx"`, `"tensorrt"`); several as a list,
            or separated by commas, each for every target. A named backend is never replaced by another.
        context: maximum tokens of a sequence; None for the model's own context, reduced to what fits the target.
        precision, sparsity: as for `transom.load`; built into the bundle.
        calibration: texts, or text files as `pathlib.Path`, for a backend that quantizes activations; empty for
            passages that come with Python.
        verify: for a device of this machine, `"auto"` compares a new artifact with the reference, `"always"` also one
            that has passed before, and `"off"` only runs it. A variant for another device is compared on something
            that can run it here, such as an emulator, and again where it is loaded.
        max_kl: largest mean divergence of the logits from the reference logits on the fixed prompt, in nats; None for
            the bound of the self-check. Where nothing here can run the variant, a warning is given instead.
        app: an APK, AAR, app bundle or folder; before anything is written, its native libraries are compared with those
            that the variants need. None for no comparison.
        overwrite: whether a bundle in `out` may be replaced.
        offline: as for `transom.load`.
        cache: the artifact cache; None for the default one.
        progress: called with (stage, share done or None); may raise `transom.Cancelled`.
        probe_file: a JSON file that replaces the probe of devices.

    An export that ends early writes no bundle and leaves an older one unchanged.

    Raises:
        OptionError: an unknown target, option or value; `out` is in use; or the app lacks libraries, or contains some
            that phones do not load.
        BundleError: the bundle cannot be written.
        SelectionError: no backend compiles for the target; the details contain the answer of each backend.
        FidelityError: the compiled model diverges by more than `max_kl`; names the matrix products with the largest
            errors.
        SourceError, UnsupportedError, DoesNotFit, EngineError, SelfCheckFailed: as for `transom.load`.
    """
    from transom.bundles.exporting import export_model

    options = checked_options(
        "export",
        context=context,
        precision=precision,
        sparsity=sparsity,
        calibration=calibration,
        verify=verify,
        max_kl=max_kl,
        unknown=unknown,
    )
    state = _state(options, cache, progress)
    return export_model(
        located(model, offline=offline, progress=state.progress),
        state,
        target=target,
        out=out,
        format=format,
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
    offline: bool = False,
) -> list[ExportPlan]:
    """Plan an export without compiling: what `transom.export` would write for each target, and how fast it could be.

    Reads the shapes of the model's graph and no weights, except that a model opened for the first time is read once to
    hash its files. The arguments are those of `transom.export`. The packages for compiling are not needed.

    Raises:
        OptionError: an unknown target, format, option or value, a context longer than the model's, or a sparsity
            policy: plans are for dense attention.
        SelectionError: no backend, or not the named one, compiles for the target.
        SourceError, UnsupportedError: the model cannot be read, or is not a decoder.
        DoesNotFit: a layer alone is larger than one compiled part may be.
    """
    from transom.bundles.planning import plan_model

    options = checked_options("export", context=context, precision=precision, sparsity=sparsity)
    return plan_model(located(model, offline=offline), options, target=target, format=format, probe_file=probe_file)


def _state(options: LoadOptions, cache: Cache | None, progress: Progress | None) -> LoadState:
    """Raises OptionError for a cache or a progress of the wrong type."""
    check_objects(cache, progress)
    return LoadState(options, cache or Cache.default(), progress or (lambda stage, share: None))


def devices(probe_file: str | Path | None = None) -> tuple[Device, ...]:
    """The devices that the probe found: CPUs, GPUs and NPUs, and the catalogue of targets that can be compiled for.

    Args:
        probe_file: a JSON file that replaces the probe of devices.

    Raises:
        OptionError: the probe file cannot be read; names the wrong key.
    """
    return hardware.probe_devices(None if probe_file is None else Path(probe_file))


@dataclass(frozen=True)
class InstalledBackend:
    """An installed backend, with its answers about the devices of this machine."""

    name: str
    distribution: str
    version: str
    answers: tuple[Offer | Refusal, ...]


@dataclass(frozen=True)
class Backends:
    """The installed backends, and the plugins that failed, with cause and fix."""

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
    """The installed backends with their answers about this machine, and the plugins that failed to load."""
    from transom.preparation.plugin_operators import register_operators

    machine = survey(probe_file)
    register_operators(machine.plugins)  # this may add to the failures
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
    model: Any,
    device: str = "auto",
    *,
    sparsity: Any = "off",
    probe_file: str | Path | None = None,
    offline: bool = False,
) -> Explanation:
    """Explain what each backend does with each device and each node of the model. Compiles nothing.

    Args:
        model: anything that `load` takes, or a `transom.graph.Graph`. A bundle has no nodes; for it, the answers tell
            whether its variants fit the devices.
        device: `"auto"` for every device of this machine, or the name of a device or a remote target.
        sparsity: which keys attention reads, as for `load`.
        probe_file: a JSON file that replaces the probe of devices.
        offline: as for `load`.

    Raises:
        SourceError: the model cannot be read.
        BundleError: a bundle's manifest is damaged, or of a newer Transom.
        OptionError: the device does not exist, or the probe file cannot be read.
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
    model = located(model, offline=offline)
    if (bundle := bundle_at(model)) is not None:
        return explain_bundle(bundle, machine, device=device)
    if isinstance(model, Graph):
        return explain_graph(with_sparsity(model, policy), model.name, machine, device=device)
    with explaining_rejected(machine.plugins):
        source = resolve(model).open(model)
    return explain_graph(with_sparsity(source.graph, policy), source.name, machine, device=device)

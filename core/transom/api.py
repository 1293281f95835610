"""The functions of the package `transom` that ask rather than run: devices, backends, explain."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom import hardware
from transom.contract import Device, Offer, Refusal
from transom.plugins import PluginFailure
from transom.runtime.machine import survey

if TYPE_CHECKING:
    from transom.runtime.explain import Explanation


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
    from transom.runtime.operators import register_operators

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
    from transom.graph import Graph
    from transom.graph.sparse import with_sparsity
    from transom.runtime.explain import explain_bundle, explain_graph
    from transom.runtime.operators import explaining_rejected, register_operators
    from transom.sources import bundle_at, resolve
    from transom.sparsity import Sparsity

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

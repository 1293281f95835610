"""The devices of this machine, the backends' answers about them, and the choice among these. On the warm path."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from transom import hardware
from transom.artifacts import artifact_key
from transom.contract import Device, Offer, Refusal
from transom.errors import option
from transom.plugins import PluginFailure, Plugins, load_plugins
from transom.selection import Candidate, Selection, select

if TYPE_CHECKING:
    from transom.loading.load_state import LoadState


@dataclass(frozen=True)
class Machine:
    """Devices, plugins, and the plugins' answers about the devices."""

    found: hardware.ProbeResult
    """Result of the probe. Includes a remote target that the user named."""
    plugins: Plugins
    answers: tuple[tuple[str, Offer | Refusal], ...]

    @property
    def devices(self) -> tuple[Device, ...]:
        return self.found.devices

    @property
    def failures(self) -> tuple[PluginFailure, ...]:
        """All plugin failures so far; further calls to plugins can add to them."""
        return tuple(dict.fromkeys(self.plugins.failures))

    @property
    def free_bytes(self) -> int | None:
        """Free bytes of the host's memory, in which the reference runs whatever the device; None where unknown."""
        return next((device.free_bytes for device in self.devices if device.kind == "cpu"), None)

    def runtime_identity(self, candidate: Candidate) -> str:
        """A key of hardware, driver, backend and versions: a verdict or a measured speed holds for exactly these.

        The text of the offer is included, because a backend names the version of its SDK there.
        """
        device = candidate.device
        return artifact_key(
            {
                "device": device.identity or device.name or device.id,
                "drivers": device.drivers,
                "backend": candidate.backend,
                "version": self.plugins.backends[candidate.backend].version,
                "why": candidate.offer.why,
            }
        )


def survey(probe_file: str | Path | None = None, *, target: str = "auto") -> Machine:
    """Probe the devices and ask every plugin about them.

    Args:
        probe_file: a JSON file that replaces the probe of devices.
        target: a device that must be among them; may be a remote target of the catalogue.

    Raises:
        OptionError: the probe file cannot be read, or the device does not exist.
    """
    found = hardware.probe(None if probe_file is None else Path(probe_file))
    devices = hardware.with_target(found.devices, target, found.notes)
    plugins = load_plugins()
    return Machine(replace(found, devices=devices), plugins, plugins.probe(devices).answers)


def choose(
    machine: Machine,
    *,
    device: str = "auto",
    backend: str = "auto",
    measured: Mapping[str, float] | None = None,
    purpose: Literal["run", "export"] = "run",
    deterministic: bool = False,
) -> Selection:
    """Select, with the environment variable and the plugins' hooks. Raises as `selection.select`."""
    hook = machine.plugins.choose([(name, answer) for name, answer in machine.answers if isinstance(answer, Offer)])
    return select(
        machine.devices,
        machine.answers,
        device=device,
        backend=backend,
        environment_device=os.environ.get("TRANSOM_DEVICE") or None,
        hook=hook,
        failures=machine.failures,  # the hooks' own included
        purpose=purpose,
        measured=measured,
        notes=machine.found.notes,
        deterministic=deterministic,
    )


def limit_threads(state: LoadState, machine: Machine) -> None:
    """Lower the option `threads` to the cores of the machine, and warn: further threads would only wait for a core."""
    threads = state.options.for_backend["threads"]
    cores = next((device.cores for device in machine.devices if device.kind == "cpu" and device.cores), None)
    if threads is None or cores is None or threads <= cores:
        return
    state.options = replace(state.options, for_backend={**state.options.for_backend, "threads": cores})
    state.warnings.append(
        f"{option('threads', threads)} is more than this process has cores: {cores} "
        f"{'thread is' if cores == 1 else 'threads are'} used"
    )


def has_fix(answers: Iterable[Offer | Refusal]) -> bool:
    """Whether a refusal names a fix other than another device."""
    return any(isinstance(a, Refusal) and bool(a.fix) and a.code != "wrong_device" for a in answers)

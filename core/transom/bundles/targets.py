"""The devices that models can be compiled for, and the backends that compile for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transom import hardware
from transom.contract import Device, Offer, Refusal
from transom.errors import OptionError, SelectionError, nearest, option
from transom.hardware.catalogue import PREFIX
from transom.loading.machine import Machine, choose, has_fix, survey
from transom.selection import Selection


@dataclass(frozen=True)
class Target:
    """A device that models can be compiled for, with each backend's answer about it."""

    device: Device
    answers: tuple[tuple[str, Offer | Refusal], ...]
    """Pairs of backend and answer."""

    @property
    def name(self) -> str:
        """The value for the option `target`."""
        return self.device.id.removeprefix(PREFIX)


def targets(probe_file: str | Path | None = None) -> tuple[Target, ...]:
    """The devices of this machine and of the catalogue, with every backend's answer about each."""
    machine = survey(probe_file)
    devices = (*machine.devices, *hardware.catalogue())
    answers = machine.plugins.probe(devices).answers
    return tuple(Target(d, tuple((name, a) for name, a in answers if a.device_id == d.id)) for d in devices)


def known_targets(probe_file: str | Path | None = None) -> list[str]:
    """The names of all targets."""
    found = hardware.probe(None if probe_file is None else Path(probe_file))
    return [d.id.removeprefix(PREFIX) for d in (*found.devices, *hardware.catalogue())]


def pairs_of(target: str | Sequence[str], format: str | Sequence[str]) -> list[tuple[str, str]]:
    """Each target with each format, in order."""
    lists = []
    for name, given in (("target", target), ("format", format)):
        many = given.split(",") if isinstance(given, str) else list(given) if isinstance(given, Sequence) else [given]
        words = [word.strip() if isinstance(word, str) else word for word in many]
        if not words or not all(isinstance(word, str) and word for word in words):
            raise OptionError(
                f"{option(name, given)} names none", f"Give a name, or several separated by commas, as {name}"
            )
        if len(set(words)) < len(words):
            raise OptionError(f"{option(name, given)} names one twice", "Name each once")
        lists.append(words)
    targets, formats = lists
    return [(t, f) for t in targets for f in formats]


def backends_for(target: str, backend: str, probe_file: str | Path | None) -> tuple[Machine, Selection]:
    """This machine and the backends that compile for the target. `TRANSOM_DEVICE` has no effect."""
    if not isinstance(target, str) or target.strip().lower() in ("", "auto"):
        raise OptionError(f"{option('target', target)} names no device", nearest("", known_targets(probe_file)))
    machine = survey(probe_file, target=target)
    try:
        return machine, choose(machine, device=target, backend=backend, purpose="export")
    except SelectionError as error:
        device = hardware.find(machine.devices, target)
        if has_fix(answer for _, answer in machine.answers if answer.device_id == device.id):
            raise
        fix = "Choose another target. The backends of each target: transom export --target list"
        raise SelectionError(error.cause, fix, error.details) from None

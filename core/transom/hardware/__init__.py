"""The probe of the host: the hardware of this machine, and the catalogue of remote targets.

Backends judge these device records and never detect hardware themselves, so selection is a pure function of them. Each
hardware family has its own file. Each is cheap, imports what it needs only when there is a sign of the hardware, and
reports failures as notes instead of raising.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transom.contract import Device
from transom.errors import OptionError, nearest
from transom.hardware.catalogue import PREFIX, catalogue
from transom.hardware.groups import SEPARATOR, grouped
from transom.hardware.probe_file import from_json, read_probe_file, to_json, write_probe_file

__all__ = [
    "ProbeResult",
    "catalogue",
    "find",
    "from_json",
    "probe",
    "probe_devices",
    "read_probe_file",
    "to_json",
    "with_target",
    "write_probe_file",
]

_LOCAL_NAME = re.compile(r"(cpu|cuda|gpu|npu)(:\d+)?")


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found."""

    devices: tuple[Device, ...]
    """The CPU first, then NVIDIA GPUs, other GPUs, NPUs."""
    notes: tuple[str, ...] = ()
    """Problems and their fixes: a driver that does not answer, a device without permission."""
    source: str = "this machine"
    """`"this machine"` or the path of the probe file."""


def probe(probe_file: Path | None = None) -> ProbeResult:
    """Probe this machine, or read a probe file.

    Args:
        probe_file: a JSON file written by `transom doctor --json`; None: `TRANSOM_PROBE_FILE`, else this machine.

    Raises:
        OptionError: the file cannot be read; the message names the file and the key.
    """
    chosen = probe_file or os.environ.get("TRANSOM_PROBE_FILE", "").strip()
    if chosen:
        return ProbeResult(read_probe_file(Path(chosen)), source=str(chosen))

    from transom.hardware import cpu, intel, nvidia

    host = cpu.probe_cpu()
    gpus, gpu_notes = nvidia.probe_nvidia(host)
    others, other_notes = intel.probe_intel(host)
    return ProbeResult((host, *gpus, *others), (*gpu_notes, *other_notes))


def probe_devices(probe_file: Path | None = None) -> tuple[Device, ...]:
    """The devices alone; see `probe`."""
    return probe(probe_file).devices


def find(devices: Sequence[Device], name: str, notes: Sequence[str] = ()) -> Device:
    """The device with a name.

    Args:
        devices: what the probe found.
        name: an id (`"cuda:1"`), a kind for its first device (`"cuda"`), several ids for a group (`"cuda:0,cuda:1"`), a
            remote target (`"remote:v100"`), or a bare name from the catalogue (`"snapdragon-8-gen-2"`). Upper case and
            lower case are the same.
        notes: the probe's notes, shown when a device is missing.

    Raises:
        OptionError: there is no such device; the message names the nearest and lists all. Or the devices cannot form a
            group, see `grouped`.
    """
    if SEPARATOR in name:
        return grouped([find(devices, part, notes) for part in name.split(SEPARATOR) if part.strip()])
    wanted = name.strip().lower()
    targets = catalogue()
    for device in (*devices, *targets):
        if device.id.lower() in (wanted, PREFIX + wanted):
            return device
    for device in devices:
        if device.kind == wanted:
            return device
    ids = [device.id for device in devices]
    if _LOCAL_NAME.fullmatch(wanted):
        raise OptionError(
            f'This machine has no device "{name}"', f"It has: {', '.join(ids) or 'none'}", [f"note: {n}" for n in notes]
        )
    known = [*ids, *dict.fromkeys(d.kind for d in devices), *(target.id.removeprefix(PREFIX) for target in targets)]
    raise OptionError(f'Unknown device "{name}"', nearest(wanted.removeprefix(PREFIX), dict.fromkeys(known)))


def with_target(devices: Sequence[Device], name: str, notes: Sequence[str] = ()) -> tuple[Device, ...]:
    """The devices to ask the backends about when the user named one.

    A named remote target or group is added to the result of the probe. The rest of the catalogue is left out, so that
    backends are not asked about thirty phones and cards.

    Raises:
        OptionError: as `find`; never for `"auto"` or an empty name.
    """
    if name.strip().lower() in ("", "auto"):
        return tuple(devices)
    device = find(devices, name, notes)
    return tuple(devices) if any(device is d for d in devices) else (*devices, device)

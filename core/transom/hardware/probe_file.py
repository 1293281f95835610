"""Devices as JSON: what `transom doctor --json` writes and `--probe-file` reads, for support cases and tests.

A file may hold more than the devices; only the key `devices` is read. Reading is strict inside a device: a key that is
unknown or of the wrong type is an error that names it, since a typo there would silently change what is selected.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from transom.contract import Device
from transom.errors import OptionError, nearest

_KINDS: tuple[str, ...] = get_args(get_type_hints(Device)["kind"])
_FIELDS = {field.name: field for field in fields(Device)}


def to_json(devices: Sequence[Device]) -> dict[str, object]:
    """A JSON document that `from_json` reads back to equal devices."""

    def plain(value: object) -> object:
        if isinstance(value, frozenset):
            return sorted(value)
        if isinstance(value, Mapping):
            return dict(value)
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return record(value) if isinstance(value, Device) else value

    def record(device: Device) -> dict[str, object]:
        names = [name for name in _FIELDS if name != "members" or device.members]
        return {name: plain(getattr(device, name)) for name in names}

    return {"devices": [record(device) for device in devices]}


def from_json(document: object, where: str = "the probe file") -> tuple[Device, ...]:
    """The devices in a document.

    Args:
        document: what `json.load` returned.
        where: named in errors.

    Raises:
        OptionError: names the key that is missing, unknown or of the wrong type.
    """
    if not isinstance(document, dict) or not isinstance(document.get("devices"), list):
        raise OptionError(
            f'{where} has no list under the key "devices"', "Write one with: transom doctor --json > probe.json"
        )
    devices = tuple(_device(item, f"{where}: devices[{index}]") for index, item in enumerate(document["devices"]))
    seen: set[str] = set()
    for index, device in enumerate(devices):
        if device.id in seen:
            raise OptionError(f'{where}: devices[{index}].id is "{device.id}" a second time', "Give each device one id")
        seen.add(device.id)
    return devices


def read_probe_file(path: Path) -> tuple[Device, ...]:
    """The devices in a JSON file.

    Raises:
        OptionError: the file cannot be read, is not valid for `from_json`, or has no device.
    """
    fix = "Write one with: transom doctor --json > probe.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"The probe file {path} cannot be read: {error.strerror or error}", fix) from error
    except UnicodeDecodeError as error:
        raise OptionError(f"The probe file {path} is not UTF-8 text", fix) from error
    except (json.JSONDecodeError, RecursionError) as error:
        place = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise OptionError(f"The probe file {path} is not JSON{place}", fix) from error
    devices = from_json(document, f"The probe file {path}")
    if not devices:
        raise OptionError(f"The probe file {path} has no device", fix)
    return devices


def write_probe_file(path: Path, devices: Sequence[Device]) -> None:
    """Write devices so that `read_probe_file` reads them back equal. Raises OSError."""
    path.write_text(json.dumps(to_json(devices), indent=2) + "\n", encoding="utf-8")


def _device(item: object, where: str) -> Device:
    if not isinstance(item, dict):
        raise OptionError(f"{where} is a {_type(item)}, not an object with a device's keys")
    values: dict[str, Any] = {}
    for key, value in item.items():
        if key not in _FIELDS:
            raise OptionError(f'{where} has the unknown key "{key}"', nearest(key, _FIELDS))
        values[key] = _value(key, value, f"{where}.{key}")
    for name, field in _FIELDS.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise OptionError(f"{where}.{name} is missing", "Every device has kind, id, arch and memory_bytes")
    device = Device(**values)
    if device.kind not in _KINDS:
        raise OptionError(f'{where}.kind is "{device.kind}"', nearest(device.kind, _KINDS))
    if device.id != device.kind and not device.id.startswith(device.kind + ":"):
        raise OptionError(f'{where}.id is "{device.id}"', f'An id starts with the kind, as "{device.kind}:0" does')
    return device


def _value(key: str, value: object, where: str) -> object:
    """The value in the type of the field. Raises OptionError if it has the wrong JSON type."""

    def wrong(wanted: str) -> OptionError:
        return OptionError(f"{where} is {json.dumps(value)[:60]}", f"It must be {wanted}")

    if key in ("kind", "id", "arch", "identity", "name"):
        if not isinstance(value, str) or (key in ("id", "arch") and not value):
            raise wrong("a text")
        return value
    if key in ("memory_bytes", "free_bytes", "cores"):
        if value is None and key == "free_bytes":
            return None
        if type(value) is not int or not 0 <= value < 1 << 63:
            raise wrong("a whole number, 0 or more, that fits into 64 bits")
        return value
    if key == "integrated":
        if not isinstance(value, bool):
            raise wrong("true or false")
        return value
    if key == "members":
        if not isinstance(value, list):
            raise wrong("a list of devices")
        return tuple(_device(entry, f"{where}[{index}]") for index, entry in enumerate(value))
    if key in ("features", "peers"):
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise wrong("a list of texts")
        return frozenset(value)
    if key == "drivers":
        if not isinstance(value, dict) or not all(isinstance(entry, str) for entry in value.values()):
            raise wrong("an object with texts")
        return value
    if key == "caches":
        if not isinstance(value, dict) or not all(type(entry) is int and entry >= 0 for entry in value.values()):
            raise wrong("an object with whole numbers")
        return value
    if not isinstance(value, list) or not all(
        isinstance(node, list) and all(type(cpu) is int and cpu >= 0 for cpu in node) for node in value
    ):
        raise wrong("a list of lists of whole numbers")
    return tuple(tuple(node) for node in value)


def _type(value: object) -> str:
    return {list: "list", str: "text", type(None): "null"}.get(type(value), type(value).__name__)

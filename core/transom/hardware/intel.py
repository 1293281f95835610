"""Intel GPUs and NPUs, queried from OpenVINO if the kernel lists one.

The query costs an import and the start of a driver, so it runs in a child process. An answer that covers all hardware
listed by the kernel is stored in the cache directory until OpenVINO, the kernel or the hardware changes.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

from transom.contract import Device
from transom.typed import WrongType, from_json


class Answer(TypedDict):
    """What OpenVINO says of a device, see `openvino_query.py`."""

    id: str
    name: str
    type: str
    architecture: str
    memory: int
    capabilities: list[str]
    driver: NotRequired[str]
    uuid: NotRequired[str]


class _Kept(TypedDict):
    key: list[str]
    answer: list[Answer]


Query = Callable[[], list[Answer]]
_TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True)
class KernelDevice:
    """A GPU or NPU that the kernel lists."""

    kind: str
    """`"gpu"` or `"npu"`."""
    key: str
    """PCI device id."""
    node: str
    """The device file that a program must be able to open."""


def kernel_devices(root: Path = Path("/")) -> list[KernelDevice]:
    """Intel GPUs and NPUs that the kernel lists; a few file reads. Empty on systems other than Linux."""
    found: list[KernelDevice] = []
    for kind, pattern, folder in (
        ("gpu", "sys/class/drm/renderD*", "dev/dri"),
        ("npu", "sys/class/accel/accel*", "dev/accel"),
    ):
        for entry in sorted(root.glob(pattern)):
            with suppress(OSError):
                if (entry / "device/vendor").read_text().strip() == "0x8086":
                    key = (entry / "device/device").read_text().strip()
                    found.append(KernelDevice(kind, key, str(root / folder / entry.name)))
    return found


def probe_intel(
    host: Device,
    *,
    root: Path = Path("/"),
    query: Query | None = None,
    version: str | None = None,
    may_open: Callable[[str], bool] | None = None,
) -> tuple[list[Device], list[str]]:
    """The GPUs and NPUs, and notes about problems. Never raises; starts no process if the kernel lists none.

    Args:
        host: the CPU, whose memory an integrated device shares.
        root, query, version, may_open: for tests; file system, query, version of OpenVINO, permission check.
    """
    shown = kernel_devices(root)
    if not shown and not _windows_with_intel():
        return [], []
    notes = [
        f"This user may not open {hint.node} (Intel {hint.kind.upper()}): "
        "sudo usermod -aG render $USER, then log in again"
        for hint in shown
        if not (may_open or _may_open)(hint.node)
    ]
    version = version or _openvino_version()
    if not version:
        kinds = " and ".join(dict.fromkeys(hint.kind.upper() for hint in shown)) or "GPU or NPU"
        return [], [*notes, f"An Intel {kinds} may be here; to use it: pip install 'transom[openvino]'"]
    try:
        described = query() if query else _remembered(shown, version)
    except (OSError, ValueError) as error:
        return [], [*notes, f"OpenVINO could not be asked for Intel devices: {error}"]
    counts: dict[str, int] = {}
    devices = [_device(item, host, version, counts) for item in described]
    for kind in dict.fromkeys(hint.kind for hint in shown):
        if counts.get(kind, 0) == 0:
            package = "intel-opencl-icd" if kind == "gpu" else "intel-driver-compiler-npu"
            notes.append(
                f"The kernel shows an Intel {kind.upper()} that OpenVINO does not see; its user-space driver is likely "
                f"missing (on Debian and Ubuntu the package {package})"
            )
    return devices, notes


def _device(item: Answer, host: Device, version: str, counts: dict[str, int]) -> Device:
    kind = "npu" if str(item["id"]).startswith("NPU") else "gpu"
    number = counts.get(kind, 0)
    counts[kind] = number + 1
    integrated = kind == "npu" or "DISCRETE" not in str(item["type"]).upper()
    architecture = re.sub(r".*arch=", "", str(item["architecture"])).strip() or "unknown"
    drivers = {"openvino": version, "openvino_device": str(item["id"])}
    if item.get("driver"):
        drivers["driver"] = str(item["driver"])
    name = str(item["name"]) or f"Intel {kind.upper()}"
    return Device(
        kind="npu" if kind == "npu" else "gpu",
        id=f"{kind}:{number}",
        arch=f"intel_{kind}_{architecture}",
        memory_bytes=int(item["memory"]) or (host.memory_bytes if integrated else 0),
        free_bytes=host.free_bytes if integrated else None,
        integrated=integrated,
        identity=" ".join(part for part in (str(item.get("uuid", "")), name) if part),
        name=name,
        features=frozenset(str(capability).lower() for capability in item["capabilities"]),
        drivers=drivers,
    )


def _may_open(node: str) -> bool:
    return os.access(node, os.R_OK | os.W_OK)


def _windows_with_intel() -> bool:
    return sys.platform == "win32" and "GenuineIntel" in os.environ.get("PROCESSOR_IDENTIFIER", "")


def _openvino_version() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("openvino")
    except importlib.metadata.PackageNotFoundError:
        return ""


def query_openvino() -> list[Answer]:
    """Run the query in a child process.

    Raises:
        OSError: no process could be started.
        ValueError: it died, hung or printed something else.
    """
    import subprocess

    command = [sys.executable, "-P", str(Path(__file__).with_name("openvino_query.py"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"the process that asked did not answer within {_TIMEOUT_SECONDS:g} s") from error
    if child.returncode != 0:
        last = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
        raise ValueError(f"the process that asked died: {last}")
    try:
        return from_json(list[Answer], child.stdout)
    except WrongType:
        raise ValueError("the process that asked printed something else") from None


def _remembered(shown: Sequence[KernelDevice], version: str) -> list[Answer]:
    """The answer of an earlier process, else a new one, which is stored if it covers every kind that was listed."""
    release = os.uname().release if hasattr(os, "uname") else sys.platform
    key = [version, release, sys.prefix, *(f"{hint.kind} {hint.key} {hint.node}" for hint in shown)]
    path = _cache_file()
    with suppress(OSError, WrongType):
        kept = from_json(_Kept, path.read_bytes())
        if kept["key"] == key:
            return kept["answer"]
    answer = query_openvino()
    seen = {str(item["id"]).split(".")[0].lower() for item in answer}
    if shown and {hint.kind for hint in shown} <= seen:
        with suppress(OSError):  # a read-only cache only costs the next process its time
            _write(path, {"key": key, "answer": answer})
    return answer


def _cache_file() -> Path:
    """The file in the cache's folder `remembered`, which `transom cache clear` empties."""
    root = os.environ.get("TRANSOM_CACHE", "").strip()
    if not root:
        import platformdirs

        root = str(platformdirs.user_cache_path("transom", appauthor=False))
    return Path(root) / "remembered" / "intel-devices.json"


def _write(path: Path, document: object) -> None:
    import tempfile

    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(document, file)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise

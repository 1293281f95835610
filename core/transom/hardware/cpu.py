"""The CPU: its features that the operating system has enabled, and the share of it that this process may use.

On Linux everything is read from `/proc` and `/sys`; `archspec` names and describes CPUs elsewhere. A feature counts
only when the operating system saves its registers: a kernel lists `amx_tile` or `avx512f` from CPUID even where
programs die of it, so the mask of enabled register state (XCR0, asked through `arch_prctl`) has the last word.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transom.contract import Device
from transom.hardware.cgroup import cgroup_limits, text_of

_X86_RELEVANT = re.compile(
    r"(sse|ssse|avx|amx)\w*|fma|f16c|bmi[12]|movbe|popcnt|lzcnt|gfni|aes|vaes|pclmulqdq|vpclmulqdq"
)
_X86_ALIASES = {"pni": "sse3", "abm": "lzcnt"}
_X86_LEVELS = (
    ("x86-64-v2", {"cx16", "lahf_lm", "popcnt", "sse3", "sse4_1", "sse4_2", "ssse3"}),
    ("x86-64-v3", {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave"}),
    ("x86-64-v4", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
)
"""The levels of the x86-64 psABI; each includes the one before."""

_YMM = 1 << 2
_ZMM = 1 << 5 | 1 << 6 | 1 << 7
_TILES = 1 << 17 | 1 << 18
_STATE = (
    (re.compile(r"amx_\w+"), _TILES),
    (re.compile(r"avx512\w*|avx10\w*"), _ZMM),
    (re.compile(r"avx\w*|fma|f16c|vaes|vpclmulqdq"), _YMM),
)
"""The register state that a flag needs; the first matching pattern counts."""


@dataclass(frozen=True)
class Host:
    """The facts about the running system that the probe uses; tests pass their own."""

    root: Path
    platform: str
    """As `sys.platform`."""
    machine: str
    """As `uname -m`."""
    affinity: frozenset[int]
    """Logical CPUs this process may run on."""
    state: int | None
    """Register state enabled by the operating system, as the bits of XCR0; None: unknown."""
    permitted: int = 0
    """Register state this process may use immediately; AMX must first be requested by `arch_prctl`."""


def this_host() -> Host:
    """The running system."""
    if hasattr(os, "sched_getaffinity"):
        affinity = frozenset(os.sched_getaffinity(0))
    else:
        affinity = frozenset(range(os.cpu_count() or 1))
    if hasattr(os, "uname"):
        machine = os.uname().machine
    else:
        machine = os.environ.get("PROCESSOR_ARCHITECTURE", "")
    machine = {"AMD64": "x86_64", "amd64": "x86_64", "ARM64": "aarch64", "arm64": "aarch64"}.get(machine, machine)
    state, permitted = _register_state(machine)
    return Host(Path("/"), sys.platform, machine, affinity, state, permitted)


def _register_state(machine: str) -> tuple[int | None, int]:
    """(enabled, permitted) register state of an x86-64 process; (None, 0) if unknown."""
    if machine != "x86_64" or sys.platform not in ("linux", "win32"):
        return None, 0
    import ctypes

    if sys.platform == "win32":
        mask = ctypes.WinDLL("kernel32").GetEnabledXStateFeatures
        mask.restype = ctypes.c_uint64
        enabled = int(mask())
        return enabled, enabled

    def ask(code: int) -> int | None:
        mask = ctypes.c_uint64(0)
        try:
            failed = ctypes.CDLL(None).syscall(158, code, ctypes.byref(mask))  # arch_prctl
        except (OSError, AttributeError):
            return None
        return None if failed else mask.value

    supported, permitted = ask(0x1021), ask(0x1022)  # ARCH_GET_XCOMP_SUPP, ARCH_GET_XCOMP_PERM; Linux 5.16
    return supported, permitted or 0


def probe_cpu(host: Host | None = None) -> Device:
    """The CPU of this machine. Never raises; values that cannot be read are empty or 0."""
    host = host or this_host()
    info = _cpuinfo(host.root) if host.platform == "linux" else {}
    flags, name = _flags_and_name(host, info)
    total, free = _memory(host)
    limits = cgroup_limits(host.root) if host.platform == "linux" else None
    if limits and limits.memory_bytes is not None:
        total = min(total, limits.memory_bytes) if total else limits.memory_bytes
    if limits and limits.memory_free_bytes is not None:
        free = limits.memory_free_bytes if free is None else min(free, limits.memory_free_bytes)
    cores = _physical_cores(host)
    if limits and limits.cpus is not None:
        # Rounded down: a thread more than the quota is a thread that sleeps while the others wait for it.
        cores = max(1, min(cores, int(limits.cpus)))
    return Device(
        kind="cpu",
        id="cpu",
        arch=host.machine,
        memory_bytes=total,
        free_bytes=free,
        identity=_identity(host, info, name),
        name=name,
        features=enabled_features(flags, host.machine, host.state, host.permitted),
        cores=cores,
        caches=_caches(host),
        numa=_numa(host),
    )


def enabled_features(flags: frozenset[str], machine: str, state: int | None, permitted: int = 0) -> frozenset[str]:
    """The features that matter for computing, out of a CPU's flags and the register state that is enabled.

    Args:
        flags: names as Linux writes them.
        machine: `"x86_64"`, or any other, whose flags are taken as they are.
        state: bits of XCR0; None: trust the flags, except AMX, which no kernel without an answer supports.
        permitted: the same bits, for what this process may use without asking first.

    Returns:
        The relevant flags, the levels `x86-64-v2` to `-v4` that are complete, and `amx_permitted`.
    """
    if machine != "x86_64":
        return flags
    flags = frozenset(_X86_ALIASES.get(flag, flag) for flag in flags)

    def enabled(flag: str) -> bool:
        for pattern, needed in _STATE:
            if pattern.fullmatch(flag):
                return needed != _TILES if state is None else state & needed == needed
        return True

    usable = {flag for flag in flags if enabled(flag)}
    levels: set[str] = set()
    for level, needed in _X86_LEVELS:
        if not needed <= usable:
            break
        levels.add(level)
    extra = {"amx_permitted"} if "amx_tile" in usable and permitted & _TILES == _TILES else set()
    return frozenset({flag for flag in usable if _X86_RELEVANT.fullmatch(flag)} | levels | extra)


def _cpuinfo(root: Path) -> dict[str, str]:
    """The first processor's block of `/proc/cpuinfo`. Not the whole file: it is slow on a machine with 256 of them."""
    block: dict[str, str] = {}
    try:
        with open(root / "proc/cpuinfo", encoding="utf-8", errors="replace", buffering=4096) as lines:
            for line in lines:
                key, colon, value = line.partition(":")
                if not colon and block:
                    break
                block.setdefault(key.strip(), value.strip())
    except OSError:
        return {}
    return block


def _flags_and_name(host: Host, info: Mapping[str, str]) -> tuple[frozenset[str], str]:
    flags = frozenset((info.get("flags") or info.get("Features") or "").split())
    name = info.get("model name", "")
    if host.root == Path("/") and not (flags and name):
        import archspec.cpu

        described = archspec.cpu.host()
        flags = flags or frozenset(described.features)
        name = name or archspec.cpu.brand_string() or f"{described.vendor} {described.name}"
    return flags, name or host.machine


def _identity(host: Host, info: Mapping[str, str], name: str) -> str:
    keys = (
        "vendor_id",
        "cpu family",
        "model",
        "stepping",
        "CPU implementer",
        "CPU variant",
        "CPU part",
        "CPU revision",
    )
    return " ".join([host.machine, *(info[key] for key in keys if key in info), name])


def _memory(host: Host) -> tuple[int, int | None]:
    """(total, available) bytes of the machine."""
    if host.platform == "linux":
        found = re.findall(r"^(MemTotal|MemAvailable):\s*(\d+) kB", text_of(host.root / "proc/meminfo"), re.MULTILINE)
        sizes = {key: int(kib) * 1024 for key, kib in found}
        return sizes.get("MemTotal", 0), sizes.get("MemAvailable")
    if sys.platform == "win32":
        return _windows_memory()
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
    except (ValueError, OSError):
        return 0, None


def _windows_memory() -> tuple[int, int | None]:
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in ("total", "available", "a", "b", "c", "d", "e")),
        )

    status = Status(length=ctypes.sizeof(Status))
    windll = getattr(ctypes, "windll", None)
    if windll is None or not windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return 0, None
    return int(status.total), int(status.available)


def _physical_cores(host: Host) -> int:
    """Cores, not hardware threads, that the affinity mask reaches."""
    folder = host.root / "sys/devices/system/cpu"
    if host.platform != "linux" or text_of(folder / "smt/active").strip() == "0":
        return len(host.affinity)
    left = set(host.affinity)
    cores = 0
    while left:
        cpu = min(left)
        siblings = cpu_list(text_of(folder / f"cpu{cpu}/topology/thread_siblings_list"))
        left -= siblings | {cpu}
        cores += 1
    return cores


def _caches(host: Host) -> dict[str, int]:
    if host.platform != "linux" or not host.affinity:
        return {}
    caches: dict[str, int] = {}
    suffix = {"Data": "d", "Instruction": "i", "Unified": ""}
    for folder in sorted((host.root / f"sys/devices/system/cpu/cpu{min(host.affinity)}/cache").glob("index*")):
        level, kind = text_of(folder / "level").strip(), text_of(folder / "type").strip()
        size = re.fullmatch(r"(\d+)([KM]?)", text_of(folder / "size").strip())
        if level.isdigit() and kind in suffix and size:
            caches[f"l{level}{suffix[kind]}"] = int(size[1]) * {"": 1, "K": 1024, "M": 1 << 20}[size[2]]
    return caches


def _numa(host: Host) -> tuple[tuple[int, ...], ...]:
    if host.platform != "linux":
        return ()
    folders = (host.root / "sys/devices/system/node").glob("node[0-9]*")
    nodes = [
        tuple(sorted(cpu_list(text_of(folder / "cpulist")) & host.affinity))
        for folder in sorted(folders, key=lambda folder: int(folder.name.removeprefix("node")))
    ]
    return tuple(node for node in nodes if node)


def cpu_list(text: str) -> set[int]:
    """The numbers in a list as the kernel writes it: `0-3,8,10-11`."""
    numbers: set[int] = set()
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers

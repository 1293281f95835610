"""The CPU and memory limits of this process from Linux control groups, versions 1 and 2, including all ancestors.

Only reads files. `root` is the mount point of the file system, so that tests can pass their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 1 << 60
"""Version 1 writes a huge number where there is no limit."""


@dataclass(frozen=True)
class CgroupLimits:
    """Limits of control groups; None: no limit."""

    cpus: float | None = None
    """CPU time per time: 1.5 is three CPUs for half of the time."""
    memory_bytes: int | None = None
    memory_free_bytes: int | None = None
    """Free memory below the tightest limit; page cache that can be dropped counts as free."""


def cgroup_limits(root: Path = Path("/")) -> CgroupLimits:
    """The limits of the calling process's control groups. Unreadable files count as no limit."""
    cpus = [quota for folder in _folders(root, "cpu") if (quota := _quota(folder)) is not None]
    sizes: list[int] = []
    rooms: list[int] = []
    for folder in _folders(root, "memory"):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        if limit is None or limit >= _UNLIMITED:
            continue
        used = _number(folder / "memory.current")
        if used is None:
            used = _number(folder / "memory.usage_in_bytes") or 0
        sizes.append(limit)
        rooms.append(max(0, limit - max(0, used - _droppable(folder))))
    return CgroupLimits(min(cpus, default=None), min(sizes, default=None), min(rooms, default=None))


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's group for a controller, from the group itself up to the mount."""
    own: dict[str, str] = {}
    for line in text_of(root / "proc/self/cgroup").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        for name in controllers.split(",") if controllers else ["unified"] if number == "0" else []:
            own[name] = path
    # A controller that version 1 has bound is not in the unified hierarchy.
    hierarchy = controller if controller in own else "unified"
    if hierarchy not in own:
        return
    for line in text_of(root / "proc/self/mountinfo").splitlines():
        fields = line.split()
        if "-" not in fields or len(fields) < fields.index("-") + 4:
            continue
        kind, options = fields[fields.index("-") + 1], fields[-1].split(",")
        if kind != ("cgroup2" if hierarchy == "unified" else "cgroup"):
            continue
        if kind == "cgroup" and controller not in options:
            continue
        mount_root, mount = (re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), f) for f in fields[3:5])
        folder = root / mount.lstrip("/")
        yield folder
        for part in _below(own[hierarchy], mount_root):
            folder = folder / part
            yield folder
        return


def _below(group: str, mount_root: str) -> list[str]:
    """The path of a group below its mount. A container may see the host's path, or one outside its namespace."""
    if ".." in group.split("/"):
        return []
    if mount_root != "/":
        if group != mount_root and not group.startswith(mount_root + "/"):
            return []
        group = group[len(mount_root) :]
    return [part for part in group.split("/") if part]


def _quota(folder: Path) -> float | None:
    quota, _, period = text_of(folder / "cpu.max").strip().partition(" ")
    if not quota:
        quota, period = text_of(folder / "cpu.cfs_quota_us").strip(), text_of(folder / "cpu.cfs_period_us").strip()
    if not quota.isdigit() or not (period or "100000").isdigit() or int(quota) == 0:
        return None  # "max", "-1", or nothing to read
    return int(quota) / max(1, int(period or "100000"))


def _droppable(folder: Path) -> int:
    """Bytes of inactive page cache, which the kernel drops before an allocation fails."""
    stat = dict(line.split(" ", 1) for line in text_of(folder / "memory.stat").splitlines() if " " in line)
    value = stat.get("total_inactive_file") or stat.get("inactive_file") or "0"
    return int(value) if value.strip().isdigit() else 0


def _number(path: Path) -> int | None:
    text = text_of(path).strip()
    return int(text) if text.isdigit() else None


def text_of(path: Path) -> str:
    """The text of a file of the system; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

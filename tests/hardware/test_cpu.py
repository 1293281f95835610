"""CPU features as the operating system enabled them, and what affinity and control groups leave.

Draws: no content of a file may be an error.
"""

from __future__ import annotations

import os
import platform
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from transom.hardware.cgroup import cgroup_limits
from transom.hardware.cpu import Host, cpu_list, enabled_features, probe_cpu

YMM, ZMM, TILES = 1 << 2, 0b111 << 5, 0b11 << 17
EVERYTHING = 0b11 | YMM | ZMM | TILES
FLAGS = (
    "cx16 lahf_lm popcnt pni sse sse2 sse4_1 sse4_2 ssse3 avx avx2 bmi1 bmi2 f16c fma abm movbe xsave avx_vnni "
    "avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_int8 amx_bf16 "
    "vaes vme de pse tsc"
)
SAPPHIRE_RAPIDS = frozenset(FLAGS.split())


def test_what_matters_is_kept_under_its_linux_name_and_the_rest_left_out() -> None:
    features = enabled_features(SAPPHIRE_RAPIDS, "x86_64", EVERYTHING)
    assert {"avx2", "avx512_vnni", "amx_tile", "amx_int8", "amx_bf16", "sse3", "lzcnt", "fma"} <= features
    assert {"x86-64-v2", "x86-64-v3", "x86-64-v4"} <= features
    assert not {"vme", "tsc", "pni", "abm", "xsave"} & features


@pytest.mark.parametrize(
    ("state", "gone", "left"),
    [
        (0b11 | YMM | ZMM, {"amx_tile", "amx_int8", "amx_bf16"}, {"avx512f", "x86-64-v4"}),
        (0b11 | YMM, {"amx_tile", "avx512f", "avx512_vnni", "x86-64-v4"}, {"avx2", "avx_vnni", "x86-64-v3"}),
        (0b11 | YMM | 1 << 5, {"avx512f"}, {"avx2"}),
        (0b11 | YMM | ZMM | 1 << 17, {"amx_tile"}, {"avx512f"}),
        (0b11, {"avx", "avx2", "fma", "f16c", "avx512f", "amx_tile", "vaes", "x86-64-v3"}, {"sse4_2", "x86-64-v2"}),
        (None, {"amx_tile", "amx_int8"}, {"avx512f", "avx2"}),
    ],
)
def test_a_flag_without_its_register_state_is_no_feature(state: int | None, gone: set[str], left: set[str]) -> None:
    features = enabled_features(SAPPHIRE_RAPIDS, "x86_64", state)
    assert not gone & features
    assert left <= features


def test_amx_says_whether_this_process_may_use_it_at_once() -> None:
    assert "amx_permitted" not in enabled_features(SAPPHIRE_RAPIDS, "x86_64", EVERYTHING, permitted=EVERYTHING & ~TILES)
    assert "amx_permitted" in enabled_features(SAPPHIRE_RAPIDS, "x86_64", EVERYTHING, permitted=EVERYTHING)
    assert "amx_permitted" not in enabled_features(SAPPHIRE_RAPIDS, "x86_64", 0b11 | YMM, permitted=EVERYTHING)


def test_a_level_is_not_reached_when_a_flag_of_it_or_of_a_lower_level_is_missing() -> None:
    assert "x86-64-v3" not in enabled_features(SAPPHIRE_RAPIDS - {"movbe"}, "x86_64", EVERYTHING)
    assert "x86-64-v4" not in enabled_features(SAPPHIRE_RAPIDS - {"movbe"}, "x86_64", EVERYTHING)
    assert "x86-64-v2" in enabled_features(SAPPHIRE_RAPIDS - {"movbe"}, "x86_64", EVERYTHING)


XEON = {
    "proc/cpuinfo": "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\n"
    "model name\t: Intel(R) Xeon(R) Platinum 8480+\nstepping\t: 8\nflags\t\t: "
    + " ".join(sorted(SAPPHIRE_RAPIDS))
    + "\n\nprocessor\t: 1\nmodel name\t: another\nflags\t\t: none\n",
    "proc/meminfo": "MemTotal:       33554432 kB\nMemFree:         1048576 kB\nMemAvailable:   16777216 kB\n",
    "sys/devices/system/cpu/smt/active": "1\n",
    **{
        f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{cpu % 4},{cpu % 4 + 4}\n"
        for cpu in range(8)
    },
    **{
        f"sys/devices/system/cpu/cpu0/cache/index{index}/{key}": value + "\n"
        for index, entry in enumerate(
            [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2048K"), ("3", "Unified", "105M")]
        )
        for key, value in zip(("level", "type", "size"), entry, strict=True)
    },
    "sys/devices/system/node/node0/cpulist": "0-1,4-5\n",
    "sys/devices/system/node/node1/cpulist": "2-3,6-7\n",
    "sys/devices/system/node/node10/cpulist": "\n",
}


def xeon(root: Path, cpus: set[int] | None = None) -> Host:
    return Host(root, "linux", "x86_64", frozenset(cpus or range(8)), EVERYTHING)


def test_a_xeon_is_described_from_proc_and_sys(machine: Any) -> None:
    cpu = probe_cpu(xeon(machine(XEON)))
    assert (cpu.kind, cpu.id, cpu.arch, cpu.integrated) == ("cpu", "cpu", "x86_64", False)
    assert cpu.name == "Intel(R) Xeon(R) Platinum 8480+"
    assert cpu.identity == "x86_64 GenuineIntel 6 143 8 Intel(R) Xeon(R) Platinum 8480+"
    assert (cpu.memory_bytes, cpu.free_bytes) == (32 << 30, 16 << 30)
    assert cpu.cores == 4, "four cores of two threads each"
    assert cpu.caches == {"l1d": 48 << 10, "l1i": 32 << 10, "l2": 2 << 20, "l3": 105 << 20}
    assert cpu.numa == ((0, 1, 4, 5), (2, 3, 6, 7))
    assert "amx_int8" in cpu.features


def test_affinity_limits_cores_and_numa_nodes(machine: Any) -> None:
    root = machine(XEON)
    assert probe_cpu(xeon(root, {0, 4})).cores == 1, "two threads of one core"
    cpu = probe_cpu(xeon(root, {2, 3}))
    assert (cpu.cores, cpu.numa) == (2, ((2, 3),))


def test_without_hyperthreading_every_logical_cpu_is_a_core(machine: Any) -> None:
    assert probe_cpu(xeon(machine({**XEON, "sys/devices/system/cpu/smt/active": "0\n"}))).cores == 8


V2 = {
    "proc/self/cgroup": "0::/pods/mine\n",
    "proc/self/mountinfo": "25 20 0:23 / /proc rw - proc proc rw\n"
    "31 23 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
}


def test_a_version_2_quota_rounds_down_but_never_to_nothing(machine: Any) -> None:
    for quota, cores in (("350000 100000", 3), ("50000 100000", 1), ("max 100000", 4), ("1600000 100000", 4)):
        root = machine({**XEON, **V2, "sys/fs/cgroup/pods/mine/cpu.max": quota + "\n"})
        assert probe_cpu(xeon(root)).cores == cores, quota


def test_the_tightest_of_a_group_and_its_ancestors_counts(machine: Any) -> None:
    root = machine(
        {
            **XEON,
            **V2,
            "sys/fs/cgroup/pods/cpu.max": "200000 100000\n",
            "sys/fs/cgroup/pods/mine/cpu.max": "max 100000\n",
            "sys/fs/cgroup/pods/memory.max": f"{8 << 30}\n",
            "sys/fs/cgroup/pods/memory.current": f"{7 << 30}\n",
            "sys/fs/cgroup/pods/memory.stat": f"anon 5\ninactive_file {2 << 30}\n",
            "sys/fs/cgroup/pods/mine/memory.max": f"{10 << 30}\n",
            "sys/fs/cgroup/pods/mine/memory.current": f"{1 << 30}\n",
        }
    )
    cpu = probe_cpu(xeon(root))
    assert cpu.cores == 2
    assert cpu.memory_bytes == 8 << 30
    assert cpu.free_bytes == 3 << 30, "page cache that can be dropped counts as free"


def test_a_version_2_limit_above_the_machine_changes_nothing(machine: Any) -> None:
    root = machine({**XEON, **V2, "sys/fs/cgroup/pods/mine/memory.max": f"{1 << 40}\n"})
    cpu = probe_cpu(xeon(root))
    assert (cpu.memory_bytes, cpu.free_bytes) == (32 << 30, 16 << 30)


V1 = {
    "proc/self/cgroup": "4:memory:/docker/abc\n3:cpuset:/\n2:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n0::/\n",
    "proc/self/mountinfo": "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 /docker/abc /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 << 30}\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{1 << 30}\n",
    "sys/fs/cgroup/memory/memory.stat": f"inactive_file 7\ntotal_inactive_file {512 << 20}\n",
}


def test_version_1_groups_of_a_container_that_sees_the_hosts_path(machine: Any) -> None:
    limits = cgroup_limits(machine(V1))
    assert limits.cpus == 2.5
    assert limits.memory_bytes == 4 << 30
    assert limits.memory_free_bytes == (4 << 30) - (512 << 20)


def test_version_1_writes_no_limit_as_a_huge_number_and_minus_one(machine: Any) -> None:
    root = machine(
        {
            **V1,
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        }
    )
    limits = cgroup_limits(root)
    assert (limits.cpus, limits.memory_bytes, limits.memory_free_bytes) == (None, None, None)


def test_a_group_outside_of_its_namespace_uses_the_mount_itself(machine: Any) -> None:
    root = machine({**V2, "proc/self/cgroup": "0::/../other\n", "sys/fs/cgroup/memory.max": f"{2 << 30}\n"})
    assert cgroup_limits(root).memory_bytes == 2 << 30


def test_a_mount_point_with_a_space_is_found(machine: Any) -> None:
    mounts = "31 23 0:27 / /sys/fs/my\\040cgroup rw - cgroup2 cgroup2 rw\n"
    root = machine({**V2, "proc/self/mountinfo": mounts, "sys/fs/my cgroup/pods/mine/memory.max": f"{2 << 30}\n"})
    assert cgroup_limits(root).memory_bytes == 2 << 30


def test_nothing_to_read_is_a_device_with_blanks_and_no_error(tmp_path: Path) -> None:
    cpu = probe_cpu(xeon(tmp_path, {0, 1}))
    assert (cpu.id, cpu.memory_bytes, cpu.free_bytes, cpu.features, cpu.cores) == ("cpu", 0, None, frozenset(), 2)


def test_garbage_in_every_file_is_no_error(machine: Any, dice: random.Random) -> None:
    junk = {
        name: "".join(chr(dice.randrange(32, 1000)) for _ in range(dice.randrange(40))) + "\n"
        for name in (*XEON, *V1, *V2, "sys/fs/cgroup/cpu.max", "sys/fs/cgroup/memory.max")
    }
    cpu = probe_cpu(xeon(machine(junk)))
    assert cpu.id == "cpu"


def test_an_arm_cpu_keeps_its_flags(machine: Any) -> None:
    root = machine({"proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm bf16 sve\nCPU part\t: 0xd40\n"})
    cpu = probe_cpu(Host(root, "linux", "aarch64", frozenset({0}), None))
    assert {"asimddp", "i8mm", "bf16", "sve"} <= cpu.features
    assert cpu.identity.startswith("aarch64 0xd40")


def test_lists_of_cpus_as_the_kernel_writes_them() -> None:
    assert cpu_list("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert cpu_list("\n") == set()


def test_this_machine_is_described() -> None:
    cpu = probe_cpu()
    assert cpu.cores >= 1
    assert cpu.memory_bytes > 0
    assert cpu.name
    if sys.platform == "linux":
        assert cpu.cores <= len(os.sched_getaffinity(0))
        assert 0 < (cpu.free_bytes or 0) <= cpu.memory_bytes


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="only Linux lists them, and x86 by these names"
)
def test_this_machines_features_are_a_part_of_what_its_kernel_lists() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())
    ours = {f for f in probe_cpu().features if not f.startswith("x86-64") and f != "amx_permitted"}
    assert ours <= flags | {"sse3", "lzcnt"}
    assert ours

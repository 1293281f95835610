"""Whether a graph runs as a native program here, and where not, why."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from transom_openvino_cpu.native import library

if TYPE_CHECKING:
    from transom.contract import Device
    from transom.graph import Graph
    from transom.programs.reading import GraphReader
    from transom_openvino_cpu.precision import CpuPrecision

SWITCH = "TRANSOM_NATIVE"
"""Environment variable; `0`: leave the library alone, as if it had not been built. `measure`: see `measures`."""
UNMEASURED = frozenset({"amx"})
"""Instruction sets that none of the benchmarks' processors has. On all others the library is the faster one."""


def level_on(device: Device) -> str | None:
    """The instruction set of the library to use on the device; None where there is none."""
    if os.environ.get(SWITCH) == "0":
        return None
    return library.level_for(device)


def measures(device: Device) -> bool:
    """Whether a decoder is compiled natively and by OpenVINO, and the faster one is kept."""
    level = level_on(device)
    return level is not None and (level in UNMEASURED or os.environ.get(SWITCH) == "measure")


def drafted(graph: Graph, precision: CpuPrecision, device: Device) -> GraphReader | str:
    """The graph as a native program in the making, or the reason why it cannot be one."""
    if graph.decoder is None:
        return "the graph is no decoder"
    if level_on(device) is None:
        if os.environ.get(SWITCH) == "0":
            return f"{SWITCH}=0 is set"
        if not library.built_levels():
            return f"this installation has no native library{library.why_not_built()}"
        return "the native library has no code for this processor"
    if precision.hint == "f16":
        return "the native library computes in float32, bfloat16 and int8, not in float16"
    from transom.programs.reading import GraphReader, NoForm
    from transom_openvino_cpu.native.abilities import NativeKernels

    try:
        return GraphReader(graph, NativeKernels(precision))
    except NoForm as e:
        return f"{e.node.name}: {e.reason}"

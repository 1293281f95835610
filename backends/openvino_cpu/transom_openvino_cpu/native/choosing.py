"""Decides whether a graph runs as a native program here, and gives the reason if not."""

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
"""Environment variable. `0`: do not use the library, as if it had not been built. `measure`: see `measures`."""


def level_on(device: Device) -> str | None:
    """The instruction set of the library to use on the device; None without one."""
    if os.environ.get(SWITCH) == "0":
        return None
    return library.level_for(device)


def measures(device: Device) -> bool:
    """Whether a decoder is compiled both natively and by OpenVINO, to keep the faster one. Nobody has to ask for it on
    a processor that was benchmarked: there the library is faster."""
    return level_on(device) is not None and os.environ.get(SWITCH) == "measure"


def read_native(graph: Graph, precision: CpuPrecision, device: Device) -> GraphReader | str:
    """The graph read for the native library, or the reason why the library cannot run it."""
    if graph.decoder is None:
        return "the graph is not a decoder"
    if level_on(device) is None:
        if os.environ.get(SWITCH) == "0":
            return f"{SWITCH}=0 is set"
        if not library.built_levels():
            return f"this installation has no native library{library.why_not_built()}"
        return "the native library has no code for this processor"
    if precision.hint == "f16":
        return "the native library computes in float32, bfloat16 and int8, not in float16"
    from transom.programs.reading import GraphReader, UnsupportedNode
    from transom_openvino_cpu.native.abilities import NativeKernels

    try:
        return GraphReader(graph, NativeKernels(precision))
    except UnsupportedNode as e:
        return f"{e.node.name}: {e.reason}"

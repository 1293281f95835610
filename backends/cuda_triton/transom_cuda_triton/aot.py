"""Kernels compiled ahead of time: for any NVIDIA architecture, on a machine without one.

Needs the package triton alone. One process cannot both compile and interpret (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARED_LIMIT = {70: 96, 80: 163, 86: 99, 89: 99, 90: 227}
"""KiB of shared memory that one block may take, by architecture (CUDA C++ Programming Guide, compute capabilities)."""
STRIDES = ("_token", "_page", "_head")
REGISTERS = 65536
"""Of a multiprocessor, 32 bits each."""


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code for one architecture, and what it takes."""

    name: str
    arch: int
    cubin: bytes
    ptx: str
    shared: int
    """Bytes of shared memory."""
    warps: int
    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of a thread that went to local memory."""

    @property
    def blocks(self) -> int:
        """Blocks that one multiprocessor holds at once, by its registers and shared memory."""
        by_registers = REGISTERS // max(1, -(-self.registers // 8) * 8 * 32 * self.warps)
        return min(by_registers, SHARED_LIMIT[self.arch] * 1024 // max(1, self.shared), 64 // self.warps)

    def matrix_instructions(self) -> dict[str, int]:
        """How many instructions of the tensor cores the machine code has, by name. Not for sm_70, see `sass`."""
        return _counted(r"\b(HMMA|HGMMA|IMMA|IGMMA|QGMMA|QMMA)\b", self.sass())

    def sass(self) -> str:
        """The machine code, disassembled; the tool that comes with Triton 3.6 and later refuses sm_70."""
        return _tool("cuobjdump", "-sass", self.cubin)


def compile_kernel(
    kernel: Any, arch: int, signature: Mapping[str, str], constants: Mapping[str, Any], warps: int = 4, stages: int = 2
) -> Compiled:
    """One kernel for one architecture.

    Args:
        kernel: a function under `triton.jit`.
        arch: 80 for sm_80.
        signature: Triton's types by the names of the arguments that are no constants: `"*fp16"`, `"i32"`, `"fp32"`.
            Pointers and strides (names that end in one of `STRIDES`) are taken as multiples of 16.
        constants: values by the names of the others.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if types[name].startswith("*") or name.endswith(STRIDES)
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=dict(constants), attrs=attributes)
    made = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
    )
    cubin = made.asm["cubin"]
    usage = _counted_numbers(_tool("cuobjdump", "-res-usage", cubin))
    return Compiled(
        kernel.__name__, arch, cubin, made.asm["ptx"], made.metadata.shared, made.metadata.num_warps,
        usage.get("REG", 0), usage.get("STACK", 0) + usage.get("LOCAL", 0),
    )  # fmt: skip


def _tool(name: str, option: str, cubin: bytes) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, option, file.name], capture_output=True, text=True, check=True).stdout


def _counted(pattern: str, text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in re.findall(pattern, text):
        found[name] = found.get(name, 0) + 1
    return found


def _counted_numbers(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}

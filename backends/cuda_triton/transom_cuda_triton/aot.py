"""Kernels compiled ahead of time: for any NVIDIA architecture, on a machine without one.

Needs the package triton alone. One process cannot both compile and interpret (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transom_cuda_triton.variants import Code, KernelVariant

SHARED_LIMIT = {70: 96, 80: 163, 86: 99, 89: 99, 90: 227}
"""KiB of shared memory that one block may take, by architecture (CUDA C++ Programming Guide, compute capabilities)."""
SHARED_TOTAL = {70: 96, 80: 164, 86: 100, 89: 100, 90: 228}
"""KiB of shared memory of a multiprocessor. From sm_80 on each block takes 1 KiB more than it asks for."""
MOST_WARPS = {70: 64, 80: 64, 86: 48, 89: 48, 90: 64}
"""That a multiprocessor holds at once."""
MOST_BLOCKS = {70: 32, 80: 32, 86: 16, 89: 24, 90: 32}
"""That a multiprocessor holds at once."""
REGISTERS = 65536
"""Of a multiprocessor, 32 bits each."""
STRIDES = ("_token", "_page", "_head")


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel's machine code for one architecture, what it takes, and what a launch through CUDA's driver needs.

    A launch has blocks of 32 * `warps` threads in one dimension and `shared` bytes of dynamic shared memory, which must
    first be asked for where they are more than 48 KiB (`CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`). It passes
    `arguments` in their order, then `hidden` null pointers. Nothing else has to be honoured: kernels that would need
    scratch memory, clusters of blocks, a cooperative launch, a dependent launch or descriptors of tensors are refused
    when they are compiled.
    """

    name: str
    arch: int
    cubin: bytes
    ptx: str
    entry: str
    """The function's name in the machine code."""
    arguments: tuple[str, ...]
    """Names of the arguments that are no constants, as a launch passes them."""
    aligned: tuple[str, ...]
    """Those that must be multiples of 16: addresses in bytes, strides in elements."""
    parameters: tuple[str, ...]
    """What the machine code takes: "u64", "u32", "f32" and so on, first one for each of `arguments`."""
    shared: int
    """Bytes of shared memory of a block."""
    warps: int
    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of a thread that went to local memory."""

    @property
    def hidden(self) -> int:
        """Pointers that Triton adds behind the arguments, for scratch memory and profiles; nothing here uses them."""
        return len(self.parameters) - len(self.arguments)

    @property
    def blocks(self) -> int:
        """Blocks that one multiprocessor holds at once."""
        by_registers = REGISTERS // max(1, -(-self.registers // 8) * 8 * 32 * self.warps)
        own = self.shared + (1024 if self.arch >= 80 else 0)
        by_shared = SHARED_TOTAL[self.arch] * 1024 // own if own else MOST_BLOCKS[self.arch]
        return min(by_registers, by_shared, MOST_WARPS[self.arch] // self.warps, MOST_BLOCKS[self.arch])

    @property
    def occupancy(self) -> float:
        """The warps that a multiprocessor holds over the most that it can."""
        return self.blocks * self.warps / MOST_WARPS[self.arch]

    def matrix_instructions(self) -> dict[str, int]:
        """How many instructions of the tensor cores the machine code has, by name. Not for sm_70, see `sass`."""
        return _counted(r"\b(HMMA|HGMMA|IMMA|IGMMA|QGMMA|QMMA)\b", self.sass())

    def sass(self) -> str:
        """The machine code, disassembled; the tool that comes with Triton 3.6 and later refuses sm_70."""
        return self._sass

    @cached_property
    def _sass(self) -> str:
        return _tool("cuobjdump", "-sass", self.cubin)


def compile_variant(variant: KernelVariant, arch: int) -> CompiledKernel:
    """A variant for one architecture: 80 for sm_80."""
    module, _, function = variant.kernel.partition(".")
    kernel = getattr(importlib.import_module(f"transom_cuda_triton.kernels.{module}"), function)
    return compile_kernel(kernel, arch, dict(variant.types), dict(variant.constants), variant.warps, variant.stages)


def compile_code(variant: KernelVariant, arch: int) -> Code:
    """A variant's machine code and what a launch of it needs, for one architecture."""
    made = compile_variant(variant, arch)
    return Code(made.entry, made.cubin, made.shared, made.warps, made.arguments, made.parameters)


def compile_kernel(
    kernel: Any, arch: int, signature: Mapping[str, str], constants: Mapping[str, Any], warps: int = 4, stages: int = 2
) -> CompiledKernel:
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

    names = list(kernel.arg_names)
    if sorted((*signature, *constants)) != sorted(names):
        wrong = sorted({*signature, *constants} ^ set(names)) or sorted({*signature} & {*constants})
        raise ValueError(f"{kernel.__name__} needs each of its arguments once, with a type or a value: {wrong}.")
    arguments = tuple(name for name in names if name in signature)
    aligned = tuple(name for name in arguments if signature[name].startswith("*") or name.endswith(STRIDES))
    source = ASTSource(
        fn=kernel,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs=dict(constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    made = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
    )
    _refuse(kernel.__name__, made.metadata)
    cubin, ptx = made.asm["cubin"], made.asm["ptx"]
    usage = _counted_numbers(_tool("cuobjdump", "-res-usage", cubin))
    entry, parameters = _entry(ptx)
    made_of = tuple(_PARAMETER.get(signature[name], "u64") for name in arguments)
    if parameters[: len(arguments)] != made_of or set(parameters[len(arguments) :]) - {"u64"}:
        raise UnknownForm(
            f"{kernel.__name__} takes {parameters} as Triton {triton.__version__} compiles it, not {made_of}, pointers."
        )
    return CompiledKernel(
        kernel.__name__, arch, cubin, ptx, entry, arguments, aligned, parameters, made.metadata.shared,
        made.metadata.num_warps, usage.get("REG", 0), usage.get("STACK", 0) + usage.get("LOCAL", 0),
    )  # fmt: skip


class UnknownForm(RuntimeError):
    """Triton, in some other version, made code that `launching.Driver` would start wrongly: it is refused instead."""


_PARAMETER = {"i32": "u32", "u32": "u32", "i64": "u64", "u64": "u64", "fp32": "f32", "fp64": "f64"}
"""PTX's parameters by Triton's types, where it is no pointer."""


def _entry(ptx: str) -> tuple[str, tuple[str, ...]]:
    """The name of the only entry of a PTX module, and the types of its parameters."""
    found = re.findall(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)", ptx)
    if len(found) != 1:
        raise UnknownForm(f"A kernel's PTX has one entry; this has {len(found)}.")
    name, parameters = found[0]
    return name, tuple(re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)", parameters))


def _refuse(name: str, metadata: Any) -> None:
    """Fail on what a launch does not provide for."""
    unasked = {"num_ctas": 1, "launch_pdl": False, "launch_cooperative_grid": False}
    none = dict.fromkeys(("global_scratch_size", "profile_scratch_size", "tmem_size", "tensordesc_meta"))
    for key, usual in {**unasked, **none}.items():
        value = getattr(metadata, key, usual)
        if value != usual and not (usual is None and not value):
            raise UnknownForm(f"{name} needs {key} {value} of a launch, which is not provided for.")


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

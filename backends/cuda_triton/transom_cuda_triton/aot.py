"""Compiles kernels ahead of time, for any NVIDIA architecture, on a machine that needs no GPU.

Needs only the package triton. One process cannot both compile and interpret (`TRITON_INTERPRET=1`).
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
"""KiB of shared memory that one block may use, by architecture (CUDA C++ Programming Guide, compute capabilities)."""
SHARED_TOTAL = {70: 96, 80: 164, 86: 100, 89: 100, 90: 228}
"""KiB of shared memory of a multiprocessor. From sm_80 on each block takes 1 KiB more than it requests."""
MOST_WARPS = {70: 64, 80: 64, 86: 48, 89: 48, 90: 64}
"""Maximum resident warps of a multiprocessor."""
MOST_BLOCKS = {70: 32, 80: 32, 86: 16, 89: 24, 90: 32}
"""Maximum resident blocks of a multiprocessor."""
REGISTERS = 65536
"""32-bit registers of a multiprocessor."""
STRIDES = ("_token", "_page", "_head")


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel's machine code for one architecture, its resources, and what a launch through CUDA's driver needs.

    A launch has one-dimensional blocks of 32 * `warps` threads and `shared` bytes of dynamic shared memory. More than
    48 KiB must be enabled first (`CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`). A launch passes `arguments` in
    order, then `hidden` null pointers. It needs nothing else: kernels that need scratch memory, clusters, a cooperative
    launch, a dependent launch or tensor descriptors are refused when they are compiled.
    """

    name: str
    arch: int
    cubin: bytes
    ptx: str
    entry: str
    """The function's name in the machine code."""
    arguments: tuple[str, ...]
    """Names of the non-constant arguments, in launch order."""
    aligned: tuple[str, ...]
    """Arguments that must be multiples of 16: addresses in bytes, strides in elements."""
    parameters: tuple[str, ...]
    """Parameter types of the machine code, "u64", "u32", "f32" and so on; those of `arguments` come first."""
    shared: int
    """Bytes of shared memory per block."""
    warps: int
    registers: int
    """Registers per thread."""
    spilled: int
    """Bytes per thread spilled to local memory."""

    @property
    def hidden(self) -> int:
        """Number of unused pointers that Triton adds behind the arguments, for scratch memory and profiling."""
        return len(self.parameters) - len(self.arguments)

    @property
    def blocks(self) -> int:
        """Resident blocks per multiprocessor."""
        by_registers = REGISTERS // max(1, -(-self.registers // 8) * 8 * 32 * self.warps)
        own = self.shared + (1024 if self.arch >= 80 else 0)
        by_shared = SHARED_TOTAL[self.arch] * 1024 // own if own else MOST_BLOCKS[self.arch]
        return min(by_registers, by_shared, MOST_WARPS[self.arch] // self.warps, MOST_BLOCKS[self.arch])

    @property
    def occupancy(self) -> float:
        """Resident warps of a multiprocessor as a share of its maximum."""
        return self.blocks * self.warps / MOST_WARPS[self.arch]

    def matrix_instructions(self) -> dict[str, int]:
        """Number of tensor core instructions in the machine code, by name. Not for sm_70, see `sass`."""
        return _counted(r"\b(HMMA|HGMMA|IMMA|IGMMA|QGMMA|QMMA)\b", self.sass())

    def sass(self) -> str:
        """The disassembled machine code; the tool in Triton 3.6 and later does not support sm_70."""
        return self._sass

    @cached_property
    def _sass(self) -> str:
        return _tool("cuobjdump", "-sass", self.cubin)


def compile_variant(variant: KernelVariant, arch: int) -> CompiledKernel:
    """Compile a variant for one architecture: 80 for sm_80."""
    module, _, function = variant.kernel.partition(".")
    kernel = getattr(importlib.import_module(f"transom_cuda_triton.kernels.{module}"), function)
    return compile_kernel(kernel, arch, dict(variant.types), dict(variant.constants), variant.warps, variant.stages)


def compile_code(variant: KernelVariant, arch: int) -> Code:
    """Compile a variant for one architecture, and keep what a launch needs."""
    made = compile_variant(variant, arch)
    return Code(made.entry, made.cubin, made.shared, made.warps, made.arguments, made.parameters)


def compile_kernel(
    kernel: Any, arch: int, signature: Mapping[str, str], constants: Mapping[str, Any], warps: int = 4, stages: int = 2
) -> CompiledKernel:
    """Compile one kernel for one architecture.

    Args:
        kernel: a `triton.jit` function.
        arch: 80 for sm_80.
        signature: Triton's types of the non-constant arguments, by name: `"*fp16"`, `"i32"`, `"fp32"`. Pointers and
            strides (names that end in one of `STRIDES`) are assumed to be multiples of 16.
        constants: values of the constant arguments, by name.
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
    expected = tuple(_PARAMETER.get(signature[name], "u64") for name in arguments)
    if parameters[: len(arguments)] != expected or set(parameters[len(arguments) :]) - {"u64"}:
        raise UnknownForm(
            f"Triton {triton.__version__} compiles {kernel.__name__} with the parameters {parameters}, not {expected}."
        )
    return CompiledKernel(
        kernel.__name__, arch, cubin, ptx, entry, arguments, aligned, parameters, made.metadata.shared,
        made.metadata.num_warps, usage.get("REG", 0), usage.get("STACK", 0) + usage.get("LOCAL", 0),
    )  # fmt: skip


class UnknownForm(RuntimeError):
    """This version of Triton made code that `launching.DriverLauncher` would launch wrongly."""


_PARAMETER = {"i32": "u32", "u32": "u32", "i64": "u64", "u64": "u64", "fp32": "f32", "fp64": "f64"}
"""PTX parameter types of Triton types other than pointers."""


def _entry(ptx: str) -> tuple[str, tuple[str, ...]]:
    """The name of the only entry of a PTX module, and the types of its parameters."""
    found = re.findall(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)", ptx)
    if len(found) != 1:
        raise UnknownForm(f"A kernel's PTX must have one entry; this one has {len(found)}.")
    name, parameters = found[0]
    return name, tuple(re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)", parameters))


def _refuse(name: str, metadata: Any) -> None:
    """Raise for launch requirements that `DriverLauncher` does not support."""
    unused = {"num_ctas": 1, "launch_pdl": False, "launch_cooperative_grid": False}
    none = dict.fromkeys(("global_scratch_size", "profile_scratch_size", "tmem_size", "tensordesc_meta"))
    for key, usual in {**unused, **none}.items():
        value = getattr(metadata, key, usual)
        if value != usual and not (usual is None and not value):
            raise UnknownForm(f"{name} needs a launch with {key} {value}, which is not supported.")


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

"""Compile: write a program, its weights in one file, and the machine code of every kernel that it may launch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.authoring.folders import artifact_folder, small_as_bytes
from transom.contract import Artifact, Device, Options, Progress
from transom.errors import EngineError
from transom.graph.reading import matrices
from transom.programs.reading import GraphReader
from transom_cuda_triton import names, probing
from transom_cuda_triton.claims import precision_of
from transom_cuda_triton.lowering import TritonKernels, write
from transom_cuda_triton.precision import TritonPrecision
from transom_cuda_triton.program import TritonProgram
from transom_cuda_triton.sharding import shard
from transom_cuda_triton.variants import Code, KernelVariant

if TYPE_CHECKING:
    from transom.graph import Graph

MOST_PROCESSES = 8
"""Compiling one kernel takes a second and 300 MB."""
QUANTIZED_TO = {
    "int8": "int8 in blocks",
    "fp8": "fp8 (E4M3) by rows, and activations by tokens where a step has several",
}
KEPT = "precision='auto' keeps them as stored"
WEIGHTS_SHARE = 0.3
"""Share of the progress bar for weights."""


def compile_graph(graph: Graph, device: Device, options: Options, progress: Progress) -> Artifact:
    """Compile a decoder whose nodes were all claimed. Large weights are in a temporary folder until the host moves
    them.

    Raises:
        EngineError: Triton cannot compile a kernel; the message quotes it.
        OptionError: this card or checkpoint does not support the precision.
    """
    assert graph.decoder is not None
    precision = precision_of(graph, device, options)
    ranks = max(1, len(device.members))
    files: dict[str, bytes | Path] = {names.DECODER_FILE: graph.decoder.to_json().encode()}
    wanted: list[KernelVariant] = []
    arch = probing.tiles_architecture(device)
    with artifact_folder("transom-cuda-") as folder:
        for rank in range(ranks):
            reader = GraphReader(graph, TritonKernels(precision))
            if ranks > 1:
                shard(reader, ranks, rank)
            path = folder / names.weights_file(rank)
            with path.open("w+b") as file:
                program = write(reader, precision, file, partial(_weights_share, progress, rank, ranks))
            files |= {
                names.program_file(rank): program.to_json().encode(),
                names.weights_file(rank): small_as_bytes(path),
            }
            wanted += variants_of(program, arch)
        if not probing.interpreting():
            progress("kernels", WEIGHTS_SHARE)
            codes = compile_all(list(dict.fromkeys(wanted)), arch, partial(_kernels_share, progress))
            files |= code_files(codes)
        progress("kernels", 1.0)
        return Artifact(files, probing.requirements(device), _notes(graph, reader, precision, device))


def _weights_share(progress: Progress, rank: int, ranks: int, share: float) -> None:
    progress("weights", WEIGHTS_SHARE * (rank + share) / ranks)


def _kernels_share(progress: Progress, share: float) -> None:
    progress("kernels", WEIGHTS_SHARE + (1 - WEIGHTS_SHARE) * share)


def variants_of(program: TritonProgram, arch: int) -> list[KernelVariant]:
    """All kernels that an engine may launch for a program."""
    from transom_cuda_triton.engine import engine_operators
    from transom_cuda_triton.operators import all_variants
    from transom_cuda_triton.routes import routing_variants

    found = [*all_variants(engine_operators(program, arch, processors=1)), *routing_variants(program, arch)]
    return list(dict.fromkeys(found))


def compile_all(
    variants: Sequence[KernelVariant], arch: int, progress: Callable[[float], None]
) -> dict[KernelVariant, Code]:
    """Compile all variants in parallel processes.

    Raises:
        EngineError: Triton cannot compile one of them.
    """
    from transom_cuda_triton.aot import compile_code

    codes: dict[KernelVariant, Code] = {}
    processes = max(1, min(os.cpu_count() or 1, MOST_PROCESSES, len(variants)))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(compile_code, variant, arch) for variant in variants]
        try:
            for i, (variant, future) in enumerate(zip(variants, futures, strict=True)):
                try:
                    codes[variant] = future.result()
                except Exception as e:
                    lines = str(e).strip().splitlines() or [type(e).__name__]
                    raise EngineError(
                        f"Triton cannot compile {variant.kernel} for sm_{arch}: {lines[-1]}",
                        "Report it, with the output of: transom doctor",
                    ) from e
                progress((i + 1) / len(variants))
        except BaseException:  # cancel what has not started
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return codes


def code_files(codes: dict[KernelVariant, Code]) -> dict[str, bytes | Path]:
    """Files of an artifact: concatenated machine code, and a list with offset and launch data of each kernel."""
    listed: list[dict[str, Any]] = []
    blob = bytearray()
    for variant, code in codes.items():
        raw = asdict(code)
        raw |= {"variant": asdict(variant), "at": len(blob), "size": len(code.cubin)}
        del raw["cubin"]
        listed.append(raw)
        blob += code.cubin
    text = json.dumps(listed, separators=(",", ":"))
    return {names.CODE_LIST: text.encode(), names.CODE_FILE: bytes(blob)}


def _notes(graph: Graph, reader: GraphReader, precision: TritonPrecision, device: Device) -> list[str]:
    notes = [f"precision: {precision.describe(matrices(graph))}"]
    quantized = sum(d.kind == "linear" and d.by == precision.quantized for d in reader.ops)
    if precision.quantized and quantized:
        notes.append(f"{quantized} matrices were quantized to {QUANTIZED_TO[precision.quantized]}; {KEPT}")
    if device.arch == "sm_70" and not probing.interpreting():
        notes.append("Triton has not used the tensor cores of sm_70 since 3.2: its products run on CUDA cores")
    return notes

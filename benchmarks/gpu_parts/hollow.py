"""Models of any size with random weights, created in seconds: the file of weights is sparse, and the card fills it.

Everything but the large matrices is compiled as the backend compiles it: program, small vectors, machine code.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shaped import made_of

from gpu_parts.bench import GpuBench
from transom.contract import Artifact
from transom.graph import Blocked, BlockedArrays, Dense, Graph
from transom.programs.reading import GraphReader
from transom.signature import Decoder
from transom_cuda_triton import names, probing
from transom_cuda_triton.claims import precision_of
from transom_cuda_triton.compiling import code_files, variants_of
from transom_cuda_triton.lowering import TritonKernels, write
from transom_cuda_triton.program import TritonProgram
from transom_cuda_triton.store import Store

HOLE = 64 << 10
"""Arrays of at least this many bytes are left out of the file."""


class HollowFile:
    """A file for writing, in which large arrays become holes."""

    def __init__(self, path: Path) -> None:
        self._file, self._end = path.open("w+b"), 0

    def tell(self) -> int:
        return self._end

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if size < HOLE:
            self._file.seek(self._end)
            self._file.write(data)
        self._end += size
        return size

    def close(self) -> None:
        self._file.truncate(self._end)
        self._file.close()


class Zeros:
    """Replaces the weights of `transom.testing.models`: matrices of zeros that take no memory, gains of one."""

    def __init__(self, rng: np.random.Generator, stored: str, block: int) -> None:
        self._stored, self._block, self._made = stored, block, 0

    def hash(self) -> str:
        return "0" * 32

    def vector(self, size: int, centre: float = 0.0, spread: float = 0.2) -> Dense:
        return Dense((size,), "float32", lambda: np.full(size, centre, np.float32))

    def matrix(self, rows: int, columns: int) -> Dense | Blocked:
        shape = rows, columns
        if self._stored == "float16":
            return Dense(shape, "float16", lambda: np.zeros(shape, np.float16))

        def load() -> BlockedArrays:
            return BlockedArrays(np.zeros(shape, np.int8), np.ones((rows, columns // self._block), np.float16))

        return Blocked(shape, self._block, "int4", "float16", load)


def decoder(bench: GpuBench, weights: str) -> Graph:
    """A decoder with the benchmark's sizes and matrices in `float16` or `int4`."""
    s = bench.sizes
    context = -(-(s.end_to_end + 16 * s.decodes) // 64) * 64
    return made_of(
        Zeros, context, weights, layers=s.layers, q_heads=s.heads, kv_heads=s.kv_heads, head_dim=s.head_dim,
        vocabulary=s.vocabulary, block=s.block, hidden=s.hidden, inner=s.inner,
    )  # fmt: skip


@dataclass(frozen=True)
class Hollow:
    """A compiled model whose large matrices are holes."""

    name: str
    program: TritonProgram
    decoder: Decoder
    artifact: Artifact
    seconds: float
    """Compile time."""


def compiled(bench: GpuBench, weights: str, folder: Path) -> Hollow:
    """Compile like `transom_cuda_triton.compiling.compile_graph`."""
    began = time.perf_counter()
    graph, card = decoder(bench, weights), bench.card
    assert graph.decoder is not None
    precision = precision_of(graph, card.host, {"precision": "f16" if not bench.dry else "exact"})
    reader = GraphReader(graph, TritonKernels(precision))
    folder.mkdir(parents=True)
    file = HollowFile(folder / names.weights_file(0))
    program = write(reader, precision, file, lambda share: None)  # type: ignore[arg-type]
    file.close()
    contents: dict[str, bytes | Path] = {
        names.program_file(0): program.to_json().encode(), names.DECODER_FILE: graph.decoder.to_json().encode(),
    }  # fmt: skip
    if not bench.dry:
        wanted = variants_of(program, card.arch)
        card.launcher(wanted, max(0.0, bench.clock.left - 20)).close()  # type: ignore[attr-defined]
        contents |= code_files({v: card.known[v] for v in wanted})  # type: ignore[misc]
    files: dict[str, bytes | Path] = {names.weights_file(0): folder / names.weights_file(0)}
    for name, content in contents.items():
        assert isinstance(content, bytes)
        (folder / name).write_bytes(content)
        files[name] = folder / name
    requires = probing.requirements(card.host)
    (folder / "requires.json").write_text(json.dumps(requires))
    return Hollow(weights, program, graph.decoder, Artifact(files, requires), time.perf_counter() - began)


def fill(store: Store, program: TritonProgram) -> None:
    """Fill all matrices with random numbers whose variance preserves that of activations."""
    for i, matrix in enumerate(program.matrices):
        parts, spread = store.matrix(i), matrix.columns**-0.5
        if not matrix.bits:
            for piece in parts["TABLE"].split(4096):
                piece.copy_(torch.randn(piece.shape, dtype=piece.dtype, device=piece.device) * spread)
            continue
        parts["QUANTS"].random_(0, 256)
        parts["SCALES"].fill_(spread / 4.6)  # 4.6: standard deviation of the integers -8 … 7

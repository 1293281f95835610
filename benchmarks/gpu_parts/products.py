"""Products with 4-bit weights by the engine's own operator, compared with cuBLAS and torch: one row, and many."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpu_parts.attention import _timed
from gpu_parts.bench import GpuBench
from gpu_parts.timing import Run
from transom.programs.written import View
from transom_cuda_triton.compiling import variants_of
from transom_cuda_triton.engine import TritonEngine
from transom_cuda_triton.packing import ALIGNMENT, TritonMatrix
from transom_cuda_triton.program import TritonOp, TritonProgram
from transom_cuda_triton.step import Workspace, plan
from transom_cuda_triton.store import TORCH

ABOUT = (
    "Calls run in one CUDA graph, each with other weights, so that none are in the L2 cache. One row is compared with "
    "the speed of copying, by the bytes of weights and scales; more rows with the card's "
    "product of matrices. cuBLAS has the same matrix in {number}; torch's int4 is `_weight_int4pack_mm`, in bfloat16."
)
TORCH_BLOCKS = (32, 64, 128, 256)


def shapes(bench: GpuBench) -> dict[str, tuple[int, int]]:
    """(outputs, columns) of the products of a layer, as the engine fuses them."""
    s = bench.sizes
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    return {
        "q, k, v": (q + 2 * kv, s.hidden), "o": (s.hidden, q), "gate, up": (2 * s.inner, s.hidden),
        "down": (s.hidden, s.inner),
    }  # fmt: skip


class Products:
    """Several equal products, each with its own weights.

    Args:
        block: columns that share a scale.
    """

    def __init__(self, bench: GpuBench, outputs: int, columns: int, block: int, rows: int) -> None:
        card = bench.card
        self.nbytes = outputs * columns // 2 + outputs * (columns // block) * 2
        self.copies = max(1, min(64, bench.sizes.scratch // self.nbytes))
        matrices, at = [], 0
        for _ in range(self.copies):
            scales = _aligned(at + outputs * columns // 2)
            matrices.append(TritonMatrix(4, outputs, columns, at, block, 8, scales))
            at = _aligned(scales + outputs * (columns // block) * 2)
        ops = tuple(TritonOp("linear", outputs, View(1), View(0), matrix=i) for i in range(self.copies))
        program = TritonProgram(card.number, ops, tuple(matrices), (), (), (columns, outputs, 16), 2, 16, at, "dense")
        launch = card.launcher(variants_of(program, card.arch), max(0.0, bench.clock.left - 5))
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
            weights = Path(folder) / "weights.bin"
            with weights.open("wb") as file:
                file.truncate(at)
            self._engine = TritonEngine(
                program, weights, card.device, launch, arch=card.arch, processors=card.processors, context=rows,
                slots=1,
            )  # fmt: skip
        for i in range(self.copies):
            found = self._engine.store.matrix(i)
            found["QUANTS"].random_(0, 256)
            found["SCALES"].fill_(columns**-0.5 / 4.6)
        workspace = Workspace(program, rows, 0, card.device)
        workspace.buffers[0].normal_()
        planned = plan([np.zeros(rows, np.int64)], [0], [[0] * -(-rows // 64)], [], 0)
        self._step = self._engine.laid_out(planned, workspace)

    def close(self) -> None:
        self._engine.close()

    def calls(self) -> list[Run]:
        return [lambda operator=operator: operator.run(self._step) for operator in self._engine.operators]  # type: ignore[misc]


def _aligned(at: int) -> int:
    return -(-at // ALIGNMENT) * ALIGNMENT


def run(bench: GpuBench) -> None:
    """Every shape, rows and block size."""
    table = bench.table("Products with int4 weights", ABOUT.format(number=bench.card.number))
    blocks = [bench.sizes.block] if bench.dry or bench.quick else [bench.sizes.block, 128]
    for rows in bench.sizes.product_rows:
        for name, (outputs, columns) in shapes(bench).items():
            for block in (b for b in (blocks if rows == 1 else blocks[:1]) if columns % b == 0):
                bench.clock.need(3)
                _product(bench, table, name, outputs, columns, block, rows)


def _product(bench: GpuBench, table: Any, name: str, outputs: int, columns: int, block: int, rows: int) -> None:
    ours = Products(bench, outputs, columns, block, rows)
    dtype, device = TORCH[bench.card.number], bench.card.device
    plain = outputs * columns * dtype.itemsize
    copies = max(1, min(64, bench.sizes.scratch // plain))
    x = torch.randn((rows, columns), dtype=dtype, device=device)

    def cublas() -> list[Run]:
        matrices = [torch.randn((outputs, columns), dtype=dtype, device=device) for _ in range(copies)]
        out = torch.empty((rows, outputs), dtype=dtype, device=device)
        return [lambda m=m: torch.matmul(x, m.T, out=out) for m in matrices]  # type: ignore[misc]

    made: dict[str, tuple[Callable[[], list[Run]], int, int]] = {
        f"ours, int4 in blocks of {block}": (ours.calls, ours.copies, ours.nbytes),
        f"cuBLAS, {bench.card.number}": (cublas, copies, plain),
        f"torch int4, groups of {block}": (
            lambda: torch_int4(bench, outputs, columns, block, rows, ours.copies), ours.copies, ours.nbytes,
        ),
    }  # fmt: skip
    first: float | None = None
    for what, (make, count, nbytes) in made.items():
        seconds, note = _timed(bench, lambda make=make: bench.timer.recorded(make()))  # type: ignore[misc]
        seconds = seconds and seconds / count
        first = seconds if first is None else first
        flops = 2.0 * rows * outputs * columns
        bound = ("copy_bytes_per_second", nbytes) if rows == 1 else ("product_flops", flops)
        bench.row(
            table, rows=rows, product=name, outputs=outputs, columns=columns, what=what,
            us=seconds and seconds * 1e6, GB_per_s=seconds and nbytes / seconds / 1e9,
            TFLOPS=seconds and flops / seconds / 1e12, of_the_bound=bench.share(bound[1], seconds, bound[0]),
            ours_is_faster_by=None if what.startswith("ours") or not seconds or not first else seconds / first,
            note=note,
        )  # fmt: skip
    ours.close()


def torch_int4(bench: GpuBench, outputs: int, columns: int, block: int, rows: int, copies: int) -> list[Run]:
    """torch's own product with 4-bit weights in groups, with a scale and a zero point for each.

    Raises:
        LookupError: torch has no such product for this card or these sizes.
    """
    if block not in TORCH_BLOCKS:
        raise LookupError(f"torch has groups of {', '.join(map(str, TORCH_BLOCKS))}, not of {block}")
    if not bench.dry and bench.card.arch < 80:
        raise LookupError("torch's int4 product needs sm_80 or newer")
    device, aten = bench.card.device, torch.ops.aten
    x = torch.randn((rows, columns), dtype=torch.bfloat16, device=device)
    scales = torch.full((columns // block, outputs, 2), 0.01, dtype=torch.bfloat16, device=device)
    calls: list[Run] = []
    for _ in range(copies):
        if bench.dry:
            quants = torch.randint(0, 16, (outputs, columns), dtype=torch.int32)
            packed = aten._convert_weight_to_int4pack_for_cpu(quants, 1)
            calls.append(lambda p=packed: aten._weight_int4pack_mm_for_cpu(x, p, block, scales))  # type: ignore[misc]
            continue
        pairs = torch.randint(0, 256, (outputs, columns // 2), dtype=torch.uint8, device=device)
        packed = aten._convert_weight_to_int4pack(pairs, 8)
        calls.append(lambda p=packed: aten._weight_int4pack_mm(x, p, block, scales))  # type: ignore[misc]
    return calls

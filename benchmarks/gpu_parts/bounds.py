"""The card's peaks for memory alone and for products alone: the bounds of the other figures."""

from __future__ import annotations

import torch

from gpu_parts.bench import GpuBench
from transom_cuda_triton.store import TORCH


def run(bench: GpuBench) -> None:
    sizes, card, bounds = bench.sizes, bench.card, bench.document.bounds
    table = bench.table(
        "The card's own bounds",
        "Copying from the card's memory to itself reads and writes every byte; the product is cuBLAS's, of square "
        f"matrices of {sizes.peak} in {card.number}. Peak: what the memory's clock and width make.",
    )
    count = min(sizes.copied, card.free // 4)
    source = torch.zeros(count, dtype=torch.uint8, device=card.device)
    target = torch.empty_like(source)
    seconds = bench.timer.seconds(lambda: target.copy_(source))
    bounds["copy_bytes_per_second"] = 2 * count / seconds
    peak = bench.document.card.get("peak_bytes_per_second") or None
    bench.row(
        table, what="copy", ms=seconds * 1e3, GB_per_s=2 * count / seconds / 1e9,
        peak_GB_per_s=peak and float(peak) / 1e9,
    )  # fmt: skip
    a, b = (torch.randn((sizes.peak, sizes.peak), dtype=TORCH[card.number], device=card.device) for _ in range(2))
    out = torch.empty_like(a)
    seconds = bench.timer.seconds(lambda: torch.mm(a, b, out=out), 1.0)
    bounds["product_flops"] = 2 * sizes.peak**3 / seconds
    bench.row(table, what="product", ms=seconds * 1e3, TFLOPS=bounds["product_flops"] / 1e12)

"""What the routing's kernels compile to, for cards that are not here."""

from __future__ import annotations

from importlib import import_module

import pytest

from transom_cuda_triton.aot import SHARED_LIMIT, compile_kernel, compile_variant
from transom_cuda_triton.routing import Routing

TENSOR_CORES = {80: "HMMA", 90: "HGMMA"}
PRODUCTS = ("columns.weigh_rows", "columns.sum_mass", "scores.measure_rows", "scores.score_units")


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("arch", TENSOR_CORES)
@pytest.mark.sweep(but=("90-128",))
def test_nothing_is_spilled(arch: int, head_dim: int) -> None:
    """With all that attention may have, where heads are wide, and without; what knows no heads once."""
    more = head_dim == 128
    routing = Routing(8, 4, head_dim, head_dim**-0.5, 30.0 * more, 4096 * more, more, "fp16", 16)
    for variant in routing.variants():
        module, name = variant.kernel.split(".")
        kernel = getattr(import_module(f"transom_cuda_triton.kernels.{module}"), name)
        constants = dict(variant.constants)
        if not more and "HEAD" not in constants:
            continue
        assert set(kernel.arg_names) == {n for n, _ in (*variant.types, *variant.constants)}
        made = compile_kernel(kernel, arch, dict(variant.types), constants, variant.warps, variant.stages)
        assert made.spilled == 0, variant
        assert made.shared <= SHARED_LIMIT[arch] * 1024
        assert made.blocks >= 1
        if variant.kernel in PRODUCTS and not (constants.get("KEPT") and name == "score_units"):
            cores = TENSOR_CORES[arch] if constants["ROWS"] == 64 else "HMMA"
            assert made.matrix_instructions().get(cores, 0) > 0, variant


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.sweep(but=("64",))
def test_plain_cores_have_room_for_every_kernel(head_dim: int) -> None:
    """On sm_70, where only the widest heads go to local memory by more than a few bytes."""
    for variant in Routing(8, 4, head_dim, head_dim**-0.5, 0.0, 0, False, "fp16", 16, plain=True).variants():
        made = compile_variant(variant, 70)
        assert made.shared <= SHARED_LIMIT[70] * 1024
        assert made.blocks >= 1
        assert made.spilled <= (512 if head_dim == 256 else 32), variant

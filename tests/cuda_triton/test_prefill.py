"""Attention of query blocks in Triton's interpreter, against the registry's reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from calls import KINDS, RULE, Array, Call, Tensors

from transom_cuda_triton.kernels.prefill import attend_blocks

RAGGED = [(0, 1), (0, 70), (199, 1), (130, 90)]


def run(call: Call, rng: np.random.Generator, dtype: torch.dtype, rows: int = 32, tile: int = 64) -> Array:
    t = Tensors(call, rng, dtype)
    attend_blocks[(t.blocks * -(-64 * call.group // rows), call.kv_heads)](
        **t.reading, **t.values, **t.ending, ROWS=rows, KEYS=tile
    )
    return t.out.float().numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_what_the_lists_name_is_attended_to(kind: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
    call = Call(RAGGED, **KINDS[kind]).draw(rng, np.float16)
    got, wanted = run(call, rng, dtype, tile=int(rng.choice([16, 32, 64]))), call.wanted()
    bound = 2e-6 if dtype is torch.float32 else 2e-3
    assert np.abs(got - wanted).max() < bound * max(1.0, float(np.abs(wanted).max()))


@pytest.mark.parametrize("head_dim", [16, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("group", [1, 3, 7])
def test_any_head_size_and_group(head_dim: int, group: int, rng: np.random.Generator) -> None:
    value_dim = int(rng.choice([16, 64, 80]))
    call = Call([(90, 20)], group=group, head_dim=head_dim, value_dim=value_dim, kv_heads=1, policy=RULE)
    call.draw(rng, np.float16)
    got, wanted = run(call, rng, torch.float32, rows=16), call.wanted()
    assert np.abs(got - wanted).max() < 5e-6 * max(1.0, float(np.abs(wanted).max()))

"""AMX: which products run in tiles, and who may use them.

Draws: what is compared must be equal, whatever the numbers are.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest
from levels import DEVICE, LEVELS, MORE, TRAPS, pytestmark  # noqa: F401  pytest reads the mark from here
from programs import Machine
from test_decoders import BFLOAT16, built

from transom.errors import EngineError
from transom.testing.models import tiny_decoder
from transom_openvino_cpu.native import library
from transom_openvino_cpu.precision import CpuPrecision

AMX = replace(DEVICE, features=DEVICE.features | library.LEVELS["amx"])


def _products() -> list[int]:
    """So far: of signed and unsigned bytes, of unsigned and signed ones, of bfloat16."""
    traps = ctypes.CDLL(str(TRAPS))
    traps.tile_products.restype = ctypes.c_int64
    return [traps.tile_products(kind) for kind in range(3)]


@pytest.mark.skipif("amx" not in LEVELS or "amx_tile" not in MORE, reason="nobody counts, or AVX-512 BF16 is missing")
@pytest.mark.parametrize("tokens", [1, 3, 4, 15, 16, 70])
def test_bytes_of_sixteen_rows_and_bfloat16_of_any_number_meet_in_tiles(tokens: int, rng: np.random.Generator) -> None:
    """Four rows of queries belong to a token and KV head here: four tokens make sixteen rows of attention. Products by
    int8 do not take tiles."""
    graph = tiny_decoder(rng, q_heads=4, kv_heads=1, weights="uint4_minimums")
    attention = tokens >= 4
    wanted = {
        CpuPrecision("int8", "f32", True): [attention, attention, False],
        CpuPrecision("bf16", "bf16", False): [False, False, True],
        CpuPrecision("exact", "f32", False): [False, False, False],
    }
    for precision, kinds in wanted.items():
        with Machine(built(graph, precision), "amx", pages=2) as machine:
            before = _products()
            machine.engine.step([rng.integers(0, 61, tokens)], [0], [[0, 1]], [tokens - 1])
            assert [after > at for after, at in zip(_products(), before, strict=True)] == kinds, precision


def test_amx_is_taken_where_the_process_may_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for allowed in (True, False):
        monkeypatch.setattr(library, "permitted", lambda level, allowed=allowed: allowed or level != "amx")
        assert library.level_for(AMX) == ("amx" if allowed else "avx512_bf16")


def test_a_process_that_may_not_use_amx_is_told(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    made = built(tiny_decoder(rng), BFLOAT16)
    monkeypatch.setattr(library, "permitted", lambda level: level != "amx")
    with pytest.raises(EngineError, match="may not use the instructions of amx"):
        Machine(made, "amx")
    with Machine(made, LEVELS[-1]):
        pass

"""Runs the tests of this folder at random over a library that was built with sanitizers, and damages programs.

    python fuzz.py LIBRARY SEED SECONDS LEVEL…

is started by `test_sanitizers.py`, with the sanitizers' runtime loaded before anything else. Weights and pages lie in
memory of exactly their size here, where in use they are mapped: what reads beyond them is then seen.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import test_attention_kernels  # noqa: E402
import test_decoders  # noqa: E402
import test_kernels  # noqa: E402
from programs import Machine  # noqa: E402

from transom.errors import EngineError  # noqa: E402
from transom.testing.models import tiny_decoder  # noqa: E402
from transom_openvino_cpu import page_memory  # noqa: E402
from transom_openvino_cpu.native import engine, library  # noqa: E402
from transom_openvino_cpu.native.program import ACTIVATIONS, BY, KINDS, NativeProgram, View  # noqa: E402


class Memory:
    """Stands in for the module `mmap`, with memory from the heap, 64-byte aligned and not a byte longer than asked."""

    ACCESS_READ = 1

    def __init__(self) -> None:
        self._c = ctypes.CDLL(None)
        self._c.free.argtypes = [ctypes.c_void_p]

    def mmap(self, fileno: int, size: int, access: int = 0) -> Any:
        size = size or os.fstat(fileno).st_size
        place = ctypes.c_void_p()
        assert self._c.posix_memalign(ctypes.byref(place), ctypes.c_size_t(64), ctypes.c_size_t(size)) == 0
        memory = (ctypes.c_char * size).from_address(place.value or 0)
        memory[:] = os.pread(fileno, size, 0) if fileno >= 0 else bytes(size)
        weakref.finalize(memory, self._c.free, place.value)
        return memory


def choices(test: Callable[..., None]) -> list[dict[str, Any]]:
    """The keywords of each case of a test, but the level and the generator."""
    marks = [m for m in getattr(test, "pytestmark", []) if m.name == "parametrize" and m.args[0] != "level"]
    if not marks:
        return [{}]
    names = [m.args[0] for m in marks]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(m.args[1] for m in marks))]


def arguments(test: Callable[..., None]) -> set[str]:
    return set(test.__code__.co_varnames[: test.__code__.co_argcount])


TESTS = [
    test
    for module in (test_kernels, test_attention_kernels, test_decoders)
    for name, test in vars(module).items()
    if name.startswith("test_")
    and "rng" in arguments(test)
    and arguments(test) - {"rng", "level"} == set(choices(test)[0])
]
"""Those that need nothing from pytest."""
DAMAGED = 40
"""Damaged programs for every ten tests."""


def damage(rng: np.random.Generator, program: NativeProgram) -> NativeProgram:
    """Change one number of the program, or move, repeat or remove one of its operators."""
    what = str(rng.choice(["ops", "ops", "ops", "order", "matrices", "ropes", "layers", "buffers", "output"]))
    if what == "output":
        return replace(program, output=int(rng.integers(-2, len(program.buffers) + 2)))
    if what == "order":
        ops = list(program.ops)
        moved = ops[rng.integers(len(ops))] if rng.random() < 0.5 else ops.pop(rng.integers(len(ops)))
        if rng.random() < 0.8:
            ops.insert(int(rng.integers(len(ops) + 1)), moved)
        return replace(program, ops=tuple(ops))
    items = list(getattr(program, what))
    index = int(rng.integers(len(items)))
    item = items[index]
    name = str(rng.choice([f.name for f in fields(item)]))
    items[index] = replace(item, **{name: _other(rng, getattr(item, name), name)})
    return replace(program, **{what: tuple(items)})


def _other(rng: np.random.Generator, value: Any, name: str) -> Any:
    if isinstance(value, View):
        return View(value.buffer + int(rng.integers(-2, 3)), value.offset + int(rng.choice([-16, -1, 0, 0, 1, 16])))
    if isinstance(value, str):
        return str(rng.choice(next(names for names in (KINDS, BY, ACTIVATIONS) if value in names)))
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return float(rng.choice([0.0, -1.0, 1e30, np.nan, value * 2]))
    if name in ("at", "vector", "sinks"):
        return value + int(rng.choice([-64, 64, 1 << 12, 1 << 40]))
    near = [value - 1, value + 1, value - 16, value + 16, value * 2]
    return int(rng.choice([0, -1, 1, *near, 1 << 20, -(1 << 31), 2**31 - 1]))


def run_damaged(rng: np.random.Generator, level: str) -> None:
    kinds: Any = ["float32", "int4", "uint4_zero_points", "int8", "bfloat16"]
    graph = tiny_decoder(rng, weights=str(rng.choice(kinds)), layers=1, final_softcap=5.0)
    precisions = (test_decoders.EXACT, test_decoders.INT8_NARROW, test_decoders.BFLOAT16)
    program, weights = test_decoders.built(graph, precisions[rng.integers(3)])
    for _ in range(DAMAGED):
        broken = program
        for _ in range(int(rng.choice([1, 1, 2, 4]))):
            broken = damage(rng, broken)
        try:
            with Machine((broken, weights), level, pages=3) as machine:
                for count in (1, 5, 40):
                    tokens = rng.integers(0, 61, count)
                    rows = rng.integers(0, count, int(rng.choice([1, count, 50])))
                    machine.engine.step([tokens], [0], [[0, 1, 2]], rows.tolist())
        except (EngineError, MemoryError, IndexError, ValueError):
            continue  # refused, by the library or by what reads the program


def main() -> None:
    path, seed, seconds, levels = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]
    library.path = lambda: path
    engine.mmap = page_memory.mmap = Memory()
    assert set(levels) <= set(library.built_levels()), library.built_levels()
    test_decoders.LEVELS[:] = test_decoders.EVERY[:] = levels  # some tests go through them all
    rng = np.random.default_rng(seed)
    cases = [(test, case) for test in TESTS for case in choices(test)]
    end, done = time.monotonic() + seconds, 0
    order = rng.permutation(len(cases))
    while time.monotonic() < end:
        level = str(rng.choice(levels))
        test, case = cases[order[done % len(order)]]
        print(level, test.__name__, case, flush=True)
        test(rng=rng, **case, **({"level": level} if "level" in arguments(test) else {}))
        if done % 10 == 0:
            print(level, "damage", flush=True)
            run_damaged(rng, level)
        done += 1
    print(f"{done} cases, {(done + 9) // 10 * DAMAGED} damaged programs")


if __name__ == "__main__":
    main()

"""Every kernel on the card against the reference, on fresh random inputs, as the tests do in Triton's interpreter.

Calls of attention, of the cache and of routing are those of `tests/cuda_triton`. Each case runs twice: first with a
launcher that only records the requested variants, which are then compiled in parallel, and then on the card.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import torch
from parts.running import first_line

from gpu_parts.bench import GpuBench
from transom.graph.weights import dense
from transom.ops import rms_normalization, rotary_embedding
from transom.quantize.rounding import to_float8
from transom.testing.compare import normalized_error, tolerance
from transom_cuda_triton.operators import WIDTH, pieces, power_of_two, tile_of
from transom_cuda_triton.precision import LONG
from transom_cuda_triton.store import TORCH
from transom_cuda_triton.tiles import FLOAT8 as FLOAT8_ARCHITECTURES
from transom_cuda_triton.tiles import INTERPRETER, decode_tile, float8_tiles, linear_tiles, prefill_tile
from transom_cuda_triton.variants import KernelVariant, Launcher

TESTS = Path(__file__).resolve().parents[2] / "tests" / "cuda_triton"
NUMPY: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
TRITON = {torch.int32: "i32", torch.int64: "i64", torch.int8: "i8", **{v: k for k, v in TORCH.items()}}
SILU, GELU, GELU_TANH = 0, 1, 2
FLOAT8 = torch.float8_e4m3fn
ROUTINGS = ("64 columns, float16", "soft cap and sinks", "all of it", "many heads of a group", "window")
"""Of the kinds of tests/cuda_triton/test_routing.py: others are the same kernels with other numbers."""
EXACT = ("sparse", "window", "soft cap and sinks")
"""Kinds of attention in float32."""
HEADS = (16, 64, 80, 96, 192, 256)
Array = np.ndarray[Any, np.dtype[Any]]


def tests(name: str) -> ModuleType:
    """A module of the tests, by its path."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, TESTS / f"{name}.py")
        assert spec is not None and spec.loader is not None  # noqa: PT018
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


# launching ------------------------------------------------------------------------------------------------------------
class Noted:
    """A launcher that starts nothing and records the variants."""

    def __init__(self) -> None:
        self.variants: dict[KernelVariant, None] = {}

    def __call__(self, variant: KernelVariant, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
        self.variants[variant] = None


class Carried:
    """Starts kernels on the card for tensors in host memory, which are copied there and back.

    Tensors that share memory also share it on the card.
    """

    def __init__(self, launch: Launcher, device: torch.device) -> None:
        self._launch, self._device = launch, device

    def __call__(self, variant: KernelVariant, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
        carried: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        values: dict[str, Any] = {}
        for name, value in arguments.items():
            if not isinstance(value, torch.Tensor):
                values[name] = value
                continue
            storage = value.untyped_storage()
            if storage.data_ptr() not in carried:
                own = torch.empty(0, dtype=torch.uint8).set_(storage)
                carried[storage.data_ptr()] = own, own.to(self._device)
            there = carried[storage.data_ptr()][1].untyped_storage()
            view = torch.empty(0, dtype=value.dtype, device=self._device)
            values[name] = view.set_(there, value.storage_offset(), value.size(), value.stride())
        self._launch(variant, grid, values)
        for own, there_bytes in carried.values():
            own.copy_(there_bytes)


def variant_of(kernel: str, given: Mapping[str, Any], warps: int = 4, stages: int = 2) -> KernelVariant:
    """The kernel variant of a call, by its arguments' names: arguments in capitals that are not tensors are
    constants."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            types[name] = f"*{TRITON[value.dtype] if value.dtype is not torch.uint8 else 'u8'}"
        elif value is None or name.isupper():
            constants[name] = value
        else:
            types[name] = "fp32" if isinstance(value, (float, np.floating)) else "i32"
    return KernelVariant.of(kernel, types, constants, warps, stages)


class Jit:
    """Replaces a kernel in a module of the tests: `kernel[grid](…)` goes through a launcher."""

    def __init__(self, kernel: str, launch: Launcher) -> None:
        module, _, name = kernel.partition(".")
        function = getattr(importlib.import_module(f"transom_cuda_triton.kernels.{module}"), name)
        self._kernel, self._names, self._launch = kernel, list(function.arg_names), launch

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._start, grid)

    def _start(self, grid: tuple[int, ...], *values: Any, **named: Any) -> None:
        given = {**dict(zip(self._names, values, strict=False)), **named}
        self._launch(variant_of(self._kernel, given), grid, given)


# cases ----------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[[Launcher, np.random.Generator], float | None]
    """Returns the normalized error if it is the measure. Raises AssertionError if the card is wrong."""


@dataclass(frozen=True)
class Kit:
    """Makes the cases of one architecture in one dtype."""

    arch: int
    number: str

    def start(
        self, launch: Launcher, kernel: str, grid: tuple[int, ...], given: Mapping[str, Any], warps: int = 4,
        stages: int = 2,
    ) -> None:  # fmt: skip
        launch(variant_of(kernel, given, warps, stages), grid, given)

    def near(self, got: torch.Tensor, wanted: Any) -> float:
        array = got.float().numpy()
        error = normalized_error(array, np.asarray(wanted).reshape(array.shape))
        limit = tolerance(LONG[self.number], True).operator
        assert error <= limit, f"the normalized error is {error:.2g}, and the limit is {limit:g}"
        return error

    def tensor(self, array: Any) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(TORCH[self.number])

    def random(self, rng: np.random.Generator, *shape: int) -> tuple[torch.Tensor, Array]:
        """A tensor, and its values in float64."""
        tensor = self.tensor(rng.standard_normal(shape))
        return tensor, tensor.double().numpy()

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=TORCH[self.number])

    # attention --------------------------------------------------------------------------------------------------------
    def prefill(self, launch: Launcher, rng: np.random.Generator, **how: Any) -> float:
        calls = tests("calls")
        call = calls.Call([(0, 1), (0, 70), (199, 1), (130, 90)], **how).draw(rng, NUMPY[self.number])
        t = calls.Tensors(call, rng, TORCH[self.number])
        tile = prefill_tile(self.arch, max(call.head_dim, call.value_dim), self.number)
        given = {**t.reading, **t.values, **t.ending, **_parts(call, tile), "ROWS": tile.rows, "KEYS": tile.keys}
        grid = t.blocks * pieces(64 * call.group, tile.rows), call.kv_heads
        self.start(launch, "prefill.attend_blocks", grid, given, tile.warps, tile.stages)
        return self.near(t.out, call.wanted())

    def decode(self, launch: Launcher, rng: np.random.Generator, **how: Any) -> float:
        calls = tests("calls")
        call = calls.Call([(0, 1), (63, 1), (64, 1), (199, 1), (330, 1)], **how).draw(rng, NUMPY[self.number])
        t = calls.Tensors(call, rng, TORCH[self.number])
        tile = decode_tile(self.arch, max(call.head_dim, call.value_dim), self.number)
        rows = max(tile.rows, power_of_two(call.group))
        grid = t.blocks, call.kv_heads, int(rng.choice([1, 3, 16]))
        parts = torch.full((*grid, rows, call.value_dim), float("nan"))
        between = {"PARTS": parts, "SHARES": torch.full((*grid, 2, rows), float("nan")), "ROWS": rows}
        cut = _parts(call, tile)
        given = {**t.reading, **t.values, **cut, **between, "KEYS": tile.keys}
        self.start(launch, "decode.attend_splits", grid, given, tile.warps, tile.stages)
        values = {**t.values, **{n: v for n, v in cut.items() if n.startswith("VALUE")}}
        given = {**values, **t.ending, **between, "BLOCKS": t.lists["BLOCKS"], "splits": grid[2]}
        self.start(launch, "decode.merge_splits", grid[:2], given)
        return self.near(t.out, call.wanted())

    # rows -------------------------------------------------------------------------------------------------------------
    def norm(self, launch: Launcher, rng: np.random.Generator, add: bool) -> float:
        groups, columns = 3, 112
        width = groups * columns
        (x, x_is), (before, before_is) = (self.random(rng, 5, width) for _ in range(2))
        weight, out, residual = rng.standard_normal(columns).astype(np.float32), self.empty(5, width), before.clone()
        wide = power_of_two(columns)
        given: dict[str, Any] = {
            "X": x, "RESIDUAL": residual, "WEIGHT": torch.from_numpy(weight), "OUT": out, "rows": 5 * groups,
            "groups": groups, "columns": columns, "x_token": width, "residual_token": width, "out_token": width,
            "epsilon": 1e-5, "ROWS": max(1, 2048 // wide), "WIDTH": wide, "ADD": add,
        }  # fmt: skip
        self.start(launch, "norm.rms_norm", (pieces(5 * groups, given["ROWS"]),), given)
        total = (x_is + before_is if add else x_is).reshape(5, groups, columns).astype(np.float32)
        if add:
            self.near(residual, total)
        return self.near(out, rms_normalization.reference((total, weight), {"axis": -1, "epsilon": 1e-5})[0])

    def gate(self, launch: Launcher, rng: np.random.Generator, act: int) -> float:
        columns = 208
        (both, is_), out = self.random(rng, 3, 2 * columns), self.empty(3, columns)
        rows, width = tile_of(columns)
        given = {
            "GATE": both, "UP": both[:, columns:], "OUT": out, "rows": 3, "columns": columns,
            "gate_token": 2 * columns, "up_token": 2 * columns, "out_token": columns, "ROWS": rows, "WIDTH": width,
            "ACT": act,
        }  # fmt: skip
        self.start(launch, "gate.gate", (pieces(3, rows), pieces(columns, width)), given)
        a = torch.from_numpy(is_[:, :columns].copy())
        how = {SILU: "none", GELU: "none", GELU_TANH: "tanh"}[act]
        gated = torch.nn.functional.silu(a) if act == SILU else torch.nn.functional.gelu(a, approximate=how)
        return self.near(out, gated.numpy() * is_[:, columns:])

    def combine(self, launch: Launcher, rng: np.random.Generator, parts: str, cap: float) -> float:
        columns, factor = 144, float(rng.uniform(-3, 3))
        (x, x_is), (other, other_is) = (self.random(rng, 4, columns) for _ in range(2))
        bias, out = rng.standard_normal(columns).astype(np.float32), x.clone()
        rows, width = tile_of(columns)
        given = {
            "X": out, "BIAS": torch.from_numpy(bias), "OTHER": other, "OUT": out, "rows": 4, "columns": columns,
            "factor": factor, "cap": cap, "x_token": columns, "other_token": columns, "out_token": columns,
            "ROWS": rows, "WIDTH": width, "WITH_BIAS": "bias" in parts, "WITH_OTHER": "other" in parts,
            "CAPPED": cap > 0,
        }  # fmt: skip
        self.start(launch, "elementwise.combine", (pieces(4, rows), pieces(columns, width)), given)
        wanted = x_is * factor + ("bias" in parts) * bias + ("other" in parts) * other_is
        return self.near(out, cap * np.tanh(wanted / cap) if cap else wanted)

    def rotate(self, launch: Launcher, rng: np.random.Generator, interleaved: bool) -> float:
        heads, head, rotated = 5, 80, 32
        x, is_ = self.random(rng, 7, heads * head)
        angles = rng.random((50, rotated // 2)).astype(np.float32) * 6
        positions = rng.permutation(50)[:7].astype(np.int32)
        width = power_of_two(rotated // 2)
        given: dict[str, Any] = {
            "X": x, "POSITIONS": torch.from_numpy(positions), "COS": torch.from_numpy(np.cos(angles)),
            "SIN": torch.from_numpy(np.sin(angles)), "rows": 7 * heads, "heads": heads, "x_token": heads * head,
            "HEAD": head, "ROTATED": rotated, "INTERLEAVED": interleaved, "ROWS": max(1, 2048 // width),
            "WIDTH": width,
        }  # fmt: skip
        self.start(launch, "rotary.rotate", (pieces(7 * heads, given["ROWS"]),), given)
        attributes = {"num_heads": heads, "interleaved": int(interleaved), "rotary_embedding_dim": rotated}
        inputs = (is_[None].astype(np.float32), np.cos(angles), np.sin(angles), positions[None].astype(np.int64))
        return self.near(x, rotary_embedding.reference(inputs, attributes)[0][0])

    # weights ----------------------------------------------------------------------------------------------------------
    def _blocks(
        self, rng: np.random.Generator, rows: int, columns: int, bits: int, block: int, offset: bool
    ) -> tuple[dict[str, Any], Array]:
        """Arguments of kernels that read blocks, and the weights."""
        quants = rng.integers(0, 1 << bits, (rows, columns))
        zero = 1 << bits - 1
        scales = (rng.uniform(0.5, 1.5, (rows, columns // block)) / zero).astype(np.float16)
        offsets = rng.standard_normal(scales.shape).astype(np.float16)
        spread = scales.astype(np.float64).repeat(block, 1)
        weights = quants * spread + offsets.repeat(block, 1) if offset else (quants - zero) * spread
        given = {
            "QUANTS": torch.from_numpy(tests("calls").packed(quants, bits, block)), "SCALES": torch.from_numpy(scales),
            "OFFSETS": torch.from_numpy(offsets), "BITS": bits, "BLOCK": block, "OFFSET": offset, "ZERO": zero,
        }  # fmt: skip
        return given, weights

    def product(
        self, launch: Launcher, rng: np.random.Generator, bits: int, block: int, offset: bool, rows: int
    ) -> float:
        outputs, columns, tiles = 272, block * int(rng.integers(2, 6)), linear_tiles(self.arch, self.number)
        form, weights = self._blocks(rng, outputs, columns, bits, block, offset)
        (x, is_), out = self.random(rng, rows, columns), self.empty(rows, outputs)
        given = {
            **form, "X": x, "OUT": out, "outputs": outputs, "blocks": columns // block, "x_token": columns,
            "out_token": outputs,
        }  # fmt: skip
        if rows == 1:
            tile = tiles.few
            given |= {"OUTPUTS": tile.outputs, "WIDTH": tile.width}
            grid = 1, pieces(outputs, tile.outputs)
            self.start(launch, "linear.multiply_few", grid, given, tile.warps, tile.stages)
        else:
            tile = next((t for t in tiles.many if t.rows >= rows), tiles.many[-1])
            given |= {"rows": rows, "ROWS": tile.rows, "OUTPUTS": tile.outputs, "WIDTH": tile.width}
            grid = pieces(rows, tile.rows), pieces(outputs, tile.outputs)
            self.start(launch, "linear.multiply_many", grid, given, tile.warps, tile.stages)
        return self.near(out, is_ @ weights.T)

    def product_float8(self, launch: Launcher, rng: np.random.Generator, rows: int) -> float:
        """With several rows the activations are quantized, too; ml_dtypes quantizes the expected ones."""
        outputs, columns, tiles = 272, 16 * int(rng.integers(8, 40)), float8_tiles(self.arch)
        parts = to_float8(dense(rng.standard_normal((outputs, columns)).astype(np.float32))).load()
        codes, scales = parts.quants, parts.scales[:, 0]
        (x, left), out = self.random(rng, rows, columns), self.empty(rows, outputs)
        given = {
            "QUANTS": torch.from_numpy(codes.view(np.uint8)).view(FLOAT8), "SCALES": torch.from_numpy(scales),
            "OUT": out, "outputs": outputs, "blocks": columns // 16, "out_token": outputs, "X": x, "x_token": columns,
        }  # fmt: skip
        if rows == 1:
            tile = tiles.few
            given |= {"OUTPUTS": tile.outputs, "WIDTH": tile.width}
            grid = 1, pieces(outputs, tile.outputs)
            self.start(launch, "linear.multiply_few_float8", grid, given, tile.warps, tile.stages)
            return self.near(out, left @ (codes.astype(np.float64) * scales[:, None]).T)
        rounded = {
            "CODES": torch.zeros((rows, columns), dtype=torch.uint8).view(FLOAT8), "ROW_SCALES": torch.zeros(rows),
            "codes_token": columns,
        }  # fmt: skip
        first = {name: given[name] for name in ("X", "x_token", "blocks")} | rounded | {"WIDTH": WIDTH}
        self.start(launch, "linear.quantize_rows", (rows,), first)
        tile = next((t for t in tiles.many if t.rows >= rows), tiles.many[-1])
        second = {name: value for name, value in given.items() if name not in ("X", "x_token")} | rounded
        second |= {"rows": rows, "ROWS": tile.rows, "OUTPUTS": tile.outputs, "WIDTH": tile.width}
        grid = pieces(rows, tile.rows), pieces(outputs, tile.outputs)
        self.start(launch, "linear.multiply_many_float8", grid, second, tile.warps, tile.stages)
        most = np.abs(left).max(1, keepdims=True) / 448
        met = (left / most).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * most
        return self.near(out, met @ (codes.astype(np.float64) * scales[:, None]).T)

    def embed(self, launch: Launcher, rng: np.random.Generator, bits: int) -> float:
        vocabulary, columns, block, factor = 30, 96, 16, float(rng.uniform(0.5, 2))
        ids, out = rng.integers(0, vocabulary, 7), self.empty(7, 96)
        rows, width = tile_of(columns)
        given: dict[str, Any] = {
            "IDS": torch.from_numpy(ids), "OUT": out, "rows": 7, "columns": columns, "factor": factor,
            "out_token": columns, "ROWS": rows, "WIDTH": width,
        }  # fmt: skip
        if bits:
            form, table = self._blocks(rng, vocabulary, columns, bits, block, offset=False)
            given |= form
        else:
            given["TABLE"], table = self.random(rng, vocabulary, columns)
        kernel = "embed.embed_blocks" if bits else "embed.embed"
        self.start(launch, kernel, (pieces(7, rows), pieces(columns, width)), given)
        return self.near(out, table[ids] * factor)

    # tokens -----------------------------------------------------------------------------------------------------------
    def sample(self, launch: Launcher, rng: np.random.Generator) -> None:
        """Greedy, and a choice among the two best by a random number."""
        rows, vocabulary = 6, 1008
        logits = (3 * rng.standard_normal((rows, vocabulary))).astype(np.float32)
        drawn, tokens = rng.random(rows).astype(np.float32), torch.full((rows,), -1, dtype=torch.int64)
        temperature = np.array([0, 1, 0.5, 2, 1, 0.7], np.float32)
        given = {
            "LOGITS": torch.from_numpy(logits), "TEMPERATURE": torch.from_numpy(temperature),
            "TOP_K": torch.full((rows,), 2, dtype=torch.int32), "TOP_P": torch.ones(rows),
            "DRAWN": torch.from_numpy(drawn), "TOKENS": tokens, "vocabulary": vocabulary, "row_stride": vocabulary,
            "WIDTH": 1024,
        }  # fmt: skip
        self.start(launch, "sample.sample", (rows,), given)
        for row, t, share, token in zip(logits, temperature, drawn, tokens.tolist(), strict=True):
            best = np.sort(np.argsort(-row)[:2])
            mass = np.exp((row[best] - row.max()) / t) if t else (row[best] == row.max()).astype(np.float32)
            edge = float(mass[0] / mass.sum())
            wanted = int(best[0] if share < edge else best[1])
            assert token == wanted or abs(share - edge) < 1e-4, f"{token} was sampled, and {wanted} is right"


def _parts(call: Any, tile: Any) -> dict[str, int]:
    head, value = tile.head_parts(call.head_dim), tile.value_parts(call.value_dim)
    return dict(zip(("HEAD", "HEAD_REST", "VALUE", "VALUE_REST"), (*head, *value), strict=True))


def append(launch: Launcher, rng: np.random.Generator, head: int, rotated: int, interleaved: bool, number: str) -> None:
    """Rotation, pages and nodes, as in tests/cuda_triton/test_append.py."""
    module = tests("test_append")
    module.append = Jit("append.append", launch)  # type: ignore[attr-defined]
    module.test_keys_are_rotated_and_nodes_follow(head, rotated, interleaved, TORCH[number], rng)


def routing(launch: Launcher, rng: np.random.Generator, kind: str) -> None:
    """The choice of dynamic sparse attention, as in tests/cuda_triton/test_routing.py."""
    import pytest

    module = tests("test_routing")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "interpret", launch)
        if isinstance(launch, Noted):
            patch.setattr(module.Layer, "check", lambda *given: None)
        module.test_the_choice_is_the_references(kind, rng, patch)


def cases(arch: int, dry: bool, quick: bool) -> Iterator[Case]:
    """All cases; in a dry run one of each kind."""
    kinds: dict[str, dict[str, Any]] = tests("calls").KINDS
    rule = tests("calls").RULE
    numbers = ["fp32"] if dry else ["fp16", "fp32"] if arch < 80 else ["fp16", "bf16", "fp32"]
    for number in numbers:
        kit = Kit(arch, number)
        for what, run in (("prefill", kit.prefill), ("decode", kit.decode)):
            for kind in ("sparse",) if dry else EXACT if number == "fp32" else kinds:
                yield Case(f"{what}, {kind}, {number}", partial(_keyed, run, kinds[kind]))
            for head in HEADS if number == "fp16" and not quick else ():
                how = {"head_dim": head, "value_dim": head, "kv_heads": 1, "group": 3, "policy": rule}
                yield Case(f"{what}, heads of {head}, {number}", partial(_keyed, run, how))
            if not dry:  # the most common in real models
                how = {"head_dim": 128, "value_dim": 128, "group": 4, "policy": rule}
                yield Case(f"{what}, heads of 128 in fours, {number}", partial(_keyed, run, how))
        yield from _row_cases(kit, dry)
    for i, (head, rotated) in enumerate([(64, 32)] if dry else [(16, 16), (64, 32), (80, 80), (96, 48)]):
        for number in ("fp32",) if dry else ("fp32", "fp16"):
            how = {"head": head, "rotated": rotated, "interleaved": bool(i % 2), "number": number}
            yield Case(f"append, heads of {head}, {number}", partial(_keyed, append, how))
    for kind in ROUTINGS[:1] if dry else ROUTINGS[:3] if quick else ROUTINGS:
        yield Case(f"routing, {kind}", partial(_keyed, routing, {"kind": kind}))


def _row_cases(kit: Kit, dry: bool) -> Iterator[Case]:
    found: list[tuple[str, Callable[..., float | None], dict[str, Any]]] = [
        *(("norm", kit.norm, {"add": add}) for add in (False, True)),
        *(("gate", kit.gate, {"act": act}) for act in (SILU, GELU, GELU_TANH)),
        ("combine", kit.combine, {"parts": "bias and other", "cap": 0.0}),
        ("combine", kit.combine, {"parts": "", "cap": 3.0}),
        *(("rotate", kit.rotate, {"interleaved": pairs}) for pairs in (False, True)),
        *(("embed", kit.embed, {"bits": bits}) for bits in (0, 4, 8)),
        *(
            ("product", kit.product, {"bits": bits, "block": block, "offset": offset, "rows": rows})
            for bits, block, offset in ((4, 32, False), (4, 128, True), (8, 32, False))
            for rows in ((1, 33) if dry else (1, 3, 33, 130))
        ),
        ("sample", kit.sample, {}),
    ]
    if kit.arch in (INTERPRETER, *FLOAT8_ARCHITECTURES):
        found += [
            ("product in float8", kit.product_float8, {"rows": rows}) for rows in (1, 33) + (() if dry else (3, 130))
        ]
    for what, run, how in found:
        said = ", ".join([what, *(f"{n} {v}" for n, v in how.items() if v != ""), kit.number])
        yield Case(said, partial(_keyed, run, how))


def _keyed(run: Callable[..., float | None], how: dict[str, Any], launch: Launcher, rng: np.random.Generator) -> Any:
    return run(launch, rng, **how)


def run(bench: GpuBench) -> None:
    """Compile all kernels that the cases need, and run the cases."""
    found = list(cases(bench.card.arch, bench.dry, bench.quick))
    own: dict[str, list[KernelVariant]] = {}
    for i, case in enumerate(found):
        noted = Noted()
        if not bench.dry:
            try:
                case.run(noted, np.random.default_rng([bench.seed, i]))
            except Exception as e:  # noqa: BLE001  nothing was computed; a broken case fails again below
                if not noted.variants:
                    bench.say(f"{case.name} requests no kernel: {first_line(e)}")
        own[case.name] = list(noted.variants)
    variants = [v for of in own.values() for v in of]
    bench.say(f"{len(found)} cases, {len(set(variants))} kernels to compile")
    bench.card.compile(variants, max(0.0, bench.clock.left - 15))
    for i, case in enumerate(found):
        if bench.clock.left <= 1:
            bench.check(case.name, "left out", "there was no time")
            continue
        missing = [v.kernel for v in own[case.name] if v not in bench.card.known]
        if missing and not bench.dry:
            bench.check(case.name, "left out", f"there was no time to compile {missing[0]}")
            continue
        try:
            starting = bench.card.launcher(own[case.name], 0.0)
            error = case.run(Carried(starting, bench.card.device), np.random.default_rng([bench.seed, i]))
            bench.card.synchronize()
            bench.check(case.name, "passed", error=error)
            if not bench.dry:
                starting.close()  # type: ignore[attr-defined]
        except ModuleNotFoundError as e:
            bench.check(case.name, "left out", f"{e.name} is not installed")
        except Exception as e:  # noqa: BLE001  on any error, the card did not compute the right result
            bench.check(case.name, "failed", first_line(e))
    counts = {o: sum(c["outcome"] == o for c in bench.document.checks) for o in ("passed", "failed", "left out")}
    bench.say(", ".join(f"{n} {o}" for o, n in counts.items()))

"""Every operator of the native library but attention alone, against NumPy in float64, on every instruction set of this
processor. Attention is in test_attention_kernels.py.

Draws: bounds are those of sums over the columns in the arithmetic at hand, and of half a step of each code.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from levels import LEVELS, pytestmark  # noqa: F401  pytest reads the mark from here
from programs import (
    FORMS,
    Draft,
    Machine,
    blocks_for,
    exact,
    gated,
    linear,
    matrix,
    narrowed,
)

from transom.errors import EngineError
from transom.graph.weights import Blocked, affine, dequantize
from transom.programs.written import View
from transom_openvino_cpu.native.layout import QUANT_BITS, matrix_bytes
from transom_openvino_cpu.native.packing import bits_of
from transom_openvino_cpu.native.program import ACTIVATIONS

Array = np.ndarray[Any, np.dtype[Any]]

EXACT = 4e-6
"""Error of a sum of products in float32, over the norms of its two sides."""
ROUNDING = 2.0**-8
"""Relative error of a number that was rounded to bfloat16."""

each_level = pytest.mark.parametrize("level", LEVELS)
each_form = pytest.mark.parametrize("form", FORMS)


def _size(rng: np.random.Generator, highest: int, step: int = 1) -> int:
    return int(rng.integers(1, highest // step + 1)) * step


def _rows(rng: np.random.Generator) -> int:
    """A number of tokens: one to four have code of their own, from 32 on tokens are cut into blocks."""
    return int(rng.choice([1, 2, 3, 4, 5, 8, 31, 32, 33, int(rng.integers(34, 200))]))


def _close(got: Array, table: Array, weight: Array, allowed: Any = 0.0) -> bool:
    """Whether `got` is the product, but for what float32 rounds and what is allowed besides."""
    size = np.linalg.norm(table, axis=1)[:, None] * np.linalg.norm(weight, axis=1)
    return bool((np.abs(got - table.astype(np.float64) @ weight.T) <= EXACT * size + allowed).all())


def _block(rng: np.random.Generator, form: str) -> tuple[int, int]:
    """Columns and block of a matrix; columns of a plain one may be odd."""
    if "int" not in form:
        return _size(rng, 700), 1
    columns = _size(rng, 1280, 8 if rng.random() < 0.3 else 64)
    return columns, int(rng.choice(blocks_for(columns)))


# ------------------------------------------------------------------------------------------------------------- matrices
@each_level
@each_form
def test_an_embedding_gives_back_the_stored_numbers(form: str, level: str, rng: np.random.Generator) -> None:
    columns, block = _block(rng, form)
    rows = _size(rng, 70)
    weight = matrix(rng, form, rows, columns, block)
    draft = Draft()
    out = draft.buffer(columns)
    draft.add("embed", out, columns, matrix=draft.matrix(weight))
    with Machine(draft.program(out), level) as machine:
        got = machine.rows(rows)
    stored = dequantize(weight)
    plain = not isinstance(weight, Blocked) or not weight.has_minimums
    wide = isinstance(weight, Blocked) and weight.scale_dtype == "float32"
    exact = plain or not (isinstance(weight, Blocked) and (weight.has_zero_points or wide))
    if exact and "wide scales, zero points" not in form:  # there a float32 scale is multiplied twice
        assert np.array_equal(got.astype(np.float32).view(np.uint32), stored.view(np.uint32))
    assert np.allclose(got, stored, rtol=1e-6, atol=1e-6 * columns**-0.5)


@pytest.mark.parametrize(
    ("form", "block", "bits"),
    [
        ("int8, of 4 bits", 8, 4),
        ("int8, of 5 bits", 32, 5),
        ("int8, of 5 bits", 16, 6),  # planes of the fifth bits have 32 columns
        ("int8, of 6 bits", 16, 6),
        ("int8, of 6 bits", 8, 8),
        ("int8", 32, 8),
        ("uint8, of 5 bits, wide minimums", 64, 5),
        ("uint8, of 6 bits, minimums", 32, 6),
        ("int8, of 5 bits, zero points", 32, 8),  # a zero point may need all bits
        ("uint4", 32, 4),
    ],
)
def test_quants_take_as_few_bits_as_hold_all_of_them(
    form: str, block: int, bits: int, rng: np.random.Generator
) -> None:
    weight = matrix(rng, form, 48, 320, block, extreme=True)
    assert isinstance(weight, Blocked)
    draft = Draft()
    draft.matrix(weight)
    made = draft.matrices[0]
    assert QUANT_BITS[made.kind] == bits
    scale = (4 if made.wide_scales else 2) * (2 if made.has_minimums else 1)
    assert matrix_bytes(made) == len(draft.weights.getvalue()) == 48 * 320 * bits // 8 + 48 * 320 // block * scale


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("form", [form for form in FORMS if "two levels" in form])
def test_scales_of_two_levels_take_a_byte_and_a_share_of_a_half(
    form: str, block: int, rng: np.random.Generator
) -> None:
    draft = Draft()
    draft.matrix(matrix(rng, form, 48, 512, block, extreme=True))
    made = draft.matrices[0]
    assert made.outer == 16 * block
    codes = 48 * 512 // block * (2 if made.has_minimums else 1)
    halves = 48 * 512 // made.outer * 4  # the place of the minimums is there without them, too
    assert matrix_bytes(made) == len(draft.weights.getvalue()) == 48 * 512 * QUANT_BITS[made.kind] // 8 + codes + halves


@each_level
@pytest.mark.parametrize("form", [form for form in FORMS if "two levels" in form])
@pytest.mark.parametrize("by", ["f32", "int8", "bf16"])
def test_scales_of_two_levels_give_the_same_bits_as_their_products(
    by: str, form: str, level: str, rng: np.random.Generator
) -> None:
    """A scale and a minimum are exact in float32, whichever way they are stored."""
    for count in (int(rng.integers(1, 5)), int(rng.integers(5, 70))):
        columns, block = 256 * _size(rng, 4), int(rng.choice([16, 32]))
        two = matrix(rng, form, _size(rng, 120), columns, block)
        assert isinstance(two, Blocked)
        assert two.outer
        one, table = replace(two, outer=0), rng.standard_normal((count, columns))
        got = []
        for weight in (one, two):
            with Machine(linear(weight, table, by=by, local=bool(rng.random() < 0.5)), level) as machine:
                got.append(machine.rows(count))
        assert np.array_equal(*got), (count, two.shape, block)


@each_level
@pytest.mark.parametrize("count", [1, 3, 40])
def test_a_matrix_may_be_rounded_to_bfloat16_or_int8_on_its_way_into_the_file(
    level: str, count: int, rng: np.random.Generator
) -> None:
    columns = _size(rng, 300, 8)
    weight = matrix(rng, str(rng.choice(["float32", "float16"])), _size(rng, 70), columns)
    table = rng.standard_normal((count, columns))
    with Machine(linear(weight, table, narrow=True), level) as machine:
        assert _close(machine.rows(count), table, narrowed(exact(weight)))
    with Machine(linear(weight, table, to_int8=True), level) as machine:
        got = machine.rows(count)
    # Half a step of every group of 64 columns, and what float16 does to the step.
    group = next(g for g in (64, 32, 16, 8) if columns % g == 0)
    most = np.abs(exact(weight)).reshape(-1, columns // group, group).max(-1)
    allowed = np.abs(table) @ np.repeat(most * (0.5 / 127 * 1.001 + 2.0**-11), group, -1).T
    assert _close(got, table, exact(weight), allowed)


@each_level
@each_form
def test_a_product_with_floats(form: str, level: str, rng: np.random.Generator) -> None:
    for _ in range(3):
        count, (columns, block) = _rows(rng), _block(rng, form)
        weight = matrix(rng, form, _size(rng, 250), columns, block)
        table = rng.standard_normal((count, columns)).astype(np.float32)
        with Machine(linear(weight, table, local=bool(rng.random() < 0.5)), level) as machine:
            assert _close(machine.rows(count), table, exact(weight)), (count, weight.shape, block)


@each_level
@pytest.mark.parametrize(
    "product",
    [
        ("bfloat16", "bf16"),
        *((f, "f32") for f in FORMS),
        *((f, by) for f in FORMS if "int" in f for by in ("int8", "bf16")),
    ],
)
def test_a_product_adds_a_bias_and_a_residual(product: tuple[str, str], level: str, rng: np.random.Generator) -> None:
    form, by = product
    count, (columns, block), rows = _rows(rng), _block(rng, form), _size(rng, 130)
    weight, local = matrix(rng, form, rows, columns, block), bool(rng.random() < 0.5)
    table = rng.standard_normal((count, columns))
    bias, residual = rng.standard_normal(rows).astype(np.float32), rng.standard_normal((count, rows)).astype(np.float32)
    with Machine(linear(weight, table, by=by, local=local), level) as machine:
        plain = machine.rows(count)
    with Machine(linear(weight, table, by=by, bias=bias, local=local), level) as machine:
        assert np.allclose(machine.rows(count), plain + bias, rtol=1e-6, atol=1e-6)
    with Machine(linear(weight, table, by=by, bias=bias, residual=residual, local=local), level) as machine:
        assert np.allclose(machine.rows(count), plain + bias + residual, rtol=1e-6, atol=1e-6)


@each_level
@pytest.mark.parametrize("act", ACTIVATIONS[1:])
@pytest.mark.parametrize("by", ["f32", "int8", "bf16"])
def test_a_gate_and_what_it_multiplies_are_made_in_one_product(
    act: str, by: str, level: str, rng: np.random.Generator
) -> None:
    form = str(rng.choice([f for f in FORMS if "int" in f or (by == "bf16" and f == "bfloat16")]))
    count, (columns, block), tiles = _rows(rng), _block(rng, form), _size(rng, 9)
    weight, local = matrix(rng, form, 32 * tiles, columns, block), bool(rng.random() < 0.5)
    table = 3 * rng.standard_normal((count, columns))
    with Machine(linear(weight, table, by=by, local=local), level) as machine:
        both = machine.rows(count).reshape(count, tiles, 2, 16)
    with Machine(linear(weight, table, by=by, act=act, local=local), level) as machine:
        got = machine.rows(count)
    wanted = gated(act, both[:, :, 0], both[:, :, 1]).reshape(count, -1)
    assert np.allclose(got, wanted, rtol=1e-5, atol=1e-6 * np.abs(both).max() ** 2)


@each_level
def test_a_product_with_bfloat16_rounds_its_input_and_nothing_else(level: str, rng: np.random.Generator) -> None:
    for _ in range(6):
        count, columns = _rows(rng), _size(rng, 700)
        weight = matrix(rng, "bfloat16", _size(rng, 250), columns)
        table = rng.standard_normal((count, columns))
        with Machine(linear(weight, table, by="bf16", local=bool(rng.random() < 0.5)), level) as machine:
            assert _close(machine.rows(count), narrowed(table), exact(weight)), (count, weight.shape)


@each_level
@pytest.mark.parametrize("form", [form for form in FORMS if "int" in form])
def test_a_product_of_blocks_with_bfloat16_rounds_its_input_and_nothing_else(
    form: str, level: str, rng: np.random.Generator
) -> None:
    """Quants are exact as bfloat16, and scales meet sums in float32. Only AMX rounds weights, too."""
    for count in (int(rng.integers(1, 5)), int(rng.integers(5, 70)), 300):
        columns, block = _block(rng, form)
        weight = matrix(rng, form, _size(rng, 250), columns, block)
        table = rng.standard_normal((count, columns)).astype(np.float32)
        with Machine(linear(weight, table, by="bf16", local=bool(rng.random() < 0.5)), level) as machine:
            got = machine.rows(count)
        wanted = cut(weight) if level == "amx" else exact(weight)
        assert _close(got, narrowed(table), wanted), (count, weight.shape, block)


UP = np.float32(1 + 1 / 384)
"""See `src/tiled_linear.inl`."""


def cut(weight: Blocked) -> Array:
    """The weights that the tiles of AMX multiply: computed in float32, enlarged by half a unit in the last place of
    bfloat16, give or take a sixth, and cut to bfloat16."""
    parts = weight.load()
    centre = 0 if weight.dtype.startswith("u") else 1 << bits_of(weight, parts) - 1  # quants are stored unsigned
    scales, minimums, zero = affine(parts, centre)
    quants = (parts.quants.astype(np.float64) + centre).reshape(*scales.shape, weight.block)
    d = scales.astype(np.float32) * UP
    least = (-d.astype(np.float64) * zero + (0 if minimums is None else minimums.astype(np.float32) * UP)).astype(
        np.float32
    )
    numbers = quants * d[..., None].astype(np.float64) + least[..., None]
    whole: Array = (numbers.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    return whole.reshape(weight.shape)


@pytest.mark.parametrize("form", [form for form in FORMS if "int" in form])
def test_cutting_loses_two_thirds_of_a_unit_in_the_last_place_at_most(form: str, rng: np.random.Generator) -> None:
    weight = matrix(rng, form, 200, *_block(rng, form))
    wanted = exact(weight)
    parts = weight.load()
    scales, minimums, zero = affine(parts, 0)
    # Where a quant times its scale and the minimum cancel, what float32 loses in them is left.
    terms = np.abs(scales.astype(np.float64)) * (256 + abs(zero)) + (0 if minimums is None else np.abs(minimums))
    unit = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(wanted), 1e-30))) - 7)
    allowed = 2 / 3 * unit + 4e-7 * np.repeat(terms, weight.block, 1)
    assert (np.abs(cut(weight) - wanted) <= allowed).all()


def _minimums_allowed(weight: Blocked, table: Array) -> Array:
    """What may be lost where the minimums of blocks and sums over them meet as bfloat16."""
    quants, scales, minimums, zeros, _ = weight.load()
    least = np.zeros(scales.shape) if minimums is None else minimums.astype(np.float64)
    wide = scales.astype(np.float64)
    centre = 1 << bits_of(weight, weight.load()) - 1 if weight.dtype.startswith("u") else 0
    if zeros is not None and (zeros != zeros.flat[0]).any():
        least = least - wide * zeros
    elif minimums is None:
        return np.zeros((len(table), len(quants)))
    else:
        least = least - wide * (0 if zeros is None else zeros.flat[0].astype(float))
    least = least + wide * centre
    size = 8  # the finest that sums may be taken over, in columns
    sums = np.abs(table.reshape(len(table), -1, size).sum(-1)).reshape(len(table), scales.shape[1], -1).sum(-1)
    return 2.02 * ROUNDING * sums @ np.abs(least).T


@each_level
@pytest.mark.parametrize("form", [form for form in FORMS if "int" in form])
def test_products_of_integers_are_exact(form: str, level: str, rng: np.random.Generator) -> None:
    """Numbers that int8 can hold are rounded by nobody, whatever shares a scale, and no sum of integers saturates."""
    for extreme in (False, True):
        count, (columns, block) = _rows(rng), _block(rng, form)
        weight = matrix(rng, form, _size(rng, 250), columns, block, extreme=extreme)
        whole = rng.integers(-127, 128, (count, columns))
        if extreme:
            whole = np.where(whole < 0, -127, 127)
        whole[:, ::8] = rng.choice([-127, 127], whole[:, ::8].shape)  # the largest of every group
        table = whole * 2.0 ** rng.integers(-8, 4, (count, 1))
        with Machine(linear(weight, table, by="int8", local=bool(rng.random() < 0.5)), level) as machine:
            got = machine.rows(count)
        assert isinstance(weight, Blocked)
        assert _close(got, table, exact(weight), _minimums_allowed(weight, table)), (count, weight.shape, block)


@each_level
@pytest.mark.parametrize("form", [form for form in FORMS if "int" in form])
def test_activations_are_rounded_to_int8_in_groups_of_32_or_less(
    form: str, level: str, rng: np.random.Generator
) -> None:
    for _ in range(3):
        count, (columns, block) = _rows(rng), _block(rng, form)
        weight = matrix(rng, form, _size(rng, 250), columns, block)
        table = rng.standard_normal((count, columns)) * np.exp(rng.standard_normal((1, columns)))
        with Machine(linear(weight, table, by="int8", local=bool(rng.random() < 0.5)), level) as machine:
            got = machine.rows(count)
        if block >= 32:
            group = 32 if block % 32 == 0 else 8
        else:
            group = 32 if 32 % block == 0 and columns % 32 == 0 else block
        most = np.repeat(np.abs(table).reshape(count, -1, group).max(-1), group, -1)
        assert isinstance(weight, Blocked)
        allowed = most * (0.5 / 127 * 1.0001) @ np.abs(exact(weight)).T + _minimums_allowed(weight, table) * 1.1
        # A step more for what the rounding of activations adds to the sums that meet the minimums.
        allowed += ROUNDING * most @ np.abs(exact(weight)).T / 127
        assert _close(got, table, exact(weight), allowed), (count, weight.shape, block)


# ------------------------------------------------------------------------------------------------ operators on each row
def _through(
    kind: str, table: Array, level: str, rng: np.random.Generator, second: Array | None = None, **fields: Any
) -> Array:
    """One operator on the rows of a table, in place or into a buffer of its own."""
    draft = Draft()
    x = draft.rows(table)
    if second is not None:
        fields["b"] = draft.rows(second)
    out = draft.buffer(table.shape[1])
    if rng.random() < 0.5:
        draft.add(kind, x, table.shape[1], a=x, **fields)
        draft.add("scale", out, table.shape[1], a=x, scale=1.0)
    else:
        draft.add(kind, out, table.shape[1], a=x, **fields)
    with Machine(draft.program(out), level) as machine:
        return machine.rows(len(table))


@each_level
def test_sums_products_and_caps_of_rows(level: str, rng: np.random.Generator) -> None:
    for _ in range(4):
        count, width = _rows(rng), _size(rng, 500)
        a, b = (rng.standard_normal((count, width)).astype(np.float32) * 4 for _ in range(2))
        vector, factor = rng.standard_normal(width).astype(np.float32), float(np.float32(rng.uniform(0.5, 30)))
        wide = a.astype(np.float64)
        assert np.allclose(_through("add", a, level, rng, b), wide + b, rtol=1e-6, atol=1e-6)
        assert np.allclose(_through("bias", a, level, rng, vector=vector), wide + vector, rtol=1e-6, atol=1e-6)
        assert np.allclose(_through("scale", a, level, rng, scale=factor), wide * factor, rtol=1e-6)
        capped = _through("softcap", a, level, rng, scale=factor)
        assert np.allclose(capped, factor * np.tanh(wide / factor), rtol=2e-6, atol=1e-6 * factor)
        for act in ACTIVATIONS[1:]:
            got = _through("glu", a, level, rng, b, act=act)
            assert np.allclose(got, gated(act, wide, b.astype(np.float64)), rtol=2e-6, atol=2e-6 * 16), act


@each_level
def test_activations_of_very_large_numbers_are_finite(level: str, rng: np.random.Generator) -> None:
    a = np.array([[0, 1e-30, -1e-30, 20, -20, 88, -88, 95, -95, 1e4, -1e4, 1e8, -1e8, 3e12, -3e12, 1]], np.float32)
    for act in ACTIVATIONS[1:]:
        got = _through("glu", a, level, rng, np.ones_like(a), act=act)
        assert np.allclose(got, np.where(a > 20, a, np.where(a < -20, 0, got)), rtol=1e-6, atol=1e-5), act
    assert np.allclose(_through("softcap", a, level, rng, scale=5.0)[0, 9:15], [5, -5] * 3)


@each_level
def test_a_norm_divides_each_part_of_a_row_by_its_root_mean_square(level: str, rng: np.random.Generator) -> None:
    for _ in range(4):
        count, width, groups = _rows(rng), _size(rng, 300, 16), _size(rng, 5)
        table = (rng.standard_normal((count, width * groups)) * 10.0 ** rng.integers(-3, 4, (count, 1))).astype(
            np.float32
        )
        gain, epsilon = rng.standard_normal(width).astype(np.float32), float(np.float32(10.0 ** rng.integers(-7, -3)))
        got = _through("norm", table, level, rng, vector=gain, groups=groups, scale=epsilon)
        parts = table.astype(np.float64).reshape(count, groups, width)
        wanted = parts / np.sqrt((parts**2).mean(-1, keepdims=True) + epsilon) * gain
        assert np.allclose(got, wanted.reshape(count, -1), rtol=3e-6, atol=1e-6)


def _angles(frequencies: Array, positions: Array) -> Array:
    """In float32, as graphs have them."""
    return (positions.astype(np.float32)[:, None] * frequencies.astype(np.float32)).astype(np.float64)


@each_level
def test_a_rotation_turns_the_first_columns_of_each_head(level: str, rng: np.random.Generator) -> None:
    for _ in range(4):
        count, heads, dim = _rows(rng), _size(rng, 6), _size(rng, 256, 16)
        turned, past, factor = _size(rng, dim // 2), int(rng.integers(0, 3000)), float(np.float32(rng.uniform(0.5, 2)))
        table = rng.standard_normal((count, heads * dim)).astype(np.float32)
        draft = Draft()
        x, frequencies = draft.rows(table), (1e4 ** -rng.uniform(0, 1, turned)).astype(np.float32)
        draft.rope(rng.uniform(0, 1, _size(rng, 40)).astype(np.float32), 1.0)  # another one in front
        draft.add("rope", View(-1), heads * dim, a=x, groups=heads, index=draft.rope(frequencies, factor))
        out = draft.buffer(heads * dim)
        draft.add("scale", out, heads * dim, a=x, scale=1.0)
        with Machine(draft.program(out), level) as machine:
            tokens = np.arange(count, dtype=np.int64)
            got = machine.engine.step([tokens], [past], [[0] * 99], list(range(count))).reshape(count, heads, dim)
        wanted, angle = table.astype(np.float64).reshape(count, heads, dim), _angles(frequencies, past + tokens)
        cosine, sine = (factor * wave(angle)[:, None] for wave in (np.cos, np.sin))
        a, b = wanted[..., :turned].copy(), wanted[..., turned : 2 * turned].copy()
        wanted[..., :turned], wanted[..., turned : 2 * turned] = a * cosine - b * sine, b * cosine + a * sine
        assert np.allclose(got, wanted, rtol=1e-6, atol=3e-6)


@each_level
def test_only_the_rows_asked_for_go_on(level: str, rng: np.random.Generator) -> None:
    for _ in range(4):
        count, width = _rows(rng), _size(rng, 200)
        table = rng.standard_normal((count, width)).astype(np.float32)
        draft = Draft()
        with Machine(draft.program(draft.rows(table, scale=2.0)), level) as machine:
            for size in (0, 1, count // 2, count, 2 * count):
                rows = rng.integers(0, count, size).tolist()
                got = machine.engine.step([np.arange(count)], [0], [[0] * 4], rows)
                assert np.array_equal(got, 2 * table[rows])


@each_level
@pytest.mark.parametrize("by", ["f32", "int8", "bf16"])
def test_what_is_no_number_is_not_lost_in_a_product(by: str, level: str, rng: np.random.Generator) -> None:
    """Whatever its bits; and it stays in its row: all rows are computed, and each is asked for alone."""
    form = "bfloat16" if by == "bf16" else str(rng.choice([form for form in FORMS if "int" in form]))
    odd = np.array([0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7F80FFFF], np.uint32)
    for count in (1, 4, 7, 40):
        columns, block = _block(rng, form)
        table = rng.standard_normal((count, columns)).astype(np.float32)
        spoilt = rng.random(count) < 0.5
        for row in np.flatnonzero(spoilt):
            table[row, rng.integers(columns)] = rng.choice(odd).view(np.float32)
        weight = matrix(rng, form, _size(rng, 70), columns, block)
        with Machine(linear(weight, table, by=by), level) as machine:
            for row in range(count):
                lost = pytest.raises(EngineError, match="not finite") if spoilt[row] else nullcontext()
                with lost:
                    got = machine.engine.step([np.arange(count)], [0], [[0]], [row])
                    assert np.isfinite(got).all(), (form, count, columns, block)


@each_level
def test_very_small_and_very_large_numbers_pass_through_int8(level: str, rng: np.random.Generator) -> None:
    for size in (1e-42, 1e-38, 1e-36, 1e30):
        table = (rng.standard_normal((7, 128)) * size).astype(np.float32)
        weight = matrix(rng, "int4", 16, 128)
        with Machine(linear(weight, table, by="int8"), level) as machine:
            got = machine.rows(7)
        assert np.allclose(got, table @ exact(weight).T, rtol=0, atol=0.05 * size if size > 1e-30 else 1e-30)

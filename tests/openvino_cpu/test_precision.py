"""What `precision=` becomes on which CPU, for which checkpoint."""

from __future__ import annotations

from typing import Any

import pytest

from transom.contract import Device
from transom.errors import OptionError
from transom.graph import Blocked, Dense, Weight
from transom_openvino_cpu.precision import CpuPrecision, ProductForm, dynamic_group, form_of, resolve


def cpu(*features: str) -> Device:
    return Device("cpu", "cpu", "x86_64", 2**34, features=frozenset(features))


def nothing() -> Any:
    raise AssertionError("no weight is read to choose a precision")


def blocked(dtype: Any = "uint4", *, block: int = 32, minimums: bool = False, rows: int = 64) -> Blocked:
    return Blocked((rows, 256), block, dtype, "float16", nothing, has_minimums=minimums)


DENSE = Dense((64, 256), "float16", nothing)
BF16, VNNI = "avx512_bf16", "avx512_vnni"


@pytest.mark.parametrize(
    ("features", "matrix", "name", "hint"),
    [
        ((VNNI, BF16), blocked(), "int8", "bf16"),
        ((VNNI,), blocked(), "int8", "f32"),
        (("avx2",), blocked(), "exact", "f32"),
        ((VNNI, BF16), DENSE, "bf16", "bf16"),
        ((VNNI,), DENSE, "exact", "f32"),
    ],
)
def test_auto_goes_by_features_and_checkpoint(features: tuple[str, ...], matrix: Weight, name: str, hint: str) -> None:
    chosen = resolve({}, cpu(*features), [matrix], decoder=True)
    assert (chosen.name, chosen.hint) == (name, hint)


def test_auto_runs_a_graph_that_is_no_decoder_exactly() -> None:
    assert resolve({"precision": "auto"}, cpu(VNNI, BF16), [blocked()], decoder=False).name == "exact"


@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_arithmetic_that_the_cpu_lacks_is_refused_with_a_way_out(name: str) -> None:
    with pytest.raises(OptionError, match=f"precision='{name}' needs a CPU with") as caught:
        resolve({"precision": name}, cpu(VNNI), [DENSE], decoder=True)
    assert caught.value.fix


def test_int4_of_a_checkpoint_that_has_none_is_refused() -> None:
    assert resolve({"precision": "int4"}, cpu(VNNI), [blocked()], decoder=True).name == "int4"
    with pytest.raises(OptionError, match="has none"):
        resolve({"precision": "int4"}, cpu(VNNI), [DENSE, blocked("int8")], decoder=True)


def test_an_unknown_precision_is_refused_with_the_known_ones() -> None:
    with pytest.raises(OptionError, match="exact, fast"):
        resolve({"precision": "int9"}, cpu(), [], decoder=True)


FAST = CpuPrecision("int8", "bf16", True)


def test_integer_blocks_are_never_rounded_again() -> None:
    assert form_of(blocked("int4"), FAST) == ProductForm("stored", 32)
    assert form_of(blocked("uint4", block=128), FAST) == ProductForm("stored", 128)
    assert form_of(blocked("int8"), FAST) == ProductForm("stored", 32)


def test_blocks_that_products_of_integers_cannot_take_become_int8() -> None:
    assert form_of(blocked(minimums=True), FAST) == ProductForm("int8", 64)
    assert form_of(blocked("int8", block=16), FAST) == ProductForm("int8", 64)


def test_plain_matrices_are_rounded_only_when_asked() -> None:
    assert form_of(DENSE, FAST).kind == "stored"
    assert form_of(DENSE, CpuPrecision("int8", "bf16", True, dense_to_int8=True)).kind == "int8"


def test_nothing_is_rounded_where_activations_are_not() -> None:
    for weight in (blocked(minimums=True), DENSE):
        assert form_of(weight, CpuPrecision("bf16", "bf16", False)).kind == "stored"


def test_the_group_of_activations_is_that_of_most_weights() -> None:
    large, small = blocked(minimums=True, rows=900), blocked(rows=100)
    assert dynamic_group([(large, ProductForm("int8", 64)), (small, ProductForm("stored", 32))]) == 64
    assert dynamic_group([(small, ProductForm("int8", 64)), (large, ProductForm("stored", 32))]) == 32
    assert dynamic_group([(DENSE, ProductForm("stored", 0))]) == 0

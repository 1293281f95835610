"""The registry: what may be registered, and what is found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from transom.ops import OpSchema, find, operators, register
from transom.ops import registry as registry_module
from transom.ops.cached_attention import SCHEMA


@pytest.fixture(autouse=True)
def _restored_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry_module, "_REGISTRY", dict(registry_module._REGISTRY))
    return


def test_third_party_operator_is_found_after_registering() -> None:
    theirs = replace(SCHEMA, domain="com.example", name="TheirAttention")
    assert find("com.example", "TheirAttention") is None
    register(theirs)
    assert find("com.example", "TheirAttention") is theirs
    assert theirs in operators()


@pytest.mark.parametrize("part", ["infer", "body", "samples"])
def test_third_party_operator_without_a_part_is_refused_with_what_it_lacks(part: str) -> None:
    with pytest.raises(ValueError, match="needs a shape rule, a function body and samples"):
        register(replace(SCHEMA, domain="com.example", name="Half", **{part: None}))


def test_one_name_is_registered_once() -> None:
    register(SCHEMA)  # the same schema again is no conflict
    with pytest.raises(ValueError, match="registered twice"):
        register(replace(SCHEMA))


def test_any_operator_of_onnx_is_found_and_both_names_of_its_domain_are_one() -> None:
    found = find("", "Einsum")
    assert isinstance(found, OpSchema)
    assert find("ai.onnx", "Einsum") == found
    assert find("ai.onnx.ml", "LabelEncoder") is not None
    assert find("", "NoSuchOperator") is None


def test_operators_come_in_a_steady_order_with_onnx_first() -> None:
    keys = [s.key for s in operators()]
    assert keys == sorted(keys)
    assert len(set(keys)) == len(keys)

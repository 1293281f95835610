"""The memory plan: its sizes, reduced contexts, refusals and the settings that would fit."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from made_up import CPU

from transom.errors import DoesNotFit, OptionError
from transom.preparation import memory
from transom.preparation.memory import plan, size, weight_bytes
from transom.signature import Decoder, LayerCache

GB = 10**9
LAYER = LayerCache(q_heads=32, kv_heads=8, head_dim=128, value_dim=128)
LLAMA = Decoder("llama", 128_000, 4096, 131_072, (LAYER,) * 32, parameters=8 * GB, weight_bytes=16 * GB)
PER_TOKEN = 32 * 8 * 256 * 2


def having(free: int | None, memory_bytes: int = 1 << 40) -> memory.Device:
    return replace(CPU, free_bytes=free, memory_bytes=memory_bytes)


def test_a_plan_has_its_parts_and_the_model_s_own_context_where_it_fits() -> None:
    made = plan(LLAMA, having(64 * GB), context=None)
    assert (made.weights, made.context, made.note) == (16 * GB, 131_072, "")
    assert made.cache == 131_072 * PER_TOKEN
    assert made.total == made.weights + made.cache + made.workspace <= made.available == 64 * GB
    assert set(made.parts()) == {"weights", "cache", "workspace", "available"}


def test_free_memory_counts_before_all_memory_and_unknown_memory_refuses_nothing() -> None:
    with pytest.raises(DoesNotFit):
        plan(LLAMA, having(8 * GB), context=1)
    assert plan(LLAMA, having(None, 64 * GB), context=None).note == ""
    unknown = plan(LLAMA, having(None, 0), context=None)
    assert (unknown.context, unknown.available) == (131_072, 0)


def test_the_default_context_is_reduced_to_what_fits_with_a_note() -> None:
    made = plan(LLAMA, having(20 * GB), context=None)
    assert 256 <= made.context < 131_072
    assert made.context % memory.STEP == 0
    assert made.total <= 20 * GB
    assert made.total + memory.STEP * PER_TOKEN > 20 * GB
    assert f"reduced to {made.context} of the model's 131072 tokens" in made.note
    again = plan(LLAMA, having(20 * GB - PER_TOKEN), context=None)
    assert again.context in (made.context, made.context - memory.STEP)


def test_a_context_that_was_asked_for_is_never_cut_and_the_refusal_names_one_that_fits() -> None:
    device = having(20 * GB)
    with pytest.raises(DoesNotFit) as caught:
        plan(LLAMA, device, context=100_000)
    assert "100000 tokens" in caught.value.cause
    found = re.search(r"context=(\d+)", caught.value.fix)
    assert found
    assert plan(LLAMA, device, context=int(found[1])).total <= 20 * GB
    assert "precision='int4'" in caught.value.fix  # int8 would still be too large


def test_weights_that_do_not_fit_are_refused_with_the_precision_that_would() -> None:
    with pytest.raises(DoesNotFit) as caught:
        plan(LLAMA, having(12 * GB), context=None)
    found = re.search(r"precision='(\w+)'", caught.value.fix)
    assert found
    assert found[1] == "int8"
    assert "context=" not in caught.value.fix
    assert plan(LLAMA, having(12 * GB), context=None, precision=found[1]).total <= 12 * GB


def test_the_reference_is_offered_no_precision_since_it_has_but_one() -> None:
    with pytest.raises(DoesNotFit) as caught:
        plan(LLAMA, having(12 * GB), context=None, exact_float32=True)
    assert "32.0 GB for weights" in caught.value.cause
    assert "precision" not in caught.value.fix
    assert "Free" in caught.value.fix


def test_if_no_setting_fits_the_fix_names_the_memory_to_free() -> None:
    with pytest.raises(DoesNotFit, match=r"Free \d") as caught:
        plan(LLAMA, having(1 * GB), context=None)
    assert "precision" not in caught.value.fix


@pytest.mark.parametrize("context", [131_073, 10**9])
def test_a_context_longer_than_the_model_s_is_refused(context: int) -> None:
    with pytest.raises(OptionError, match="131072"):
        plan(LLAMA, having(64 * GB), context=context)


def test_a_small_model_s_whole_context_counts_as_enough() -> None:
    small = replace(LLAMA, context=100)
    assert plan(small, having(17 * GB), context=None).context == 100


def test_weights_by_precision_are_never_more_than_the_checkpoint_s() -> None:
    assert weight_bytes(LLAMA, "auto") == weight_bytes(LLAMA, "f32") == 16 * GB
    assert weight_bytes(LLAMA, "int4") < weight_bytes(LLAMA, "int8") < weight_bytes(LLAMA, "bf16") == 16 * GB
    assert weight_bytes(LLAMA, "auto", exact_float32=True) == 32 * GB
    quantized = replace(LLAMA, weight_bytes=5 * GB)
    assert weight_bytes(quantized, "bf16") == 5 * GB


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (320_000_000, "320 MB"), (1_500_000_000, "1.5 GB"), (2 * 10**12, "2.0 TB")],
)
def test_sizes_are_written_for_people(count: int, text: str) -> None:
    assert size(count) == text

"""The OpenVINO backend passes the conformance kit, whole, and refuses nothing of it.

Draws: the kit derives its tolerances from the arithmetic; a new seed is a new set of models and inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import pytest

from transom.contract import Backend
from transom.testing import BackendConformance
from transom_openvino_cpu.backend import OpenVinoCpu


@pytest.mark.sweep(only=("operator.transom.CachedAttention",))  # tests/native has more of them
class TestExact(BackendConformance):
    """In float32, held to float32's tolerance."""

    backend: ClassVar[Backend] = OpenVinoCpu()
    options: ClassVar[Mapping[str, object]] = {"precision": "exact"}


@pytest.mark.usefixtures("through_openvino")
@pytest.mark.sweep(  # the other cases of each kind go through the same operators of OpenVINO
    only=(
        "operator.transom.CachedAttention",
        "walk.window",
        "logits.float16",
        "logits.int8",
        "logits.uint4_zero_points",
        "logits.multi_head",
        "logits.multi_query",
        "logits.scale",
        "logits.partial_rotary",
        "logits.linear_bias",
    )
)
class TestExactThroughOpenVino(BackendConformance):
    """The same where the native library cannot be had: OpenVINO's own attention lacks some of it, and says so."""

    backend: ClassVar[Backend] = OpenVinoCpu()
    options: ClassVar[Mapping[str, object]] = {"precision": "exact"}


@pytest.mark.sweep(only=("operator.transom.CachedAttention",))
class TestAsChosen(BackendConformance):
    """In the numbers that `auto` takes on this CPU, bfloat16 or int8 among them, held to bfloat16's tolerance."""

    backend: ClassVar[Backend] = OpenVinoCpu()
    precision: ClassVar[str] = "bfloat16"

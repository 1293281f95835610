"""The conformance kit over the emulated HTP: all of it but what a decoder for a phone has no need of.

Draws: the kit derives its tolerances from the arithmetic; a new seed is a new set of models and inputs.
"""

from __future__ import annotations

from typing import ClassVar

import pytest

from transom.testing import BackendConformance
from transom_mobile_export.qnn.backend import Qnn


@pytest.mark.sweep(
    only=(
        "logits.multi_head",
        "logits.multi_query",
        "logits.softcap",
        "logits.scale",
        "logits.linear_bias",
        "logits.value_width",
        "logits.partial_rotary",
        "logits.float16",
        "logits.bfloat16",
        "logits.int4",
        "logits.uint4_minimums",
        "logits.int8",
        "logits.uint4_zero_points",
        "logits.whole_context",
        "operator.transom.CachedAttention",
        "sparsity.policies",
        "state.copy_on_write",
        "state.fork",
        "state.truncate",
        "step.outputs_belong_to_caller",
        "walk.gqa",
        "walk.window",
    )
)
class TestEmulated(BackendConformance):
    backend = Qnn(chunk=8)
    precision = "float16"
    options: ClassVar = {"precision": "f16", "context": 56}
    may_refuse = (
        "operator.*", "session.run_inputs",  # it takes decoders alone
        "logits.attention_bias", "logits.everything", "step.ragged_windows",  # a bias that is computed
        "step.ragged",  # it runs one sequence at a time
    )  # fmt: skip

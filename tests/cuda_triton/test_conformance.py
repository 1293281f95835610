"""The CUDA backend passes the conformance kit in Triton's interpreter.

What it refuses: graphs that are no decoders, additive biases on scores; and, of the interpreter alone, a step of the
most sequences, for which its pool of pages is kept too small.

Draws: the kit derives its tolerances from the arithmetic; a new seed is a new set of models and inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import pytest

from transom.contract import Backend
from transom.testing import BackendConformance
from transom_cuda_triton import CudaTriton


# The interpreter is an emulator: what takes it seconds, and what test_generation.py has another case of, is a sweep.
@pytest.mark.sweep(
    only=(
        "artifact.another_process",
        "walk.gqa", "walk.window", "state.truncate", "state.fork", "state.copy_on_write", "state.outlives_parent",
        "step.forms", "step.deterministic", "step.outputs_belong_to_caller", "step.top_k", "failure.changes_nothing",
        "limits.out_of_pages",
        "logits.uint4_minimums", "logits.uint4_zero_points", "logits.int4", "logits.multi_head", "logits.linear_bias",
        "logits.value_width", "logits.partial_rotary", "logits.scale", "logits.softcap", "logits.bfloat16",
    )
)  # fmt: skip
class TestInterpreted(BackendConformance):
    """In float32, held to float32's tolerance."""

    backend: ClassVar[Backend] = CudaTriton()
    may_refuse: ClassVar[Sequence[str]] = [
        "operator.*", "session.run_inputs", "logits.attention_bias", "logits.everything", "step.ragged_windows",
        "limits.sequences",
    ]  # fmt: skip

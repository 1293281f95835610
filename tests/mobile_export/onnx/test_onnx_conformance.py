"""The conformance kit over portable decoders: all of it but what a decoder has no need of.

Draws: the kit derives its tolerances from the arithmetic; a new seed is a new set of models and inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from transom.testing import BackendConformance
from transom_mobile_export.onnx.backend import OnnxDecoder

GAPS = (
    "operator.*", "session.run_inputs",  # it takes decoders alone
    "logits.attention_bias", "logits.everything", "step.ragged_windows",  # attention with a bias that is computed
    "logits.value_width",  # keys and values of different widths
)  # fmt: skip


class TestExact(BackendConformance):
    backend = OnnxDecoder()
    options: ClassVar[Mapping[str, object]] = {"precision": "exact"}
    may_refuse = GAPS


class TestRounded(BackendConformance):
    """Products of integers, whose inputs are rounded, too."""

    backend = OnnxDecoder()
    options: ClassVar[Mapping[str, object]] = {"precision": "int8"}
    may_refuse = GAPS

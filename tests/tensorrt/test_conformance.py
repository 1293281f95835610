"""The conformance kit over the networks in onnxruntime: all of it but what a decoder's engine has no need of.

Draws: the kit derives its tolerances from the arithmetic; a new seed is a new set of models and inputs.
"""

from __future__ import annotations

import pytest

from transom.testing import BackendConformance
from transom_tensorrt import TensorRt
from transom_tensorrt.probing import EMULATE


@pytest.fixture(autouse=True, scope="module")
def _emulated() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(EMULATE, "1")
        yield


class TestEmulated(BackendConformance):
    backend = TensorRt()
    precision = "float16"
    may_refuse = (
        "operator.*", "session.run_inputs",  # it takes decoders alone
        "logits.attention_bias", "logits.everything",  # attention with a bias that is computed
        "step.ragged_windows",
    )  # fmt: skip

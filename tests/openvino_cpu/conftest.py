"""What the tests of this backend share. Puts `checkpoints` and `onnx_models` of the folder above on the path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture
def through_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoders run as where the native library cannot be had."""
    monkeypatch.setenv("TRANSOM_NATIVE", "0")

"""What a bundle tells the developer of an app."""

from __future__ import annotations

from typing import Any

import pytest
from qnn_models import PHONE

from transom.contract import AppBackend
from transom_mobile_export.qnn.backend import Qnn
from transom_mobile_export.qnn.probing import libraries


@pytest.mark.parametrize("weights", ["shared", "apart"])
def test_the_readme_names_the_files_and_libraries(weights: str) -> None:
    backend = Qnn()
    assert isinstance(backend, AppBackend)
    requires = {"soc_model": "57", "htp_arch": "75", "qnn": "2.7.0", "qnn_sdk": "2.51.0"}
    requires |= {"context": "777", "weights": weights}
    variant: dict[str, Any] = {"name": "qnn-phone", "requires": requires, "target": {"name": PHONE.name}}
    files = backend.app_files({}, variant, {})
    assert list(files) == ["README.md"]
    text = files["README.md"].decode()
    assert text.startswith("## ")
    for word in (*libraries(75), PHONE.name, "777 tokens", "ADSP_LIBRARY_PATH", "qnn-phone/part0_prefill.onnx"):
        assert word in text, word
    assert "`com.qualcomm.qti:qnn-runtime:2.51.0`" in text
    assert ("share_ep_contexts" in text) == (weights == "shared")
    for line in (
        '{{"backend_path", "libQnnHtp.so"},', '{"htp_performance_mode", "burst"}};', "filter { it.epName == qnn }",
        "com.qualcomm.qti:onnxruntime-android-qnn:2.7.0`",
    ):  # fmt: skip
        assert line in text
    assert "{kotlin_share}" not in text
    assert "libQnnHtpV73" not in text

"""The OpenVINO backend passes the conformance kit, whole, and refuses nothing of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from transom.contract import Backend
from transom.testing import BackendConformance
from transom_openvino_cpu.backend import OpenVinoCpu


class TestExact(BackendConformance):
    """In float32, held to float32's tolerance."""

    backend: ClassVar[Backend] = OpenVinoCpu()
    options: ClassVar[Mapping[str, object]] = {"precision": "exact"}

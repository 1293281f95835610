"""Made-up NVIDIA cards."""

from __future__ import annotations

from transom.contract import Device

A100 = Device(
    "cuda", "cuda:0", "sm_80", 80 << 30, identity="pci:0000:65:00.0 A100", name="A100", drivers={"cuda": "12.8"}
)  # fmt: skip

"""Remote targets to compile for: phones, laptops and graphics cards, as devices of kind `remote`.

Memory is that of the card as sold (of the smallest variant), and 0 for a system on a chip or a phone processor, because
it depends on the phone. `drivers` of a Snapdragon contains the numbers that Qualcomm's QNN needs; `soc_model` and
`htp_arch` must belong together, which the compiler does not check.
"""

from __future__ import annotations

from functools import cache

from transom.contract import Device
from transom.hardware.architectures import cuda_features

PREFIX = "remote:"
_GIB = 1 << 30

_CARDS: dict[str, tuple[str, tuple[int, int], float]] = {
    "v100": ("NVIDIA V100", (7, 0), 16),
    "v100-32gb": ("NVIDIA V100 32 GB", (7, 0), 32),
    "t4": ("NVIDIA T4", (7, 5), 16),
    "rtx-2080-ti": ("NVIDIA GeForce RTX 2080 Ti", (7, 5), 11),
    "a100": ("NVIDIA A100", (8, 0), 40),
    "a100-80gb": ("NVIDIA A100 80 GB", (8, 0), 80),
    "a10": ("NVIDIA A10", (8, 6), 24),
    "a40": ("NVIDIA A40", (8, 6), 48),
    "rtx-3060": ("NVIDIA GeForce RTX 3060", (8, 6), 12),
    "rtx-3080": ("NVIDIA GeForce RTX 3080", (8, 6), 10),
    "rtx-3090": ("NVIDIA GeForce RTX 3090", (8, 6), 24),
    "l4": ("NVIDIA L4", (8, 9), 24),
    "l40s": ("NVIDIA L40S", (8, 9), 48),
    "rtx-4060": ("NVIDIA GeForce RTX 4060", (8, 9), 8),
    "rtx-4070": ("NVIDIA GeForce RTX 4070", (8, 9), 12),
    "rtx-4080": ("NVIDIA GeForce RTX 4080", (8, 9), 16),
    "rtx-4090": ("NVIDIA GeForce RTX 4090", (8, 9), 24),
    "h100": ("NVIDIA H100", (9, 0), 80),
    "h200": ("NVIDIA H200", (9, 0), 141),
    "b200": ("NVIDIA B200", (10, 0), 180),
    "rtx-5070": ("NVIDIA GeForce RTX 5070", (12, 0), 12),
    "rtx-5080": ("NVIDIA GeForce RTX 5080", (12, 0), 16),
    "rtx-5090": ("NVIDIA GeForce RTX 5090", (12, 0), 32),
}
"""Name, compute capability, GiB."""

_PHONES: dict[str, tuple[str, str, int, int]] = {
    "snapdragon-8-gen-1": ("Snapdragon 8 Gen 1", "SM8450", 36, 69),
    "snapdragon-8-gen-2": ("Snapdragon 8 Gen 2", "SM8550", 43, 73),
    "snapdragon-8-gen-3": ("Snapdragon 8 Gen 3", "SM8650", 57, 75),
    "snapdragon-8-elite": ("Snapdragon 8 Elite", "SM8750", 69, 79),
    "snapdragon-8-elite-gen-5": ("Snapdragon 8 Elite Gen 5", "SM8850", 87, 81),
    "snapdragon-x-elite": ("Snapdragon X Elite", "SC8380XP", 60, 73),
}
"""Name, chip, `QNN_SOC_MODEL_*`, Hexagon version (QNN's QnnTypes.h and its table of supported devices)."""

_PROCESSORS: dict[str, tuple[str, str]] = {
    "android-arm64": ("Android phone, its processor", "aarch64"),
    "ios-arm64": ("iPhone or iPad, its processor", "aarch64"),
}
"""Name and architecture of processors of whole device families."""


@cache
def catalogue() -> tuple[Device, ...]:
    """Every known remote target, by name."""
    cards = [
        Device(
            kind="remote",
            id=PREFIX + key,
            arch=f"sm_{major}{minor}",
            memory_bytes=int(gib * _GIB),
            identity=PREFIX + key,
            name=name,
            features=cuda_features(major, minor, name),
        )
        for key, (name, (major, minor), gib) in _CARDS.items()
    ]
    phones = [
        Device(
            kind="remote",
            id=PREFIX + key,
            arch=f"hexagon_v{version}",
            memory_bytes=0,
            integrated=True,
            identity=PREFIX + key,
            name=name,
            features=_hexagon_features(version),
            drivers={"soc": chip, "soc_model": str(model), "htp_arch": str(version)},
        )
        for key, (name, chip, model, version) in _PHONES.items()
    ]
    processors = [
        Device(kind="remote", id=PREFIX + key, arch=arch, memory_bytes=0, identity=PREFIX + key, name=name)
        for key, (name, arch) in _PROCESSORS.items()
    ]
    return tuple(sorted((*cards, *phones, *processors), key=lambda device: device.id))


def _hexagon_features(version: int) -> frozenset[str]:
    """Features of the tensor processor of a Hexagon version: 4-bit blocks need v69, attention in 16-bit activations and
    sharing weights v73."""
    since = {"int8": 65, "fp16": 68, "a16w4_blocks": 69, "a16_attention": 73, "weight_sharing": 73}
    return frozenset(feature for feature, first in since.items() if version >= first)

"""Memory bandwidth of known targets: transfers per second times bus width, from data sheets.

Decoding reads nearly all weights for each token, so the bandwidth bounds its speed. The value is the maximum of the
chip or card: a phone may have slower memory, and no engine reaches it.

Sources: for Snapdragons the memory clock in Qualcomm's product briefs, with two LPDDR transfers per cycle over four
channels of 16 bits (eight in the X Elite); for NVIDIA cards their data sheets and product pages, the fastest one if a
name stands for several. LPDDR5X at "5300 MHz" is counted as 10600 million transfers; JEDEC's grade is 10667.
"""

from __future__ import annotations

from dataclasses import dataclass

from transom.contract import Device
from transom.hardware.catalogue import PREFIX


@dataclass(frozen=True)
class Bandwidth:
    """The memory type of a target and the bandwidth of its bus."""

    memory: str
    """`"LPDDR5X"`."""
    transfers: float
    """Million transfers per second on each line of the bus."""
    bits: int
    """Width of the bus in bits."""
    source: str
    """Source of the numbers."""

    @property
    def bytes_per_second(self) -> float:
        return self.transfers * 1e6 * self.bits / 8

    def __str__(self) -> str:
        speed = self.bytes_per_second / 1e9
        return f"{self.memory}, {self.transfers:.0f} million transfers/s × {self.bits} bit / 8 = {speed:.1f} GB/s"


_KNOWN: dict[str, tuple[str, float, int, str]] = {
    "snapdragon-8-gen-1": ("LPDDR5", 6400, 64, "Qualcomm's product brief: LPDDR5, up to 3200 MHz"),
    "snapdragon-8-gen-2": ("LPDDR5X", 8400, 64, "Qualcomm's product brief: LPDDR5X, up to 4200 MHz"),
    "snapdragon-8-gen-3": ("LPDDR5X", 9600, 64, "Qualcomm's product brief: LPDDR5X, up to 4800 MHz"),
    "snapdragon-8-elite": ("LPDDR5X", 10600, 64, "Qualcomm's product brief: LPDDR5X, up to 5300 MHz"),
    "snapdragon-8-elite-gen-5": ("LPDDR5X", 10600, 64, "Qualcomm's product brief: LPDDR5X, up to 5300 MHz"),
    "snapdragon-x-elite": ("LPDDR5X", 8448, 128, "Qualcomm's product brief: LPDDR5X, 8448 MT/s, 135 GB/s"),
    "v100": ("HBM2", 1754, 4096, "NVIDIA's data sheet: 900 GB/s"),
    "v100-32gb": ("HBM2", 1754, 4096, "NVIDIA's data sheet: 900 GB/s"),
    "t4": ("GDDR6", 10000, 256, "NVIDIA's data sheet: 320 GB/s"),
    "rtx-2080-ti": ("GDDR6", 14000, 352, "NVIDIA's product page: 616 GB/s"),
    "a100": ("HBM2", 2430, 5120, "NVIDIA's data sheet: 1555 GB/s"),
    "a100-80gb": ("HBM2e", 3186, 5120, "NVIDIA's data sheet: 2039 GB/s (SXM)"),
    "a10": ("GDDR6", 12500, 384, "NVIDIA's data sheet: 600 GB/s"),
    "a40": ("GDDR6", 14500, 384, "NVIDIA's data sheet: 696 GB/s"),
    "rtx-3060": ("GDDR6", 15000, 192, "NVIDIA's product page: 15 Gbps, 192 bit"),
    "rtx-3080": ("GDDR6X", 19000, 320, "NVIDIA's product page: 760 GB/s"),
    "rtx-3090": ("GDDR6X", 19500, 384, "NVIDIA's product page: 936 GB/s"),
    "l4": ("GDDR6", 12500, 192, "NVIDIA's data sheet: 300 GB/s"),
    "l40s": ("GDDR6", 18000, 384, "NVIDIA's data sheet: 864 GB/s"),
    "rtx-4060": ("GDDR6", 17000, 128, "NVIDIA's product page: 272 GB/s"),
    "rtx-4070": ("GDDR6X", 21000, 192, "NVIDIA's product page: 504 GB/s"),
    "rtx-4080": ("GDDR6X", 22400, 256, "NVIDIA's product page: 716.8 GB/s"),
    "rtx-4090": ("GDDR6X", 21000, 384, "NVIDIA's product page: 1008 GB/s"),
    "h100": ("HBM3", 5234, 5120, "NVIDIA's data sheet: 3.35 TB/s (SXM)"),
    "h200": ("HBM3e", 6250, 6144, "NVIDIA's data sheet: 4.8 TB/s"),
    "b200": ("HBM3e", 8000, 8192, "NVIDIA's data sheet: up to 8 TB/s"),
    "rtx-5070": ("GDDR7", 28000, 192, "NVIDIA's product page: 672 GB/s"),
    "rtx-5080": ("GDDR7", 30000, 256, "NVIDIA's product page: 960 GB/s"),
    "rtx-5090": ("GDDR7", 28000, 512, "NVIDIA's product page: 1792 GB/s"),
}
"""Memory, million transfers per second, bus width in bits, source. For HBM the data sheets give only the bandwidth; the
transfers are computed from it."""


def bandwidth(device: Device) -> Bandwidth | None:
    """The bandwidth of a target of the catalogue; None if unknown, as for any device of this machine."""
    known = _KNOWN.get(device.id.removeprefix(PREFIX)) if device.id.startswith(PREFIX) else None
    return None if known is None else Bandwidth(*known)

"""Features of an NVIDIA compute capability, for GPUs of this machine and of the catalogue."""

from __future__ import annotations

_SINCE: dict[str, tuple[int, int]] = {
    "fp16": (5, 3),
    "dp4a": (6, 1),
    "tensor_cores": (7, 0),
    "int8_tensor_cores": (7, 5),
    "bf16": (8, 0),
    "tf32": (8, 0),
    "async_copy": (8, 0),
    "sparse_tensor_cores": (8, 0),
    "fp8": (8, 9),
    "tma": (9, 0),
    "fp4": (10, 0),
}


def cuda_features(major: int, minor: int, name: str = "") -> frozenset[str]:
    """Features of a compute capability, from the tables of NVIDIA's CUDA programming guide and PTX manual.

    `wgmma` is Hopper's alone and `tcgen05` data-center Blackwell's. The GTX 16 cards are sm_75 without tensor cores;
    only the name tells.
    """
    capability = (major, minor)
    features = {feature for feature, first in _SINCE.items() if capability >= first}
    if major == 9:
        features.add("wgmma")
    if major in (10, 11):
        features.add("tcgen05")
    if "GTX 16" in name or (capability == (7, 5) and " MX" in name):
        features -= {"tensor_cores", "int8_tensor_cores"}
    if capability == (6, 1):
        features.discard("fp16")  # it has the instructions, at a sixty-fourth of the speed
    return frozenset(features)

"""Reading safetensors files: the header is checked, the tensors are memory-mapped, nothing is copied.

The `safetensors` package returns copies and has no NumPy type for bfloat16. The format is simple (eight bytes of
length, a JSON header, the data), so it is read here, with messages that name the file, the tensor and the fix.

The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from transom.errors import SourceError
from transom.graph.weights import Array

MOST_HEADER = 100_000_000
"""The format's own limit on the header, in bytes."""
DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_DAMAGED = "The file is damaged: download it again"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file."""

    name: str
    dtype: str
    """The type's name in the file: `"BF16"`."""
    shape: tuple[int, ...]
    path: Path
    data: Array
    """uint8 [bytes], a view of the memory map."""

    def array(self) -> Array:
        """A view with the tensor's type and shape."""
        return self.data.view(DTYPES[self.dtype]).reshape(self.shape)


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name.

    Raises:
        SourceError: a truncated file, a header that is too long or not JSON, tensors that do not fit in the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise SourceError(f"{path} is cut short: it has only {size} bytes", "Download the file again")
        length = int.from_bytes(start, "little")
        if start.startswith(b"version "):
            raise SourceError(
                f"{path} is a Git LFS pointer, not the weights themselves", "Run git lfs pull in its directory"
            )
        if length > MOST_HEADER:
            raise SourceError(
                f"{path} declares a header of {length} bytes; safetensors allows {MOST_HEADER}",
                "It is not a safetensors file, or it is damaged: download it again",
            )
        if length > size - 8:
            raise SourceError(
                f"{path} is cut short: its header has {length} bytes, the whole file {size}", "Download the file again"
            )
        header = _header(path, file.read(length))
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    held = np.frombuffer(mapped, np.uint8)[8 + length :]
    tensors: dict[str, StoredTensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, begin, end = _entry(path, name, entry)
        nbytes = math.prod(shape) * DTYPES[dtype].itemsize
        if end - begin != nbytes:
            raise SourceError(
                f"The tensor {name} in {path} spans {end - begin} bytes; {dtype} {list(shape)} needs {nbytes}", _DAMAGED
            )
        if end > len(held):
            raise SourceError(
                f"{path} is cut short: the tensor {name} ends at byte {8 + length + end}, the file at {size}",
                "Download the file again; it is incomplete, or its header is damaged",
            )
        tensors[name] = StoredTensor(name, dtype, shape, path, held[begin:end])
        spans.append((begin, end, name))
    spans.sort()
    for (_, end, first), (begin, _, second) in itertools.pairwise(spans):
        if begin < end:
            raise SourceError(f"The tensors {first} and {second} in {path} overlap", _DAMAGED)
    return tensors


def _header(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"The header of {path} is not JSON: {error}", _DAMAGED) from error
    if not isinstance(header, dict):
        raise SourceError(f"The header of {path} is not a JSON object", _DAMAGED)
    return header


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(f"The header of {path} does not describe the tensor {name}", _DAMAGED) from error
    numbers = [begin, end, *(shape if isinstance(shape, list) else [None])]
    if any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < 1 << 48 for n in numbers) or begin > end:
        raise SourceError(
            f"The tensor {name} in {path} has an impossible shape or position: {shape}, {begin} … {end}", _DAMAGED
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise SourceError(
            f"The tensor {name} in {path} is of the type {dtype}, which Transom does not read",
            "Get the model in float16, bfloat16 or float32",
        )
    return str(dtype), tuple(shape), begin, end

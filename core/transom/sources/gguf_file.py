"""Reading a GGUF file: header, metadata and tensor table are checked, the tensors are memory-mapped.

The reader of the `gguf` package makes a NumPy object for every string of a vocabulary (seconds for a small model) and
trusts every length and offset. This reader takes a few hundredths of a second for the same header and checks each
length against the file size before it uses it. Names and sizes of tensor types come from the package.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import itertools
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transom.errors import SourceError
from transom.graph.weights import Array

MAGIC = b"GGUF"
_DAMAGED = "The file is damaged: download it again"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_ELEMENTS = 1 << 40
_SPLIT_NAME = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


@dataclass(frozen=True)
class GgufTensor:
    """One entry of the tensor table."""

    name: str
    type: str
    """The name in the `gguf` package: `"Q4_1"`, `"F32"`."""
    shape: tuple[int, ...]
    """Rows first, as in NumPy; GGUF stores the dimensions in reverse order."""
    data: Array
    """uint8 [bytes], a view of the memory map."""


@dataclass(frozen=True)
class GgufFile:
    """A model's metadata and tensors, from one file or from all parts of a split model."""

    paths: tuple[Path, ...]
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def open_gguf(path: Path) -> GgufFile:
    """Open a file; for one part of a split model, also the other parts.

    Raises:
        SourceError: not a GGUF file, a truncated file, an inconsistent header, a missing part.
    """
    metadata, tensors = _read(path)
    count = metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return GgufFile((path,), metadata, tensors)
    name = _SPLIT_NAME.match(path.name)
    if name is None:
        raise SourceError(
            f"{path} is one of {count} parts of a split model, but its name does not say which",
            "Rename the parts to <model>-00001-of-0000N.gguf, and load the first",
        )
    paths = parts_of(path)
    if len(paths) != count:
        raise SourceError(
            f"{path} is one of {count} parts of a split model, but its name says {len(paths)}",
            "Rename the parts to <model>-00001-of-0000N.gguf, and load the first",
        )
    if missing := [p.name for p in paths if not p.is_file()]:
        raise SourceError(
            f"{path.name} is one of {count} parts of a split model, and {', '.join(missing[:4])} "
            f"{'is' if len(missing) == 1 else 'are'} missing from {path.parent}",
            "Download all parts into one folder",
        )
    merged: dict[str, GgufTensor] = {}
    whole: dict[str, Any] = {}
    for i, part in enumerate(paths):
        more, table = _read(part)
        if more.get("split.count") != count or more.get("split.no", i) != i:
            raise SourceError(f"{part} is not part {i + 1} of {count} of the same model", "Download the parts again")
        if i == 0:
            whole = more  # only the first part has the model's settings
        if doubled := merged.keys() & table.keys():
            raise SourceError(f"The tensor {sorted(doubled)[0]} is in two parts, one of them {part}", _DAMAGED)
        merged |= table
    expected = whole.get("split.tensors.count", len(merged))
    if expected != len(merged):
        raise SourceError(
            f"The {count} parts of {name['stem']} hold {len(merged)} tensors, not {expected}", "Download them again"
        )
    return GgufFile(tuple(paths), whole, merged)


def is_first_part(path: Path) -> bool:
    """Whether the file's name is that of a whole model or of the first part of a split model."""
    name = _SPLIT_NAME.match(path.name)
    return name is None or int(name["number"]) == 1


def parts_of(path: Path) -> list[Path]:
    """The files of the model that a file belongs to, by the file's name: itself, or all parts of a split model."""
    name = _SPLIT_NAME.match(path.name)
    if name is None:
        return [path]
    count = int(name["count"])
    return [path.with_name(f"{name['stem']}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]


def general_settings(path: Path) -> dict[str, Any]:
    """The settings under `general.` at the beginning of a file. Reads no further, and imports no other package.

    Raises:
        SourceError: not a GGUF file, or a damaged one.
    """
    return _read(path, general=True)[0]


def _read(path: Path, *, general: bool = False) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(24)
        if start[:4] != MAGIC[: len(start)] or not start:
            raise SourceError(
                f"{path} is not a GGUF file: it begins with {start[:4]!r}, not {MAGIC!r}",
                "An interrupted download may have saved an error page in its place: download the file again",
            )
        if len(start) < 24:
            raise _cut_short(path, size)
        # The map stays open while an array views it, and closes after the last one
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    version, tensor_count, value_count = struct.unpack_from("<IQQ", start, 4)
    if version & 0xFFFF == 0:
        raise SourceError(
            f"{path} is a big-endian GGUF file, which this machine cannot map", "Get the little-endian file"
        )
    if version not in (2, 3):
        raise SourceError(
            f"{path} is of GGUF version {version}; Transom reads versions 2 and 3",
            "Convert the model again with a current llama.cpp",
        )
    cursor = _Cursor(path, mapped, size)
    cursor.at = 24
    metadata: dict[str, Any] = {}
    for _ in range(cursor.plausible(value_count, 13, "settings")):
        key = cursor.text()
        if general and not key.startswith("general."):
            return metadata, {}
        if key in metadata:
            raise SourceError(f"{path} has the setting {key} twice", _DAMAGED)
        metadata[key] = cursor.value(cursor.scalar("I"), key)
    entries = []
    for _ in range(cursor.plausible(tensor_count, 24, "tensors")):
        name = cursor.text()
        rank = cursor.scalar("I")
        if not 1 <= rank <= 4:
            raise SourceError(f"The tensor {name} in {path} has {rank} dimensions; GGUF allows 1 to 4", _DAMAGED)
        shape = tuple(reversed(cursor.scalars("Q", rank)))
        entries.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
    return metadata, _table(path, mapped, cursor.at, _alignment(path, metadata), entries)


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise SourceError(f"general.alignment in {path} is {alignment!r}, not a power of two of at least 8", _DAMAGED)
    return alignment


def _table(
    path: Path,
    mapped: mmap.mmap,
    end_of_header: int,
    alignment: int,
    entries: list[tuple[str, tuple[int, ...], int, int]],
) -> dict[str, GgufTensor]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    start = -(-end_of_header // alignment) * alignment
    held = np.frombuffer(mapped, np.uint8)
    tensors: dict[str, GgufTensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, shape, kind, offset in entries:
        elements = 1
        for dimension in shape:
            elements *= dimension
        if not 0 < elements <= _MOST_ELEMENTS:
            raise SourceError(f"The tensor {name} in {path} has the impossible shape {list(shape)}", _DAMAGED)
        try:
            known = GGMLQuantizationType(kind)
        except ValueError:
            raise SourceError(
                f"The tensor {name} in {path} is of type {kind}, which the installed gguf package does not know",
                "Update it (pip install -U gguf), or get the model in a common type such as Q4_K_M or Q8_0",
            ) from None
        block, block_bytes = GGML_QUANT_SIZES[known]
        if shape[-1] % block:
            raise SourceError(
                f"The tensor {name} in {path} has rows of {shape[-1]}, which blocks of {block} ({known.name}) "
                "do not fill",
                _DAMAGED,
            )
        nbytes = elements // block * block_bytes
        if offset % alignment:
            raise SourceError(
                f"The tensor {name} in {path} begins at the offset {offset}, which is not a multiple of {alignment}",
                _DAMAGED,
            )
        begin, end = start + offset, start + offset + nbytes
        if end > len(held):
            raise SourceError(
                f"{path} is cut short: the tensor {name} ends at byte {end}, the file at {len(held)}",
                "Download the file again; it is incomplete, or its table of tensors is damaged",
            )
        if name in tensors:
            raise SourceError(f"{path} has the tensor {name} twice", _DAMAGED)
        tensors[name] = GgufTensor(name, known.name, shape, held[begin:end])
        spans.append((begin, end, name))
    spans.sort()
    for (_, end, first), (begin, _, second) in itertools.pairwise(spans):
        if begin < end:
            raise SourceError(f"The tensors {first} and {second} in {path} overlap", _DAMAGED)
    return tensors


class _Cursor:
    """Reads the header sequentially and never past the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.at = path, data, size, 0

    def take(self, count: int) -> int:
        """Advance by `count` bytes that the file must have, and return the position before."""
        at = self.at
        if count > self.size - at:
            raise _cut_short(self.path, self.size)
        self.at = at + count
        return at

    def plausible(self, count: int, least: int, what: str) -> int:
        """Return `count` if the rest of the file can hold that many items of at least `least` bytes."""
        if count * least > self.size - self.at:
            raise SourceError(f"{self.path} declares {count} {what}, more than fit in the file", _DAMAGED)
        return count

    def scalar(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.take(struct.calcsize("<" + code)))[0]

    def scalars(self, code: str, count: int) -> tuple[Any, ...]:
        return struct.unpack_from(f"<{count}{code}", self.data, self.take(count * struct.calcsize("<" + code)))

    def text(self) -> str:
        length = self.scalar("Q")
        at = self.take(length)
        return self._decode(self.data[at : at + length])

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise SourceError(f"The setting {key} in {self.path} is of the unknown type {kind}", _DAMAGED)
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner == _STRING:
            return self._texts(self.plausible(count, 8, f"strings in {key}"))
        if inner in _SCALARS:
            code = _SCALARS[inner]
            self.plausible(count, struct.calcsize("<" + code), f"values in {key}")
            at = self.take(count * struct.calcsize("<" + code))
            return np.frombuffer(self.data, np.dtype("<" + code), count, at).tolist()
        raise SourceError(f"The setting {key} in {self.path} is a list of the unknown type {inner}", _DAMAGED)

    def _texts(self, count: int) -> list[str]:
        texts = []
        data, at, size = self.data, self.at, self.size
        length_at = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > size:
                raise _cut_short(self.path, size)
            (length,) = length_at(data, at)
            at += 8
            if length > size - at:
                raise _cut_short(self.path, size)
            texts.append(self._decode(data[at : at + length]))
            at += length
        self.at = at
        return texts

    def _decode(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return raw.decode(errors="replace")  # a vocabulary may have bytes that are not a character


def _cut_short(path: Path, size: int) -> SourceError:
    return SourceError(f"{path} is cut short: its header continues past the end of the file, at byte {size}", _DAMAGED)

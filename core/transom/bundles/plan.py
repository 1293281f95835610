"""The plan of an export: the size of a bundle and an upper bound of its speed, human- and machine-readable.

`transom.bundles.weighing` computes it from shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transom.contract import Device
from transom.contract_optional import Published, StorageForm
from transom.hardware.bandwidth import Bandwidth
from transom.preparation.memory import size


@dataclass(frozen=True)
class Weighed:
    """All weights with the same use, such as the vocabulary matrix."""

    use: str
    """`"products"`, `"small products"`, `"vocabulary"`, `"embedding"`, `"other"` (norms and biases), `"code"`."""
    arithmetic: str
    """How the number of weights is computed, human-readable."""
    numbers: int
    bytes: int
    """Bytes in files."""
    held: int
    """Bytes in memory."""
    read: int
    """Bytes that one token reads."""

    @property
    def bits(self) -> float:
        """Bits of one number, scales included."""
        return 8 * self.bytes / self.numbers if self.numbers else 0.0


@dataclass(frozen=True)
class PartPlan:
    """The layers `first` to `end - 1`, compiled as one part."""

    first: int
    end: int
    vocabulary: bool
    """Whether the part includes the vocabulary matrix."""
    bytes: int

    def __str__(self) -> str:
        head = " and the vocabulary matrix" if self.vocabulary else ""
        layers = f"layers {self.first} to {self.end - 1}" if self.end - self.first > 1 else f"layer {self.first}"
        return f"{layers}{head}, {exact(self.bytes)}"


@dataclass(frozen=True)
class AtContext:
    """A variant with a full cache of `context` tokens."""

    context: int
    cache: int
    """Bytes of the cache of one sequence."""
    peak: int
    """Peak memory in bytes: weights, cache, and the working space of a prefill chunk."""
    read: int
    """Bytes that one token reads: weights and cache."""
    bound: float | None
    """Tokens per second that the memory bandwidth allows; None: the bandwidth is not known."""


@dataclass(frozen=True)
class VariantPlan:
    """One variant of a bundle."""

    form: StorageForm
    weights: tuple[Weighed, ...]
    parts: tuple[PartPlan, ...]
    files: Mapping[str, int]
    """Bytes by file name. Small files are left out: the manifest, the tokenizer, the graph without its weights."""
    cache_per_token: int
    cache_arithmetic: str
    at: tuple[AtContext, ...]
    """One entry per context length. The last one is the longest: the requested context."""
    notes: tuple[str, ...]
    kept: int
    """The number of matrices that keep the checkpoint's blocks."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in memory."""
        return sum(w.held for w in self.weights)

    def lines(self, memory: Bandwidth | None) -> Iterator[str]:
        """The human-readable lines, with the arithmetic."""
        form = self.form
        small = f"; small ones {form.small}" if any(w.use == "small products" for w in self.weights) else ""
        plain = "plain " if self.kept else ""
        yield f"{form.name}: {plain}products {form.products}{small}; {plain}vocabulary matrix {form.vocabulary}"
        for w in self.weights:
            where = "" if w.held == w.bytes else f", {exact(w.held)} in memory" if w.held else ", in a mapped file"
            count = f" = {_count(w.numbers)} at {w.bits:.2f} bits" if w.numbers else ""
            yield f"  {w.use}: {w.arithmetic}{count} = {exact(w.bytes)}{where}"
        parts = " + ".join(exact(w.held) for w in self.weights if w.held)
        yield f"  weights in memory: {parts} = {exact(self.weight_bytes)}"
        for i, part in enumerate(self.parts):
            yield f"  part {i}: {part}"
        yield f"  files: {', '.join(f'{name} {exact(count)}' for name, count in self.files.items())}"
        yield f"  cache: {self.cache_arithmetic} = {self.cache_per_token} bytes a token"
        for row in self.at:
            bound = "" if row.bound is None else f", at most {row.bound:.1f} tokens/s"
            yield (
                f"  at {row.context} tokens: cache {exact(row.cache)}, at most {exact(row.peak)} in memory, "
                f"{exact(row.read)} read for a token{bound}"
            )
        last, weights = self.at[-1], sum(w.read for w in self.weights)
        read = f"{exact(weights)} of weights + {exact(last.read - weights)} of cache = {exact(last.read)}"
        if memory is None:
            yield f"  no bound: {read} for a token, and how fast this device's memory is read is not known here"
        else:
            speed = f"{memory.bytes_per_second / 1e9:.1f} GB/s"
            yield f"  bound: {speed} / ({read}) = {last.bound:.1f} tokens/s, a bound and not a measurement"
        for note in self.notes:
            yield f"  note: {note}"

    def to_dict(self) -> dict[str, Any]:
        """The plan in JSON types."""
        return {
            "format": self.form.format,
            "precision": self.form.precision,
            "weights": [vars(w) for w in self.weights],
            "weight_bytes": self.weight_bytes,
            "parts": [vars(part) for part in self.parts],
            "files": dict(self.files),
            "cache_per_token": self.cache_per_token,
            "at": [vars(row) for row in self.at],
            "notes": list(self.notes),
            "kept": self.kept,
        }


@dataclass(frozen=True)
class ExportPlan:
    """The plan of a bundle, human-readable (`str`) and machine-readable (`to_dict`)."""

    model: str
    device: Device
    context: int
    memory: Bandwidth | None
    """The bandwidth of the device's memory; None: not known."""
    variants: tuple[VariantPlan, ...]
    published: tuple[Published, ...]
    """Figures published by others for models of this shape."""

    @property
    def bytes(self) -> int:
        """Bytes of the files of all variants. A file that several variants share counts once."""
        return sum({name: count for v in self.variants for name, count in v.files.items()}.values())

    def __str__(self) -> str:
        where = f"{self.device.id} ({self.device.name})" if self.device.name else self.device.id
        lines = [
            f"{self.model} for {where}, {self.context} tokens: planned from shapes, nothing is compiled or measured"
        ]
        if self.memory is None:
            lines.append("memory: how fast it is read is not known here, so there is no bound")
        else:
            lines.append(f"memory: {self.memory} at most ({self.memory.source}); a device may have slower memory")
        for variant in self.variants:
            lines += ["", *variant.lines(self.memory)]
        if len(self.variants) > 1:
            lines += ["", f"files of all variants: {exact(self.bytes)}"]
        if self.published:
            lines += ["", "published, not measured by us, for models of this shape:"]
            lines += [f"  {figure}" for figure in self.published]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The plan in JSON types."""
        memory = None
        if self.memory is not None:
            memory = {**vars(self.memory), "bytes_per_second": self.memory.bytes_per_second}
        return {
            "model": self.model,
            "target": self.device.id,
            "context": self.context,
            "memory": memory,
            "bytes": self.bytes,
            "variants": [variant.to_dict() for variant in self.variants],
            "published": [vars(figure) for figure in self.published],
        }


def exact(count: int) -> str:
    """A number of bytes with one digit more than `size` gives, because plans are compared: `3.86 GB`, `131.6 MB`."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}" if name == "GB" else f"{count / unit:.1f} {name}"
    return size(count)


def _count(numbers: int) -> str:
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if numbers >= unit:
            return f"{numbers / unit:.3f} {name}"
    return f"{numbers}"

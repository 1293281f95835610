"""The plan of an export: what a bundle would weigh and how fast it could be at most, for people and for programs.

`transom.bundles.weighing` makes it, by arithmetic on shapes.
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
    """The weights of one use."""

    use: str
    """`"products"`, `"small products"`, `"vocabulary"`, `"embedding"`, `"other"` (norms and biases), `"code"`."""
    arithmetic: str
    """Where the number of weights comes from."""
    numbers: int
    bytes: int
    """In files."""
    held: int
    """Bytes of them in memory."""
    read: int
    """Bytes that are read of them for one token."""

    @property
    def bits(self) -> float:
        """Of one number, scales included."""
        return 8 * self.bytes / self.numbers if self.numbers else 0.0


@dataclass(frozen=True)
class PartPlan:
    """The layers `first` to `end - 1`, compiled as one."""

    first: int
    end: int
    vocabulary: bool
    """Whether the vocabulary matrix is in it."""
    bytes: int

    def __str__(self) -> str:
        head = " and the vocabulary matrix" if self.vocabulary else ""
        layers = f"layers {self.first} to {self.end - 1}" if self.end - self.first > 1 else f"layer {self.first}"
        return f"{layers}{head}, {exact(self.bytes)}"


@dataclass(frozen=True)
class AtContext:
    """A variant with a full cache of so many tokens."""

    context: int
    cache: int
    """Bytes of one sequence."""
    peak: int
    """Bytes in memory at most: weights, cache, and the working space of a prefill chunk."""
    read: int
    """Bytes that are read for one token: weights and cache."""
    bound: float | None
    """Tokens a second that the memory's bandwidth allows; None where it is not known."""


@dataclass(frozen=True)
class VariantPlan:
    """One variant of a bundle."""

    form: StorageForm
    weights: tuple[Weighed, ...]
    parts: tuple[PartPlan, ...]
    files: Mapping[str, int]
    """Bytes by name. What is small is left out: the manifest, the tokenizer, the graph without its weights."""
    cache_per_token: int
    cache_arithmetic: str
    at: tuple[AtContext, ...]
    """By context, the longest one last: the one that was asked for."""
    notes: tuple[str, ...]
    kept: int
    """Matrices that stay as the checkpoint has them, whatever the form of plain ones."""

    @property
    def weight_bytes(self) -> int:
        """Of all weights in memory."""
        return sum(w.held for w in self.weights)

    def lines(self, memory: Bandwidth | None) -> Iterator[str]:
        """For people, the arithmetic with it."""
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
        """JSON types only."""
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
    """What a bundle would be, for people (`str`) and for programs (`to_dict`)."""

    model: str
    device: Device
    context: int
    memory: Bandwidth | None
    """None: not known."""
    variants: tuple[VariantPlan, ...]
    published: tuple[Published, ...]
    """Figures of others for models of this shape."""

    @property
    def bytes(self) -> int:
        """Of the files of all variants; a file that several of them have is there once."""
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
        """JSON types only."""
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
    """Bytes with one digit more than `size` has, since plans are compared: `3.86 GB`, `131.6 MB`."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}" if name == "GB" else f"{count / unit:.1f} {name}"
    return size(count)


def _count(numbers: int) -> str:
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if numbers >= unit:
            return f"{numbers / unit:.3f} {name}"
    return f"{numbers}"

"""The report of an export: human-readable (`str`) and machine-readable (`to_dict`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transom import hardware
from transom.contract import Device
from transom.preparation.memory import size


@dataclass(frozen=True)
class ExportedVariant:
    """The result of one backend for one target."""

    name: str
    backend: str
    backend_version: str
    device: Device
    """The target."""
    precision: str
    """Compute precision, as the backend reports it."""
    context: int
    """Tokens that it was compiled for; 0 for a graph that is not a decoder."""
    notes: tuple[str, ...]
    """Changes to the model and its graph."""
    check: str
    """Result of the self-check or of the comparison on an emulator, or that neither was possible here."""
    fidelity: Mapping[str, Any] | None
    """As `Variant.fidelity` in the manifest."""

    def lines(self) -> list[str]:
        where = f"{self.device.id} ({self.device.name})" if self.device.name else self.device.id
        facts = [
            ("precision", self.precision),
            ("context", f"{self.context} tokens" if self.context else ""),
            ("self-check", self.check),
        ]
        lines = [f"  {self.name}: for {where}, by {self.backend} {self.backend_version}"]
        lines += [f"    {name + ':':<12}{text}" for name, text in facts if text]
        return lines + [f"    note:       {text}" for text in self.notes]

    def to_dict(self) -> dict[str, Any]:
        devices: Any = hardware.to_json([self.device])["devices"]
        return {**vars(self), "device": devices[0], "notes": list(self.notes)}


@dataclass(frozen=True)
class Exported:
    """A bundle that was written."""

    folder: Path
    model: str
    variants: tuple[ExportedVariant, ...]
    """In the order of the requested targets and formats."""
    files: Mapping[str, int]
    """Bytes by name, the manifest included."""
    warnings: tuple[str, ...]
    seconds: float

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    def __str__(self) -> str:
        lines = [f"{self.model} in {self.folder}: {size(self.bytes)} in {len(self.files)} files, {self.seconds:.1f} s"]
        for variant in self.variants:
            lines += variant.lines()
        return "\n".join([*lines, *(f"  warning: {text}" for text in self.warnings)])

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        own = {"folder": str(self.folder), "files": dict(self.files), "warnings": list(self.warnings)}
        return {**vars(self), **own, "variants": [variant.to_dict() for variant in self.variants]}

"""What the names of a model's files tell about it, for recognising a model without reading it. Imports no source."""

from __future__ import annotations

from pathlib import Path

_ALONE = ".gguf"


def stands_alone(file: Path) -> bool:
    """Whether a file is a whole model, whatever lies beside it: a GGUF file, unless its name says that it is one of
    several."""
    return file.suffix.lower() == _ALONE and "-of-" not in file.name


def may_use_operators(path: Path) -> bool:
    """Whether a model's graph may use a plugin's operators: an ONNX file may, what our own families build may not."""
    if path.is_dir():
        return next(path.rglob("*.onnx"), None) is not None
    return path.suffix.lower() != _ALONE

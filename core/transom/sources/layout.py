"""What the names of a model's files say about the model, without reading it. This module imports no source."""

from __future__ import annotations

from pathlib import Path

_ALONE = ".gguf"


def stands_alone(file: Path) -> bool:
    """Whether a file is a whole model by itself: a GGUF file, unless its name is that of one part of several."""
    return file.suffix.lower() == _ALONE and "-of-" not in file.name


def may_use_operators(path: Path) -> bool:
    """Whether a model's graph may use a plugin's operators: an ONNX file may, a graph of our own families may not."""
    if path.is_dir():
        return next(path.rglob("*.onnx"), None) is not None
    return path.suffix.lower() != _ALONE

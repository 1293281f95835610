"""Tensors of a checkpoint by name, with shape checks, independent of the file format.

Families use the names of Hugging Face checkpoints; the source translates them. Nothing here reads tensor data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from transom.errors import SourceError, nearest
from transom.graph.weights import Weight


class Checkpoint(Protocol):
    """What a source provides to a family."""

    @property
    def where(self) -> str:
        """The file or directory, for error messages."""

    @property
    def weights_hash(self) -> str:
        """Identifies the content of the weights."""

    def names(self) -> Iterable[str]:
        """The checkpoint's own names of all its tensors."""

    def find(self, name: str) -> Weight | None:
        """The tensor with this name in the checkpoint, or None."""


class Tensors:
    """Tensors by the names of Hugging Face modules.

    Args:
        checkpoint: where they come from.
        rename: converts the family's name of a tensor to the checkpoint's.
        ignore: whether a tensor of the checkpoint is irrelevant to the graph.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        rename: Callable[[str], str] = lambda name: name,
        ignore: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.checkpoint = checkpoint
        self._rename, self._ignore = rename, ignore
        self._found: dict[str, Weight] = {}
        self._used: set[str] = set()

    @property
    def weights_hash(self) -> str:
        return self.checkpoint.weights_hash

    def has(self, name: str) -> bool:
        return self._look(name) is not None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, for sizes that the settings omit.

        Raises:
            SourceError: there is no such tensor.
        """
        weight = self._look(name)
        if weight is None:
            raise self._missing(name)
        return tuple(weight.shape)

    def __call__(self, name: str, *shape: int) -> Weight:
        """The tensor, which must have this shape. Repeated calls return the same object, so that weights are shared.

        Raises:
            SourceError: the tensor is missing or has another shape; the message names it.
        """
        weight = self._look(name)
        if weight is None:
            raise self._missing(name)
        if tuple(weight.shape) != shape:
            raise SourceError(
                f"The tensor {self._rename(name)} in {self.checkpoint.where} has the shape {list(weight.shape)}; "
                f"the model's settings require {list(shape)}",
                "The file is damaged or its settings belong to another model: download it again",
            )
        self._used.add(self._rename(name))
        return weight

    def optional(self, name: str, *shape: int) -> Weight | None:
        """The tensor, or None if the checkpoint does not have it."""
        return self(name, *shape) if self.has(name) else None

    def unused(self) -> list[str]:
        """Tensors of the checkpoint that the family did not use, for the report."""
        return sorted(n for n in self.checkpoint.names() if n not in self._used and not self._ignore(n))

    def mark_used(self, name: str) -> None:
        self._used.add(self._rename(name))

    def _look(self, name: str) -> Weight | None:
        if name not in self._found:
            weight = self.checkpoint.find(self._rename(name))
            if weight is None:
                return None
            self._found[name] = weight
        return self._found[name]

    def _missing(self, name: str) -> SourceError:
        real = self._rename(name)
        known = list(self.checkpoint.names())
        hint = nearest(real, known) if len(known) <= 8 else ""
        return SourceError(
            f"The tensor {real} is missing from {self.checkpoint.where}",
            f"The file is incomplete, or its settings belong to another model: download it again. {hint}".rstrip(),
        )


def gguf_names(table: Mapping[str, str]) -> Callable[[str], str]:
    """A function that converts Hugging Face tensor names to GGUF names, from a table of modules.

    `model.layers.7.self_attn.q_proj.weight` becomes `blk.7.` + table["self_attn.q_proj"] + `.weight`.
    """

    def rename(name: str) -> str:
        module, dot, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias"):
            return name
        head = ""
        if module.startswith("model.layers."):
            index, _, module = module.removeprefix("model.layers.").partition(".")
            head = f"blk.{index}."
        return f"{head}{table[module]}{dot}{leaf}" if module in table else name

    return rename

"""A checkpoint's tensors by name, with their shapes checked, whatever file they come from.

Families ask by the names that Hugging Face checkpoints use; a source translates. Nothing here reads tensor data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from transom.errors import SourceError, nearest
from transom.graph.weights import Weight


class Checkpoint(Protocol):
    """What a source offers to a family."""

    @property
    def where(self) -> str:
        """The file or directory, for messages."""

    @property
    def weights_hash(self) -> str:
        """Names the content of the weights."""

    def names(self) -> Iterable[str]:
        """The tensors there are, by the names of the checkpoint itself."""

    def find(self, name: str) -> Weight | None:
        """The tensor with this name of the checkpoint itself, or None."""


class Tensors:
    """Tensors by the names of Hugging Face's modules.

    Args:
        checkpoint: where they come from.
        rename: from the family's name to the checkpoint's.
        ignore: tells which tensors of the checkpoint carry nothing that a graph needs.
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
        """The shape of a tensor, for the sizes that a file's settings leave out.

        Raises:
            SourceError: there is no such tensor.
        """
        weight = self._look(name)
        if weight is None:
            raise self._missing(name)
        return tuple(weight.shape)

    def __call__(self, name: str, *shape: int) -> Weight:
        """The tensor, which must have this shape. Asking twice gives the same object, so that weights are shared.

        Raises:
            SourceError: there is no such tensor, or its shape is another; the message names it.
        """
        weight = self._look(name)
        if weight is None:
            raise self._missing(name)
        if tuple(weight.shape) != shape:
            raise SourceError(
                f"The tensor {self._rename(name)} in {self.checkpoint.where} has the shape {list(weight.shape)}; "
                f"the model's settings ask for {list(shape)}",
                "The file is damaged or its settings belong to another model: get it again",
            )
        self._used.add(self._rename(name))
        return weight

    def optional(self, name: str, *shape: int) -> Weight | None:
        """The tensor, or None where the checkpoint has none."""
        return self(name, *shape) if self.has(name) else None

    def unused(self) -> list[str]:
        """Tensors of the checkpoint that no one asked for: the report says so."""
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
            f"The file is incomplete, or another kind of model than it says: get it again. {hint}".rstrip(),
        )


def gguf_names(table: Mapping[str, str]) -> Callable[[str], str]:
    """A renaming from Hugging Face's names to GGUF's, out of a table of modules.

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

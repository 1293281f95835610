"""What every part receives: the card, the clock, the sizes, the built engines, and the destination of results."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen

from parts.running import PartContext

from rtx_parts.card import RtxCard
from rtx_parts.decoders import FORMS
from transom.sparsity import Sparsity


@dataclass(frozen=True)
class RtxSizes:
    """Sizes of what is measured."""

    shape: str = "8B"
    """A key of `shaped.SHAPES`."""
    depths: tuple[int, ...] = (2, 6)
    """Layers of the models that are built."""
    whole: int = 32
    """Layers of the model that the figures describe."""
    tokens: int = 16384
    """Tokens of a prompt, after which tokens are decoded."""
    decodes: int = 32
    """Tokens of one measurement. Together with the prompt, in whole blocks of 64, they are the context."""
    rounds: int = 4
    """Measurements of each kind, after a first one that does not count."""
    batch: int = 8
    """Sequences that decode together, in addition to one alone."""
    copied: int = 1 << 30
    """Bytes that are copied to measure the memory."""
    checked: int = 256
    """Tokens of text whose logits are compared with the reference's."""
    starts: int = 3
    """Processes of each kind whose cold start is measured."""
    policy: Sparsity = field(default_factory=lambda: Sparsity(1.0, top_k=64, columns=0, max_density=0.6))
    precisions: tuple[str, ...] = ("f16", "fp8", "int8", "int4", "auto")
    """Precisions of SmolLM2 whose logits are compared with the reference's."""

    @property
    def context(self) -> int:
        return -(-(self.tokens + self.decodes) // 64) * 64


TOY = RtxSizes(
    shape="tiny", depths=(1, 2), whole=4, tokens=192, decodes=2, rounds=1, batch=2, copied=1 << 16, checked=24,
    starts=1, precisions=("f16",), policy=Sparsity(1.0, top_k=2, columns=0, max_density=0.6, dense_below=64),
)  # fmt: skip


@dataclass(frozen=True)
class BenchModel:
    """A model that is built."""

    form: str
    """One of `decoders.FORMS`."""
    layers: int
    sparse: bool = False

    @property
    def name(self) -> str:
        return f"{self.form}-{self.layers}{'-sparse' if self.sparse else ''}"


def models(sizes: RtxSizes, parts: Sequence[str]) -> list[BenchModel]:
    """The models that these parts need, the most important first."""
    depths = sorted(sizes.depths)
    found = [BenchModel("fp8", n) for n in (depths if {"dense", "sparse"} & set(parts) else depths[-1:])]
    if "dense" in parts:
        found += [BenchModel(form, n) for form in FORMS if form != "fp8" for n in depths]
    if "sparse" in parts:
        found += [BenchModel("fp8", n, sparse=True) for n in depths]
    return found if {"dense", "sparse", "cold"} & set(parts) else []


@dataclass
class RtxBench(PartContext[RtxCard]):
    """One run."""

    sizes: RtxSizes
    parts: Sequence[str]
    """The parts that run."""
    folder: Path
    """The folder of this run, removed at its end."""
    built: dict[BenchModel, Path] = field(default_factory=dict)
    """Folders with artifacts, see `stored`."""
    child: Popen[str] | None = None
    """The current child process, which builds or computes."""

    def abandon(self) -> None:
        """Terminate what this run has started, and remove its folder."""
        super().abandon()
        if self.child is not None:
            self.child.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

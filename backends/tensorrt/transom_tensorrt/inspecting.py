"""The contents of an engine as TensorRT's builder lists them at the end of a build: kernels, their tensors and memory.

TensorRT's inspector needs the engine opened on its card. But a builder with detailed profiling logs the same facts
about each layer, in lines that `parse` reads. Nothing here imports TensorRT.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

HEADING = "Layers:"
"""Start of the log message that has a line for each layer."""
BITS = {"Float": 32, "Half": 16, "BFloat16": 16, "FP8": 8, "Int8": 8, "UInt8": 8, "Bool": 8, "Int4": 4, "FP4": 4,
        "Int32": 32, "Int64": 64}  # fmt: skip
WORDS = {"Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "FP8": "fp8", "Int8": "int8", "Int4": "int4"}
_LAYER = re.compile(r"^Name: (.*?), LayerType: (\w+), ")
_TENSOR = re.compile(r"\{ Name: ([^{}]*?), (?:Location: \w+, )?Dimensions: \[([^\]]*)\].*?Datatype: (\w+),")
_PROFILE = re.compile(r"\[profile (\d+)\]")
_COMPILED = re.compile(r"_myl(\d+)_\d+$")
_WORK = ("kgen", "gemm", "runtime_fusion", "reformat", "cask", "conv", "softmax", "norm")
_MOVES = re.compile(r"__myl_((?:Move|Tran|Resh|Cast|Repl|Slic|Conc)+)_myl\d+_\d+$")
_MEMORY = {
    "activations": re.compile(r"Total Activation Memory: (\d+) bytes"),
    "weights": re.compile(r"Total Weights Memory: (\d+) bytes"),
}


@dataclass(frozen=True)
class Tensor:
    """A tensor that a layer reads or writes."""

    name: str
    shape: tuple[int, ...]
    """-1 for a dynamic dimension."""
    dtype: str
    """TensorRT's name: `"Half"`, `"FP8"`."""

    @property
    def nbytes(self) -> int:
        return math.prod(abs(d) for d in self.shape) * BITS.get(self.dtype, 0) // 8

    @property
    def constant(self) -> bool:
        """Whether it holds weights, which the compiler names itself."""
        return "dconst" in self.name or "_constant" in self.name


@dataclass(frozen=True)
class EngineLayer:
    """One kernel launch."""

    name: str
    kind: str
    """The compiler's name: `"gemm"`, `"kgen"`, `"runtime_fusion"`."""
    profile: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def attention(self) -> bool:
        return "_mha_" in self.name

    @property
    def matrix(self) -> Tensor | None:
        """The weights of a product: the largest constant with two axes, since scales of blocks have two axes, too."""
        wide = [t for t in self.inputs if t.constant and sum(abs(d) > 1 for d in t.shape) >= 2]
        return max(wide, key=lambda t: math.prod(t.shape), default=None)

    @property
    def product(self) -> bool:
        """Whether it multiplies by a weight matrix."""
        multiplies = self.kind in ("gemm", "cask") or (self.kind == "runtime_fusion" and "Fc" in self.name)
        return multiplies and self.matrix is not None

    @property
    def moves(self) -> bool:
        """Whether it only moves or converts numbers."""
        return self.kind == "reformat" or bool(_MOVES.search(self.name))


def parse(messages: Iterable[str]) -> tuple[EngineLayer, ...]:
    """The layers listed in a builder's messages; empty without detailed profiling. Other messages are skipped."""
    lines = [line for m in messages if m.startswith(HEADING) for line in m.splitlines()[1:] if _LAYER.match(line)]
    profiles: dict[str, int] = {}
    """Each profile is compiled separately under a number of its own. Only names of inputs show which number it has."""
    for line in lines:
        if (tagged := _PROFILE.search(line)) is not None:
            profiles[_compiled(line)] = int(tagged.group(1))
    return tuple(_layer(line, profiles.get(_compiled(line), 0)) for line in lines)


def _compiled(line: str) -> str:
    """The number of the compiled part that a layer belongs to; the layer's name if it has none."""
    start = _LAYER.match(line)
    name = start.group(1) if start else line
    found = _COMPILED.search(name)
    return found.group(1) if found else name


def _layer(line: str, profile: int) -> EngineLayer:
    start = _LAYER.match(line)
    assert start is not None
    name, kind = start.groups()
    inputs = (*_tensors_of(line, "Inputs"), *_tensors_of(line, "Constants"))
    return EngineLayer(name, kind, profile, inputs, _tensors_of(line, "Outputs"))


def _tensors_of(line: str, label: str) -> tuple[Tensor, ...]:
    at = line.find(f", {label}: [")
    if at < 0:
        return ()
    at = end = line.index("[", at)
    depth = 0
    while end < len(line):
        depth += {"[": 1, "]": -1}.get(line[end], 0)
        end += 1
        if not depth:
            break
    return tuple(
        Tensor(name, tuple(int(d) for d in dims.split(",") if d.strip()), dtype)
        for name, dims, dtype in _TENSOR.findall(line[at:end])
    )


def memory(messages: Iterable[str]) -> dict[str, int]:
    """Bytes that an engine needs on its card, as its builder reports them: `weights`, and `activations` of the largest
    profile, since profiles never run at once."""
    found: dict[str, int] = {}
    for message in messages:
        for name, pattern in _MEMORY.items():
            if match := pattern.search(message):
                found[name] = max(found.get(name, 0), int(match.group(1)))
    return found


@dataclass(frozen=True)
class Summary:
    """Totals over one profile's layers."""

    launches: int
    """Kernel launches in a step."""
    products: dict[str, int]
    """Products with weight matrices, by dtypes: `"fp8 x fp8"`, `"float16 x int4"`."""
    attention: dict[str, int]
    """Fused attentions, by the dtype of their keys."""
    moves: int
    """Kernels that only move or convert numbers."""
    cache_copies: int
    """Kernels that write as many numbers as a whole cache has, but are not its update."""
    weight_bytes: dict[str, int]
    """Bytes of all weight matrices, by dtype."""

    def __str__(self) -> str:
        products = ", ".join(f"{count} products {kind}" for kind, count in sorted(self.products.items()))
        fused = ", ".join(f"{count} fused attentions in {kind}" for kind, count in sorted(self.attention.items()))
        copies = f", {self.cache_copies} copies of a cache" if self.cache_copies else ""
        return f"{self.launches} launches: {', '.join(x for x in (products, fused) if x)}, {self.moves} moves{copies}"


def summary(layers: Sequence[EngineLayer], profile: int, caches: Sequence[str] = ()) -> Summary:
    """Args:
    profile: index of the profile whose layers are counted.
    caches: names of the tensors that hold a cache; an update writes to one of them.
    """
    own = [x for x in layers if x.profile == profile and x.kind in _WORK]
    products: Counter[str] = Counter()
    bytes_of: Counter[str] = Counter()
    seen: set[str] = set()
    for layer in own:
        matrix = layer.matrix
        if layer.product and matrix is not None:
            products[f"{_word(_activation(layer))} x {_word(matrix.dtype)}"] += 1
            if matrix.name not in seen:
                seen.add(matrix.name)
                bytes_of[_word(matrix.dtype)] += matrix.nbytes
    fused = Counter(_word(x.inputs[0].dtype) for x in own if x.attention and x.inputs)
    return Summary(
        launches=len(own), products=dict(products), attention=dict(fused), moves=sum(x.moves for x in own),
        cache_copies=sum(_copies(x, caches) for x in own), weight_bytes=dict(bytes_of),
    )  # fmt: skip


def _activation(layer: EngineLayer) -> str:
    """The dtype that a product multiplies its matrix by; an addend fused into the product has a wider one."""
    given = [t.dtype for t in layer.inputs if not t.constant and len(t.shape) >= 2]
    return min(given, key=lambda dtype: BITS.get(dtype, 64), default="?")


def _copies(layer: EngineLayer, caches: Sequence[str]) -> bool:
    """Whether a layer reads a cache and writes as many numbers elsewhere, or writes one that it does not update."""
    if layer.attention:
        return False
    read = [_numbers(t) for t in layer.inputs if _is_cache(t, caches)]
    written = [_numbers(t) for t in layer.outputs if not _is_cache(t, caches)]
    elsewhere = any(w >= r and w % r == 0 for r in read for w in written)
    return elsewhere or (layer.moves and any(_is_cache(t, caches) for t in layer.outputs))


def _numbers(tensor: Tensor) -> int:
    """How many numbers a tensor has for one sequence."""
    return math.prod(d for d in tensor.shape if d > 0)


def _is_cache(tensor: Tensor, caches: Sequence[str]) -> bool:
    name = tensor.name.split(" [profile")[0]
    return name in caches


def _word(dtype: str) -> str:
    return WORDS.get(dtype, dtype.lower())


def to_json(layers: Sequence[EngineLayer]) -> str:
    return json.dumps([asdict(layer) for layer in layers], separators=(",", ":"))


def from_json(text: str) -> tuple[EngineLayer, ...]:
    """Raises ValueError, KeyError or TypeError for text that `to_json` did not write."""
    raw: list[dict[str, Any]] = json.loads(text)
    return tuple(
        EngineLayer(x["name"], x["kind"], x["profile"], _tensors(x["inputs"]), _tensors(x["outputs"])) for x in raw
    )


def _tensors(raw: Sequence[dict[str, Any]]) -> tuple[Tensor, ...]:
    return tuple(Tensor(t["name"], tuple(t["shape"]), t["dtype"]) for t in raw)

"""Models how busy a kernel's main loops keep a multiprocessor, from the machine code.

A loop is the code between a branch and the earlier address that it jumps to. Each instruction takes one issue cycle,
and a number of cycles of the pipe that executes it. A multiprocessor has four parts, each with a scheduler that issues
one instruction per cycle, and with its own tensor core; a warp stays in one part. All warps run the same loop, so it is
enough to model one warp on one part. **The bound of a loop is the largest sum over its pipes.** The model assumes that
other warps hide latencies, and that pipes overlap. The pipe with the largest sum is the one that binds; the utilization
of any other pipe is its sum divided by the bound.

Cycles of a part for one instruction of a warp, from NVIDIA's figures for a whole multiprocessor:

- *matrix*: a multiprocessor does this number of dense 16-bit multiply-adds per cycle: 1024 on sm_80 (A100 whitepaper:
  312 TFLOPS with 108 multiprocessors at 1.41 GHz), 512 on sm_86 and sm_89 (A40: 150 with 84 at 1.74 GHz; L40S: 362 with
  142 at 2.52 GHz), 2048 on sm_90 (H100: 989 with 132 at 1.83 GHz). A part does a quarter. `HMMA.16816` is
  16 * 8 * 16 = 2048 multiply-adds: 8 cycles on sm_80, 16 on sm_86 and sm_89. `HGMMA.64xNx16` is shared by four warps,
  one of each part: N / 2 cycles on sm_90. For `HMMA` on sm_90 the model uses the rate of sm_80, because it does not
  reach the rate of `HGMMA` (Luo and others 2024, arXiv:2402.13499).
- *special* (`MUFU`): 16 results per cycle, so 8 cycles for 32 threads.
- *float* (`FFMA`, `FADD`, `FMUL`, and `IMAD`): 64 results per cycle on sm_80, so 2 cycles; otherwise 128, so 1 cycle;
  always 64 for `IMAD`.
- *integer* (other arithmetic, comparisons, selections, conversions): 64 results per cycle, so 2 cycles. *uniform*
  instructions, which compute one result for a whole warp, have a unit of their own; the model assumes 2 cycles.
- *shared*: 128 bytes per cycle for all parts together, so 512 bytes of a warp take 16 cycles of a part's share. This
  includes copies to shared memory, and the operands that `HGMMA` reads there, once for its four warps.
- *level 2*: copies from global memory, at 5120 bytes per cycle for all multiprocessors of sm_80 together (A100
  whitepaper; 47 for each); the model assumes the same total for sm_90 (39 for each). It has no such bound for sm_86 and
  sm_89, for which no figure is published.
- *memory*: the same bytes at the bandwidth of the card's memory, only where they are read once, as in decoding. Per
  multiprocessor and cycle: 13.4 bytes on sm_80 (A100: 2039 GB/s), 4.8 on sm_86 (A40: 696 GB/s), 2.4 on sm_89
  (L40S: 864 GB/s), 13.9 on sm_90 (H100: 3352 GB/s).

Sources: CUDA C++ Programming Guide, "Arithmetic Instructions", for results per multiprocessor and cycle; the
whitepapers and data sheets of A100, GA102, A40, L40S and H100.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

MATRIX_RATE = {80: 1024, 86: 512, 89: 512, 90: 2048}
"""16-bit multiply-adds per multiprocessor and cycle."""
LEVEL_2 = {80: 5120 / 108, 90: 5120 / 132}
"""Bytes per multiprocessor and cycle."""
MEMORY = {80: 2039e9 / 108 / 1.41e9, 86: 696e9 / 84 / 1.74e9, 89: 864e9 / 142 / 2.52e9, 90: 3352e9 / 132 / 1.83e9}
"""Bytes per multiprocessor and cycle."""
PARTS = 4

_CLASSES = {
    "matrix": ("HMMA", "HGMMA", "IMMA", "IGMMA", "QMMA", "QGMMA"),
    "copy": ("LDGSTS", "LDG", "LDS", "LDSM", "STS", "STSM", "STG", "UTMALDG", "LDL", "STL"),
    "special": ("MUFU",),
    "float": ("FFMA", "FADD", "FMUL", "FMNMX", "FSEL", "FSETP", "FSET", "F2F", "F2FP", "HADD2", "HMUL2", "HFMA2"),
    "control": (
        "BRA", "BAR", "CALL", "RET", "EXIT", "NOP", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "WARPSYNC", "MEMBAR", "FENCE",
        "BSSY", "BSYNC", "WARPGROUPSET", "CCTL", "SYNCS", "ERRBAR",
    ),
}  # fmt: skip
CLASSES = (*_CLASSES, "integer")
"""Classes of instructions; `integer` includes addresses, predicates and moves."""
_CLASS = {name: kind for kind, names in _CLASSES.items() for name in names}
_FMA = ("FFMA", "FADD", "FMUL")


@dataclass(frozen=True)
class Loop:
    """An innermost loop with matrix instructions in a kernel's machine code."""

    arch: int
    instructions: tuple[str, ...]
    reads_once: bool = False
    """Whether it copies from the card's memory, not from the level 2 cache."""
    cycles: dict[str, float] = field(init=False)
    """Cycles of a part per warp and iteration, by pipe."""

    def __post_init__(self) -> None:
        sums: defaultdict[str, float] = defaultdict(float)
        for text in self.instructions:
            sums["issue"] += 1
            for pipe, cycles in _pipes(text, self.arch, self.reads_once).items():
                sums[pipe] += cycles
        object.__setattr__(self, "cycles", dict(sums))

    @property
    def classes(self) -> dict[str, int]:
        """Number of instructions by class."""
        counts = Counter(_CLASS.get(_name(text), "integer") for text in self.instructions)
        return {kind: counts[kind] for kind in CLASSES}

    @property
    def bound(self) -> float:
        return max(self.cycles.values())

    @property
    def binds(self) -> str:
        """The pipe that takes longest."""
        return max(self.cycles, key=lambda pipe: self.cycles[pipe])

    @property
    def matrix_and_copy(self) -> float:
        """The share of the issued instructions that compute products or copy."""
        counts = self.classes
        return (counts["matrix"] + counts["copy"]) / len(self.instructions)

    @property
    def serialized(self) -> bool:
        """Whether each `HGMMA` waits for the one before, because the compiler could not overlap them."""
        waits = sum("DEPBAR" in text for text in self.instructions if _name(text) == "WARPGROUP")
        products = sum(_name(text) == "HGMMA" for text in self.instructions)
        return products > 0 and waits >= products


def main_loops(sass: str, arch: int, reads_once: bool = False) -> list[Loop]:
    """The innermost loops with matrix instructions, in the order of the code."""
    code = [(int(a, 16), t) for a, t in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^\n]*?)\s*;", sass)]
    found: list[tuple[int, int, tuple[str, ...]]] = []
    for at, text in code:
        to = re.search(r"\bBRA\b.*?\b(0x[0-9a-f]+)", text)
        if to is None or int(to[1], 16) >= at:
            continue
        body = tuple(t for a, t in code if int(to[1], 16) <= a <= at)
        # Rarely run code behind the end of the kernel branches back into it: not a loop.
        if any(_CLASS.get(_name(t)) == "matrix" for t in body) and not any(re.match(r"(EXIT|RET)\b", t) for t in body):
            found.append((int(to[1], 16), at, body))
    inner = [a for a in found if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in found)]
    return [Loop(arch, body, reads_once) for _, _, body in sorted(inner)]


@dataclass(frozen=True)
class Attention:
    """The loops of an attention kernel with lists."""

    listed: Loop
    """Whole tiles of far units."""
    loose: Loop
    """Incomplete tiles: single keys, and the last units of a list."""
    dense: Loop
    """Near keys, and all keys of dense attention, that are visible to every query."""
    diagonal: Loop
    """Near keys that are not visible to every query."""

    @classmethod
    def of(cls, sass: str, arch: int, reads_once: bool = False) -> Attention:
        """The loops of a kernel compiled with SPARSE and without a window."""
        loops = main_loops(sass, arch, reads_once)
        if len(loops) != 4:
            raise ValueError(f"The machine code for sm_{arch} has {len(loops)} loops with matrix instructions, not 4.")
        return cls(*loops)

    @property
    def efficiency(self) -> float:
        """Cycles of a dense tile over those of a listed tile."""
        return self.dense.bound / self.listed.bound

    @property
    def issue_efficiency(self) -> float:
        """The same ratio if issue were the only bound, so that no other pipe hides the list's instructions."""
        return self.dense.cycles["issue"] / self.listed.cycles["issue"]

    def of_block(
        self, keys: int, total: int = 16384, density: float = 0.2, near: int = 512, columns: int = 64
    ) -> float:
        """Dense time times density, divided by sparse time, for one block of queries.

        Args:
            keys: keys per tile.
            total: keys that a dense block reads.
            density: share of them that a sparse block reads.
            near: near keys among these.
            columns: single keys among these; the rest are in the list.
        """
        read = density * total
        diagonal = -(-64 // keys) * self.diagonal.bound
        dense = total / keys * self.dense.bound + diagonal
        listed = (read - near - columns) / keys * self.listed.bound
        loose = (1 + columns / keys) * self.loose.bound
        return density * dense / (listed + loose + near / keys * self.dense.bound + diagonal)


def _name(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split(None, 1)[0].split(".", 1)[0]


def _pipes(text: str, arch: int, reads_once: bool) -> dict[str, float]:
    """Cycles of a part for one instruction of a warp, by pipe."""
    name = _name(text)
    if name == "HMMA":
        m, n, k = {"16816": (16, 8, 16), "1688": (16, 8, 8)}[re.search(r"HMMA\.(\d+)", text)[1]]  # type: ignore[index]
        return {"matrix": m * n * k / (min(MATRIX_RATE[arch], 1024) / PARTS)}
    if name == "HGMMA":
        m, n, k = map(int, re.search(r"HGMMA\.(\d+)x(\d+)x(\d+)", text).groups())  # type: ignore[union-attr]
        operands = re.findall(r"(gdesc\[|\bR\d+)", text.split(",", 1)[1])
        # One descriptor names both operands in shared memory, or only the second if the first is in registers.
        read = n * k * 2 + (0 if operands and operands[0].startswith("R") else m * k * 2)
        return {"matrix": m * n * k / MATRIX_RATE[arch], "shared": read / 128}
    if name == "MUFU":
        return {"special": 8}
    if name in _FMA:
        return {"float": 2 if arch == 80 else 1}
    if name == "IMAD":
        return {"float": 2}
    if name == "SHFL":
        return {"shared": 4}  # 32 threads a cycle, over all parts
    if name in ("LDS", "LDSM", "STS", "STSM"):
        return {"shared": 0 if text.startswith("@!PT") else _bytes(text) / 128 * PARTS}
    if name == "LDGSTS":
        pipes = {"shared": _bytes(text) / 128 * PARTS}
        if arch in LEVEL_2:
            pipes["level 2"] = _bytes(text) / LEVEL_2[arch] * PARTS
        if reads_once:
            pipes["memory"] = _bytes(text) / MEMORY[arch] * PARTS
        return pipes
    if name in ("UMOV", "UIADD3", "ULEA", "USHF", "ULOP3", "USEL", "UISETP", "UIMAD", "USGXT", "ULDC", "R2UR", "S2UR"):
        return {"uniform": 2}
    if _CLASS.get(name, "integer") in ("integer", "float"):
        return {"integer": 2}
    return {}


def _bytes(text: str) -> int:
    """Bytes moved by a shared memory access or copy of one warp."""
    matrices = re.search(r"(?:LDSM|STSM)\S*?\.(?:M|MT)88(?:\.(\d))?", text)
    if matrices:
        return 128 * int(matrices[1] or 1)
    width = re.search(r"\.(128|64|U?16|U?8|S16|S8)\b", text)
    return 32 * (int(re.sub(r"\D", "", width[1])) // 8 if width else 4)

"""Tile sizes of the kernels, by architecture, head size and type.

They were chosen from the compiled code (docs/kernels.md): no register is spilled, tensor cores are used if there are
any, and of such tiles the one whose main loop keeps them busiest in the model of `tools/kernel_efficiency.py`. The
choice has not been measured on a card.

The tables have head sizes from 64 on; any other size uses the tile of the next larger one.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Tile of an attention kernel."""

    rows: int
    """Rows of queries per program."""
    keys: int
    """Keys per tile."""
    warps: int
    stages: int = 2
    """Stages of the software pipeline that prefetches tiles."""
    head_part: int = 256
    """Maximum columns of queries and keys in one product, the limit of HEAD."""
    value_part: int = 256
    """Maximum columns of values in one product, the limit of VALUE.

    On sm_80, sm_86 and sm_89 a warp has rows of its own only if a tile has at least VALUE rows. Otherwise warps share
    rows, and the softmax goes through shared memory.
    """

    def head_parts(self, head_dim: int) -> tuple[int, int]:
        """(HEAD, HEAD_REST) for a size of queries and keys."""
        return parts(head_dim, self.head_part)

    def value_parts(self, value_dim: int) -> tuple[int, int]:
        """(VALUE, VALUE_REST) for a size of values."""
        return parts(value_dim, self.value_part)


class Product(NamedTuple):
    """Tile of a kernel in `kernels.linear`."""

    rows: int
    """Rows of activations per program."""
    outputs: int
    width: int
    """Half the columns of a step; all of them for float8."""
    warps: int
    stages: int = 2


class LinearTiles(NamedTuple):
    many: tuple[Product, ...]
    """Tiles of `multiply_many`, fewest rows first; the first with enough rows is used, or else the last."""
    few: Product
    """Tile of `multiply_few`, for one row."""


HEAD_SIZES = (64, 80, 96, 128, 192, 256)
ARCHITECTURES = (70, 80, 86, 89, 90)
TENSOR_CORES = (80, 86, 89, 90)
"""Architectures whose tensor cores Triton uses; since 3.2 it does not use those of sm_70."""

_AMPERE = {
    64: Tile(128, 64, 8),
    80: Tile(128, 32, 8),
    96: Tile(128, 32, 8),
    128: Tile(128, 32, 8, head_part=64, value_part=64),
    192: Tile(128, 16, 8),
    256: Tile(128, 16, 8, value_part=128),
}
_HOPPER = {size: Tile(128, 64, 8) for size in HEAD_SIZES} | {256: Tile(128, 32, 8)}
_VOLTA = {
    64: Tile(32, 32, 8),
    80: Tile(32, 32, 8),
    96: Tile(32, 32, 8),
    128: Tile(32, 32, 8),
    192: Tile(32, 16, 8),
    256: Tile(32, 16, 8),
}
_DECODE = {
    64: Tile(16, 64, 4),
    80: Tile(16, 32, 4),
    96: Tile(16, 64, 4),
    128: Tile(16, 64, 4),
    192: Tile(16, 32, 4),
    256: Tile(16, 32, 8),
}
_DECODE_VOLTA = {size: Tile(16, 16, 4) for size in HEAD_SIZES}
_DECODE_HOPPER = _DECODE | {256: Tile(16, 32, 4)}
_EXACT = {
    64: Tile(32, 32, 8),
    80: Tile(16, 16, 8),
    96: Tile(16, 16, 8),
    128: Tile(32, 16, 8, head_part=64, value_part=64),
    192: Tile(32, 16, 8),
    256: Tile(32, 16, 8),
}
_DECODE_EXACT = {size: Tile(16, 16, 4) for size in HEAD_SIZES} | {192: Tile(16, 16, 8)}
_WIDE_VOLTA = {
    128: Tile(16, 16, 8),
    192: Tile(16, 16, 8),
    256: Tile(16, 16, 8, head_part=128, value_part=128),
}

PREFILL = {70: _VOLTA, 80: _AMPERE, 86: _AMPERE, 89: _AMPERE, 90: _HOPPER}
"""Tiles of `kernels.prefill` for 16-bit types, by architecture and head size."""
DECODE = {70: _DECODE_VOLTA, 80: _DECODE, 86: _DECODE, 89: _DECODE, 90: _DECODE_HOPPER}
"""Tiles of `kernels.decode` for 16-bit types, by architecture and head size. For groups of more than 16 heads, ROWS is
the number of heads, rounded up to a power of two."""
PREFILL_EXACT = dict.fromkeys(ARCHITECTURES, _EXACT) | {70: _EXACT | {96: Tile(32, 32, 8)} | _WIDE_VOLTA}
"""Tiles of `kernels.prefill` for float32 on CUDA cores, by architecture and head size."""
DECODE_EXACT = dict.fromkeys(ARCHITECTURES, _DECODE_EXACT) | {
    70: _DECODE_EXACT | _WIDE_VOLTA,
    86: _DECODE_EXACT | {192: Tile(16, 32, 4)},
    89: _DECODE_EXACT | {192: Tile(16, 32, 4)},
}

_LINEAR = LinearTiles((Product(16, 64, 32, 4), Product(64, 64, 32, 4), Product(128, 128, 32, 8)), Product(1, 16, 64, 4))
_LINEAR_PLAIN = LinearTiles((Product(16, 32, 16, 4), Product(32, 32, 16, 4)), Product(1, 16, 64, 4))
"""Tiles for products on CUDA cores."""


_FLOAT8 = LinearTiles(
    (Product(16, 64, 128, 4, 3), Product(64, 64, 128, 4, 3), Product(128, 128, 128, 8, 3)), Product(1, 8, 512, 4)
)
FLOAT8 = dict.fromkeys((89, 90), _FLOAT8)
"""Tiles of the float8 kernels in `kernels.linear`, by architecture; WIDTH is all columns of a step."""


INTERPRETER = 0
"""Stands for Triton's interpreter, whose time depends on the number of programs and tiles."""
_INTERPRETED = Tile(128, 64, 4), Tile(16, 64, 4)
_LINEAR_INTERPRETED = LinearTiles((Product(128, 256, 64, 4),), Product(1, 256, 64, 4))
_FLOAT8_INTERPRETED = LinearTiles((Product(128, 256, 128, 4),), Product(1, 256, 128, 4))


def parts(size: int, most: int = 256) -> tuple[int, int]:
    """A head size as the sum of two powers of two, the first as large as `most` allows; the second may be 0.

    Raises:
        ValueError: there is no such sum.
    """
    first = min(1 << size.bit_length() - 1, most)
    rest = size - first
    if rest and (rest < 16 or rest & (rest - 1) or rest > first):
        raise ValueError(f"A head of {size} columns is not the sum of at most two powers of two from 16 to {most}.")
    return first, rest


def prefill_tile(arch: int, head_dim: int, dtype: str) -> Tile:
    """The tile of `prefill.attend_blocks`.

    Args:
        arch: 80 for sm_80.
        head_dim: the larger size if keys and values differ.
        dtype: Triton's type of queries and cache: "fp16", "bf16" or "fp32".

    Raises:
        ValueError: there is no table for these.
    """
    if arch == INTERPRETER:
        return _INTERPRETED[0]
    return _of(PREFILL_EXACT if _exact(arch, dtype) else PREFILL, arch, head_dim)


def decode_tile(arch: int, head_dim: int, dtype: str) -> Tile:
    """The tile of `decode.attend_splits`; see `prefill_tile`."""
    if arch == INTERPRETER:
        return _INTERPRETED[1]
    return _of(DECODE_EXACT if _exact(arch, dtype) else DECODE, arch, head_dim)


def linear_tiles(arch: int, dtype: str) -> LinearTiles:
    """Tiles of the kernels in `kernels.linear`, by the type of the activations.

    Raises:
        ValueError: there is no table for these.
    """
    if arch == INTERPRETER:
        return _LINEAR_INTERPRETED
    return _LINEAR_PLAIN if _exact(arch, dtype) or arch not in TENSOR_CORES else _LINEAR


def float8_tiles(arch: int) -> LinearTiles:
    """Tiles of the float8 kernels in `kernels.linear`.

    Raises:
        ValueError: the architecture has no float8.
    """
    if arch == INTERPRETER:
        return _FLOAT8_INTERPRETED
    if arch not in FLOAT8:
        raise ValueError(f"The kernels need {' or '.join(f'sm_{a}' for a in FLOAT8)} for float8, not sm_{arch}.")
    return FLOAT8[arch]


def _exact(arch: int, dtype: str) -> bool:
    """Whether a type is float32. Raises ValueError for an unsupported architecture or type."""
    if arch not in ARCHITECTURES:
        known = ", ".join(f"sm_{a}" for a in ARCHITECTURES)
        raise ValueError(f"The kernels have no tiles for sm_{arch}, only for {known}.")
    if dtype not in ("fp16", "bf16", "fp32"):
        raise ValueError(f"The kernels compute in fp16, bf16 or fp32, not {dtype}.")
    if arch == 70 and dtype == "bf16":
        raise ValueError("sm_70 has no bfloat16; use float16.")
    return dtype == "fp32"


def _of(table: dict[int, dict[int, Tile]], arch: int, head_dim: int) -> Tile:
    size = next((s for s in HEAD_SIZES if s >= head_dim), None)
    if size is None:
        raise ValueError(f"Heads of {head_dim} columns exceed {HEAD_SIZES[-1]}, the maximum of the kernels.")
    return table[arch][size]

"""The operators of a program except attention: their kernels, and how they are launched on the rows of a step.

An operator lists the kernel variants that it may launch before anything is loaded, so that all of them are compiled
ahead of time; it launches variants from the same list. Plain matrices are multiplied by torch (cuBLAS).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from transom_cuda_triton.packing import TritonMatrix
from transom_cuda_triton.program import TritonOp, TritonProgram
from transom_cuda_triton.tiles import INTERPRETER, TENSOR_CORES, float8_tiles, linear_tiles
from transom_cuda_triton.variants import KernelVariant

if TYPE_CHECKING:
    from transom_cuda_triton.step import TritonStep
    from transom_cuda_triton.store import Store

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
WIDTH = 1024
"""Maximum columns per program of an elementwise kernel."""
NUMBERS = 2048
"""Numbers per program of an elementwise kernel, if rows are short."""


class Operator(Protocol):
    """One operator of a program."""

    def variants(self) -> Iterator[KernelVariant]:
        """All variants that `run` may launch."""
        ...

    def run(self, step: TritonStep) -> None: ...


def operators(program: TritonProgram, arch: int, attend: Callable[[TritonOp], Operator]) -> list[Operator]:
    """The operators of a program, in order.

    Args:
        arch: 80 for sm_80.
        attend: creates the attention operators.
    """
    found: list[Operator] = []
    for op in program.ops:
        if op.kind == "attend":
            found.append(attend(op))
        elif op.kind in ("embed", "linear"):
            found.append(_matrix_kind(op, program, arch)(op, program, arch))
        else:
            found.append(_PLAIN[op.kind](op, program))
    return found


def power_of_two(least: int) -> int:
    """The smallest power of two that is at least `least`."""
    return 1 << (least - 1).bit_length()


def tile_of(columns: int) -> tuple[int, int]:
    """(rows, columns) per program of an elementwise kernel."""
    width = min(WIDTH, power_of_two(columns))
    return max(1, NUMBERS // width), width


def pieces(columns: int, width: int) -> int:
    return -(-columns // width)


def number_of(program: TritonProgram, buffer: int) -> str:
    """Triton's type of the numbers in a buffer; logits are float32."""
    return "fp32" if buffer == program.output else program.number


def _pointers(program: TritonProgram, **buffers: int) -> dict[str, str]:
    return {name: f"*{number_of(program, b) if b >= 0 else program.number}" for name, b in buffers.items()}


def _sizes(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


class _KernelOperator:
    """An operator that always launches the same variant."""

    _variant: KernelVariant

    def variants(self) -> Iterator[KernelVariant]:
        yield self._variant


class _TorchOperator:
    """An operator that torch computes, without a kernel of its own."""

    def __init__(self, op: TritonOp, program: TritonProgram) -> None:
        self._op = op

    def variants(self) -> Iterator[KernelVariant]:
        return iter(())


class Norm(_KernelOperator):
    """RMSNorm of the groups of a row, or of its sum with the residual if there is one."""

    def __init__(self, op: TritonOp, program: TritonProgram) -> None:
        self._op, self._columns = op, op.width // op.groups
        types = {
            **_pointers(program, X=op.a.buffer, RESIDUAL=op.b.buffer, OUT=op.dst.buffer), "WEIGHT": "*fp32",
            **_sizes("rows", "groups", "columns", "x_token", "residual_token", "out_token"), "epsilon": "fp32",
        }  # fmt: skip
        width = power_of_two(self._columns)
        self._rows = max(1, NUMBERS // width)
        constants = {"ROWS": self._rows, "WIDTH": width, "ADD": op.b.buffer >= 0}
        self._variant = KernelVariant.of("norm.rms_norm", types, constants, 8 if width > 4096 else 4)

    def run(self, step: TritonStep) -> None:
        op = self._op
        x, out = step.view(op.a, op.width, op.late), step.view(op.dst, op.width, op.late)
        residual = x if op.b.buffer < 0 else step.view(op.b, op.width, op.late)
        arguments = {
            "X": x, "RESIDUAL": residual, "WEIGHT": step.store.vector(op.vector, self._columns), "OUT": out,
            "rows": len(x) * op.groups, "groups": op.groups, "columns": self._columns, "x_token": x.stride(0),
            "residual_token": residual.stride(0), "out_token": out.stride(0), "epsilon": op.scale,
        }  # fmt: skip
        step.launch(self._variant, (pieces(len(x) * op.groups, self._rows),), arguments)


class Combine(_KernelOperator):
    """Scale, bias, sum and soft cap of rows."""

    def __init__(self, op: TritonOp, program: TritonProgram) -> None:
        self._op = op
        types = {
            **_pointers(program, X=op.a.buffer, OTHER=op.b.buffer, OUT=op.dst.buffer), "BIAS": "*fp32",
            **_sizes("rows", "columns", "x_token", "other_token", "out_token"), "factor": "fp32", "cap": "fp32",
        }  # fmt: skip
        flags = {"WITH_BIAS": op.vector >= 0, "WITH_OTHER": op.b.buffer >= 0, "CAPPED": op.cap > 0}
        self._rows, self._width = tile_of(op.width)
        constants = {"ROWS": self._rows, "WIDTH": self._width, **flags}
        self._variant = KernelVariant.of("elementwise.combine", types, constants)

    def run(self, step: TritonStep) -> None:
        op = self._op
        x, out = step.view(op.a, op.width, op.late), step.view(op.dst, op.width, op.late)
        other = x if op.b.buffer < 0 else step.view(op.b, op.width, op.late)
        bias = step.store.nothing if op.vector < 0 else step.store.vector(op.vector, op.width)
        arguments = {
            "X": x, "BIAS": bias, "OTHER": other, "OUT": out, "rows": len(x), "columns": op.width, "factor": op.scale,
            "cap": op.cap, "x_token": x.stride(0), "other_token": other.stride(0), "out_token": out.stride(0),
        }  # fmt: skip
        step.launch(self._variant, (pieces(len(x), self._rows), pieces(op.width, self._width)), arguments)


class Gate(_KernelOperator):
    """A gated activation."""

    def __init__(self, op: TritonOp, program: TritonProgram) -> None:
        self._op = op
        types = {
            **_pointers(program, GATE=op.a.buffer, UP=op.b.buffer, OUT=op.dst.buffer),
            **_sizes("rows", "columns", "gate_token", "up_token", "out_token"),
        }
        self._rows, self._width = tile_of(op.width)
        constants = {"ROWS": self._rows, "WIDTH": self._width, "ACT": ACTIVATIONS[op.act]}
        self._variant = KernelVariant.of("gate.gate", types, constants)

    def run(self, step: TritonStep) -> None:
        op = self._op
        gate, up, out = (step.view(v, op.width, op.late) for v in (op.a, op.b, op.dst))
        arguments = {
            "GATE": gate, "UP": up, "OUT": out, "rows": len(gate), "columns": op.width,
            "gate_token": gate.stride(0), "up_token": up.stride(0), "out_token": out.stride(0),
        }  # fmt: skip
        step.launch(self._variant, (pieces(len(gate), self._rows), pieces(op.width, self._width)), arguments)


class Rotate(_KernelOperator):
    """Rotary embedding of queries, in place."""

    def __init__(self, op: TritonOp, program: TritonProgram) -> None:
        self._op = op
        rotated = 2 * program.ropes[op.index].count
        types = {
            **_pointers(program, X=op.dst.buffer), "POSITIONS": "*i32", "COS": "*fp32", "SIN": "*fp32",
            **_sizes("rows", "heads", "x_token"),
        }  # fmt: skip
        width = power_of_two(rotated // 2)
        self._rows = max(1, NUMBERS // width)
        constants = {
            "HEAD": op.width // op.groups, "ROTATED": rotated, "INTERLEAVED": op.interleaved, "ROWS": self._rows,
            "WIDTH": width,
        }  # fmt: skip
        self._variant = KernelVariant.of("rotary.rotate", types, constants)

    def run(self, step: TritonStep) -> None:
        op = self._op
        x = step.view(op.dst, op.width, op.late)
        cos, sin = step.store.rope(op.index)
        arguments = {
            "X": x, "POSITIONS": step.positions, "COS": cos, "SIN": sin, "rows": len(x) * op.groups,
            "heads": op.groups, "x_token": x.stride(0),
        }  # fmt: skip
        step.launch(self._variant, (pieces(len(x) * op.groups, self._rows),), arguments)


class Rows(_TorchOperator):
    """Selects the rows that need logits."""

    def run(self, step: TritonStep) -> None:
        op = self._op
        out = step.view(op.dst, op.width, True)
        out.copy_(step.view(op.a, op.width, False).index_select(0, step.wanted))


class Reduce(_TorchOperator):
    """Sums a value over all cards, in place."""

    def run(self, step: TritonStep) -> None:
        step.reduce(step.view(self._op.dst, self._op.width, self._op.late))


_PLAIN: dict[str, Any] = {
    "norm": Norm, "combine": Combine, "gate": Gate, "rotate": Rotate, "rows": Rows, "reduce": Reduce,
}  # fmt: skip


def _form(matrix: TritonMatrix) -> dict[str, Any]:
    return {"BITS": matrix.bits, "BLOCK": matrix.block, "OFFSET": matrix.offsets >= 0, "ZERO": matrix.zero}


def _block_types(matrix: TritonMatrix) -> dict[str, str]:
    return {"QUANTS": "*u8", "SCALES": f"*{matrix.scale_number}", "OFFSETS": f"*{matrix.offset_number}"}


class Embed(_KernelOperator):
    """Rows of the embedding."""

    def __init__(self, op: TritonOp, program: TritonProgram, arch: int) -> None:
        self._op, self._matrix = op, program.matrices[op.matrix]
        types = {
            "IDS": "*i64", **_pointers(program, OUT=op.dst.buffer), **_sizes("rows", "columns", "out_token"),
            "factor": "fp32",
        }  # fmt: skip
        self._rows, self._width = tile_of(op.width)
        tile = {"ROWS": self._rows, "WIDTH": self._width}
        if self._matrix.bits:
            types |= _block_types(self._matrix)
            self._variant = KernelVariant.of("embed.embed_blocks", types, {**tile, **_form(self._matrix)})
        else:
            types["TABLE"] = f"*{program.number}"
            self._variant = KernelVariant.of("embed.embed", types, tile)

    def run(self, step: TritonStep) -> None:
        op, out = self._op, step.view(self._op.dst, self._op.width, False)
        arguments = {
            "IDS": step.ids, "OUT": out, "rows": len(out), "columns": op.width, "factor": op.scale,
            "out_token": out.stride(0), **step.store.matrix(op.matrix),
        }  # fmt: skip
        step.launch(self._variant, (pieces(len(out), self._rows), pieces(op.width, self._width)), arguments)


class LinearProduct:
    """A product with a matrix: blocks by Triton kernels, plain matrices by cuBLAS."""

    def __init__(self, op: TritonOp, program: TritonProgram, arch: int) -> None:
        self._op, self._matrix = op, program.matrices[op.matrix]
        self._many: list[tuple[int, KernelVariant]] = []
        """(most rows, kernel), fewest first."""
        if not self._matrix.bits:
            return
        types = {**_pointers(program, X=op.a.buffer, OUT=op.dst.buffer), **_block_types(self._matrix)}
        types |= _sizes("outputs", "blocks", "x_token", "out_token")
        form, tiles = _form(self._matrix), linear_tiles(arch, program.number)
        for tile in tiles.many:
            constants = {"ROWS": tile.rows, "OUTPUTS": tile.outputs, "WIDTH": tile.width, **form}
            variant = KernelVariant.of(
                "linear.multiply_many", types | _sizes("rows"), constants, tile.warps, tile.stages
            )
            self._many.append((tile.rows, variant))
        few = tiles.few
        self._few = KernelVariant.of(
            "linear.multiply_few", types, {"OUTPUTS": few.outputs, "WIDTH": few.width, **form}, few.warps, few.stages
        )

    def variants(self) -> Iterator[KernelVariant]:
        if self._matrix.bits:
            yield self._few
            yield from (variant for _, variant in self._many)

    def run(self, step: TritonStep) -> None:
        op, matrix = self._op, self._matrix
        x = step.view(op.a, matrix.columns, op.late)
        out = step.view(op.dst, matrix.rows, op.late)
        if not matrix.bits:
            step.store.multiply(x, step.store.matrix(op.matrix)["TABLE"], out)
            return
        rows = len(x)
        arguments = {
            "X": x, "OUT": out, "outputs": matrix.rows, "blocks": matrix.columns // matrix.block,
            "x_token": x.stride(0), "out_token": out.stride(0), **step.store.matrix(op.matrix),
        }  # fmt: skip
        if rows == 1:
            outputs = dict(self._few.constants)["OUTPUTS"]
            step.launch(self._few, (1, pieces(matrix.rows, outputs)), arguments)
            return
        size, variant = next(((n, v) for n, v in self._many if n >= rows), self._many[-1])
        outputs = dict(variant.constants)["OUTPUTS"]
        step.launch(variant, (pieces(rows, size), pieces(matrix.rows, outputs)), {**arguments, "rows": rows})


class LinearFloat8:
    """A product with a float8 matrix; the activations of several rows are quantized to float8 first."""

    def __init__(self, op: TritonOp, program: TritonProgram, arch: int) -> None:
        self._op, self._matrix = op, program.matrices[op.matrix]
        x, out = (f"*{number_of(program, view.buffer)}" for view in (op.a, op.dst))
        types = {"QUANTS": "*fp8e4nv", "SCALES": "*fp32", "OUT": out, **_sizes("outputs", "blocks", "out_token")}
        quantized = {"CODES": "*fp8e4nv", "ROW_SCALES": "*fp32", **_sizes("codes_token")}
        self._many: list[tuple[int, KernelVariant]] = []
        """(most rows, kernel), fewest first."""
        tiles = float8_tiles(arch)
        for tile in tiles.many:
            constants = {"ROWS": tile.rows, "OUTPUTS": tile.outputs, "WIDTH": tile.width}
            many = {**types, **quantized, **_sizes("rows")}
            variant = KernelVariant.of("linear.multiply_many_float8", many, constants, tile.warps, tile.stages)
            self._many.append((tile.rows, variant))
        given = {"X": x, **_sizes("x_token")}
        few = tiles.few
        constants = {"OUTPUTS": few.outputs, "WIDTH": few.width}
        self._few = KernelVariant.of("linear.multiply_few_float8", {**types, **given}, constants, few.warps, few.stages)
        self._quantize = KernelVariant.of(
            "linear.quantize_rows", {**given, **quantized, **_sizes("blocks")}, {"WIDTH": WIDTH}
        )

    def variants(self) -> Iterator[KernelVariant]:
        yield from (self._few, self._quantize)
        yield from (variant for _, variant in self._many)

    def run(self, step: TritonStep) -> None:
        op, matrix, store = self._op, self._matrix, step.store
        x = step.view(op.a, matrix.columns, op.late)
        out = step.view(op.dst, matrix.rows, op.late)
        rows, blocks = len(x), matrix.columns // matrix.block
        arguments = {
            "OUT": out, "outputs": matrix.rows, "blocks": blocks, "out_token": out.stride(0), **store.matrix(op.matrix),
        }  # fmt: skip
        given = {"X": x, "x_token": x.stride(0)}
        if rows == 1:
            outputs = dict(self._few.constants)["OUTPUTS"]
            step.launch(self._few, (1, pieces(matrix.rows, outputs)), {**arguments, **given})
            return
        codes = store.empty((rows, matrix.columns), "fp8e4nv")
        quantized = {"CODES": codes, "ROW_SCALES": store.empty((rows,), "fp32"), "codes_token": matrix.columns}
        step.launch(self._quantize, (rows,), {**given, **quantized, "blocks": blocks})
        size, variant = next(((n, v) for n, v in self._many if n >= rows), self._many[-1])
        grid = pieces(rows, size), pieces(matrix.rows, dict(variant.constants)["OUTPUTS"])
        step.launch(variant, grid, {**arguments, **quantized, "rows": rows})


def _matrix_kind(op: TritonOp, program: TritonProgram, arch: int) -> Callable[[TritonOp, TritonProgram, int], Operator]:
    """The class of an operator with a matrix."""
    if op.kind == "embed":
        return Embed
    if program.matrices[op.matrix].float8:
        return LinearFloat8
    return LinearProduct if arch in (INTERPRETER, *TENSOR_CORES) else UnpackingProduct


class UnpackingProduct(LinearProduct):
    """A product on sm_70, where Triton does not use tensor cores but cuBLAS does: for many rows, matrices in blocks are
    unpacked piece by piece, which costs one pass over their numbers, and multiplied by cuBLAS."""

    def __init__(self, op: TritonOp, program: TritonProgram, arch: int) -> None:
        super().__init__(op, program, arch)
        self._number = program.number
        matrix = self._matrix
        if not matrix.bits:
            return
        types = {
            "IDS": "*i64", "OUT": f"*{program.number}", **_sizes("rows", "columns", "out_token"), "factor": "fp32",
            **_block_types(matrix),
        }  # fmt: skip
        self._rows, self._width = tile_of(matrix.columns)
        tile = {"ROWS": self._rows, "WIDTH": self._width}
        self._unpack = KernelVariant.of("embed.embed_blocks", types, {**tile, **_form(matrix)})

    def variants(self) -> Iterator[KernelVariant]:
        yield from super().variants()
        if self._matrix.bits:
            yield self._unpack

    def run(self, step: TritonStep) -> None:
        op, matrix = self._op, self._matrix
        x = step.view(op.a, matrix.columns, op.late)
        if not matrix.bits or len(x) <= UNPACKED_FROM:
            super().run(step)
            return
        out = step.view(op.dst, matrix.rows, op.late)
        for begin in range(0, matrix.rows, PIECE):
            count = min(PIECE, matrix.rows - begin)
            plain = step.store.empty((count, matrix.columns), self._number)
            arguments = {
                "IDS": step.store.numbers(begin, count), "OUT": plain, "rows": count, "columns": matrix.columns,
                "factor": 1.0, "out_token": matrix.columns, **step.store.matrix(op.matrix),
            }  # fmt: skip
            grid = pieces(count, self._rows), pieces(matrix.columns, self._width)
            step.launch(self._unpack, grid, arguments)
            step.store.multiply(x, plain, out[:, begin : begin + count])


UNPACKED_FROM = 16
"""Up to this many rows, products on CUDA cores cost less than unpacking."""
PIECE = 4096
"""Rows of a matrix that are unpacked at once."""


def all_variants(found: Sequence[Operator]) -> list[KernelVariant]:
    """All variants of the operators, without duplicates, in order."""
    return list(dict.fromkeys(v for operator in found for v in operator.variants()))


if TYPE_CHECKING:
    _: type[Store]

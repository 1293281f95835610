"""Opens and runs a program: maps weights, starts threads, runs steps. The only module that calls the library."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transom.errors import EngineError, OptionError, option
from transom.programs.written import View
from transom.signature import LayerCache
from transom.sparsity import Sparsity
from transom_openvino_cpu.native import layout
from transom_openvino_cpu.native import library as native
from transom_openvino_cpu.native.policies import NativePolicy
from transom_openvino_cpu.native.program import ACTIVATIONS, BY, CACHES, KINDS, NativeProgram
from transom_openvino_cpu.page_memory import PageMemory

Array = np.ndarray[Any, np.dtype[Any]]


class NativeEngine:
    """Runs a program.

    Args:
        weights: the file of weights that the program refers to.
        level: the instruction set, one of `library.LEVELS`.
        threads: processor threads, at least 1.

    Raises:
        EngineError: the library is missing, or rejects the program.
    """

    page_tokens = native.PAGE_TOKENS

    def __init__(self, program: NativeProgram, weights: Path, level: str, threads: int) -> None:
        lib = native.library()
        if lib is None:
            raise EngineError(
                "This compiled model needs Transom's native library, which this installation lacks",
                "Install a wheel of Transom for this platform, or clear the compiled models: transom cache clear",
            )
        if not native.permitted(level):
            raise EngineError(
                f"This process may not use the instructions of {level}",
                "Load the model in a new process, which then selects an instruction set that it may use",
            )
        self._lib, self.program, self._process = lib, program, os.getpid()
        self._engine, self._pool = ctypes.c_void_p(), ctypes.c_void_p()
        if weights.stat().st_size != program.weight_bytes:
            raise EngineError(
                f"This compiled model is damaged: {weights.name} has {weights.stat().st_size} bytes in place of "
                f"{program.weight_bytes}",
                "Remove it with: transom cache clear",
            )
        with weights.open("rb") as f:
            self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(self._map, "madvise"):
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_WILLNEED)
        view = np.frombuffer(self._map, np.uint8)
        self._base = view.ctypes.data
        del view
        self._check(lib.tr_pool_new(threads, ctypes.byref(self._pool)))
        try:
            self._check(
                lib.tr_open(ctypes.byref(self._structure()), level.encode(), self._pool, ctypes.byref(self._engine))
            )
        except BaseException:
            lib.tr_pool_free(self._pool)
            raise
        self.vocabulary = program.buffers[program.output].width
        self._pages: list[PageMemory] = []
        self._spare = 0
        self._policies: dict[str, NativePolicy | None] = {}
        self._caches = [LayerCache(x.heads, x.kv_heads, x.head_dim, x.value_dim, x.window) for x in program.layers]

    def _check(self, status: int) -> None:
        if status:
            raise EngineError(f"Transom's native library cannot run this model: {native.ERRORS.get(status, status)}")

    def _place(self, at: int, size: int) -> int | None:
        """The address of `size` bytes at offset `at` of the weights; None for -1."""
        if at == -1:
            return None
        if at < 0 or at % layout.ALIGNMENT or at + size > self.program.weight_bytes:
            self._check(native.BAD_PROGRAM)
        return self._base + at

    def _structure(self) -> native.CProgram:
        p = self.program

        def view(v: View) -> native.CView:
            return native.CView(v.buffer, v.offset)

        ops = (native.COp * len(p.ops))(
            *(
                native.COp(
                    KINDS.index(o.kind), o.width, view(o.dst), view(o.a), view(o.b), view(o.c), o.matrix, o.groups,
                    o.index, ACTIVATIONS.index(o.act), BY.index(o.by), o.scale,
                    self._place(o.vector, 4 * (o.width // max(o.groups, 1) if o.kind == "norm" else o.width)),
                )
                for o in p.ops
            )
        )  # fmt: skip
        matrices = (native.CMatrix * len(p.matrices))(
            *(
                native.CMatrix(
                    m.kind,
                    m.rows,
                    m.columns,
                    m.block,
                    m.zero,
                    m.has_minimums,
                    m.wide_scales,
                    m.outer,
                    self._place(m.at, layout.matrix_bytes(m)),
                )
                for m in p.matrices
            )
        )
        ropes = (native.CRope * len(p.ropes))(
            *(native.CRope(self._place(r.at, 4 * r.count), r.count, r.factor) for r in p.ropes)
        )
        layers = (native.CLayer * len(p.layers))(
            *(
                native.CLayer(
                    x.heads,
                    x.kv_heads,
                    x.head_dim,
                    x.value_dim,
                    x.window,
                    x.scale,
                    x.softcap,
                    self._place(x.sinks, 4 * x.heads),
                )
                for x in p.layers
            )
        )
        buffers = (native.CBuffer * len(p.buffers))(*(native.CBuffer(b.width, b.local) for b in p.buffers))
        return native.CProgram(
            len(ops), len(matrices), len(ropes), len(layers), len(buffers), CACHES.index(p.cache), True, p.output, ops,
            matrices, ropes, layers, buffers,
        )  # fmt: skip

    # routes: the state that sparse attention keeps for a sequence -----------------------------------------------------
    def new_route(self) -> int:
        route = ctypes.c_void_p()
        self._check(self._lib.tr_route_new(self._engine, ctypes.byref(route)))
        return int(route.value or 0)

    def copy_route(self, route: int) -> int:
        """A copy of a route, with counts of zero."""
        copy = ctypes.c_void_p()
        self._check(self._lib.tr_route_copy(self._engine, route, ctypes.byref(copy)))
        return int(copy.value or 0)

    def free_route(self, route: int) -> None:
        """Free a route; allowed after the engine was closed."""
        self._lib.tr_route_free(route)

    def route_data(self, route: int) -> Array:
        """A writable view of a route's memory, uint8 [bytes]."""
        memory = ctypes.c_void_p()
        size = int(self._lib.tr_route_data(route, ctypes.byref(memory)))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(memory.value or 0))

    def route_fits(self, route: int, tokens: int) -> bool:
        """Whether the content of `route_data` is valid for a sequence of `tokens` tokens."""
        return int(self._lib.tr_route_check(self._engine, route, tokens)) == 0

    def take_counts(self, route: int) -> Array:
        """Keys that the sequence's queries read, and that they could see, since the last call: float64
        [2, layers, largest kv_heads]."""
        heads = [layer.kv_heads for layer in self.program.layers]
        flat = np.zeros((2, sum(heads)))
        self._lib.tr_route_counts(self._engine, route, flat[0].ctypes.data, flat[1].ctypes.data)
        counts = np.zeros((2, len(heads), max(heads)))
        at = 0
        for i, n in enumerate(heads):
            counts[:, i, :n] = flat[:, at : at + n]
            at += n
        return counts

    def policy(self, text: str) -> NativePolicy | None:
        """A canonical policy in the library's format; None for a dense policy.

        Raises:
            ValueError: the text is not a policy, or the library cannot apply it.
        """
        if text not in self._policies:
            try:
                policy = Sparsity.from_string(text)
                self._policies[text] = None if policy.dense else NativePolicy(policy, self._caches)
            except OptionError as e:
                raise ValueError(str(e)) from e
        return self._policies[text]

    # pages ------------------------------------------------------------------------------------------------------------
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        return sum(self.layer_page_bytes(i) for i in range(len(self.program.layers)))

    def layer_page_bytes(self, layer: int) -> int:
        """Bytes of one page of a layer."""
        return int(self._lib.tr_page_bytes(self._engine, layer))

    def bind_pages(self, pages: int) -> None:
        """Reserve memory for `pages` pages; the system commits it as pages are written. One extra page is for the
        warm-up."""
        self._spare = pages
        pages += 1
        for i in range(len(self.program.layers)):
            memory = PageMemory(pages, self.layer_page_bytes(i))
            self._pages.append(memory)
            self._lib.tr_set_cache(self._engine, i, memory.bytes.ctypes.data, pages)

    def copy_page(self, source: int, target: int) -> None:
        for memory in self._pages:
            memory.bytes[target] = memory.bytes[source]

    def drop_pages(self, pages: Sequence[int]) -> None:
        """Release the memory of pages that no sequence holds. Does nothing once the engine is closed."""
        for memory in self._pages:
            memory.drop(pages)

    def page_data(self, layer: int, pages: Sequence[int]) -> Array:
        """A copy of some pages of a layer: uint8 [pages, bytes]."""
        return self._pages[layer].bytes[list(pages)]

    def set_page_data(self, layer: int, pages: Sequence[int], data: Array) -> None:
        """Write the output of `page_data`."""
        self._pages[layer].bytes[list(pages)] = data

    def warm_up(self) -> None:
        """Run one token of no sequence, which brings all weights into memory."""
        self.step([np.zeros(1, np.int64)], [0], [[self._spare]], [0])

    # steps ------------------------------------------------------------------------------------------------------------
    def step(
        self,
        tokens: Sequence[Array],
        past: Sequence[int],
        pages: Sequence[Sequence[int]],
        rows: Sequence[int],
        policies: Sequence[NativePolicy | None] = (),
        routes: Sequence[int] = (),
    ) -> Array:
        """Run the new tokens of some sequences; returns logits, float32 [rows, vocabulary], owned by the caller.

        Args:
            tokens: new token ids of each sequence, int64 [new].
            past: cached tokens of each sequence.
            pages: pages of each sequence, including those for the new tokens.
            rows: indices of the tokens that need logits, among the new tokens of all sequences.
            policies, routes: one per sequence, or empty; a sequence with a policy needs a route, 0 means no route.

        Raises:
            EngineError: there is not enough memory, attention or the last layer computed numbers that are not finite,
                a token id, page or row is outside the program's memory, or this is a fork of the process that opened
                the engine.
        """
        self._need_own_process()
        flat = tokens[0] if len(tokens) == 1 else np.concatenate(tokens)
        flat = np.ascontiguousarray(flat, np.int64)
        tables = [np.asarray(p, np.int32) for p in pages]
        parts = (native.CPart * len(tokens))()
        begin = 0
        for part, new, old, table in zip(parts, tokens, past, tables, strict=True):
            part.begin, part.count, part.past, part.pages = begin, len(new), old, len(table)
            part.page = table.ctypes.data
            begin += len(new)
        for part, policy, route in zip(parts, policies, routes, strict=False):
            if policy is not None:
                part.sparsity = policy.pointer
            part.route = route or None
        wanted = np.asarray(rows, np.int32)
        logits = np.empty((len(rows), self.vocabulary), np.float32)
        step = native.CStep(
            len(flat), len(parts), len(wanted), 0, flat.ctypes.data, parts, wanted.ctypes.data, logits.ctypes.data
        )
        layer = ctypes.c_int32(-1)
        status = self._lib.tr_run(self._engine, ctypes.byref(step), ctypes.byref(layer))
        if status == native.NOT_FINITE:
            where = f"The attention of layer {layer.value}" if layer.value >= 0 else "The last layer"
            raise EngineError(
                f"{where} computed numbers that are not finite",
                f"The model's weights may be damaged, or need a wider precision: try {option('precision', 'exact')}",
            )
        self._check(status)
        return logits

    def times(self) -> dict[str, float]:
        """Thread seconds by activity since the last call; the first call starts the clocks.

        Raises:
            EngineError: there is not enough memory.
        """
        seconds = np.zeros(len(native.TIMES))
        self._check(self._lib.tr_times(self._engine, seconds.ctypes.data))
        return dict(zip(native.TIMES, seconds.tolist(), strict=True))

    def _need_own_process(self) -> None:
        """A fork has no threads of the pool, so that a step would wait for them forever."""
        if os.getpid() != self._process:
            raise EngineError(
                "The process was forked after this model was loaded, and its threads were not copied",
                "Load the model in the new process, or start that with multiprocessing's 'spawn' method",
            )

    def close(self) -> None:
        if self._engine and os.getpid() == self._process:
            self._lib.tr_close(self._engine)
            self._lib.tr_pool_free(self._pool)
            self._engine = ctypes.c_void_p()
            self._pages.clear()

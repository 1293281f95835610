"""The compiled library: its C interface (see `src/abi.h`), and the instruction sets that a device can run."""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transom.contract import Device

FILE = "libtransom_cpu.so"
REASON = "not_built.txt"
LEVEL_SWITCH = "TRANSOM_NATIVE_LEVEL"
"""Environment variable: the best instruction set that may be used, one of `LEVELS`."""
PAGE_TOKENS = 64
"""Tokens in a page of the cache: TR_PAGE."""

_AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"})
LEVELS = {
    "amx": _AVX512 | {"avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"},
    "avx512_bf16": _AVX512 | {"avx512_bf16"},
    "avx512": _AVX512,
    "avx_vnni": frozenset({"avx2", "fma", "f16c", "avx_vnni"}),
    "avx2": frozenset({"avx2", "fma", "f16c"}),
    "scalar": frozenset(),
}
"""CPU features that each instruction set needs, best first."""
BFLOAT16_FIRST = frozenset({"amx"})
"""Instruction sets that multiply bfloat16 faster than int8, whose sums have to be scaled."""


class CMatrix(Structure):
    """tr_matrix."""

    _fields_ = [
        ("kind", c_int32), ("rows", c_int32), ("columns", c_int32), ("block", c_int32), ("zero", c_int32),
        ("has_minimums", c_int32), ("wide_scales", c_int32), ("outer", c_int32), ("data", c_void_p),
    ]  # fmt: skip


class CView(Structure):
    """tr_view."""

    _fields_ = [("buffer", c_int32), ("offset", c_int32)]


class COp(Structure):
    """tr_op."""

    _fields_ = [
        ("kind", c_int32), ("width", c_int32), ("dst", CView), ("a", CView), ("b", CView), ("c", CView),
        ("matrix", c_int32), ("groups", c_int32), ("index", c_int32), ("act", c_int32), ("by", c_int32),
        ("scale", c_float), ("vector", c_void_p),
    ]  # fmt: skip


class CRope(Structure):
    """tr_rope."""

    _fields_ = [("frequencies", c_void_p), ("count", c_int32), ("factor", c_float)]


class CLayer(Structure):
    """tr_layer."""

    _fields_ = [
        ("heads", c_int32), ("kv_heads", c_int32), ("head_dim", c_int32), ("value_dim", c_int32), ("window", c_int32),
        ("scale", c_float), ("softcap", c_float), ("sinks", c_void_p),
    ]  # fmt: skip


class CBuffer(Structure):
    """tr_buffer."""

    _fields_ = [("width", c_int32), ("local", c_int32)]


class CProgram(Structure):
    """tr_program."""

    _fields_ = [
        ("ops", c_int32), ("matrices", c_int32), ("ropes", c_int32), ("layers", c_int32), ("buffers", c_int32),
        ("cache", c_int32), ("routed", c_int32), ("output", c_int32), ("op", POINTER(COp)),
        ("matrix", POINTER(CMatrix)), ("rope", POINTER(CRope)), ("layer", POINTER(CLayer)),
        ("buffer", POINTER(CBuffer)),
    ]  # fmt: skip


class CSparsityRule(Structure):
    """tr_sparsity."""

    _fields_ = [
        ("coverage", c_float), ("min_density", c_float), ("max_density", c_float), ("local", c_int32),
        ("columns", c_int32), ("unit", c_int32), ("rows", c_int32), ("dense_below", c_int32), ("top_k", c_int32),
        ("node", c_int32), ("mean_score", c_int32), ("unused", c_int32), ("heads", c_void_p),
    ]  # fmt: skip


class CPart(Structure):
    """tr_part."""

    _fields_ = [
        ("begin", c_int32), ("count", c_int32), ("past", c_int32), ("pages", c_int32), ("page", c_void_p),
        ("sparsity", POINTER(CSparsityRule)), ("route", c_void_p),
    ]  # fmt: skip


class CStep(Structure):
    """tr_step."""

    _fields_ = [
        ("tokens", c_int32), ("parts", c_int32), ("rows", c_int32), ("unused", c_int32), ("token", c_void_p),
        ("part", POINTER(CPart)), ("row", c_void_p), ("logits", c_void_p),
    ]  # fmt: skip


TIMES = (
    "embedding and elementwise", "normalization", "rotary", "rounding of activations", "matrix products",
    "activations and residuals", "vocabulary", "writing the cache", "columns", "routing", "attention",
)  # fmt: skip
"""Activities that the threads' time is counted for: TR_TIME_…"""

ERRORS = {
    -1: "there is not enough memory",
    -2: "the threads cannot be started",
    -3: "the library was built without this instruction set",
    -4: "the program does not fit the library",
    -6: "a token, a page or a row of the step is outside the program's memory",
}
BAD_PROGRAM, NOT_FINITE = -4, -5


def path() -> Path:
    return Path(__file__).with_name(FILE)


def why_not_built() -> str:
    """Why the build made no library, in parentheses for the end of a sentence; empty if unknown."""
    try:
        first = Path(__file__).with_name(REASON).read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return ""
    return f" ({first.rstrip('.')})"


@functools.cache
def library() -> Any:
    """The loaded library; None if it was not built.

    Raises:
        OSError: the file exists and cannot be loaded.
    """
    if not path().exists():
        return None
    lib = ctypes.CDLL(str(path()))
    lib.tr_levels.restype = c_char_p
    lib.tr_pool_new.argtypes = [c_int32, POINTER(c_void_p)]
    lib.tr_pool_free.argtypes, lib.tr_pool_free.restype = [c_void_p], None
    lib.tr_open.argtypes = [POINTER(CProgram), c_char_p, c_void_p, POINTER(c_void_p)]
    lib.tr_close.argtypes, lib.tr_close.restype = [c_void_p], None
    lib.tr_page_bytes.argtypes, lib.tr_page_bytes.restype = [c_void_p, c_int32], c_int64
    lib.tr_set_cache.argtypes, lib.tr_set_cache.restype = [c_void_p, c_int32, c_void_p, c_int32], None
    lib.tr_route_new.argtypes = [c_void_p, POINTER(c_void_p)]
    lib.tr_route_copy.argtypes = [c_void_p, c_void_p, POINTER(c_void_p)]
    lib.tr_route_free.argtypes, lib.tr_route_free.restype = [c_void_p], None
    lib.tr_route_data.argtypes, lib.tr_route_data.restype = [c_void_p, POINTER(c_void_p)], c_int64
    lib.tr_route_check.argtypes = [c_void_p, c_void_p, c_int32]
    lib.tr_route_counts.argtypes, lib.tr_route_counts.restype = [c_void_p] * 4, None
    lib.tr_times.argtypes = [c_void_p, c_void_p]
    lib.tr_run.argtypes = [c_void_p, POINTER(CStep), POINTER(c_int32)]
    return lib


def built_levels() -> list[str]:
    """The instruction sets in the library; empty without a library."""
    lib = library()
    return [] if lib is None else lib.tr_levels().decode().split()


def level_for(device: Device) -> str | None:
    """The best instruction set that the device, the library, this process's permissions and `LEVEL_SWITCH` allow."""
    names = list(LEVELS)
    limit = os.environ.get(LEVEL_SWITCH)
    allowed = set(names[names.index(limit) :] if limit in names else names).intersection(built_levels())
    fit = (name for name, needed in LEVELS.items() if name in allowed and needed <= device.features)
    return next((name for name in fit if permitted(name)), None)


@functools.cache
def permitted(level: str) -> bool:
    """Whether this process may use an instruction set: Linux enables the AMX registers only on request.

    It refuses if a thread's signal stack is too small to hold them (Linux documentation, x86/xstate).
    """
    if level != "amx":
        return True
    ask, tile_data = 0x1023, 18  # ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    try:
        return bool(ctypes.CDLL(None).syscall(158, ask, tile_data) == 0)  # arch_prctl
    except (OSError, AttributeError):
        return False

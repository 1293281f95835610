"""Compiles the native library of the CPU backend: hatchling's build hook, and a command for developers.

The sources become one shared object beside them, which `pip install -e .` leaves in the tree and a wheel carries. It is
compiled again only when a source, a flag or the compiler changed. The compiler is `CXX`, else a system g++ or clang++
that knows every instruction set, else the zig that comes as a package, which pip is then asked for.

An install never fails because of the library: where it cannot be built, a text file in its place says why.
`TRANSOM_NATIVE=0` leaves it out, `TRANSOM_NATIVE=require` makes a failure an error.

Knows flags and compilers, and nothing of what the sources compute.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a command, where nothing needs hatchling
    BuildHookInterface = object

PACKAGE = "backends/openvino_cpu"
NATIVE = "transom_openvino_cpu/native"
LIBRARY = "libtransom_cpu.so"
STAMP = "libtransom_cpu.stamp"
"""Holds the digest of all that the library beside it was made from, and that of the library."""
REASON = "not_built.txt"
"""Stands in for the library where there is none: a sentence of cause, one of what to do, then the compiler's words."""

COMMON = (
    "-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-math-errno",
    "-ffp-contract=fast", "-pthread", "-Wall",
)  # fmt: skip
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c")
LEVELS = {
    "level_scalar": (),
    "level_avx2": _AVX2,
    "level_avx_vnni": (*_AVX2, "-mavxvnni"),
    "level_avx512": _AVX512,
    "level_avx512_bf16": (*_AVX512, "-mavx512bf16"),
    "level_amx": (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
}
"""Flags of the units that are for one instruction set, the lowest first. All other units are for every x86-64."""

LINK = ("-nodefaultlibs", "-lm", "-lpthread", "-lc", "-lgcc")
"""Without the C++ library, and with the compiler's own helpers inside, so that only the C library is needed."""

ZIG = "ziglang==0.17.1"
"""Exactly one, since the flags depend on it; the stamp then needs no installed zig to know its version."""
ZIG_GLIBC = (2, 28)
"""The oldest glibc that zig builds for: that of the wheels of OpenVINO and NumPy."""
# -nostdlib leaves out zig's compiler-rt too, which it would compile first, for half a minute and more.
ZIG_LINK = ("-nostdlib", "-lc", "-lm", "-lpthread", "-s")

PROBE = """#include <immintrin.h>
#include <algorithm>
extern "C" __m512 probe(__m512 a, __m512bh b, int n) { return _mm512_dpbf16_ps(a, b, b) * float(std::min(n, 2)); }
"""

MOST_LINES = 60
"""Of a compiler's words. The first ones count; one mistake in a template can fill megabytes."""

TO_DO = (
    "Install g++ (11 or newer) or clang++ (12 or newer), or name one in CXX, and install Transom again; "
    "TRANSOM_NATIVE=0 leaves the library out on purpose."
)


class BuildError(Exception):
    """The library cannot be built; the text is fit for a person."""


class Compiler(NamedTuple):
    """A C++ compiler. `command` takes flags; `version` is its own words, or a requirement that pip can satisfy."""

    command: tuple[str, ...]
    version: str
    zig: bool = False


# -------------------------------------------------------------------------------------------------- where and with what
def unsupported() -> str:
    """Why no library is built on this platform; empty where one is."""
    system, machine = platform.system(), platform.machine()
    if system != "Linux" or machine not in ("x86_64", "AMD64") or sys.maxsize < 2**32:
        return f"it is for 64-bit Linux on x86-64, and this is {system} on {machine}"
    if platform.libc_ver()[0] != "glibc":
        return "it is for systems with glibc, and this is one without"
    return ""


def mode() -> str:
    """What `TRANSOM_NATIVE` asks a build for: nothing, `0` or `require`. Raises `BuildError` for a word unknown."""
    value = os.environ.get("TRANSOM_NATIVE", "").strip()
    if value not in ("", "0", "require", "measure"):
        raise BuildError(f"TRANSOM_NATIVE is {value!r}. Set it to 0 or to require, or do not set it.")
    return "" if value == "measure" else value  # which is for loading models


def candidates(name: str = "") -> list[Compiler]:
    """The compilers that may be used, best first: the one that is named, else the one in `CXX`, else what is found.

    `zig` names the package `ziglang`. Nothing is tried out here but `--version`.
    """
    zig = Compiler((sys.executable, "-m", "ziglang", "c++", "-target", _zig_target()), ZIG, zig=True)
    name = name or os.environ.get("CXX", "").strip()
    if name == "zig":
        return [zig]
    if name:
        return [Compiler(tuple(shlex.split(name)), _version(shlex.split(name)))]
    found = [path for path in map(shutil.which, ("g++", "clang++")) if path]
    return [*(Compiler((path,), _version([path])) for path in found), zig]


def _zig_target() -> str:
    return "x86_64-linux-gnu." + ".".join(map(str, ZIG_GLIBC))


def _version(command: Sequence[str]) -> str:
    try:
        return subprocess.run([*command, "--version"], capture_output=True, text=True, errors="replace").stdout
    except OSError as error:  # found out again, and said, when it is to compile
        return str(error)


def check(compiler: Compiler) -> None:
    """Has the compiler build a few lines with every flag that will be used. There is nothing to find out about zig.

    Raises:
        BuildError: it cannot be started, or it is too old for one of the instruction sets.
    """
    if compiler.zig:
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(PROBE, encoding="utf-8")
        every = sorted({flag for level in LEVELS.values() for flag in level})
        try:
            _run((*compiler.command, *COMMON, *every, "-shared", str(source), "-o", f"{folder}/probe.so", *LINK))
        except BuildError as error:
            command = shlex.join(compiler.command)
            raise BuildError(f"{command} cannot compile for every instruction set.\n{error}") from error


def first_fit(compilers: Sequence[Compiler]) -> Compiler:
    """The first of the compilers that is fit for the work. Raises `BuildError` where none is, of the last one."""
    for compiler in compilers[:-1]:
        try:
            check(compiler)
        except BuildError:
            continue
        return compiler
    check(compilers[-1])
    return compilers[-1]


# --------------------------------------------------------------------------------------------------------------- build
def units(native: Path) -> list[Path]:
    """The translation units in the order in which they are linked; none where there are no sources.

    An inline function that several units hold is taken from the first of them, so the lowest instruction set comes
    first. That is a second safety only: the sources share none, and a test sees to it.
    """
    order = list(LEVELS)
    found = sorted((native / "src").glob("*.cpp"))
    for unit in found:
        if unit.stem.startswith("level_") and unit.stem not in LEVELS:
            raise BuildError(f"Nobody knows the flags of {unit.name}. Name it in LEVELS in hatch_build.py.")
    return sorted(found, key=lambda unit: (order.index(unit.stem) + 1 if unit.stem in LEVELS else 0, unit.stem))


def digest(native: Path, compiler: Compiler) -> str:
    """A text that changes when a source, a flag or the compiler does."""
    command = _zig_target() if compiler.zig else compiler.command  # one zig, whichever Python runs it
    parts: list[object] = [command, compiler.version, COMMON, LEVELS, LINK, ZIG_LINK]
    for path in sorted((native / "src").iterdir()):
        if path.is_file():
            parts.append((path.name, hashlib.sha256(path.read_bytes()).hexdigest()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def built_by(native: Path, compilers: Sequence[Compiler]) -> Compiler | None:
    """Which of the compilers made the library that is there from the sources that are there; None if none did."""
    if not (native / LIBRARY).is_file() or not (native / STAMP).is_file():
        return None
    made_from, _, library = (native / STAMP).read_text(encoding="utf-8").strip().partition(" ")
    if hashlib.sha256((native / LIBRARY).read_bytes()).hexdigest() != library:
        return None
    return next((compiler for compiler in compilers if digest(native, compiler) == made_from), None)


def compile_library(native: Path, compiler: Compiler, out: Path, sanitize: str = "") -> str:
    """Compiles the units at the same time and links them to `out / LIBRARY`; returns what the compiler said.

    Args:
        sanitize: sanitizers, separated by commas. The C++ library is linked too, for their runtimes need it.

    Raises:
        BuildError: with the compiler's words.
    """
    if compiler.zig and importlib.util.find_spec("ziglang") is None:
        raise BuildError(f"There is no g++ or clang++ here that is new enough, and no package {ZIG} either.")
    if compiler.zig and sanitize:
        raise BuildError("zig has no runtimes for sanitizers. Use g++ or clang++.")
    # Code that is inlined as much as this one takes minutes with -O1 and checks, and runs well enough without.
    flags = ("-O0", "-g", "-fno-omit-frame-pointer", f"-fsanitize={sanitize}") if sanitize else ()
    libraries = ("-pthread", *flags) if sanitize else ("-Wl,-z,defs", *(ZIG_LINK if compiler.zig else LINK))
    made_from = digest(native, compiler)  # before, since somebody may be editing
    out.mkdir(parents=True, exist_ok=True)
    fresh = out / f".{LIBRARY}.{os.getpid()}"
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        # zig's caches stay small without its own libraries; nothing is left in the user's home
        environment = {"ZIG_GLOBAL_CACHE_DIR": folder, "ZIG_LOCAL_CACHE_DIR": folder}

        def one(unit: Path) -> str:
            target = f"{folder}/{unit.stem}.o"
            level = LEVELS.get(unit.stem, ())
            return _run((*compiler.command, *COMMON, *level, *flags, "-c", str(unit), "-o", target), environment)

        ordered = units(native)
        words = list(pool.map(one, ordered))
        objects = [f"{folder}/{unit.stem}.o" for unit in ordered]
        try:
            command = (*compiler.command, "-shared", *objects, "-o", str(fresh), *libraries)
            words.append(_run(command, environment))
            (out / STAMP).unlink(missing_ok=True)
            fresh.replace(out / LIBRARY)  # whoever has the old one open keeps it
        finally:
            fresh.unlink(missing_ok=True)
    if not sanitize:
        library = hashlib.sha256((out / LIBRARY).read_bytes()).hexdigest()
        (out / STAMP).write_text(f"{made_from} {library}\n", encoding="utf-8")
    (out / REASON).unlink(missing_ok=True)
    return "".join(words)


def provide(native: Path, compilers: Sequence[Compiler]) -> Compiler:
    """Sees to it that the library is there and fits the sources; returns the compiler that made it.

    Where the compiler fails no other is tried: the sources are at fault.

    Raises:
        BuildError: no compiler is fit for the work, or it failed.
    """
    compiler = built_by(native, compilers)
    if compiler is None:
        compiler = first_fit(compilers)
        compile_library(native, compiler, native)
    return compiler


def _run(command: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """Runs a compiler; returns what it printed. Raises `BuildError` with its words where it fails."""
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C", **(environment or {})},
        )
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be started: {error.strerror}.") from error
    if done.returncode:
        sources = [Path(word).name for word in command if word.endswith(".cpp")]
        words = "\n".join(done.stdout.splitlines()[:MOST_LINES])
        raise BuildError(
            f"{command[0]} failed with status {done.returncode} at {sources[0] if sources else 'the link'}.\n"
            f"{words}\n{shlex.join(command)}"
        )
    return done.stdout


# ---------------------------------------------------------------------------------------------------------------- hook
class NativeLibrary(BuildHookInterface):
    """Builds the library for a wheel and for an editable install."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """Asks for zig where it will be needed: 100 MB that nobody downloads who has a compiler, or the library."""
        native = Path(self.root, PACKAGE, NATIVE)
        try:
            if mode() == "0" or unsupported() or not units(native) or built_by(native, candidates()) is not None:
                return []
            return [ZIG] if first_fit(candidates()).zig else []
        except BuildError:  # said by `initialize`
            return []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        native = Path(self.root, PACKAGE, NATIVE)
        if not (native / "src").is_dir():
            return
        editable = version == "editable"
        try:
            wanted = mode()
        except BuildError as error:
            self.app.abort(str(error))
        try:
            if wanted == "0":
                raise BuildError("TRANSOM_NATIVE was 0 when Transom was installed. Unset it and install Transom again.")
            if why := unsupported():
                raise BuildError(f"There is no native library for this platform: {why}.")
            if not units(native):
                return
            try:
                compiler = provide(native, candidates())
            except BuildError as error:
                cause, _, words = str(error).partition("\n")
                raise BuildError(f"{cause} {TO_DO}\n{words}".strip()) from error
        except BuildError as error:
            print(f"The native library of the CPU backend was not built. {error}", file=sys.stderr)
            if wanted == "require":
                self.app.abort("TRANSOM_NATIVE=require makes that an error.")
            self._leave_out(f"{error}\n", editable, native, build_data)
            return
        if editable:
            return
        build_data["artifacts"].append(f"/{PACKAGE}/{NATIVE}/{LIBRARY}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{wheel_platform(compiler)}"

    def _leave_out(self, reason: str, editable: bool, native: Path, build_data: dict[str, Any]) -> None:
        """Puts the reason where the library would be. A wheel does not touch the tree, which may be installed too."""
        if editable:
            for name in (LIBRARY, STAMP):
                (native / name).unlink(missing_ok=True)  # it does not fit the sources, or is not wanted
            (native / REASON).write_text(reason, encoding="utf-8")
            return
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name, REASON)
        path.write_text(reason, encoding="utf-8")
        build_data["force_include"][str(path)] = f"{NATIVE}/{REASON}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "_folder"):
            self._folder.cleanup()


def wheel_platform(compiler: Compiler) -> str:
    """The platform in the wheel's name. A system's compiler builds for that system; zig for every glibc since one."""
    here = tuple(int(part) for part in platform.libc_ver()[1].split(".")[:2])
    if compiler.zig and here >= ZIG_GLIBC:  # else pip would refuse here what it has just built
        return "manylinux_{}_{}_x86_64".format(*ZIG_GLIBC)
    return "linux_x86_64"


# ------------------------------------------------------------------------------------------------------------- command
def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles the library by hand, always anew."""
    parser = argparse.ArgumentParser(description="Compile the native library of the CPU backend.")
    parser.add_argument("--compiler", default="", help="g++, clang++, zig (the package), or a command; default: as pip")
    parser.add_argument("--sanitize", default="", help="address, undefined, thread, or several: address,undefined")
    parser.add_argument("--out", type=Path, help="folder for the library; default: where the backend looks for it")
    options = parser.parse_args(arguments)
    root = Path(__file__).resolve().parent
    native = root / PACKAGE / NATIVE
    aside = root / "build" / ("native-" + options.sanitize.replace(",", "-"))
    out = options.out or (aside if options.sanitize else native)
    started = time.monotonic()
    try:
        if why := unsupported():
            raise BuildError(f"There is no native library for this platform: {why}.")
        if not units(native):
            raise BuildError(f"There are no sources in {native / 'src'}.")
        compiler = first_fit(candidates(options.compiler))
        print(compile_library(native, compiler, out, options.sanitize), end="")
    except BuildError as error:
        print(error, file=sys.stderr)
        return 2
    size, seconds = (out / LIBRARY).stat().st_size / 1024, time.monotonic() - started
    print(f"{out / LIBRARY}: {size:.0f} KiB in {seconds:.1f} s by {compiler.version.splitlines()[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Builds the runner of `examples/edge`, for this machine and for arm64, where the tools for it are there.

Headers and libraries come from Debian's packages, installed or unpacked by `.ci/edge-tools`. What was built is kept
and only built again when a source has changed: a minute the first time, nothing the next.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[3]
SOURCES = ROOT / "examples" / "edge"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transom"
TOOLS = Path(os.environ.get("TRANSOM_EDGE_TOOLS") or CACHE / "edge-tools")
SET_UP = "run .ci/edge-tools"
PACKAGES = "libonnxruntime-dev nlohmann-json3-dev libpcre2-dev libutf8proc-dev"


def unpacked(*parts: str) -> list[Path]:
    """Folders for headers or libraries: the system's own, and what `.ci/edge-tools` unpacked."""
    return [Path("/", *parts), TOOLS.joinpath("host", *parts)]


def onnxruntime_library() -> Path:
    """The library that the package onnxruntime carries."""
    found = importlib.util.find_spec("onnxruntime")
    assert found is not None
    assert found.origin is not None
    return next((Path(found.origin).parent / "capi").glob("libonnxruntime.so.*"))


def java_home() -> Path | None:
    """Where the JDK lies; None without one."""
    compiler = shutil.which("javac")
    home = Path(compiler).resolve().parents[1] if compiler else None
    return home if home and (home / "include" / "jni.h").exists() else None


def build() -> Path:
    """The folder with `transom-edge`, `edge-driver` and, where there is a Java, `libtransom_jni.so`.

    Skips the test where this cannot be.
    """
    for program in ("cmake", "c++"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    for header in ("onnxruntime/onnxruntime_cxx_api.h", "nlohmann/json.hpp", "pcre2.h", "utf8proc.h"):
        if not any((folder / header).exists() for folder in unpacked("usr", "include")):
            pytest.skip(f"{header} is not there: {SET_UP}, or install {PACKAGES}")
    folder = CACHE / f"edge-build-{_short(str(ROOT).encode())}"
    folder.mkdir(parents=True, exist_ok=True)
    libraries = TOOLS / "host/usr/lib"
    configure = [
        *("cmake", "-S", str(Path(__file__).parent), "-B", str(folder)),
        *(
            "-DCMAKE_BUILD_TYPE=None",
            "-DCMAKE_CXX_FLAGS=-O1",
            "-DCMAKE_UNITY_BUILD=ON",
            "-DCMAKE_UNITY_BUILD_BATCH_SIZE=0",
        ),
        f"-DCMAKE_PREFIX_PATH={TOOLS / 'host/usr'}",
        f"-DCMAKE_LIBRARY_PATH={';'.join(map(str, libraries.glob('*-linux-gnu')))}",
    ]
    if home := java_home():
        configure += ["-DWITH_JAVA=ON", f"-DJNI_INCLUDE={home / 'include'}"]
    with FileLock(folder / "lock"):
        if not (folder / "CMakeCache.txt").exists():
            run(configure)
        run(["cmake", "--build", str(folder), "--parallel", "2"])
    return folder


def build_for_arm64() -> list[str]:
    """The command of the runner for arm64, under qemu. Skips the test where this cannot be."""
    qemu = shutil.which("qemu-aarch64") or shutil.which(str(TOOLS / "host/usr/bin/qemu-aarch64"))
    if qemu is None:
        pytest.skip(f"qemu-aarch64 is not there: {SET_UP}, or install qemu-user")
    if not (TOOLS / "complete").exists():
        pytest.skip(f"Debian's libraries for arm64 are not there: {SET_UP}")
    folder = CACHE / f"edge-arm64-{_short(str(ROOT).encode())}"
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted((SOURCES / "src").glob("*.[ch]pp"))
    content = _short(b"".join(path.read_bytes() for path in sources) + Path(__file__).read_bytes())
    program, whole = folder / f"transom-edge-{content}", folder / "whole.cpp"
    arm64, headers = TOOLS / "arm64", folder / "include"
    with FileLock(folder / "lock"):
        if not program.exists():
            # Headers that are the same for every machine, without this machine's C library beside them
            headers.mkdir(exist_ok=True)
            for name in ("onnxruntime", "nlohmann"):
                if not (headers / name).exists():
                    (headers / name).symlink_to(TOOLS / "host/usr/include" / name)
            whole.write_text("".join(f'#include "{path}"\n' for path in sources if path.suffix == ".cpp"))
            unfinished = folder / "unfinished"
            run([
                *(sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu.2.28"),
                *("-std=c++17", "-O1", "-g0"),
                *("-fno-sanitize=undefined", "-Wall", "-Wextra", "-Werror", "-DPCRE2_STATIC", "-DUTF8PROC_STATIC"),
                *("-isystem", str(headers), "-isystem", str(arm64 / "usr/include"), str(whole)),
                *(str(arm64 / "usr/lib/aarch64-linux-gnu" / name) for name in ("libpcre2-8.a", "libutf8proc.a")),
                *("-ldl", "-o", str(unfinished)),
            ])  # fmt: skip
            for old in folder.glob("transom-edge-*"):
                old.unlink()
            unfinished.rename(program)
    return [qemu, "-L", str(arm64), str(program), "--onnxruntime", str(arm64 / "libonnxruntime.so")]


def run(command: Sequence[str]) -> str:
    """What a command prints. A failure shows all that it said."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _short(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=6).hexdigest()

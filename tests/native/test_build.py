"""What an install and a wheel make of the native library: `hatch_build.py` with small sources and real compilers."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import levels
import pytest

ROOT = levels.ROOT
NATIVE = Path("backends/openvino_cpu/transom_openvino_cpu/native")
LIBRARY = "transom_openvino_cpu/native/libtransom_cpu.so"
REASON = "transom_openvino_cpu/native/not_built.txt"
LEVELS = ("scalar", "avx2", "avx_vnni", "avx512", "avx512_bf16", "amx")

SOURCES = {
    "level.h": """
#pragma once
#ifdef __AMX_INT8__
#define FLAGS 5
#elif defined(__AVX512BF16__)
#define FLAGS 4
#elif defined(__AVX512VNNI__)
#define FLAGS 3
#elif defined(__AVXVNNI__)
#define FLAGS 2
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define FLAGS 1
#else
#define FLAGS 0
#endif
// Every unit holds a copy of this one, and the linker takes one for all of them.
inline __attribute__((noinline)) int shared_by_all() { return FLAGS; }
""",
    **{
        f"level_{name}.cpp": f"""
#include "level.h"
int flags_{name}() {{ return FLAGS; }}
int shared_{name}() {{ return shared_by_all(); }}
"""
        for name in LEVELS
    },
    "library.cpp": f"""
#include <algorithm>
#include <cmath>
#include <pthread.h>
#define EXPORT extern "C" __attribute__((visibility("default")))
{"".join(f"int flags_{name}(); int shared_{name}();" for name in LEVELS)}
int helper();
static void *work(void *p) {{ *(int *)p = helper(); return nullptr; }}
EXPORT int on_a_thread() {{
  pthread_t thread;
  int result = 0;
  pthread_create(&thread, nullptr, work, &result);
  pthread_join(thread, nullptr);
  return result;
}}
EXPORT float exponential(float x) {{ return std::exp(std::min(x, 80.0f)); }}
EXPORT int flags(int level) {{
  int (*const all[])() = {{{", ".join(f"flags_{name}" for name in LEVELS)}}};
  return all[level]();
}}
EXPORT int shared(int level) {{
  int (*const all[])() = {{{", ".join(f"shared_{name}" for name in LEVELS)}}};
  return all[level]();
}}
""",
    "helper.cpp": "int helper() { return 7; }\n",
}


hatch_build = levels.hatch_build()
pytestmark = levels.pytestmark

COMPILERS = [*filter(shutil.which, ("g++", "clang++")), "zig"]
"""Those of this system, and zig, which the test extra brings."""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project's layout with its own build files and small sources."""
    root = tmp_path / "project"
    root.mkdir()
    for name in ("pyproject.toml", "hatch_build.py", ".gitignore", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root / name)
    for package in ("core/transom", NATIVE.parent, NATIVE):
        (root / package).mkdir(parents=True)
        (root / package / "__init__.py").write_text("")
    (root / NATIVE / "src").mkdir()
    for name, text in SOURCES.items():
        (root / NATIVE / "src" / name).write_text(text)
    return root


@pytest.fixture
def run(project: Path) -> Run:
    """Runs Python in the project; the environment names no compiler and no mode but those given."""

    def _run(*arguments: object, status: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if name not in ("CXX", "TRANSOM_NATIVE")}
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=project,
            env={**clean, **variables},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done

    return _run


@pytest.fixture
def wheel(run: Run, tmp_path: Path) -> Callable[..., tuple[Path, str]]:
    """Builds a wheel, or an editable one; returns it and what the build printed."""

    def _wheel(version: str = "standard", **variables: str) -> tuple[Path, str]:
        folder = tmp_path / f"dist-{len(list(tmp_path.iterdir()))}"
        done = run("-m", "hatchling", "build", "-t", f"wheel:{version}", "-d", folder, **variables)
        (path,) = folder.glob("*.whl")
        return path, done.stdout + done.stderr

    return _wheel


@pytest.fixture
def counted(tmp_path: Path) -> tuple[str, Callable[[], int]]:
    """A compiler for `CXX`, and how many units it has compiled so far."""
    log, script = tmp_path / "calls", tmp_path / "compiler"
    log.touch()
    real = " ".join(hatch_build.candidates(COMPILERS[0])[0].command)
    script.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {real} "$@"\n')
    script.chmod(0o755)
    return str(script), lambda: len(re.findall(r" -c \S+\.cpp", log.read_text()))


def _broken(tmp_path: Path) -> str:
    script = tmp_path / "broken-compiler"
    script.write_text("#!/bin/sh\necho 'fatal: the licence has run out' >&2\nexit 3\n")
    script.chmod(0o755)
    return str(script)


def _names(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def _read(path: Path, name: str) -> str:
    with zipfile.ZipFile(path) as archive:
        return archive.read(name).decode()


REQUIREMENTS = "from hatchling.build import get_requires_for_build_wheel as r; print(r())"


# --------------------------------------------------------------------------------------------------------------- wheels
@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_wheel_carries_a_library_that_works_and_names_its_platform(
    compiler: str, wheel: Callable[..., tuple[Path, str]], tmp_path: Path
) -> None:
    path, _ = wheel(CXX=compiler)
    platform = "(linux|manylinux_2_28)_x86_64" if compiler == "zig" else "linux_x86_64"
    assert re.fullmatch(rf"transom-[\d.]+-py3-none-{platform}\.whl", path.name)
    (info,) = (name for name in _names(path) if name.endswith(".dist-info/WHEEL"))
    assert "Root-Is-Purelib: false" in _read(path, info)
    assert [name for name in _names(path) if "/native/" in name] == ["transom_openvino_cpu/native/__init__.py", LIBRARY]
    with zipfile.ZipFile(path) as archive:
        extracted = archive.extract(LIBRARY, tmp_path)
    needed = set(re.findall(rb"(?<=\0)lib[\w+-]+\.so[\w.]*(?=\0)", Path(extracted).read_bytes()))
    assert needed <= {b"libc.so.6", b"libm.so.6", b"libpthread.so.0"}
    library = ctypes.CDLL(extracted)
    library.exponential.argtypes, library.exponential.restype = [ctypes.c_float], ctypes.c_float
    assert library.exponential(1.0) == pytest.approx(2.7182817)
    assert library.on_a_thread() == 7
    assert [library.flags(level) for level in range(6)] == [0, 1, 2, 3, 4, 5], "each unit has the flags of its level"
    assert [library.shared(level) for level in range(6)] == [0] * 6, "what units share is for every processor"


def test_a_wheel_has_no_library_where_it_is_not_wanted(wheel: Callable[..., tuple[Path, str]], project: Path) -> None:
    (project / NATIVE / "libtransom_cpu.so").write_text("of an editable install")
    path, _ = wheel(TRANSOM_NATIVE="0")
    assert path.name.endswith("-py3-none-any.whl")
    assert LIBRARY not in _names(path)
    assert "TRANSOM_NATIVE was 0" in _read(path, REASON)
    assert (project / NATIVE / "libtransom_cpu.so").exists()
    assert not (project / NATIVE / "not_built.txt").exists()


def test_a_tree_without_sources_gives_a_wheel_without_a_word(
    wheel: Callable[..., tuple[Path, str]], project: Path
) -> None:
    shutil.rmtree(project / NATIVE / "src")
    path, printed = wheel(TRANSOM_NATIVE="require")
    assert path.name.endswith("-py3-none-any.whl")
    assert not {LIBRARY, REASON} & set(_names(path))
    assert "native library" not in printed


def test_another_platform_gives_a_wheel_that_says_why_it_has_no_library(run: Run, project: Path) -> None:
    run("-c", "import platform; platform.machine = lambda: 'riscv64'\nimport hatchling.build as b; b.build_wheel('.')")
    (path,) = project.glob("*-py3-none-any.whl")
    assert "this is Linux on riscv64" in _read(path, REASON)
    assert LIBRARY not in _names(path)


def test_the_source_distribution_holds_what_builds_the_library(run: Run, project: Path, tmp_path: Path) -> None:
    (project / NATIVE / "libtransom_cpu.so").write_text("of an editable install")
    run("-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"hatch_build.py", *(str(NATIVE / "src" / name) for name in SOURCES)} <= names
    assert str(NATIVE / "libtransom_cpu.so") not in names


# ------------------------------------------------------------------------------------------------------------- failures
def test_a_broken_compiler_leaves_an_install_that_works_and_says_why(
    wheel: Callable[..., tuple[Path, str]], run: Run, tmp_path: Path
) -> None:
    compiler = _broken(tmp_path)
    path, printed = wheel(CXX=compiler)
    assert f"was not built. {compiler} cannot compile for every instruction set." in printed
    assert "fatal: the licence has run out" in printed
    assert "Install g++" in printed
    assert path.name.endswith("-py3-none-any.whl")
    site = tmp_path / "site"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, path)
    run("-I", "-c", f"import sys; sys.path.insert(0, {str(site)!r}); import transom, transom_openvino_cpu.native")
    assert not (site / LIBRARY).exists()
    assert "fatal: the licence has run out" in (site / REASON).read_text()


def test_a_compiler_that_is_not_there_is_named(wheel: Callable[..., tuple[Path, str]]) -> None:
    path, printed = wheel(CXX="/nowhere/g++ -m64")
    assert "/nowhere/g++ cannot be started" in printed
    assert path.name.endswith("-py3-none-any.whl")


def test_a_failed_compile_is_an_error_where_the_library_is_required(run: Run, tmp_path: Path) -> None:
    build = ("-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path)
    done = run(*build, status=1, CXX=_broken(tmp_path), TRANSOM_NATIVE="require")
    assert "fatal: the licence has run out" in done.stdout + done.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_a_mode_that_does_not_exist_is_an_error(run: Run, tmp_path: Path) -> None:
    done = run("-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, status=1, TRANSOM_NATIVE="yes")
    assert "TRANSOM_NATIVE is 'yes'. Set it to 0 or to require" in done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------------- editable installs
def test_an_editable_install_compiles_only_what_changed(
    wheel: Callable[..., tuple[Path, str]], project: Path, counted: tuple[str, Callable[[], int]]
) -> None:
    compiler, calls = counted
    native, units = project / NATIVE, len(LEVELS) + 2
    for _ in range(2):
        wheel("editable", CXX=compiler)
        assert calls() == units, "each unit, once"
    first = (native / "libtransom_cpu.so").read_bytes()
    (native / "src" / "helper.cpp").write_text("int helper() { return 8; }\n")
    wheel("editable", CXX=compiler)
    assert calls() == 2 * units
    assert (native / "libtransom_cpu.so").read_bytes() != first
    (native / "src" / "level.h").write_text(SOURCES["level.h"] + "// another word\n")
    wheel("standard", CXX=compiler)
    assert calls() == 3 * units, "headers count, and a wheel takes part"


def test_a_library_that_does_not_fit_the_sources_does_not_stay(
    wheel: Callable[..., tuple[Path, str]], project: Path
) -> None:
    native = project / NATIVE
    wheel("editable", CXX=COMPILERS[0])
    (native / "src" / "helper.cpp").write_text("int helper() { return nonsense; }\n")
    _, printed = wheel("editable", CXX=COMPILERS[0])
    assert "at helper.cpp" in printed
    assert "nonsense" in printed
    assert sorted(path.name for path in native.iterdir()) == ["__init__.py", "not_built.txt", "src"]
    (native / "src" / "helper.cpp").write_text(SOURCES["helper.cpp"])
    wheel("editable", CXX=COMPILERS[0])
    assert (native / "libtransom_cpu.so").exists()
    assert not (native / "not_built.txt").exists()


def test_an_editable_install_without_the_library_removes_it(
    wheel: Callable[..., tuple[Path, str]], project: Path
) -> None:
    (project / NATIVE / "libtransom_cpu.so").write_text("of an earlier install")
    wheel("editable", TRANSOM_NATIVE="0")
    assert sorted(path.name for path in (project / NATIVE).iterdir()) == ["__init__.py", "not_built.txt", "src"]


# ------------------------------------------------------------------------------------------------- choice of a compiler
def test_zig_is_asked_for_only_where_it_is_needed(
    run: Run, wheel: Callable[..., tuple[Path, str]], counted: tuple[str, Callable[[], int]], tmp_path: Path
) -> None:
    def asked(**variables: str) -> bool:
        return "ziglang" in run("-c", REQUIREMENTS, **variables).stdout

    (tmp_path / "empty").mkdir()
    path = str(tmp_path / "empty")
    assert asked(PATH=path)
    assert not asked(CXX=counted[0])
    assert not asked(CXX=_broken(tmp_path)), "who names a compiler gets no other"
    assert not asked(PATH=path, TRANSOM_NATIVE="0")
    wheel("editable", PATH=path)
    assert not asked(PATH=path), "the library is there"


def test_a_system_compiler_that_is_too_old_is_passed_over(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    Path(_broken(tmp_path)).rename(folder / "g++")
    assert "ziglang" in run("-c", REQUIREMENTS, PATH=str(folder)).stdout


# ------------------------------------------------------------------------------------------------- sources and command
@pytest.mark.sweep  # a second whole build
def test_the_sources_of_this_tree_need_nothing_but_the_c_library_with_zig(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without optimisation, which takes a fifth of the time and links more strictly."""
    quick = tuple("-O0" if flag == "-O3" else flag for flag in hatch_build.COMMON)
    monkeypatch.setattr(hatch_build, "COMMON", (*quick, "-fno-sanitize=undefined"))  # zig's default without -O
    (zig,) = hatch_build.candidates("zig")
    hatch_build.compile_library(ROOT / NATIVE, zig, tmp_path)
    library = ctypes.CDLL(str(tmp_path / "libtransom_cpu.so"))  # every symbol it needs is found
    library.tr_levels.restype = ctypes.c_char_p
    assert {f"level_{name}" for name in library.tr_levels().decode().split()} == set(hatch_build.LEVELS)


def test_the_units_of_the_levels_share_no_function(tmp_path: Path) -> None:
    """A function that two of them hold would be linked once, with instructions that not every processor has."""
    (zig,) = hatch_build.candidates("zig")
    unit = ROOT / NATIVE / "src" / "level_avx512_bf16.cpp"
    flags = ("-std=c++17", "-fPIC", "-fno-exceptions", "-fno-rtti", "-O0", "-fno-sanitize=undefined")
    command = (*zig.command, *flags, *hatch_build.LEVELS[unit.stem], "-S", unit, "-o", tmp_path / "unit.s")
    subprocess.run(command, check=True, env={**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(tmp_path)})
    text = (tmp_path / "unit.s").read_text()
    assert "level_avx512_bf16" in text
    assert re.findall(r"^\s*\.weak\s.*", text, re.MULTILINE) == []


def test_a_level_that_nobody_knows_is_refused(project: Path) -> None:
    (project / NATIVE / "src" / "level_avx10.cpp").write_text("")
    with pytest.raises(hatch_build.BuildError, match=r"flags of level_avx10\.cpp"):
        hatch_build.units(project / NATIVE)


@pytest.mark.parametrize("compiler", COMPILERS[:-1])
def test_the_command_compiles_with_sanitizers_aside(compiler: str, run: Run, project: Path) -> None:
    done = run("hatch_build.py", "--sanitize", "undefined", "--compiler", compiler)
    assert "build/native-undefined/libtransom_cpu.so" in done.stdout
    assert b"__ubsan_handle" in (project / "build" / "native-undefined" / "libtransom_cpu.so").read_bytes()
    assert not (project / NATIVE / "libtransom_cpu.so").exists()


def test_zig_is_refused_for_sanitizers(run: Run) -> None:
    done = run("hatch_build.py", "--sanitize", "address", "--compiler", "zig", status=2)
    assert "zig has no runtimes for sanitizers" in done.stderr

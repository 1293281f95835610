"""Native libraries of an app: whether those that a bundle's runtime needs are in its package, and whether Android loads
them.

Reads an APK, an AAR or an app bundle (all of them ZIP), a folder, or one file. Of ELF a few fields of the header and of
each program header count, which have been the same since 1995: `struct` reads them in twenty lines, and a package for
all of ELF (pyelftools) would be one more to ask people for.

Sources: the System V ABI, chapters 4 and 5 (ELF and program headers); Android's developer guides "Support 16 KB page
sizes" and "Manage native libraries" for pages, ZIP alignment and packaging.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from transom.errors import OptionError

PAGE = 16384
"""Bytes of a page on newer phones. Google Play takes no app for Android 15 or later with libraries for smaller ones."""
HEXAGON = "hexagon"
"""The "ABI" of libraries that run on Qualcomm's DSP: the skeletons (`libQnnHtpV73Skel.so`)."""
_MACHINES = {3: "x86", 40: "armeabi-v7a", 62: "x86_64", 164: HEXAGON, 183: "arm64-v8a", 243: "riscv64"}
"""`e_machine` → ABI as Android names it."""
_PAGED = ("arm64-v8a", "x86_64")
"""The ABIs whose pages may be of 16 KB."""
_PARENTS = ("lib", "jni")
"""Folders of the ABIs' folders, in an APK or app bundle and in an AAR."""
_MAGIC = b"\x7fELF"
_SHARED, _LOAD = 3, 1
"""`e_type` of a shared library, `p_type` of a segment that is loaded."""
_LAYOUTS = {1: ("16xHH8xII6xHHHH", "II8xI8xI"), 2: ("16xHH12xQQ6xHHHH", "I4xQ16xQ8xQ")}
"""By width (32 and 64 bits): of the header type, machine, and place of the segments and sections, size of a segment's
row, number of rows, and the same of sections; of a row type, offset, size in the file and alignment."""
_LOCAL_HEADER = struct.Struct("<26xHH")
"""Of an entry of a ZIP file: the lengths of name and extra field, which lie between it and the data."""
_PACKAGES = (".apk", ".aar", ".aab", ".zip")


@dataclass(frozen=True)
class Library:
    """One shared library."""

    name: str
    """`libonnxruntime.so`."""
    place: str
    """Its path in the package or below the folder, with `/`."""
    abi: str
    """What it is compiled for: `arm64-v8a`, `x86_64`, …, `hexagon`, or `machine 8` for what Android has no name for."""
    page: int
    """The smallest alignment of its loaded segments, in bytes: the largest page that it can be loaded with."""
    folder_abi: str = ""
    """The ABI that its folder in a package says it is for; empty where it lies in none."""
    offset: int | None = None
    """Where its bytes begin in an APK, in which it is not compressed: Android maps it from there. None: it is
    compressed, and taken out on installing, or lies in no APK."""


def inspect(path: str | Path) -> list[Library]:
    """The shared libraries of an app's package, of a folder with all below it, or of one file.

    Raises:
        OptionError: it cannot be read, holds none, or one is damaged or no library.
    """
    path = Path(path)
    try:
        if path.is_dir():
            found = [_library(p.read_bytes(), p.relative_to(path).as_posix(), str(p)) for p in _below(path)]
        elif path.suffix.lower() in _PACKAGES or zipfile.is_zipfile(path):
            found = list(_packed(path))
        else:
            found = [_library(path.read_bytes(), path.name, str(path))]
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror or error}", "Check the path") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise OptionError(f"The package {path} is damaged: {error}", "Build or copy it again") from error
    if not found:
        raise OptionError(f"There is no shared library in {path}", "Give an APK, an AAR, a folder or a .so file")
    return found


def judge(libraries: Sequence[Library], needed: Sequence[str], abi: str = "arm64-v8a") -> list[str]:
    """What is wrong, as sentences; empty where nothing is.

    Args:
        libraries: of one package, as `inspect` found them.
        needed: names of the libraries that must be there.
        abi: what the app is to run on. Skeletons must be for the DSP, and lie in the folder of this ABI.
    """
    problems = [problem for name in needed for problem in _absent(name, libraries, abi)]
    for library in libraries:
        if abi in (library.abi, library.folder_abi):
            problems += _unloadable(library, abi)
    return problems


# ---------------------------------------------------------------------------------------------------------- judging


def _absent(name: str, libraries: Sequence[Library], abi: str) -> Iterator[str]:
    """Nothing where a needed library is there for this ABI."""
    there = [library for library in libraries if library.name == name]
    right = [lib for lib in there if lib.abi == _wanted(name, abi) and lib.folder_abi in ("", abi)]
    if right:
        return
    if not there:
        yield f"{name} is missing: add it for {abi}."
    elif others := sorted({lib.folder_abi or lib.abi for lib in there} - {abi}):
        yield f"{name} is there for {' and '.join(others)} only: add it for {abi}."


def _unloadable(library: Library, abi: str) -> Iterator[str]:
    """Why Android would not load a library that is there for this ABI."""
    place, wanted = library.place, _wanted(library.name, abi)
    if library.abi != wanted:
        yield f"{place} is compiled for {library.abi}, and {wanted} is needed there: put the right file in its place."
    elif wanted == HEXAGON and library.offset is not None:
        yield (
            f"{place} is not compressed, so Android leaves it in the package, and the DSP can open files only: set "
            "packaging { jniLibs { useLegacyPackaging = true } } in build.gradle, which has all libraries taken out "
            "on installing."
        )
    if library.abi not in _PAGED:
        return
    if library.page < PAGE:
        yield (
            f"{place} is made for pages of {library.page} bytes, and phones with pages of {PAGE} do not load it: take "
            f"a newer release, or link it with -Wl,-z,max-page-size={PAGE}."
        )
    if library.offset is not None and library.offset % PAGE:
        yield (
            f"{place} begins at byte {library.offset} of the package, which is no multiple of {PAGE}: align the "
            "package with zipalign -P 16, or build it with Android Gradle Plugin 8.5.1 or newer."
        )


def _wanted(name: str, abi: str) -> str:
    """What a library must be compiled for, by its name."""
    return HEXAGON if "Skel" in name else abi


# ---------------------------------------------------------------------------------------------------------- reading


def _below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if _is_library(path.name) and path.is_file())


def _is_library(name: str) -> bool:
    """`libx.so`, and `libx.so.1` as Linux has it."""
    return name.endswith(".so") or ".so." in name


def _packed(path: Path) -> Iterator[Library]:
    """The libraries of a package."""
    is_apk = path.suffix.lower() == ".apk"
    with zipfile.ZipFile(path) as package, path.open("rb") as file:
        for entry in package.infolist():
            place = PurePosixPath(entry.filename)
            if entry.is_dir() or not _is_library(place.name):
                continue
            folder_abi = next((b for a, b in zip(place.parts, place.parts[1:-1], strict=False) if a in _PARENTS), "")
            offset = None
            if is_apk and entry.compress_type == zipfile.ZIP_STORED:
                file.seek(entry.header_offset)
                names, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
                offset = entry.header_offset + _LOCAL_HEADER.size + names + extra
            library = _library(package.read(entry), entry.filename, f"{entry.filename} in {path}")
            yield replace(library, folder_abi=folder_abi, offset=offset)


def _library(content: bytes, place: str, where: str) -> Library:
    machine, page = _elf(content, where)
    return Library(PurePosixPath(place).name, place, _MACHINES.get(machine, f"machine {machine}"), page)


def _elf(content: bytes, where: str) -> tuple[int, int]:
    """`e_machine`, and the smallest `p_align` of the segments that are loaded."""
    if content[:4] != _MAGIC:
        raise OptionError(f"{where} is no ELF file", "Give an APK, an AAR, a folder or a .so file")
    try:
        order = "<" if content[5] == 1 else ">"
        header, segment = _LAYOUTS[content[4]]
        kind, machine, table, sections, step, count, section_step, section_count = struct.unpack_from(
            order + header, content
        )
        rows = [struct.unpack_from(order + segment, content, table + step * row) for row in range(count)]
    except (struct.error, IndexError, KeyError) as error:
        raise OptionError(f"The library {where} is cut short or damaged", "Build or copy it again") from error
    if kind != _SHARED:
        raise OptionError(f"{where} is an ELF file, but no shared library", "Give the library that it is made into")
    loaded = [(offset, size, align) for kind, offset, size, align in rows if kind == _LOAD]
    end = max([sections + section_step * section_count, *(offset + size for offset, size, _ in loaded)])
    if not loaded or end > len(content):
        raise OptionError(f"The library {where} is cut short or damaged", "Build or copy it again")
    return machine, min(align for *_, align in loaded)

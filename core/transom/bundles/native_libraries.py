"""Native libraries of an app: whether its package has the libraries that a bundle's runtime needs, and whether Android
loads them.

Reads an APK, an AAR or an app bundle (all are ZIP files), a folder, or one file. Only a few fields of the ELF header
and of each program header matter, and they have not changed since 1995. `struct` reads them in twenty lines, so a
package for all of ELF (pyelftools) is not worth another dependency.

Sources: the System V ABI, chapters 4 and 5 (ELF and program headers); Android's developer guides "Support 16 KB page
sizes" and "Manage native libraries" for pages, ZIP alignment and packaging; for `PT_GNU_RELRO`, the checks of Android
Studio's APK Analyzer and of Android's package manager.
"""

from __future__ import annotations

import lzma
import math
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from transom.contract_optional import LibraryBackend
from transom.errors import OptionError, nearest
from transom.plugins import Plugins, load_plugins
from transom.preparation.plugin_calls import guarded

PAGE = 16384
"""Bytes of a page on newer phones. Google Play rejects apps for Android 15 or later with libraries for less."""
_ABIS = {(3, 1): "x86", (40, 1): "armeabi-v7a", (62, 2): "x86_64", (183, 2): "arm64-v8a", (243, 2): "riscv64"}
"""Android's ABI name by `e_machine` and width (1: 32 bits, 2: 64 bits). All of them are little-endian."""
_MACHINES = {**_ABIS, (164, 1): "hexagon"}
"""The ABIs, and a machine without an Android ABI: Qualcomm's DSP."""
_PAGED = ("arm64-v8a", "x86_64")
"""The ABIs that may have pages of 16 KB."""
_PARENTS = ("lib", "jni")
"""The parents of the ABIs' folders: in an APK or app bundle, and in an AAR."""
_MAGIC = b"\x7fELF"
_SHARED, _LOAD, _RELRO = 3, 1, 0x6474E552
"""`e_type` of a shared library, `p_type` of a loaded segment, `p_type` of data that becomes read-only after loading."""
_LAYOUTS = {1: ("16xHH8xII6xHHHH", "III4xII4xI"), 2: ("16xHH12xQQ6xHHHH", "I4xQQ8xQQQ")}
"""`struct` formats by width (1: 32 bits, 2: 64 bits). The header: type, machine, offsets of the program and section
header tables, then entry size and number of entries of each table. A program header: type, offset, address, size in the
file, size in memory, alignment."""
_LOCAL_HEADER = struct.Struct("<26xHH")
"""The local header of a ZIP entry: the lengths of the name and of the extra field that precede the data."""
_PACKAGES = (".apk", ".aar", ".aab", ".zip")


@dataclass(frozen=True)
class Library:
    """One shared library."""

    name: str
    """The file name, such as `libonnxruntime.so`."""
    place: str
    """Its path in the package or below the folder, with `/`."""
    abi: str
    """The target: `arm64-v8a`, `x86_64`, …, `hexagon`, or a number such as `machine 8` for an unknown one."""
    page: int
    """The largest page that it can be loaded with, in bytes: the smallest alignment of its loaded segments, or less
    when a segment's file offset and address differ modulo that alignment."""
    mixed: bool = False
    """Whether data that becomes read-only after loading shares a 16 KB page with data that stays writable."""
    folder_abi: str = ""
    """The ABI that its folder is named for; empty: it is not in such a folder."""
    offset: int | None = None
    """The offset of its bytes in an APK that stores it uncompressed, so that Android maps it from there. None: it is
    compressed and Android extracts it on installation, or it is not in an APK."""


def inspect(path: str | Path) -> list[Library]:
    """The shared libraries in an app's package, below a folder, or in one file.

    Raises:
        OptionError: the path cannot be read or has no shared library, or a file is damaged or not a shared library.
    """
    path = Path(path)
    try:
        if path.is_dir():
            found = [_in_folder(file, path) for file in _below(path)]
        elif path.suffix.lower() in _PACKAGES or zipfile.is_zipfile(path):
            found = list(_packed(path))
        else:
            found = [_library(path.read_bytes(), path.name, str(path))]
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror or error}", "Check the path") from error
    except _DAMAGED as error:
        raise OptionError(f"The package {path} is damaged: {error or 'it is cut'}", "Build or copy it again") from error
    if not found:
        raise OptionError(f"There is no shared library in {path}", "Give an APK, an AAR, a folder or a .so file")
    return found


def machines(names: Iterable[str], plugins: Plugins) -> dict[str, str]:
    """The processor of each library that a backend reports as compiled for a processor other than the CPU, by name."""
    rules = [one.backend for one in plugins.backends.values() if isinstance(one.backend, LibraryBackend)]
    found: dict[str, str] = {}
    for name in names:
        for rule in rules:
            if machine := guarded(rule.name, "telling what a library is for", partial(rule.machine_of, name)):
                found.setdefault(name, machine)
    return found


def judge(
    libraries: Sequence[Library],
    needed: Sequence[str],
    abi: str = "arm64-v8a",
    elsewhere: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """The problems as sentences; empty: there are none.

    Args:
        libraries: the libraries of one package, as `inspect` returns them.
        needed: the names of the required libraries.
        abi: the ABI that the app runs on.
        elsewhere: the processors of libraries for a processor other than the CPU, by name (see `machines`). They are
            in the folder of the same ABI.

    Raises:
        OptionError: there is no such ABI.
    """
    if abi not in (known := list(_ABIS.values())):
        raise OptionError(f"There is no ABI {abi!r}", nearest(abi, known))
    problems = [problem for name in needed for problem in _absent(name, libraries, abi, elsewhere.get(name, abi))]
    for library in libraries:
        if abi in (library.abi, library.folder_abi):
            problems += _unloadable(library, elsewhere.get(library.name, abi), abi)
    return problems


# ---------------------------------------------------------------------------------------------------------- judging


def _absent(name: str, libraries: Sequence[Library], abi: str, machine: str) -> Iterator[str]:
    """The problem of a needed library that is missing for this ABI and processor; nothing when it is present."""
    there = [library for library in libraries if library.name == name]
    right = [lib for lib in there if lib.abi == machine and lib.folder_abi in ("", abi)]
    if right:
        return
    if not there:
        yield f"{name} is missing: add it for {abi}."
    elif others := sorted({lib.folder_abi or lib.abi for lib in there} - {abi}):
        yield f"{name} is there for {' and '.join(others)} only: add it for {abi}."


def _unloadable(library: Library, wanted: str, abi: str) -> Iterator[str]:
    """Why Android would not load a library that is present for this ABI.

    Args:
        wanted: the target that it must be compiled for: the ABI, or another processor.
    """
    place = library.place
    if library.abi != wanted:
        yield f"{place} is compiled for {library.abi}, and {wanted} is needed there: put the right file in its place."
    elif wanted != abi and library.offset is not None:
        yield (
            f"{place} is not compressed, so Android leaves it in the package, and its processor ({wanted}) opens files "
            "only: set packaging { jniLibs { useLegacyPackaging = true } } in build.gradle, so that Android extracts "
            "all libraries on installation."
        )
    if library.abi not in _PAGED:
        return
    if library.page < PAGE or library.mixed:
        why = (
            f"is linked for pages of {library.page} bytes, and phones with pages of {PAGE} do not load it"
            if library.page < PAGE
            else f"has read-only data and writable data in one page of {PAGE} bytes, and newer phones warn about it or "
            "do not load it"
        )
        yield (
            f"{place} {why}: take a newer release, or link it with -Wl,-z,max-page-size={PAGE} and "
            f"-Wl,-z,common-page-size={PAGE}."
        )
    if library.offset is not None and library.offset % PAGE:
        yield (
            f"{place} begins at byte {library.offset} of the package, which is not a multiple of {PAGE}: align the "
            "package with zipalign -P 16, or build it with Android Gradle Plugin 8.5.1 or newer."
        )


# ---------------------------------------------------------------------------------------------------------- reading

_DAMAGED = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, IndexError, RuntimeError, ValueError,
)  # fmt: skip
"""The exceptions of `zipfile` for packages that are truncated, altered, or compressed by an unknown method."""


def _below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if _is_library(path.name) and path.is_file())


def _is_library(name: str) -> bool:
    """Whether a name is like `libx.so`, or like `libx.so.1` as on Linux."""
    return name.endswith(".so") or ".so." in name


def _in_folder(file: Path, folder: Path) -> Library:
    library = _library(file.read_bytes(), file.relative_to(folder).as_posix(), str(file))
    return replace(library, folder_abi=file.parent.name) if file.parent.name in _MACHINES.values() else library


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
    abi, page, mixed = _elf(content, where)
    return Library(PurePosixPath(place).name, place, abi, page, mixed)


def _elf(content: bytes, where: str) -> tuple[str, int, bool]:
    """`Library.abi`, `page` and `mixed`."""
    if content[:4] != _MAGIC:
        raise OptionError(f"{where} is not an ELF file", "Give an APK, an AAR, a folder or a .so file")
    damaged = OptionError(f"The library {where} is cut short or damaged", "Build or copy it again")
    try:
        width, order = content[4], {1: "<", 2: ">"}[content[5]]
        header, segment = _LAYOUTS[width]
        kind, machine, table, sections, step, count, section_step, section_count = struct.unpack_from(
            order + header, content
        )
        rows = [struct.unpack_from(order + segment, content, table + step * row) for row in range(count)]
    except (struct.error, IndexError, KeyError, OverflowError) as error:
        raise damaged from error
    if kind != _SHARED:
        cause = f"{where} is an ELF file, but not a shared library"
        raise OptionError(cause, "Give the shared library that it is linked into")
    loaded = [row[1:] for row in rows if row[0] == _LOAD]
    ends = [offset + size for offset, _, size, _, _ in loaded if size]  # a segment of zeros may begin beyond the end
    if not loaded or max([sections + section_step * section_count, *ends]) > len(content):
        raise damaged
    page = min(math.gcd(max(align, 1), address - offset) for offset, address, _, _, align in loaded)
    mixed = any(_mixed(row[2], row[4], loaded) for row in rows if row[0] == _RELRO)
    abi = _MACHINES.get((machine, width)) if order == "<" else None
    return abi or f"machine {machine}", page, mixed


def _mixed(start: int, length: int, loaded: Sequence[tuple[int, ...]]) -> bool:
    """Whether the read-only part of a loaded segment begins or ends inside one of the segment's pages."""
    end = start + length
    return any(
        (start % PAGE and start != address) or (end % PAGE and end < address + size)
        for _, address, _, size, _ in loaded
        if address <= start < address + size
    )


def require_libraries(app: str | Path, needed: Sequence[str], abi: str = "arm64-v8a") -> list[Library]:
    """The native libraries of an app.

    Args:
        needed: the file names of the required libraries.

    Raises:
        OptionError: a library is missing, or Android would not load it. The details have one line per problem.
    """
    found = inspect(app)
    elsewhere = machines([*needed, *(library.name for library in found)], load_plugins())
    if problems := judge(found, list(dict.fromkeys(needed)), abi, elsewhere):
        raise OptionError(f"{app} cannot run this bundle", "Fix these problems, and build the app again", problems)
    return found

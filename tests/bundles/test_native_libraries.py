"""Libraries compiled for phones are recognized, and those that Android would not load are reported.

Draws: what is compared must be equal, whatever the numbers are.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from transom.bundles.native_libraries import PAGE, Library, inspect, judge, machines
from transom.errors import OptionError
from transom.plugins import Plugins, load_plugins

Compile = Callable[..., Path]
ELSEWHERE = {"libQnnHtpV73Skel.so": "hexagon"}
NEEDED = ["libonnxruntime.so", "libQnnHtp.so", "libQnnHtpV73Skel.so"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """A shared library by target and page size, linked by a real linker."""
    folder = tmp_path_factory.mktemp("libraries")
    source = folder / "x.c"
    source.write_text("int table[40000] = {1}; int answer(int x) { return x + table[x]; }\n")
    made: dict[tuple[str, int], Path] = {}

    def compile_(target: str = "aarch64-linux-gnu", page: int = PAGE) -> Path:
        if (target, page) not in made:
            out = folder / f"{target}-{page}.so"
            command = [sys.executable, "-m", "ziglang", "cc", "-target", target, "-shared", "-nostdlib", "-fPIC"]
            options = [f"-Wl,-z,max-page-size={page}", str(source), "-o", str(out)]
            subprocess.run([*command, *options], check=True, capture_output=True, timeout=120)
            made[target, page] = out
        return made[target, page]

    return compile_


def skeleton(compiled: Compile) -> bytes:
    """No compiler for the DSP is here: a 32-bit library with the machine that the DSP's have."""
    content = bytearray(compiled("arm-linux-gnueabihf", 4096).read_bytes())
    content[18:20] = (164).to_bytes(2, "little")
    return bytes(content)


def pack(path: Path, files: dict[str, bytes], *, stored: bool = True, aligned: bool = True) -> Path:
    """A package; stored entries are aligned as `zipalign -P 16` does it, with the extra field."""
    kind = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path, "w", kind) as package:
        for name, content in {"AndroidManifest.xml": b"<manifest/>", **files}.items():
            entry = zipfile.ZipInfo(name)
            entry.compress_type = kind
            assert package.fp is not None
            start = package.fp.tell() + 30 + len(name)
            if stored and aligned and name.endswith(".so"):
                padding = -(start + 4) % PAGE
                entry.extra = b"\x35\xd9" + padding.to_bytes(2, "little") + bytes(padding)
            package.writestr(entry, content)
    return path


@pytest.mark.parametrize(
    ("target", "abi"),
    [
        ("aarch64-linux-gnu", "arm64-v8a"),
        ("x86_64-linux-gnu", "x86_64"),
        ("arm-linux-gnueabihf", "armeabi-v7a"),
        ("x86-linux-gnu", "x86"),
        ("riscv64-linux-gnu", "riscv64"),
    ],
)
def test_machine_and_pages_are_those_that_the_linker_was_told(target: str, abi: str, compiled: Compile) -> None:
    for page in (4096, PAGE, 65536):
        path = compiled(target, page)
        [found] = inspect(path)
        assert replace(found, mixed=False) == Library(path.name, path.name, abi, page)
        assert page < PAGE or not found.mixed


def test_a_package_that_is_right_has_no_problems(compiled: Compile, tmp_path: Path) -> None:
    good = compiled().read_bytes()
    files = {f"lib/arm64-v8a/{name}": good for name in NEEDED[:2]}
    packed = pack(tmp_path / "app.apk", files)
    found = inspect(packed)
    assert [library.place for library in found] == list(files)
    for library in found:
        assert library.offset is not None
        assert library.offset % PAGE == 0
        assert packed.read_bytes()[library.offset :][: len(good)] == good
        assert (library.folder_abi, library.abi, library.page) == ("arm64-v8a", "arm64-v8a", PAGE)
    assert judge(found, NEEDED[:2]) == []

    files["lib/arm64-v8a/libQnnHtpV73Skel.so"] = skeleton(compiled)
    loose = inspect(pack(tmp_path / "loose.apk", files, stored=False))
    assert [library.offset for library in loose] == [None] * 3
    assert loose[-1].abi == "hexagon"
    assert judge(loose, NEEDED, elsewhere=ELSEWHERE) == []
    part = inspect(pack(tmp_path / "part.aar", {name.replace("lib/", "jni/"): c for name, c in files.items()}))
    assert {lib.folder_abi for lib in part} == {"arm64-v8a"}
    assert judge(part, NEEDED, elsewhere=ELSEWHERE) == []
    whole = inspect(pack(tmp_path / "app.aab", {f"base/{name}": c for name, c in files.items()}, aligned=False))
    assert [(lib.folder_abi, lib.offset) for lib in whole] == [("arm64-v8a", None)] * 3
    assert judge(whole, NEEDED, elsewhere=ELSEWHERE) == []


def test_backends_say_which_libraries_are_for_another_processor() -> None:
    assert machines([*NEEDED, "libother.so"], load_plugins()) == ELSEWHERE
    assert machines(NEEDED, Plugins([], [], [])) == {}


def test_each_problem_of_a_package_is_reported(compiled: Compile, tmp_path: Path) -> None:
    small, other = compiled(page=4096).read_bytes(), compiled("x86_64-linux-gnu").read_bytes()
    found = inspect(
        pack(
            tmp_path / "app.apk",
            {
                "lib/arm64-v8a/libonnxruntime.so": small,
                "lib/arm64-v8a/libother.so": other,
                "lib/arm64-v8a/libQnnHtpV73Skel.so": skeleton(compiled),
                "lib/x86_64/libQnnHtp.so": other,
            },
        )
    )
    said = judge(found, [*NEEDED, "libQnnSystem.so"], elsewhere=ELSEWHERE)
    assert [sentence.split(" ")[0] for sentence in said] == [
        "libQnnHtp.so",
        "libQnnSystem.so",
        "lib/arm64-v8a/libonnxruntime.so",
        "lib/arm64-v8a/libother.so",
        "lib/arm64-v8a/libQnnHtpV73Skel.so",
    ]
    for sentence, part in zip(
        said,
        ["for x86_64 only", "is missing", "pages of 4096", "compiled for x86_64, and arm64-v8a", "useLegacyPackaging"],
        strict=True,
    ):
        assert part in sentence
    assert judge(found, ["libQnnHtp.so"], abi="x86_64") == []


def test_a_library_that_is_not_page_aligned_in_the_package_is_reported(compiled: Compile, tmp_path: Path) -> None:
    files = {"lib/arm64-v8a/libonnxruntime.so": compiled().read_bytes()}
    (problem,) = judge(inspect(pack(tmp_path / "app.apk", files, aligned=False)), NEEDED[:1])
    assert "zipalign -P 16" in problem
    assert judge(inspect(pack(tmp_path / "app.aar", files, aligned=False)), NEEDED[:1]) == []
    assert judge(inspect(pack(tmp_path / "packed.apk", files, stored=False)), NEEDED[:1]) == []


def test_an_arm_library_in_place_of_the_skeleton_is_reported(compiled: Compile, tmp_path: Path) -> None:
    found = inspect(pack(tmp_path / "app.apk", {"lib/arm64-v8a/libQnnHtpV73Skel.so": compiled().read_bytes()}))
    said = judge(found, NEEDED[2:], elsewhere=ELSEWHERE)
    assert any("compiled for arm64-v8a, and hexagon is needed" in sentence for sentence in said), said


def segments(content: bytes) -> dict[int, list[int]]:
    """Where the rows of program headers of a 64-bit library are, by type."""
    table = int.from_bytes(content[32:40], "little")
    rows = [table + 56 * row for row in range(int.from_bytes(content[56:58], "little"))]
    kinds = [int.from_bytes(content[row : row + 4], "little") for row in rows]
    return {kind: [row for row, other in zip(rows, kinds, strict=True) if other == kind] for kind in kinds}


def changed(content: bytes, at: int, by: int) -> bytes:
    """With a number of 64 bits increased."""
    value = int.from_bytes(content[at : at + 8], "little") + by
    return content[:at] + value.to_bytes(8, "little") + content[at + 8 :]


def test_data_that_becomes_read_only_may_not_share_a_page_with_other_data(compiled: Compile, tmp_path: Path) -> None:
    good = compiled().read_bytes()
    [relro] = segments(good)[0x6474E552]
    shorter, later = changed(good, relro + 40, -8), changed(changed(good, relro + 16, 8), relro + 40, -8)
    for content, wrong in ((good, False), (shorter, True), (later, True)):
        [found] = inspect(pack(tmp_path / "app.apk", {"lib/arm64-v8a/libonnxruntime.so": content}))
        assert found.mixed == wrong
        said = judge([found], NEEDED[:1])
        assert ["common-page-size=16384" in sentence and "read-only" in sentence for sentence in said] == [True] * wrong


def test_an_alignment_that_was_only_written_into_the_header_does_not_count(compiled: Compile, tmp_path: Path) -> None:
    content = compiled(page=4096).read_bytes()
    for row in segments(content)[1]:
        content = changed(content, row + 48, PAGE - 4096)
    path = tmp_path / "libx.so"
    path.write_bytes(content)
    assert inspect(path)[0].page == 4096


def test_a_segment_of_zeros_may_begin_beyond_the_end_of_a_stripped_library(compiled: Compile, tmp_path: Path) -> None:
    content = compiled().read_bytes()
    sections = int.from_bytes(content[40:48], "little")
    content = content[:40] + bytes(8) + content[48:60] + bytes(2) + content[62:sections]
    last = segments(content)[1][-1]
    size = int.from_bytes(content[last + 32 : last + 40], "little")
    offset = int.from_bytes(content[last + 8 : last + 16], "little")
    zeros = changed(changed(content, last + 32, -size), last + 8, PAGE * (len(content) // PAGE + 1))
    path = tmp_path / "libx.so"
    for whole in (content, zeros[:offset]):
        path.write_bytes(whole)
        assert inspect(path)[0].page == PAGE
    path.write_bytes(content[: offset + size - 1])
    with pytest.raises(OptionError, match="cut short"):
        inspect(path)


def test_a_machine_with_another_width_or_order_of_bytes_is_not_android_s(compiled: Compile, tmp_path: Path) -> None:
    narrow = bytearray(compiled("arm-linux-gnueabihf", 4096).read_bytes())
    narrow[18:20] = (183).to_bytes(2, "little")
    (tmp_path / "libx.so").write_bytes(narrow)
    assert inspect(tmp_path / "libx.so")[0].abi == "machine 183"
    assert inspect(compiled("aarch64_be-linux-gnu"))[0].abi == "machine 183"


def test_a_folder_s_name_says_the_abi_too(compiled: Compile, tmp_path: Path) -> None:
    (tmp_path / "jniLibs/x86_64").mkdir(parents=True)
    (tmp_path / "jniLibs/x86_64/libonnxruntime.so").write_bytes(compiled().read_bytes())
    [found] = inspect(tmp_path)
    assert found.folder_abi == "x86_64"
    assert judge([found], NEEDED[:1]) == ["libonnxruntime.so is there for x86_64 only: add it for arm64-v8a."]
    [wrong] = judge([found], NEEDED[:1], abi="x86_64")
    assert "compiled for arm64-v8a, and x86_64 is needed" in wrong


def test_an_unknown_abi_is_refused() -> None:
    with pytest.raises(OptionError, match="There is no ABI 'arm64-v8'") as caught:
        judge([], [], abi="arm64-v8")
    assert 'Did you mean "arm64-v8a"?' in caught.value.fix


def test_a_folder_is_searched_with_all_below_it(compiled: Compile, tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    for name in ("a/libonnxruntime.so.1", "a/b/libQnnHtp.so"):
        (tmp_path / name).write_bytes(compiled().read_bytes())
    (tmp_path / "a/notes.txt").write_text("none")
    found = inspect(tmp_path)
    assert [(library.name, library.place) for library in found] == [
        ("libQnnHtp.so", "a/b/libQnnHtp.so"),
        ("libonnxruntime.so.1", "a/libonnxruntime.so.1"),
    ]
    assert judge(found, ["libQnnHtp.so"]) == []
    assert judge(found, ["libonnxruntime.so"]) == ["libonnxruntime.so is missing: add it for arm64-v8a."]


def test_cut_and_foreign_files_are_errors(compiled: Compile, tmp_path: Path, rng: np.random.Generator) -> None:
    good = compiled().read_bytes()
    path = tmp_path / "libx.so"
    for length in (5, 40, 63, 100, *rng.integers(64, len(good), 6)):
        path.write_bytes(good[:length])
        with pytest.raises(OptionError, match="cut short or damaged"):
            inspect(path)
    path.write_bytes(b"#!/bin/sh\n")
    with pytest.raises(OptionError, match="not an ELF file"):
        inspect(path)
    path.write_bytes(good[:16] + b"\x02\x00" + good[18:])  # a program
    with pytest.raises(OptionError, match="not a shared library"):
        inspect(path)
    with pytest.raises(OptionError, match="cannot be read: No such file"):
        inspect(tmp_path / "nothing.so")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionError, match="no shared library in"):
        inspect(tmp_path / "empty")


def test_damaged_packages_are_errors(compiled: Compile, tmp_path: Path) -> None:
    files = {"lib/arm64-v8a/libonnxruntime.so": compiled().read_bytes()}
    for stored in (True, False):
        path = pack(tmp_path / "app.apk", files, stored=stored)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(OptionError, match="is damaged"):
            inspect(path)
        behind = whole.rindex(b"PK\x01\x02") + 42  # where the entry is, in the directory
        path.write_bytes(whole[:behind] + (len(whole) - 8).to_bytes(4, "little") + whole[behind + 4 :])
        with pytest.raises(OptionError, match="is damaged"):
            inspect(path)
        middle = whole.index(b"libonnxruntime.so") + (2 * PAGE if stored else 200)
        path.write_bytes(
            whole[:middle] + bytes(255 - byte for byte in whole[middle : middle + 64]) + whole[middle + 64 :]
        )
        with pytest.raises(OptionError, match="is damaged"):
            inspect(path)
    cut = pack(tmp_path / "cut.apk", {"lib/arm64-v8a/libcut.so": files.popitem()[1][:300]})
    with pytest.raises(OptionError, match=r"lib/arm64-v8a/libcut.so in .*cut.apk is cut short"):
        inspect(cut)

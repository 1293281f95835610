"""Prompt caches on disk: private, and a damaged or lying file is one error, read in no more memory than its size."""

from __future__ import annotations

import io
import os
import stat
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from transom.errors import OptionError
from transom.generation import prompt_cache
from transom.generation.prompt_cache import SavedPrompt

KEYS = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.npz"
    saved = SavedPrompt(
        [1, 2, 3],
        "dense",
        {"keys": KEYS, "columns": np.asfortranarray(KEYS[0]), "one": np.array(7), "none": np.zeros((0, 4))},
    )
    prompt_cache.write(path, saved, "model")
    return path


def rewritten(path: Path, change: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in {**entries, **change}.items():
            archive.writestr(name, data)


def header(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    data = io.BytesIO()
    np.lib.format.write_array_header_1_0(data, {"descr": descr, "fortran_order": False, "shape": shape})
    return data.getvalue()


def test_what_was_written_is_read(file: Path) -> None:
    saved = prompt_cache.read(file, "model")
    assert (saved.tokens, saved.sparsity) == ([1, 2, 3], "dense")
    np.testing.assert_array_equal(saved.arrays["keys"], KEYS)
    np.testing.assert_array_equal(saved.arrays["columns"], KEYS[0])
    assert saved.arrays["one"] == 7
    assert saved.arrays["none"].shape == (0, 4)
    saved.arrays["keys"][0] = 1  # writable, as a session may need


@pytest.mark.skipif(sys.platform == "win32", reason="no modes")
def test_only_the_owner_can_read_it(file: Path) -> None:
    old = os.umask(0)
    try:
        prompt_cache.write(file, prompt_cache.read(file, "model"), "model")
    finally:
        os.umask(old)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "entry",
    [
        header((1 << 40,)) + bytes(16),
        header((1 << 62, 1 << 62)) + bytes(16),
        header((-1, 4)) + bytes(16),
        header((4,), "|O") + bytes(32),
        header((3,)) + bytes(16),
        b"\x93NUMPY\x09\x00" + bytes(64),
        b"",
        b"\x93NUMPY\x01\x00\xff\xff{",
    ],
)
def test_a_lying_array_is_a_damaged_file(file: Path, entry: bytes) -> None:
    rewritten(file, {"state.keys.npy": entry})
    with pytest.raises(OptionError, match="is not a prompt cache, or it is damaged"):
        prompt_cache.read(file, "model")


def test_a_compressed_file_is_refused_before_it_is_unpacked(file: Path) -> None:
    rewritten(file, {"state.keys.npy": header((1 << 24,)) + bytes(1 << 26)}, zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 1 << 20
    with pytest.raises(OptionError, match="is not a prompt cache, or it is damaged"):
        prompt_cache.read(file, "model")


def test_an_encrypted_entry_is_a_damaged_file(file: Path) -> None:
    data = bytearray(file.read_bytes())
    for magic, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := data.find(magic, at + 1)) >= 0:
            data[at + place] |= 1
    file.write_bytes(bytes(data))
    with pytest.raises(OptionError, match="is not a prompt cache, or it is damaged"):
        prompt_cache.read(file, "model")


def test_each_damaged_byte_is_an_error_or_changes_nothing(file: Path) -> None:
    data, whole = file.read_bytes(), prompt_cache.read(file, "model")
    refused = 0
    for place in range(0, len(data), 7):
        changed = bytearray(data)
        changed[place] ^= 0xFF
        file.write_bytes(bytes(changed))
        try:
            found = prompt_cache.read(file, "model")
        except OptionError:
            refused += 1
            continue  # bytes between the entries may change without an effect
        assert (found.tokens, found.sparsity) == (whole.tokens, whole.sparsity), place
        assert all(np.array_equal(found.arrays[name], array) for name, array in whole.arrays.items()), place
    assert refused

"""Reads NumPy archives (.npz) of strangers: nothing is larger in memory than the file.

`numpy.load` trusts shapes, and decompresses 2 GB from a file of 2 MB.
"""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class DamagedArrays(ValueError):
    """The archive cannot be read, or is not what `numpy.savez` writes."""


def read_arrays(source: Path | bytes) -> dict[str, Array]:
    """The arrays of an archive by name.

    Args:
        source: the file, or its content.

    Raises:
        DamagedArrays: it is no archive, an entry is compressed, or its shape differs from its size.
        OSError: the file cannot be read.
    """
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    try:
        return _arrays(io.BytesIO(source) if isinstance(source, bytes) else source, size)
    except (OSError, DamagedArrays):
        raise
    except Exception as error:  # zipfile and numpy raise almost anything for a damaged file
        raise DamagedArrays(str(error)) from error


def _arrays(source: Path | io.BytesIO, size: int) -> dict[str, Array]:
    found: dict[str, Array] = {}
    with zipfile.ZipFile(source) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > size:
            raise DamagedArrays("it is larger than the file")
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise DamagedArrays(f"{entry.filename} is compressed")
            with archive.open(entry) as file:
                version = np.lib.format.read_magic(file)
                header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, columns_first, dtype = header[version](file)
                if dtype.hasobject or any(length < 0 for length in shape):
                    raise DamagedArrays(f"{entry.filename} is no array of numbers")
                if math.prod(shape) * dtype.itemsize != entry.file_size - file.tell():
                    raise DamagedArrays(f"the shape of {entry.filename} differs from its size")
                data = bytearray(file.read())
                values = np.frombuffer(data, dtype) if data else np.zeros(0, dtype)
            name = entry.filename.removesuffix(".npy")
            found[name] = values.reshape(shape, order="F" if columns_first else "C")
    return found

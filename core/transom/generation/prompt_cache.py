"""Prompt caches on disk: a session's state of a sequence, with its tokens and the identity of the compiled model.

The file is a NumPy archive (.npz), whose checksums detect damage: `about`, JSON as bytes; `tokens`, int64; and the
session's arrays, stored without compression. It contains the prompt, so it is as private as the prompt: only its owner
can read it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from transom.artifacts.arrays import read_arrays
from transom.artifacts.files import replacing
from transom.errors import OptionError

FORMAT = 1
_STATE = "state."

Array = np.ndarray[Any, np.dtype[Any]]


class SavedPrompt(NamedTuple):
    """The content of a file."""

    tokens: list[int]
    sparsity: str
    """The sparsity policy of its steps, in canonical form."""
    arrays: dict[str, Array]


def write(path: Path, saved: SavedPrompt, identity: str) -> None:
    """Write a prompt cache. The file is replaced atomically.

    Args:
        identity: identifies the compiled model, the only one that can use the cache.

    Raises:
        OSError: the file cannot be written.
    """
    facts = {"transom_prompt_cache": FORMAT, "identity": identity, "sparsity": saved.sparsity}
    about = json.dumps(facts | {"arrays": sorted(saved.arrays)})
    arrays = {_STATE + name: array for name, array in saved.arrays.items()}
    header = {"about": np.frombuffer(about.encode(), np.uint8), "tokens": np.array(saved.tokens, np.int64)}
    with replacing(path, private=True) as file:
        np.savez(file, **header, **arrays)  # type: ignore[arg-type]  # arguments after the file are named arrays


def read(path: Path, identity: str) -> SavedPrompt:
    """Read a prompt cache.

    Raises:
        OptionError: the file cannot be read, is damaged, or belongs to another compiled model.
    """
    again = "Use another file, or delete this one; it will be created again"
    try:
        found = read_arrays(path)
        about = json.loads(found.pop("about").tobytes())
        tokens = [int(t) for t in found.pop("tokens")]
        known = about["transom_prompt_cache"], about["identity"], about["sparsity"]
        arrays = {name.removeprefix(_STATE): array for name, array in found.items()}
        if known[0] == FORMAT and sorted(arrays) != about["arrays"]:  # no checksum covers the number of entries
            raise ValueError("arrays are missing")
    except OSError as error:
        raise OptionError(f"The prompt cache {path} cannot be read: {error.strerror or error}", again) from None
    except Exception as error:  # zipfile and numpy raise almost anything for a damaged file
        raise OptionError(f"{path} is not a prompt cache, or it is damaged", again) from error
    if known[0] != FORMAT:
        raise OptionError(f"The prompt cache {path} has format {known[0]!r}; this Transom reads {FORMAT}", again)
    if known[1] != identity:
        raise OptionError(
            f"The prompt cache {path} was made with another model, or with a different compilation of this one", again
        )
    return SavedPrompt(tokens, str(known[2]), arrays)

"""A prompt's cache on disk: what a session holds of a sequence, with the tokens and the compiled model that it is of.

A NumPy archive (.npz), whose checksums tell of damage: `about`, JSON in bytes; `tokens`, int64; and the session's own
arrays. It holds the prompt itself, so it is as private as the prompt.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from transom.artifacts.files import replacing
from transom.errors import OptionError

FORMAT = 1
_STATE = "state."

Array = np.ndarray[Any, np.dtype[Any]]


class SavedPrompt(NamedTuple):
    """What a file holds."""

    tokens: list[int]
    sparsity: str
    """The policy that its keys were read by, in canonical form."""
    arrays: dict[str, Array]


def write(path: Path, saved: SavedPrompt, identity: str) -> None:
    """Write a prompt's cache; readers see the old file or the new one.

    Args:
        identity: of the compiled model, the only one that can use it.

    Raises:
        OSError: it cannot be written.
    """
    about = json.dumps({"transom_prompt_cache": FORMAT, "identity": identity, "sparsity": saved.sparsity})
    arrays = {_STATE + name: array for name, array in saved.arrays.items()}
    header = {"about": np.frombuffer(about.encode(), np.uint8), "tokens": np.array(saved.tokens, np.int64)}
    with replacing(path) as file:
        np.savez(file, **header, **arrays)  # type: ignore[arg-type]  # what follows the file is named arrays


def read(path: Path, identity: str) -> SavedPrompt:
    """Read a prompt's cache.

    Raises:
        OptionError: it cannot be read, is damaged, or is of another compiled model.
    """
    again = "Name another file, or remove this one, and it is written anew"
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
        about = json.loads(found.pop("about").tobytes())
        tokens = [int(t) for t in found.pop("tokens")]
        known = about["transom_prompt_cache"], about["identity"], about["sparsity"]
    except OSError as error:
        raise OptionError(f"The prompt cache {path} cannot be read: {error.strerror or error}", again) from None
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise OptionError(f"{path} is no prompt cache, or is damaged", again) from error
    if known[0] != FORMAT:
        raise OptionError(f"The prompt cache {path} has format {known[0]!r}; this Transom reads {FORMAT}", again)
    if known[1] != identity:
        raise OptionError(
            f"The prompt cache {path} was made by another model, or by this one compiled in another way", again
        )
    return SavedPrompt(tokens, str(known[2]), {name.removeprefix(_STATE): array for name, array in found.items()})

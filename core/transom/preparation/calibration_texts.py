"""Calibration texts for a backend: the option `calibration` of the contract, token ids in short pieces.

The host checks and truncates the user's texts, which are part of the artifact's key. The child process that compiles
tokenizes them, or the default passages where the user gives none; a warm load tokenizes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transom.errors import OptionError, SourceError

if TYPE_CHECKING:
    from transom.text import Tokenizer

Pieces = tuple[tuple[int, ...], ...]

PIECE_TOKENS = 256
"""Tokens in a piece; fewer where the context is shorter."""
DEFAULT_PIECES = 4
"""Number of pieces where the user gives no texts."""
MAX_PIECES = 128
"""Largest number of pieces taken from all of the user's texts together."""
CHARACTERS_PER_TOKEN = 24
"""Characters read for each wanted token: more than any tokenizer puts into one."""


def default_texts() -> dict[str, str]:
    """Documentation and code that come with Python.

    Raises:
        OptionError: this Python lacks them.
    """
    import sysconfig

    try:
        from pydoc_data.topics import topics

        documentation = "\n\n".join(topics[name] for name in sorted(topics))
        library = Path(sysconfig.get_paths()["stdlib"])
        code = "\n\n".join(p.read_text(encoding="utf-8") for p in sorted(library.glob("[a-d]*.py"))[:25])
    except (ImportError, OSError) as error:
        raise OptionError(
            f"This Python comes without texts to calibrate on: {error}", "Give some: --text FILE"
        ) from None
    return {"documentation": documentation, "code": code}


def read_text(path: Path) -> str:
    """Read a calibration text.

    Raises:
        SourceError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}", "Give the path of a text file") from None
    except UnicodeDecodeError:
        raise SourceError(f"{path} is not UTF-8", "Give a text file in UTF-8") from None


def user_texts(calibration: object) -> tuple[str, ...]:
    """The user's texts, read and truncated to the length that is used.

    Args:
        calibration: a list of texts (`str`) and text files (`pathlib.Path`).

    Raises:
        OptionError: it is not a list, holds more than `MAX_PIECES` texts or an item of another type, or a text is empty
            or the name of a file.
        SourceError: a file cannot be read, or is not UTF-8.
    """
    if isinstance(calibration, str | bytes | Path) or not isinstance(calibration, Iterable):
        raise OptionError(
            f"calibration is a {type(calibration).__name__}, not a list", "Write calibration=[Path('text.txt')]"
        )
    texts: list[str] = []
    for item in calibration:
        if isinstance(item, Path):
            text = read_text(item)
        elif isinstance(item, str):
            if len(item.splitlines()) == 1 and os.path.isfile(os.path.expanduser(item)):
                raise OptionError(
                    f"calibration holds the name of the file {item}, not its text",
                    f"Write calibration=[Path({item!r})]",
                )
            text = item
        else:
            raise OptionError(f"calibration holds a {type(item).__name__}", "Give texts, or paths as pathlib.Path")
        if not text.strip():
            raise OptionError(f"Text {len(texts) + 1} of calibration is empty", "Leave it out, or give another")
        texts.append(text)
    if len(texts) > MAX_PIECES:
        raise OptionError(f"calibration holds {len(texts)} texts", f"Give at most {MAX_PIECES}, or put some together")
    return tuple(text[: _share(len(texts)) * PIECE_TOKENS * CHARACTERS_PER_TOKEN] for text in texts)


def pieces(tokenizer: Tokenizer | None, vocabulary: int, context: int, texts: Sequence[str]) -> Pieces:
    """Token ids to calibrate on. Each piece starts as the tokenizer starts a text. Empty without a tokenizer.

    Args:
        vocabulary: ids from this size on are left out.
        context: longest piece, in tokens.
        texts: the user's texts, as `user_texts` returns them; empty for the default passages.

    Raises:
        OptionError: there are texts but no tokenizer, or a text has no token of the vocabulary.
    """
    if tokenizer is None:
        if texts:
            raise OptionError("The model has no tokenizer, so it cannot be calibrated on texts", "Leave the texts out")
        return ()
    each = _share(len(texts)) if texts else DEFAULT_PIECES // 2
    start = [first for first in tokenizer.beginning if first < vocabulary]
    length = max(1, min(PIECE_TOKENS, context) - len(start))
    found: list[tuple[int, ...]] = []
    for number, text in enumerate(texts or _passages(), 1):
        ids = tokenizer.encode(
            text[: each * PIECE_TOKENS * CHARACTERS_PER_TOKEN], add_special=False, parse_special=False
        )
        ids = [i for i in ids if i < vocabulary]
        if not ids and texts:
            raise OptionError(f"Text {number} of calibration has no token that the model knows", "Give another text")
        for at in range(0, min(len(ids), each * length), length):
            found.append(tuple([*start, *ids[at : at + length]][: min(PIECE_TOKENS, context)]))
    return tuple(found)


def _share(texts: int) -> int:
    """Number of pieces taken from each text."""
    return max(1, MAX_PIECES // max(1, texts))


def _passages() -> list[str]:
    """The default passages; empty where this Python lacks them, and then a backend that needs texts reports it."""
    try:
        return list(default_texts().values())
    except OptionError:
        return []

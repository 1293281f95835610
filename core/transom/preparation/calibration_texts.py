"""Texts to calibrate a backend on, as the option `calibration` of the contract holds them: token ids in short pieces.

The user's own texts are checked and cut by the host, and are part of the artifact's key. They become tokens where a
backend compiles, in the child process, and so do the passages that stand in for them: a warm start tokenises nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transom.errors import OptionError

if TYPE_CHECKING:
    from transom.text import Tokenizer

Pieces = tuple[tuple[int, ...], ...]

PIECE = 256
"""Tokens of a piece, fewer where the context is shorter."""
DEFAULT = 4
"""Pieces where the user gives no texts."""
MOST = 128
"""Pieces that are taken of the user's texts, over all of them."""
_LETTERS = 24
"""Of a text, so many for each token that is wanted: more than any tokenizer puts into one."""


def given_texts(calibration: object) -> tuple[str, ...]:
    """The texts that a user gave, read and cut to what is looked at.

    Args:
        calibration: a list of texts as `str`, and of text files as `pathlib.Path`.

    Raises:
        OptionError: it is no list, has more texts than pieces are taken, or holds something else, an empty text, or the
            name of a file for one.
        SourceError: a file cannot be read, or is not UTF-8.
    """
    if isinstance(calibration, str | bytes | Path) or not isinstance(calibration, Iterable):
        raise OptionError(
            f"calibration is a {type(calibration).__name__}, not a list", "Write calibration=[Path('text.txt')]"
        )
    texts: list[str] = []
    for item in calibration:
        if isinstance(item, Path):
            from transom.preparation.passages import read_text

            text = read_text(item)
        elif isinstance(item, str):
            if len(item.splitlines()) == 1 and os.path.isfile(os.path.expanduser(item)):
                raise OptionError(
                    f"calibration holds the name of the file {item} as a text", f"Write calibration=[Path({item!r})]"
                )
            text = item
        else:
            raise OptionError(f"calibration holds a {type(item).__name__}", "Give texts, or paths as pathlib.Path")
        if not text.strip():
            raise OptionError(f"Text {len(texts) + 1} of calibration is empty", "Leave it out, or give another")
        texts.append(text)
    if len(texts) > MOST:
        raise OptionError(f"calibration holds {len(texts)} texts", f"Give at most {MOST}, or put some together")
    return tuple(text[: _share(len(texts)) * PIECE * _LETTERS] for text in texts)


def pieces(tokenizer: Tokenizer | None, vocabulary: int, context: int, texts: Sequence[str]) -> Pieces:
    """Token ids to calibrate on, each piece begun as the tokenizer begins a text; empty without a tokenizer.

    Args:
        vocabulary: ids of this size and above are left out.
        context: tokens; no piece is longer.
        texts: the user's, as `given_texts` returns them; empty for passages that come with Python.

    Raises:
        OptionError: there are texts and no tokenizer, or a text has no token of the vocabulary.
    """
    if tokenizer is None:
        if texts:
            raise OptionError("The model has no tokenizer, so it cannot be calibrated on texts", "Leave the texts out")
        return ()
    each = _share(len(texts)) if texts else DEFAULT // 2
    first = tokenizer.bos_id
    start = [first] if tokenizer.add_bos and first is not None and first < vocabulary else []
    length = max(1, min(PIECE, context) - len(start))
    found: list[tuple[int, ...]] = []
    for number, text in enumerate(texts or _passages(), 1):
        ids = tokenizer.encode(text[: each * PIECE * _LETTERS], add_special=False, parse_special=False)
        ids = [i for i in ids if i < vocabulary]
        if not ids and texts:
            raise OptionError(f"Text {number} of calibration has no token that the model knows", "Give another text")
        for at in range(0, min(len(ids), each * length), length):
            found.append(tuple([*start, *ids[at : at + length]][: min(PIECE, context)]))
    return tuple(found)


def _share(texts: int) -> int:
    """Pieces of each text."""
    return max(1, MOST // max(1, texts))


def _passages() -> list[str]:
    """What comes with Python; nothing where it does not, and then a backend that needs texts has to say so."""
    from transom.preparation.passages import default_texts

    try:
        return list(default_texts().values())
    except OptionError:
        return []

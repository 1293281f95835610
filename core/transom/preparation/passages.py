"""The passages that a model is calibrated on: documentation and code as they come with Python, or a user's own texts,
and, because these hide what a head finds: one whose end asks for hidden numbers, and two whose ends repeat an earlier
part, from nearby and from far away."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from transom.errors import OptionError, SourceError

if TYPE_CHECKING:
    from transom.text import Tokenizer

NEEDLES = 8
NEARBY = 400
"""How many tokens back what is repeated nearby lies: beyond what every policy reads anyway."""
REPEATED = 128
_LETTERS = 24
"""Of a text, so many for each token that is wanted: more than any tokenizer puts into one."""


def default_texts() -> dict[str, str]:
    """Documentation and code, as they come with Python.

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
    """A text to calibrate on.

    Raises:
        SourceError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}", "Give the path of a text file") from None
    except UnicodeDecodeError:
        raise SourceError(f"{path} is not UTF-8", "Give a text file in UTF-8") from None


def passages(tokenizer: Tokenizer, texts: Mapping[str, str], tokens: int) -> dict[str, list[int]]:
    """So many token ids of each text, and of the passages that are made of the first one.

    Raises:
        OptionError: a text is too short.
    """
    found: dict[str, list[int]] = {}
    for name, text in texts.items():
        ids = _ids(tokenizer, text[: tokens * _LETTERS])
        if len(ids) < tokens:
            raise OptionError(
                f"The text {name} has {len(ids)} tokens", f"Give one of at least {tokens}, or put some together"
            )
        found[name] = ids[:tokens]
    first = next(iter(texts.values()))
    found["recall"] = _recall(tokenizer, first, tokens)
    ids = next(iter(found.values()))
    for name, back in (("copy nearby", NEARBY), ("copy from afar", tokens // 2)):
        found[name] = ids[: tokens - REPEATED] + ids[tokens - REPEATED - back : tokens - back]
    return found


def _recall(tokenizer: Tokenizer, text: str, tokens: int) -> list[int]:
    rng = np.random.default_rng(0)
    numbers = rng.integers(100_000, 1_000_000, NEEDLES)
    told = [_ids(tokenizer, f"\nThe secret number of box {i} is {n}.\n") for i, n in enumerate(numbers)]
    asked: list[int] = []
    for i in rng.permutation(NEEDLES):
        asked += _ids(tokenizer, f"\nThe secret number of box {i} is {numbers[i]}.")
    words = _ids(tokenizer, text[: tokens * _LETTERS])
    step = (tokens - len(asked) - sum(map(len, told))) // NEEDLES
    ids: list[int] = []
    for i, line in enumerate(told):
        ids += words[i * step : (i + 1) * step] + line
    rest = tokens - len(asked) - len(ids)
    return ids + words[NEEDLES * step : NEEDLES * step + rest] + asked


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special=False)

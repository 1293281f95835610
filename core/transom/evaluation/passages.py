"""The passages that a model is calibrated on: documentation and code that come with Python, or the user's own texts.

Natural text does not show which heads retrieve information. Three passages are therefore made from the first text: one
whose end asks for numbers hidden in it, and two whose end repeats an earlier part, from nearby and from far away.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from transom.errors import OptionError
from transom.preparation.calibration_texts import CHARACTERS_PER_TOKEN

if TYPE_CHECKING:
    from transom.text import Tokenizer

NEEDLES = 8
NEARBY = 400
"""Distance in tokens of the nearby repetition: beyond the window that every policy reads."""
REPEATED = 128


def passages(tokenizer: Tokenizer, texts: Mapping[str, str], tokens: int) -> dict[str, list[int]]:
    """`tokens` token ids of each text, and of each passage made from the first one, all as the tokenizer starts a text.

    Raises:
        OptionError: a text is too short.
    """
    found: dict[str, list[int]] = {}
    for name, text in texts.items():
        ids = tokenizer.beginning + _ids(tokenizer, text[: tokens * CHARACTERS_PER_TOKEN])
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
    facts = [_ids(tokenizer, f"\nThe secret number of box {i} is {n}.\n") for i, n in enumerate(numbers)]
    recalled: list[int] = []
    for i in rng.permutation(NEEDLES):
        recalled += _ids(tokenizer, f"\nThe secret number of box {i} is {numbers[i]}.")
    words = tokenizer.beginning + _ids(tokenizer, text[: tokens * CHARACTERS_PER_TOKEN])
    step = (tokens - len(recalled) - sum(map(len, facts))) // NEEDLES
    ids: list[int] = []
    for i, line in enumerate(facts):
        ids += words[i * step : (i + 1) * step] + line
    rest = tokens - len(recalled) - len(ids)
    return ids + words[NEEDLES * step : NEEDLES * step + rest] + recalled


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special=False)

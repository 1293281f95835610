"""Retrieval tasks in long texts, which measure what perplexity hides: whether attention finds single facts.

After RULER (arXiv:2404.06654): one needle, several needles, variables that are assigned to each other, counting. Each
task gives a prompt that includes the right answers, and the positions of the answers' tokens. A model reads all of it
once; the score is its most likely token at each of these positions, given the right answer up to there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Encode = Callable[[str], list[int]]
WORDS = (  # noqa: SIM905  easier to read as one string
    "anchor barrel candle dragon engine falcon garden hammer island jacket kettle ladder magnet needle orange pencil "
    "quartz ribbon saddle tunnel umbrella velvet window yellow zipper"
).split()


@dataclass(frozen=True)
class Task:
    """A prompt that includes its answers."""

    name: str
    ids: list[int]
    places: list[int]
    """Positions of the answers' tokens in `ids`."""


def tasks(encode: Encode, text: str, tokens: int, seed: int, beginning: Sequence[int] = ()) -> Iterator[Task]:
    """One task of each kind, of `tokens` tokens.

    Args:
        encode: text to ids, without special tokens.
        text: the text that the facts are hidden in.
        beginning: ids that the model expects before a text (`Tokenizer.beginning`).
    """
    rng = np.random.default_rng(seed)
    words = encode(text)
    at = int(rng.integers(0, max(1, len(words) - tokens)))
    words = [*beginning, *words[at:]]
    yield _needles("single needle", encode, words, tokens, rng, 1)
    yield _needles("eight needles", encode, words, tokens, rng, 8)
    yield _variables(encode, words, tokens, rng)
    yield _counting(encode, words, tokens, rng)


def _hidden(
    name: str, encode: Encode, words: list[int], tokens: int, facts: Sequence[str], asked: Sequence[tuple[str, str]]
) -> Task:
    """The facts spread over the text, in order; then questions with their answers."""
    told = [encode(fact) for fact in facts]
    questions = [(encode(question), encode(answer)) for question, answer in asked]
    room = tokens - sum(map(len, told)) - sum(len(q) + len(a) for q, a in questions)
    step = room // (len(told) + 1)
    ids: list[int] = []
    for i, fact in enumerate(told):
        ids += words[i * step : (i + 1) * step] + fact
    ids += words[len(told) * step : room]
    places: list[int] = []
    for question, answer in questions:
        ids += question
        places += range(len(ids), len(ids) + len(answer))
        ids += answer
    return Task(name, ids, places)


def _needles(name: str, encode: Encode, words: list[int], tokens: int, rng: np.random.Generator, count: int) -> Task:
    numbers = rng.integers(100_000, 1_000_000, count)
    boxes = rng.permutation(90)[:count] + 10
    facts = [f"\nThe secret number of box {b} is {n}.\n" for b, n in zip(boxes, numbers, strict=True)]
    asked = [(f"\nThe secret number of box {boxes[i]} is ", f"{numbers[i]}") for i in rng.permutation(count)]
    return _hidden(name, encode, words, tokens, facts, asked)


def _variables(encode: Encode, words: list[int], tokens: int, rng: np.random.Generator) -> Task:
    """Chains of assignments; the questions ask for the value of each variable."""
    names = [f"{a.upper()}_{n}" for a, n in zip(rng.permutation(WORDS)[:6], rng.integers(10, 100, 6), strict=True)]
    values = rng.integers(10_000, 100_000, 2)
    facts, of = [], {}
    for chain, value in enumerate(values):
        first, *rest = names[3 * chain : 3 * chain + 3]
        facts.append(f"\n{first} = {value}\n")
        of[first] = value
        for before, name in zip([first, *rest], rest, strict=False):
            facts.append(f"\n{name} = {before}\n")
            of[name] = value
    asked = [(f"\nThe value of {name} is ", f"{of[name]}") for name in rng.permutation(names)]
    return _hidden("variables", encode, words, tokens, facts, asked)


def _counting(encode: Encode, words: list[int], tokens: int, rng: np.random.Generator) -> Task:
    """Repeated words; both questions ask for the most frequent one."""
    called = rng.permutation(WORDS)[:8]
    counts = [24, *([6] * 7)]
    order = rng.permutation(np.repeat(np.arange(8), counts))
    facts = [f"\nCalled: {called[i]}\n" for i in order]
    asked = [("\nThe word that was called most often is", f" {called[0]}"), ("\nCalled most often:", f" {called[0]}")]
    return _hidden("counting", encode, words, tokens, facts, asked)

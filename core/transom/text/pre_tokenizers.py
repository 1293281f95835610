"""The pre-tokenizers that GGUF files name: how text is split into words before byte-level BPE.

A GGUF file contains only a name (`tokenizer.ggml.pre`). The names are those of llama.cpp (src/llama-vocab.cpp). Where
llama.cpp records the original pattern of the model's tokenizer.json, it is used here instead of the variant for
llama.cpp's regular expression engine. A wrong split degrades answers without any error, so unknown names are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from transom.errors import SourceError, nearest

if TYPE_CHECKING:
    from tokenizers import pre_tokenizers

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s+(?!\S)|\s+"
_WORDS_THEN_SPACES = rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_SPACES}"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""GPT-2's pattern (Radford et al. 2019, encoder.py)."""
LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_WORDS_THEN_SPACES}"
"""tiktoken's cl100k_base pattern."""
QWEN2 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_WORDS_THEN_SPACES}"
"""cl100k_base with each digit as a separate word."""
QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_SPACES}"
)


def _cased_words(contraction: str, digits: str) -> str:
    """Words split at a change from lower to upper case: the form of o200k_base and tekken."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    lead = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{lead}{upper}*{lower}+{contraction}|{lead}{upper}+{lower}*{contraction}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{_SPACES}"
    )


GPT4O = _cased_words(f"{_CONTRACTION}?", r"\p{N}{1,3}")
"""tiktoken's o200k_base pattern."""
TEKKEN = _cased_words("", r"\p{N}")
"""mistral-common's tekken pattern."""

_NUMBER = r"\p{N}"
_NUMBERS_BY_3 = r"\p{N}{1,3}"
_DEEPSEEK_CJK = "[一-龥぀-ゟ゠-ヿ]+"
_PUNCTUATED_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|" + _SPACES
)
_DEEPSEEK_LETTERS = (  # escaped, because some have a different normal form
    r"\s?[A-Za-z"
    "\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-"
    "\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b"
    "\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-"
    "\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124"
    "\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-"
    "\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787"
    "\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
    "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-"
    "\U000118df\U0001e900-\U0001e943"
    "]+"
)
_FALCON_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"


@dataclass(frozen=True)
class PreTokenizer:
    """A way of splitting text, with the settings that llama.cpp associates with its name."""

    patterns: tuple[str, ...]
    """Regular expressions, applied one after the other to the remaining text: each match is a word."""
    ignore_merges: bool = False
    """A word that is a token becomes that token, regardless of merges."""
    add_bos: bool = False
    """Whether a beginning token is added if the file does not state it."""
    nfc: bool = False
    """The model's own tokenizer normalizes to NFC first, which GGUF files do not state."""

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The component for a `tokenizers.Tokenizer`, ending in the byte alphabet."""
        from tokenizers import Regex, pre_tokenizers

        *first, last = self.patterns
        steps: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Split(Regex(p), "isolated") for p in first]
        if last == GPT2:  # built in, which is faster
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
        else:
            steps.append(pre_tokenizers.Split(Regex(last), "isolated"))
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        return pre_tokenizers.Sequence(steps)


_GPT2 = PreTokenizer((GPT2,))
_DIGITS = PreTokenizer((_NUMBER, GPT2))
_LLAMA3 = PreTokenizer((LLAMA3,), ignore_merges=True, add_bos=True)
_CL100K = PreTokenizer((LLAMA3,))
_QWEN2 = PreTokenizer((QWEN2,))
_GPT4O = PreTokenizer((GPT4O,))
_DEEPSEEK3 = PreTokenizer((_NUMBERS_BY_3, _DEEPSEEK_CJK, _PUNCTUATED_WORDS))
_BAILING = PreTokenizer(
    (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|" + _SPACES,)
)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    # llama 3 and models with its tokenizer
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
        _LLAMA3,
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), _CL100K),
    **dict.fromkeys(("glm4", "glm5"), replace(_CL100K, ignore_merges=True)),
    "jais-2": PreTokenizer(
        (
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|"
            + "|".join(rf"\s{{{n}}}(?!\S)" for n in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2"))
            + r"|\s{1}",
        )
    ),
    "minicpm5": PreTokenizer(
        (_NUMBERS_BY_3, rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}+{_WORDS_THEN_SPACES}"),
        ignore_merges=True,
    ),
    # GPT-2 and models with its pattern
    **dict.fromkeys(
        (
            *("gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum"),
            *("modern-bert", "jina-v1-en", "jina-v2-code", "roberta-bpe", "jais", "trillion", "granite-docling"),
            "exaone4",
        ),
        _GPT2,
    ),
    **dict.fromkeys(("mpt", "olmo"), replace(_GPT2, nfc=True)),  # GPT-NeoX tokenizers
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b", "mellum2"),
        _DIGITS,
    ),
    "command-r": replace(_DIGITS, nfc=True),
    "falcon": PreTokenizer((_FALCON_PUNCTUATION, GPT2, "[0-9][0-9][0-9]")),
    # Qwen and models with its pattern
    "qwen2": replace(_QWEN2, nfc=True),
    **dict.fromkeys(
        ("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"), _QWEN2
    ),
    "qwen35": PreTokenizer((QWEN35,), nfc=True),
    "ufakzeka": PreTokenizer((rf"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_WORDS_THEN_SPACES}",)),
    "laguna": PreTokenizer((r"[^\n]+|[\n]+", QWEN2)),
    "seed-coder": PreTokenizer(
        (
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}"
            rf"| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|{_SPACES}",
        )
    ),
    "exaone-moe": PreTokenizer(
        (
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|{_SPACES}",
        )
    ),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), _BAILING),
    # o200k and tekken
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), _GPT4O),
    "granite-embed-multi-97m": replace(_GPT4O, ignore_merges=True),
    **dict.fromkeys(("tiny_aya", "cohere2moe"), PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O))),
    "tekken": PreTokenizer((TEKKEN,), ignore_merges=True, add_bos=True),
    "youtu": PreTokenizer(
        (
            "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+",
            _cased_words(f"{_CONTRACTION}?", _NUMBER),
        ),
        ignore_merges=True,
    ),
    # DeepSeek
    "deepseek-llm": PreTokenizer(
        (
            *("[\r\n]", _DEEPSEEK_LETTERS, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$"),
            *("[一-龥ࠀ-一가-퟿]+", r"\p{N}+"),
        )
    ),
    "deepseek-coder": PreTokenizer(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", _NUMBER)),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"), _DEEPSEEK3),
    "spark2_5": PreTokenizer(
        (
            *(_NUMBERS_BY_3, _DEEPSEEK_CJK),
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            r"| ?[\p{P}\p{S}]+|[\r\n]|" + _SPACES,
            _NUMBER,
        )
    ),
    # the rest
    **dict.fromkeys(("poro-chat", "bloom", "gpt3-finnish"), PreTokenizer((_BLOOM,))),
    "viking": PreTokenizer((_BLOOM, _NUMBER)),
    "chameleon": PreTokenizer(
        (
            *("<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", "([\\t\\n]|    |  )"),
            *(_NUMBER, r"[\p{P}!-/:-@\[-`{-~]", GPT2),
        ),
        add_bos=True,
    ),
}
"""Pre-tokenizers by name. Not supported, since no exact pattern is available: kimi-k2, afmoe, superbpe, whitespace."""


def pre_tokenizer(name: str) -> PreTokenizer:
    """Look up a pre-tokenizer.

    Raises:
        SourceError: the name is unknown. There is no default.
    """
    found = PRE_TOKENIZERS.get(name)
    if found is None:
        raise SourceError(
            f'The GGUF file names the pre-tokenizer "{name}" (tokenizer.ggml.pre), which Transom does not know',
            f"Load the Hugging Face directory of the model instead. {nearest(name, PRE_TOKENIZERS)}",
        )
    return found

"""Text in and out of a model: tokenizers, chat templates, streaming detokenizers, and default generation settings.

Importing this package is cheap: `tokenizers` and `jinja2` are imported when first needed.
"""

from __future__ import annotations

from transom.text.chat_template import ChatTemplate, ChatTemplateError
from transom.text.defaults import GenerationDefaults
from transom.text.detokenizer import Detokenizer
from transom.text.tokenizer import SpecialIds, Tokenizer, TokenPiece

__all__ = [
    "ChatTemplate",
    "ChatTemplateError",
    "Detokenizer",
    "GenerationDefaults",
    "SpecialIds",
    "TokenPiece",
    "Tokenizer",
]

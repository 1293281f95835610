"""Converts prompts to token ids and checks them before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from transom.errors import ContextExceeded, OptionError, nearest, option

if TYPE_CHECKING:
    from transom.text import ChatTemplate, Tokenizer

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})

Prompt = str | bytes | Sequence[int]
"""Text, UTF-8 bytes, or token ids (a list, tuple or one-dimensional integer array)."""


def prompt_ids(prompt: Prompt, tokenizer: Tokenizer | None, vocabulary: int, bos_id: int | None) -> list[int]:
    """Token ids of a prompt; only the beginning-of-text token for an empty prompt.

    Raises:
        OptionError: the bytes are not UTF-8; the prompt is text and the model has no tokenizer; ids are not integers or
            not in the vocabulary; the prompt is empty and the model has no beginning-of-text token.
    """
    if isinstance(prompt, (bytes, bytearray, memoryview)):
        try:
            prompt = bytes(prompt).decode("utf-8")
        except UnicodeDecodeError as error:
            raise OptionError(
                f"The prompt is not UTF-8 text: byte 0x{error.object[error.start]:02x} at position {error.start}",
                "Decode it with its own encoding, and pass the text.",
            ) from error
    if isinstance(prompt, str):
        ids = require_tokenizer(tokenizer).encode(prompt)
    else:
        ids = token_ids(prompt, vocabulary, "The prompt")
    if ids:
        return ids
    if bos_id is None:
        raise OptionError(
            "The prompt is empty, and the model has no beginning-of-text token to start from",
            "Give it at least one character or token.",
        )
    return [bos_id]


def token_ids(ids: Any, vocabulary: int, what: str) -> list[int]:
    """A list of plain integers, checked against the vocabulary.

    Raises:
        OptionError: the argument is not a flat sequence of integers, or an id is outside the vocabulary.
    """
    form = "Pass one flat sequence of integers, such as [1, 2, 3]."
    try:
        array = np.asarray(ids)
    except ValueError as error:
        raise OptionError(f"{what} is a ragged list, not token ids", form) from error
    if array.size == 0 and array.ndim == 1:
        return []
    if array.ndim != 1 or array.dtype.kind not in "iu":
        if array.ndim == 1 and array.dtype.kind in "US":
            raise OptionError(f"{what} is a list of strings", "Pass one string per call; calls may run in threads.")
        raise OptionError(f"{what} is {_describe(array)}, not a sequence of token ids", form)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        raise OptionError(
            f"{what} contains the token id {wrong}, which the model does not have",
            f"Ids range from 0 to {vocabulary - 1}.",
        )
    plain: list[int] = array.tolist()
    return plain


def chat_ids(
    messages: str | Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer | None,
    template: ChatTemplate | None,
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
) -> list[int]:
    """Token ids of a conversation, rendered with the model's chat template.

    Raises:
        OptionError: there is no tokenizer, no chat template or no message, or a message is malformed.
        ChatTemplateError: the template rejects the messages or fails.
    """
    tokenizer = require_tokenizer(tokenizer)
    if template is None:
        raise OptionError(
            "The model has no chat template, so it cannot format a conversation",
            "Use generate(text), which completes plain text, or load an instruction-tuned model.",
        )
    text = template.render(checked_messages(messages), tools=tools, **variables)
    return tokenizer.encode(text, add_special=False)


def checked_messages(messages: str | Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages; a single string becomes one user message, and a content in parts becomes its text.

    Raises:
        OptionError: there is no message, or one is not a mapping, has no known role, has no content, or has a part that
            is not text.
    """
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    chat: Sequence[Mapping[str, Any]] = messages
    example = 'Write it like {"role": "user", "content": "Hello"}.'
    if isinstance(messages, (bytes, Mapping)) or not isinstance(messages, Sequence):
        raise OptionError(f"messages is a {type(messages).__name__}, not a list of messages", example)
    if not messages:
        raise OptionError("There are no messages to answer", "Pass at least one user message.")
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise OptionError(f"Message {place} is a {type(message).__name__}, not a mapping", example)
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            problem = "has no role" if role is None else f"has the role {role!r}"
            raise OptionError(f"Message {place} {problem}", nearest(str(role or ""), ROLES))
        if message.get("content") is None and not message.get("tool_calls"):
            raise OptionError(f"Message {place} (role {role}) has no content", example)
    return [{**message, "content": _joined_text(place, message)} if _in_parts(message) else message for message in chat]


def _in_parts(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return isinstance(content, Sequence) and not isinstance(content, str | bytes)


def _joined_text(place: int, message: Mapping[str, Any]) -> str:
    """The text of a content that is a list of parts, one below the other as other servers join them.

    Raises:
        OptionError: a part is not text.
    """
    texts = []
    for part in message["content"]:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str) or kind not in ("text", "str"):
            raise OptionError(
                f"Message {place} has a part of the type {kind!r}, and the model reads text only",
                'Pass parts like {"type": "text", "text": "Hello"}.',
            )
        texts.append(text)
    return "\n".join(texts)


def require_tokenizer(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise OptionError(
            "The model has no tokenizer, so it cannot read or write text",
            "Pass token ids, or load it from a directory with a tokenizer.json.",
        )
    return tokenizer


def larger_context(least: str, *, built_in: bool) -> str:
    """Advice on how to get a larger context.

    Args:
        least: describes the required context.
        built_in: the model is a bundle that was compiled for its context.
    """
    return f"export the model again with {least}" if built_in else f"load the model with {least}"


def check_fits(
    prompt_tokens: int, max_new_tokens: int | None, context: int, model_context: int | None, *, built_in: bool = False
) -> int:
    """How many tokens may be generated: `max_new_tokens`, or else the rest of the context.

    Raises:
        ContextExceeded: prompt and output exceed the context.
    """
    room = context - prompt_tokens
    wanted = max_new_tokens or 1
    if wanted <= room:
        return max_new_tokens or room
    needed = prompt_tokens + wanted
    if room <= 0:
        cause = f"The prompt has {prompt_tokens} tokens"
        if room == 0:
            cause += ", which leaves no room for an answer"
        shorter = "Shorten the prompt"
    else:
        cause = f"The prompt has {prompt_tokens} tokens and {wanted} new ones were requested, together {needed}"
        shorter = f"Request at most {option('max_new_tokens', room)}, shorten the prompt"
    if model_context is not None and needed > model_context:
        fix = f"{shorter}; the model supports {model_context} tokens."
    else:
        fix = f"{shorter}, or {larger_context(option('context', needed) + ' or more', built_in=built_in)}."
    error = ContextExceeded(f"{cause}; the model was loaded with a context of {context}", fix)
    error.room = max(room, 0)
    raise error


def _describe(array: Any) -> str:
    if array.ndim == 0:
        value = array.item()
        return "None" if value is None else f"a {type(value).__name__}"
    return f"an array of {array.dtype} with {array.ndim} dimensions"

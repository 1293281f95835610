"""The conversation of `transom chat` as data: messages, undo, saving and loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transom.errors import OptionError

FORMAT = "transom-conversation"


class Conversation:
    """Messages in the form that a chat template expects, starting with the system message if there is one."""

    def __init__(self, system: str | None = None) -> None:
        self.system = system or None
        self._turns: list[dict[str, str]] = []

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages for the chat template."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return [*head, *self._turns]

    def __len__(self) -> int:
        """Number of messages, without the system message."""
        return len(self._turns)

    def ask(self, text: str) -> None:
        """Add a user message."""
        self._turns.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """Add the model's answer."""
        self._turns.append({"role": "assistant", "content": text})

    def take_back(self) -> str | None:
        """Remove the last user message and everything after it. Returns its text, or None if there is none."""
        for place in range(len(self._turns) - 1, -1, -1):
            if self._turns[place]["role"] == "user":
                text = self._turns[place]["content"]
                del self._turns[place:]
                return text
        return None

    def copy(self) -> Conversation:
        """Another conversation with the same messages."""
        other = Conversation(self.system)
        other._turns = list(self._turns)
        return other

    def reset(self) -> None:
        """Remove everything but the system message."""
        self._turns.clear()

    def save(self, path: Path, model: str) -> None:
        """Write the conversation as JSON.

        Raises:
            OptionError: the file cannot be written.
        """
        document = {"format": FORMAT, "version": 1, "model": model, "messages": self.messages}
        try:
            path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        except (OSError, ValueError) as e:
            raise OptionError(
                f"{path} cannot be written: {getattr(e, 'strerror', None) or e}", "Name another file"
            ) from e

    def load(self, path: Path) -> None:
        """Replace the conversation by one that `save` wrote, or by a plain JSON list of messages.

        Raises:
            OptionError: the file cannot be read or contains something else. The conversation is then unchanged.
        """
        try:
            document: Any = json.loads(path.read_text(encoding="utf-8"))
        except OSError as e:
            raise OptionError(f"{path} cannot be read: {e.strerror or e}", "Name a file that /save wrote") from e
        except ValueError as e:
            raise OptionError(f"{path} is not JSON: {e}", "Name a file that /save wrote") from e
        messages = document.get("messages") if isinstance(document, dict) else document
        if not isinstance(messages, list) or not all(_is_message(m) for m in messages):
            raise OptionError(f"{path} does not contain a conversation", "Name a file that /save wrote")
        head = messages[:1] if messages and messages[0]["role"] == "system" else []
        self.system = head[0]["content"] if head else None
        self._turns = [{"role": m["role"], "content": m["content"]} for m in messages[len(head) :]]


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.get("role") in ("system", "user", "assistant")
        and isinstance(value.get("content"), str)
    )

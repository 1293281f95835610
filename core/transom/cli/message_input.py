"""Readers of the messages of `transom chat`: prompt_toolkit, plain `input`, or the lines of a pipe.

Each returns one message at a time, or None at the end of input. KeyboardInterrupt is passed on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from transom.cli.output import is_terminal

PROMPT = "> "


class MessageReader(Protocol):
    hint: str
    """Which optional package is missing and how to install it; empty if none is."""

    def ask(self) -> str | None:
        """The next message; None at the end of input. Raises KeyboardInterrupt."""
        ...


@contextmanager
def without_echo() -> Iterator[None]:
    """Turn off terminal echo, so that text typed during an answer appears only with the next message."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    if not is_terminal(sys.stdin):
        yield
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)


def history_file() -> Path | None:
    """The file for the history of messages, readable by the user only; None if it cannot be created."""
    from platformdirs import user_state_path

    path = user_state_path("transom", appauthor=False) / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
    except OSError:
        return None
    return path


def message_reader(commands: Sequence[str], status: Callable[[], str]) -> MessageReader:
    """The best reader for this standard input.

    Args:
        commands: words starting with `/` that can be completed.
        status: returns the line at the bottom of the screen.
    """
    if not (is_terminal(sys.stdin) and is_terminal(sys.stdout)):
        return PipedLines()
    try:
        return PromptToolkit(commands, status)
    except ImportError:
        return PlainInput()


class PipedLines:
    """For scripts: each line of standard input is a message. A backslash at the end continues a line."""

    hint = ""

    def __init__(self) -> None:
        self._lines = iter(sys.stdin.buffer)

    def ask(self) -> str | None:
        from transom.errors import OptionError

        parts: list[str] = []
        for raw in self._lines:
            try:
                line = raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as e:
                raise OptionError(
                    f"Standard input is not UTF-8 text: byte 0x{raw[e.start]:02x}",
                    "Convert it first, as in: iconv -f latin1 -t utf-8 FILE | transom chat MODEL",
                ) from None
            if not line.endswith("\\"):
                return "\n".join([*parts, line])
            parts.append(line[:-1])
        return "\n".join(parts) if parts else None


class PlainInput:
    """`input()`, with line editing if Python has readline."""

    hint = "For history, multi-line messages and completion: pip install 'transom[chat]'"

    def __init__(self) -> None:
        try:
            import readline  # noqa: F401  importing it is what gives input() its line editing
        except ImportError:
            return

    def ask(self) -> str | None:
        parts: list[str] = []
        while True:
            try:
                line = input(PROMPT if not parts else "  ")
            except EOFError:
                return "\n".join(parts) if parts else None
            if not line.endswith("\\"):
                return "\n".join([*parts, line])
            parts.append(line[:-1])


class PromptToolkit:
    """Line editing with history, command completion, Alt-Enter or Esc-Enter for a new line, and multi-line paste."""

    hint = ""

    def __init__(self, commands: Sequence[str], status: Callable[[], str]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
        from prompt_toolkit.completion import Completer, Completion
        from prompt_toolkit.history import FileHistory, History, InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings

        class Commands(Completer):
            def get_completions(self, document: Any, complete_event: Any) -> Any:
                text = document.text_before_cursor
                if text.startswith("/") and " " not in text and "\n" not in text:
                    for word in commands:
                        if word.startswith(text):
                            yield Completion(word, start_position=-len(text))

        keys = KeyBindings()

        @keys.add("enter")
        def _send(event: Any) -> None:
            event.current_buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def _new_line(event: Any) -> None:
            event.current_buffer.insert_text("\n")

        path = history_file()
        history: History = FileHistory(str(path)) if path is not None else InMemoryHistory()
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            key_bindings=keys,
            history=history,
            auto_suggest=AutoSuggestFromHistory(),
            completer=Commands(),
            complete_while_typing=True,
            prompt_continuation=lambda width, number, wrapped: " " * width,
            bottom_toolbar=status,
            erase_when_done=False,
        )

    def ask(self) -> str | None:
        try:
            return self._session.prompt()
        except EOFError:
            return None

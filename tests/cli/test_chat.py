"""`transom chat`, scripted through a pipe and, where the system has pseudo-terminals, as a person would use it.

Draws: the numbers are only carried along; what is checked does not depend on them.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import byte_llama
import pytest
import toy

from transom.cli.chat import _ChatSession
from transom.cli.conversation import Conversation
from transom.errors import OptionError

OPTIONS = ("--backend", "toy", "--verify", "off")


@pytest.fixture
def chat(transom: Any, model: Path) -> Callable[..., Any]:
    def run(lines: str | bytes, *arguments: str, **options: Any) -> Any:
        return transom("chat", model, *OPTIONS, *arguments, input=lines, **options)

    return run


def test_each_line_of_a_pipe_is_a_message_with_counts_after_its_answer(chat: Callable[..., Any]) -> None:
    status, out, err = chat("Hello\n\nAgain\n")
    assert status == 0
    assert out == f"{toy.TEXT}\n{toy.TEXT}\n"
    first, second = (line for line in err.splitlines() if line.startswith("["))
    assert "8 + 20 tokens, context 28 of 4096" in first
    assert f"{8 + 19 + 1 + 8} + 20 tokens" in second  # the conversation so far goes with each message


def test_json_gives_one_line_for_each_answer(chat: Callable[..., Any]) -> None:
    status, out, _ = chat("Hello\nAgain\n", "--json", "--system", "Be kind")
    answers = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [a["choices"][0]["text"] for a in answers] == [toy.TEXT, toy.TEXT]
    assert answers[1]["context"] == {"used": answers[1]["usage"]["total_tokens"], "size": 4096}


def test_commands_change_the_conversation(chat: Callable[..., Any], tmp_path: Path) -> None:
    lines = "Hello\n/undo\nab\n/save talk.json\n/reset\n/undo\n/load talk.json\n/retry\n"
    lines += "/system abc\ncd\n/system\n/exit\nno\n"
    status, out, err = chat(lines)
    assert status == 0
    assert out.count(toy.TEXT) == 4
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved["messages"] == [{"role": "user", "content": "ab"}, {"role": "assistant", "content": toy.TEXT}]
    for said in ("Removed: Hello", "There is nothing to undo", "2 messages loaded from talk.json", "\nabc\n"):
        assert said in err
    counts = [line.split(" + ")[0] for line in err.splitlines() if line.startswith("[")]
    assert counts == ["[8", "[5", "[5", "[10"]


def test_params_are_shown_checked_and_used(chat: Callable[..., Any]) -> None:
    status, out, err = chat(
        "/params max-tokens=3 temperature=0.5\nHello\n/params max_tokens=\nHello\n/params top_p=7\n"
    )
    assert status == 2
    assert out == f"Hel\n{toy.TEXT}\n"
    assert "temperature = 0.5 (set)" in err
    assert "cut off by --max-tokens" in err
    assert "Error: top_p=7 is not allowed" in err


def test_an_unknown_command_is_told_with_the_nearest_and_two_slashes_are_a_message(chat: Callable[..., Any]) -> None:
    status, out, err = chat("/undoo\n//undo\n")
    assert status == 2
    assert 'There is no command /undoo. Did you mean "/undo"?' in err
    assert out == toy.TEXT + "\n"


def test_a_line_that_ends_with_a_backslash_goes_on(chat: Callable[..., Any]) -> None:
    found = json.loads(chat("ab\\\ncd\n", "--json").out)
    assert found["usage"]["prompt_tokens"] == 5 + 3


def test_a_message_too_long_for_the_context_is_taken_back(chat: Callable[..., Any]) -> None:
    status, out, err = chat(f"{'x' * 70}\nab\n", "--context", "64")
    assert status == 2
    assert "The prompt has 73 tokens" in err
    assert out == toy.TEXT + "\n"
    assert "[5 + 20 tokens" in err


def test_a_context_that_is_nearly_full_is_told_in_the_words_of_the_command_line(chat: Callable[..., Any]) -> None:
    lines = "Hello\nHello\n/params max_tokens=4\nHi\n/undo\n"
    status, _, err = chat(lines, "--context", "64", "--max-tokens", "25")
    assert status == 2
    assert "max_new_tokens=" not in err.split("/params max_tokens=")[0]
    assert "context=" not in err
    for way in ("/params max_tokens=", "--max-tokens", "/undo", "/reset", "--context"):
        assert way in err


def test_undo_and_load_count_the_conversation_again(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from transom.text import ChatTemplate

    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    model: Any = SimpleNamespace(chat_template=template, tokenize=list, name="m", context=64)
    talk = _ChatSession(model, None, {}, quiet=True, as_json=False)
    for question, answer in (("abc", "de"), ("f", "ghij")):
        talk.conversation.ask(question)
        talk.conversation.answer(answer)
    talk.conversation.save(tmp_path / "talk.json", "m")
    counts = []
    for command in ("/undo", "/undo", f"/load {tmp_path / 'talk.json'}", "/reset"):
        assert talk._handle(command)
        counts.append(talk.used)
    assert counts == [5, 0, 10, 0]


def test_bytes_that_are_not_utf8_are_refused(chat: Callable[..., Any]) -> None:
    status, _, err = chat(b"ab\xff\n")
    assert status == 2
    assert "not UTF-8 text: byte 0xff" in err


def test_a_model_without_a_template_says_what_to_use(transom: Any, tmp_path: Path, rng: Any) -> None:
    model = byte_llama.write_gguf(tmp_path / "plain.gguf", rng, template=None)
    status, _, err = transom("chat", model, *OPTIONS)
    assert status == 2
    assert "no chat template" in err
    assert "transom run MODEL --raw" in err


def test_a_conversation_survives_a_file_that_is_none(tmp_path: Path) -> None:
    talk = Conversation("Be kind")
    talk.ask("a")
    for text in ("{", "[1]", '{"messages": [{"role": "x", "content": "y"}]}', '{"messages": "no"}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(OptionError):
            talk.load(tmp_path / "bad.json")
    with pytest.raises(OptionError, match="cannot be read"):
        talk.load(tmp_path / "none.json")
    assert talk.messages == [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "a"}]
    talk.save(tmp_path / "good.json", "m")
    other = Conversation()
    other.load(tmp_path / "good.json")
    assert other.messages == talk.messages


class Terminal:
    """A pseudo-terminal with a program in it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.seen = descriptor, ""

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def until(self, text: str, seconds: float = 30) -> str:
        """What was shown since the last call, up to and with `text`."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.descriptor], [], [], max(end - time.monotonic(), 0))
            try:
                piece = os.read(self.descriptor, 1 << 16) if ready else b""
            except OSError:
                piece = b""
            assert piece, f"{text!r} did not come, only {self.seen!r}"
            self.seen += piece.decode(errors="replace")
        shown, _, self.seen = self.seen.partition(text)
        return shown + text


@contextmanager
def terminal(transom: Any, *arguments: Any, env: dict[str, str] | None = None) -> Iterator[tuple[Terminal, Any]]:
    import pty

    ours, theirs = pty.openpty()
    try:
        child = transom.begin(
            *arguments, env={"TERM": "xterm", **(env or {})}, stdin=theirs, stdout=theirs, stderr=theirs,
            start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        yield Terminal(ours), child
    finally:
        os.close(ours)


needs_terminal = pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")


@needs_terminal
def test_in_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_leaves(transom: Any, model: Path, tmp_path: Path) -> None:
    environment = {"TOY_DELAY": "0.05", "TOY_ENDLESS": "1"}
    with terminal(transom, "chat", model, *OPTIONS, env=environment) as (screen, child):
        screen.until("/help")
        screen.until("\x1b[?2004h")  # the editor is there
        screen.type("first\x1b\rsecond\r")
        screen.until("Hell")
        child.send_signal(signal.SIGINT)
        screen.until("[stopped, ")
        screen.until("\x1b[?2004h")
        screen.type("/undo\r")
        screen.until("Removed: first second")
        screen.until("\x1b[?2004h")
        screen.type("\x04")
        assert child.wait(timeout=20) == 0
    history = tmp_path / "state" / "transom" / "chat_history"
    assert "+first\n+second\n" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


@needs_terminal
def test_without_prompt_toolkit_a_plain_loop_says_what_is_missing(transom: Any, model: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked" / "prompt_toolkit"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('not installed')")
    paths = f"{blocked.parent}{os.pathsep}{transom.environment['PYTHONPATH']}"
    with terminal(transom, "chat", model, *OPTIONS, env={"PYTHONPATH": paths}) as (screen, child):
        screen.until("pip install 'transom[chat]'")
        screen.until("> ")
        screen.type("Hello\r")
        screen.until(toy.TEXT)
        screen.until("tokens/s]")
        screen.until("> ")
        screen.type("\x04")
        assert child.wait(timeout=20) == 0

"""`transom chat`: a conversation in the terminal, or a script with one message per line."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from transom.cli.message_input import without_echo
from transom.cli.options import MODEL, QUIET, UTF8, load_arguments, loading, located_model, sampling, sampling_arguments
from transom.cli.output import (
    AnswerPrinter,
    ProgressLine,
    aside,
    error_facts,
    is_terminal,
    print_error,
    print_json_line,
    warn,
)

if TYPE_CHECKING:
    from transom.generation.model import Model
    from transom.generation.results import Generation

COMMANDS = {
    "/help": "Show this help.",
    "/reset": "Clear the conversation; the system message stays.",
    "/system [TEXT]": "Show the system message, set it (this resets the conversation), or remove it with -.",
    "/undo": "Remove your last message and its answer.",
    "/retry": "Answer your last message again.",
    "/save FILE": "Write the conversation to a file.",
    "/load FILE": "Continue a conversation that /save wrote.",
    "/params [NAME=VALUE]": "Show or set sampling options, as in /params temperature=0.7; NAME= restores the default.",
    "/report": "Show device, backend, the reason of the choice, memory and notes.",
    "/exit": "Leave (or Ctrl-D).",
}
_SHOWN = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "seed")
NAMES = tuple(usage.split()[0] for usage in COMMANDS)


@click.command(
    epilog="""\b
Examples:
  transom chat model.gguf
  transom chat bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M
  transom chat path/to/checkpoint --system "You are a pirate." --temperature 0.8
  transom chat model.gguf --device cuda:0 --max-tokens 500
  printf 'Hello\\nAnd in French?\\n' | transom chat model.gguf
  printf 'Hello\\n' | transom chat model.gguf --json

Enter sends, Alt-Enter (or Esc, then Enter) starts a new line, Ctrl-C stops the answer, Ctrl-D exits. Lines that start
with / are commands, see /help; // sends a message that starts with /.
"""
)
@MODEL
@click.option("--system", type=UTF8, help="The system message.")
@QUIET
@sampling
@loading
def chat(model: str, system: str | None, quiet: bool, as_json: bool, **options: Any) -> int:
    """Chat with a model.

    If stdin is not a terminal, each line is one message. With --json each answer is one line of JSON.
    """
    import transom
    from transom.errors import OptionError, name_options
    from transom.loading.template_check import require_sound_template

    generation = sampling_arguments(options)
    with ProgressLine(quiet=quiet, stage="load") as progress:
        path = located_model(model, options["offline"], progress)
        require_sound_template(path)
        loaded = transom.load(path, **load_arguments(options), progress=progress)
    with loaded:
        if loaded.chat_template is None:
            raise OptionError(
                f"{loaded.name} has no chat template, so a conversation cannot be formatted for it",
                "Load an instruction-tuned model, or complete a text with: transom run MODEL --raw TEXT",
            )
        if not quiet:
            for warning in loaded.report.warnings:
                warn(warning)
        name_options(None)  # inside the chat, options are written as in /params: NAME=VALUE
        talk = _ChatSession(loaded, system, generation, quiet=quiet, as_json=as_json)
        talk.run()
        return 0 if is_terminal(sys.stdin) else talk.status


class _ChatSession:
    """One session: a model, a conversation, and sampling options."""

    def __init__(
        self, model: Model, system: str | None, params: Mapping[str, Any], *, quiet: bool, as_json: bool
    ) -> None:
        from transom.cli.conversation import Conversation
        from transom.cli.message_input import message_reader

        self.model, self.quiet, self.as_json = model, quiet, as_json
        self.conversation = Conversation(system)
        self.params = dict(params)
        self.used = 0
        """Tokens of the conversation in the context."""
        self.status = 0
        """Exit status of a script; 2 if a message failed."""
        self._reader = message_reader(NAMES, self._line)

    def run(self) -> None:
        if is_terminal(sys.stdin) and not self.quiet:
            report = self.model.report
            click.secho(report.model, bold=True, err=True)
            aside(f"{report.device.id} by {report.backend}, {self.model.context} tokens of context")
            aside("/help shows the commands, Ctrl-D exits")
            if self._reader.hint:
                aside(self._reader.hint)
        while True:
            try:
                text = self._reader.ask()
            except KeyboardInterrupt:
                if not is_terminal(sys.stdin):
                    raise
                aside("\nCtrl-D or /exit exits.")
                continue
            if text is None or not self._handle(text):
                return

    def _handle(self, text: str) -> bool:
        """Handle one input. Returns whether to continue."""
        from transom.errors import ContextExceeded, TransomError

        try:
            if text.startswith("/") and not text.startswith("//"):
                return self._command(*_split(text))
            text = text.removeprefix("/") if text.startswith("//") else text
            if text.strip():
                self._answer(text)
        except ContextExceeded as e:
            self.status = 2
            error = ContextExceeded(e.cause, self._fix(e.room))
            print_error(error)
        except TransomError as e:
            self.status = 2
            print_error(e)
        return True

    def _fix(self, room: int) -> str:
        """What to do when the conversation and the requested answer exceed the context."""
        shorter = f"/params max_tokens={room} asks for a shorter answer (as --max-tokens does)" if room > 0 else ""
        forget = "/undo removes your last message and its answer, /reset all of them" if len(self.conversation) else ""
        parts = [part for part in (shorter, forget) if part] or ["Write a shorter message"]
        begun = "an export" if self.model.report.context_built_in else "a chat started"
        return "; ".join([*parts, f"{begun} with a larger --context holds more, as far as the model allows"])

    # answering --------------------------------------------------------------------------------------------------------
    def _answer(self, text: str) -> None:
        """Generate an answer. A failure leaves the conversation unchanged."""
        self.conversation.ask(text)
        answered = False
        try:
            with without_echo(), ProgressLine(quiet=self.quiet, stage="prompt") as progress:
                stream = self.model.stream_chat(self.conversation.messages, progress=progress.prompt, **self.params)
                answer = AnswerPrinter(progress)
                if self.as_json:
                    answer.collect(stream)
                else:
                    answer.print(stream)
            result = stream.result
            answered = bool(result.text) or not answer.stopped
        finally:
            if not answered:
                self.conversation.take_back()
        if answered:
            self.conversation.answer(result.text)
            self.used = result.usage.total_tokens
        self._tell(result, answer.stopped)
        if answer.stopped and not is_terminal(sys.stdin):
            raise KeyboardInterrupt

    def _tell(self, result: Generation, stopped: bool) -> None:
        from transom.generation.report import incomplete

        error = incomplete(self.model.report, result)
        if self.as_json:
            room = {"used": self.used, "size": self.model.context}
            about = {} if error is None else {"error": error_facts(error)}
            print_json_line({**result.to_dict(), "context": room, **about})
        elif not self.quiet:
            timings, usage = result.timings, result.usage
            parts = [f"{usage.prompt_tokens} + {usage.completion_tokens} tokens", self._room()]
            parts.append(f"first after {timings.time_to_first_token:.2f} s")
            if timings.decode_tokens_per_second:
                parts.append(f"{timings.decode_tokens_per_second:.1f} tokens/s")
            if stopped:
                parts.insert(0, "stopped" if result.text else "stopped, and your message removed")
            elif result.finish_reason == "length":
                causes = {
                    "context": "the context is full: /undo, or /reset",
                    "max_new_tokens": "cut off by --max-tokens",
                    "model_default": "cut off by the model's own limit; --max-tokens allows more",
                }
                parts.insert(0, causes[result.choices[0].cut_by or "context"])
            aside("[" + ", ".join(parts) + "]")
        if error is not None:
            self.status = 2
            print_error(error)

    def _room(self) -> str:
        return f"context {self.used} of {self.model.context} ({self.used / max(self.model.context, 1):.0%})"

    def _line(self) -> str:
        """The status line at the bottom of the screen."""
        report = self.model.report
        return f" {report.model} · {report.device.id} · {report.backend} · {self._room()} · /help"

    # commands ---------------------------------------------------------------------------------------------------------
    def _command(self, name: str, rest: str) -> bool:
        from transom.errors import OptionError, nearest

        if name in ("/exit", "/quit", "/bye"):
            return False
        act = {
            "/help": self._help,
            "/reset": self._reset,
            "/system": self._system,
            "/undo": self._undo,
            "/retry": self._retry,
            "/save": self._save,
            "/load": self._load,
            "/params": self._params,
            "/report": self._report,
        }.get(name)
        if act is None:
            raise OptionError(
                f"There is no command {name}", f"{nearest(name, NAMES)} Write a message that starts with / as //"
            )
        act(rest)
        return True

    def _help(self, rest: str) -> None:
        width = max(map(len, COMMANDS))
        for usage, text in COMMANDS.items():
            aside(f"{usage:<{width}}  {text}")
        aside("Alt-Enter (or Esc, then Enter) starts a new line, Ctrl-C stops an answer, // sends a leading /.")

    def _reset(self, rest: str) -> None:
        self.conversation.reset()
        self.used = 0
        aside("A new conversation.")

    def _system(self, rest: str) -> None:
        if not rest:
            aside(self.conversation.system or "There is no system message.")
            return
        self.conversation.system = None if rest == "-" else rest
        self._reset("")

    def _undo(self, rest: str) -> None:
        text = self.conversation.take_back()
        self._count()
        aside("There is nothing to undo." if text is None else f"Removed: {_short(text)}")

    def _count(self) -> None:
        """Count the tokens of the conversation."""
        from transom.errors import TransomError

        template = self.model.chat_template
        try:
            if not len(self.conversation) or template is None:
                self.used = 0
            else:
                text = template.render(self.conversation.messages, add_generation_prompt=False)
                self.used = len(self.model.tokenize(text))
        except TransomError:  # the template rejects the rest; the next message will report it
            self.used = 0

    def _retry(self, rest: str) -> None:
        from transom.generation.params import resolve

        before = self.conversation.copy()
        text = self.conversation.take_back()
        if text is None:
            aside("There is no message to answer again.")
            return
        if resolve(self.params, defaults=self.model.generation_defaults).greedy:
            aside("At temperature 0 the answer is always the same; for another one: /params temperature=0.7")
        elif "seed" in self.params:  # the same seed would give the same answer
            self.params["seed"] += 1
        try:
            self._answer(text)
        finally:
            if len(self.conversation) < len(before):  # it failed, or was stopped before its first token
                self.conversation = before

    def _save(self, rest: str) -> None:
        path = _path(rest, "/save conversation.json")
        self.conversation.save(path, self.model.name)
        aside(f"{len(self.conversation)} messages written to {path}")

    def _load(self, rest: str) -> None:
        path = _path(rest, "/load conversation.json")
        self.conversation.load(path)
        self._count()
        aside(f"{len(self.conversation)} messages loaded from {path}")

    def _params(self, rest: str) -> None:
        import json

        from transom.errors import OptionError
        from transom.generation.params import resolve

        changed = dict(self.params)
        for word in rest.split():
            name, sign, value = word.partition("=")
            if not sign:
                raise OptionError(f"{word} is not NAME=VALUE", "Write it like /params temperature=0.7 top_p=0.9")
            name = {"max_tokens": "max_new_tokens"}.get(name.replace("-", "_"), name.replace("-", "_"))
            if not value:
                changed.pop(name, None)
                continue
            try:
                changed[name] = json.loads(value)
            except ValueError:
                changed[name] = value
        params = resolve(changed, defaults=self.model.generation_defaults)
        if params.n != 1:
            raise OptionError("A conversation continues from one answer, so n must be 1", "Leave n out")
        self.params = changed
        for name in dict.fromkeys([*_SHOWN, *changed]):
            mark = " (set)" if name in changed else ""
            aside(f"{name} = {getattr(params, name)}{mark}")

    def _report(self, rest: str) -> None:
        aside(str(self.model.report))


def _split(text: str) -> tuple[str, str]:
    name, _, rest = text.strip().partition(" ")
    return name, rest.strip()


def _path(rest: str, example: str) -> Path:
    from transom.errors import OptionError

    if not rest:
        raise OptionError("No file name is given", f"Write it like {example}")
    return Path(rest).expanduser()


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "…"

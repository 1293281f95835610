"""The group of commands, and the handler that turns every error into one sentence and an exit status."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from transom.errors import TransomError, name_options, nearest

COMMANDS = {
    "run": "Answer one prompt.",
    "chat": "Chat with a model.",
    "pull": "Download a model from the Hugging Face hub.",
    "devices": "List the devices of this machine and the targets to compile for.",
    "backends": "List installed backends, those that failed to load, and how to fix them.",
    "doctor": "Run a tiny model on each device and report what works.",
    "explain": "Show which nodes of a model each backend can run, without compiling.",
    "export": "Compile a model for another device and write it as a folder (a bundle).",
    "bundle": "Verify a bundle, or check whether it suits a device.",
    "inspect": "Show a model's architecture, sizes, quantization and memory.",
    "verify": "Compare a model with transformers on random prompts.",
    "calibrate-sparsity": "Measure how many keys each head of a model must read, for sparse attention.",
    "bench": "Time all installed backends side by side, or the stages of a cold start.",
    "cache": "List, prune or clear the compiled models.",
    "completion": "Print the completion script for a shell.",
}
"""Verb -> one line of help. It is the function of that name in `transom.cli.<verb>`, with _ for -."""

EPILOG = """\b
Examples:
  transom run model.gguf "Why is the sky blue?"
  transom chat path/to/checkpoint
  transom pull Qwen/Qwen2.5-0.5B-Instruct
  transom doctor
  transom explain model.gguf
"""


class _ReaderGone(Exception):
    """The reader of a pipe (`| head`) has closed it. Click would turn the broken pipe into an exit status."""


class _Interrupted(Exception):
    """Ctrl-C was pressed. Click would print an empty line."""


class _Verbs(click.Group):
    """Imports the file of a command when the command is used."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as e:
            raise _ReaderGone from e
        except KeyboardInterrupt as e:
            raise _Interrupted from e

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        command = getattr(importlib.import_module(f"transom.cli.{name}"), name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        unknown = bool(args) and not args[0].startswith("-") and args[0] not in COMMANDS
        if unknown and not ctx.resilient_parsing:  # shell completion must not print an error
            raise click.UsageError(f"There is no command {args[0]!r}. {nearest(args[0], COMMANDS)}", ctx)
        name, command, rest = super().resolve_command(ctx, args)
        name_options(flags_of(command))
        return name, command, rest

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Verbs, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="transom", message="transom %(version)s")
def transom() -> None:
    """Run language models on whatever hardware you have."""


def run(arguments: Sequence[str] | None, *, ends: bool = False) -> int:
    """Run the command line and return the exit status.

    Args:
        ends: the process ends after it. Standard output then stays reserved for JSON, because an engine may print when
            it is shut down.
    """
    from transom.cli.output import discard_stdout, release_stdout
    from transom.contract import Cancelled

    _prepare_streams()
    given = sys.argv[1:] if arguments is None else list(arguments)
    as_json = "--json" in given[: given.index("--") if "--" in given else None]
    try:
        result: Any = transom.main(args=given, standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except TransomError as e:
        return _fail(e, 2, as_json)
    except click.exceptions.Exit as e:
        return e.exit_code
    except (_Interrupted, click.Abort, KeyboardInterrupt, Cancelled):
        click.echo("Interrupted.", err=True)
        _print_error(TransomError("Interrupted"), 130, as_json, "Interrupted")
        return 130
    except click.ClickException as e:
        e.show()
        _print_error(TransomError(e.format_message()), 2, as_json, type(e).__name__)
        return 2
    except (_ReaderGone, BrokenPipeError):
        discard_stdout()  # else Python reports the broken pipe again when it closes stdout
        return 0
    except OSError as e:
        if e.filename is None and e.errno == errno.ENOSPC:
            discard_stdout()
        where = f" {e.filename}" if e.filename is not None else ""
        error = TransomError(f"The operating system reported an error:{where} {e.strerror or e}")
        return _fail(error, 2, as_json, type(e).__name__)
    except MemoryError:
        error = TransomError("There is not enough memory", "Try a smaller --context, or a smaller model")
        return _fail(error, 2, as_json, "MemoryError")
    except Exception as e:
        if os.environ.get("TRANSOM_DEBUG"):
            raise
        text = " ".join(str(e).split())
        error = TransomError(
            f"This is a bug in Transom: {type(e).__name__}: {text[:300]}",
            "Run again with TRANSOM_DEBUG=1 for a traceback, and report it",
        )
        return _fail(error, 1, as_json, type(e).__name__)
    finally:
        name_options(None)
        if not ends:
            release_stdout()


def flags_of(command: click.Command | None) -> dict[str, str]:
    """The long flags of a command and its subcommands, by the name of the parameter."""
    if command is None:
        return {}
    flags = {p.name: max(p.opts, key=len) for p in command.params if isinstance(p, click.Option) and p.name}
    for verb in command.commands.values() if isinstance(command, click.Group) else ():
        flags |= flags_of(verb)
    return flags


def _fail(error: TransomError, status: int, as_json: bool, kind: str = "") -> int:
    """Print an error and return the exit status. `kind` replaces the error's class name in the JSON output."""
    from transom.cli.output import print_error

    print_error(error)
    if os.environ.get("TRANSOM_DEBUG"):
        import traceback

        traceback.print_exc()
    _print_error(error, status, as_json, kind)
    return status


def _print_error(error: TransomError, status: int, as_json: bool, kind: str = "") -> None:
    """With --json, print the error as one line on stdout, unless a result was printed there."""
    from transom.cli.output import discard_stdout, error_facts, print_json_line, printed_json

    if not as_json or printed_json():
        return
    facts = {**error_facts(error), "status": status}
    try:
        print_json_line({"error": facts | ({"type": kind} if kind else {})})
    except OSError:  # the sentence on stderr has to do
        discard_stdout()


def _prepare_streams() -> None:
    """Escape characters that the terminal's encoding lacks, and show log records as warnings."""
    import logging

    from transom.cli.output import WarnHandler

    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    log = logging.getLogger("transom")
    if not any(isinstance(handler, WarnHandler) for handler in log.handlers):
        log.addHandler(WarnHandler())
        log.propagate = False

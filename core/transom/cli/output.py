"""Output: JSON, tables and answers on stdout; progress, warnings and statistics on stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TextIO

import click

if TYPE_CHECKING:
    from types import TracebackType

    from transom.generation.streams import Stream

PATIENCE = 0.6
"""Seconds before progress is shown on a terminal."""
WIDTH_OF_FILES = 200
"""Columns of a table that does not go to a terminal."""
GAP = 2
"""Spaces between the columns of a table."""
LONG = 2.0
"""Seconds before a stage gets a line where stderr is not a terminal."""

_STAGES = {
    "list": "Asking the Hugging Face hub",
    "download": "Downloading",
    "start": "Starting a child process",
    "wait": "Waiting for another process that compiles the same model",
    "hash": "Hashing the file",
    "read": "Reading the model",
    "lower": "Preparing the weights",
    "compile": "Compiling",
    "compute": "Computing",
    "compare": "Comparing",
    "reference": "Computing the reference output",
    "check": "Comparing with the reference",
    "measure": "Measuring the device",
    "write": "Writing the compiled model",
    "store": "Writing the compiled model",
    "load": "Loading the model",
    "prompt": "Reading the prompt",
    "answer": "Generating",
    "calibrate": "Measuring the heads",
    "observe": "Measuring the activations",
    "round": "Quantizing the weights",
    "requantize": "Quantizing the weights",
    "build": "Building the engine",
}
_said: set[str] = set()
_quiet = False
_printed_json = False
_for_json: TextIO | None = None
"""The standard output that the process was started with, while it is reserved for JSON."""
_displaced: TextIO | None = None
"""`sys.stdout` from before, where it is no file and was replaced."""


def stage_text(stage: str) -> str:
    """The displayed text of a stage; a backend may have stages of its own."""
    return _STAGES.get(stage, stage[:1].upper() + stage[1:])


def be_quiet(quiet: bool) -> None:
    """Whether warnings are kept back, those of log records included."""
    global _quiet
    _quiet = quiet


def printed_json() -> bool:
    """Whether this process has printed a JSON document."""
    return _printed_json


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    _note_json()
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=_plain), file=_for_json)


def print_json_line(value: Any) -> None:
    """One JSON document in one line, for output of which programs read one line at a time."""
    _note_json()
    click.echo(json.dumps(value, ensure_ascii=False, default=_plain), file=_for_json)


def reserve_stdout() -> None:
    """Keep standard output for JSON: whatever else is written there goes to stderr.

    That includes what a plugin prints, and what native code and child processes write to the file descriptor.
    """
    global _for_json, _displaced
    if _for_json is not None or sys.stdout is None:
        return
    try:
        place = sys.stdout.fileno()
        sys.stdout.flush()
        kept = os.dup(place)
    except (OSError, ValueError, AttributeError):  # no file, as in a program that captures the output
        _for_json, _displaced, sys.stdout = sys.stdout, sys.stdout, sys.stderr
        return
    _for_json = os.fdopen(kept, "w", encoding=sys.stdout.encoding, errors="backslashreplace")
    try:
        os.dup2(2, place)
    except OSError:  # stderr is closed
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, place)
        os.close(null)


def release_stdout() -> None:
    """Undo `reserve_stdout`, in a process that goes on."""
    global _for_json, _displaced
    if _for_json is None:
        return
    if _displaced is not None:
        sys.stdout, _displaced = _displaced, None
    else:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os.dup2(_for_json.fileno(), sys.stdout.fileno())
        _for_json.close()
    _for_json = None


def discard_stdout() -> None:
    """Send what is still buffered nowhere, because nobody reads standard output or its disk is full."""
    try:
        stream = sys.stdout if _for_json is None else _for_json
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError, AttributeError):  # stdout is not a file: closing it cannot fail
        return


def _note_json() -> None:
    global _printed_json
    _printed_json = True


def error_facts(error: Exception) -> dict[str, Any]:
    """An error as JSON types: its type, cause, fix and details."""
    facts = {name: getattr(error, name, "") for name in ("cause", "fix")}
    return {
        "type": type(error).__name__,
        "cause": facts["cause"] or str(error),
        "fix": facts["fix"],
        "details": list(getattr(error, "details", ())),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, frozenset | set):
        return sorted(value)
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if hasattr(value, "__dataclass_fields__"):
        return {name: getattr(value, name) for name in value.__dataclass_fields__}
    if isinstance(value, tuple):
        return list(value)
    return str(value)


def table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), spare: Sequence[int] = ()
) -> None:
    """A table as wide as the terminal allows.

    Cells are wrapped between words. Where even the longest words do not fit side by side, each row becomes a paragraph.

    Args:
        right: columns to align to the right; their cells are not wrapped.
        spare: columns that are left out of a terminal that has no room for them.
    """
    terminal = is_terminal(sys.stdout)
    width = shutil.get_terminal_size().columns if terminal else WIDTH_OF_FILES
    narrowest = [
        max((len(part) for cell in column for part in ([cell] if i in right else cell.split())), default=0)
        for i, column in enumerate(zip(headers, *rows, strict=True))
    ]
    if sum(narrowest) + GAP * (len(headers) - 1) > width:
        if spare:
            kept = [i for i in range(len(headers)) if i not in spare]
            aligned = [place for place, i in enumerate(kept) if i in right]
            table([headers[i] for i in kept], [[row[i] for i in kept] for row in rows], right=aligned)
            return
        click.echo("\n".join(_paragraph(headers, row, width) for row in rows))
        return

    from io import StringIO

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    while sum(widths) + GAP * (len(headers) - 1) > width:  # rich would break words in columns of other widths
        widest = max(range(len(widths)), key=lambda i: widths[i] if widths[i] > narrowest[i] else 0)
        widths[widest] -= 1
    shown = Table(box=None, pad_edge=False, header_style="bold", padding=(0, GAP, 0, 0))
    for i, header in enumerate(headers):
        justify: Literal["left", "right"] = "right" if i in right else "left"
        shown.add_column(header, justify=justify, width=widths[i], no_wrap=i in right)
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))
    # Print into a string first, because rich handles a closed pipe in its own way.
    text = StringIO()
    Console(file=text, width=width, force_terminal=terminal, highlight=False).print(shown)
    click.echo("\n".join(line.rstrip() for line in text.getvalue().splitlines()))


def _paragraph(headers: Sequence[str], row: Sequence[str], width: int) -> str:
    """A row of a table in lines: its first cell, and below it the others that are not empty, with their headers."""
    cells = zip(headers[1:], row[1:], strict=True)
    return "\n".join([row[0], *(_filled(f"{header}: {cell}", width, "  ") for header, cell in cells if cell)])


def wrapped(text: str, stream: Any, indent: str = "") -> str:
    """Each line of a text, wrapped between words where the stream is a terminal; `indent`: before each line."""
    if not is_terminal(stream):
        return "\n".join(indent + line for line in text.splitlines())
    width = shutil.get_terminal_size().columns
    lines = (line if line.strip() else "" for line in text.splitlines())
    return "\n".join(_filled(line.lstrip(), width, indent + line[: len(line) - len(line.lstrip())]) for line in lines)


def _filled(text: str, width: int, indent: str) -> str:
    import textwrap

    return textwrap.fill(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,  # ids, paths and commands are copied
        break_on_hyphens=False,
    )


def heading(text: str) -> None:
    click.secho(text, bold=True)


def warn(text: str) -> None:
    """Print a warning on stderr, once per process; nothing with --quiet."""
    if text not in _said and not _quiet:
        _said.add(text)
        label, _, rest = wrapped(f"Warning: {text}", sys.stderr).partition(":")
        click.echo(f"{click.style(label + ':', fg='yellow')}{rest}", err=True)


class WarnHandler(logging.Handler):
    """Shows log records of the package as warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        warn(record.getMessage())


def print_error(error: Exception) -> None:
    """Print an error on stderr."""
    label, _, rest = wrapped(f"Error: {error}", sys.stderr).partition(":")
    click.echo(f"{click.style(label + ':', fg='red')}{rest}", err=True)


def aside(text: str) -> None:
    """Print a dimmed line on stderr."""
    click.secho(wrapped(text, sys.stderr), err=True, dim=True)


def is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # closed, or replaced by an object that is not a file
        return False


class ProgressLine:
    """A progress line on stderr for work that takes longer than `PATIENCE`: a progress callback and a context manager.

    On a terminal the line shows stage, share and seconds, and is cleared at the end. Elsewhere each stage that takes
    longer than `LONG` is printed as one line.
    """

    def __init__(self, *, quiet: bool = False, stage: str = "") -> None:
        self._stage = stage
        self._share: float | None = None
        self._first_share = 0.0
        """The share with which the stage began: that of a download which continues."""
        self._quiet = quiet
        self._live = not quiet and is_terminal(sys.stderr)
        self._stage_start = time.monotonic()
        self._shown = 0
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._written = {"download"}  # `say` has announced it

    def __enter__(self) -> ProgressLine:
        if self._live:
            threading.Thread(target=self._tick, name="transom-progress", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()

    def __call__(self, stage: str, share: float | None) -> None:
        """A `transom.contract.Progress`."""
        with self._lock:
            if stage != self._stage:
                self._stage, self._stage_start, self._first_share = stage, time.monotonic(), share or 0.0
            self._share = share
        late = time.monotonic() - self._stage_start > LONG
        if not self._quiet and not self._live and late and stage not in self._written and share != 1.0:
            self._written.add(stage)
            click.echo(f"{stage_text(stage)} …", err=True)

    def prompt(self, done: int, total: int) -> None:
        """A `PrefillProgress`: called with the tokens of the prompt that were processed."""
        self("prompt", done / total if total else None)

    def clear(self) -> None:
        """Clear the line and show no more progress."""
        if self._end.is_set():
            return
        self._end.set()
        with self._lock:
            self._erase()

    def say(self, text: str) -> None:
        """Print a dimmed line above the progress; nothing with --quiet."""
        if not self._quiet:
            with self._lock:
                self._erase()
                aside(text)

    def _erase(self) -> None:
        if self._shown:
            sys.stderr.write("\r" + " " * self._shown + "\r")
            sys.stderr.flush()
            self._shown = 0

    def _tick(self) -> None:
        wait = PATIENCE
        while not self._end.wait(wait):
            wait = 0.1
            with self._lock:
                if self._stage and not self._end.is_set():
                    self._draw()

    def _draw(self) -> None:
        bar, left = "", ""
        seconds = time.monotonic() - self._stage_start
        if self._share is not None:
            full = round(24 * min(max(self._share, 0.0), 1.0))
            bar = f"  {'█' * full}{'░' * (24 - full)} {self._share:4.0%}"
            if self._stage == "download":
                left = time_left(seconds, self._first_share, self._share)
        line = f"{stage_text(self._stage)}{bar}  {seconds:.0f} s{left}"
        line = line[: max(shutil.get_terminal_size().columns - 1, 10)]
        padding = " " * max(self._shown - len(line), 0)
        try:
            sys.stderr.write(f"\r{line}{padding}")
        except UnicodeEncodeError:
            sys.stderr.write("\r" + line.replace("█", "#").replace("░", ".") + padding)
        sys.stderr.flush()
        self._shown = len(line)


def time_left(seconds: float, first: float, share: float) -> str:
    """How long the rest will take if it goes on as in these seconds, as text after them; empty where it is not known.

    Args:
        first: the share done before.
        share: the share done now.
    """
    if seconds < 3 or share - first < 0.01 or share >= 1:
        return ""
    left = seconds * (1 - share) / (share - first)
    return f", about {left / 60:.0f} min left" if left >= 90 else f", about {left:.0f} s left"


class AnswerPrinter:
    """Prints a stream as it is generated. On a terminal, control characters in the model's output are dropped."""

    def __init__(self, progress: ProgressLine) -> None:
        self._progress = progress
        self._terminal = is_terminal(sys.stdout)
        self._last = "\n"
        self.stopped = False
        """Whether Ctrl-C ended it. The stream's result then contains what was generated so far."""

    def print(self, stream: Stream) -> None:
        """Print all pieces, including those that were ready when Ctrl-C came, and end the last line."""
        self._each(stream, self._write)
        if self._last != "\n":
            click.echo()
            self._last = "\n"

    def collect(self, stream: Stream) -> None:
        """Generate everything without printing."""
        self._each(stream, lambda piece: self._progress("answer", None))

    def _each(self, stream: Stream, use: Callable[[str], None]) -> None:
        try:
            for piece in stream:
                use(piece)
        except KeyboardInterrupt:
            self.stopped = True
            stream.cancel()
            for piece in stream:
                use(piece)
        finally:
            self._progress.clear()

    def _write(self, piece: str) -> None:
        self._progress.clear()
        text = "".join(c for c in piece if c.isprintable() or c in "\n\t") if self._terminal else str(piece)
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
            self._last = text[-1]

"""Human-readable errors: one sentence with the cause, one with the fix.

Every error that a user can cause derives from `TransomError`. The command line prints it without a traceback and
exits with status 2. This module imports no other module of Transom, so that every room can raise its errors.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

_flags: Mapping[str, str] | None = None


class TransomError(Exception):
    """An error that the user can fix.

    Args:
        cause: one sentence about what is wrong, with the name of the file, device or option.
        fix: one sentence about what to do, with a command where there is one. May be empty.
        details: further lines, such as the answer of each backend. Shown below the sentences.
    """

    def __init__(self, cause: str, fix: str = "", details: Sequence[str] = ()) -> None:
        self.cause = cause.rstrip()
        self.fix = fix.rstrip()
        self.details = tuple(details)
        super().__init__(cause, fix, self.details)

    def __str__(self) -> str:
        def sentence(text: str) -> str:
            return text if text.endswith((".", "!", "?")) else text + "."

        lines = [" ".join(sentence(t) for t in (self.cause, self.fix) if t)]
        lines += [f"  {line}" for line in self.details]
        return "\n".join(lines)


class SourceError(TransomError):
    """The model cannot be read: a missing path, a truncated file, a wrong magic number, an unknown architecture."""


class OptionError(TransomError):
    """An argument, option or environment variable has a value that is not allowed."""


class SelectionError(TransomError):
    """No backend and device can run the model with these options. The details list the answer of each backend."""


class UnsupportedError(TransomError):
    """The graph has an operator, or a form of one, that the backend cannot run and that has no decomposition."""


class DoesNotFit(TransomError):
    """The model and its cache need more memory than the device has free."""


class EngineError(TransomError):
    """A backend failed while compiling, loading or running: it raised, died of a signal, or broke the contract."""


class FidelityError(TransomError):
    """The model compiled for export differs from the original by more than the limit, so nothing was written."""


class SelfCheckFailed(TransomError):
    """The compiled model does not agree with the reference on the check prompt."""


class ContextExceeded(TransomError):
    """Prompt and requested output are longer than the context the model was loaded with."""

    room = 0
    """Tokens left for the output; 0 when the prompt alone is too long."""


class CacheError(TransomError):
    """The artifact cache cannot be used, for example because its directory cannot be written."""


class MissingExtra(TransomError):
    """An optional dependency is not installed; the fix is the pip command."""

    def __init__(self, what: str, extra: str) -> None:
        self.extra = extra
        super().__init__(what, f"Install it with: pip install 'transom[{extra}]'")


def name_options(flags: Mapping[str, str] | None) -> None:
    """Set how messages of this process name options.

    Args:
        flags: the command line's flags by keyword of the Python API, `{"max_new_tokens": "--max-tokens"}`. A keyword
            without an entry becomes a flag with dashes. None: messages name the keywords.
    """
    global _flags
    _flags = flags


def option_names() -> Mapping[str, str] | None:
    """The flags that were last set by `name_options`, to be passed to a child process."""
    return _flags


def option(name: str, value: object = ...) -> str:
    """An option as the user writes it: `context=4096` in Python, `--context 4096` on the command line.

    Args:
        name: the keyword of the Python API.
        value: the option's value. `...` stands for one that the user chooses. True on the command line: the flag alone.
    """
    if value is True and _flags is not None:
        return option_prefix(name).rstrip()
    return option_prefix(name) + ("…" if value is ... else repr(value))


def option_prefix(name: str) -> str:
    """The text before the value of an option: `context=` or `--context `."""
    if _flags is None:
        return f"{name}="
    return _flags.get(name, f"--{name.replace('_', '-')}") + " "


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint about a misspelt name: 'Did you mean "x"? Known: a, b, x.'"""
    names = sorted(known)
    match = [name for name in difflib.get_close_matches(word, names, n=3, cutoff=0.6) if _misspelt(word, name)]
    hint = f'Did you mean "{match[0]}"? ' if match else ""
    return f"{hint}Known: {', '.join(names) or 'none'}."


def message_lines(error: BaseException) -> list[str]:
    """The lines of an error's message, stripped and without empty ones; the name of its class if there are none."""
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]


def _misspelt(word: str, name: str) -> bool:
    """Whether nearly all of the shorter name is in the other: a long common ending does not make two names similar."""
    shorter = min(len(word), len(name))
    common = sum(block.size for block in difflib.SequenceMatcher(None, name, word).get_matching_blocks())
    return shorter - common <= max(1, min(2, shorter // 4))

"""First steps of `load`: find the artifact's files, report damage, read the options."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transom.contract import Artifact, Device, Options
from transom.errors import EngineError

REMOVE = "Remove it with: transom cache clear"


def paths_of(artifact: Artifact) -> dict[str, Path]:
    """The paths of an artifact's files, by name, as `load` receives them."""
    return {name: path for name, path in artifact.files.items() if isinstance(path, Path)}


@contextmanager
def reading_artifact(fix: str = REMOVE) -> Iterator[None]:
    """Reports a missing or unreadable file as a damaged artifact.

    Raises:
        EngineError: the body raised an error that a damaged file causes.
    """
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as e:
        raise EngineError(f"This compiled model is damaged: {e}", fix) from e


def context_of(options: Options, *most: int) -> int:
    """Tokens in one sequence: the `context` option, or the first limit without it; never more than any limit."""
    return min(int(str(options.get("context") or most[0])), *most)


def threads_of(options: Options, device: Device) -> int:
    """Threads to compute with: the `threads` option, or one per core."""
    return int(str(options.get("threads") or device.cores))

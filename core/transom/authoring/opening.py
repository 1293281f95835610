"""What `load` does first: find the artifact's files, report damage, read the options."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transom.contract import Artifact, Device, Options
from transom.errors import EngineError

REMOVE = "Remove it with: transom cache clear"


def paths_of(artifact: Artifact) -> dict[str, Path]:
    """The files of an artifact that `load` was given, by name."""
    return {name: path for name, path in artifact.files.items() if isinstance(path, Path)}


@contextmanager
def reading_artifact(fix: str = REMOVE) -> Iterator[None]:
    """Reports a file that is missing or does not parse as a damaged artifact.

    Raises:
        EngineError: the body raised an error that a damaged file causes.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise EngineError(f"This compiled model is damaged: {e}", fix) from e


def context_of(options: Options, *most: int) -> int:
    """Tokens of one sequence: those that the options name, and no more than any of the limits."""
    return min(int(str(options.get("context") or most[0])), *most)


def threads_of(options: Options, device: Device) -> int:
    """Threads to compute with: those that the options name, or one for each core."""
    return int(str(options.get("threads") or device.cores))

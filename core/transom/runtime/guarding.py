"""Calling somebody else's code: whatever a backend raises becomes one sentence that names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from transom.contract import Cancelled
from transom.errors import EngineError, TransomError

T = TypeVar("T")


def guarded(backend: str, doing: str, call: Callable[[], T]) -> T:
    """What the call returns.

    Args:
        backend: its name, which begins the sentence.
        doing: ends it: "loading this model".

    Raises:
        TransomError, Cancelled: as the backend raised them; they are made for people already.
        EngineError: it raised anything else.
    """
    try:
        return call()
    except (TransomError, Cancelled):
        raise
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise EngineError(
            f"The backend {backend} failed while {doing}: {said}",
            f"Choose another with backend=…, or report it to the authors of {backend}",
        ) from error

"""Why a graph cannot generate."""

from __future__ import annotations


class CannotRaise(ValueError):
    """The graph is no decoder with a cache, or one whose form is not recognised; the message says what is missing.

    It still runs as a plain graph.
    """

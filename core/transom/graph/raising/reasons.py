"""The error for a graph that cannot be raised to a decoder."""

from __future__ import annotations


class CannotRaise(ValueError):
    """The graph is not a decoder with a cache, or its form is not recognized; the message says why.

    The graph still runs as a plain graph.
    """

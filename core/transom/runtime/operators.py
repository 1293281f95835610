"""Making the operators that plugins bring known to the registry, before a graph that uses them is read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from transom.errors import UnsupportedError
from transom.plugins import Plugins

_OPERATOR = re.compile(r"[\w.\-]+::\w+")


def register_operators(plugins: Plugins) -> None:
    """Register what the `transom_ops` hooks return. One that breaks a rule is recorded as a failure and left out."""
    if not plugins.brings_operators:
        return
    from transom.ops import OpSchema, find, register  # slow to import, and the warm path comes here

    for schema in plugins.operators():
        if not isinstance(schema, OpSchema):
            plugins.reject(schema, f"{schema.domain}::{schema.name} is a {type(schema).__name__}, not an OpSchema")
            continue
        if find(schema.domain, schema.name) is schema:
            continue
        try:
            register(schema)
        except ValueError as error:
            plugins.reject(schema, str(error))


@contextmanager
def explaining_rejected(plugins: Plugins) -> Iterator[None]:
    """Where a graph is read: an error about an operator also says why a plugin's operator of that name was left out.

    Raises:
        UnsupportedError: as the block raised it, with the reasons in its cause, which is what is remembered of it.
    """
    try:
        yield
    except UnsupportedError as error:
        named = set(_OPERATOR.findall(error.cause))
        about = [
            f
            for f in plugins.failures
            if f.stage == "ops" and named and (f.error.startswith("transom_ops") or named & _names(f.error))
        ]
        if not about:
            raise
        why = "; ".join(f"the plugin {f.entry_point} ({f.distribution}) brings operators, but {f.error}" for f in about)
        raise UnsupportedError(f"{error.cause.rstrip('.')}; {why}", about[0].fix, error.details) from error


def _names(text: str) -> set[str]:
    return set(_OPERATOR.findall(text))

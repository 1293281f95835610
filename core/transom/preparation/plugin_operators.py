"""Operators of plugins: registered before a graph that uses them is read, and identified by a hash of their code.

The hash is part of cache keys, so that an artifact made with one version of an operator is not used with another.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transom.errors import UnsupportedError
from transom.plugins import Plugins

_OPERATOR = re.compile(r"[\w.\-]+::\w+")


def register_operators(plugins: Plugins) -> None:
    """Register the operators of the `transom_ops` hooks. An invalid one is recorded as a failure and left out."""
    if not plugins.bringing_operators():
        return
    from transom.ops import OpSchema, find, register  # slow to import, and this is on the warm path

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


def operators_identity(plugins: Plugins) -> str:
    """A hash of the plugins with operators, their versions and their code; empty without such plugins.

    Calls no hook. Reads the plugins' Python files each time.
    """
    mine = plugins.bringing_operators()
    if not mine:
        return ""
    digest = hashlib.sha256()
    for *name, plugin in mine:
        digest.update(repr(tuple(name)).encode())
        for file in _sources_of(plugin):
            try:
                content = file.read_bytes()
            except OSError:  # deleted in the meantime: the hash differs at the next start
                continue
            digest.update(repr((str(file.name), len(content))).encode() + content)
    return digest.hexdigest()


def _sources_of(plugin: object) -> list[Path]:
    """The Python files of a plugin's module, or of its whole top-level package.

    A namespace package, which several distributions share, has no file and is skipped.
    """
    name = plugin.__name__ if inspect.ismodule(plugin) else type(plugin).__module__
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        module = sys.modules.get(".".join(parts[:end]))
        if file := getattr(module, "__file__", None):
            return sorted(Path(file).parent.rglob("*.py")) if hasattr(module, "__path__") else [Path(file)]
    return []


@contextmanager
def explaining_rejected(plugins: Plugins) -> Iterator[None]:
    """Around reading a graph: explain in an error about an operator why a plugin's operator of that name was left out.

    Raises:
        UnsupportedError: as the block raised it, with the reasons in its cause, the part of it that is remembered.
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

"""Checking a chat template before the model is compiled, so that a broken template fails early.

The result is remembered under the hash of the model's content, so a warm start reads no file for it.
"""

from __future__ import annotations

from typing import Any

from transom.artifacts import Cache
from transom.loading.identity import fingerprint_of
from transom.sources import bundle_at, local_path, resolve

_FORMAT = "3"
"""Part of the key. Change it when the check covers more."""


def require_sound_template(model: Any, cache: Cache | None = None) -> None:
    """Parse the chat template of a model on disk and render it once, if the model has one.

    Raises:
        ChatTemplateError: it is not valid Jinja, does something that the sandbox forbids, or does not finish.
        SourceError: the model cannot be read.
    """
    path = local_path(model)
    if path is None or bundle_at(path) is not None:  # a bundle is compiled already, and loading it checks its files
        return
    cache = cache or Cache.default()
    key = f"{_FORMAT}-{fingerprint_of(path, cache)}"
    if cache.recall("templates", key, bool):
        return
    template = resolve(path).chat_template(path)
    if template is not None:
        template.require_valid()
    cache.remember("templates", key, True)

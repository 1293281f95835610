"""A chat template tried before a model is prepared, where the model is to chat: a refusal then costs no compiling.

A template that has been tried is remembered by its model's content, so a warm start reads no file for it.
"""

from __future__ import annotations

from typing import Any

from transom.artifacts import Cache
from transom.loading.identity import fingerprint_of
from transom.sources import bundle_at, local_path, resolve

_FORMAT = "1"
"""Part of the key: changes when a trial looks for more."""


def require_sound_template(model: Any, cache: Cache | None = None) -> None:
    """Parse and try the chat template of a model on disk, where it has one.

    Raises:
        ChatTemplateError: it is no valid Jinja, reaches out of its sandbox or does not come to an end.
        SourceError: the model cannot be read.
    """
    path = local_path(model)
    if (
        path is None or bundle_at(path) is not None
    ):  # nothing is compiled for a bundle, and loading checks its files first
        return
    cache = cache or Cache.default()
    key = f"{_FORMAT}-{fingerprint_of(path, cache)}"
    if cache.recall("templates", key) is True:
        return
    template = resolve(path).chat_template(path)
    if template is not None:
        template.require_valid()
    cache.remember("templates", key, True)

"""Finds the calibrated heads of a model: in the policy itself, a file beside the model, the cache, or Transom's tables.

The host looks beside the model and in the cache; host and child process both look in the tables that Transom ships. On
the warm path: reads a file only where the user asks for a policy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from transom.errors import OptionError
from transom.sparsity import PRESETS, Calibration, Sparsity, beside, shipped

if TYPE_CHECKING:
    from transom.artifacts import Cache
    from transom.signature import Decoder
    from transom.sparsity import Heads

NOTEBOOK = "sparsity"
"""Name under which the cache remembers calibrations, by the content of the model's files."""


class _Kept(TypedDict):
    heads: list[list[float]]


def remember(cache: Cache, content: str, heads: Heads) -> None:
    """Keep a model's heads in the cache.

    Args:
        content: the model's fingerprint (`transom.loading.identity.fingerprint_of`), or the digest of its graph.
    """
    cache.remember(NOTEBOOK, content, {"heads": [list(layer) for layer in heads]})


def local(path: Path | None, cache: Cache, content: str) -> Calibration | None:
    """The calibration beside the model, else the one in the cache.

    Raises:
        OptionError: the file beside the model cannot be read, or its content is not valid.
    """
    if path is not None and (found := beside(path)) is not None:
        return found
    kept = cache.recall(NOTEBOOK, content, _Kept)
    if kept is None:
        return None
    try:
        policy = Sparsity.from_dict({"heads": kept["heads"]})
    except OptionError:  # no heads that `remember` wrote: ignored
        return None
    return None if policy.heads is None else Calibration(policy.heads, "the cache")


def with_shipped_heads(policy: Sparsity, decoder: Decoder, name: str) -> tuple[Sparsity, str]:
    """The policy, with the heads that Transom ships where it has none; and their source, empty where none were added.

    Raises:
        OptionError: the heads of the policy belong to another model.
    """
    if policy.dense or policy.heads is not None:
        return policy.for_model(decoder), ""
    found = shipped(decoder, name)
    if found is None:
        return policy, ""
    return policy.with_heads(found.heads), found.source


def description(policy: Sparsity, heads_from: str) -> str:
    """The policy for the report, and whether its heads are calibrated; empty where every key is read."""
    if policy.dense:
        return ""
    text = f"{policy} (coverage {policy.coverage:g})" if str(policy) in PRESETS else str(policy)
    return f"{text}, heads " + (f"calibrated: {heads_from}" if policy.calibrated else "not calibrated")

"""Where the calibrated heads of a model come from: the policy itself, a file beside the model, the cache, or Transom.

Host and child process answer alike, each from what it knows: the host looks beside the model and into the cache, both
look among the tables that Transom ships. On the warm path: reads a file only where a policy is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from transom.errors import OptionError
from transom.sparsity import PRESETS, Calibration, Sparsity, beside, shipped

if TYPE_CHECKING:
    from transom.artifacts import Cache
    from transom.signature import Decoder
    from transom.sparsity import Heads

NOTEBOOK = "sparsity"
"""Name of the cache's notebook that holds calibrations by the content of the model's files."""


def remember(cache: Cache, content: str, heads: Heads) -> None:
    """Keep a model's heads in the cache.

    Args:
        content: the model's fingerprint (`transom.loading.identity.fingerprint_of`), or the digest of its graph.
    """
    cache.remember(NOTEBOOK, content, {"heads": [list(layer) for layer in heads]})


def local(path: Path | None, cache: Cache, content: str) -> Calibration | None:
    """What lies beside the model or is in the cache.

    Raises:
        OptionError: there is a file beside it that cannot be read or holds what is not allowed.
    """
    if path is not None and (found := beside(path)) is not None:
        return found
    kept = cache.recall(NOTEBOOK, content)
    if not isinstance(kept, dict):
        return None
    try:
        policy = Sparsity.from_dict({"heads": kept.get("heads")})
    except OptionError:  # written by something else: as good as not there
        return None
    return None if policy.heads is None else Calibration(policy.heads, "the cache")


def calibrated(policy: Sparsity, decoder: Decoder, name: str) -> tuple[Sparsity, str]:
    """The policy with the heads that Transom ships where it has none, and where these are from; empty: from nowhere.

    Raises:
        OptionError: its heads are those of another model.
    """
    if policy.dense or policy.heads is not None:
        return policy.for_model(decoder), ""
    found = shipped(decoder, name)
    if found is None:
        return policy, ""
    return policy.with_heads(found.heads), found.source


def described(policy: Sparsity, heads_from: str) -> str:
    """For the report: the policy, and whether it knows the heads of the model; empty where every key is read."""
    if policy.dense:
        return ""
    text = f"{policy} (coverage {policy.coverage:g})" if str(policy) in PRESETS else str(policy)
    return f"{text}, heads " + (f"calibrated: {heads_from}" if policy.calibrated else "not calibrated")

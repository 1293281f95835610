"""The policies that graphs of static shapes support: a fixed number of units, and no state of earlier queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transom.sparsity import Sparsity


def static_refusal(policy: Sparsity) -> str:
    """Why a policy needs dynamic shapes, with the field to change; empty if it does not."""
    if policy.dense:
        return ""
    if not policy.top_k:
        return "a coverage reads a varying number of keys, and shapes are static here: use top_k=… instead"
    if policy.columns:
        return "columns need queries of earlier steps, which are not kept: use columns=0 together with top_k"
    if policy.score != "rms":
        return f"units are scored by 'rms' here, not by {policy.score!r}: use score='rms'"
    return ""

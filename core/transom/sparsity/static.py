"""Which policies graphs of fixed shapes can follow: those of a number of units that need no earlier queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transom.sparsity import Sparsity


def static_refusal(policy: Sparsity) -> str:
    """Why a policy has no static shapes, with the field to change; empty if it has."""
    if policy.dense:
        return ""
    if not policy.top_k:
        return "a coverage reads as many keys as it takes, and shapes are fixed here: use top_k=… in place of it"
    if policy.columns:
        return "columns need queries of earlier steps, which are not kept: use columns=0 together with top_k"
    if policy.score != "rms":
        return f"units are scored by 'rms' here, not by {policy.score!r}: use score='rms'"
    return ""

"""Joins the per-layer views in a graph's attributes into one policy."""

from __future__ import annotations

from collections.abc import Sequence

from transom.sparsity.policy import DENSE, LayerSparsity, Sparsity


def joined(layers: Sequence[str]) -> Sparsity | str:
    """The policy whose layers have these views, or the reason why there is none.

    Args:
        layers: the attribute `sparsity` of each layer's attention, in order.
    """
    views = [LayerSparsity.from_string(text) for text in layers]
    rules = {view.rule for view in views if view.rule is not None and not view.dense}
    if not rules:
        return Sparsity.from_string(DENSE)
    if len(rules) > 1:
        return "its layers have different sparsity policies"
    (rule,) = rules
    return rule if not any(v.heads for v in views) and all(not v.dense for v in views) else _with_heads(rule, views)


def _with_heads(rule: Sparsity, views: Sequence[LayerSparsity]) -> Sparsity:
    """Layers without heads get one number for all heads: 1, or 0 if they are dense."""
    heads = tuple(view.heads or ((0.0,) if view.dense else (1.0,)) for view in views)
    return rule.with_heads(heads)

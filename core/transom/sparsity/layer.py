"""One layer's view of a policy, and its canonical text: the attribute `sparsity` of `transom::CachedAttention`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transom.sparsity.policy import Sparsity

DENSE = "dense"
"""The canonical string of a layer, and of a policy, that reads every key."""


@dataclass(frozen=True)
class LayerSparsity:
    """What one layer reads: the rule, and what its heads make of it."""

    rule: Sparsity | None
    """Without heads; None: every key."""
    heads: tuple[float, ...] | None = None
    """For each KV head what 1 - coverage is multiplied by; None: 1 for all."""

    @property
    def dense(self) -> bool:
        """Whether every head reads every key."""
        return self.rule is None or self.rule.dense or (self.heads is not None and not any(self.heads))

    def coverage(self, head: int) -> float:
        """Share of the mass that this KV head covers; 1: it reads everything. 0 where the multiplier leaves nothing."""
        if self.rule is None or self.dense_head(head):
            return 1.0
        loose = 1.0 if self.heads is None else self.heads[head]
        return max(0.0, 1.0 - (1.0 - self.rule.coverage) * loose)

    def dense_head(self, head: int) -> bool:
        """Whether this KV head reads every key, by calibration or because the whole layer does."""
        return self.dense or (self.heads is not None and self.heads[head] == 0)

    def to_string(self) -> str:
        """`"dense"`, or JSON of every field of the rule, keys sorted and without spaces, with `heads` a list of one
        number for each KV head, or null where all are 1. Equal views have equal strings."""
        if self.rule is None or self.dense:
            return DENSE
        loose = None if self.heads is None or all(h == 1 for h in self.heads) else list(self.heads)
        return json.dumps(self.rule.to_dict() | {"heads": loose}, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_string(cls, text: str) -> LayerSparsity:
        """The view of an attribute's value.

        Raises:
            ValueError: it is no canonical string of a layer.
        """
        if text == DENSE:
            return cls(None)
        from transom.errors import OptionError
        from transom.sparsity.policy import Sparsity

        try:
            values = json.loads(text)
            if not isinstance(values, dict):
                raise ValueError("not an object")
            heads = values.pop("heads", None)
            rule = Sparsity.from_dict({**values, "heads": None if heads is None else [heads]})
        except (ValueError, RecursionError, OptionError) as error:
            raise ValueError(f"unknown sparsity policy {text[:200]!r}: {error}") from error
        view = rule.layer(0)
        return view if view.rule is not None else cls(None)

"""The answer of `check` where an artifact opens only in the very environment that it was compiled for."""

from __future__ import annotations

from collections.abc import Mapping

from transom.contract import Verdict


def compare_requirements(made: Mapping[str, str], here: Mapping[str, str]) -> Verdict:
    """`ok` where every requirement is met, else `rebuild` with the first difference.

    Args:
        made: `Artifact.requires`. Keys that `here` lacks are not compared.
        here: what `compile` would write into it now.
    """
    for key, value in here.items():
        if made.get(key) != value:
            return Verdict("rebuild", f"compiled for {key} {made.get(key) or 'unknown'}, and here it is {value}")
    return Verdict("ok")

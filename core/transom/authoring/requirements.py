"""The answer of `check` for artifacts that open only in the environment that they were compiled for."""

from __future__ import annotations

from collections.abc import Mapping

from transom.contract import Verdict


def compare_requirements(made: Mapping[str, str], here: Mapping[str, str]) -> Verdict:
    """`ok` if every requirement is met, else `rebuild` with the first difference.

    Args:
        made: `Artifact.requires`. Keys that `here` lacks are not compared.
        here: the value of `Artifact.requires` that `compile` would write now.
    """
    for key, value in here.items():
        if made.get(key) != value:
            return Verdict("rebuild", f"compiled for {key} {made.get(key) or 'unknown'}, and here it is {value}")
    return Verdict("ok")

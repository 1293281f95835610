"""Groups of devices that run one model together: `device="cuda:0,cuda:1"`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transom.contract import Device
from transom.errors import OptionError

SEPARATOR = ","


def grouped(members: Sequence[Device]) -> Device:
    """The record of a group of devices that run one model together, in this order.

    The group has the features that all members have. Its memory is that of the smallest member times the number of
    members, because shares are equal.

    Raises:
        OptionError: fewer than two devices, a duplicate, or different kinds or architectures.
    """
    names = [d.id for d in members]
    together = SEPARATOR.join(names)
    if len(members) < 2:
        raise OptionError(f'"{together}" is not a group of devices', "Name two or more, as in cuda:0,cuda:1")
    if len(set(names)) != len(names):
        raise OptionError(f'"{together}" names a device twice', "Name each once")
    for what, found in (("kind", {d.kind for d in members}), ("architecture", {d.arch for d in members})):
        if len(found) > 1:
            raise OptionError(
                f'"{together}" are devices of more than one {what}: {", ".join(sorted(found))}',
                f"Name devices of one {what}",
            )
    first = members[0]
    if first.kind != "cuda":
        raise OptionError(f'"{together}" is a group of the kind {first.kind}', "Only CUDA devices run a model together")
    free = [d.free_bytes for d in members if d.free_bytes is not None]
    return replace(
        first,
        id=together,
        memory_bytes=len(members) * min(d.memory_bytes for d in members),
        free_bytes=len(members) * min(free) if len(free) == len(members) else None,
        identity=" + ".join(d.identity for d in members),
        name=" + ".join(d.name or d.id for d in members),
        features=frozenset.intersection(*(d.features for d in members)),
        peers=frozenset(),
        members=tuple(members),
    )

"""Several devices as one: what `device="cuda:0,cuda:1"` means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transom.contract import Device
from transom.errors import OptionError

SEPARATOR = ","


def grouped(members: Sequence[Device]) -> Device:
    """A record of devices that are to run one model together, in this order.

    What one of them lacks, the group lacks; memory counts as often as there are members, each with what the smallest
    has, since shares are equal.

    Raises:
        OptionError: fewer than two, one twice, or devices of different kinds or architectures.
    """
    names = [d.id for d in members]
    together = SEPARATOR.join(names)
    if len(members) < 2:
        raise OptionError(f'"{together}" is no group of devices', "Name two or more, as in cuda:0,cuda:1")
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

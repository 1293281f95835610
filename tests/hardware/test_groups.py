"""Several devices as one: `device="cuda:0,cuda:1"`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from transom import hardware
from transom.contract import Device, Offer, Refusal
from transom.errors import OptionError
from transom.plugins import LoadedBackend, Plugins
from transom.selection import select

CPU = Device("cpu", "cpu", "x86_64", 64 << 30)
CARDS = [
    Device(
        "cuda", f"cuda:{i}", "sm_80", (40 + i) << 30, (30 + i) << 30, identity=f"pci:0000:0{i}:00.0 A100",
        features=frozenset({"fp16", f"own{i}"}), peers=frozenset({f"cuda:{1 - i}"}), drivers={"cuda": "12.8"},
    )
    for i in (0, 1)
]  # fmt: skip
DEVICES = [CPU, *CARDS]


def test_a_group_has_what_all_of_its_members_have() -> None:
    group = hardware.find(DEVICES, " CUDA:0, cuda:1 ")
    assert group.id == "cuda:0,cuda:1"
    assert group.members == tuple(CARDS)
    assert (group.kind, group.arch, group.features) == ("cuda", "sm_80", frozenset({"fp16"}))
    assert (group.memory_bytes, group.free_bytes) == (80 << 30, 60 << 30), "twice the smaller one's"
    assert all(card.identity in group.identity for card in CARDS)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cuda:0,", "not a group"),
        ("cuda:0,cuda:0", "twice"),
        ("cpu,cuda:0", "more than one kind"),
        ("cuda:0,cuda:7", 'no device "cuda:7"'),
        ("cuda:0,cuda:2", "more than one architecture"),
    ],
)
def test_what_is_no_group_is_an_error(name: str, says: str) -> None:
    other = replace(CARDS[0], id="cuda:2", arch="sm_90")
    with pytest.raises(OptionError, match=says):
        hardware.find([*DEVICES, other], name)


def test_only_cuda_devices_run_together() -> None:
    npus = [Device("npu", f"npu:{i}", "vpu", 1 << 30) for i in (0, 1)]
    with pytest.raises(OptionError, match="Only CUDA devices"):
        hardware.find(npus, "npu:0,npu:1")


def test_a_group_is_written_down_and_read_back() -> None:
    group = hardware.find(DEVICES, "cuda:0,cuda:1")
    assert hardware.from_json(hardware.to_json([group, CPU])) == (group, CPU)


class Made:
    name = "made"

    def __init__(self, api: tuple[int, int]) -> None:
        self.api, self.asked = api, []  # type: ignore[var-annotated]

    def probe(self, devices: Sequence[Device]) -> Sequence[Offer | Refusal]:
        self.asked = [d.id for d in devices]
        return [Offer(d.id, "tuned", "made up") for d in devices]


@pytest.mark.parametrize("api", [(1, 2), (1, 3)])
def test_a_backend_of_an_older_contract_is_not_asked(api: tuple[int, int]) -> None:
    made = Made(api)
    loaded = LoadedBackend(made, "made", "made", "1", "made")  # type: ignore[arg-type]
    plugins = Plugins([], [loaded], [])
    devices = hardware.with_target(DEVICES, "cuda:0,cuda:1")
    assert [d.id for d in devices] == ["cpu", "cuda:0", "cuda:1", "cuda:0,cuda:1"]
    answers = plugins.probe(devices).answers
    assert ("cuda:0,cuda:1" in made.asked) == (api >= (1, 3))
    if api >= (1, 3):
        assert select(devices, answers, device="cuda:0,cuda:1").device.members == tuple(CARDS)
    else:
        refusal = next(a for _, a in answers if a.device_id == "cuda:0,cuda:1")
        assert isinstance(refusal, Refusal)
        assert "one device at a time" in refusal.reason


def test_auto_takes_no_group() -> None:
    assert hardware.with_target(DEVICES, "auto") == tuple(DEVICES)

"""NVIDIA GPUs through a made-up NVML: what is described, and what an absent or failing driver leads to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from transom.contract import Device
from transom.hardware.architectures import cuda_features
from transom.hardware.nvidia import probe_nvidia


class NVMLError(Exception):
    def __init__(self, value: int, text: str = "made-up error") -> None:
        super().__init__(text)
        self.value = value


class FakeNvml:
    """As much of pynvml as the probe asks, for a list of made-up cards."""

    NVMLError = NVMLError
    NVML_ERROR_LIBRARY_NOT_FOUND = 12
    NVML_ERROR_DRIVER_NOT_LOADED = 9
    NVML_P2P_CAPS_INDEX_NVLINK = 3
    NVML_P2P_STATUS_OK = 0

    def __init__(self, cards: list[dict[str, Any]], *, init_error: int | None = None, links: str = "") -> None:
        self.cards = [{"index": index, **card} for index, card in enumerate(cards)]
        self.init_error = init_error
        self.links = {frozenset(map(int, pair.split("-"))) for pair in links.split()}
        self.open = 0

    def nvmlInit(self) -> None:
        if self.init_error is not None:
            raise NVMLError(self.init_error)
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "570.86.15"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 12080

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        if self.cards[index].get("lost"):
            raise NVMLError(15, "GPU is lost")
        return self.cards[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:
        for card in self.cards:
            for instance in card.get("instances", []):
                if instance["uuid"] == uuid:
                    return instance
        raise NVMLError(6, "not found")

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, instance: Any) -> Any:
        return next(card for card in self.cards if instance in card.get("instances", []))

    def nvmlDeviceGetName(self, card: Any) -> Any:
        return card["name"]

    def nvmlDeviceGetUUID(self, card: Any) -> str:
        return f"GPU-{card['index']}{card['index']}-uuid"

    def nvmlDeviceGetCudaComputeCapability(self, card: Any) -> tuple[int, int]:
        return card["capability"]  # type: ignore[no-any-return]

    def nvmlDeviceGetMemoryInfo(self, card: Any) -> Any:
        if "gib" not in card:
            raise NVMLError(3, "Not Supported")
        return SimpleNamespace(total=card["gib"] << 30, free=(card["gib"] << 30) - 1, used=1)

    def nvmlDeviceGetPciInfo(self, card: Any) -> Any:
        return SimpleNamespace(busId=f"00000000:{card['index'] + 1:02X}:00.0")

    def nvmlDeviceGetMigMode(self, card: Any) -> list[int]:
        return [1, 1] if card.get("instances") else [0, 0]

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: Any, index: int) -> Any:
        return card["instances"][index]

    def nvmlDeviceGetP2PStatus(self, one: Any, other: Any, index: int) -> int:
        assert index == self.NVML_P2P_CAPS_INDEX_NVLINK
        return 0 if frozenset({one["index"], other["index"]}) in self.links else 5


A100 = {"name": "NVIDIA A100-SXM4-80GB", "capability": (8, 0), "gib": 80}
RTX_4090 = {"name": b"NVIDIA GeForce RTX 4090", "capability": (8, 9), "gib": 24}
V100 = {"name": "Tesla V100-SXM2-16GB", "capability": (7, 0), "gib": 16}


@pytest.fixture
def ask(machine: Any, host: Device) -> Any:
    """Probe a made-up NVML on a machine with a driver."""
    root = machine({"proc/driver/nvidia/version": "NVRM"})

    def probe(nvml: FakeNvml, **environment: str) -> tuple[list[Device], list[str]]:
        result = probe_nvidia(host, root=root, nvml=nvml, environment=environment, platform="linux")
        assert nvml.open == 0, "NVML is shut down again"
        return result

    return probe


def test_a_card_is_described(ask: Any) -> None:
    [card], notes = ask(FakeNvml([RTX_4090]))
    assert (card.kind, card.id, card.arch, card.name) == ("cuda", "cuda:0", "sm_89", "NVIDIA GeForce RTX 4090")
    assert (card.memory_bytes, card.free_bytes, card.integrated) == (24 << 30, (24 << 30) - 1, False)
    assert card.identity == "pci:0000:01:00.0 NVIDIA GeForce RTX 4090"
    assert card.drivers == {"nvidia": "570.86.15", "cuda": "12.8"}
    assert {"fp8", "bf16", "tensor_cores"} <= card.features
    assert notes == []


def test_cards_joined_by_nvlink_are_peers_and_others_are_not(ask: Any) -> None:
    cards, _ = ask(FakeNvml([A100, A100, A100], links="0-1"))
    assert [card.peers for card in cards] == [{"cuda:1"}, {"cuda:0"}, set()]


@pytest.mark.parametrize(
    ("variable", "addresses"),
    [
        ("1", ["02"]),
        ("2,0", ["03", "01"]),
        ("GPU-11", ["02"]),
        ("0,7,1", ["01"]),
        ("GPU-nope", []),
        ("-1", []),
        ("", []),
    ],
)
def test_cuda_visible_devices_hides_and_orders_cards(ask: Any, variable: str, addresses: list[str]) -> None:
    cards, notes = ask(FakeNvml([A100, A100, A100], links="0-2"), CUDA_VISIBLE_DEVICES=variable)
    assert [card.id for card in cards] == [f"cuda:{index}" for index in range(len(addresses))]
    assert [card.identity[9:11] for card in cards] == addresses
    assert bool(notes) == (not addresses)
    if variable == "2,0":
        assert [card.peers for card in cards] == [{"cuda:1"}, {"cuda:0"}]


def test_an_instance_of_a_divided_card_has_its_own_memory_and_its_cards_capability(ask: Any) -> None:
    divided = {
        **A100,
        "instances": [
            {"name": "NVIDIA A100 MIG 3g.40gb", "uuid": "MIG-one", "gib": 40},
            {"name": "NVIDIA A100 MIG 1g.10gb", "uuid": "MIG-two", "gib": 10},
        ],
    }
    [card], _ = ask(FakeNvml([divided]))
    assert (card.memory_bytes, card.arch, card.name) == (40 << 30, "sm_80", "NVIDIA A100 MIG 3g.40gb")
    assert "mig" in card.features
    [card], _ = ask(FakeNvml([divided]), CUDA_VISIBLE_DEVICES="MIG-two")
    assert (card.memory_bytes, card.arch) == (10 << 30, "sm_80")


def test_a_gpu_without_memory_of_its_own_is_integrated_and_has_the_machines(ask: Any, host: Device) -> None:
    [card], _ = ask(FakeNvml([{"name": "NVIDIA GB10", "capability": (12, 1)}]))
    assert card.integrated
    assert (card.memory_bytes, card.free_bytes) == (host.memory_bytes, host.free_bytes)


def test_one_lost_card_is_a_note_and_the_others_keep_working(ask: Any) -> None:
    cards, notes = ask(FakeNvml([A100, {**A100, "lost": True}, A100]))
    assert [card.identity[9:11] for card in cards] == ["01", "03"]
    assert len(notes) == 1
    assert "nvidia-smi -i 1" in notes[0]


def test_unlike_cards_are_numbered_by_bus_and_that_is_said(ask: Any) -> None:
    _, notes = ask(FakeNvml([V100, A100]))
    assert any("CUDA_DEVICE_ORDER=PCI_BUS_ID" in note for note in notes)
    assert ask(FakeNvml([V100, A100]), CUDA_DEVICE_ORDER="PCI_BUS_ID")[1] == []
    assert ask(FakeNvml([A100, A100]))[1] == []


@pytest.mark.parametrize(("error", "said"), [(12, "libnvidia-ml.so.1"), (9, "does not answer"), (999, "nvidia-smi")])
def test_a_driver_that_fails_is_a_note(ask: Any, error: int, said: str) -> None:
    cards, notes = ask(FakeNvml([A100], init_error=error))
    assert cards == []
    assert len(notes) == 1
    assert said in notes[0]


def test_an_error_in_the_middle_is_a_note(ask: Any) -> None:
    nvml = FakeNvml([A100])
    nvml.nvmlDeviceGetCount = lambda: (_ for _ in ()).throw(NVMLError(999))  # type: ignore[method-assign]
    cards, notes = ask(nvml)
    assert cards == []
    assert len(notes) == 1


def test_a_machine_without_a_driver_asks_nothing_and_says_nothing(tmp_path: Any, host: Device) -> None:
    nvml = FakeNvml([A100])
    nvml.nvmlInit = lambda: pytest.fail("NVML must not be asked")  # type: ignore[method-assign]
    assert probe_nvidia(host, root=tmp_path, nvml=nvml, environment={}, platform="linux") == ([], [])


@pytest.mark.parametrize("error", [12, 9])
def test_windows_without_a_driver_says_nothing(tmp_path: Any, host: Device, error: int) -> None:
    nvml = FakeNvml([], init_error=error)
    assert probe_nvidia(host, root=tmp_path, nvml=nvml, environment={}, platform="win32") == ([], [])


def test_a_card_on_the_bus_without_a_driver_is_a_note(machine: Any, host: Device) -> None:
    bus = "sys/bus/pci/devices"
    root = machine(
        {
            f"{bus}/0000:00:02.0/vendor": "0x8086\n",
            f"{bus}/0000:00:02.0/class": "0x030000\n",
            f"{bus}/0000:01:00.0/vendor": "0x10de\n",
            f"{bus}/0000:01:00.0/class": "0x030200\n",
            f"{bus}/0000:01:00.1/vendor": "0x10de\n",
            f"{bus}/0000:01:00.1/class": "0x040300\n",
        }
    )
    cards, notes = probe_nvidia(host, root=root, nvml=FakeNvml([]), environment={}, platform="linux")
    assert cards == []
    assert len(notes) == 1
    assert "0000:01:00.0" in notes[0]
    assert "--gpus all" in notes[0]


@pytest.mark.parametrize(
    ("capability", "has", "lacks"),
    [
        ((6, 1), {"dp4a"}, {"fp16", "tensor_cores"}),
        ((7, 0), {"fp16", "tensor_cores"}, {"bf16", "int8_tensor_cores", "fp8"}),
        ((7, 5), {"int8_tensor_cores"}, {"bf16", "async_copy"}),
        ((8, 0), {"bf16", "tf32", "async_copy"}, {"fp8", "tma"}),
        ((8, 6), {"bf16"}, {"fp8"}),
        ((8, 9), {"fp8"}, {"tma", "wgmma", "fp4"}),
        ((9, 0), {"fp8", "tma", "wgmma"}, {"fp4", "tcgen05"}),
        ((10, 0), {"fp4", "tcgen05"}, {"wgmma"}),
        ((12, 0), {"fp8", "fp4", "tma"}, {"wgmma", "tcgen05"}),
    ],
)
def test_features_follow_from_the_compute_capability(
    capability: tuple[int, int], has: set[str], lacks: set[str]
) -> None:
    features = cuda_features(*capability)
    assert has <= features
    assert not lacks & features


def test_a_gtx_16_has_no_tensor_cores() -> None:
    assert "tensor_cores" not in cuda_features(7, 5, "NVIDIA GeForce GTX 1660 Ti")
    assert "tensor_cores" in cuda_features(7, 5, "NVIDIA GeForce RTX 2080")

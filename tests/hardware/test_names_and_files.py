"""Names of devices, the catalogue of targets, and the JSON file that stands for a machine.

Draws: what is compared must be equal, whatever the numbers are.
"""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

import pytest

from transom.contract import Device
from transom.errors import OptionError
from transom.hardware import (
    catalogue,
    find,
    from_json,
    probe,
    probe_devices,
    read_probe_file,
    to_json,
    with_target,
    write_probe_file,
)

CPU = Device("cpu", "cpu", "x86_64", 1 << 34)
GPUS = [Device("cuda", f"cuda:{index}", "sm_80", 1 << 36) for index in range(2)]
MACHINE = (CPU, *GPUS)


@pytest.mark.parametrize(
    ("name", "id"),
    [
        ("cpu", "cpu"),
        ("CPU", "cpu"),
        ("cuda", "cuda:0"),
        ("cuda:1", "cuda:1"),
        (" cuda:1 ", "cuda:1"),
        ("remote:v100", "remote:v100"),
        ("v100", "remote:v100"),
        ("Snapdragon-8-Gen-2", "remote:snapdragon-8-gen-2"),
    ],
)
def test_a_name_finds_its_device(name: str, id: str) -> None:
    assert find(MACHINE, name).id == id


@pytest.mark.parametrize("name", ["cuda:2", "gpu", "npu:0"])
def test_a_device_that_is_not_here_lists_those_that_are(name: str) -> None:
    with pytest.raises(OptionError) as error:
        find(MACHINE, name, notes=["the driver sleeps"])
    assert name in error.value.cause
    assert "cpu, cuda:0, cuda:1" in error.value.fix
    assert error.value.details == ("note: the driver sleeps",)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("cudo:1", "cuda:1"),
        ("snapdragon-8-gen2", "snapdragon-8-gen-2"),
        ("remote:rtx4090", "rtx-4090"),
        ("cpuu", "cpu"),
    ],
)
def test_a_misspelt_name_gets_the_nearest_one_and_the_list(name: str, meant: str) -> None:
    with pytest.raises(OptionError) as error:
        find(MACHINE, name)
    assert f'Did you mean "{meant}"?' in error.value.fix
    assert "cuda:0" in error.value.fix
    assert "v100" in error.value.fix


def test_only_a_named_target_joins_the_devices() -> None:
    assert with_target(MACHINE, "auto") == MACHINE
    assert with_target(MACHINE, "cuda") == MACHINE
    assert [device.id for device in with_target(MACHINE, "h100")] == ["cpu", "cuda:0", "cuda:1", "remote:h100"]
    with pytest.raises(OptionError):
        with_target(MACHINE, "h101x")


def test_the_catalogue_has_the_targets_with_their_architectures() -> None:
    targets = {device.id: device for device in catalogue()}
    expected = {
        "snapdragon-8-gen-2": ("hexagon_v73", "43"),
        "snapdragon-8-gen-3": ("hexagon_v75", "57"),
        "snapdragon-8-elite": ("hexagon_v79", "69"),
        "snapdragon-x-elite": ("hexagon_v73", "60"),
    }
    for name, (arch, model) in expected.items():
        device = targets[f"remote:{name}"]
        assert (device.arch, device.drivers["soc_model"]) == (arch, model)
        assert device.drivers["htp_arch"] == arch.removeprefix("hexagon_v")
        assert "weight_sharing" in device.features
    for name, arch in {
        "v100": "sm_70",
        "a100": "sm_80",
        "rtx-3090": "sm_86",
        "rtx-4090": "sm_89",
        "h100": "sm_90",
        "rtx-5090": "sm_120",
    }.items():
        assert targets[f"remote:{name}"].arch == arch
    assert all(device.kind == "remote" and device.name for device in targets.values())
    assert "fp8" in targets["remote:rtx-4090"].features
    assert "bf16" not in targets["remote:v100"].features


def random_device(generator: random.Random, number: int) -> Device:
    def word() -> str:
        return "".join(generator.choices(string.printable + "äß漢", k=generator.randrange(1, 12)))

    kind = generator.choice(["cpu", "cuda", "gpu", "npu", "remote"])
    return Device(
        kind=kind,  # type: ignore[arg-type]
        id=f"{kind}:{number}",
        arch=word(),
        memory_bytes=generator.randrange(1 << 48),
        free_bytes=generator.choice([None, generator.randrange(1 << 40)]),
        integrated=generator.random() < 0.5,
        identity=word(),
        name=word(),
        features=frozenset(word() for _ in range(generator.randrange(5))),
        drivers={word(): word() for _ in range(generator.randrange(3))},
        peers=frozenset(word() for _ in range(generator.randrange(3))),
        cores=generator.randrange(256),
        caches={word(): generator.randrange(1 << 30) for _ in range(generator.randrange(4))},
        numa=tuple(tuple(range(generator.randrange(4))) for _ in range(generator.randrange(3))),
    )


def test_devices_survive_the_round_trip_through_a_file(tmp_path: Path, dice: random.Random) -> None:
    devices = tuple(random_device(dice, number) for number in range(20))
    write_probe_file(tmp_path / "probe.json", devices)
    assert read_probe_file(tmp_path / "probe.json") == devices


def test_the_catalogue_and_this_machine_survive_the_round_trip() -> None:
    devices = (*probe_devices(), *catalogue())
    assert from_json(json.loads(json.dumps(to_json(devices)))) == devices


def test_other_keys_beside_the_devices_are_left_alone() -> None:
    assert from_json({**to_json([CPU]), "backends": [], "transom": "0.1.0"}) == (CPU,)


GOOD: dict[str, Any] = {"kind": "cpu", "id": "cpu", "arch": "x86_64", "memory_bytes": 1}


@pytest.mark.parametrize(
    ("change", "key", "said"),
    [
        ({"memory_bytes": "16 GB"}, "devices[0].memory_bytes", "whole number"),
        ({"memory_bytes": -1}, "devices[0].memory_bytes", "whole number"),
        ({"memory_bytes": True}, "devices[0].memory_bytes", "whole number"),
        ({"cores": 1.5}, "devices[0].cores", "whole number"),
        ({"free_bytes": "x"}, "devices[0].free_bytes", "whole number"),
        ({"integrated": 1}, "devices[0].integrated", "true or false"),
        ({"features": "avx2"}, "devices[0].features", "list of texts"),
        ({"peers": [1]}, "devices[0].peers", "list of texts"),
        ({"drivers": {"cuda": 12}}, "devices[0].drivers", "texts"),
        ({"caches": {"l2": "1M"}}, "devices[0].caches", "whole numbers"),
        ({"numa": [0, 1]}, "devices[0].numa", "lists"),
        ({"name": None}, "devices[0].name", "text"),
        ({"arch": ""}, "devices[0].arch", "text"),
        ({"memory": 5}, '"memory"', 'Did you mean "memory_bytes"'),
        ({"kind": "tpu", "id": "tpu:0"}, "devices[0].kind", "Known: cpu"),
        ({"id": "cuda:0"}, "devices[0].id", "starts with the kind"),
    ],
)
def test_a_wrong_key_is_named(change: dict[str, Any], key: str, said: str) -> None:
    with pytest.raises(OptionError) as error:
        from_json({"devices": [{**GOOD, **change}]}, "support.json")
    assert key in error.value.cause
    assert "support.json" in error.value.cause
    assert said in error.value.fix


@pytest.mark.parametrize("key", ["kind", "id", "arch", "memory_bytes"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(OptionError, match=key):
        from_json({"devices": [{name: value for name, value in GOOD.items() if name != key}]})


def test_two_devices_with_one_id_are_refused() -> None:
    with pytest.raises(OptionError, match=r"devices\[1\].id"):
        from_json({"devices": [GOOD, GOOD]})


@pytest.mark.parametrize("document", [None, [], {}, {"devices": {}}, {"device": []}, "x"])
def test_a_document_without_devices_says_which_key_is_missing(document: object) -> None:
    with pytest.raises(OptionError, match='"devices"'):
        from_json(document)


def test_a_file_with_no_device_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text('{"devices": []}')
    with pytest.raises(OptionError, match=r"The probe file .*none\.json has no device"):
        read_probe_file(tmp_path / "none.json")


@pytest.mark.parametrize("text", ["", "{", '{"devices": [}', "[" * 100_000])
def test_a_file_that_is_not_json_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "probe.json"
    path.write_text(text)
    with pytest.raises(OptionError, match=r"probe\.json"):
        read_probe_file(path)


def test_a_file_that_is_missing_or_not_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"nowhere\.json cannot be read"):
        read_probe_file(tmp_path / "nowhere.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(OptionError, match=r"binary\.json is not UTF-8"):
        read_probe_file(tmp_path / "binary.json")


def test_a_probe_file_stands_for_the_machine_and_the_argument_comes_before_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    write_probe_file(one, [CPU])
    write_probe_file(other, MACHINE)
    monkeypatch.setenv("TRANSOM_PROBE_FILE", str(one))
    assert probe().devices == (CPU,)
    assert probe().source == str(one)
    assert probe(other).devices == MACHINE
    monkeypatch.setenv("TRANSOM_PROBE_FILE", "")
    assert probe().source == "this machine"
    assert probe().devices[0].id == "cpu"

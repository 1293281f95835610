"""Selection over made-up machines: who is chosen, who decides, what is said, and when it is refused.

Draws: any order and any set of devices must keep the promises.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import metadata
from typing import Any

import made_up_machines as m
import pytest

from transom.contract import Device, Offer, Refusal
from transom.errors import OptionError, SelectionError
from transom.plugins import PluginFailure
from transom.selection import BANDS, INSTALL, KINDS, Selection, kind_of, select

BROKEN = PluginFailure("cuda_triton", "transom", "import", "ImportError: libcuda.so.1", "Install the NVIDIA driver")


def choose(devices: Sequence[Device], backends: dict[str, m.Judge] | None = None, **options: Any) -> Selection:
    return select(devices, m.ask(devices, m.BACKENDS if backends is None else backends), **options)


@dataclass(frozen=True)
class Row:
    devices: Sequence[Device]
    backend: str
    device: str
    backends: dict[str, m.Judge] = field(default_factory=lambda: m.BACKENDS)
    options: dict[str, Any] = field(default_factory=dict)
    decided_by: str = "bands"


CPU_ONLY: dict[str, m.Judge] = {"reference": m.reference, "openvino_cpu": m.openvino_cpu}

TABLE: dict[str, Row] = {
    "a xeon": Row([m.XEON], "openvino_cpu", "cpu"),
    "an old cpu without avx2": Row([m.OLD], "reference", "cpu"),
    "a v100": Row([m.XEON, m.V100], "cuda_triton", "cuda:0"),
    "an a100": Row([m.XEON, m.A100], "cuda_triton", "cuda:0"),
    "a 4090 goes by band": Row([m.DESKTOP, m.RTX_4090], "tensorrt", "cuda:0"),
    "an h100": Row([m.XEON, m.H100], "cuda_triton", "cuda:0"),
    "an old cpu with a v100": Row([m.OLD, m.V100], "cuda_triton", "cuda:0"),
    "a laptop unmeasured": Row(m.LAPTOP, "openvino_cpu", "cpu"),
    "a laptop with a card of its own": Row([*m.LAPTOP, m.ARC], "openvino_other", "gpu:1"),
    "a laptop whose cpu only has the fallback": Row([m.OLD, m.IRIS, m.NPU], "openvino_other", "gpu:0"),
    "two cards": Row(m.TWO_CARDS, "cuda_triton", "cuda:0"),
    "no gpu backend": Row([m.XEON, m.A100], "openvino_cpu", "cpu", CPU_ONLY),
    "device by argument": Row(
        m.TWO_CARDS, "cuda_triton", "cuda:1", options={"device": "cuda:1"}, decided_by="argument"
    ),
    "kind by argument": Row(m.LAPTOP, "openvino_other", "npu:0", options={"device": "npu"}, decided_by="argument"),
    "cpu by argument beside a gpu": Row(
        [m.XEON, m.A100], "openvino_cpu", "cpu", options={"device": "cpu"}, decided_by="argument"
    ),
    "backend by argument": Row(
        [m.XEON, m.A100], "reference", "cpu", options={"backend": "reference"}, decided_by="argument"
    ),
    "both by argument": Row(
        [m.DESKTOP, m.RTX_4090],
        "cuda_triton",
        "cuda:0",
        options={"device": "cuda:0", "backend": "cuda_triton"},
        decided_by="argument",
    ),
    "device by environment": Row(
        [m.XEON, m.A100], "openvino_cpu", "cpu", options={"environment_device": "cpu"}, decided_by="environment"
    ),
    "the environment may say auto": Row(
        [m.XEON, m.A100], "cuda_triton", "cuda:0", options={"environment_device": "auto"}
    ),
    "the environment may be empty": Row([m.XEON, m.A100], "cuda_triton", "cuda:0", options={"environment_device": " "}),
    "the argument comes before the environment": Row(
        [m.XEON, m.A100],
        "cuda_triton",
        "cuda:0",
        options={"device": "cuda", "environment_device": "cpu"},
        decided_by="argument",
    ),
    "the hook comes before bands": Row(
        [m.DESKTOP, m.RTX_4090], "cuda_triton", "cuda:0", options={"hook": ("cuda_triton", "site")}, decided_by="hook"
    ),
    "the hook may go to another kind": Row(
        [m.XEON, m.A100], "reference", "cpu", options={"hook": ("reference", "site")}, decided_by="hook"
    ),
    "the backend argument comes before the hook": Row(
        [m.DESKTOP, m.RTX_4090],
        "tensorrt",
        "cuda:0",
        options={"backend": "tensorrt", "hook": ("cuda_triton", "site")},
        decided_by="argument",
    ),
    "the hook chooses within the device of the environment": Row(
        [m.DESKTOP, m.RTX_4090],
        "cuda_triton",
        "cuda:0",
        options={"environment_device": "cuda", "hook": ("cuda_triton", "site")},
        decided_by="environment",
    ),
    "a hook without an offer there is set aside": Row(
        [m.XEON, m.A100],
        "openvino_cpu",
        "cpu",
        options={"device": "cpu", "hook": ("cuda_triton", "site")},
        decided_by="argument",
    ),
    "measured": Row(
        m.LAPTOP,
        "openvino_other",
        "gpu:0",
        options={"measured": {"openvino_cpu@cpu": 20.0, "openvino_other@gpu:0": 31.0, "openvino_other@npu:0": 7.0}},
        decided_by="measurement",
    ),
    "measured against a card that turned out slower": Row(
        [m.XEON, m.V100],
        "openvino_cpu",
        "cpu",
        options={"measured": {"openvino_cpu@cpu": 50.0, "cuda_triton@cuda:0": 30.0}},
        decided_by="measurement",
    ),
    "a kind that failed to measure comes last": Row(
        [m.XEON, m.V100],
        "openvino_cpu",
        "cpu",
        options={"measured": {"openvino_cpu@cpu": 1.0, "cuda_triton@cuda:0": 0.0}},
        decided_by="measurement",
    ),
    "partly measured counts as unmeasured": Row(
        m.LAPTOP, "openvino_cpu", "cpu", options={"measured": {"openvino_other@gpu:0": 900.0}}
    ),
    "a measurement does not override a named device": Row(
        m.LAPTOP,
        "openvino_other",
        "npu:0",
        options={
            "device": "npu:0",
            "measured": {"openvino_cpu@cpu": 20.0, "openvino_other@gpu:0": 31.0, "openvino_other@npu:0": 7.0},
        },
        decided_by="argument",
    ),
    "a phone to compile for": Row(
        [m.XEON, m.PHONE],
        "mobile_export",
        "remote:snapdragon-8-gen-2",
        options={"device": "snapdragon-8-gen-2", "purpose": "export"},
        decided_by="argument",
    ),
    "a target is never chosen by auto": Row([m.XEON, m.PHONE], "openvino_cpu", "cpu", options={"purpose": "export"}),
}


@pytest.mark.parametrize("case", TABLE, ids=[case.replace(" ", "-") for case in TABLE])
def test_the_table_of_machines(case: str) -> None:
    row = TABLE[case]
    choice = choose(row.devices, row.backends, **row.options)
    assert (choice.backend, choice.device.id, choice.decided_by) == (row.backend, row.device, row.decided_by)
    assert choice.why.startswith(f"{row.backend} on {row.device}")
    assert choice.offer.why in choice.why


@pytest.mark.parametrize("order", list(itertools.permutations(BANDS)))
def test_bands_rank_backends_of_one_kind_and_names_break_ties(order: tuple[str, ...], dice: random.Random) -> None:
    answers = [(f"{letter}_backend", Offer("cpu", band, "x")) for letter, band in zip("dcba", order, strict=True)]  # type: ignore[arg-type]
    answers.append(("zz_backend", Offer("cpu", "tuned", "x")))
    dice.shuffle(answers)
    choice = select([m.XEON], answers)
    bands = [candidate.offer.band for candidate in choice.ranked]
    assert bands == ["tuned", "tuned", "native", "generic", "fallback"]
    assert choice.ranked[1].backend == "zz_backend"
    assert "ties with zz_backend" in choice.why


def test_the_order_of_answers_does_not_change_the_choice(dice: random.Random) -> None:
    devices = [*m.LAPTOP, m.ARC, *m.TWO_CARDS[1:]]
    answers = m.ask(devices, m.BACKENDS)
    expected = [candidate.key for candidate in select(devices, answers).ranked]
    for _ in range(20):
        dice.shuffle(answers)
        assert [candidate.key for candidate in select(devices, answers).ranked] == expected


def test_memory_size_never_counts() -> None:
    huge = [m.DESKTOP, replace(m.IRIS, memory_bytes=1 << 60), replace(m.NPU, memory_bytes=1 << 61)]
    assert choose(huge).device.id == "cpu"
    cards = [m.XEON, m.TWO_CARDS[1], replace(m.TWO_CARDS[2], memory_bytes=1 << 60)]
    assert choose(cards).device.id == "cuda:0"


def test_a_better_band_on_the_second_card_wins() -> None:
    devices = [m.XEON, m.V100, replace(m.RTX_4090, id="cuda:1")]
    choice = choose(devices)
    assert (choice.backend, choice.device.id) == ("tensorrt", "cuda:1")


def test_the_other_of_two_equal_cards_is_mentioned() -> None:
    assert "cuda:1 could run it too and can be named" in choose(m.TWO_CARDS).why


def test_a_fallback_comes_after_everything_else_whatever_its_device() -> None:
    choice = choose([m.OLD, m.IRIS, m.NPU])
    assert [candidate.backend for candidate in choice.ranked] == ["openvino_other", "openvino_other", "reference"]
    assert [kind_of(candidate.device) for candidate in choice.kinds_to_measure] == ["integrated gpu", "npu"]


def test_the_best_of_each_kind_is_to_be_measured_and_fallbacks_are_not() -> None:
    choice = choose([*m.LAPTOP, m.RTX_4090])
    keys = [candidate.key for candidate in choice.kinds_to_measure]
    assert keys == ["tensorrt@cuda:0", "openvino_cpu@cpu", "openvino_other@gpu:0", "openvino_other@npu:0"]
    measured = dict.fromkeys(keys[:3], 1.0)
    assert [c.key for c in choose([*m.LAPTOP, m.RTX_4090], measured=measured).kinds_to_measure] == keys[3:]
    assert choose([*m.LAPTOP, m.RTX_4090], measured=dict.fromkeys(keys, 1.0)).kinds_to_measure == ()


@pytest.mark.parametrize(
    ("devices", "options"),
    [
        ([m.XEON], {}),
        (m.LAPTOP, {"device": "cpu"}),
        (m.LAPTOP, {"environment_device": "npu"}),
        (m.LAPTOP, {"backend": "openvino_cpu"}),
        ([m.OLD, m.A100], {}),
        (m.TWO_CARDS, {"backend": "cuda_triton"}),
    ],
)
def test_nothing_is_measured_where_only_one_kind_is_in_question(
    devices: Sequence[Device], options: dict[str, Any]
) -> None:
    assert choose(devices, **options).kinds_to_measure == ()


def test_a_named_backend_is_still_measured_over_its_kinds() -> None:
    choice = choose(m.LAPTOP, backend="openvino_other")
    assert [c.device.id for c in choice.kinds_to_measure] == ["gpu:0", "npu:0"]


def test_what_follows_the_choice_stays_within_what_was_named() -> None:
    assert {c.device.id for c in choose([m.DESKTOP, m.RTX_4090], device="cuda").ranked} == {"cuda:0"}
    assert {c.backend for c in choose([m.DESKTOP, m.RTX_4090], backend="cuda_triton").ranked} == {"cuda_triton"}
    hooked = choose([m.DESKTOP, m.RTX_4090], hook=("reference", "site"))
    assert [c.backend for c in hooked.ranked] == ["reference", "tensorrt", "cuda_triton", "openvino_cpu"]


# What is said aloud


def test_a_gpu_without_its_package_is_said_aloud_with_the_command() -> None:
    choice = choose([m.XEON, m.A100], {**CPU_ONLY, "cuda_triton": m.triton_missing})
    [warning] = choice.warnings
    assert "A100 (cuda:0) is present but cannot be used" in warning
    assert "cuda_triton: Triton is not installed" in warning
    assert "pip install 'transom[cuda]'" in warning
    assert "reference" not in warning


def test_a_gpu_that_no_installed_backend_knows_is_said_aloud() -> None:
    [warning] = choose([m.XEON, m.A100], CPU_ONLY).warnings
    assert "A100 (cuda:0)" in warning
    assert "no installed backend is made for it" in warning


def test_a_discrete_intel_gpu_is_said_aloud_and_an_integrated_one_is_not() -> None:
    [warning] = choose([*m.LAPTOP, m.ARC], CPU_ONLY).warnings
    assert "Arc B580" in warning


@pytest.mark.parametrize("options", [{"device": "cpu"}, {"backend": "openvino_cpu"}, {"environment_device": "cpu"}])
def test_who_asks_for_the_cpu_is_not_told_about_gpus(options: dict[str, Any]) -> None:
    assert choose([m.XEON, m.A100], CPU_ONLY, notes=["the driver sleeps"], **options).warnings == ()


def test_a_gpu_that_could_run_it_is_no_warning() -> None:
    measured = {"openvino_cpu@cpu": 50.0, "cuda_triton@cuda:0": 30.0}
    assert choose([m.XEON, m.V100], measured=measured).warnings == ()


def test_a_broken_plugin_is_said_aloud_when_auto_decides() -> None:
    choice = choose([m.XEON], CPU_ONLY, failures=[BROKEN], notes=["An NVIDIA GPU is on the bus"])
    assert any("libcuda.so.1" in warning and "Install the NVIDIA driver" in warning for warning in choice.warnings)
    assert "An NVIDIA GPU is on the bus" in choice.warnings
    assert choose([m.XEON], CPU_ONLY, failures=[BROKEN], device="cpu", backend="openvino_cpu").warnings == ()


def test_a_fallback_is_said_to_be_slow_with_the_command_that_mends_it() -> None:
    choice = choose([m.XEON], {"reference": m.reference, "openvino_cpu": m.openvino_missing})
    [warning] = choice.warnings
    assert "slow fallback reference" in warning
    assert "OpenVINO is not installed" in warning
    assert "pip install 'transom[openvino]'" in warning
    assert choose([m.XEON], {"reference": m.reference}, backend="reference").warnings == ()


def test_a_hook_that_is_set_aside_is_said_aloud() -> None:
    choice = choose([m.XEON], CPU_ONLY, hook=("cuda_triton", "site-policy 4.2"))
    assert any("site-policy 4.2" in warning and "cuda_triton" in warning for warning in choice.warnings)


def test_auto_explains_what_it_compared() -> None:
    why = choose(m.LAPTOP).why
    assert "Kinds of device come in the order cpu, integrated gpu, npu until they are measured" in why
    measured = {"openvino_cpu@cpu": 20.0, "openvino_other@gpu:0": 31.06, "openvino_other@npu:0": 7.0}
    assert (
        "Measured gpu:0 31.1 tokens/s, cpu 20.0 tokens/s, npu:0 7.0 tokens/s" in choose(m.LAPTOP, measured=measured).why
    )
    assert 'band "tuned" comes before cuda_triton (native)' in choose([m.DESKTOP, m.RTX_4090]).why
    assert "It is the only offer" in choose([m.OLD]).why
    assert 'TRANSOM_DEVICE is "cpu"' in choose([m.XEON], environment_device="cpu").why
    assert 'Backend="reference" was asked for' in choose([m.XEON], backend="reference").why
    assert "The plugin site 1.0 chose reference" in choose([m.XEON], hook=("reference", "site 1.0")).why


def test_refusals_are_kept_as_data() -> None:
    choice = choose([m.XEON, m.A100])
    assert ("tensorrt", "missing_feature", "cuda:0") in {(n, r.code, r.device_id) for n, r in choice.refusals}
    assert all(isinstance(refusal, Refusal) for _, refusal in choice.refusals)


# What is refused


@pytest.mark.parametrize("named", [{"device": "cuda:0"}, {"device": "cuda"}, {"environment_device": "cuda:0"}])
def test_a_named_device_never_falls_back(named: dict[str, Any]) -> None:
    with pytest.raises(SelectionError) as error:
        choose([m.XEON, m.A100], {**CPU_ONLY, "cuda_triton": m.triton_missing}, **named)
    assert '"cuda:0"' in error.value.cause
    assert "pip install 'transom[cuda]'" in error.value.fix
    assert ("TRANSOM_DEVICE" in error.value.cause) == ("environment_device" in named)
    said = "\n".join(error.value.details)
    for name in ("reference", "openvino_cpu", "cuda_triton"):
        assert f"{name} on cuda:0" in said
    assert "on cpu" not in said


def test_a_named_device_without_a_backend_says_what_could_run_it() -> None:
    with pytest.raises(SelectionError, match="What can: openvino_cpu on cpu, reference on cpu"):
        choose([m.XEON, m.A100], CPU_ONLY, device="cuda:0")


def test_a_named_backend_never_falls_back() -> None:
    with pytest.raises(SelectionError) as error:
        choose([m.XEON, m.A100], backend="tensorrt")
    assert '"tensorrt"' in error.value.cause
    assert any("needs sm_89, found sm_80" in line for line in error.value.details)
    assert not any(line.startswith("openvino_cpu") for line in error.value.details)


def test_a_named_backend_on_a_named_device_is_as_strict() -> None:
    with pytest.raises(SelectionError, match='"openvino_cpu" cannot run on the device "cuda:0"'):
        choose([m.XEON, m.A100], backend="openvino_cpu", device="cuda:0")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "cudo:0"}, 'Did you mean "cuda:0"'),
        ({"device": "cuda:3"}, "cpu, cuda:0"),
        ({"device": "npu"}, "cpu, cuda:0"),
        ({"environment_device": "cudo:0"}, "TRANSOM_DEVICE"),
        ({"backend": "openvino"}, 'Did you mean "openvino_cpu"'),
        ({"backend": "xyzzy"}, "Known: cuda_triton, mobile_export"),
    ],
)
def test_an_unknown_device_or_backend_names_the_nearest(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        choose([m.XEON, m.A100], **options)


def test_a_broken_backend_that_is_named_says_how_it_is_broken() -> None:
    with pytest.raises(SelectionError, match=r"installed but broken: ImportError: libcuda\.so\.1") as error:
        choose([m.XEON], CPU_ONLY, backend="cuda_triton", failures=[BROKEN])
    assert error.value.fix == "Install the NVIDIA driver"


def test_nothing_installed_says_what_to_install() -> None:
    with pytest.raises(SelectionError) as error:
        choose([m.XEON], {})
    assert "pip install 'transom[openvino]'" in error.value.fix
    assert "no backend is installed" in error.value.details


def test_nothing_installed_because_everything_is_broken_says_so() -> None:
    with pytest.raises(SelectionError) as error:
        choose([m.XEON], {}, failures=[BROKEN])
    assert error.value.fix == "Install the NVIDIA driver"
    assert any("libcuda.so.1" in line for line in error.value.details)


def test_an_old_cpu_without_a_fallback_lists_the_missing_feature() -> None:
    with pytest.raises(SelectionError) as error:
        choose([m.OLD], {"openvino_cpu": m.openvino_cpu})
    assert error.value.details == ("openvino_cpu on cpu: needs AVX2, which this CPU lacks [missing_feature]",)


def test_a_package_to_install_is_offered_before_any_other_fix() -> None:
    answers = [
        ("a", Refusal("cpu", "missing_feature", "needs AMX", "Use a newer CPU")),
        ("b", Refusal("cpu", "missing_dep", "no SDK", "pip install sdk")),
        ("c", Refusal("cpu", "too_old", "SDK 1", "pip install --upgrade sdk")),
    ]
    for permutation in itertools.permutations(answers):
        with pytest.raises(SelectionError) as error:
            select([m.XEON], permutation)
        assert error.value.fix == "Install it with: pip install sdk"


def test_of_several_packages_that_are_missing_each_is_named_once() -> None:
    answers = [
        ("a", Refusal("cpu", "missing_dep", "no SDK", "pip install sdk")),
        ("b", Refusal("cpu", "missing_dep", "no kit", "pip install kit")),
        ("c", Refusal("cpu", "missing_dep", "no SDK", "pip install sdk")),
        ("d", Refusal("cpu", "too_old", "SDK 1", "pip install --upgrade sdk")),
    ]
    with pytest.raises(SelectionError) as error:
        select([m.XEON], answers)
    assert error.value.fix == "Install it with: pip install sdk, or: pip install kit"


def test_the_device_that_a_backend_proposes_is_a_target_where_one_exports() -> None:
    answers = [("a", Refusal("cpu", "wrong_device", "runs on GPUs", "Use device='cuda:0'"))]
    for purpose, argument in (("run", "device"), ("export", "target")):
        with pytest.raises(SelectionError) as error:
            select([m.XEON], answers, purpose=purpose)  # type: ignore[arg-type]
        assert error.value.details == (f"a on cpu: runs on GPUs [wrong_device] -> Use {argument}='cuda:0'",)


def test_an_offer_that_only_compiles_does_not_run() -> None:
    devices = [m.XEON, m.PHONE]
    with pytest.raises(SelectionError) as error:
        choose(devices, device="snapdragon-8-gen-2")
    assert "can only be compiled for" in error.value.fix
    assert any("compiles for it, but cannot run it here" in line for line in error.value.details)
    local = [("compiler", Offer("cpu", "tuned", "cross-compiles", runs_here=False)), ("reference", m.reference(m.XEON))]
    assert select([m.XEON], local).backend == "reference"
    assert select([m.XEON], local, purpose="export").backend == "compiler"


def test_a_machine_without_devices_is_refused() -> None:
    with pytest.raises(SelectionError, match="found no device"):
        select([], [])


def test_the_commands_to_install_name_extras_that_exist() -> None:
    extras = set(metadata("transom").get_all("Provides-Extra") or [])
    named = {extra for command in INSTALL.values() for extra in re.findall(r"transom\[(\w+)\]", command)}
    assert named
    assert named <= extras


def test_every_kind_of_device_has_its_place() -> None:
    assert {kind_of(d) for d in (*m.LAPTOP, m.ARC, m.A100, m.PHONE)} == set(KINDS)


def test_any_machine_gets_a_choice_that_keeps_the_promises_or_an_error(dice: random.Random) -> None:
    everything = [m.XEON, m.A100, m.IRIS, m.ARC, m.NPU, m.PHONE]
    for _ in range(300):
        devices = dice.sample(everything, dice.randrange(1, len(everything) + 1))
        names = dice.sample(sorted(m.BACKENDS), dice.randrange(1, len(m.BACKENDS) + 1))
        answers = m.ask(devices, {name: m.BACKENDS[name] for name in names})
        device = dice.choice(["auto", dice.choice(devices).id])
        backend = dice.choice(["auto", dice.choice(names)])
        purpose: Any = dice.choice(["run", "export"])
        running = {
            (name, a.device_id)
            for name, a in answers
            if isinstance(a, Offer)
            and (a.runs_here or purpose == "export")
            and backend in ("auto", name)
            and (a.device_id == device if device != "auto" else not a.device_id.startswith("remote"))
        }
        try:
            choice = select(devices, answers, device=device, backend=backend, purpose=purpose)
        except SelectionError:
            assert not running
            continue
        assert {(c.backend, c.device.id) for c in choice.ranked} == running


def test_a_backend_whose_package_is_missing_is_told_of_where_one_exports() -> None:
    answers = [
        ("portable", Offer(m.PHONE.id, "generic", "anywhere", runs_here=False)),
        ("tuned", Refusal(m.PHONE.id, "missing_dep", "the package tuned is not there", "pip install tuned")),
    ]
    why = "the package tuned is not there. Install it with: pip install tuned"
    said = f"tuned could compile for {m.PHONE.id} too: {why}"
    found = select([m.PHONE], answers, device=m.PHONE.id, purpose="export")
    assert found.backend == "portable"
    assert said in found.warnings
    assert said not in select([m.PHONE], answers, device=m.PHONE.id, backend="portable", purpose="export").warnings


def test_an_offer_by_name_counts_only_when_the_backend_is_named() -> None:
    answers = [
        ("emulator", Offer("cpu", "tuned", "an emulator", by_name=True)),
        ("reference", m.reference(m.XEON)),
    ]
    found = select([m.XEON], answers)
    assert found.backend == "reference"
    [(name, refusal)] = found.refusals
    assert (name, refusal.fix) == ("emulator", "Use backend='emulator'")
    assert select([m.XEON], answers, backend="emulator").backend == "emulator"

"""A backend that answers wrongly, raises or hangs in its probe gives one record; the others are still asked."""

from __future__ import annotations

from typing import Any

import pytest

ANSWER = 'return [Offer(d.id, "native", "made up") for d in devices]'

CASES: dict[str, tuple[str, str]] = {
    "it raises": ("raise OSError('driver asleep')", "OSError: driver asleep"),
    "it exits": ("raise SystemExit(4)", "sys.exit(4)"),
    "too few answers": ('return [Offer(devices[0].id, "native", "x")]', "1 answers for 2 devices"),
    "too many answers": ('return [Offer("cpu", "native", "x")] * 3', "3 answers for 2 devices"),
    "one device twice": ('return [Offer("cpu", "native", "x")] * 2', "twice for cpu"),
    "a device of its own": (
        'return [Offer("cpu", "native", "x"), Offer("tpu:0", "native", "x")]',
        "tpu:0, which it was not asked about",
    ),
    "text for an answer": ('return ["yes", "no"]', "with a str"),
    "None": ("return None", "None"),
    "a band that does not exist": (ANSWER.replace("native", "best"), "'best'"),
    "a code that does not exist": ('return [Refusal(d.id, "no", "x") for d in devices]', "'no'"),
    "a refusal without a reason": ('return [Refusal(d.id, "failed", "") for d in devices]', "no reason"),
    "an offer without a why": ('return [Offer(d.id, "native", " ") for d in devices]', "no why"),
}


@pytest.mark.parametrize("case", CASES, ids=[case.replace(" ", "-") for case in CASES])
def test_a_bad_probe_is_one_record_and_a_refusal_for_each_device(
    case: str, environment: Any, sound_source: str
) -> None:
    code, error = CASES[case]
    environment.install("broken", sound_source.replace(ANSWER, code).replace('"sound"', '"a_broken_one"'))
    environment.install_sound("healthy", "healthy")
    answers, failures, probed = environment.run("asked()")
    assert [failure["stage"] for failure in failures] == ["probe"]
    assert failures == probed
    assert failures[0]["distribution"] == "broken"
    assert error in failures[0]["error"]
    by_backend: dict[str, list[list[str]]] = {}
    for name, *rest in answers:
        by_backend.setdefault(name, []).append(rest)
    assert [(device, kind) for device, kind, _ in by_backend["a_broken_one"]] == [
        ("cpu", "Refusal"),
        ("cuda:0", "Refusal"),
    ]
    assert by_backend["healthy"] == [["cpu", "Offer", "made up"], ["cuda:0", "Offer", "made up"]]


def test_a_probe_that_hangs_is_given_up_after_its_budget_and_not_asked_again(
    environment: Any, sound_source: str
) -> None:
    hang = "import threading; threading.Event().wait()"
    environment.install("broken", sound_source.replace(ANSWER, hang).replace('"sound"', '"a_hanging_one"'))
    environment.install_sound("healthy", "healthy")
    answers, failures, threads, seconds = environment.run(
        """
        import threading
        plugins = load_plugins()
        plugins.probe((CPU,))
        probed = plugins.probe((CPU,))
        waiting = [t for t in threading.enumerate() if t.name == "transom-probe"]
        answers = [[n, type(a).__name__] for n, a in probed.answers if not plugins.backends[n].core]
        print(json.dumps([answers, foreign(plugins.failures), len(waiting), sorted(probed.seconds)]))
        """,
        {"TRANSOM_PROBE_BUDGET": "0.2"},
    )
    assert answers == [["a_hanging_one", "Refusal"], ["healthy", "Offer"]]
    assert threads == 1
    assert "healthy" in seconds
    assert "a_hanging_one" not in seconds
    [failure] = failures
    assert "within 0.2 s" in failure["error"]


def test_answers_come_in_the_order_of_the_devices(environment: Any, sound_source: str) -> None:
    environment.install("fine", sound_source.replace(ANSWER, ANSWER.replace("in devices", "in reversed(devices)")))
    answers, failures, _ = environment.run("asked()")
    assert [answer[1] for answer in answers] == ["cpu", "cuda:0"]
    assert failures == []


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf"])
def test_a_budget_that_is_not_a_positive_number_is_refused(value: str, environment: Any) -> None:
    message = environment.run(
        """
        from transom.errors import OptionError
        try:
            load_plugins().probe((CPU,))
        except OptionError as error:
            print(json.dumps(str(error)))
        """,
        {"TRANSOM_PROBE_BUDGET": value},
    )
    assert "TRANSOM_PROBE_BUDGET" in message
    assert value in message

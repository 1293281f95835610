"""The self-check during a load: an engine with wrong outputs is refused, and `auto` tries the next offer.

Draws: float32 sums in another order differ by about 1e-6 of their size; the tolerances are ten times that or more.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from made_up import CPU, MadeUp

from transom.errors import EngineError, SelectionError, SelfCheckFailed

WRONG = ["garbage", "nan", "layer", "decode"]


@pytest.mark.parametrize("does", WRONG)
def test_a_named_backend_that_computes_something_else_is_refused_with_the_numbers(here: Any, does: str) -> None:
    here.use(MadeUp("shady", does))
    with pytest.raises(SelfCheckFailed) as caught:
        here.load(backend="shady")
    assert "shady" in caught.value.cause
    assert ("not finite" if does == "nan" else "nats") in caught.value.cause
    assert "allowed are 0.05 nats and a correlation of 0.99" in caught.value.cause
    assert "verify='off'" in caught.value.fix


@pytest.mark.parametrize("does", WRONG)
def test_auto_moves_on_to_the_next_offer_and_says_so(here: Any, does: str) -> None:
    here.use(MadeUp("shady", does))
    with here.load() as model:
        assert model.report.backend == "reference"
        [warning] = [w for w in model.report.warnings if "set aside" in w]
        assert warning.startswith("shady on cpu was set aside: The backend shady does not compute")
        assert "Set aside before it: shady on cpu." in model.report.why
        assert model.generate("Hello", max_new_tokens=2).usage.completion_tokens


def test_a_failure_is_remembered_so_that_the_next_load_does_not_wait_for_it_again(here: Any) -> None:
    shady = MadeUp("shady", "garbage")
    here.use(shady)
    here.load().close()
    calls = len(shady.calls)
    here.jobs.clear()
    with here.load() as model:
        assert model.report.backend == "reference"
        assert any("at an earlier load" in w for w in model.report.warnings)
    assert (len(shady.calls), here.jobs) == (calls, [])
    # Named, or asked to check always, it is tried again; so it is with another driver.
    with pytest.raises(SelfCheckFailed):
        here.load(backend="shady")
    shady.does = ""
    here.use(shady, devices=[replace(CPU, drivers={"kernel": "7"})])
    with here.load() as model:
        assert model.report.backend == "shady"


def test_a_sound_backend_is_checked_once_for_each_driver_and_version(here: Any) -> None:
    sound = MadeUp("sound")
    here.use(sound)
    for expected in (["prepare"], []):
        here.jobs.clear()
        with here.load() as model:
            assert model.report.check.startswith("passed, mean KL")
        assert here.jobs == expected
    assert sound.calls.count("compile") == 1
    here.use(sound, devices=[replace(CPU, drivers={"kernel": "6.1"})])
    with here.load() as model:
        assert model.report.check.startswith("passed")
    assert here.jobs == ["prepare"]
    assert sound.calls.count("compile") == 1
    sound.why = "made up, SDK 2"
    here.load().close()
    assert here.jobs == ["prepare", "prepare"]
    assert sound.calls.count("compile") == 1
    here.versions["sound"] = "2.0"
    here.load().close()
    assert sound.calls.count("compile") == 2


def test_an_artifact_that_was_good_is_refused_where_a_new_driver_makes_it_garbage(here: Any) -> None:
    shady = MadeUp("shady")
    here.use(shady)
    here.load().close()
    shady.does = "garbage"
    here.use(shady, devices=[replace(CPU, drivers={"kernel": "7"})])
    with pytest.raises(SelfCheckFailed):
        here.load(backend="shady")


def test_verify_off_runs_it_anyway_once_in_the_child_and_a_later_load_checks_it(here: Any) -> None:
    shady = MadeUp("shady", "garbage")
    here.use(shady)
    with here.load(verify="off") as model:
        assert model.report.backend == "shady"
        assert model.report.check == "switched off"
    assert shady.calls == ["compile", "load", "load"]  # native code runs in the child first, checked or not
    here.load(verify="off").close()
    assert shady.calls == ["compile", "load", "load", "load"]
    with pytest.raises(SelfCheckFailed):
        here.load(backend="shady")
    assert shady.calls.count("compile") == 1


def test_verify_always_checks_the_session_that_will_answer(here: Any) -> None:
    shady = MadeUp("shady")
    here.use(shady)
    with here.load(verify="always") as model:
        assert "check" in model.report.startup
    shady.does = "garbage"
    here.load().close()  # believed, as the verdict says
    with pytest.raises(SelfCheckFailed):
        here.load(backend="shady", verify="always")


def test_verify_always_computes_evicted_reference_outputs_again(here: Any) -> None:
    here.use(MadeUp("sound"))
    here.load().close()
    for entry in (here.cache.root / "golden").iterdir():
        here.cache.reference_outputs.lookup(entry.name).discard("evicted")
    with here.load(verify="always") as model:
        assert model.report.check.startswith("passed")
    assert here.jobs == ["prepare", "reference_outputs"]


def test_approximate_claims_get_the_wider_bound(here: Any) -> None:
    here.use(MadeUp("coarse", "inexact"))
    with here.load() as model:
        assert model.report.check.startswith("passed")
        assert model.report.backend == "coarse"


def test_the_check_holds_a_backend_to_the_divergence_that_it_declares(here: Any) -> None:
    declared = MadeUp("coarse", "inexact:1e-30")
    here.use(declared)
    with pytest.raises(SelfCheckFailed, match=r"allowed are 1e-30 nats and a correlation of 0\.9"):
        here.load(backend="coarse")
    declared.does = "inexact:0.2"
    here.use(declared, devices=[replace(CPU, drivers={"kernel": "7"})])
    here.versions["coarse"] = "2.0"
    with here.load(backend="coarse") as model:
        assert model.report.check.startswith("passed")


@pytest.mark.parametrize("context", [1, 2, 3, 5, 8])
def test_a_context_shorter_than_the_check_prompt_is_checked_as_far_as_it_goes(here: Any, context: int) -> None:
    here.use(MadeUp("sound"))
    with here.load(context=context) as model:
        assert model.context == context
        assert f"of {context} positions" in model.report.check


def test_a_session_of_static_shapes_is_checked_in_its_own_chunks(here: Any) -> None:
    here.use(MadeUp("chunky", chunk=4))
    with here.load() as model:
        assert model.report.check.startswith("passed")
    here.use(MadeUp("shady", "decode", chunk=4))
    with pytest.raises(SelfCheckFailed):
        here.load(backend="shady")


@pytest.mark.parametrize("where", ["claim", "compile", "load", "step"])
def test_whatever_a_backend_raises_becomes_one_sentence_that_names_it(here: Any, where: str) -> None:
    here.use(MadeUp("shady", f"{where}:raise"))
    with pytest.raises(EngineError) as caught:
        here.load(backend="shady")
    assert "The backend shady failed while" in caught.value.cause
    assert ("KeyError" if where == "claim" else f"LookupError: made up in {where}") in caught.value.cause
    with here.load() as model:
        assert model.report.backend == "reference"


@pytest.mark.parametrize(("does", "said"), [("silent", "is silent on the node"), ("mute", "without a reason"),
                                            ("odd", "answers with a str")])  # fmt: skip
def test_a_breach_of_the_contract_in_claim_is_reported(here: Any, does: str, said: str) -> None:
    here.use(MadeUp("shady", does))
    with pytest.raises(EngineError, match=said):
        here.load(backend="shady")


def test_when_nothing_works_the_error_lists_what_each_backend_said(here: Any, monkeypatch: Any) -> None:
    from transom.reference import ReferenceBackend

    def fail(self: Any, *arguments: Any) -> None:
        raise RuntimeError("not today")

    monkeypatch.setattr(ReferenceBackend, "compile", fail)
    here.use(MadeUp("shady", "garbage"), MadeUp("worse", "compile:raise"))
    with pytest.raises(SelectionError) as caught:
        here.load()
    text = "\n".join(caught.value.details)
    assert "shady on cpu: " in text
    assert "nats" in text
    assert "worse on cpu: " in text
    assert "made up in compile" in text
    assert "reference on cpu: " in text
    assert "not today" in text


def test_a_broken_session_does_not_leave_files_in_the_folder_for_temporary_ones(
    here: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    import tempfile

    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    here.use(MadeUp("sound"))
    here.load().close()
    here.use(MadeUp("shady", "step:raise"))
    here.load().close()
    assert os.listdir(folder) == []
    assert os.listdir(here.cache.root / "building") == []


def test_the_model_s_logits_are_the_reference_s(here: Any, rng: np.random.Generator) -> None:
    ids = [int(i) for i in rng.integers(0, 256, 9)]
    here.use(MadeUp("sound"))
    with here.load(backend="sound") as one, here.load(backend="reference") as two:
        np.testing.assert_allclose(one.logits(ids), two.logits(ids), atol=1e-5)

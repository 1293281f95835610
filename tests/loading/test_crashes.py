"""Engines that crash in real processes: the host survives and reports why, and `auto` tries the next offer."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import Any

import pytest

from transom.errors import OptionError
from transom.preparation.child import run_in_child

DEATHS = [
    ("compile:segv", "SIGSEGV"),
    ("compile:exit", "status 3"),
    ("load:abort", "SIGABRT"),
    ("step:ill", "SIGILL"),
]
BOTH = """
named = outcome(backend="a_shady")
auto = outcome()
again = outcome()
show(named=named, auto=auto, again=again)
"""


@pytest.mark.parametrize(("does", "said"), DEATHS)
@pytest.mark.sweep(but=("compile:exit-status 3", "step:ill-SIGILL"))
def test_a_backend_that_kills_its_process_is_refused_with_the_reason_and_auto_moves_on(
    packages: Any, does: str, said: str
) -> None:
    packages.use({"name": "a_shady", "does": does, "band": "tuned"}, {"name": "a_sound", "band": "tuned"})
    result = packages.run(BOTH)
    assert result["named"]["error"] == "ChildFailed"
    assert "a_shady" in result["named"]["cause"]
    assert said in result["named"]["cause"]
    assert result["auto"]["report"]["backend"] == result["again"]["report"]["backend"] == "a_sound"
    [warning] = [w for w in result["auto"]["report"]["warnings"] if "set aside" in w]
    assert said in warning
    assert os.listdir(packages.cache / "building") == []
    # A crash is remembered; an exit may have been a bad day.
    [warning] = [w for w in result["again"]["report"]["warnings"] if "set aside" in w]
    assert ("at an earlier load" in warning) == ("SIG" in said)


@pytest.mark.parametrize("does", ["compile:hang", "load:hang"])
@pytest.mark.sweep(but=("compile:hang",))
def test_a_backend_that_hangs_can_be_cancelled_and_leaves_nothing(packages: Any, does: str) -> None:
    packages.use({"name": "shady", "does": does})
    result = packages.run("""
    stages = []
    def stop(stage, share):
        stages.append(stage)
        if stages.count(stage) > 3 and stage in ("compile", "check"):
            raise transom.Cancelled
    start = time.monotonic()
    try:
        transom.load(model, backend="shady", progress=stop)
    except transom.Cancelled:
        show(cancelled=True, seconds=time.monotonic() - start)
    """)
    assert result["cancelled"]
    assert os.listdir(packages.cache / "building") == []
    packages.use({"name": "shady"})
    after = packages.run('show(**outcome(backend="shady"))')
    assert after["report"]["check"].startswith("passed")
    assert os.listdir(packages.cache / "building") == []


def test_a_backend_that_hangs_is_set_aside_at_the_time_limit_and_remembered(packages: Any) -> None:
    packages.use({"name": "a_hanging", "does": "compile:hang", "band": "tuned"}, {"name": "a_sound", "band": "tuned"})
    # Only the first backend has a limit, and never answers: how busy the machine is does not decide.
    result = packages.run("""
    from transom.preparation import child
    child.silence_limit = lambda: limits.pop(0)
    limits = [1.0, float("inf")]
    auto = outcome()
    show(auto=auto, again=outcome(), left=limits)
    """)
    for load in (result["auto"], result["again"]):
        assert load["report"]["backend"] == "a_sound"
        [warning] = [w for w in load["report"]["warnings"] if "set aside" in w]
        assert "a_hanging on cpu" in warning
    assert "it did not report any progress for 1 s" in warning
    assert "at an earlier load" in warning


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf"])
def test_a_time_limit_that_is_not_a_number_of_seconds_is_refused(
    value: str, here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSOM_TIME_LIMIT", value)
    with pytest.raises(OptionError, match=f'TRANSOM_TIME_LIMIT is "{value}"'):
        run_in_child("json:dumps", {})


def test_a_process_that_is_killed_in_the_middle_of_a_compile_breaks_nothing(packages: Any) -> None:
    packages.use({"name": "a_slow", "does": "compile:slow", "band": "tuned"})
    process = packages.start("show(**outcome())")
    deadline = time.monotonic() + 60
    while not packages.log and time.monotonic() < deadline:
        time.sleep(0.05)
    assert packages.log, "the compile never began"
    compiling = int(packages.log[0].split()[1])
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    while _lives(compiling) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _lives(compiling), "the child process outlived its parent"
    packages.use({"name": "a_slow", "band": "tuned"})
    after = packages.run("show(**outcome())")
    assert after["report"]["backend"] == "a_slow"
    assert after["report"]["warnings"] == []
    assert os.listdir(packages.cache / "building") == []


def test_two_processes_that_load_the_same_model_at_once_compile_it_once_and_both_answer(packages: Any) -> None:
    packages.use({"name": "a_sound", "band": "tuned"})
    both = [packages.start("show(**outcome())") for _ in range(2)]
    one, two = [packages.finish(process) for process in both]
    assert one["text"] == two["text"]
    assert one["report"]["check"] == two["report"]["check"] != ""
    assert len(packages.log) == 1


def test_a_backend_that_only_the_host_sees_is_a_clear_error(packages: Any) -> None:
    result = packages.run("""
    import made_up
    from transom.plugins import LoadedBackend, Plugins
    from transom.loading import machine
    here = Plugins([], [LoadedBackend(made_up.MadeUp("ghost"), "ghost", "made-up", "1.0", "ghost")], [])
    machine.load_plugins = lambda: here
    show(**outcome(backend="ghost"))
    """)
    assert result["error"] == "SelectionError"
    assert "child process" in result["cause"]


def _lives(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


LATER = """
import os
if sys.argv[2] in ("check", "load"):
    with transom.load(model):
        pass
    os.environ["MADE_UP_LATER"] = ":".join(sys.argv[2:])  # of the next load, for which nothing is compiled
with transom.load(model) as loaded:
    if sys.argv[2] != "elsewhere":
        os.environ["MADE_UP_LATER"] = ":".join(sys.argv[2:])  # after the self-check
        loaded.generate("Hello", max_new_tokens=1)
    else:
        os.kill(os.getpid(), int(sys.argv[3]))
"""


@pytest.mark.parametrize("where", ["check", "load", "new_state", "step", "close"])
def test_a_backend_that_ends_the_process_after_the_self_check_is_remembered(packages: Any, where: str) -> None:
    packages.use({"name": "a_shady", "band": "tuned"}, {"name": "b_sound", "band": "tuned"})
    show = "show(**outcome(), running=os.listdir(os.path.join(os.environ['TRANSOM_CACHE'], 'running')))"

    def ended(where: str, number: signal.Signals) -> None:
        assert packages.fork(LATER, where, str(int(number)))[0] == -number

    # Neither a kill from outside nor a crash of the program's own code is the model's fault.
    ended(where, signal.SIGKILL)
    ended("elsewhere", signal.SIGSEGV)
    found = packages.run("import os\n" + show)
    assert (found["report"]["backend"], found["report"]["warnings"], found["running"]) == ("a_shady", [], [])

    ended(where, signal.SIGSEGV)
    said = "a_shady ended the process with SIGSEGV while it opened or ran this model on cpu (at an earlier run)"
    found = packages.run("import os\n" + show)
    assert found["report"]["backend"] == "b_sound"
    assert found["report"]["warnings"] == [f"a_shady on cpu was set aside: {said}"]
    named = packages.run('show(**outcome(backend="a_shady"))')
    assert (named["report"]["backend"], named["report"]["warnings"]) == ("a_shady", [said])


def test_a_program_keeps_its_own_faulthandler(packages: Any) -> None:
    packages.use({"name": "sound"})
    code = "import faulthandler\nfaulthandler.enable()\n" + LATER
    _, _, err = packages.fork(code, "step", str(int(signal.SIGSEGV)))
    assert "Fatal Python error: Segmentation fault" in err

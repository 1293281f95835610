"""Jobs in a child process: any failure of the process becomes a result, and no process is left behind.

Draws: what is compared must be equal, whatever the numbers are.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from transom.contract import Cancelled
from transom.errors import DoesNotFit, MissingExtra, TransomError
from transom.preparation import child
from transom.preparation.child import ChildFailed, ChildResult, run_in_child

pytestmark = pytest.mark.fresh_interpreters

JOBS = """
import ctypes, errno, json, os, signal, subprocess, sys, threading, time
from transom.contract import Cancelled
from transom.errors import DoesNotFit, MissingExtra, TransomError

class Own(TransomError):
    class Inner(TransomError):
        pass

def echo(payload, progress):
    return payload

def segfault(payload, progress):
    print("about to read address 0", flush=True)
    ctypes.string_at(0)

def abort(payload, progress):
    os.abort()

def illegal(payload, progress):
    os.kill(os.getpid(), signal.SIGILL)

def leave(payload, progress):
    os._exit(payload["status"])

def system_exit(payload, progress):
    sys.exit(7)

def hang(payload, progress):
    open(payload["file"], "w").write(str(os.getpid()))
    time.sleep(300)

def hang_in_native_code(payload, progress):
    open(payload["file"], "w").write(str(os.getpid()))
    ctypes.PyDLL(None).sleep(300)  # holds the interpreter's lock: no other thread runs

def fork_and_hang(payload, progress):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    open(payload["file"], "w").write(str(other.pid))
    time.sleep(300)

def garbage(payload, progress):
    os.write(1, b"native garbage without an end")
    print("python garbage")
    print('{"value": "forged"}')
    os.system("echo garbage of a process")
    progress("half", 0.5)
    os.write(1, bytes(range(256)) * 2000)
    return "answer"

def read_input(payload, progress):
    return sys.stdin.read()

def big(payload, progress):
    return payload["text"] * 2

def stages(payload, progress):
    progress("read", None)
    progress("compile", 0)
    time.sleep(0.1)
    progress("compile", 1.0)

def many_stages(payload, progress):
    for i in range(100_000):
        progress("compile", i / 100_000)

def bad_stage(payload, progress):
    progress("compile", "half")

def stages_from_threads(payload, progress):
    def report(name):
        for i in range(50):
            progress(f"{name}{i}" * 50, None)
    threads = [threading.Thread(target=report, args=(n,)) for n in "abcd"]
    [t.start() for t in threads], [t.join() for t in threads]
    return "done"

def fail(payload, progress):
    raise ValueError("too short")

def full_disk(payload, progress):
    raise OSError(errno.ENOSPC, "No space left on device")

def own_error(payload, progress):
    raise {"fit": lambda: DoesNotFit("It does not fit.", "Use less", ["a", "b"]),
           "extra": lambda: MissingExtra("OpenVINO is missing", "openvino"),
           "own": lambda: Own("mine", "f"),
           "inner": lambda: Own.Inner("mine")}[payload["which"]]()

def hidden_error(payload, progress):
    class Hidden(TransomError):
        pass
    raise Hidden("hidden", "fix")

def cancels(payload, progress):
    raise Cancelled("no more")

def not_json(payload, progress):
    return object()

def wait_for_cancel(payload, progress):
    open(payload["file"], "w").write(str(os.getpid()))
    try:
        while True:
            progress("wait", None)
            time.sleep(0.02)
    except Cancelled:
        open(payload["file"] + ".clean", "w").close()
        raise

def crash_at_the_end(payload, progress):
    import atexit
    atexit.register(os.abort)
    return "answer"

def never_end(payload, progress):
    threading.Thread(target=time.sleep, args=(300,)).start()
    return "answer"

def close_everything(payload, progress):
    os.closerange(3, 100)
    time.sleep(0.5)
    os._exit(4)

def surroundings(payload, progress):
    import transom
    return {"cwd": os.getcwd(), "variable": os.environ.get("TRIAL_TEST"), "path": sys.path, "main": __name__}

def loud(payload, progress):
    for i in range(50_000):
        print(f"line {i}", file=sys.stderr)
    os.abort()

def nested(payload, progress):
    from transom.preparation.child import run_in_child
    result = run_in_child("trial_jobs:illegal", {})
    return [result.failure.signal, run_in_child("trial_jobs:echo", {"a": 1}).value]
"""

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


@pytest.fixture(autouse=True)
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the jobs importable here and, through the inherited `sys.path`, in the child."""
    (tmp_path / "trial_jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "trial_jobs", raising=False)


def run(job: str, payload: dict[str, Any] | None = None, **more: Any) -> ChildResult:
    return run_in_child(f"trial_jobs:{job}", payload or {}, **{"timeout": 60, **more})


def read_pid(file: Path) -> int:
    """The process id that a job writes into a file, once it is there."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if file.exists() and (text := file.read_text()):
            return int(text)
        time.sleep(0.02)
    raise AssertionError("the job did not start")


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        if sys.platform == "linux":  # Z: dead, and its new parent has not noticed yet
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
    return True


def dies(pid: int) -> bool:
    """Whether the process ends within 20 seconds."""
    deadline = time.monotonic() + 20
    while lives(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_the_value_comes_back(dice: random.Random) -> None:
    payload = {"é\ud800": [dice.random(), None, True, "\n\0"], "n": {"m": dice.randrange(2**60)}}
    result = run("echo", payload)
    assert result.ok
    assert result.unwrap() == payload
    assert result.seconds > 0


def test_large_payloads_and_values_pass() -> None:
    text = "x" * 5_000_000
    assert run("big", {"text": text}).unwrap() == text * 2


def test_a_segmentation_fault_is_a_result_with_what_was_said_before() -> None:
    result = run("segfault")
    assert not result.ok
    assert result.failure is not None
    assert (result.failure.kind, result.failure.signal) == ("signal", "SIGSEGV")
    assert "invalid memory access" in result.failure.message
    assert "about to read address 0" in result.failure.stderr
    assert "in segfault" in result.failure.stderr  # where Python was
    with pytest.raises(ChildFailed, match="Compiling failed in its child process: killed by SIGSEGV") as caught:
        result.unwrap("Compiling")
    assert caught.value.failure is result.failure


@pytest.mark.parametrize(("job", "name"), [("abort", "SIGABRT"), ("illegal", "SIGILL")])
@posix
def test_other_deaths_are_named_too(job: str, name: str) -> None:
    failure = run(job).failure
    assert failure is not None
    assert (failure.kind, failure.signal, failure.exit_code) == ("signal", name, None)


@pytest.mark.parametrize("status", [0, 3])
def test_leaving_without_an_answer_is_an_exit(status: int) -> None:
    failure = run("leave", {"status": status}).failure
    assert failure is not None
    assert (failure.kind, failure.exit_code, failure.signal) == ("exit", status, "")


def test_a_system_exit_is_an_exit() -> None:
    failure = run("system_exit").failure
    assert failure is not None
    assert (failure.kind, failure.exit_code) == ("exit", 7)


@pytest.mark.parametrize("job", ["hang", "hang_in_native_code"])
def test_a_hang_ends_at_the_timeout_and_the_child_is_dead(tmp_path: Path, job: str) -> None:
    if job == "hang_in_native_code" and sys.platform == "win32":
        job = "hang"
    result = run(job, {"file": str(tmp_path / "pid")}, timeout=2)
    assert result.failure is not None
    assert result.failure.kind == "timeout"
    assert "2 s" in result.failure.message
    assert dies(read_pid(tmp_path / "pid"))


@posix
def test_the_processes_of_a_child_that_is_killed_are_killed_too(tmp_path: Path) -> None:
    assert run("fork_and_hang", {"file": str(tmp_path / "pid")}, timeout=2).failure is not None
    assert dies(read_pid(tmp_path / "pid"))


def test_what_a_library_prints_does_not_break_the_conversation(capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[str, float | None]] = []
    assert run("garbage", progress=lambda stage, share: seen.append((stage, share))).unwrap() == "answer"
    assert ("half", 0.5) in seen
    assert capfd.readouterr() == ("", "")


def test_what_is_printed_before_the_conversation_starts_does_not_break_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("import os; os.write(1, b'hello {\\nhalf a line')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    assert run("echo", {"a": 1}).unwrap() == {"a": 1}


def test_a_job_that_reads_standard_input_finds_nothing() -> None:
    assert run("read_input").unwrap() == ""


def test_progress_is_forwarded_in_order() -> None:
    seen: list[tuple[str, float | None]] = []
    run("stages", progress=lambda stage, share: seen.append((stage, share))).unwrap()
    changes = [s for i, s in enumerate(seen) if i == 0 or seen[i - 1] != s]
    assert [s for s in changes if s != ("start", None)] == [("read", None), ("compile", 0.0), ("compile", 1.0)]


def test_progress_from_several_threads_does_not_mix() -> None:
    seen: set[str] = set()
    assert run("stages_from_threads", progress=lambda stage, share: seen.add(stage)).unwrap() == "done"
    assert seen - {"start"} == {f"{name}{i}" * 50 for name in "abcd" for i in range(50)}


def test_progress_without_end_is_thinned_out() -> None:
    seen: list[str] = []
    run("many_stages", progress=lambda stage, share: seen.append(stage)).unwrap()
    assert 1 <= len(seen) < 5000


def test_a_progress_share_of_the_wrong_type_is_the_jobs_error() -> None:
    failure = run("bad_stage", progress=lambda stage, share: None).failure
    assert failure is not None
    assert failure.exception == "builtins.ValueError"


def test_an_exception_comes_back_with_its_traceback() -> None:
    result = run("fail")
    assert result.failure is not None
    assert (result.failure.kind, result.failure.exception) == ("exception", "builtins.ValueError")
    assert result.failure.message == "ValueError: too short"
    assert 'raise ValueError("too short")' in result.failure.traceback
    with pytest.raises(ChildFailed, match="too short"):
        result.unwrap()


def test_the_number_of_an_os_error_comes_back() -> None:
    import errno

    failure = run("full_disk").failure
    assert failure is not None
    assert failure.errno == errno.ENOSPC


def test_an_error_for_people_comes_back_whole_and_can_be_raised() -> None:
    with pytest.raises(DoesNotFit) as caught:
        run("own_error", {"which": "fit"}).unwrap()
    assert type(caught.value) is DoesNotFit
    assert (caught.value.cause, caught.value.fix) == ("It does not fit.", "Use less")
    assert caught.value.details == ("a", "b")
    assert str(caught.value) == str(DoesNotFit("It does not fit.", "Use less", ["a", "b"]))


def test_an_error_with_attributes_of_its_own_keeps_them() -> None:
    with pytest.raises(MissingExtra, match="pip install") as caught:
        run("own_error", {"which": "extra"}).unwrap()
    assert caught.value.extra == "openvino"


@pytest.mark.parametrize(("which", "name"), [("own", "Own"), ("inner", "Own.Inner")])
def test_a_plugins_own_error_class_comes_back(which: str, name: str) -> None:
    failure = run("own_error", {"which": which}).failure
    assert failure is not None
    exception = failure.to_exception()
    assert isinstance(exception, TransomError)
    assert type(exception).__qualname__ == name
    assert type(exception).__module__ == "trial_jobs"


def test_an_error_class_that_cannot_be_found_here_comes_back_as_its_base() -> None:
    failure = run("hidden_error").failure
    assert failure is not None
    exception = failure.to_exception()
    assert type(exception) is TransomError
    assert str(exception) == "hidden. fix."


def test_a_job_that_cancels_itself_is_cancelled() -> None:
    result = run("cancels")
    assert result.failure is not None
    assert result.failure.kind == "cancelled"
    with pytest.raises(Cancelled, match="no more"):
        result.unwrap()


@pytest.mark.parametrize(
    ("entry", "exception"),
    [
        ("trial_jobs:not_json", "builtins.TypeError"),
        ("trial_jobs:nothing", "builtins.AttributeError"),
        ("no_such_module:f", "builtins.ModuleNotFoundError"),
    ],
)
def test_a_job_that_does_not_exist_is_an_exception(entry: str, exception: str) -> None:
    failure = run_in_child(entry, {}, timeout=60).failure
    assert failure is not None
    assert (failure.kind, failure.exception) == ("exception", exception)


@pytest.mark.parametrize("entry", ["", "module", ":f", "module:"])
def test_an_entry_of_another_form_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match="module:function"):
        run_in_child(entry, {})


def test_a_payload_that_is_not_json_is_refused() -> None:
    with pytest.raises(TypeError):
        run("echo", {"a": object()})


def test_cancelling_reaches_the_job_which_cleans_up(tmp_path: Path) -> None:
    file = tmp_path / "pid"

    def stop_when_started(stage: str, share: float | None) -> None:
        if stage == "wait":
            raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        run("wait_for_cancel", {"file": str(file)}, progress=stop_when_started)
    assert dies(read_pid(file))
    assert (tmp_path / "pid.clean").exists()


@pytest.mark.parametrize("job", ["hang", "hang_in_native_code"])
def test_a_silent_job_can_be_cancelled_too_and_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str
) -> None:
    monkeypatch.setattr(child, "GRACE_SECONDS", 0.2)
    file = tmp_path / "pid"

    def stop_when_started(stage: str, share: float | None) -> None:
        if file.exists() and file.read_text():
            raise Cancelled

    with pytest.raises(Cancelled):
        run("hang" if sys.platform == "win32" else job, {"file": str(file)}, progress=stop_when_started)
    assert dies(read_pid(file))


PARENT = """
import sys
from transom.preparation.child import run_in_child
try:
    run_in_child(f"trial_jobs:{sys.argv[1]}", {"file": sys.argv[2]})
except KeyboardInterrupt:
    print("interrupted")
"""


def start_parent(tmp_path: Path, job: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", PARENT, job, str(tmp_path / "pid")]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@posix
@pytest.mark.parametrize("job", ["wait_for_cancel", "hang_in_native_code"])
def test_ctrl_c_in_the_parent_ends_the_child(tmp_path: Path, job: str) -> None:
    parent = start_parent(tmp_path, job)
    pid = read_pid(tmp_path / "pid")
    parent.send_signal(signal.SIGINT)
    assert parent.communicate(timeout=30)[0].strip() == "interrupted"
    assert dies(pid)
    assert (tmp_path / "pid.clean").exists() == (job == "wait_for_cancel")


@posix
@pytest.mark.parametrize("job", ["hang", "hang_in_native_code"])
def test_a_child_dies_when_its_parent_is_killed(tmp_path: Path, job: str) -> None:
    if job == "hang_in_native_code" and sys.platform != "linux":
        job = "hang"  # only Linux can be asked to kill it
    parent = start_parent(tmp_path, job)
    pid = read_pid(tmp_path / "pid")
    assert lives(pid)
    parent.kill()
    parent.communicate(timeout=30)
    assert dies(pid)


def test_an_answer_counts_whatever_happens_while_the_child_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "EXIT_SECONDS", 0.5)
    assert run("crash_at_the_end").unwrap() == "answer"
    assert run("never_end").unwrap() == "answer"


@posix
def test_a_library_that_closes_every_file_ends_in_an_exit() -> None:
    failure = run("close_everything").failure
    assert failure is not None
    assert (failure.kind, failure.exit_code) == ("exit", 4)


def test_the_child_has_the_parents_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIAL_TEST", "seen")
    value = run("surroundings").unwrap()
    assert Path(value["cwd"]).samefile(tmp_path)
    assert value["variable"] == "seen"
    assert value["path"] == sys.path
    assert value["main"] == "trial_jobs"


def test_only_the_last_lines_of_a_loud_child_are_kept() -> None:
    failure = run("loud").failure
    assert failure is not None
    assert "line 49999" in failure.stderr
    assert "line 1000\n" not in failure.stderr
    assert len(failure.stderr.splitlines()) <= 40


def test_trials_nest() -> None:
    assert run("nested").unwrap() == ["SIGILL", {"a": 1}]


def test_trials_run_side_by_side_in_threads() -> None:
    results: dict[int, Any] = {}

    def one(number: int) -> None:
        results[number] = run("echo", {"n": number}).value

    threads = [threading.Thread(target=one, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: {"n": n} for n in range(4)}


def test_a_child_that_cannot_be_started_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*rest: object, **more: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    failure = run("echo").failure
    assert failure is not None
    assert failure.message == "no child process can be started: Cannot allocate memory"
    monkeypatch.undo()
    monkeypatch.setattr(sys, "executable", "")
    failure = run_in_child("m:f", {}).failure
    assert failure is not None
    assert "no Python interpreter" in failure.message


def test_nothing_is_left_open(request: pytest.FixtureRequest) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0

    jobs: list[Callable[[], ChildResult]] = [lambda: run("echo"), lambda: run("abort"), lambda: run("fail")]
    for job in jobs:
        job()
    before, threads = count(), threading.active_count()
    for job in jobs:
        job()
    assert count() == before
    assert threading.active_count() == threads

"""A plugin that is new here is imported in a child process first: one that ends the process is a record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.fresh_interpreters

DEATHS = {
    "segv": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
    "abort": ("import os; os.abort()", "SIGABRT"),
    "exit": ("import os; os._exit(3)", "status 3"),
    "exit-0": ("import os; os._exit(0)", "status 0"),
}
COUNT = "import os; print('at import', file=open(os.environ['COUNTER'], 'a'))\n"


@pytest.mark.parametrize("how", DEATHS)
def test_a_plugin_whose_import_ends_the_process_is_a_record_and_its_neighbor_is_loaded(
    how: str, environment: Any, sound_source: str
) -> None:
    code, said = DEATHS[how]
    environment.install("deadly", f"{code}\n{sound_source}")
    environment.install_sound("healthy", "healthy")
    backends, [failure] = environment.load()
    assert backends == {"healthy": "healthy"}
    assert (failure["distribution"], failure["stage"]) == ("deadly", "import")
    assert failure["error"] == f"its import ended the process with {said}"
    assert "pip uninstall deadly" in failure["fix"]


def test_a_plugin_that_dies_when_its_backend_is_made_is_a_record(environment: Any, sound_source: str) -> None:
    environment.install("deadly", sound_source.replace("return [Sound()]", "import os; os.abort()"))
    _, [failure] = environment.load()
    assert "SIGABRT" in failure["error"]


def test_a_probe_that_ends_the_process_is_a_record_and_its_neighbor_is_asked(
    environment: Any, sound_source: str
) -> None:
    environment.install("deadly", sound_source.replace("return [Offer", "import os; os.abort()\n        return [Offer"))
    environment.install_sound("healthy", "healthy")
    answers, [failure], _ = environment.run("asked((CPU,))")
    assert [answer[:3] for answer in answers] == [["healthy", "cpu", "Offer"], ["sound", "cpu", "Refusal"]]
    assert failure["stage"] == "probe"
    assert failure["error"] == "the probe of sound ended the process with SIGABRT"


def test_a_plugin_whose_import_hangs_is_a_record_that_names_the_limit(environment: Any, sound_source: str) -> None:
    environment.install("endless", "import threading; threading.Event().wait()\n" + sound_source)
    _, [failure] = environment.run("import transom.plugin_trials as t; t.SECONDS = 0.5; show(load_plugins())")
    assert failure["error"] == "its import did not end within 0.5 s"


def test_a_known_plugin_costs_no_process_until_its_files_change(
    environment: Any, sound_source: str, tmp_path: Path
) -> None:
    counter = tmp_path / "counter"

    def imports() -> int:
        counter.write_text("")
        environment.run("asked((CPU,))", {"COUNTER": str(counter)})
        return len(counter.read_text().splitlines())

    environment.install("counted", COUNT + sound_source)
    assert imports() == 3  # tried, tried with this machine's devices, and here
    assert imports() == 1
    (environment.directory / "counted.py").write_text(COUNT + "# a new version\n" + sound_source)
    assert imports() == 3


@pytest.mark.parametrize("where", ["import", "probe"])
def test_a_plugin_that_what_it_imports_ends_later_is_a_record(
    where: str, environment: Any, sound_source: str, tmp_path: Path
) -> None:
    engine, use = tmp_path / "engine.py", "exec(open({!r}).read())".format(str(tmp_path / "engine.py"))
    engine.write_text("")
    changed = sound_source.replace("return [Offer", f"{use}\n        return [Offer")
    environment.install("shady", f"{use}\n{sound_source}" if where == "import" else changed)
    ask = "asked((CPU,))" if where == "probe" else "show(load_plugins())"
    for _ in range(2):
        assert not environment.run(ask)[1]
    engine.write_text("import os; os.abort()")
    with pytest.raises(AssertionError, match="-6"):  # nothing is known yet
        environment.run(ask)
    for _ in range(2):
        [failure] = environment.run(ask)[1]
        assert "SIGABRT" in failure["error"]
    engine.write_text("")
    for _ in range(2):
        assert not environment.run(ask)[1]


def test_what_raises_at_import_is_reported_from_this_process_with_its_cause(
    environment: Any, sound_source: str
) -> None:
    environment.install("broken", "1 / 0\n" + sound_source)
    for _ in range(2):
        _, [failure] = environment.load()
        assert "ZeroDivisionError" in failure["error"]


def test_a_cache_that_cannot_be_written_keeps_no_plugin_from_loading(environment: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    environment.install_sound("healthy", "healthy")
    backends, failures = environment.run("show(load_plugins())", {"TRANSOM_CACHE": str(tmp_path / "file")})
    assert (backends, failures) == ({"healthy": "healthy"}, [])

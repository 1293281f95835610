"""Each way that a plugin can be broken gives one record, and the other plugins work."""

from __future__ import annotations

import json
from typing import Any

import pytest

CASES: dict[str, tuple[str, str, str, str, str]] = {
    # name: (text to replace, by what, stage, part of the error, part of the fix)
    "a module that is missing": (
        "class Sound:",
        "import no_such_sdk\nclass Sound:",
        "import",
        "no_such_sdk",
        "no_such_sdk",
    ),
    "an error at import": ("class Sound:", "1 / 0\nclass Sound:", "import", "ZeroDivisionError", "pip"),
    "sys.exit at import": ("class Sound:", "import sys\nsys.exit(3)\nclass Sound:", "import", "sys.exit(3)", "pip"),
    "a syntax error": ("class Sound:", "class class Sound:", "import", "SyntaxError", "pip"),
    "an older major version": ("(1, 0)", "(0, 9)", "api", "API 0.9", "pip install --upgrade broken"),
    "a newer major version": ("(1, 0)", "(2, 0)", "api", "API 2.0", "pip install --upgrade transom"),
    "a newer minor version": ("(1, 0)", "(1, 99)", "api", "API 1.99", "pip install --upgrade transom"),
    "an api that is text": ("(1, 0)", "'1.0'", "api", "two whole numbers", "pip"),
    "a missing method": ("def check", "def chekc", "contract", "check", "pip"),
    "a method with other arguments": ("device, options, scratch", "options", "contract", "load does not take", "pip"),
    "a name that is no text": ('"sound"', "None", "contract", "name", "pip"),
    "a reserved name": ('"sound"', '"auto"', "contract", "name", "pip"),
    "a property that raises": (
        'name = "sound"',
        "@property\n    def name(self):\n        raise OSError('no name')",
        "contract",
        "no name",
        "pip",
    ),
    "a hook that raises": ("return [Sound()]", "raise RuntimeError('boom')", "hook", "boom", "pip"),
    "a hook that exits": ("return [Sound()]", "raise SystemExit(1)", "hook", "sys.exit", "pip"),
    "a hook that returns None": ("return [Sound()]", "return None", "hook", "None", "pip"),
    "a hook that returns one backend": ("return [Sound()]", "return Sound()", "hook", "iterable", "pip"),
    "a hook that returns text": ("return [Sound()]", "return 'sound'", "hook", "str", "pip"),
    "a hook that fails half-way": ("return [Sound()]", "yield Sound()\n    raise OSError('cut')", "hook", "cut", "pip"),
    "a class for an instance": ("return [Sound()]", "return [Sound]", "contract", "class", "pip"),
    "a number for a backend": ("return [Sound()]", "return [7]", "contract", "not a backend", "pip"),
    "a misspelt hook": ("def transom_backends", "def transom_backend", "hook", '"transom_backends"', "pip"),
    "an unmarked hook": ("@hookimpl", "", "hook", "hookimpl", "pip"),
    "hook arguments that do not exist": (
        "@hookimpl",
        "@hookimpl\ndef transom_choose(offer):\n    return None\n@hookimpl",
        "hook",
        "offer",
        "pip",
    ),
    "no hook at all": ("@hookimpl\ndef transom_backends", "def helper", "hook", "no hook", "pip"),
}


@pytest.mark.parametrize("case", CASES, ids=[case.replace(" ", "-") for case in CASES])
def test_a_broken_plugin_is_one_record_and_its_neighbor_is_loaded(
    case: str, environment: Any, sound_source: str
) -> None:
    old, new, stage, error, fix = CASES[case]
    assert old in sound_source
    environment.install("Broken", sound_source.replace(old, new), entry_point="broken_point", version="0.3")
    environment.install_sound("healthy", "healthy")
    backends, failures = environment.load()
    assert backends == {"healthy": "healthy"}
    assert len(failures) == 1, json.dumps(failures, indent=2)
    [failure] = failures
    assert (failure["entry_point"], failure["distribution"], failure["stage"]) == ("broken_point", "broken", stage)
    assert error in failure["error"]
    assert "\n" not in failure["error"]
    assert fix in failure["fix"]


def test_an_entry_point_without_a_module_says_so(environment: Any, sound_source: str) -> None:
    environment.install("broken", sound_source, value="no_such_module")
    _, [failure] = environment.load()
    assert failure["stage"] == "import"
    assert "no_such_module" in failure["error"]
    assert "pip uninstall broken" in failure["fix"]
    assert "Install the module" not in failure["fix"]


def test_an_entry_point_that_names_a_class_says_so(environment: Any, sound_source: str) -> None:
    environment.install("broken", sound_source, value="broken:Sound")
    _, [failure] = environment.load()
    assert failure["stage"] == "contract"
    assert "is a class" in failure["error"]


def test_an_entry_point_may_name_an_instance(environment: Any, sound_source: str) -> None:
    plugin = (
        "class Plugin:\n    @hookimpl\n    def transom_backends(self):\n        return (Sound(),)\nplugin = Plugin()\n"
    )
    environment.install("fine", sound_source.replace("@hookimpl\n", "") + plugin, value="fine:plugin")
    assert environment.load() == ({"sound": "fine"}, [])


def test_two_backends_with_one_name_are_one_record_that_names_both_and_neither_is_used(environment: Any) -> None:
    environment.install_sound("alpha", "twin")
    environment.install_sound("beta", "twin", version="2.5")
    environment.install_sound("healthy", "healthy")
    backends, failures = environment.load()
    assert backends == {"healthy": "healthy"}
    [failure] = failures
    assert failure["stage"] == "name"
    assert failure["distribution"] == "alpha, beta"
    assert '"twin"' in failure["error"]
    assert "alpha (alpha 1.0)" in failure["error"]
    assert "beta (beta 2.5)" in failure["error"]
    assert "pip uninstall" in failure["fix"]


@pytest.mark.parametrize("name", ["openvino_cpu", "reference"])
def test_a_plugin_that_takes_the_name_of_a_backend_of_ours_does_not_disable_it(environment: Any, name: str) -> None:
    environment.install_sound("impostor", name)
    distribution, failures = environment.run(
        f"plugins = load_plugins(); print(json.dumps([plugins.backends[{name!r}].distribution, "
        "foreign(plugins.failures)]))"
    )
    assert distribution == "transom"
    [failure] = failures
    assert (failure["distribution"], failure["stage"]) == ("impostor", "name")
    assert f'"{name}" belongs to a backend that comes with Transom' in failure["error"]
    assert "pip uninstall impostor" in failure["fix"]


def test_two_plugins_that_take_the_name_of_ours_are_two_records(environment: Any) -> None:
    for distribution in ("alpha", "beta"):
        environment.install_sound(distribution, "reference")
    backends, failures = environment.load()
    assert backends == {}
    assert [failure["distribution"] for failure in failures] == ["alpha", "beta"]


def test_the_other_backends_of_a_plugin_stay_when_one_breaks_the_contract(environment: Any, sound_source: str) -> None:
    source = sound_source + "\nclass Old(Sound):\n    name = 'old'\n    api = (0, 1)\n"
    environment.install("mixed", source.replace("return [Sound()]", "return [Old(), Sound()]"))
    backends, [failure] = environment.load()
    assert backends == {"sound": "mixed"}
    assert failure["error"].startswith("Old:")


def test_a_misspelt_hook_beside_a_good_one_is_reported_and_the_good_one_works(
    environment: Any, sound_source: str
) -> None:
    environment.install("nearly", sound_source + "\n@hookimpl\ndef transom_opps():\n    return []\n")
    backends, [failure] = environment.load()
    assert backends == {"sound": "nearly"}
    assert failure["error"] == 'there is no hook "transom_opps"; the nearest is "transom_ops"'


def test_an_optional_hook_of_a_newer_transom_is_not_reported(environment: Any, sound_source: str) -> None:
    extra = "\n@hookimpl(optionalhook=True)\ndef transom_future():\n    return []\n"
    environment.install("future", sound_source + extra)
    assert environment.load() == ({"sound": "future"}, [])


def test_metadata_that_cannot_be_read_is_a_record(environment: Any, sound_source: str) -> None:
    environment.install("torn", sound_source)
    (environment.directory / "torn-1.0.dist-info" / "METADATA").unlink()
    environment.install_sound("healthy", "healthy")
    backends, failures = environment.load()
    assert backends == {"healthy": "healthy"}
    [failure] = failures
    assert failure["stage"] == "import"
    assert "torn-1.0.dist-info" in failure["error"]


def test_a_second_copy_of_a_distribution_further_down_the_path_is_ignored(environment: Any, tmp_path: Any) -> None:
    environment.install_sound("healthy", "healthy")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    type(environment)(elsewhere).install_sound("healthy", "healthy", version="0.1")
    backends, failures = environment.run(f"import sys; sys.path.append({str(elsewhere)!r}); show(load_plugins())")
    assert (backends, failures) == ({"healthy": "healthy"}, [])


def test_a_failure_reads_as_cause_and_fix_and_keeps_the_traceback_for_its_author(
    environment: Any, sound_source: str
) -> None:
    environment.install("broken", sound_source.replace("return [Sound()]", "raise RuntimeError('boom')"))
    text, trace = environment.run(
        """
        [failure] = [f for f in load_plugins().failures if f.distribution == "broken"]
        print(json.dumps([str(failure), failure.traceback]))
        """
    )
    assert text.startswith("plugin broken (broken) failed at hook: transom_backends: RuntimeError: boom. Update it")
    assert "raise RuntimeError('boom')" in trace
    assert trace not in text


def test_plugins_are_loaded_once_a_process_and_again_on_request(environment: Any) -> None:
    environment.install_sound("healthy", "healthy")
    assert environment.run(
        """
        first = load_plugins()
        print(json.dumps([load_plugins() is first, load_plugins(refresh=True) is first]))
        """
    ) == [True, False]

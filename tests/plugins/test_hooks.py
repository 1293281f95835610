"""`transom_choose` and `transom_ops`, one plugin at a time."""

from __future__ import annotations

from typing import Any

ASK = """
plugins = load_plugins()
chosen = plugins.choose([("one", Offer("cpu", "native", "x")), ("two", Offer("cpu", "generic", "y"))])
print(json.dumps([chosen, foreign(plugins.failures)]))
"""


def policy(body: str) -> str:
    return f"from transom.contract import hookimpl\n@hookimpl\ndef transom_choose(offers):\n    {body}\n"


def test_a_policy_names_a_backend_and_is_named_itself(environment: Any) -> None:
    environment.install("site-policy", policy("return offers[-1][0]"), entry_point="policy", version="4.2")
    assert environment.run(ASK) == [["two", "policy (site-policy 4.2)"], []]


def test_a_policy_that_returns_none_leaves_it_to_the_next(environment: Any) -> None:
    environment.install("a-policy", policy("return None"))
    environment.install("b-policy", policy("return 'one'"))
    assert environment.run(ASK) == [["one", "b_policy (b-policy 1.0)"], []]


def test_a_policy_that_raises_or_names_another_backend_is_recorded_and_the_next_is_asked(environment: Any) -> None:
    environment.install("a-policy", policy("raise KeyError('x')"))
    environment.install("b-policy", policy("return 'three'"))
    environment.install("c-policy", policy("return 7"))
    environment.install("d-policy", policy("return 'two'"))
    chosen, failures = environment.run(ASK)
    assert chosen == ["two", "d_policy (d-policy 1.0)"]
    assert [failure["distribution"] for failure in failures] == ["a-policy", "b-policy", "c-policy"]
    assert "'three'" in failures[1]["error"]
    assert "one, two" in failures[1]["fix"]


def test_without_a_policy_nothing_is_chosen(environment: Any) -> None:
    assert environment.run(ASK) == [None, []]


OPS = """
import dataclasses
from transom.contract import hookimpl

@dataclasses.dataclass
class Schema:
    domain: str
    name: str

@hookimpl
def transom_ops():
    {body}
"""

ASK_OPS = """
plugins = load_plugins()
before = len(foreign(plugins.failures))
mine = [[s.domain, s.name] for s in plugins.operators() if s.domain.startswith("com.")]
plugins.operators()
print(json.dumps([mine, before, foreign(plugins.failures)]))
"""


def test_operators_are_asked_for_lazily_and_once(environment: Any) -> None:
    environment.install("ops", OPS.format(body="return [Schema('com.example', 'Fold')]"))
    assert environment.run(ASK_OPS) == [[["com.example", "Fold"]], 0, []]


def test_a_broken_operator_hook_is_a_record_and_the_others_are_taken(environment: Any) -> None:
    environment.install("a-ops", OPS.format(body="raise ValueError('no shape rule')"))
    environment.install("b-ops", OPS.format(body="return ['Fold']"))
    environment.install("c-ops", OPS.format(body="return [Schema('', 'MatMul'), Schema('transom', 'CachedAttention')]"))
    environment.install("d-ops", OPS.format(body="return [Schema('com.example', 'Fold')]"))
    mine, before, failures = environment.run(ASK_OPS)
    assert (mine, before) == ([["com.example", "Fold"]], 0)
    assert [f["distribution"] for f in failures] == ["a-ops", "b-ops", "c-ops", "c-ops"]
    assert {f["stage"] for f in failures} == {"ops"}
    assert "no shape rule" in failures[0]["error"]
    assert "not an OpSchema" in failures[1]["error"]
    assert "ai.onnx::MatMul" in failures[2]["error"]
    assert "transom::CachedAttention" in failures[3]["error"]


def test_an_operator_that_two_plugins_define_is_taken_from_neither(environment: Any) -> None:
    environment.install("a-ops", OPS.format(body="return [Schema('com.example', 'Fold')]"))
    environment.install("b-ops", OPS.format(body="return [Schema('com.example', 'Fold')]"))
    mine, _, [failure] = environment.run(ASK_OPS)
    assert mine == []
    assert failure["distribution"] == "a-ops, b-ops"
    assert "com.example::Fold" in failure["error"]


IDENTITY = """
from transom.preparation.plugin_operators import operators_identity
print(json.dumps([operators_identity(load_plugins()), bool(load_plugins().bringing_operators())]))
"""


def test_plugins_without_operators_have_no_operators_identity(environment: Any) -> None:
    environment.install("policy", policy("return None"))
    assert environment.run(IDENTITY) == ["", False]


def test_the_operators_identity_changes_with_the_version_and_each_file_of_the_package(environment: Any) -> None:
    source = OPS.format(body="raise ValueError('is not asked')")
    package = environment.directory / "acme"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "hooks.py").write_text(source)
    (package / "bodies.py").write_text("FACTOR = 2\n")
    environment.install("acme-ops", "", value="acme.hooks")
    seen = [environment.run(IDENTITY)]
    assert environment.run(IDENTITY) == seen[0]
    (package / "bodies.py").write_text("FACTOR = 3\n")
    seen.append(environment.run(IDENTITY))
    metadata = environment.directory / "acme_ops-1.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("1.0", "1.1"))
    seen.append(environment.run(IDENTITY))
    environment.install("b-ops", source)
    seen.append(environment.run(IDENTITY))
    assert all(brings for _, brings in seen)
    assert len({identity for identity, _ in seen}) == len(seen)


def test_an_operator_that_breaks_a_rule_is_a_failure_of_its_plugin(environment: Any) -> None:
    environment.install("ops", OPS.format(body="return [Schema('com.example', 'Fold')]"))
    [failure] = environment.run(
        """
        from transom.preparation.plugin_operators import register_operators
        plugins = load_plugins()
        register_operators(plugins)
        register_operators(plugins)
        print(json.dumps(foreign(plugins.failures)))
        """
    )
    assert (failure["distribution"], failure["stage"]) == ("ops", "ops")
    assert "com.example::Fold is a Schema, not an OpSchema" in failure["error"]

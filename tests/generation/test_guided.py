"""Guided output always parses and matches, even if the model's logits are noise.

Draws: whatever noise is generated must fit the grammar.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from typing import Any

import numpy as np
import pytest
from fakes import BYTE_VOCABULARY, EOS, ByteTokenizer, loaded, text_session

from transom.errors import MissingExtra, OptionError
from transom.generation.guided import GuideCompiler, _grammar
from transom.generation.model import Model
from transom.generation.params import SamplingParams
from transom.generation.report import incomplete
from transom.text import GenerationDefaults

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "ü"]}, "minItems": 1, "maxItems": 3},
        "inner": {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def fits(value: Any) -> bool:
    return (
        set(value) <= {"name", "age", "tags", "inner"}
        and isinstance(value["name"], str)
        and len(value["name"]) <= 8
        and isinstance(value["age"], int)
        and 0 <= value["age"] <= 150
        and 1 <= len(value["tags"]) <= 3
        and set(value["tags"]) <= {"a", "b", "ü"}
        and ("inner" not in value or isinstance(value["inner"]["ok"], bool))
    )


@pytest.fixture
def model() -> Model:
    return Model(loaded(text_session(context=4000)))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9}], ids=str)
def test_noise_becomes_json_that_fits_the_schema(model: Model, options: Any, rng: np.random.Generator) -> None:
    for _ in range(5):
        prompt = "".join(chr(c) for c in rng.integers(32, 127, 10))
        result = model.generate(prompt, json_schema=SCHEMA, seed=int(rng.integers(2**32)), **options)
        assert result.finish_reason == "stop"
        assert fits(json.loads(result.text)), result.text


def test_noise_matches_the_regular_expression_as_a_whole(model: Model) -> None:
    for seed in range(8):
        text = model.generate("x", regex=r"[A-Z][a-z]{2,6}, (19|20)\d\d!?", temperature=1.0, seed=seed).text
        assert re.fullmatch(r"[A-Z][a-z]{2,6}, (19|20)\d\d!?", text)


def test_noise_becomes_one_of_the_choices(model: Model) -> None:
    choices = ('say "yes"', "no\n", "vielleicht – später", "no")
    seen = {model.generate("x", choice=choices, temperature=3.0, seed=seed).text for seed in range(40)}
    assert seen <= set(choices)
    assert len(seen) > 1


@pytest.mark.parametrize("grammar", ['start: "(" start ")" | "x"', 'root ::= "(" root ")" | "x"'], ids=["lark", "gbnf"])
def test_noise_follows_a_recursive_grammar(model: Model, grammar: str) -> None:
    for seed in range(5):
        text = model.generate("y", grammar=grammar, temperature=1.0, seed=seed).text
        assert re.fullmatch(r"\(*x\)*", text)
        assert text.count("(") == text.count(")")


def test_several_answers_and_batch_mates_do_not_disturb_each_other(model: Model) -> None:
    alone = {}
    asks: dict[str, dict[str, Any]] = {
        "schema": {"json_schema": SCHEMA, "n": 3, "temperature": 1.0, "seed": 1},
        "regex": {"regex": "[ab]{10,20}", "n": 2, "temperature": 1.0, "seed": 2},
        "free": {"max_new_tokens": 30, "temperature": 1.0, "seed": 3},
    }
    for name, options in asks.items():
        alone[name] = [choice.token_ids for choice in model.generate("p", **options).choices]
    for choice in model.generate("p", **asks["schema"]).choices:
        assert fits(json.loads(choice.text))
    together: dict[str, Any] = {}

    def work(name: str) -> None:
        together[name] = [choice.token_ids for choice in model.generate("p", **asks[name]).choices]

    threads = [threading.Thread(target=work, args=(name,)) for name in asks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert together == alone
    assert len(set(alone["schema"])) == 3


def test_output_cut_short_says_so(model: Model) -> None:
    result = model.generate("x", json_schema=SCHEMA, max_new_tokens=3)
    (choice,) = result.choices
    assert (choice.finish_reason, choice.cut_by, choice.conforms) == ("length", "max_new_tokens", False)


@pytest.mark.parametrize(
    ("options", "conforms"),
    [
        ({"choice": ("abc",)}, True),
        ({"regex": "a{3,}", "max_new_tokens": 3}, True),
        ({"regex": "a{4,}", "max_new_tokens": 3}, False),
        ({"regex": "a{9}", "stop": "aaa"}, False),
        ({"regex": "a{9}", "stop_token_ids": ord("a")}, False),
        ({"regex": "a{0,9}éb", "stop": "b"}, False),
        ({"regex": "aé?b?", "stop": "b", "logit_bias": {EOS: -99.0}}, True),
        ({"regex": "(aé)?b", "stop_token_ids": ord("b")}, False),
        ({"regex": "b?", "stop_token_ids": ord("b"), "logit_bias": {EOS: -99.0}}, True),
        ({"max_new_tokens": 3}, None),
    ],
    ids=str,
)
def test_an_answer_says_whether_it_conforms_to_its_guide(model: Model, options: Any, conforms: bool | None) -> None:
    (choice,) = model.generate("x", **options).choices
    assert choice.conforms is conforms
    assert model.generate("x", **options).to_dict()["choices"][0]["conforms"] is conforms


def test_a_cancelled_answer_conforms_to_nothing_and_is_no_error(model: Model) -> None:
    cancel = threading.Event()
    cancel.set()
    result = model.generate("x", json_schema=SCHEMA, cancel=cancel)
    assert (result.finish_reason, result.choices[0].conforms) == ("cancelled", False)
    assert incomplete(model.report, result) is None


def test_white_space_between_json_tokens_has_an_end() -> None:
    session = text_session(context=4000)
    inner = session._run
    spaces = [ord(c) for c in " \n\t\r"]

    def run(work: Any) -> Any:
        output = inner(work)
        if isinstance(output, np.ndarray):
            output[..., spaces] += 50
        return output

    session._run = run  # type: ignore[method-assign]
    result = Model(loaded(session)).generate("x", json_schema={"type": "object"}, max_new_tokens=400)
    assert result.finish_reason == "stop"
    json.loads(result.text)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"regex": "(a"}, "regex is not usable"),
        ({"json_schema": {"type": "no such type"}}, "json_schema is not usable"),
        ({"grammar": "start: undefined_rule"}, "grammar is not usable"),
        ({"grammar": 'root ::= "unclosed'}, "grammar cannot be read"),
    ],
    ids=str,
)
def test_a_guide_that_is_not_valid_is_refused_before_any_work(model: Model, options: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        model.stream("x", **options)


def test_a_model_without_end_token_stops_where_nothing_more_is_allowed() -> None:
    model = Model(loaded(text_session(), defaults=GenerationDefaults(bos_id=256)))
    assert model.generate("x", choice=("abc",)).text == "abc"
    assert model.generate("x", regex="a+", max_new_tokens=9).text == "a" * 9


def test_the_end_token_is_never_allowed_too_early() -> None:
    guides = GuideCompiler(ByteTokenizer(), BYTE_VOCABULARY, [EOS])  # type: ignore[arg-type]
    guide = guides.compile(SamplingParams(regex="ab?"))
    assert allowed(guide) == {ord("a")}
    assert not guide.accept(ord("a"))
    assert allowed(guide) == {ord("b"), EOS}
    other = guide.copy()
    assert other.accept(ord("b"))
    assert allowed(guide) == {ord("b"), EOS}
    assert guide.accept(EOS)


def allowed(guide: Any) -> set[int]:
    scores = np.zeros(BYTE_VOCABULARY + 7, dtype=np.float32)  # rows may be wider than the tokenizer
    guide.restrict(scores)
    return set(np.flatnonzero(scores == 0).tolist())


def test_without_the_library_the_fix_is_the_command(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transom.generation.guided.find_spec", lambda name: None)
    for name in [name for name in sys.modules if name.startswith("llguidance")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingExtra, match=r"pip install 'transom\[guided\]'"):
        model.generate("x", regex="a")


@pytest.mark.parametrize("depth", [300, 5000])
def test_a_schema_nested_too_deep_is_an_error(depth: int) -> None:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    with pytest.raises(OptionError, match=r"json_schema cannot be used: .*recursion"):
        _grammar(SamplingParams(json_schema=schema))


def test_a_schema_text_nested_too_deep_is_an_error() -> None:
    with pytest.raises(OptionError, match="json_schema is not JSON"):
        SamplingParams(json_schema="[" * 99999)

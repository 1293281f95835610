"""Sampling options: errors name the value and its range, and defaults have the documented precedence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from transom.errors import OptionError
from transom.generation.params import SamplingParams, resolve
from transom.text import GenerationDefaults


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("temperature", -0.1, "from 0 to 100"),
        ("temperature", math.nan, "from 0 to 100"),
        ("temperature", "hot", "from 0 to 100"),
        ("temperature", True, "from 0 to 100"),
        ("top_k", -1, "0 or more (0 turns it off)"),
        ("top_k", 2.5, "0 or more"),
        ("top_p", 0.0, "above 0, up to 1"),
        ("top_p", 1.1, "above 0, up to 1"),
        ("min_p", 1.5, "from 0 to 1"),
        ("repetition_penalty", 0, "above 0"),
        ("presence_penalty", 3, "from -2 to 2"),
        ("frequency_penalty", -2.1, "from -2 to 2"),
        ("seed", -1, "whole number from 0"),
        ("seed", 2**64, "whole number from 0"),
        ("stop", "", "not empty"),
        ("stop", ["a", 5], "not empty"),
        ("stop", b"x", "list of strings"),
        ("stop_token_ids", [-1], "0 or more"),
        ("stop_token_ids", "12", "token ids"),
        ("logit_bias", [1], "mapping"),
        ("logit_bias", {1: math.inf}, "finite number, or -inf"),
        ("logit_bias", {"x": 1}, "whole number"),
        ("max_new_tokens", 0, "1 or more"),
        ("n", 0, "from 1 to"),
        ("logprobs", -1, "0 or more"),
        ("ignore_eos", "yes", "True or False"),
        ("cache_salt", 7, "a string"),
        ("json_schema", 5, "pydantic"),
        ("regex", "", "not empty"),
        ("choice", [], "at least one"),
        ("choice", [""], "not empty"),
        ("grammar", 3, "not empty"),
    ],
)
def test_a_wrong_value_is_named_with_the_option_and_the_range(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(OptionError) as caught:
        SamplingParams(**{name: value})
    assert name in str(caught.value)
    assert allowed in str(caught.value)


def test_an_unknown_option_gets_the_nearest_match() -> None:
    with pytest.raises(OptionError, match=r'"temprature" is not an option.*Did you mean "temperature"\?'):
        resolve({"temprature": 1})


def test_params_in_the_place_of_something_else_say_what_they_should_be() -> None:
    with pytest.raises(OptionError, match="params is a dict, not SamplingParams"):
        resolve({}, params={"top_k": 3})  # type: ignore[arg-type]


def test_numpy_numbers_and_strings_from_json_are_taken() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5),
        top_k=np.int64(3),
        logit_bias={"7": -100, np.int32(8): 1},
        stop="x",
        stop_token_ids=4,
    )
    assert (params.temperature, params.top_k, params.logit_bias) == (0.5, 3, {7: -100.0, 8: 1.0})
    assert (params.stop, params.stop_token_ids) == (("x",), (4,))


def test_a_schema_may_be_a_dictionary_json_text_or_a_pydantic_class() -> None:
    class Model:
        @staticmethod
        def model_json_schema() -> dict[str, Any]:
            return {"type": "object"}

    for schema in ({"type": "object"}, '{"type": "object"}', Model):
        assert SamplingParams(json_schema=schema).json_schema == {"type": "object"}  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="json_schema is not JSON"):
        SamplingParams(json_schema="{")


def test_two_guides_at_once_are_refused() -> None:
    with pytest.raises(OptionError, match="regex and choice at once"):
        SamplingParams(regex="a", choice=("b",))


def test_several_greedy_answers_are_refused_since_they_would_be_one() -> None:
    with pytest.raises(OptionError, match="n=3 with temperature=0 would give the same answer 3 times"):
        SamplingParams(n=3)


def test_without_anything_said_generation_is_greedy() -> None:
    assert resolve({}).greedy
    assert resolve({}, defaults=GenerationDefaults()).greedy


def test_arguments_win_over_the_models_defaults_and_those_over_greedy() -> None:
    defaults = GenerationDefaults(temperature=0.6, top_p=0.9, repetition_penalty=1.1)
    params = resolve({"top_p": 0.5, "min_p": None}, defaults=defaults)
    assert (params.temperature, params.top_p, params.min_p, params.repetition_penalty) == (0.6, 0.5, 0.0, 1.1)
    assert resolve({"temperature": 0}, defaults=defaults).greedy


def test_a_model_that_says_greedy_keeps_its_sampling_values_to_itself() -> None:
    defaults = GenerationDefaults(sample=False, temperature=0.6, top_k=5, repetition_penalty=1.1)
    params = resolve({}, defaults=defaults)
    assert (params.greedy, params.top_k, params.repetition_penalty) == (True, 0, 1.1)


def test_whoever_names_a_way_of_sampling_wants_to_sample() -> None:
    for options in ({"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.1}, {"n": 2}):
        assert resolve(options).temperature == 1.0
    assert resolve({}, defaults=GenerationDefaults(sample=True)).temperature == 1.0
    assert resolve({"top_p": 0.9, "temperature": 0.0}).greedy


def test_a_default_that_makes_no_sense_is_left_out() -> None:
    assert resolve({}, defaults=GenerationDefaults(top_p=0.0, temperature=0.7)).top_p == 1.0


def test_complete_params_are_taken_as_they_are_but_for_named_options() -> None:
    params = SamplingParams(temperature=0.3, seed=1)
    defaults = GenerationDefaults(temperature=0.9, top_k=3)
    assert resolve({}, params=params, defaults=defaults) == params
    assert resolve({"seed": 2}, params=params, defaults=defaults) == SamplingParams(temperature=0.3, seed=2)

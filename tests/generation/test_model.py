"""`Model`: text in, text out, and one clear sentence for every wrong use.

Draws: what is compared must be equal, whatever the numbers are.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

import numpy as np
import pytest
from fakes import BOS, BYTE_VOCABULARY, END_OF_TURN, EOS, FakeSession, Script, loaded, logits_after, text_session
from hypothesis import given, settings
from hypothesis import strategies as st

from transom.errors import ContextExceeded, EngineError, OptionError, TransomError
from transom.generation.engine import ModelClosed
from transom.generation.model import InputSpec, Loaded, Model
from transom.text import ChatTemplate, GenerationDefaults


def saying(text: str, prompt: str = "Q", *, ends: bool = True, **options: Any) -> Model:
    """A model that answers a prompt with a text."""
    session = text_session(**options)
    Script(session, list(prompt.encode()), [*text.encode(), *([EOS] if ends else [])])
    return Model(loaded(session))


def test_generate_gives_text_tokens_usage_and_timings() -> None:
    result = saying("grün").generate("Q")
    assert (result.text, str(result), result.finish_reason) == ("grün", "grün", "stop")
    assert result.token_ids == (*"grün".encode(), EOS)
    assert result.choices[0].stop == EOS
    assert (result.usage.prompt_tokens, result.usage.completion_tokens, result.usage.total_tokens) == (1, 6, 7)
    timings = result.timings
    assert 0 < timings.queued <= timings.time_to_first_token <= timings.total
    assert timings.prefill_tokens_per_second > 0
    assert timings.decode_tokens_per_second > 0
    assert result.logprobs is None


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=30), st.lists(st.sampled_from(["a", "\n\n", "é", "🙂", "ab"]), max_size=3), st.booleans())
def test_the_pieces_of_a_stream_are_whole_characters_and_make_up_the_text(
    text: str, stops: list[str], ends: bool
) -> None:
    options: dict[str, Any] = {"stop": stops, "max_new_tokens": max(1, len(text.encode())) if not ends else None}
    stream = saying(text, ends=ends).stream("Q", **options)
    pieces = list(stream)
    result = stream.result
    assert "".join(pieces) == result.text
    assert sum((piece.token_ids for piece in pieces), ()) == result.token_ids
    if ends or text:
        cut = min((text.find(s) + len(s), text.find(s)) for s in stops if s in text)[1] if any(
            s in text for s in stops
        ) else len(text)  # fmt: skip
        assert result.text == text[:cut]
        assert result.finish_reason == ("stop" if ends or cut < len(text) else "length")


def test_a_stop_string_over_several_tokens_is_never_shown() -> None:
    model = saying("one END two")
    stream = model.stream("Q", stop="END")
    assert "".join(stream) == "one "
    assert model._loaded.session.live == set()  # type: ignore[attr-defined]
    assert (stream.result.finish_reason, stream.result.choices[0].stop) == ("stop", "END")
    assert stream.result.token_ids == tuple(b"one END")


def test_what_only_looked_like_a_stop_string_is_shown_in_the_end() -> None:
    assert saying("one EN").generate("Q", stop="END").text == "one EN"


def test_a_special_token_may_be_named_as_a_stop_string() -> None:
    session = text_session()
    Script(session, [ord("Q")], [*b"hi", END_OF_TURN, *b"more"])
    result = Model(loaded(session)).generate("Q", stop="<|im_end|>", max_new_tokens=5)
    assert (result.text, result.choices[0].stop) == ("hi", END_OF_TURN)


def test_a_stop_token_ends_the_answer_and_is_not_part_of_the_text() -> None:
    result = saying("abc").generate("Q", stop_token_ids=[ord("c")])
    assert (result.text, result.finish_reason, result.choices[0].stop) == ("ab", "stop", ord("c"))


def test_ignore_eos_goes_on() -> None:
    result = saying("ab").generate("Q", ignore_eos=True, max_new_tokens=6)
    assert (len(result.token_ids), result.finish_reason) == (6, "length")


def test_bytes_that_end_within_a_character_become_a_replacement_character() -> None:
    session = text_session()
    Script(session, [ord("Q")], [*"é".encode()[:1], EOS])
    assert Model(loaded(session)).generate("Q").text == "\ufffd"


def test_without_a_limit_generation_ends_when_the_context_is_full() -> None:
    result = saying("x" * 50, context=20).generate("Q")
    assert (result.finish_reason, len(result.token_ids)) == ("length", 19)


def test_the_models_own_limit_holds_where_the_caller_gives_none() -> None:
    session = text_session()
    model = Model(loaded(session, defaults=GenerationDefaults(max_new_tokens=3)))
    (choice,) = model.generate("x").choices
    assert (choice.finish_reason, choice.cut_by) == ("length", "model_default")
    assert len(model.generate("Q").token_ids) == 3
    assert len(model.generate("Q", max_new_tokens=5).token_ids) == 5


def test_what_the_authors_never_want_generated_is_not_and_their_stop_strings_hold() -> None:
    session = text_session()
    Script(session, [ord("Q")], list(b"ab|c"))
    model = Model(loaded(session, defaults=GenerationDefaults(stop=("|",), suppress_ids=(ord("a"),))))
    result = model.generate("Q", max_new_tokens=8)
    assert ord("a") not in result.token_ids
    assert result.text.endswith("b")
    assert result.choices[0].stop == "|"


def test_several_answers_come_interleaved_and_the_first_is_the_one_alone() -> None:
    model = Model(loaded(text_session()))
    one = model.generate("Q", seed=4, temperature=1.0, max_new_tokens=12)
    stream = model.stream("Q", seed=4, temperature=1.0, max_new_tokens=12, n=3)
    pieces = list(stream)
    result = stream.result
    assert result.token_ids == one.token_ids
    assert len({choice.token_ids for choice in result.choices}) == 3
    for choice in result.choices:
        own = [piece for piece in pieces if piece.choice == choice.index]
        assert "".join(own) == choice.text
        assert sum((piece.token_ids for piece in own), ()) == choice.token_ids
    assert result.usage.completion_tokens == sum(len(choice.token_ids) for choice in result.choices)
    assert result.usage.prompt_tokens == 1


def test_one_answer_may_stop_early_while_the_others_go_on() -> None:
    model = Model(loaded(text_session()))
    free = model.generate("Q", seed=4, temperature=1.0, max_new_tokens=30, n=3)
    stop = next(
        c for c in map(chr, range(33, 127))
        if sum(c in choice.text for choice in free.choices) == 1
    )  # fmt: skip
    stopped = model.generate("Q", seed=4, temperature=1.0, max_new_tokens=30, n=3, stop=stop)
    for before, after in zip(free.choices, stopped.choices, strict=True):
        if stop in before.text:
            assert (after.text, after.finish_reason) == (before.text[: before.text.index(stop)], "stop")
        else:
            assert after.token_ids == before.token_ids
    ahead = model.stream("Q", seed=4, temperature=1.0, max_new_tokens=30, n=3, stop=stop)
    model.generate("other", max_new_tokens=40, ignore_eos=True)  # its steps carry the stream along, beyond the stop
    assert ahead.result.choices == stopped.choices


def test_log_probabilities_come_for_each_token_with_its_bytes() -> None:
    stream = saying("hé").stream("Q", logprobs=2)
    pieces = list(stream)
    result = stream.result
    assert result.logprobs is not None
    assert [entry.id for entry in result.logprobs] == list(result.token_ids)
    assert result.logprobs[1].bytes == "é".encode()[:1]
    assert all(len(entry.top) == 2 and entry.top[0].id == entry.id for entry in result.logprobs)
    assert all(-0.01 < entry.logprob <= 0 for entry in result.logprobs)
    assert sum(((piece.logprobs or ()) for piece in pieces), ()) == result.logprobs
    as_json = result.to_dict()["choices"][0]["logprobs"]
    assert [entry["token"] for entry in as_json][:2] == ["h", [0xC3]]


def test_a_stream_can_be_cancelled_by_its_reader() -> None:
    session = text_session()
    model = Model(loaded(session))
    stream = model.stream("Q", max_new_tokens=400, ignore_eos=True)
    for i, _ in enumerate(stream):
        if i == 5:
            stream.cancel()
    assert stream.result.finish_reason == "cancelled"
    assert 0 < len(stream.result.token_ids) < 30
    assert session.live == set()


def test_generate_can_be_cancelled_from_another_thread() -> None:
    session = text_session(context=100_000, step_seconds=0.001)
    stop = threading.Event()
    timer = threading.Timer(0.1, stop.set)
    timer.start()
    result = Model(loaded(session)).generate("Q", cancel=stop, ignore_eos=True)
    assert result.finish_reason == "cancelled"
    assert len(result.token_ids) > 1
    assert session.live == set()


def test_leaving_the_block_of_a_stream_gives_its_cache_back() -> None:
    session = text_session()
    with Model(loaded(session)).stream("Q", ignore_eos=True) as stream:
        next(stream)
        assert len(session.live) == 1
    assert session.live == set()
    assert stream.done


def test_a_stream_that_is_forgotten_gives_its_cache_back() -> None:
    session = text_session()
    model = Model(loaded(session))
    stream = model.stream("Q", ignore_eos=True)
    next(stream)
    assert len(session.live) == 1
    del stream
    gc.collect()
    assert session.live == set()


def test_streams_of_one_thread_run_together() -> None:
    session = text_session()
    model = Model(loaded(session))
    streams = [model.stream(f"Q{i}", max_new_tokens=20, ignore_eos=True) for i in range(4)]
    together = [stream.result.token_ids for stream in streams]
    assert len(session.steps) < 30
    assert together == [model.generate(f"Q{i}", max_new_tokens=20, ignore_eos=True).token_ids for i in range(4)]


def test_what_was_computed_ahead_of_a_stop_string_is_not_counted() -> None:
    session = text_session()
    Script(session, [ord("Q")], [*b"one END two three", EOS])
    model = Model(loaded(session))
    ahead = model.stream("Q", stop="END")
    model.generate("other", max_new_tokens=30, ignore_eos=True)  # its steps carry the stream along
    steps = len(session.steps)
    assert (ahead.result.text, ahead.result.token_ids) == ("one ", tuple(b"one END"))
    assert len(session.steps) == steps


def test_a_slow_reader_does_not_make_the_model_look_slow() -> None:
    stream = Model(loaded(text_session())).stream("Q", max_new_tokens=5, ignore_eos=True)
    for _ in stream:
        time.sleep(0.05)
    assert stream.result.timings.decode_tokens_per_second > 20
    assert stream.result.timings.total > 0.2


def test_progress_is_reported_in_the_callers_thread() -> None:
    calls: list[tuple[int, int, int]] = []
    model = Model(loaded(text_session(max_tokens=10)))
    model.generate("x" * 25, max_new_tokens=1, progress=lambda d, t: calls.append((d, t, threading.get_ident())))
    assert [call[:2] for call in calls] == [(10, 25), (20, 25), (25, 25)]
    assert {call[2] for call in calls} == {threading.get_ident()}


def test_an_error_in_the_progress_callback_ends_the_generation_and_leaks_nothing() -> None:
    session = text_session(max_tokens=10)

    def fail(done: int, total: int) -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        Model(loaded(session)).generate("x" * 25, progress=fail)
    assert session.live == set()


def test_a_failure_in_the_middle_is_raised_again_by_the_result() -> None:
    session = text_session()
    stream = Model(loaded(session)).stream("Q", ignore_eos=True)
    next(stream)

    def fail(works: Any) -> None:
        raise RuntimeError("bus error")

    session.before = fail
    with pytest.raises(EngineError, match="bus error"):
        list(stream)
    for _ in range(2):
        with pytest.raises(EngineError, match="bus error"):
            _ = stream.result
    assert session.live == set()


# Prompts


def test_text_bytes_ids_and_arrays_are_the_same_prompt() -> None:
    model = Model(loaded(text_session()))
    texts = [model.generate(p, max_new_tokens=8).token_ids for p in ("hé", "hé".encode(), [*"hé".encode()])]
    texts.append(model.generate(np.array([*"hé".encode()], dtype=np.int32), max_new_tokens=8).token_ids)  # type: ignore[arg-type]
    assert len(set(texts)) == 1


@pytest.mark.parametrize("prompt", ["", b"", [], ()])
def test_an_empty_prompt_starts_from_the_beginning_of_text(prompt: Any) -> None:
    model = Model(loaded(text_session()))
    assert model.generate(prompt, max_new_tokens=4).prompt_token_ids == (BOS,)


def test_an_empty_prompt_without_a_beginning_of_text_token_is_refused() -> None:
    session = FakeSession()
    with pytest.raises(OptionError, match="prompt is empty, and the model has no beginning-of-text token"):
        Model(loaded(session, text=False)).generate([])


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (b"ok \xff\xfe", r"not UTF-8 text: byte 0xff at position 3"),
        (
            [1, 2, BYTE_VOCABULARY],
            f"token id {BYTE_VOCABULARY}, which the model does not have. Ids range from 0 to 258",
        ),
        ([-1], "token id -1"),
        ([1.5], "float64"),
        ([[1, 2]], "2 dimensions"),
        ([[1], [1, 2]], "ragged list"),
        (["a", "b"], "list of strings. Pass one string per call"),
        (None, "The prompt is None"),
        (7, "The prompt is a int"),
    ],
)
def test_a_prompt_that_is_none_is_refused_with_the_reason(prompt: Any, said: str) -> None:
    session = text_session()
    with pytest.raises(OptionError, match=said):
        Model(loaded(session)).generate(prompt)
    assert session.steps == []


def test_a_prompt_longer_than_the_context_is_refused_before_any_work() -> None:
    session = text_session(context=100)
    model = Model(loaded(session, context=50))
    with pytest.raises(
        ContextExceeded, match=r"prompt has 60 tokens; .* context of 50\. Shorten .* context=61 or more"
    ):
        model.generate("x" * 60)
    with pytest.raises(ContextExceeded, match=r"leaves no room"):
        model.generate("x" * 50)
    with pytest.raises(ContextExceeded, match=r"40 tokens and 20 new .* together 60; .* at most max_new_tokens=10"):
        model.stream("x" * 40, max_new_tokens=20)
    with pytest.raises(ContextExceeded, match=r"the model supports 100 tokens"):
        model.generate("x" * 120)
    with pytest.raises(ContextExceeded):
        model.logits([1] * 51)
    assert session.steps == []
    assert len(model.generate("x" * 49).token_ids) == 1


def test_a_pool_smaller_than_the_context_is_the_context() -> None:
    model = Model(loaded(text_session(page_tokens=8, pages=5)))
    assert model.context == 40
    with pytest.raises(ContextExceeded, match="context of 40"):
        model.generate("x" * 41)


def test_a_bias_for_a_token_that_does_not_exist_is_refused() -> None:
    with pytest.raises(OptionError, match="logit_bias names the token 999"):
        Model(loaded(text_session())).generate("x", logit_bias={999: 1.0})


# Without a tokenizer, without a template


def test_a_model_without_a_tokenizer_generates_ids() -> None:
    model = Model(loaded(FakeSession(), text=False))
    stream = model.stream([1, 2], max_new_tokens=4)
    assert [piece.token_ids for piece in stream] == [(token,) for token in stream.result.token_ids]
    assert stream.result.text == ""


def calls() -> list[Any]:
    return [
        lambda m: m.generate("text"),
        lambda m: m.chat("text"),
        lambda m: m.tokenize("text"),
        lambda m: m.detokenize([1]),
        lambda m: m.generate([1], stop="x"),
        lambda m: m.generate([1], regex="x"),
        lambda m: m.logits("text"),
    ]


@pytest.mark.parametrize("call", calls())
def test_a_model_without_a_tokenizer_says_so_where_text_is_needed(call: Any) -> None:
    with pytest.raises(OptionError, match=r"has no tokenizer.*Pass token ids"):
        call(Model(loaded(FakeSession(), text=False)))


def test_chat_writes_the_conversation_with_the_template() -> None:
    model = Model(loaded(text_session()))
    result = model.chat(
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}], max_new_tokens=2
    )
    assert bytes(result.prompt_token_ids) == b"<system>Be kind.<user>Hi<assistant>"
    assert bytes(model.chat("Hi", max_new_tokens=1).prompt_token_ids) == b"<user>Hi<assistant>"
    stream = model.stream_chat("Hi", max_new_tokens=2)
    assert "".join(stream) == stream.result.text


def test_a_model_without_a_chat_template_says_what_to_do() -> None:
    with pytest.raises(OptionError, match=r"no chat template.*Use generate\(text\)"):
        Model(loaded(text_session(), chat_template=None)).chat("Hi")


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "no messages to answer"),
        ({"role": "user", "content": "x"}, "messages is a dict"),
        (["x"], "Message 0 is a str"),
        ([{"content": "x"}], "Message 0 has no role"),
        ([{"role": "usr", "content": "x"}], r'role \'usr\'.*Did you mean "user"'),
        ([{"role": "user"}], "Message 0 .* no content"),
    ],
)
def test_malformed_messages_are_named(messages: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Model(loaded(text_session())).chat(messages)


# The rest


def test_logits_are_those_of_every_prefix() -> None:
    model = Model(loaded(FakeSession(max_tokens=4), text=False))
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    rows = model.logits(tokens)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, np.stack([logits_after(tokens[: i + 1], 61) for i in range(8)]))
    with pytest.raises(OptionError, match="no tokens"):
        model.logits([])


def test_logits_go_when_nobody_holds_them() -> None:
    """For 16384 tokens they are gigabytes, which must not wait for the garbage collector."""
    model = Model(loaded(FakeSession(), text=False))
    gc.disable()
    try:
        logits = weakref.ref(model.logits([1, 2, 3]))
        assert logits() is None
    finally:
        gc.enable()


def test_logits_that_are_cancelled_are_no_logits() -> None:
    stop = threading.Event()
    stop.set()
    session = FakeSession()
    with pytest.raises(TransomError, match="cancelled"):
        Model(loaded(session, text=False)).logits([1, 2], cancel=stop)
    assert session.live == set()


def test_tokenize_and_detokenize_are_inverse() -> None:
    model = Model(loaded(text_session()))
    assert model.tokenize("hé") == list("hé".encode())
    assert model.detokenize([BOS, *"hé".encode(), EOS]) == "hé"
    assert model.detokenize([BOS], skip_special=False) == "<s>"


def plain_graph(**specs: InputSpec) -> Model:
    made = loaded(FakeSession(), text=False)
    return Model(Loaded(session=made.session, report=made.report, decoder=None, inputs=specs))


def test_a_graph_without_a_cache_runs_and_does_nothing_else() -> None:
    model = plain_graph(x=InputSpec("float32", ("batch", 2)), ids=InputSpec("int64", (None,)))
    assert model.run({"x": [[1.0, 2.0]], "ids": [3]})["sum"] == 6
    with pytest.raises(OptionError, match=r"plain graph.*Use run"):
        model.generate([1])
    with pytest.raises(OptionError, match=r"is a decoder.*Use generate"):
        Model(loaded(FakeSession(), text=False)).run({})


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"x": [[1.0, 2.0]], "id": [3]}, r'no input "id". Did you mean "ids"'),
        ({"x": [[1.0, 2.0]]}, r'input "ids" is missing. Pass ids: int64\[\?\]'),
        ({"x": [[1.0, 2.0, 3.0]], "ids": [3]}, r'"x" has the shape \[1, 3\]. Expected: float32\[batch, 2\]'),
        ({"x": [1.0, 2.0], "ids": [3]}, r'"x" has the shape \[2\]'),
        ({"x": [[1.0, 2.0]], "ids": [3.5]}, r'"ids" is of dtype float64. Expected: int64'),
        ([1], "inputs is a list"),
    ],
)
def test_wrong_inputs_of_a_graph_are_named(inputs: Any, said: str) -> None:
    model = plain_graph(x=InputSpec("float32", ("batch", 2)), ids=InputSpec("int64", (None,)))
    with pytest.raises(OptionError, match=said):
        model.run(inputs)


def test_a_failing_graph_is_one_sentence() -> None:
    model = plain_graph()
    model._loaded.session.run = lambda inputs: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="fake failed while running the graph: division by zero"):
        model.run({})


def test_a_model_works_in_a_with_block_and_closes_once() -> None:
    session, closings = text_session(), []
    with Model(loaded(session, on_close=lambda: closings.append(1))) as model:
        assert repr(model) == "<Model fake-model on cpu by fake, context 512>"
        stream = model.stream("Q", ignore_eos=True)
        next(stream)
    model.close()
    assert (session.closed, closings, session.live) == (1, [1], set())
    assert "closed" in repr(model)
    for call in (lambda: model.generate("Q"), lambda: model.logits([1]), lambda: list(stream)):
        with pytest.raises(ModelClosed, match="The model is closed"):
            call()


def test_importing_the_model_imports_none_of_the_heavy_packages() -> None:
    code = (
        "import sys, transom.generation.model\n"
        "heavy = {'onnx', 'onnx_ir', 'gguf', 'jinja2', 'rich', 'tokenizers', 'torch', 'llguidance', 'openvino'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64, np.bool_, np.complex64])
def test_an_array_of_another_dtype_is_refused(dtype: Any) -> None:
    model = plain_graph(x=InputSpec("float32", (2,)))
    said = f'The input "x" is of dtype {np.dtype(dtype)}. Expected: float32'
    with pytest.raises(OptionError, match=said):
        model.run({"x": np.ones(2, dtype)})
    assert model.run({"x": np.ones(2, ">f4")})["sum"] == 2


@pytest.mark.parametrize(("dtype", "values"), [("float32", [1e300, 1.0]), ("int8", [1, 300]), ("uint8", [-1, 2])])
def test_numbers_that_the_dtype_cannot_hold_are_refused(dtype: str, values: list[float]) -> None:
    with pytest.raises(OptionError, match=f'"x" has numbers that {dtype} cannot represent'):
        plain_graph(x=InputSpec(dtype, (2,))).run({"x": values})


def test_a_content_in_parts_is_read_as_its_text() -> None:
    model = Model(loaded(text_session()))
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]
    whole = [{"role": "system", "content": "x"}, {"role": "user", "content": "Hello\nthere"}]
    split = [{"role": "system", "content": [{"type": "text", "text": "x"}]}, {"role": "user", "content": parts}]
    assert model.chat(split, max_new_tokens=3).prompt_token_ids == model.chat(whole, max_new_tokens=3).prompt_token_ids
    assert model.count_tokens(split) == model.count_tokens(whole)
    assert list(model.stream_chat(split, max_new_tokens=3)) == list(model.stream_chat(whole, max_new_tokens=3))


@pytest.mark.parametrize(
    "part",
    [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text"}, {"type": "text", "text": 3}, 7, None, {}],
    ids=str,
)
def test_a_part_that_is_no_text_is_refused(part: Any) -> None:
    model = Model(loaded(text_session()))
    with pytest.raises(OptionError, match="Message 0 has a part of the type"):
        model.chat([{"role": "user", "content": [{"type": "text", "text": "x"}, part]}])


def test_tokens_are_counted_as_chat_reads_them() -> None:
    model = Model(loaded(text_session()))
    for messages in ("Hello", [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}]):
        assert model.count_tokens(messages) == model.chat(messages, max_new_tokens=1).usage.prompt_tokens
    with pytest.raises(OptionError, match="no chat template"):
        Model(loaded(text_session(), chat_template=None)).count_tokens("Hi")


TOOLS = [{"type": "function", "function": {"name": "a", "parameters": {"type": "object"}}}]
WITH_TOOLS = (
    "{{ tools | tojson }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    '<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}{% endfor %}<assistant>"
)


def test_tool_calls_in_an_answer_are_parsed_where_the_template_has_a_known_form() -> None:
    prompt = ChatTemplate(WITH_TOOLS).render([{"role": "user", "content": "Q"}], tools=TOOLS)
    session = text_session(context=4000)
    Script(session, list(prompt.encode()), [*b'<tool_call>{"name": "a", "arguments": {"x": 1}}</tool_call>', EOS])
    model = Model(loaded(session, chat_template=ChatTemplate(WITH_TOOLS)))
    result = model.chat("Q", tools=TOOLS)
    (choice,) = result.choices
    assert choice.tool_calls is not None
    assert [(call.name, call.arguments) for call in choice.tool_calls] == [("a", {"x": 1})]
    calls = result.to_dict()["choices"][0]["tool_calls"]
    assert calls == [{"id": "call00000", "type": "function", "function": {"name": "a", "arguments": '{"x": 1}'}}]
    assert model.chat("Q", tools=TOOLS, max_new_tokens=5).choices[0].tool_calls == ()
    assert model.chat("Q", max_new_tokens=5).choices[0].tool_calls is None
    # What was parsed may be sent back as it is.
    turn = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    ids = model.chat(turn, tools=TOOLS, max_new_tokens=1).prompt_token_ids
    assert b'"arguments": {"x": 1}' in bytes(ids)


def test_tool_calls_are_not_guessed_where_the_form_is_not_known() -> None:
    model = Model(loaded(text_session(context=4000), chat_template=ChatTemplate("{{ tools }}{{ messages }}")))
    assert model.chat("Q", tools=TOOLS, max_new_tokens=5).choices[0].tool_calls is None

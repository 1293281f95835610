"""Templates render as in transformers, and cannot escape the sandbox, hang or exhaust memory."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from transom.errors import OptionError, TransomError
from transom.text import ChatTemplate, ChatTemplateError
from transom.text.from_gguf import chat_template_from_gguf, tokenizer_from_gguf

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Why is the sky blue?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": " spaces  and\nlines \n"},
        {"role": "assistant", "content": "<b>&amp;</b> \"quotes\" 'é' 🙂"},
        {"role": "user", "content": ""},
    ],
]
# Features of real templates
TEMPLATES = {
    "llama-like": (
        "{{- bos_token }}\n{%- if tools is not none %}\n{{- tools | tojson(indent=4) }}\n{%- endif %}\n"
        "{%- for message in messages %}\n"
        "    {{- '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}\n"
        "{%- endfor %}\n{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
    "namespace, loop controls and macros": (
        "{% set ns = namespace(n=0, last='') %}{% macro show(m) %}[{{ m.role }}:{{ m.content|length }}]{% endmacro %}\n"
        "{% for m in messages %}\n"
        "  {% if m.role == 'system' %}{% continue %}{% endif %}\n"
        "  {% set ns.n = ns.n + 1 %}{% set ns.last = m.role %}\n"
        "  {{ show(m) }}{{ loop.index0 % 2 }}\n"
        "  {% if ns.n > 4 %}{% break %}{% endif %}\n"
        "{% endfor %}{{ ns.n ~ '/' ~ ns.last }}"
    ),
    "generation tag": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{% set x = 1 %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}{{ x is defined }}"
    ),
    "tojson": "{{ messages | tojson }}{{ {'b': 1, 'a': '<é>'} | tojson(sort_keys=true, ensure_ascii=true) }}",
    "filters and methods": (
        "{{ messages | map(attribute='content') | join(' / ') }}{{ 'a,b'.split(',') | last }}{{ 'x'.ljust(4) }}|"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ '%s-%d' | format('a', 3) }}"
        "{{ 'aXb'.replace('X', '-') }}{{ 'x' * 3 }}{{ 2 ** 5 }}{{ 7 % 4 }}{{ dict(a=1).items() | list }}"
    ),
    "trimmed blocks": (
        "{% if true %}\n    {% for m in messages %}\n    {{ m.role }}\n    {% endfor %}\n{% endif %}\nend\n"
    ),
    "recursive loop": "{% for x in [[1, [2]], [3]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
    "call block": "{% macro wrap() %}<{{ caller() }}>{% endmacro %}{% call wrap() %}in{% endcall %}",
    "documents": "{% if documents %}{{ documents[0].title }}{% else %}none{% endif %}",
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"é": {}}}}}]
ENDS = {"bos_token": "<s>", "eos_token": "</s>"}


def oracle(source: str, chat: list[dict[str, Any]], **variables: Any) -> str:
    rendered, _ = render_jinja_template([chat], chat_template=source, **{**ENDS, **variables})
    return str(rendered[0])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_templates_render_as_transformers_renders_them(name: str, prompt: bool) -> None:
    template = ChatTemplate(TEMPLATES[name], ENDS)
    for chat in CHATS:
        expected = oracle(TEMPLATES[name], chat, add_generation_prompt=prompt)
        assert template.render(chat, add_generation_prompt=prompt) == expected


def test_the_template_of_smollm2_renders_as_transformers_renders_it(smollm2: dict[str, Any]) -> None:
    template = chat_template_from_gguf(smollm2, tokenizer_from_gguf(smollm2))
    assert template is not None
    for chat in CHATS:
        for prompt in (True, False):
            source = smollm2["tokenizer.chat_template"]
            assert template.render(chat, add_generation_prompt=prompt) == oracle(
                source, chat, add_generation_prompt=prompt
            )


def test_tools_and_variables_of_ones_own_reach_the_template() -> None:
    source = TEMPLATES["llama-like"]
    template = ChatTemplate(source, ENDS)
    assert template.render(CHATS[0], tools=TOOLS) == oracle(source, CHATS[0], tools=TOOLS, add_generation_prompt=True)
    thinking = ChatTemplate("{{ 'think' if enable_thinking else 'no' }}{{ documents[0].title }}")
    assert thinking.render([], enable_thinking=True, documents=[{"title": "T"}]) == "thinkT"
    assert thinking.uses("enable_thinking")
    assert not thinking.uses("tools")


def test_tools_that_the_template_would_drop_are_refused() -> None:
    with pytest.raises(OptionError, match="does not support tools"):
        ChatTemplate("{{ messages[0].content }}").render(CHATS[0], tools=TOOLS)
    with pytest.raises(OptionError, match="as the variable that the template uses: xml_tools"):
        ChatTemplate("{{ xml_tools }}").render(CHATS[0], tools=TOOLS)


def test_of_named_templates_the_one_for_tools_is_chosen_with_tools() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "{{ tools|length }} tools", "rag": "rag"})
    assert template.render([]) == "plain"
    assert template.render([], tools=TOOLS) == "1 tools"
    assert template.render([], template="rag") == "rag"
    assert template.names == ["default", "rag", "tool_use"]
    assert ChatTemplate({"only": "one"}).render([]) == "one"
    with pytest.raises(OptionError, match=r'no chat template named "ragg".*Did you mean "rag"'):
        template.render([], template="ragg")
    with pytest.raises(OptionError, match="several chat templates and no default"):
        ChatTemplate({"a": "1", "b": "2"}).render([])


def test_the_final_message_can_be_left_open(smollm2: dict[str, Any]) -> None:
    source = smollm2["tokenizer.chat_template"]
    chat = [*CHATS[0], {"role": "assistant", "content": "Because of "}]
    text = ChatTemplate(source).render(chat, continue_final_message=True)
    assert text == oracle(source, chat, continue_final_message=True)
    assert text.endswith("assistant\nBecause of ")
    with pytest.raises(OptionError, match="no message text to continue"):
        ChatTemplate(source).render([], continue_final_message=True)
    with pytest.raises(OptionError, match="omits or changes the last message"):
        ChatTemplate("nothing").render(chat, continue_final_message=True)


def test_messages_may_be_objects_and_absent_values_stay_absent() -> None:
    @dataclasses.dataclass
    class Message:
        role: str
        content: str | None
        reasoning: str | None = None

    template = ChatTemplate("{% for m in messages %}{{ m | tojson }}{% endfor %}")
    rendered = template.render([dataclasses.asdict(Message("user", None))])
    assert rendered == '{"role": "user"}'
    assert ChatTemplate("{{ messages[0].content }}").render([Message("user", "Hi")]) == "Hi"  # type: ignore[list-item]
    thought = template.render([{"role": "assistant", "content": "a", "reasoning": "r"}])
    assert json.loads(thought)["reasoning_content"] == json.loads(thought)["thinking"] == "r"


def test_rendering_does_not_change_the_messages() -> None:
    chat = [{"role": "user", "content": "Hi", "extra": [1, {"a": None}]}]
    before = json.dumps(chat)
    ChatTemplate("{{ messages }}").render(chat)
    assert json.dumps(chat) == before


@pytest.mark.parametrize(
    ("messages", "cause"),
    [
        (["Hi"], "Message 0 is of type str"),
        ([{"content": "Hi"}], "Message 0 has no role"),
        ([{"role": "user", "content": object()}], "of type object"),
    ],
)
def test_messages_of_the_wrong_form_are_refused(messages: Any, cause: str) -> None:
    with pytest.raises(OptionError, match=cause):
        ChatTemplate("x").render(messages)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}",
        "{{ (messages | first).__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ namespace.__init__.__globals__['os'].system('true') }}",
        "{{ dict.__class__.__base__ }}",
        "{{ self._TemplateReference__context.environment.call }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages.clear() }}",
        "{% set n = namespace(__class__=1) %}{{ n }}",
        "{{ ('%s' | attr('__class__')) }}{{ ''|attr('__class__')|attr('mro') }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ messages | map(attribute='__class__') | list }}",
    ],
)
def test_a_template_cannot_reach_out_of_its_sandbox(source: str) -> None:
    try:
        text = ChatTemplate(source).render([{"role": "user", "content": "x"}])
    except ChatTemplateError as error:
        text = error.fix
        assert text, "no way out was named"
    # a hidden attribute may also render as an empty text
    assert "class" not in text
    assert "object" not in text


def test_errors_of_templates_are_errors_for_people() -> None:
    assert issubclass(ChatTemplateError, TransomError)


def test_reaching_out_of_the_sandbox_is_called_that() -> None:
    with pytest.raises(ChatTemplateError, match=r"tries to reach outside its sandbox.*Do not trust"):
        ChatTemplate("{{ ''.__class__.__mro__ }}").render([])


def doubling(step: str) -> str:
    """A template that doubles a text sixty times."""
    return "{% set n = namespace(s='xx') %}{% for i in range(60) %}" + step + "{% endfor %}"


BOMBS = {
    "huge range": "{% for i in range(10**9) %}x{% endfor %}",
    "loops in loops": "{% set l = range(9999)|list %}{% for a in l %}{% for b in l %}{% for c in l %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "exponential macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "doubling with ~": doubling("{% set n.s = n.s ~ n.s %}"),
    "doubling with +": doubling("{% set n.s = n.s + n.s %}"),
    "doubling with a format": doubling("{% set n.s = '%s%s' % (n.s, n.s) %}"),
    "doubling with a method": doubling("{% set n.s = '{0}{0}'.format(n.s) %}"),
    "doubling with join": doubling("{% set n.s = [n.s, n.s] | join %}"),
    "doubling with a block": doubling("{% set s %}{{ n.s }}{{ n.s }}{% endset %}{% set n.s = s %}"),
    "doubling with a macro": "{% macro d(s) %}{{ s }}{{ s }}{% endmacro %}" + doubling("{% set n.s = d(n.s) %}"),
    "doubling with replace": doubling("{% set n.s = n.s.replace('x', 'xx') %}"),
    "doubling with JSON": doubling("{% set n.s = [n.s, n.s] | tojson %}"),
    "repeated text": "{{ 'x' * 10**11 }}",
    "repeated list": "{{ ([1] * 10**11) | length }}",
    "huge power": "{{ 10 ** (10 ** 10) }}",
    "wide field": "{{ '%99999999999d' % 1 }}",
    "wide field of a filter": "{{ '%99999999999d' | format(1) }}",
    "wide field of a method": "{{ '{:99999999999}'.format(1) }}",
    "wide center": "{{ 'x' | center(99999999999) }}{{ 'x'.center(99999999999) }}",
    "wide replacement": "{{ ('x' * 10**6).replace('x', 'y' * 10**6) }}",
    "wide replacement of a filter": "{{ ('x' * 10**6) | replace('x', 'y' * 10**6) }}",
    "wide join": "{{ range(99999) | list | join('y' * 10**6) }}",
    "wide batch": "{{ [1] | batch(99999999999, 'x') | list | length }}",
    "long output": "{% for i in range(99999) %}{{ 'x' * 10**6 }}{% endfor %}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_would_hang_or_fill_the_memory_is_stopped(name: str) -> None:
    started = time.monotonic()
    with pytest.raises(ChatTemplateError, match="was stopped") as caught:
        ChatTemplate(BOMBS[name], seconds=0.2).render([])
    assert caught.value.fix
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("{% for %}", "is not valid Jinja"),
        ("{{ 'open ", "is not valid Jinja"),
        ("{{ x | no_such_filter }}", "is not valid Jinja"),
        ("{{ raise_exception('Roles must alternate') }}", "rejects these messages: Roles must alternate"),
        ("{{ messages[0].content.text.deeper }}", "uses something that the messages do not contain"),
        ("{{ 1 + 'x' }}", "fails on these messages"),
    ],
)
def test_a_template_that_fails_says_why_and_what_to_do(source: str, cause: str) -> None:
    with pytest.raises(ChatTemplateError) as caught:
        ChatTemplate(source).render([{"role": "user", "content": "Hi"}])
    assert cause in caught.value.cause
    assert caught.value.fix


def test_a_template_survives_the_cache() -> None:
    template = ChatTemplate({"default": "{{ bos_token }}", "rag": "r"}, ENDS)
    loaded = ChatTemplate.from_json(json.loads(json.dumps(template.to_json())))
    assert loaded.render([]) == "<s>"
    assert loaded.names == template.names


@pytest.mark.parametrize(
    "source",
    [
        "{% if ",
        "{{ ''.__class__.__mro__ }}",
        "{% for a in range(99999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    ],
)
def test_a_broken_or_malicious_template_is_found_without_a_conversation(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source, seconds=1.0).require_valid()


@pytest.mark.parametrize("source", ["{{ raise_exception('no') }}", "{{ x.y }}", "{{ messages[0].content }}"])
def test_a_template_that_only_refuses_a_greeting_is_sound(source: str) -> None:
    template = ChatTemplate(source)
    template.require_valid()
    with pytest.raises(ChatTemplateError):
        template.render([])  # this error was not found by require_valid

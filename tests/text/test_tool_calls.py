"""Tool calls of each form are found by trying the template; whatever else a model says is no call and no error.

Draws: damage to texts; none may raise, whatever it is.
"""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from transom.text import ChatTemplate
from transom.text.tool_calls import FORMS, ToolCall, form_of

HERMES = """{%- if tools %}<|im_start|>system
For each function call, return
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>
{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
THINKING = HERMES.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
LLAMA = """{{ '<|begin_of_text|>' }}{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}
{%- for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>

{% if message.tool_calls %}{% set call = message.tool_calls[0].function %}{"name": "{{ call.name }}", "parameters":
{{- ' ' }}{{ call.arguments | tojson }}}{% else %}{{ message.content }}{% endif %}<|eot_id|>{% endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
MISTRAL = """<s>[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% for message in messages %}
{%- if message.role == 'user' %}[INST] {{ message.content }}[/INST]{% elif message.tool_calls %}[TOOL_CALLS] [
{%- for call in message.tool_calls %}{{ (call.function | tojson)[:-1] }}, "id": "{{ call.id }}"}
{%- if not loop.last %}, {% endif %}{% endfor %}]</s>{% endif %}{% endfor %}"""
MISTRAL_ARGS = """<s>{{ tools | tojson }}{% for message in messages %}{% if message.role == 'user' %}[INST]
{{- message.content }}[/INST]{% else %}{% for call in message.tool_calls %}[TOOL_CALLS]{{ call.function.name }}[CALL_ID]
{{- call.id }}[ARGS]{{ call.function.arguments | tojson }}{% endfor %}</s>{% endif %}{% endfor %}"""
DEEPSEEK = """{{ tools | tojson }}{% for message in messages %}
{%- if message.role == 'user' %}<｜User｜>{{ message.content }}
{%- else %}<｜Assistant｜><｜tool▁calls▁begin｜>{% for call in message.tool_calls %}
{{- '<｜tool▁call▁begin｜>' + call.type + '<｜tool▁sep｜>' + call.function.name }}
{{- '\n```json\n' + call.function.arguments + '\n```' + '<｜tool▁call▁end｜>' }}{% endfor %}
{{- '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<｜Assistant｜>{% endif %}"""
DEEPSEEK_PLAIN = (
    DEEPSEEK.replace("call.type + '<｜tool▁sep｜>' + ", "")
    .replace("'\n```json\n'", "'<｜tool▁sep｜>'")
    .replace("\n```", "")
)
GEMMA = """{{ tools | tojson }}{% for message in messages %}<start_of_turn>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<start_function_call>call:{{ call.function.name }}{
{%- for key, value in call.function.arguments.items() %}{{ key }}:{% if value is string %}<escape>{{ value }}<escape>
{%- else %}{{ value }}{% endif %}{% if not loop.last %},{% endif %}{% endfor %}}<end_function_call>{% endfor %}
<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>assistant
{% endif %}"""

SAID = {
    "hermes": (HERMES, 'Let me see.\n<tool_call>\n{"name": "a", "arguments": {"x": 1}}\n</tool_call>\n<tool_call>'
               '{"name": "b", "arguments": {}}</tool_call><|im_end|>'),
    "a prompt that ends in a tag": (THINKING, '<tool_call>{"name": "a", "arguments": {"x": 1}}</tool_call>\n'
                                    '<tool_call>{"name": "b", "arguments": {}}</tool_call>'),
    "llama": (LLAMA, '<|python_tag|>{"name": "a", "parameters": {"x": 1}}; {"name": "b", "parameters": {}}<|eot_id|>'),
    "mistral": (MISTRAL, '[TOOL_CALLS] [{"name": "a", "arguments": {"x": 1}}, {"name": "b", "arguments": {}}]</s>'),
    "mistral with arguments": (MISTRAL_ARGS, '[TOOL_CALLS]a[ARGS]{"x": 1}[TOOL_CALLS]b[CALL_ID]123456789[ARGS]{}</s>'),
    "deepseek": (DEEPSEEK, '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>a\n```json\n{"x": 1}\n```'
                 "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>b\n```json\n{}\n```<｜tool▁call▁end｜>"),
    "deepseek without blocks": (DEEPSEEK_PLAIN, '<｜tool▁call▁begin｜>a<｜tool▁sep｜>{"x": 1}<｜tool▁call▁end｜>'
                                "<｜tool▁call▁begin｜>b<｜tool▁sep｜>{}<｜tool▁call▁end｜>"),
    "gemma": (GEMMA, "<start_function_call>call:a{x:1}<end_function_call><start_function_call>call:b{}"
              "<end_function_call>"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_the_template_tells_the_form_and_the_form_finds_every_call(name: str) -> None:
    template, said = SAID[name]
    form = form_of(ChatTemplate(template))
    assert form is not None
    assert form.find(said) == [ToolCall("a", {"x": 1}), ToolCall("b", {})]
    assert form.find("The sky is blue.") == []


@pytest.mark.parametrize("template", ["{{ messages[0].content }}", "{{ tools }}{{ messages }}", "{{ nosuch.x }}"])
def test_a_template_of_no_known_form_has_none(template: str) -> None:
    assert form_of(ChatTemplate(template)) is None


def test_values_of_every_kind_are_read() -> None:
    arguments: dict[str, Any] = {"a": [1, 2.5, True, None, "x, }y"], "b": {"c": {"d": "e: f"}}, "g": ""}
    for name in ("hermes", "llama", "mistral", "deepseek"):
        form = form_of(ChatTemplate(SAID[name][0]))
        assert form is not None
        said = SAID[name][1].replace('{"x": 1}', json.dumps(arguments))
        assert form.find(said)[0] == ToolCall("a", arguments)
    form = form_of(ChatTemplate(GEMMA))
    assert form is not None
    escaped = "{a:[1,2.5,true,null,<escape>x, }y<escape>],b:{c:{d:<escape>e: f<escape>}},g:<escape><escape>}"
    assert form.find(f"<start_function_call>call:a{escaped}<end_function_call>") == [ToolCall("a", arguments)]


@pytest.mark.parametrize("name", SAID)
def test_a_text_cut_anywhere_gives_only_whole_calls(name: str) -> None:
    template, said = SAID[name]
    form = form_of(ChatTemplate(template))
    assert form is not None
    calls = [ToolCall("a", {"x": 1}), ToolCall("b", {})]
    for end in range(len(said)):
        assert form.find(said[:end]) in ([], calls[:1], calls)


def test_damage_never_raises(dice: random.Random) -> None:
    for _, said in SAID.values():
        for _ in range(200):
            text = list(said)
            for _ in range(dice.randint(1, 6)):
                place = dice.randrange(len(text))
                text[place] = dice.choice(["", "{", "}", "[", ":", ",", '"', "<escape>", "x", text[place] * 3])
            for form in FORMS:
                form("".join(text))
    for form in FORMS:
        for deep in ("[" * 100_000, '{"name":' * 50_000, "<start_function_call>call:a{" + "x:[" * 5000):
            form(deep)
            form("<tool_call>" + deep + "[TOOL_CALLS]" + deep)


@pytest.mark.parametrize("name", SAID)
def test_a_call_is_rendered_alike_whichever_kind_of_arguments_the_client_sent(name: str) -> None:
    template = ChatTemplate(SAID[name][0])
    form = form_of(template)
    assert form is not None

    def rendered(arguments: Any) -> str:
        calls = [{"id": "call00000", "type": "function", "function": {"name": "a", "arguments": arguments}}]
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": calls}]
        return template.render(form.adapted(messages), tools=[{"type": "function", "function": {"name": "a"}}])

    assert rendered({"x": 1}) == rendered('{"x": 1}')

"""Tool calls in an answer: the forms that model families were trained on, and which of them a chat template uses.

| Form | Families | An answer |
|---|---|---|
| tagged | Hermes, Qwen | `<tool_call>{"name": …, "arguments": {…}}</tool_call>` |
| bare | Llama 3 | `{"name": …, "parameters": {…}}`, also after `<|python_tag|>`; several are separated by `;` |
| listed | Mistral | `[TOOL_CALLS][{"name": …, "arguments": {…}}]`, or `[TOOL_CALLS]name[ARGS]{…}` |
| fenced | DeepSeek | `<｜tool▁call▁begin｜>function<｜tool▁sep｜>name`, then a block of JSON; V3.1 without the block |
| escaped | Gemma | `<start_function_call>call:name{key:<escape>text<escape>}<end_function_call>` |

No name of a family decides: a call is rendered with the model's own template, and the form that reads it back is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transom.text.chat_template import ChatTemplate

_DECODER = json.JSONDecoder()


class ToolCall(NamedTuple):
    """A function that the model calls."""

    name: str
    arguments: Mapping[str, Any]
    """JSON types by the names of the function's parameters. Not compared with the tool's schema."""


class ToolForm(NamedTuple):
    """How a chat template writes tool calls."""

    find: Callable[[str], list[ToolCall]]
    """Finds the complete calls in an answer, given as text with its special tokens; others are left out."""
    arguments_as_text: bool
    """Whether the template inserts the arguments as text; otherwise it writes a mapping as JSON."""

    def adapted(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The messages with the arguments of their tool calls as the template takes them. Clients send either kind."""
        return [{**m, "tool_calls": self._calls(m["tool_calls"])} if m.get("tool_calls") else m for m in messages]

    def _calls(self, calls: Any) -> Any:
        if not isinstance(calls, list | tuple):
            return calls
        return [self._call(call) for call in calls]

    def _call(self, call: Any) -> Any:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            return call
        arguments = function.get("arguments")
        if isinstance(arguments, Mapping) and self.arguments_as_text:
            arguments = json.dumps(arguments, ensure_ascii=False)
        elif isinstance(arguments, str) and not self.arguments_as_text:
            value = _json_at(arguments)
            arguments = arguments if value is None else value
        return {**call, "function": {**function, "arguments": arguments}}


def form_of(template: ChatTemplate) -> ToolForm | None:
    """The form in which a template writes tool calls; None for a template without tools or of an unknown form."""
    from transom.errors import TransomError

    call = ToolCall("find_rivers", {"name": 'The "Rhône"', "count": 3})
    tool = {
        "type": "function",
        "function": {
            "name": call.name,
            "description": "Finds rivers.",
            "parameters": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "description": "The name."},
                    "count": {"type": "integer", "description": "How many."},
                },
                "required": ["name", "count"],
            },
        },
    }
    asked = [{"role": "user", "content": "Which?"}]
    # Templates disagree about the arguments: some write a mapping as JSON, others insert the text of the JSON.
    for arguments in (dict(call.arguments), json.dumps(call.arguments, ensure_ascii=False)):
        function = {"name": call.name, "arguments": arguments}
        calls = [{"id": "call00000", "type": "function", "function": function}]
        answer = {"role": "assistant", "content": "", "tool_calls": calls}
        try:
            before = template.render(asked, tools=[tool])
            whole = template.render([*asked, answer], tools=[tool], add_generation_prompt=False)
        except TransomError:
            continue
        said = _added(before, whole)  # the text before it may describe the form by examples
        for find in FORMS:
            if find(said) == [call]:
                return ToolForm(find, isinstance(arguments, str))
    return None


def _added(before: str, whole: str) -> str:
    """What `whole` has after the beginning that both share, with the whole of a tag that both begin alike.

    A generation prompt may end in `<think>` where the call begins with `<tool_call>`.
    """
    shared = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), None)
    if shared is None:
        return whole[min(len(before), len(whole)) :]
    tag = whole.rfind("<", 0, shared)
    return whole[tag if tag >= 0 and ">" not in whole[tag:shared] else shared :]


def _tagged(text: str) -> list[ToolCall]:
    return [call for part in text.split("<tool_call>")[1:] for call in _calls(_json_at(part))]


def _bare(text: str) -> list[ToolCall]:
    rest = text.strip().removeprefix("<|python_tag|>").lstrip()
    calls: list[ToolCall] = []
    while rest.startswith("{"):
        try:
            value, end = _DECODER.raw_decode(rest)
        except (ValueError, RecursionError):
            break
        calls += _calls(value)
        rest = rest[end:].lstrip("; \n")
    return calls


def _listed(text: str) -> list[ToolCall]:
    calls: list[ToolCall] = []
    for part in text.split("[TOOL_CALLS]")[1:]:
        if named := re.match(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?\[ARGS\]", part):
            calls += _calls({"name": named[1], "arguments": _json_at(part[named.end() :])})
        else:
            calls += _calls(_json_at(part))
    return calls


def _fenced(text: str) -> list[ToolCall]:
    calls: list[ToolCall] = []
    for part in text.split("<｜tool▁call▁begin｜>")[1:]:
        head, separator, tail = part.partition("<｜tool▁sep｜>")
        if not separator:
            continue
        if head.strip() == "function":
            head, _, tail = tail.partition("\n")
            tail = tail.strip().removeprefix("```json")
        calls += _calls({"name": head.strip(), "arguments": _json_at(tail)})
    return calls


def _escaped(text: str) -> list[ToolCall]:
    calls: list[ToolCall] = []
    for match in re.finditer(r"<start_function_call>\s*call:([\w.-]+)(?=\{)", text):
        try:
            arguments, _ = _escaped_value(text, match.end(), 0)
        except (ValueError, IndexError):
            continue
        calls += _calls({"name": match[1], "arguments": arguments})
    return calls


FORMS: tuple[Callable[[str], list[ToolCall]], ...] = (_tagged, _listed, _fenced, _escaped, _bare)


def _json_at(text: str) -> Any:
    """The JSON value at the start of a text; None if there is none, or it is cut off."""
    try:
        return _DECODER.raw_decode(text.lstrip())[0]
    except (ValueError, RecursionError):
        return None


def _calls(value: Any) -> Iterator[ToolCall]:
    """The calls in a parsed value, which may be a list of them; nothing where the value is none."""
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            continue
        arguments = item.get("arguments", item.get("parameters"))
        if isinstance(arguments, str):
            arguments = _json_at(arguments)
        if isinstance(arguments, dict):
            yield ToolCall(item["name"], arguments)


_ESCAPE = "<escape>"
_SCALAR = re.compile(r"[^,}\]<]+")
_DEEPEST = 50


def _escaped_value(text: str, start: int, depth: int) -> tuple[Any, int]:
    """The value at a place, and the place behind it: `<escape>text<escape>`, `{key:value}`, `[value]`, a JSON scalar.

    Raises:
        ValueError, IndexError: there is no whole value.
    """
    if depth > _DEEPEST:
        raise ValueError("nested too deeply")
    if text.startswith(_ESCAPE, start):
        end = text.index(_ESCAPE, start + len(_ESCAPE))
        return text[start + len(_ESCAPE) : end], end + len(_ESCAPE)
    if text[start] not in "{[":
        scalar = _SCALAR.match(text, start)
        if scalar is None:
            raise ValueError("no value")
        return json.loads(scalar[0]), scalar.end()
    is_mapping, place = text[start] == "{", start + 1
    mapping: dict[str, Any] = {}
    items: list[Any] = []
    while text[place] not in "}]":
        key = ""
        if is_mapping:
            end = text.index(":", place)
            key, place = text[place:end].replace(_ESCAPE, "").strip(), end + 1
        value, place = _escaped_value(text, place, depth + 1)
        mapping[key] = value
        items.append(value)
        if text[place] == ",":
            place += 1
    return (mapping if is_mapping else items), place + 1

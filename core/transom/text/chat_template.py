"""Chat templates: render messages as the prompt text that a model was trained on.

The output equals that of `transformers` for the same template, character by character. A template is untrusted code;
see `transom.text.template_sandbox`. Jinja is imported when a template is first rendered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypedDict

from transom.errors import OptionError, TransomError, nearest
from transom.typed import WrongType, typed

if TYPE_CHECKING:
    import jinja2

    from transom.text.template_sandbox import Sandbox

_MARKER = "TRANSOM_CONTINUES_HERE"
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplateError(TransomError):
    """The chat template is not valid Jinja, rejects the messages, or does something that templates may not do."""


class _Kept(TypedDict):
    """What `ChatTemplate.to_json` returns."""

    templates: dict[str, str]
    variables: dict[str, object]


class ChatTemplate:
    """A model's chat template, or several by name.

    Args:
        templates: Jinja source, or several sources by name. The one named "default", or a single one, is the default.
        variables: what templates may use besides messages, such as `bos_token` and `eos_token`.
        seconds: time limit of one rendering.
    """

    def __init__(
        self, templates: str | Mapping[str, str], variables: Mapping[str, Any] | None = None, *, seconds: float = 5.0
    ) -> None:
        self.templates = {"default": templates} if isinstance(templates, str) else dict(templates)
        if not self.templates:
            raise ValueError("a chat template needs at least one source")
        self.variables = dict(variables or {})
        self.seconds = seconds
        self._compiled: dict[str, jinja2.Template] = {}
        self._read: dict[str, set[str]] = {}

    @property
    def names(self) -> list[str]:
        return sorted(self.templates)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation. It includes special tokens: encode it with `add_special=False`.

        Args:
            messages: `{"role": …, "content": …}`, and other keys that the template uses (`tool_calls`, …). Plain data.
            add_generation_prompt: end with the start of an answer.
            tools: JSON schemas of functions the model may call.
            continue_final_message: leave the last message open, so that the model continues it.
            template: name of the template. By default "tool_use" if it exists and there are tools, else "default".
            variables: further variables for the template, such as `enable_thinking=False`.

        Raises:
            OptionError: messages or tools have the wrong form, or there is no template with this name.
            ChatTemplateError: the template is not valid, rejects the messages, violates its sandbox, or exceeds its
                limits.
        """
        chat = [_message(place, message) for place, message in enumerate(messages)]
        name = self._choose(template, bool(tools))
        data = {
            **self.variables,
            **{key: _plain(value, key) for key, value in variables.items()},
            "messages": chat,
            "tools": _tools(tools),
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        data.setdefault("documents", None)
        if tools and "tools" not in (read := self._variables(name)):
            other = sorted(variable for variable in read if "tools" in variable and variable not in variables)
            raise OptionError(
                f"The model's chat template {name!r} does not support tools",
                f"Pass them as the variable that the template uses: {', '.join(other)}"
                if other
                else "Describe the tools in the system message, or choose a model that was trained to use tools",
            )
        if not continue_final_message:
            return self._render(name, data)
        return self._render_open(name, data, chat)

    def uses(self, variable: str, *, template: str | None = None) -> bool:
        """Whether the template reads a variable, such as `tools` or `enable_thinking`.

        Raises:
            ChatTemplateError: the template is not valid Jinja.
        """
        return variable in self._variables(self._choose(template, False))

    def require_valid(self) -> None:
        """Parse the default template and render a greeting with it.

        Raises:
            ChatTemplateError: the template is not valid Jinja, violates its sandbox or exceeds its limits. Rejecting
                the greeting, or using an undefined variable, is not an error here.
        """
        from jinja2.exceptions import SecurityError, TemplateSyntaxError

        from transom.text.template_limits import TemplateLimit

        try:
            self.render([{"role": "user", "content": "Hello"}])
        except OptionError:
            return  # there are several and no default: the caller has to choose
        except ChatTemplateError as error:
            if isinstance(error.__cause__, SecurityError | TemplateSyntaxError | TemplateLimit | RecursionError):
                raise

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; `from_json` reads it back."""
        return {"templates": self.templates, "variables": self.variables}

    @classmethod
    def from_json(cls, data: object) -> ChatTemplate:
        """The inverse of `to_json`. Raises WrongType."""
        kept = typed(_Kept, data)
        if not kept["templates"]:
            raise WrongType("templates", "empty")
        return cls(kept["templates"], kept["variables"])

    def __repr__(self) -> str:
        return f"<ChatTemplate {', '.join(self.names)}>"

    # ---------------------------------------------------------------- inside

    def _choose(self, name: str | None, tools: bool) -> str:
        if name is not None:
            if name not in self.templates:
                raise OptionError(f'The model has no chat template named "{name}"', nearest(name, self.templates))
            return name
        if tools and "tool_use" in self.templates:
            return "tool_use"
        if "default" in self.templates:
            return "default"
        if len(self.templates) == 1:
            return next(iter(self.templates))
        raise OptionError("The model has several chat templates and no default", f"Name one: {', '.join(self.names)}")

    def _variables(self, name: str) -> set[str]:
        from jinja2 import meta

        if name not in self._read:
            with self._errors():
                self._read[name] = meta.find_undeclared_variables(_sandbox().parse(self.templates[name]))
        return self._read[name]

    def _render(self, name: str, data: Mapping[str, Any]) -> str:
        compiled = self._compiled.get(name)
        if compiled is None:
            with self._errors():
                compiled = self._compiled[name] = _sandbox().from_string(self.templates[name])
        with self._errors():
            return compiled.render(data)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Context for compiling or rendering, within the limits. Whatever a template raises is a ChatTemplateError."""
        from jinja2.exceptions import SecurityError, TemplateSyntaxError, UndefinedError

        from transom.text.template_limits import TemplateLimit, limits
        from transom.text.template_sandbox import TemplateRefusal

        try:
            with limits(self.seconds):
                yield
        except TemplateSyntaxError as error:
            raise ChatTemplateError(
                f"The model's chat template is not valid Jinja: {_short(error.message)} (line {error.lineno})",
                "Correct the template, use one of your own, or prompt the model without one (--raw)",
            ) from error
        except TemplateRefusal as error:
            raise ChatTemplateError(
                f"The model's chat template rejects these messages: {_short(error)}",
                "Change the messages to a form that the model was trained on",
            ) from error
        except SecurityError as error:
            raise ChatTemplateError(
                f"The model's chat template tries to reach outside its sandbox: {_short(error)}",
                "Do not trust this file; use a template of your own, or prompt the model without one (--raw)",
            ) from error
        except (TemplateLimit, OverflowError, MemoryError, RecursionError) as error:
            raise ChatTemplateError(
                f"The model's chat template was stopped: {_short(error)}",
                "Use a template of your own, or prompt the model without one (--raw)",
            ) from error
        except UndefinedError as error:
            raise ChatTemplateError(
                f"The model's chat template uses something that the messages do not contain: {_short(error)}",
                "Add the missing field to the messages, or pass the missing variable",
            ) from error
        except Exception as error:  # a template is a program, which can raise anything
            raise ChatTemplateError(
                f"The model's chat template fails on these messages ({type(error).__name__}: {_short(error)})",
                "Check that the messages have the form the model was trained on",
            ) from error

    def _render_open(self, name: str, data: dict[str, Any], chat: list[dict[str, Any]]) -> str:
        """Render with a marker at the end of the last message, and truncate the text there, as transformers does."""
        content = chat[-1].get("content") if chat else None
        if not isinstance(content, str) or not content.strip():
            raise OptionError("There is no message text to continue", "Give the last message text as its content")
        marked = {**chat[-1], "content": content + _MARKER}
        text = self._render(name, {**data, "messages": [*chat[:-1], marked]})
        head, mark, _ = text.rpartition(_MARKER)
        if not mark or content.strip() not in head:
            raise OptionError(
                "The model's chat template omits or changes the last message, so it cannot be continued",
                "Do not set continue_final_message",
            )
        return head


_shared: Sandbox | None = None


def _sandbox() -> Sandbox:
    global _shared
    if _shared is None:
        from transom.text.template_sandbox import Sandbox

        _shared = Sandbox()
    return _shared


def _short(error: object) -> str:
    """The text of an error that a template raised, which can be of any length."""
    text = str(error) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "…"


def _message(place: int, message: object) -> dict[str, Any]:
    plain = _plain(message, f"message {place}")
    if not isinstance(plain, dict):
        raise OptionError(
            f"Message {place} is of type {type(message).__name__}, not a mapping",
            'Write it like {"role": "user", "content": "Hello"}',
        )
    if not isinstance(plain.get("role"), str):
        raise OptionError(f"Message {place} has no role", 'Write it like {"role": "user", "content": "Hello"}')
    # Servers pass `content: null` with tool calls; templates handle a missing key, but print "None" for a null
    kept = {key: value for key, value in plain.items() if value is not None}
    thought = next((kept[key] for key in _REASONING if key in kept), None)
    # Templates read the reasoning under different names: most use the first, gpt-oss the second
    return kept if thought is None else {"thinking": thought, **kept, "reasoning_content": thought}


def _tools(tools: Sequence[Mapping[str, Any]] | None) -> list[Any] | None:
    if tools is None:
        return None
    for place, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise OptionError(
                f"Tool {place} is of type {type(tool).__name__}, not a mapping",
                'Pass its JSON schema: {"type": "function", "function": {"name": …, "parameters": …}}',
            )
    return [_plain(tool, f"tool {place}") for place, tool in enumerate(tools)]


def _plain(value: Any, where: str) -> Any:
    """A copy that consists of JSON types only, so that a template cannot call methods of other objects."""
    try:
        return _copy(value, where)
    except RecursionError:
        raise OptionError(f"{where} is nested too deep", "Pass lists and mappings of fewer levels") from None


def _copy(value: Any, where: str) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {_copy(key, where): _copy(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item, where) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _copy(getattr(value, field.name), where) for field in dataclasses.fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):  # pydantic, as the OpenAI client returns
        return _copy(dump(), where)
    raise OptionError(
        f"A value in {where} is of type {type(value).__name__}, which a chat template cannot use",
        "Pass text, numbers, lists and mappings only",
    )

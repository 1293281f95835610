"""The Jinja environment in which chat templates run: that of transformers, with limits on time and memory.

A chat template is a program from a downloaded file. Jinja's immutable sandbox protects Python's internals, but does not
prevent nested loops or doubling a string forty times. So every loop and macro checks the time, and every operation that
can make a long string checks its length. Imported only when a template is rendered.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_LENGTH = 1 << 24
"""Maximum length of any string or list that a template makes: far above any prompt, far below available memory."""
_MAX_BITS = 1 << 16
_WIDTH = re.compile(r"\d{6,}|\*")
_MAKES_LENGTH = frozenset({"center", "expandtabs", "ljust", "rjust", "zfill"})

_deadline: ContextVar[float] = ContextVar("transom_template_deadline")


class TemplateLimit(TemplateRuntimeError):
    """The template ran too long or made something too large."""


class TemplateRefusal(TemplateRuntimeError):
    """The template called `raise_exception`: it does not accept the messages."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Context for rendering. The template raises `TemplateLimit` when the time is over."""
    token = _deadline.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _deadline.reset(token)


class Sandbox(ImmutableSandboxedEnvironment):
    """The settings, filters, functions and tags of transformers' template environment, with limits."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        for name in ("batch", "center", "format", "indent", "join", "replace", "slice"):
            self.filters[name] = _limited_filter(name, self.filters[name])
        self.filters["tojson"] = _tojson
        del self.globals["lipsum"]
        self.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace, dict=_Dict()
        )

    def tick(self) -> str:
        """Called by the template in every loop iteration and every macro call."""
        if time.monotonic() > _deadline.get():
            raise TemplateLimit("it runs too long")
        return ""

    @staticmethod
    def bounded(value: Any) -> Any:
        """The value, unless it is too long."""
        if isinstance(value, str | list | tuple) and len(value) > MAX_LENGTH:
            raise TemplateLimit("it makes a text or list that is too long")
        return value

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Joins the pieces of the output, of a macro and of a `{% set %}` block."""
        pieces = list(parts)
        if sum(map(len, pieces)) > MAX_LENGTH:
            raise TemplateLimit("it makes a text that is too long")
        return "".join(pieces)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_operation(operator, left, right)
        return self.bounded(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            _check_method(owner, getattr(obj, "__name__", ""), args)
        return super().call(context, obj, *args, **kwargs)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        checked = _Checks().visit(tree)
        checked.set_environment(self)
        assert isinstance(checked, nodes.Template)
        return checked


class _Checks(NodeTransformer):
    """Inserts the time check into every loop and macro, and the length check around every `~`."""

    def _with_tick(self, node: Any) -> Any:
        self.generic_visit(node)
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick).set_lineno(node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _with_tick

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Call(nodes.EnvironmentAttribute("bounded"), [node], [], None, None).set_lineno(node.lineno)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training. It has no effect here."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Namespace(Namespace):
    """`namespace(...)` that does not allow names of Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be one of the names, as in Jinja's own
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class _Dict:
    """`dict(...)` without the type's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace may not contain the name {name!r}")


def _check_operation(operator: str, left: Any, right: Any) -> None:
    """Refuse operations whose computation alone would exceed the limits."""
    if operator == "%":
        if isinstance(left, str) and _WIDTH.search(left):
            raise TemplateLimit("it asks for a field that is too wide")
        return
    if operator == "**":
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _MAX_BITS:
            raise TemplateLimit("it makes a number that is too large")
        return
    sizes = [len(side) for side in (left, right) if isinstance(side, str | list | tuple)]
    if operator == "+" and len(sizes) == 2 and sum(sizes) > MAX_LENGTH:
        raise TemplateLimit("it makes a text or list that is too long")
    if operator == "*":
        numbers = [side for side in (left, right) if isinstance(side, int)]
        if sizes and numbers and sizes[0] * numbers[0] > MAX_LENGTH:
            raise TemplateLimit("it makes a text or list that is too long")
        if len(numbers) == 2 and sum(number.bit_length() for number in numbers) > _MAX_BITS:
            raise TemplateLimit("it makes a number that is too large")


def _check_method(text: str, method: str, args: tuple[Any, ...]) -> None:
    if method in _MAKES_LENGTH and any(isinstance(arg, int) and arg > MAX_LENGTH for arg in args):
        raise TemplateLimit("it makes a text that is too long")
    if method == "replace" and len(args) >= 2 and isinstance(args[1], str):
        _check_replace(text, str(args[0]), args[1])
    if method == "join" and args and isinstance(args[0], list | tuple):
        _check_join(text, args[0])
    if method in ("format", "format_map") and _WIDTH.search(text):
        raise TemplateLimit("it asks for a field that is too wide")


def _check_replace(text: str, old: str, new: str) -> None:
    if (text.count(old) if old else len(text) + 1) * len(new) > MAX_LENGTH:
        raise TemplateLimit("it makes a text that is too long")


def _check_join(separator: str, items: list[Any] | tuple[Any, ...]) -> None:
    if len(separator) * len(items) + sum(len(item) for item in items if isinstance(item, str)) > MAX_LENGTH:
        raise TemplateLimit("it makes a text that is too long")


def _limited_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # keeps Jinja's marker for passing the context
    def limited(*args: Any, **kwargs: Any) -> Any:
        own = list(args[1:] if hasattr(function, "jinja_pass_arg") else args)
        if any(isinstance(value, int) and value > MAX_LENGTH for value in [*own, *kwargs.values()]):
            raise TemplateLimit("it makes a text or list that is too long")
        if name == "format" and _WIDTH.search(str(own[0])):
            raise TemplateLimit("it asks for a field that is too wide")
        if name == "replace" and len(own) >= 3:
            _check_replace(str(own[0]), str(own[1]), str(own[2]))
        if name == "join" and isinstance(own[0], list | tuple):
            _check_join(str(own[1]) if len(own) > 1 else str(kwargs.get("d", "")), own[0])
        return Sandbox.bounded(function(*args, **kwargs))

    return limited


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes HTML, unlike the prompts in training
    if isinstance(indent, int) and indent > 64:
        raise TemplateLimit("it asks for an indent that is too wide")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> None:
    raise TemplateRefusal(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)

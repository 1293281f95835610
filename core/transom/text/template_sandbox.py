"""The Jinja environment in which chat templates run: that of transformers, with limits on time and memory.

A chat template is a program from a downloaded file. Jinja's immutable sandbox protects Python's internals, but limits
neither time nor memory. Here every loop, call, operator, filter, test and method pays for its work from the budget of
the rendering (`transom.text.template_limits`) before it runs, and what has no price is refused. Some constant
expressions are computed while a template is compiled, so compiling has a budget as well. Imported only when a template
is rendered.
"""

from __future__ import annotations

import functools
import json
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from string import Formatter
from typing import Any, cast

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateRuntimeError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import ignore_case, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter, safe_range
from jinja2.utils import Cycler, Joiner, Namespace, pass_context, pass_environment
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from transom.text import template_limits as limits
from transom.text.template_limits import CALL, ITEM, TemplateLimit, read, spend

MAX_SOURCE = 1 << 17
"""Maximum length of a template, in characters. The longest that models have are an eighth of it."""
MAX_NODES = 1 << 14
"""Maximum number of expressions and statements: those of a template of `MAX_SOURCE` that is like the models' ones. What
Python takes to compile a statement can be more than linear in its parts."""
_NODE = 4
"""The price of the smallest expression, in units."""


class TemplateRefusal(TemplateRuntimeError):
    """The template called `raise_exception`: it does not accept the messages."""


class Sandbox(ImmutableSandboxedEnvironment):
    """The settings, filters, functions and tags of transformers' template environment, with limits.

    Compile and render in the context `template_limits.limits`.
    """

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=_printable,
            optimized=False,  # a list that a constant filter makes would be paid for once, and made again in each pass
        )
        self.filters.update(tojson=_tojson, sum=_sum, unique=_unique)
        self.filters = {
            name: _paid(function, _FILTERS[name], name in _ITERATORS)
            for name, function in self.filters.items()
            if name in _FILTERS
        }
        self.tests = {
            name: _paid(cast(Callable[..., Any], function), _TESTS[name])
            for name, function in self.tests.items()
            if name in _TESTS
        }
        # Not names of Jinja's grammar, so that templates cannot replace them
        self.filters.update({"pay!": _pay, "compare!": _compare, "concatenate!": _concatenate})
        self.filters.update({"slice!": _slice, "key!": _key})
        del self.globals["lipsum"]
        self.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace, dict=_Dict()
        )

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Joins the pieces of the output, of a macro and of a `{% set %}` block."""
        pieces = list(parts)
        limits.make(limits.together(pieces))
        return "".join(pieces)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        limits.operate(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        spend(CALL + ITEM * (len(args) + len(kwargs)))
        kind = type(__obj)
        if kind is types.BuiltinFunctionType:  # the methods of built-in types
            args = limits.call(__obj, args, kwargs)
        elif kind is types.MethodType:
            if isinstance(__obj.__self__, str):  # of Markup
                args = limits.call(__obj, args, kwargs)
            elif not isinstance(__obj.__self__, LoopContext | Cycler | _Dict):
                raise TemplateLimit(f"it calls a method of {type(__obj.__self__).__name__}, which templates may not")
            else:
                read(args)
        elif isinstance(__obj, type | _Dict):
            if isinstance(__obj, type) and __obj not in _CLASSES:
                raise TemplateLimit(f"it calls {__obj.__name__}, which templates may not")
            read((args, kwargs))
        elif not isinstance(__obj, _CALLABLE) and not (kind is types.FunctionType and __obj in _FUNCTIONS):
            raise TemplateLimit(f"it calls a {kind.__name__}, which templates may not")
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """A limited form of the methods `format` and `format_map` of a text; None for anything else."""
        if not isinstance(value, types.BuiltinMethodType | types.MethodType) or not isinstance(value.__self__, str):
            return None
        if value.__name__ not in ("format", "format_map"):
            return None
        return _Format(self, value.__self__, value.__name__ == "format_map")

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Jinja's own answer, found faster for what templates read most."""
        kind = type(obj)
        if kind is _Namespace or kind is str:
            return not attr.startswith("_")
        if kind is dict and attr in _READING:
            return True
        return super().is_safe_attribute(obj, attr, value)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > MAX_SOURCE:
            raise TemplateLimit(f"it is longer than {MAX_SOURCE} characters")
        checked = _Payments().visit(super()._parse(source, name, filename))
        checked.set_environment(self)
        assert isinstance(checked, nodes.Template)
        return checked


class _Payments(NodeTransformer):
    """Inserts the price of every body, and of the operators that Jinja compiles to plain Python."""

    def __init__(self) -> None:
        self.nodes = 0
        self._all = 0

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        self._all += 1
        if self._all > MAX_NODES:
            raise TemplateLimit(f"it has more than {MAX_NODES} expressions and statements")
        self.nodes += 8 if isinstance(node, _SLOWER) else 2
        return super().visit(node, *args, **kwargs)

    def _body(self, node: Any) -> Any:
        outside, self.nodes = self.nodes, 0
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filter("pay!", nodes.Const(self._price()))).set_lineno(node.lineno))
        self.nodes += outside
        return node

    def _price(self) -> int:
        return CALL // 2 + _NODE * self.nodes

    visit_Template = visit_Block = visit_Macro = visit_CallBlock = _body

    def visit_For(self, node: nodes.For) -> nodes.Node:
        paid = self._body(node)
        if node.test is not None:  # runs also for items that the body does not see
            node.test = nodes.Or(_filter("pay!", nodes.Const(CALL)), node.test)
        assert isinstance(paid, nodes.Node)
        return paid

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter("concatenate!", *node.nodes)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        if len(node.ops) == 1 and node.ops[0].op in ("eq", "ne"):
            for side in (node.expr, node.ops[0].expr):
                if isinstance(side, nodes.Const) and isinstance(side.value, str | bool | int | float | None):
                    return node  # the cost is limited by the constant
        names = nodes.Const(tuple(operand.op for operand in node.ops))
        return _filter("compare!", names, node.expr, *(operand.expr for operand in node.ops))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            parts = (node.arg.start, node.arg.stop, node.arg.step)
            return _filter("slice!", node.node, *(part or nodes.Const(None) for part in parts))
        if not isinstance(node.arg, nodes.Const):
            node.arg = _filter("key!", node.arg)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = _filter("key!", node.key)
        return node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        limits.require_few_keys(
            sum(not (isinstance(pair.key, nodes.Const) and isinstance(pair.key.value, str)) for pair in node.items)
        )
        return self.generic_visit(node)

    def visit_Neg(self, node: nodes.Neg) -> nodes.Node:
        if isinstance(node.node, nodes.Const) and isinstance(node.node.value, int | float):
            return nodes.Const(-node.node.value).set_lineno(node.lineno)  # `messages[-1]` looks up a constant
        return self.generic_visit(node)

    def _automatic_escaping(self, node: nodes.Node) -> nodes.Node:
        raise TemplateSyntaxError("prompts are not escaped automatically", node.lineno)

    visit_EvalContextModifier = visit_ScopedEvalContextModifier = _automatic_escaping


_SLOWER = (nodes.Assign, nodes.AssignBlock, nodes.Getattr, nodes.Getitem, nodes.Output)


def _filter(name: str, *values: nodes.Expr) -> nodes.Filter:
    """A call of one of our functions, which Jinja compiles to a plain call only if it is a filter."""
    call = nodes.Filter(values[0], name, list(values[1:]), [], None, None)
    call.set_lineno(values[0].lineno or 1)
    return call


@pass_context  # so that it is not computed once, as a constant
def _pay(_: Context, units: int) -> str:
    spend(units)
    return ""


_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda left, right: left == right,
    "ne": lambda left, right: left != right,
    "lt": lambda left, right: left < right,
    "lteq": lambda left, right: left <= right,
    "gt": lambda left, right: left > right,
    "gteq": lambda left, right: left >= right,
    "in": lambda left, right: left in right,
    "notin": lambda left, right: left not in right,
}


def _compare(operators: Sequence[str], *values: Any) -> Any:
    result: Any = True
    for operator, left, right in zip(operators, values, values[1:], strict=False):
        limits.compare(operator, left, right)
        result = _COMPARISONS[operator](left, right)
        if not result:
            break
    return result


def _concatenate(*values: Any) -> str:
    texts = [_text(value) for value in values]
    limits.make(limits.together(texts) + ITEM * len(texts))
    return "".join(texts)


def _slice(value: Any, start: Any, stop: Any, step: Any) -> Any:
    part = slice(start, stop, step)
    if isinstance(value, str | list | tuple):
        length = len(range(*part.indices(len(value))))
        if isinstance(value, str):
            limits.make(length if value.isascii() else 4 * length)
        else:
            spend(ITEM * length)
    return value[part]


def _key(value: Any) -> Any:
    limits.read_key(value)
    return value


def _printable(value: Any) -> Any:
    """Jinja prints what this returns."""
    if type(value) is not str:  # a text is paid for when the pieces are joined
        read(value)
    return value


class _Format:
    """`text.format` or `text.format_map`."""

    def __init__(self, environment: Sandbox, text: str, mapped: bool) -> None:
        self._text = text
        self._mapped = mapped
        self._formatter: Formatter = _Fields(environment)
        if isinstance(text, Markup):
            self._formatter = _EscapedFields(environment, escape=text.escape)

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        if self._mapped:
            (kwargs,), args = args, ()
        spend(4 * limits.size(self._text) + 4 * CALL * self._text.count("{"))
        return type(self._text)(self._formatter.vformat(self._text, args, kwargs))


class _PaidFields(Formatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        spend(4 * limits.width(format_spec) + 8 * limits.weight(value))
        return super().format_field(value, format_spec)

    def convert_field(self, value: Any, conversion: Any) -> Any:
        spend(8 * limits.weight(value))
        return super().convert_field(value, conversion)


class _Fields(_PaidFields, SandboxedFormatter):
    pass


class _EscapedFields(_PaidFields, SandboxedEscapeFormatter):
    pass


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
        values = _mapping(*args, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class _Dict:
    """`dict(...)` without the type's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return _mapping(*args, **kwargs)

    def fromkeys(self, keys: Any, *value: Any) -> dict[Any, Any]:
        keys = limits.items(keys)
        limits.hashed(keys)
        return dict.fromkeys(keys, *value)


def _mapping(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    if args and not isinstance(args[0], Mapping):
        args = ([(key, value) for key, value in args[0]], *args[1:])
        limits.hashed(key for key, _ in args[0])
    return dict(*args, **kwargs)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace may not contain the name {name!r}")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes HTML, unlike the prompts in training
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@pass_context
def _sum(context: Context, iterable: Any, attribute: str | int | None = None, start: Any = 0) -> Any:
    environment = context.environment
    if attribute is not None:
        iterable = map(make_attrgetter(environment, attribute), iterable)
    values = list(iterable)
    if all(isinstance(value, int | float) for value in (start, *values)):
        return sum(values, start)
    assert isinstance(environment, Sandbox)
    if isinstance(start, str):
        raise TypeError("sum() can't sum strings [use ''.join(seq) instead]")
    for value in values:  # each step pays for the lists that it makes
        start = environment.call_binop(context, "+", start, value)
    return start


@pass_environment
def _unique(
    environment: Sandbox, value: Iterable[Any], case_sensitive: bool = False, attribute: str | int | None = None
) -> Iterator[Any]:
    key_of = make_attrgetter(environment, attribute, postprocess=None if case_sensitive else ignore_case)
    keys = [key_of(item) for item in value]
    limits.hashed(keys)
    first: dict[Any, Any] = {}
    for key, item in zip(keys, value, strict=True):
        first.setdefault(key, item)
    return iter(list(first.values()))


def _raise_exception(message: object) -> None:
    read(message)
    raise TemplateRefusal(str(message))


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 256 or limits.width(pattern):
        raise TemplateLimit("it asks for a time in too long a form")
    return datetime.now().strftime(pattern)


_FUNCTIONS = frozenset({safe_range, _raise_exception, _strftime_now})
_READING = frozenset({"get", "items", "keys", "values"})
_CLASSES = frozenset({Cycler, Joiner, _Namespace})
_CALLABLE = (BlockReference, LoopContext, Joiner, Macro, Undefined, _Format)


# ------------------------------------------------------- filters and tests

_Price = Callable[[Any, list[Any], dict[str, Any]], None]


def _paid(function: Callable[..., Any], price: _Price, iterates: bool = False) -> Callable[..., Any]:
    """A filter or test that pays first. Results that are computed while they are read are computed at once."""
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)  # keeps Jinja's marker for passing the context
    def paid(*args: Any, **kwargs: Any) -> Any:
        spend(4 * ITEM)
        given = list(args)
        if price is not _nothing:
            if price in _READS_ITEMS and len(given) > skipped:
                given[skipped] = limits.items(given[skipped])
            own = given[skipped + 1 :]
            price(given[skipped] if len(given) > skipped else None, own, kwargs)
        result = function(*given, **kwargs)
        return iter(list(result)) if iterates and hasattr(result, "__next__") else result

    return paid


def _argument(args: list[Any], kwargs: Mapping[str, Any], place: int, name: str, default: Any = None) -> Any:
    return args[place] if place < len(args) else kwargs.get(name, default)


def _text(value: Any) -> str:
    """The text that a filter makes of its value, paid for."""
    if isinstance(value, str):
        return value
    read(value)
    return str(value)


def _nothing(value: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    """The price of what takes constant time."""


def _arguments(value: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    limits.paid((*args, *kwargs.values()))


def _all(value: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    spend(2 * limits.weight(value))
    limits.paid((*args, *kwargs.values()))


def _per_unit(units: int) -> _Price:
    """The price of filters that take some time for each character, and make as much text."""

    def pay(value: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
        spend(units * limits.weight(value))
        spend(units * limits.weight((args, kwargs)))

    return pay


def _case(value: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    spend(limits.case(_text(value)))


def _quadratic(value: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    spend(limits.slow(limits.weight(value) + limits.weight((args, kwargs))))


def _links(value: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    """For each word, an expression tries every end of each of its parts."""
    more = limits.weight((args, kwargs))
    text = _text(value)
    spend(limits.size(text) * 8)
    for word in text.split():
        spend(4 * (len(word) + more) ** 2)


def _steps(*paths: Any) -> int:
    """Look-ups that paths of attributes ask for."""
    return 1 + sum(path.count(".") + path.count(",") for path in paths if isinstance(path, str))


def _each(value: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    """For filters that look up attributes, or call a filter or test, for each item."""
    steps = _steps(*args[:1], kwargs.get("attribute"))
    spend((CALL * steps + limits.weight((args, kwargs))) * (1 + limits.count(value)))


def _ordering(value: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    number, steps = limits.count(value), _steps(*args, *kwargs.values())
    spend((CALL * steps + limits.weight((args, kwargs))) * (1 + number))
    spend(limits.weight(value) * steps * (4 + number.bit_length()))


def _center(value: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    spend(limits.size(_text(value)) + 4 * limits.whole(_argument(args, kwargs, 0, "width", 80)))


def _batch(value: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    filled = _argument(args, kwargs, 1, "fill_with") is not None
    size = limits.whole(_argument(args, kwargs, 0, "linecount")) if filled else 0
    spend(4 * ITEM * limits.count(value) + ITEM * size)


def _slices(value: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    spend(4 * ITEM * limits.count(value) + 8 * ITEM * limits.whole(_argument(args, kwargs, 0, "slices")))


def _number(value: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    if isinstance(value, str) and len(value) > limits.MAX_BITS // 4:
        raise TemplateLimit("it makes a number that is too large")
    spend(limits.weight(value) * 4)


def _round(value: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    limits.whole(_argument(args, kwargs, 0, "precision", 0), most=400)
    limits.operate("+", value, 0)


def _format(value: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    limits.fill(_text(value), kwargs or tuple(args))


def _indent(value: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    spend(limits.indent(_text(value), _argument(args, kwargs, 0, "width", 4)))


def _join(value: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    spend(limits.weight((args, kwargs)) + ITEM * limits.count(value))
    separator = _argument(args, kwargs, 0, "d", "")
    attribute = _argument(args, kwargs, 1, "attribute")
    if attribute is not None:
        spend((CALL * _steps(attribute) + limits.weight(attribute)) * limits.count(value))
    escaping = 8 if isinstance(separator, Markup) else 1
    spend(escaping * 2 * limits.weight(value))
    spend(escaping * limits.count(value) * limits.weight(separator))


def _list(value: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    wide = isinstance(value, str) and not value.isascii()
    spend(limits.count(value) * (6 * ITEM if wide or isinstance(value, dict) else ITEM))


def _replace(value: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    old, new = _text(_argument(args, kwargs, 0, "old")), _text(_argument(args, kwargs, 1, "new"))
    escaping = 8 if isinstance(value, Markup) or isinstance(old, Markup) or isinstance(new, Markup) else 1
    spend(escaping * limits.replace(_text(value), old, new))


def _reverse(value: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    spend(limits.size(value) if isinstance(value, str) else ITEM * limits.count(value))


def _trim(value: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    spend(limits.strip(_text(value), _argument(args, kwargs, 0, "chars")))


def _wrap(value: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    text = limits.weight(value)
    end = _argument(args, kwargs, 2, "wrapstring")
    spend(limits.slow(text))
    width = limits.whole(_argument(args, kwargs, 0, "width", 79))
    spend(text // max(width, 1) * (limits.weight(end) + 4 * ITEM) + text)


def _json(value: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    names = ("ensure_ascii", "indent", "separators", "sort_keys")
    ascii_only, indent, separators, _ = (_argument(args, kwargs, place, name) for place, name in enumerate(names))
    weight = limits.weight(value)
    spend((12 if ascii_only else 2) * weight)
    if indent is not None:
        depth = limits.measure(value)[2]
        spend(weight * (1 + depth * (limits.size(indent) if isinstance(indent, str) else limits.whole(indent)) // ITEM))
    if separators is not None:
        spend(weight // ITEM * limits.weight(separators))


def _sums(value: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    attribute = _argument(args, kwargs, 0, "attribute")
    spend((CALL * _steps(attribute) + limits.weight(attribute)) * (1 + limits.count(value)))


_FILTERS: dict[str, _Price] = {
    **dict.fromkeys(("count", "d", "default", "first", "last", "length", "random"), _nothing),
    **dict.fromkeys(("map", "reject", "rejectattr", "select", "selectattr"), _each),
    **dict.fromkeys(("dictsort", "groupby", "max", "min", "sort", "unique"), _ordering),
    **dict.fromkeys(("capitalize", "lower", "upper"), _case),
    **dict.fromkeys(("pprint", "striptags"), _quadratic),
    **dict.fromkeys(("e", "escape", "forceescape"), _per_unit(8)),
    **dict.fromkeys(("title", "urlencode", "wordcount", "xmlattr"), _per_unit(40)),
    "abs": _arguments,
    "attr": _arguments,
    "batch": _batch,
    "center": _center,
    "filesizeformat": _number,
    "float": _number,
    "format": _format,
    "indent": _indent,
    "int": _number,
    "join": _join,
    "items": _list,
    "list": _list,
    "replace": _replace,
    "reverse": _reverse,
    "round": _round,
    "safe": _all,
    "slice": _slices,
    "string": _all,
    "sum": _sums,
    "tojson": _json,
    "trim": _trim,
    "truncate": _per_unit(4),
    "urlize": _links,
    "wordwrap": _wrap,
}
_READS_ITEMS = frozenset({_batch, _each, _join, _ordering, _reverse, _slices, _sums})
_ITERATORS = frozenset({"batch", "items", "map", "reject", "rejectattr", "reverse", "select", "selectattr", "slice"})


def _equality(value: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    for other in (*args, *kwargs.values()):
        limits.compare("eq", value, other)


def _membership(value: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    for holder in (*args, *kwargs.values()):
        limits.compare("in", value, holder)


def _division(value: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    for divisor in args or list(kwargs.values()) or [2]:
        limits.operate("%", value, divisor)


_TESTS: dict[str, _Price] = {
    **dict.fromkeys(
        (
            *("boolean", "callable", "defined", "escaped", "false", "float", "integer", "iterable", "mapping"),
            *("none", "number", "sameas", "sequence", "string", "true", "undefined"),
        ),
        _nothing,
    ),
    **dict.fromkeys(
        (
            *("!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "le", "lessthan", "lt"),
            "ne",
        ),
        _equality,
    ),
    **dict.fromkeys(("divisibleby", "even", "odd"), _division),
    **dict.fromkeys(("lower", "upper"), _per_unit(4)),
    **dict.fromkeys(("filter", "test"), _all),
    "in": _membership,
}

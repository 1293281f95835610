"""Random chat templates from everything that Jinja offers, and a process that renders them within limits of its own.

As a program, it reads a JSON object {"seed", "number", "units"} from the command line, renders the templates, and
prints each one before it runs, so that the last line names the one that ended the process. The kernel ends it after
`CPU_SECONDS` for one template, also where a template holds the interpreter's lock.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import sys
import time
from pathlib import Path

CPU_SECONDS = 20
MEMORY = 2 << 30
"""Address space beyond what the process has at its start, in bytes."""

# What an expression is made from: T a text, L a list, N a number, V any value; A, B and C as T, L and N of fixed size
TEXTS_FROM = (
    *("T|capitalize", "T|center(N)", "V|escape", "T|forceescape", "T|format(V)", "T|format(V, V)", "T|indent(N)"),
    *("T|indent(T)", "L|join", "L|join(T)", "L|join(T, 0)", "T|lower", "V|pprint", "T|replace(T, T)", "V|safe"),
    *("V|string", "T|striptags", "T|title", "V|tojson", "V|tojson(indent=N)", "V|tojson(indent=T)", "T|trim(T)"),
    *("V|tojson(separators=[T, T])", "V|tojson(true)", "T|truncate(N)", "T|upper", "V|urlencode", "T|urlize"),
    *("T|urlize(N)", "T|wordwrap(N)", "T|wordwrap(1)", "T|wordwrap(N, wrapstring=T)", "{A: V}|xmlattr", "T|reverse"),
    *("N|filesizeformat", "(T).capitalize()", "(T).center(N)", "(T).expandtabs(N)", "(T).format(V)", "(T).zfill(N)"),
    *("(T).format(V, N)", "(T).format_map({'a': V})", "(T).join([T, T])", "(T).join(L|map('string'))", "(T).ljust(N)"),
    *("(T).lower()", "(T).strip(T)", "(T).replace(T, T)", "(T).swapcase()", "(T).title()", "(T).translate({120: T})"),
    *("(T).removeprefix(T)", "(T)[::-1]", "(T)[1:]", "(T)[N:]", "(T + T)", "(V ~ V)", "(T % V)", "(T % (V, V))"),
    *("(T * N)", "(N * T)", "(A * 16000000)", "(A * 100000)", "(T if V else T)", "f(T)", "(T).rjust(N)", "T|batch(N)"),
    *("(T|safe).striptags()", "(T|safe).unescape()", "(T|safe).join([T, T])", "(T|safe + T)", "strftime_now(T)"),
)
LISTS_FROM = (
    *("L|batch(C)", "L|batch(C, V)|list", "{V: V}|dictsort", "L|groupby(0)", "{A: V}|items|list", "L|list", "T|list"),
    *("L|map('upper')|list", "L|map('string')|list", "L|map('replace', T, T)|list", "L|map('center', N)|list"),
    *("L|map(attribute=0)|list", "L|map('tojson')|list", "L|map('wordwrap', N)|list", "L|map('format', V)|list"),
    *("L|reject('in', L)|list", "L|select('eq', V)|list", "L|select('even')|list", "L|reverse|list", "L|slice(C)|list"),
    *("L|slice(N, V)|list", "L|sort", "L|unique|list", "L|sum(start=[])", "[L, L]|sum(start=[])", "(T).split(T)"),
    *(
        "(T).split()",
        "(T).rsplit(T)",
        "(T).splitlines()",
        "(T).partition(T)",
        "(T).rpartition(T)",
        "(L + L)",
        "(L * N)",
    ),
    *("(L)[::-1]", "(L)[1:]", "[V, V]", "[L, L]", "(V, V)", "range(C)|list", "(L).copy()", "{A: V}.values()|list"),
    *(
        "{V: V}",
        "dict(a=V)",
        "namespace(a=V)",
        "cycler(L, V)",
        "[n, n]",
        "L|map('int', base=16)|list",
        "{A: V}.items()",
    ),
)
NUMBERS_FROM = (
    *("T|int", "T|int(base=16)", "T|int(0, C)", "T|float", "N|abs", "N|round(N)", "N|round(N, 'ceil')", "L|length"),
    *(
        "T|length",
        "L|sum",
        "T|wordcount",
        "(T).count(T)",
        "(T).find(T)",
        "(T).rfind(T)",
        "(T).rindex(T)",
        "(L).count(V)",
    ),
    *("(L).index(V)", "(N + N)", "(N - N)", "(N * N)", "(N / N)", "(N // N)", "(N % N)", "(N ** N)", "-N", "(V == V)"),
    *(
        "(L < L)",
        "(T in T)",
        "(V in L)",
        "(V not in L)",
        "(T <= T)",
        "(N is even)",
        "(T is divisibleby(N))",
        "(T is odd)",
    ),
    *("(V is eq(V))", "(V is in(L))", "(V is sameas(V))", "(T is upper)", "(T).isalnum()", "(T).startswith((T, T))"),
    *("(N).bit_length()", "(N).to_bytes(N, 'big')", "L|max", "L|min|length", "(V is filter)", "(V < V < V)"),
)
ANY_FROM = (
    *(
        "L|first",
        "L|last",
        "L|random",
        "L|max",
        "V|default(V)",
        "V|attr(T)",
        "(L)[N]",
        "({V: V})[V]",
        "({V: V}).get(V)",
    ),
    *("n[T]", "(V and V)", "(V or V)", "V|d(V, true)", "(V)[V]", "loop", "n", "self", "(T).encode()", "(L).append(V)"),
)
TEXTS = (
    *("'x'", "'ab cd'", "'é\\n'", "'<b>-'", "'%s%s'", "'%99999d'", "'%*d'", "'{}{}'", "'{0:{1}}'", "'{:99999}'", "'-'"),
    *("'F'", "'\\t'", "'a=b&'", "'http://a.b '", "'{0}{0}{0}'", "'%%'", "''", "'{a}'", "'9'", "'世 '", "'x' * 4000"),
)
NUMBERS = (
    *("0", "1", "2", "3", "7", "16", "-1", "60", "255", "4000", "99999", "16000000", "999999999", "10 ** 20", "1.5"),
    *("1e300", "-16000000", "true", "2 ** 4000", "0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF"),
)
LISTS = ("n.b", "n.c", "messages", "[1]", "['a', 'b']", "range(99999)", "[]", "[3, 1, 2]", "['x', 'y'] * 5000")


class Programs:
    """Templates that a seed determines."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def program(self) -> str:
        """A template: variables of each kind, loops that grow them, and what is made of them."""
        start = "{% set n = namespace(a='xx', b=[1], c=['a'], d=255) %}{% macro f(k) %}{{ k }}-{{ k }}{% endmacro %}"
        start += "".join(self._assign(2) for _ in range(2))
        return start + "".join(self._statement(3) for _ in range(self._random.randint(1, 5)))

    def _assign(self, depth: int) -> str:
        name = self._random.choice("abcd")
        value = {"a": self._text, "b": self._list, "c": self._list, "d": self._number}[name](depth)
        return f"{{% set n.{name} = {value} %}}"

    def _statement(self, depth: int) -> str:
        pick = self._random
        name = pick.choice("bc")
        if depth == 0 or pick.random() < 0.3:
            return pick.choice(
                (
                    *(self._assign(2) for _ in range(4)),
                    f"{{% set n.{name} = [n.{name}, n.{name}] %}}",
                    f"{{% set n.{name} = (n.{name}, n.{name}) %}}",
                    f"{{% set n.{name} = {{1: n.{name}, 2: n.{name}}} %}}",
                    f"{{% set n.{name} = n.{name} + n.{name} %}}",
                    "{% set n.a = n.a ~ n.a %}",
                    "{% set n.d = n.d * n.d %}",
                    f"{{{{ {self._any(3)} }}}}",
                )
            )
        inside = "".join(self._statement(depth - 1) for _ in range(pick.randint(1, 2)))
        kind = pick.randrange(8)
        if kind < 4:
            over = pick.choice(("range(60)", "range(99999)", "range(3000)", self._list(2)))
            condition = f" if {self._number(2)}" if pick.random() < 0.2 else ""
            return f"{{% for i in {over}{condition} %}}{inside}{{% endfor %}}"
        if kind == 4:
            return f"{{% if {self._any(2)} %}}{inside}{{% else %}}{self._statement(depth - 1)}{{% endif %}}"
        if kind == 5:
            return f"{{% set m %}}{inside}{{% endset %}}{{% set n.a = m %}}"
        if kind == 6:
            name = pick.choice(("upper", "indent(60)", "escape", "wordwrap(2)"))
            return f"{{% filter {name} %}}{inside}{{% endfilter %}}"
        again = "{% if k %}{{ g(k - 1) }}{{ g(k - 1) }}{% endif %}" if pick.random() < 0.5 else ""
        return f"{{% macro g(k) %}}{inside}{again}{{% endmacro %}}{{{{ g({pick.choice(NUMBERS)}) }}}}"

    def _text(self, depth: int) -> str:
        return self._made(TEXTS_FROM, (*TEXTS, "n.a", "n.a", "m", "messages[0].content"), depth)

    def _list(self, depth: int) -> str:
        return self._made(LISTS_FROM, LISTS, depth)

    def _number(self, depth: int) -> str:
        return self._made(NUMBERS_FROM, (*NUMBERS, "n.d", "n.d", "i"), depth)

    def _any(self, depth: int) -> str:
        if depth and self._random.random() < 0.2:
            return self._made(ANY_FROM, ("n",), depth)
        return self._random.choice((self._text, self._list, self._number))(depth)

    def _made(self, patterns: tuple[str, ...], simple: tuple[str, ...], depth: int) -> str:
        if depth == 0 or self._random.random() < 0.2:
            return self._random.choice(simple)
        makers = {"T": self._text, "L": self._list, "N": self._number, "V": self._any}
        fixed = {"A": TEXTS, "B": LISTS, "C": ("1", "3", "99999")}
        pattern, parts = f" {self._random.choice(patterns)} ", []
        for before, letter, after in zip(pattern, pattern[1:], pattern[2:], strict=False):
            if not letter.isupper() or before.isalnum() or after.isalnum():
                parts.append(letter)
            elif letter in makers:
                parts.append(f"({makers[letter](depth - 1)})")
            else:
                parts.append(f"({self._random.choice(fixed[letter])})")
        return f"({''.join(parts)})"


def main() -> None:
    from transom.text import ChatTemplate, ChatTemplateError, template_limits

    task = json.loads(sys.argv[1])
    for name in ("UNITS", "BYTES"):
        setattr(template_limits, name, getattr(template_limits, name) // task["divisor"])
    ChatTemplate("{{ messages }}").render([])
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    programs = Programs(task["seed"])
    for _ in range(task["number"]):
        source = programs.program()
        print(source.replace("\n", " "), flush=True)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        before = time.process_time()
        outcome = "text"
        try:
            ChatTemplate(source, seconds=1e6).render([{"role": "user", "content": "Hello, <b>you</b>"}])
        except ChatTemplateError as error:
            outcome = type(error.__cause__).__name__
            if isinstance(error.__cause__, MemoryError):
                sys.exit("out of memory")
            if len(str(error)) > 700:
                sys.exit("an error of any length")
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(f"\t{time.process_time() - before:.3f} {outcome}", flush=True)
    print(f"\tpeak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB")


if __name__ == "__main__":
    main()

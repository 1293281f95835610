"""Whatever a template asks for, rendering ends, within its budget of steps and of memory.

Draws: every program must end, whatever it is. Limits of the kernel, far above the budget, say which one does not.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from transom.errors import OptionError
from transom.text import ChatTemplate, ChatTemplateError, template_limits

DOUBLED = "{% set n = namespace(a=[1], t=(1,)) %}{% for i in range(99) %}{% set n.a = [n.a, n.a] %}{% endfor %}"
DEEP = "{% set n = namespace(a=()) %}{% for i in range(99999) %}{% set n.a = (n.a,) %}{% endfor %}"
LONG = "{% set s = 'x' * 16000000 %}"
WIDE = "{% set n = namespace(l=[]) %}{% set s = 'x' * 1000000 %}{% for i in range(40) %}"
KEEP = "{% set n.l = n.l + [t] %}{% endfor %}"
AROUND = "{% for x in ['x' * 100000] * 3 %}"
COSTLY = {
    "doubled lists, printed": DOUBLED + "{{ n.a }}",
    "doubled lists, as JSON": DOUBLED + "{{ n.a | tojson }}",
    "doubled lists, joined": DOUBLED + "{{ n.a | join }}",
    "doubled lists, as text": DOUBLED + "{{ (n.a ~ '') | length }}",
    "doubled lists, formatted": DOUBLED + "{{ '%s' % n.a }}",
    "doubled lists, in a method": DOUBLED + "{{ '{}'.format(n.a) }}",
    "doubled lists, in a namespace": DOUBLED + "{{ n }}",
    "doubled lists, compared": DOUBLED + DOUBLED.replace("n = ", "k = ").replace("n.a", "k.a") + "{{ n.a == k.a }}",
    "deep tuples, as a key": DEEP + "{{ {n.a: 1} }}",
    "deep tuples, looked up": DEEP + "{{ {}[n.a] }}",
    "deep tuples, unique": DEEP + "{{ [n.a] | unique | list }}",
    "long texts, kept": "{% set n = namespace(l=[]) %}{% for i in range(99999) %}"
    "{% set n.l = n.l + ['x' * 16000000] %}{% endfor %}",
    "long texts, printed": "{% for i in range(99999) %}{{ 'x' * 16000000 }}{% endfor %}",
    "long texts, cut": LONG + "{% for i in range(99999) %}{% set y = s[1:] %}{% endfor %}",
    "long texts, searched": LONG + "{% for i in range(99999) %}{% set y = 'y' in s %}{% endfor %}",
    "long texts, searched from the end": LONG + "{{ s.rfind('y' + 'x' * 5000000) }}",
    "long texts, in letters": LONG + "{% for i in range(99999) %}{% set y = s | list %}{% endfor %}",
    "long numbers": "{% set n = ('f' * 4000000) | int(base=16) %}{{ n // 3 }}",
    "long numbers, literally": "{{ 0x" + "f" * 50000 + " // 3 }}",
    "squared numbers": "{% set n = namespace(d=255) %}{% for i in range(99) %}{% set n.d = n.d * n.d %}{% endfor %}",
    "added numbers": "{% set n = namespace(d=1) %}{% for i in range(99999) %}{% set n.d = n.d + n.d %}{% endfor %}",
    "rounded numbers": "{{ 5 | round(-1000000000) }}{{ 5 | round(1000000000, 'ceil') }}",
    "sums of lists": "{{ ([[1]] * 99999) | sum(start=[]) | length }}",
    "wrapped words": "{{ ('x' * 4000000) | wordwrap(1) }}",
    "wrapped words, folded": "{% filter wordwrap(1) %}{{ 'x' * 4000000 }}{% endfilter %}",
    "links": "{{ ('a.b@' * 999999) | urlize }}",
    "tags": "{{ ('<!-- -->' * 999999) | striptags }}",
    "fields in fields": "{{ '{:{}}'.format('a', 999999999) }}",
    "fields by name": "{{ '{a:>{b}}'.format_map({'a': 1, 'b': 999999999}) }}",
    "wide fields": "{{ ('%99999d' * 99999) % ([1] * 99999) }}",
    "repeated fields": "{{ ('{0}' * 99999).format('x' * 99999) }}",
    "even fields": "{{ ('%99999d' * 99999) is even }}",
    "translated": "{{ ('x' * 99999).translate({120: 'y' * 99999}) }}",
    "bytes": "{{ (1).to_bytes(9999999999, 'big') }}",
    "wide indents": "{{ [[1]] | tojson(indent='x' * 16000000) }}",
    "indented lines": "{{ ('\n' * 999999) | indent(99999) }}",
    "wide separators": "{{ ([1] * 99999) | tojson(separators=['x' * 99999, ':']) }}",
    "many slices": "{{ [1] | slice(999999999) | list }}",
    "filtered items": "{% for i in range(99999) %}{% for k in range(99999) if false %}{% endfor %}{% endfor %}",
    "lists in ranges": "{% for i in range(99999) %}{% set y = [1] in range(99999) %}{% endfor %}",
    "recursive blocks": "{% block a %}{% for i in range(99) %}{{ self.a() }}{% endfor %}{% endblock %}",
    "constants": "{{ ('x' | center(16000000)) | wordwrap(1) }}",
    "automatic escaping": "{% autoescape true %}{{ messages }}{% endautoescape %}",
    "a time of any length": "{{ strftime_now('%999999999Y') }}",
    "links in brackets": "{{ (')' * 11000 ~ 'x)') | urlize }}",
    "links in dots": "{{ ('.' * 11000 ~ 'x.') | urlize }}",
    "keys that may collide": "{{ dict.fromkeys(range(999)) }}",
    "keys that may collide, in pairs": "{{ dict(range(999) | batch(2, 1)) }}",
    "keys that may collide, in a namespace": "{{ namespace(range(999) | batch(2, 1)) }}",
    "keys that may collide, unique": "{{ range(999) | unique | list }}",
    "keys that may collide, literally": "{{ {" + ", ".join(f"{i}: 1" for i in range(999)) + "} }}",
    "sorted by many attributes": "{{ ([{'a': 'x' * 100000}] * 2) | sort(attribute='a,' * 1000 ~ 'a') }}",
    "attributes of attributes": "{{ range(500) | map(attribute='real.' * 2000 ~ 'real') | list }}",
    "attributes of attributes, summed": "{{ range(500) | sum(attribute='real.' * 2000 ~ 'real') }}",
    "attributes of a loop": AROUND + "{{ ([loop] * 2000) | sort(attribute='nextitem') | length }}{% endfor %}",
    "attributes of a loop, joined": AROUND + "{{ ([loop] * 2000) | join(attribute='nextitem') | length }}{% endfor %}",
    "attributes of a joiner": "{{ ([joiner('x' * 100000)] * 2000) | sort(attribute='sep') }}",
    "views of mappings": "{{ ([dict(a='x' * 100000).keys().mapping] * 2000) | string | length }}",
    "sets": "{{ ([dict.fromkeys(['x' * 100000]).keys() - []] * 2000) | string | length }}",
    "constant lists": "{% for i in range(999) %}{% set q = 'x' | center(100000) | list %}{% endfor %}",
    "constant lists, filled": "{% for i in range(999) %}{% set q = [1] | batch(100000, 'x') | list %}{% endfor %}",
    "wide texts, joined": WIDE + "{% set t = s ~ '😀' %}" + KEEP,
    "wide texts, added": WIDE + "{% set t = s + '😀' %}" + KEEP,
    "wide texts, in blocks": WIDE + "{% set t %}{{ s }}😀{% endset %}" + KEEP,
    "long calls": "{{ f(" + "a, " * 20000 + "a) }}",
    "many branches": "{% if a %}" + "{% elif a %}x" * 9000 + "{% endif %}",
    "long templates": "{{ x }}" * 99999,
    "deep parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_costly_template_is_stopped_with_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for budget in ("UNITS", "BYTES"):
        monkeypatch.setattr(template_limits, budget, getattr(template_limits, budget) // 8)
    with pytest.raises(ChatTemplateError) as caught:
        ChatTemplate(COSTLY[name], seconds=1e6).render([{"role": "user", "content": "Hi"}])
    assert "was stopped" in caught.value.cause or name in ("automatic escaping", "long numbers, literally")
    assert "Memory" not in caught.value.cause
    assert caught.value.fix


def test_a_mapping_may_have_many_keys_that_are_texts_and_some_that_are_not() -> None:
    source = "{{ dict.fromkeys(range(9999) | map('string')) | length }} {{ dict([[1, 2], ['a', 'b']], c=3) }} "
    source += "{{ dict.fromkeys(range(99) | list + [1] * 999) | length }} {{ ['a', 'A', 1, 1.0] | unique | join }} "
    source += "{{ [{'a': 1, 'b': 2}, {'a': 1, 'b': 3}] | unique(attribute='a') | map(attribute='b') | join }}"
    assert ChatTemplate(source).render([]) == "9999 {1: 2, 'a': 'b', 'c': 3} 99 a1 2"


def test_what_a_template_reports_is_cut() -> None:
    with pytest.raises(ChatTemplateError) as caught:
        ChatTemplate("{{ raise_exception('x' * 1000000) }}").render([])
    assert len(str(caught.value)) < 700


def test_the_variables_of_a_template_are_found_within_the_limits() -> None:
    with pytest.raises(ChatTemplateError, match="was stopped"):
        ChatTemplate(COSTLY["deep parentheses"]).uses("tools")


def test_messages_nested_too_deep_are_refused() -> None:
    content: list[object] = []
    for _ in range(5000):
        content = [content]
    with pytest.raises(OptionError, match="nested too deep"):
        ChatTemplate("x").render([{"role": "user", "content": content}])


def test_an_iterator_is_read_once_as_in_jinja() -> None:
    source = "{% set i = [1, 2] | map('string') %}{{ i | join }}{{ i | join }}{{ [3, 4] | map('string') | first }}"
    assert ChatTemplate(source).render([]) == "123"


def test_a_text_that_grows_with_each_of_many_messages_is_no_attack() -> None:
    source = "{% set n = namespace(s='') %}{% for m in messages %}{% set n.s = n.s ~ m.content %}{% endfor %}{{ n.s }}"
    messages = [{"role": "user", "content": "x" * 1000}] * 600
    assert len(ChatTemplate(source).render(messages)) == 600_000


def run_programs(seed: int, number: int, divisor: int) -> None:
    task = json.dumps({"seed": seed, "number": number, "divisor": divisor})
    programs = Path(__file__).with_name("template_programs.py")
    done = subprocess.run([sys.executable, str(programs), task], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1:]} ended with {done.returncode}: {done.stderr[-2000:]}"
    assert done.stdout.count("\n\t") == number + 1


def test_random_programs_end(seed: int) -> None:
    run_programs(seed, 200, 128)


@pytest.mark.sweep
def test_thousands_of_random_programs_end(seed: int) -> None:
    run_programs(seed, 2000, 32)


@pytest.mark.sweep
@pytest.mark.seeds(1710706934)
def test_random_programs_end_with_the_real_budget(seed: int) -> None:
    run_programs(seed, 60, 1)


def test_the_budget_is_far_above_a_conversation() -> None:
    template = ChatTemplate("{% for m in messages %}{{ '<|' + m.role + '|>' + m.content | trim }}{% endfor %}")
    messages = [{"role": "user", "content": "word " * 1000}] * 400
    with template_limits.limits(5.0):
        assert len(template.render(messages)) > 1_900_000

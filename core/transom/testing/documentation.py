"""Writes `docs/operators.md` from the registry, with each backend's claims for each operator.

Run `python -m transom.testing.documentation docs/operators.md` or `make docs`. `--check` reports whether the file is
stale; `--installed` asks every installed backend, not only the first-party ones. Backends are asked about a made-up
machine, so that the file does not depend on the machine that it was written on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from transom.contract import Backend, Device, Offer
from transom.errors import TransomError
from transom.graph.bodies import has_body
from transom.graph.passes import decompose
from transom.hardware import find
from transom.ops import OpSchema, Param, operators
from transom.ops.standard import has_own_reference
from transom.preparation.lowering import claims_of, lower
from transom.testing.models import VARIANTS, tiny_decoder
from transom.testing.one_node import NODE, one_node

MACHINE = Device(
    kind="cpu",
    id="cpu",
    arch="x86_64",
    memory_bytes=64 << 30,
    name="a server CPU with AVX-512",
    features=frozenset({"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}),
    cores=16,
)
CARD = find((), "a100")
SEED = 0
Key = tuple[str, str]
"""Domain and name of an operator."""


@dataclass(frozen=True)
class Coverage:
    """One backend's claims for the samples of one operator."""

    whole: int
    """Samples that the backend claims."""
    by_body: int
    """Samples for which it claims the operator's body in simpler operators."""
    samples: int
    reasons: tuple[str, ...]
    """Why it refuses the other samples, each reason once."""
    forms: int = 0
    """Forms of small decoders that have this operator."""
    taken_forms: int = 0
    """Forms in which the backend claims every node with this operator."""

    def cell(self) -> str:
        if self.whole == self.samples:
            return "yes"
        if self.taken_forms:
            where = f"in {self.taken_forms} of {self.forms} forms of decoder"
            return f"{where}, else as its body" if self.by_body == self.samples - self.whole else where
        if self.whole + self.by_body == self.samples:
            return "as its body" if not self.whole else f"{self.whole} of {self.samples}, else as its body"
        taken = self.whole + self.by_body
        return f"{taken} of {self.samples}" if taken else "no"


def coverage(backend: Backend, schema: OpSchema, device: Device = MACHINE) -> Coverage:
    """Ask the backend about a one-node graph of each of the operator's samples. Nothing is compiled."""
    whole = by_body = count = 0
    reasons: dict[str, None] = {}
    assert schema.samples is not None
    for sample in schema.samples(np.random.default_rng(SEED)):
        count += 1
        graph, _ = one_node(schema, sample)
        claim = claims_of(graph, backend, device, {})[0]
        if claim.ok:
            whole += 1
            continue
        reasons.setdefault(claim.reason.replace(NODE, schema.name))
        if has_body(graph.model, next(graph.nodes())):
            try:
                lower(decompose(graph, [NODE]), backend, device, {})
            except TransomError:
                continue  # its reasons are about other operators, which have their own entries
            by_body += 1
    return Coverage(whole, by_body, count, tuple(reasons))


def with_decoders(backend: Backend, found: Mapping[Key, Coverage], device: Device = MACHINE) -> dict[Key, Coverage]:
    """The same coverage, with the backend's claims for the operators' nodes in small decoders of all forms."""
    result = dict(found)
    for form in VARIANTS.values():
        graph = tiny_decoder(np.random.default_rng(SEED), **form)
        claims = claims_of(graph, backend, device, {})
        refused: dict[Key, str] = {}
        for node, claim in zip(graph.nodes(), claims, strict=True):
            if not claim.ok:
                refused.setdefault((node.domain, node.op_type), claim.reason.replace(claim.node, node.op_type))
        for key in {(node.domain, node.op_type) for node in graph.nodes()} & set(result):
            old = result[key]
            reasons = dict.fromkeys([*old.reasons, *([refused[key]] if key in refused else [])])
            result[key] = replace(
                old, forms=old.forms + 1, taken_forms=old.taken_forms + (key not in refused), reasons=tuple(reasons)
            )
    return result


def machine_for(backend: Backend) -> Device:
    """`MACHINE`, or `CARD` for a backend that is not for CPUs."""
    for device, answer in zip((MACHINE, CARD), backend.probe([MACHINE, CARD]), strict=True):
        if isinstance(answer, Offer) or answer.code != "wrong_device":
            return device
    return MACHINE


def document(backends: Mapping[str, Backend]) -> str:
    """The text of the whole file for these backends by name."""
    schemas = [s for s in operators() if s.samples is not None]
    each = {}
    for name, backend in backends.items():
        device = machine_for(backend)
        each[name] = with_decoders(backend, {s.key: coverage(backend, s, device) for s in schemas}, device)
    found = {s.key: {name: each[name][s.key] for name in backends} for s in schemas}
    lines = [
        "# Operators of the neutral graph",
        "",
        "<!-- Generated from the operator registry by `make docs`. Change the registry, not this file. -->",
        "",
        "Operators without a domain are ONNX's own, at opset 24; the graph uses no others of them, but any ONNX file",
        "may, and the reference backend runs whatever `onnx.reference` can. Operators of the domain `transom` carry a",
        "body in standard operators, so every ONNX runtime can execute the graph. A backend that does not take a node",
        "gets the node's body in its place, and refuses the model only where it does not take that either.",
        "",
        "Plugins add operators through the hook `transom_ops`: schema, shape rule, NumPy reference, samples, body.",
        "",
        "## Coverage",
        "",
        f"Each backend's own answer to `claim` on {MACHINE.name}, or on an {CARD.name} where it is for GPUs, for",
        "graphs of one node out of each random sample, and for small decoders of all forms: a backend may take a node",
        "there that it does not take alone.",
        "The conformance kit (`transom.testing`) checks that what is claimed is also computed.",
        "",
        *_table(
            ["operator", "NumPy reference", "body", *(f"backend `{name}`" for name in backends)],
            (_row(s, found[s.key]) for s in schemas),
        ),
    ]
    lines += _reasons(schemas, found)
    lines += ["", "## Operators of Transom"]
    for schema in schemas:
        if schema.domain:
            lines += ["", *_own(schema)]
    rows = (_of_onnx(s) for s in schemas if not s.domain)
    lines += ["", "## Operators of ONNX", "", *_table(["operator", "inputs and outputs", "since opset"], rows)]
    return "\n".join(lines) + "\n"


def _name(schema: OpSchema) -> str:
    return f"{schema.domain}::{schema.name}" if schema.domain else schema.name


def _row(schema: OpSchema, cover: Mapping[str, Coverage]) -> list[str]:
    own = bool(schema.domain) or has_own_reference(schema.name)
    return [f"`{_name(schema)}`", "own" if own else "onnx", _body(schema), *(c.cell() for c in cover.values())]


def _body(schema: OpSchema) -> str:
    if schema.body is not None:
        return "own"
    import onnx

    theirs = onnx.defs.get_schema(schema.name, 24, "")
    return "onnx" if theirs.has_function or theirs.has_context_dependent_function else "none"  # type: ignore[attr-defined]


def _table(heads: Sequence[str], rows: Iterator[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def _reasons(schemas: Sequence[OpSchema], found: Mapping[Key, Mapping[str, Coverage]]) -> list[str]:
    """The reasons of refusals by backend; operators with the same reason are in one line."""
    lines: list[str] = []
    names = list(next(iter(found.values()))) if found else []
    for backend in names:
        grouped: dict[str, list[str]] = {}
        for schema in schemas:
            for reason in found[schema.key][backend].reasons:
                grouped.setdefault(reason, []).append(f"`{_name(schema)}`")
        if grouped:
            lines += ["", f"Why `{backend}` does not take some nodes as they are:", ""]
            lines += [f"- {', '.join(ops)}: {reason}" for reason, ops in grouped.items()]
    return lines


def _own(schema: OpSchema) -> list[str]:
    lines = [f"### `{_name(schema)}`", "", schema.doc.strip(), ""]
    for title, params in (("inputs", schema.inputs), ("outputs", schema.outputs)):
        lines += [*_table([title, "type", "meaning"], (_param(p) for p in params)), ""]
    rows = ([f"`{a.name}`", a.type, _default(a.default), a.doc.replace("|", "\\|")] for a in schema.attributes)
    return lines + _table(["attribute", "type", "default", "meaning"], rows)


def _param(param: Param) -> list[str]:
    kind = " (optional)" if param.optional else " (any number)" if param.variadic else ""
    return [f"`{param.name}`{kind}", ", ".join(param.types), param.doc.replace("|", "\\|")]


def _default(value: object) -> str:
    return "required" if value is None else f"`{value}`"


def _of_onnx(schema: OpSchema) -> list[str]:
    def names(params: Sequence[Param]) -> str:
        return ", ".join(f"{p.name}{'?' if p.optional else '…' if p.variadic else ''}" for p in params)

    page = f"https://onnx.ai/onnx/operators/onnx__{schema.name}.html"
    call = f"`({names(schema.inputs)}) → ({names(schema.outputs)})`"
    return [f"[`{schema.name}`]({page})", call, str(schema.since_version)]


def first_party(installed: bool = False) -> dict[str, Backend]:
    """The backends of Transom's own distribution by name; with `installed`, all backends that load.

    Raises:
        TransomError: a first-party backend does not load, so the file would lack its column.
    """
    from transom.plugins import load_plugins

    plugins = load_plugins()
    if broken := [f for f in plugins.failures if f.distribution == "transom"]:
        raise TransomError(f"{broken[0].entry_point} does not load: {broken[0].error}", broken[0].fix)
    return {name: b.backend for name, b in sorted(plugins.backends.items()) if installed or b.core}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if `--check` finds the file stale."""
    parser = argparse.ArgumentParser(prog="python -m transom.testing.documentation", description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the file is stale")
    parser.add_argument("--installed", action="store_true", help="ask every installed backend")
    given = parser.parse_args(arguments)
    text = document(first_party(given.installed))
    if given.check:
        fresh = given.path.exists() and given.path.read_text(encoding="utf-8") == text
        print(f"{given.path} is {'up to date' if fresh else 'stale; run: make docs'}")
        return 0 if fresh else 1
    given.path.write_text(text, encoding="utf-8")
    print(f"{given.path}: {text.count(chr(10))} lines")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TransomError as e:
        sys.exit(str(e))

"""Lowering: the backend claims the nodes of a graph; a node that it refuses is decomposed, or the load fails.

Runs before compiling. A refused node is replaced by its function body in simpler operators. If the backend refuses
those too, the load ends with an error that names the node, the operator and the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from transom.contract import Backend, Claim, Device, Options
from transom.errors import EngineError, UnsupportedError, option
from transom.graph import Graph
from transom.graph.bodies import has_body
from transom.graph.passes import decompose
from transom.preparation.plugin_calls import guarded


@dataclass(frozen=True)
class Lowered:
    """A graph with the backend's claims, after decomposing. What `lower` returns has no refused node."""

    graph: Graph
    claims: tuple[Claim, ...]
    """One claim for each node of `graph`, in the same order."""
    decomposed: Mapping[str, str]
    """Replaced node -> why the backend refused it. Includes nodes inside of replaced bodies."""

    @property
    def refused(self) -> dict[str, str]:
        """Refused node without a body -> reason."""
        return {c.node: c.reason for c in self.claims if not c.ok}

    @property
    def exact(self) -> bool:
        """Whether no claim is approximate."""
        return all(c.exact for c in self.claims)

    @property
    def divergence(self) -> float | None:
        """The largest divergence that an approximate claim declares, nats; None if none declares one."""
        return max((c.divergence for c in self.claims if not c.exact and c.divergence is not None), default=None)

    def notes(self) -> list[str]:
        """Lines for the report: the number of nodes for each reason."""
        counts = Counter(self.decomposed.values())
        return [f"{n} node{'s' * (n > 1)} run in simpler operators: {reason}" for reason, n in counts.items()]


def claims_of(graph: Graph, backend: Backend, device: Device, options: Options) -> tuple[Claim, ...]:
    """The backend's claims, one for each node, in the graph's order. One refusal refuses its whole group.

    Raises:
        EngineError: the backend failed, left a node out, answered twice for one, or refused one without a reason.
        TransomError: as the backend raises it.
    """
    names = [str(n.name) for n in graph.nodes()]
    answers = guarded(backend.name, "claiming", lambda: list(backend.claim(graph, device, options)))
    if strange := [a for a in answers if not isinstance(a, Claim)]:
        raise _breach(backend, f"answers with a {type(strange[0]).__name__} in claim()")
    claims = {c.node: c for c in answers}
    if silent := next((n for n in names if n not in claims), None):
        raise _breach(backend, f"is silent on the node {silent} in claim()")
    if len(answers) != len(names):
        raise _breach(backend, "answers for a node twice or for one that is not there in claim()")
    if mute := next((c for c in answers if not c.ok and not c.reason), None):
        raise _breach(backend, f"refuses the node {mute.node} without a reason")
    return _all_or_nothing([claims[n] for n in names])


def _all_or_nothing(claims: Sequence[Claim]) -> tuple[Claim, ...]:
    """Refuse every node of a group in which one node is refused: the backend runs them only fused."""
    broken: dict[str, str] = {}
    for c in claims:
        if c.group and not c.ok:
            broken.setdefault(c.group, c.reason)
    why = "runs only fused with a node that is refused"
    return tuple(
        replace(c, ok=False, reason=f"{why}: {broken[c.group]}") if c.ok and c.group in broken else c for c in claims
    )


def _breach(backend: Backend, what: str) -> EngineError:
    return EngineError(
        f"The backend {backend.name} {what}",
        f"Choose another with {option('backend')}, or report it to the authors of {backend.name}",
    )


def try_lower(graph: Graph, backend: Backend, device: Device, options: Options) -> Lowered:
    """Claim the nodes, decompose refused ones that have a body, and repeat until nothing changes.

    Raises:
        EngineError: the backend broke its contract.
    """
    decomposed: dict[str, str] = {}
    while True:
        lowered = Lowered(graph, claims_of(graph, backend, device, options), decomposed)
        refused = lowered.refused
        bodies = [str(n.name) for n in graph.nodes() if n.name in refused and has_body(graph.model, n)]
        if not bodies:
            return lowered
        decomposed |= {name: refused[name] for name in bodies}
        graph = decompose(graph, bodies)


def lower(graph: Graph, backend: Backend, device: Device, options: Options) -> Lowered:
    """Lower a graph until the backend claims every node.

    Raises:
        UnsupportedError: a node is refused and has no body, or its body is refused too.
        EngineError: the backend broke its contract.
    """
    lowered = try_lower(graph, backend, device, options)
    refused = lowered.refused
    if not refused:
        return lowered
    nodes = [(operator_name(n.domain, n.op_type), str(n.name)) for n in lowered.graph.nodes() if n.name in refused]
    raise UnsupportedError(
        f"The backend {backend.name} cannot run {len(nodes)} node{'s' * (len(nodes) > 1)} of this model",
        "Choose another backend, or see every node with: transom explain MODEL",
        _reasons_before(graph, lowered) + refusal_lines([(operator, name, refused[name]) for operator, name in nodes]),
    )


def _reasons_before(graph: Graph, lowered: Lowered) -> list[str]:
    """Why a node was refused at first whose decomposition was refused too; this tells more than the second reason."""
    names = tuple(lowered.refused)
    tried = [
        (operator_name(n.domain, n.op_type), str(n.name), lowered.decomposed[str(n.name)])
        for n in graph.nodes()
        if n.name in lowered.decomposed and any(inner.startswith(f"{n.name}.") for inner in names)
    ]
    return [f"{line}; tried in simpler operators" for line in refusal_lines(tried)]


def operator_name(domain: str, op_type: str) -> str:
    """`"MatMul"`, `"transom::CachedAttention"`."""
    return f"{domain}::{op_type}" if domain else op_type


def refusal_lines(refused: Sequence[tuple[str, str, str]]) -> list[str]:
    """Turn (operator, node, reason) into counts by reason, largest first, each with its first node."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for operator, node, reason in refused:
        grouped.setdefault((operator, reason), []).append(node)
    ordered = sorted(grouped.items(), key=lambda item: -len(item[1]))
    return [f"{len(nodes)} × {operator}: {reason} (first: {nodes[0]})" for (operator, reason), nodes in ordered]

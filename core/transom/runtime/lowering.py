"""Lower, decompose or refuse: a backend claims every node, and what it does not claim is replaced or refused.

Runs before compiling. A node the backend says no to is replaced by its function body in standard operators; if the
backend says no to those too, the load ends here, naming the node, the operator and the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transom.contract import Backend, Claim, Device, Options
from transom.errors import EngineError, UnsupportedError
from transom.graph import Graph
from transom.graph.bodies import has_body as node_has_body
from transom.graph.passes import decompose
from transom.ops import find


@dataclass(frozen=True)
class Lowered:
    """A graph in which the backend claims every node."""

    graph: Graph
    claims: tuple[Claim, ...]
    decomposed: Mapping[str, str]
    """Node -> why the backend did not take it as it was."""

    @property
    def exact(self) -> bool:
        """No claim is approximate."""
        return all(c.exact for c in self.claims)

    def notes(self) -> list[str]:
        """One line for each reason, with the number of nodes: for the report."""
        counts = Counter(self.decomposed.values())
        return [f"{n} node{'s' * (n > 1)} run in standard operators: {reason}" for reason, n in counts.items()]


def claims_of(graph: Graph, backend: Backend, device: Device, options: Options) -> tuple[Claim, ...]:
    """The backend's claims, one for each node, in the graph's order.

    Raises:
        EngineError: the backend raised, or is silent on a node, answers twice, or gives no reason with a no.
    """
    names = [str(n.name) for n in graph.nodes()]
    try:
        answers = list(backend.claim(graph, device, options))
    except Exception as e:  # a backend is somebody else's code: whatever it raises becomes one sentence
        raise EngineError(f"the backend {backend.name} failed while claiming: {e}", _report(backend)) from e
    claims = {c.node: c for c in answers}
    silent = [n for n in names if n not in claims]
    if silent or len(answers) != len(names):
        what = f"is silent on {silent[0]}" if silent else "answered for a node twice or for one that is not there"
        raise EngineError(f"the backend {backend.name} {what} in claim()", _report(backend))
    if mute := next((c for c in answers if not c.ok and not c.reason), None):
        raise EngineError(f"the backend {backend.name} refuses {mute.node} without a reason", _report(backend))
    return tuple(claims[n] for n in names)


def _report(backend: Backend) -> str:
    return f"Report it to the authors of {backend.name}, or choose another with backend=…"


def lower(graph: Graph, backend: Backend, device: Device, options: Options) -> Lowered:
    """Claim, decompose what is refused, claim again until every node is claimed.

    Raises:
        UnsupportedError: a node is refused and has no body, or its body is refused too.
        EngineError: the backend broke its contract.
    """
    decomposed: dict[str, str] = {}
    while True:
        claims = claims_of(graph, backend, device, options)
        refused = {c.node: c.reason for c in claims if not c.ok}
        if not refused:
            return Lowered(graph, claims, decomposed)
        nodes = {str(n.name): n for n in graph.nodes() if n.name in refused}
        bodies = [name for name, n in nodes.items() if node_has_body(graph.model, n)]
        if len(bodies) < len(refused):
            raise UnsupportedError(
                f"the backend {backend.name} cannot run {len(refused) - len(bodies)} node(s) of this model",
                "Choose another backend, or see them all with: transom explain MODEL",
                refusal_lines([(n.op_type, n.domain, name, refused[name]) for name, n in nodes.items()
                               if name not in bodies]),
            )  # fmt: skip
        decomposed |= {name: refused[name] for name in bodies}
        graph = decompose(graph, bodies)


def refusal_lines(refused: Sequence[tuple[str, str, str, str]]) -> list[str]:
    """(operator, domain, node, reason) -> counts by reason first, each with its first node."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for op, domain, node, reason in refused:
        grouped.setdefault((f"{domain}::{op}" if domain else op, reason), []).append(node)
    ordered = sorted(grouped.items(), key=lambda item: -len(item[1]))
    return [f"{len(nodes)} × {op}: {reason} (first: {nodes[0]})" for (op, reason), nodes in ordered]


def has_body(domain: str, op_type: str) -> bool:
    """Whether the registry can put standard operators in place of this one."""
    schema = find(domain, op_type)
    return schema is not None and schema.body is not None

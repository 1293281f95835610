"""Before compiling: every backend against every node, with the reason where it says no. Counts first, nodes after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transom.contract import Backend, Device, Offer, Refusal
from transom.errors import TransomError
from transom.graph import Graph
from transom.graph.passes import decompose
from transom.runtime.loading import Machine
from transom.runtime.lowering import claims_of


@dataclass(frozen=True)
class NodeAnswer:
    """What a backend does with one node."""

    node: str
    operator: str
    """`"MatMul"`, `"transom::CachedAttention"`."""
    outcome: str
    """`"runs"`, `"decomposed"` (its body in standard operators runs), or `"refused"`."""
    reason: str = ""
    exact: bool = True


@dataclass(frozen=True)
class BackendAnswer:
    """What a backend does with a device and, where it offers to run there, with the model's nodes."""

    backend: str
    device: str
    answer: Offer | Refusal
    nodes: tuple[NodeAnswer, ...] = ()
    error: str = ""
    """Why the backend could not be asked about the nodes."""

    @property
    def runs(self) -> bool:
        """Whether the whole model would run."""
        return bool(self.nodes) and not self.error and all(n.outcome != "refused" for n in self.nodes)

    def counts(self) -> list[tuple[int, str, str, str]]:
        """(nodes, operator, outcome, reason), refused first, then by count."""
        order = {"refused": 0, "decomposed": 1, "runs": 2}
        counted = Counter((n.operator, n.outcome, n.reason) for n in self.nodes)
        rows = [(count, *key) for key, count in counted.items()]
        return sorted(rows, key=lambda r: (order[r[2]], -r[0], r[1]))


@dataclass(frozen=True)
class Explanation:
    """The answers of all backends for all devices."""

    model: str
    nodes: int
    answers: tuple[BackendAnswer, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "nodes": self.nodes,
            "answers": [
                {
                    "backend": a.backend,
                    "device": a.device,
                    "offer": {"band": a.answer.band, "why": a.answer.why} if isinstance(a.answer, Offer) else None,
                    "refusal": {"code": a.answer.code, "reason": a.answer.reason, "fix": a.answer.fix}
                    if isinstance(a.answer, Refusal)
                    else None,
                    "runs": a.runs,
                    "error": a.error or None,
                    "counts": [{"nodes": c, "operator": op, "outcome": o, "reason": r} for c, op, o, r in a.counts()],
                    "claims": [vars(n) for n in a.nodes],
                }
                for a in self.answers
            ],
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.model}: {self.nodes} nodes"
        for a in self.answers:
            yield ""
            if isinstance(a.answer, Refusal):
                yield f"{a.backend} on {a.device}: no, {a.answer.reason}"
                if a.answer.fix:
                    yield f"  {a.answer.fix}"
                continue
            yield f"{a.backend} on {a.device}: {'yes' if a.runs else 'no'}, {a.answer.band}, {a.answer.why}"
            if a.error:
                yield f"  {a.error}"
            for count, operator, outcome, reason in a.counts():
                yield f"  {count:5} × {operator} {outcome}" + (f": {reason}" if reason else "")


def explain_graph(graph: Graph, name: str, machine: Machine, *, device: str = "auto") -> Explanation:
    """Ask every backend about every device, and about every node where it offers.

    Args:
        device: `"auto"` for all devices that are here, or the id of one.
    """
    by_id = {d.id: d for d in machine.devices}
    wanted = [d for d in machine.devices if d.id == device] if device != "auto" else list(machine.devices)
    if device == "auto":
        wanted = [d for d in wanted if d.kind != "remote"]
    ids = {d.id for d in wanted}
    answers = []
    for backend, answer in machine.answers:
        if answer.device_id not in ids:
            continue
        if isinstance(answer, Refusal):
            answers.append(BackendAnswer(backend, answer.device_id, answer))
            continue
        found = machine.plugins.backends[backend].backend
        try:
            nodes = tuple(_ask(graph, found, by_id[answer.device_id]))
            answers.append(BackendAnswer(backend, answer.device_id, answer, nodes))
        except TransomError as e:
            answers.append(BackendAnswer(backend, answer.device_id, answer, error=str(e)))
    return Explanation(name, len(list(graph.nodes())), tuple(answers))


def _ask(graph: Graph, backend: Backend, device: Device) -> Iterator[NodeAnswer]:
    nodes = {str(n.name): n for n in graph.nodes()}
    for claim in claims_of(graph, backend, device, {}):
        node = nodes[claim.node]
        operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        if claim.ok:
            yield NodeAnswer(claim.node, operator, "runs", exact=claim.exact)
            continue
        outcome, reason = "refused", claim.reason
        if node.op_identifier() in graph.model.functions:
            inner = decompose(graph, [claim.node])
            new = [c for c in claims_of(inner, backend, device, {}) if c.node not in nodes]
            refused = [c for c in new if not c.ok]
            outcome = "refused" if refused else "decomposed"
            if refused:
                reason += f"; and of its body: {refused[0].reason}"
        yield NodeAnswer(claim.node, operator, outcome, reason, claim.exact)

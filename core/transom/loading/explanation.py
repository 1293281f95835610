"""Explains before compiling which nodes of a graph each backend runs, decomposes or refuses, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transom.contract import Backend, Device, Offer, Refusal, Verdict
from transom.errors import TransomError, option
from transom.graph import Graph
from transom.loading.machine import Machine
from transom.preparation.lowering import claims_of, operator_name, try_lower


@dataclass(frozen=True)
class NodeAnswer:
    """What a backend does with one node."""

    node: str
    operator: str
    """For example `"MatMul"` or `"transom::CachedAttention"`."""
    outcome: str
    """`"runs"`, `"decomposed"` (its body in simpler operators runs), `"refused"`, or `"unused"`: it could run, but the
    backend runs it only together with nodes that are refused."""
    reason: str = ""
    exact: bool = True


@dataclass(frozen=True)
class BackendAnswer:
    """A backend's answer for a device and, if it offers to run there, for the model's nodes."""

    backend: str
    device: str
    answer: Offer | Refusal
    nodes: tuple[NodeAnswer, ...] = ()
    error: str = ""
    """Why the backend could not be asked about the nodes."""
    verdict: Verdict | None = None
    """The answer for a bundle, which has no nodes."""

    @property
    def runs(self) -> bool:
        """Whether the whole model would run."""
        if self.verdict is not None:
            return self.verdict.state in ("ok", "slower")
        return bool(self.nodes) and not self.error and all(n.outcome != "refused" for n in self.nodes)

    def counts(self) -> list[tuple[int, str, str, str]]:
        """(nodes, operator, outcome, reason), refused first, then by count."""
        order = {"refused": 0, "decomposed": 1, "runs": 2, "unused": 3}
        counted = Counter((n.operator, n.outcome, n.reason) for n in self.nodes)
        rows = [(count, *key) for key, count in counted.items()]
        return sorted(rows, key=lambda r: (order[r[2]], -r[0], r[1]))


@dataclass(frozen=True)
class Explanation:
    """The answers of all backends for all devices."""

    model: str
    nodes: int
    answers: tuple[BackendAnswer, ...]
    notes: tuple[str, ...] = ()
    """Notes of the backend from compiling a bundle."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "nodes": self.nodes,
            "notes": list(self.notes),
            "answers": [
                {
                    "backend": a.backend,
                    "device": a.device,
                    "offer": {
                        "band": a.answer.band,
                        "why": a.answer.why,
                        "deterministic": a.answer.deterministic,
                    }
                    if isinstance(a.answer, Offer)
                    else None,
                    "refusal": {"code": a.answer.code, "reason": a.answer.reason, "fix": a.answer.fix}
                    if isinstance(a.answer, Refusal)
                    else None,
                    "verdict": None if a.verdict is None else {"state": a.verdict.state, "reason": a.verdict.reason},
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
        yield f"{self.model}: {self.nodes} nodes" if self.nodes else f"{self.model}: compiled"
        yield from (f"  {note}" for note in self.notes)
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
            if a.verdict is not None and (a.verdict.reason or a.verdict.state != "ok"):
                yield f"  {a.verdict.reason or a.verdict.state}"
            for count, operator, outcome, reason in a.counts():
                yield f"  {count:5} × {operator} {outcome}" + (f": {reason}" if reason else "")
            if not a.answer.deterministic:
                yield f"  not for {option('deterministic', True)}: it does not promise the same bits each time"


def explain_graph(graph: Graph, name: str, machine: Machine, *, device: str = "auto") -> Explanation:
    """Ask every backend about every device, and about every node if it offers to run there.

    Args:
        device: `"auto"` for all devices that are here, or the id of one.
    """
    wanted = {d.id: d for d in machine.devices if (d.kind != "remote" if device == "auto" else d.id == device)}
    answers = []
    for backend, answer in machine.answers:
        if answer.device_id not in wanted:
            continue
        if isinstance(answer, Refusal):
            answers.append(BackendAnswer(backend, answer.device_id, answer))
            continue
        try:
            nodes = _ask(graph, machine.plugins.backends[backend].backend, wanted[answer.device_id])
            answers.append(BackendAnswer(backend, answer.device_id, answer, nodes))
        except TransomError as error:
            answers.append(BackendAnswer(backend, answer.device_id, answer, error=str(error)))
    return Explanation(name, len(list(graph.nodes())), tuple(answers))


def _ask(graph: Graph, backend: Backend, device: Device) -> tuple[NodeAnswer, ...]:
    """The outcome for each node when the graph is lowered as far as possible (`lowering.try_lower`)."""
    options = {"context": None, "precision": "auto", "threads": None, "max_kl": None, "calibration": ()}
    first = {c.node: c for c in claims_of(graph, backend, device, options)}
    last = try_lower(graph, backend, device, options)
    final = {c.node: c for c in last.claims}
    inside: dict[str, str] = {}
    for inner, reason in last.refused.items():
        for outer in _calls(inner):
            if outer in first and outer in last.decomposed:
                inside.setdefault(outer, reason)
    answers = []
    for node in graph.nodes():
        claim = final.get(str(node.name)) or first[str(node.name)]  # the last claim, if the node is still in the graph
        outcome, reason = "runs", claim.reason
        if claim.ok and claim.reason and last.refused:
            outcome = "unused"
        if not claim.ok:
            outcome = "decomposed" if claim.node in last.decomposed and claim.node not in inside else "refused"
        if claim.node in inside:
            reason += f"; and inside its body: {inside[claim.node]}"
        answers.append(NodeAnswer(claim.node, operator_name(node.domain, node.op_type), outcome, reason, claim.exact))
    return tuple(answers)


def _calls(node: str) -> Iterator[str]:
    """The names of nodes from whose body it may come: `decompose` names a node inside of `a` for example `a.MatMul`."""
    while "." in node:
        node = node.rpartition(".")[0]
        yield node

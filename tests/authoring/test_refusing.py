"""Why a graph is not taken, node by node.

Draws: the numbers are only carried along; what is checked does not depend on them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from transom.authoring.refusing import WHOLE, NoAttention, claim, refusals
from transom.contract import Device
from transom.errors import UnsupportedError
from transom.graph.sparse import is_attention
from transom.programs.reading import UnsupportedNode
from transom.sparsity import Sparsity
from transom.testing.models import tiny_decoder


class Anything:
    tile, largest_head, largest_group, interleaved, float8 = 1, 1 << 20, 1 << 20, True, True

    def matrix(self, weight: Any) -> str:
        return ""

    def by(self, weight: Any, *, head: bool) -> str:
        return ""

    def policy(self, policy: Sparsity) -> str:
        return ""


def test_every_reason_has_its_node(rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng)
    nodes = list(graph.nodes())
    wrong = nodes[int(rng.integers(1, len(nodes)))]

    def no_form() -> None:
        raise UnsupportedNode(wrong, "no kernel")

    def unsupported() -> None:
        raise UnsupportedError("two values are carried on", "Use another backend")

    def no_attention() -> None:
        raise NoAttention("no tile")

    kernels = Anything()
    assert refusals(graph, kernels, no_attention) == {str(n.name): "no tile" for n in nodes if is_attention(n)}
    assert refusals(graph, kernels, lambda: None) == {}
    assert refusals(graph, kernels, no_form) == {str(wrong.name): "no kernel"}
    assert refusals(graph, kernels, unsupported) == {str(nodes[0].name): "two values are carried on"}
    plain = tiny_decoder(rng)
    plain.model.metadata_props.clear()
    assert plain.decoder is None
    reasons = refusals(plain, kernels, no_form)
    assert list(reasons) == [str(node.name) for node in nodes]
    assert set(reasons.values()) == {"runs decoders only, and this graph has no cache"}


def onnx_claims(graph: Any) -> Any:
    from transom_mobile_export.onnx.claims import claims

    return claims(graph, {"precision": "auto"})


def qnn_claims(graph: Any) -> Any:
    from transom_mobile_export.qnn.claims import claims

    return claims(graph, Device("cpu", "cpu", "x86_64", 1 << 34), {"precision": "f16"})  # on the emulator


def tensorrt_claims(graph: Any) -> Any:
    from transom_tensorrt.claims import claims

    return claims(graph, Device("cuda", "cuda:0", "sm_89", 1 << 34), {"precision": "f16"})


def triton_claims(graph: Any) -> Any:
    from transom_cuda_triton.claims import claims

    return claims(graph, Device("cuda", "cuda:0", "sm_89", 1 << 34), {"precision": "f16"})


@pytest.mark.parametrize("claims", [onnx_claims, qnn_claims, tensorrt_claims, triton_claims], ids=lambda f: f.__name__)
def test_a_backend_for_whole_decoders_answers_for_every_node(rng: np.random.Generator, claims: Any) -> None:
    graph = tiny_decoder(rng, layers=3)
    assert all(c.ok and not c.reason for c in claims(graph))
    wanted = spoiled(graph)
    answers = list(claims(graph))
    assert [c.node for c in answers] == [str(n.name) for n in graph.nodes()]
    assert {c.node: c.reason for c in answers if not c.ok} == wanted
    assert {c.reason for c in answers if c.ok} == {WHOLE}


def test_each_of_several_refused_nodes_is_named_with_its_own_reason_and_no_other_node_is(
    rng: np.random.Generator,
) -> None:
    graph = tiny_decoder(rng, layers=3)
    wanted = spoiled(graph)
    assert refusals(graph, Anything(), lambda: None) == wanted


def spoiled(graph: Any) -> dict[str, str]:
    """Spoil nodes of all layers in different ways. Returns their reasons by name."""
    wanted, last = {}, max(node.attributes.get_int("layer", 0) for node in graph.nodes() if is_attention(node))
    for node in graph.nodes():
        name = str(node.name)
        if node.op_type == "Swish":
            node.op_type = "Mish"
            wanted[name] = "no kernel for Mish"
        elif is_attention(node) and node.attributes.get_int("layer", 0) in (0, last):
            node.attributes["is_causal"] = ir.AttrInt64("is_causal", 0)
            wanted[name] = "the attention kernels are causal"
        elif name in ("layers.1.mlp_norm", "norm"):
            node.attributes["axis"] = ir.AttrInt64("axis", 0)
            wanted[name] = "a normalization whose scale is not a constant vector over the last axis"
    assert len(wanted) > 5
    return wanted


@pytest.mark.parametrize("first", ["embedding", "rotary.positions", "layers.0.q", "layers.0.q.rotated"])
def test_nodes_behind_a_refused_one_are_not_refused_for_it(rng: np.random.Generator, first: str) -> None:
    graph = tiny_decoder(rng, layers=2)
    node = next(n for n in graph.nodes() if n.name == first)
    node.op_type, node.domain = "Strange", "made.up"
    assert refusals(graph, Anything(), lambda: None) == {first: "no kernel for made.up::Strange"}


def test_an_attention_node_that_a_backend_refuses_for_its_layer_is_named_beside_others(
    rng: np.random.Generator,
) -> None:
    graph = tiny_decoder(rng, layers=2)
    swish = next(n for n in graph.nodes() if n.op_type == "Swish")
    swish.op_type = "Mish"
    attention = [str(n.name) for n in graph.nodes() if is_attention(n)]
    found = refusals(graph, Anything(), lambda: None, lambda node, layer: f"{layer.head_dim} columns")
    width = f"{graph.decoder.layers[0].head_dim} columns"
    assert found == {str(swish.name): "no kernel for Mish", **dict.fromkeys(attention, width)}


def test_the_rest_of_a_refused_decoder_is_claimed_with_a_reservation(rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng)
    one, two, *_ = graph.nodes()
    assert claim(one, {}) is None
    answers = [claim(node, {str(two.name): "no kernel"}) for node in (one, two)]
    assert [(c.ok, c.reason) for c in answers if c is not None] == [(True, WHOLE), (False, "no kernel")]

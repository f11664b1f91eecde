"""Replace the placeholders of feed-forward experts by the nodes of their lowerings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch

from ...errors import CaptureError
from ...experts.ffn.call import Weights, matrix
from ...ir.structural_key import structural_key
from ..trace.ffn_placeholder import DOMAIN, OPERATOR, TracedFeedForward
from .body import body_graph
from .builder import Builder
from .choose import Chosen
from .contrib import contrib, dequantized
from .dense import dense
from .scan import scan
from .site import Site
from .sparse import sparse


@dataclass
class Expansion:
    """What an expansion added.

    weights: initializers that replace the experts' own.
    stand_ins: the dequantized values of quantized weights, by name.
    """

    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    stand_ins: dict[str, torch.Tensor] = field(default_factory=dict)


def expand(
    model: ir.Model, calls: list[TracedFeedForward], tensors: dict[str, torch.Tensor],
    chosen: dict[int, Chosen], bits: int | None, opset: int,
) -> Expansion:  # fmt: skip
    """Expand every placeholder; new weights become inputs of the graph.

    tensors: values of the graph's inputs that are weights, by name.
    chosen: the lowering, by the number of the call.
    bits: of quantized weights, or None.
    """
    done = Expansion()
    bodies: dict[Any, ir.Graph] = {}
    for node in [n for n in model.graph if (n.domain, n.op_type) == (DOMAIN, OPERATOR)]:
        call = calls[node.attributes["number"].as_int()]
        lowering = chosen[call.number].lowering
        site = _site(node, call, tensors, bodies, opset)
        build = Builder(f"moe_rewrite.experts.{call.name}")
        if lowering == "contrib":
            out = contrib(build, site, bits)
            model.opset_imports["com.microsoft"] = 1
            if bits is not None:
                done.stand_ins |= _stand_ins(site, bits)
        else:
            out = {"dense": dense, "sparse": sparse, "open": scan}[lowering](build, site)
        if set(build.weights) & set(done.weights):  # a region that runs twice
            for value in build.inputs:
                value.name = f"{value.name}.{node.name}"
        done.weights |= {
            str(v.name): t for v, t in zip(build.inputs, build.weights.values(), strict=True)
        }
        model.graph.inputs.extend(build.inputs)
        out.type, out.shape = node.outputs[0].type, node.outputs[0].shape
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], build.nodes, node.outputs, [out]
        )
    model.opset_imports.pop(DOMAIN, None)
    return done


def _site(
    node: ir.Node, call: TracedFeedForward, tensors: dict[str, torch.Tensor],
    bodies: dict[Any, ir.Graph], opset: int,
) -> Site:  # fmt: skip
    x, gates, *flat = node.inputs
    assert call.routing is not None and x is not None and gates is not None
    each = len(flat) // call.routing.experts
    weights: list[list[Any]] = [flat[i : i + each] for i in range(0, len(flat), each)]
    odd = [w.name for own in weights for w in own if w.name not in tensors]
    if odd:
        raise CaptureError(f"{call.name}: {odd[0]} is computed from a weight, expected a weight")
    first = [tensors[str(w.name)] for w in weights[-1]]
    if any(call.open):
        first = [w[0] if stacked else w for w, stacked in zip(first, call.open, strict=True)]
    width = int(x.shape[-1])  # type: ignore[index, arg-type]
    key = (
        structural_key(call.body.middle.module.graph), call.body.ups, call.body.down, call.body.extra,
        *(t.shape for t in first), first[0].dtype,
    )  # fmt: skip
    if key not in bodies:
        bodies[key] = body_graph(call, first, width, opset)
    return Site(call, x, gates, weights, call.routing.top_k, width, bodies[key], tensors)


def _stand_ins(site: Site, bits: int) -> dict[str, torch.Tensor]:
    made = {}
    for own in site.weights:
        values: Weights = [site.tensors[str(w.name)] for w in own]
        for product in (*site.call.body.ups, site.call.body.down):
            stored = dequantized(matrix(product, values), bits)
            stored = stored.t() if product.transposed else stored
            made[str(own[product.weight].name)] = stored.view_as(values[product.weight])
    return made

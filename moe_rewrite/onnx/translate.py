"""FunctionalModel -> an ONNX graph without weights, and its weights by name."""

from __future__ import annotations

import onnx_ir as ir
import torch

from ..errors import CaptureError, ConfigError, MoeRewriteError
from .file.skeleton import Skeleton
from .lowerings.choose import Choice, Chosen
from .lowerings.expand import expand
from .rewrites import rewrite
from .rewrites.float16_casts import insert_float16_casts
from .trace.functional import FunctionalModel
from .trace.link import linked
from .trace.segment_export import segment_modules
from .trace.torch_export import one_registry, quiet, root_cause
from .trace.translations import translations


def translate(
    functional: FunctionalModel, opset: int, choice: Choice, open_inputs: bool
) -> Skeleton:
    """Translate a model. open_inputs: a call may pass experts, so they are not joined with weights.

    Raises CaptureError with the reason of torch.export or the exporter, ConfigError for a lowering
    that does not fit.
    """
    with one_registry():
        model, chosen = _model(functional, opset, choice)
        with torch.no_grad(), quiet():
            return _skeleton(model, functional, opset, chosen, choice.bits, open_inputs)


def _model(
    functional: FunctionalModel, opset: int, choice: Choice
) -> tuple[ir.Model, dict[int, Chosen]]:
    """Export segment by segment; or all segments as one, if something between them cannot be a
    graph's value, or if a segment alone does not show a relation between sizes."""
    try:
        return _translated(functional, opset, choice)
    except ConfigError:
        raise
    except Exception:  # torch raises many kinds
        if len(functional.segments) > 1:
            functional.as_one()
    try:
        return _translated(functional, opset, choice)
    except MoeRewriteError:
        raise
    except Exception as error:  # all mean "not exported"
        cause = root_cause(error)
        lines = [line for line in str(cause).splitlines() if line.strip()]
        raise CaptureError(
            f"this model cannot be written as ONNX: {type(cause).__name__}: "
            f"{lines[0] if lines else ''}"
        ) from error


def _translated(
    functional: FunctionalModel, opset: int, choice: Choice
) -> tuple[ir.Model, dict[int, Chosen]]:
    segments = segment_modules(functional)
    chosen = {c.number: choice.of(c, c.routing) for c in functional.calls if c.routing is not None}
    return linked(functional, segments, opset, translations()), chosen


def _skeleton(
    model: ir.Model, functional: FunctionalModel, opset: int, chosen: dict[int, Chosen], bits: int | None,
    open_inputs: bool,
) -> Skeleton:  # fmt: skip
    graph = model.graph
    done = expand(model, functional.calls, functional.tensors, chosen, bits, opset)
    tensors = functional.tensors | done.weights
    weights = {}
    for value in list(graph.inputs):
        if value.name in tensors:
            graph.inputs.remove(value)
            if value.uses() or value.is_graph_output():
                weights[value.name] = tensors[value.name]
    rewrite(model, () if open_inputs else functional.stacks)
    if any(t.dtype.is_floating_point and t.itemsize == 2 for t in tensors.values()):
        insert_float16_casts(graph, opset)
    _name_outputs(graph, functional.outputs)
    for node in graph.all_nodes():
        node.metadata_props.clear()  # lines of source code, and paths
        node.doc_string = None
    sites = {functional.calls[number].name: how for number, how in chosen.items()}
    return Skeleton(ir.to_proto(model), weights, sites, done.stand_ins)


def _name_outputs(graph: ir.Graph, names: list[str]) -> None:
    """Name the outputs; one that is also an input, weight or another output gets an Identity."""
    seen: set[int] = set()
    for i, (value, name) in enumerate(zip(list(graph.outputs), names, strict=True)):
        if value.producer() is None or id(value) in seen:
            copy = ir.node("Identity", [value])
            graph.append(copy)
            copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
            graph.outputs[i] = value = copy.outputs[0]
        seen.add(id(value))
        value.name = name

"""Plain -> an ONNX graph without weights, and the weights that belong to it, by name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
import torch

from ..errors import CaptureError
from ..program import CACHE
from .lowerings.choose import Choice, Chosen
from .lowerings.expand import expand
from .plain import Plain
from .trace import onnx_program, quiet, root_cause

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
TRACED_EXPERTS = 3  # of a trace: export takes 0 and 1 for constants


@dataclass
class Skeleton:
    """model: the graph; what `weights` names are initializers that it lacks. chosen: the lowering of
    each site of feed-forward experts. stand_ins: by name, what quantized weights stand for."""

    model: onnx.ModelProto
    weights: dict[str, torch.Tensor]
    chosen: dict[str, Chosen]
    stand_ins: dict[str, torch.Tensor]


def translate(plain: Plain, opset: int, choice: Choice) -> Skeleton:
    """Raises CaptureError with the reason that torch.export or the exporter gave, ConfigError for a
    lowering that does not fit."""
    leaves, tensors, state, shapes = _example(plain)
    given = (leaves, tensors, state)
    with torch.enable_grad(), quiet():  # without gradients a region folds its norms each call
        plain(*given)  # fills the caches of tables, which no trace may fill
    chosen = {c.number: choice.of(c, c.routing) for c in plain.calls if c.routing is not None}
    try:
        with torch.enable_grad():
            program = onnx_program(
                plain, given, shapes, opset, optimize=True, custom_translation_table=TRANSLATIONS
            )
    except Exception as error:  # of many kinds; all mean "not exported"
        cause = root_cause(error)
        lines = [line for line in str(cause).splitlines() if line.strip()]
        raise CaptureError(
            f"this model cannot be written as ONNX: {type(cause).__name__}: "
            f"{lines[0] if lines else ''}"
        ) from error
    with torch.no_grad(), quiet():
        return _skeleton(program.model, plain, opset, chosen, choice.bits)


def _round(number: Any, digits: None = None) -> Any:
    """Of a size: Python's, of halves to even ones, as ONNX has it."""
    from onnxscript import opset20 as op

    return op.Cast(op.Round(number), to=onnx.TensorProto.INT64)


def _sort(x: Any, stable: bool = False, dim: int = -1, descending: bool = False) -> Any:
    """ONNX's TopK puts the first of equal values first, as a stable sort does."""
    from onnxscript import opset20

    op: Any = opset20
    size = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
    return op.TopK(x, size, axis=dim, largest=int(descending))


# what torch.onnx does not know
TRANSLATIONS: Any = {round: _round, torch.ops.aten.sort.stable: _sort}


def _example(plain: Plain) -> tuple[list, dict[str, torch.Tensor], list, Any]:
    """What to trace with, and the dimensions that stay open."""
    auto = torch.export.Dim.AUTO
    count = torch.export.Dim("experts", min=2)
    tensors = dict(plain.tensors)
    shapes: dict[str, Any] = {}
    for name, tensor in plain.tensors.items():
        shapes[name] = None
        if name in plain.stacks:
            stack = plain.stacks[name]
            size = list(tensor.shape)
            size[stack.dim] = TRACED_EXPERTS * stack.each
            tensors[name] = tensor.new_zeros(size)
            shapes[name] = {stack.dim: count * stack.each if stack.each > 1 else count}
    state = plain.state(plain.example[0].shape[0])
    leaf_shapes = [dict.fromkeys(dims, auto) for dims in plain.open]
    return plain.example, tensors, state, (leaf_shapes, shapes, [{0: auto} for _ in state])


def _skeleton(
    model: ir.Model, plain: Plain, opset: int, chosen: dict[int, Chosen], bits: int | None
) -> Skeleton:
    graph = model.graph
    parts: list[Any] = [*graph.all_nodes(), *_values(model)]
    for part in parts:
        part.meta.clear()  # which holds the trace, while onnxscript's rules hold their last node
    given = list(graph.inputs)
    names = [*plain.inputs, *plain.tensors]
    if plain.with_state:
        names += [f"past_router.{n}" for n in ("total", "count")]
    _free(model, {*names, *plain.outputs})
    for value, name in zip(given, names, strict=True):
        value.name = name
    done = expand(model, plain.calls, plain.tensors, chosen, bits, opset)
    tensors = plain.tensors | done.weights
    weights = {}
    for value in list(graph.inputs):
        if value.name in tensors:
            graph.inputs.remove(value)
            if value.uses() or value.is_graph_output():
                weights[value.name] = tensors[value.name]
    _widen(graph)
    if any(t.dtype.is_floating_point and t.itemsize == 2 for t in tensors.values()):
        _add_in_float32(graph)
    _name_outputs(graph, plain.outputs)
    _name_dimensions(model, plain)
    for node in graph.all_nodes():
        node.metadata_props.clear()  # which hold lines of source code and paths
        node.doc_string = None
    sites = {plain.calls[number].name: how for number, how in chosen.items()}
    return Skeleton(ir.to_proto(model), weights, sites, done.stand_ins)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph.all_nodes():
        yield from node.outputs


def _free(model: ir.Model, names: set[str]) -> None:
    """Take these names from the values that happen to bear them."""
    for i, value in enumerate(list(_values(model))):
        if value.name in names:
            value.name = f"value_{i}.{value.name}"


def _widen(graph: ir.Graph) -> None:
    """A call gives and gets float32 where the model has bfloat16, which NumPy does not know."""
    half, single = ir.TensorType(ir.DataType.BFLOAT16), ir.TensorType(ir.DataType.FLOAT)
    for i, value in enumerate(list(graph.inputs)):
        if value.dtype == half.dtype:
            given = ir.Value(name=value.name, shape=value.shape, type=single)
            node = ir.node("Cast", [given], attributes={"to": half.dtype})
            ir.convenience.replace_all_uses_with(value, node.outputs[0], replace_graph_outputs=True)
            node.outputs[0].type, node.outputs[0].shape = half, value.shape
            graph.inputs[i] = given
            graph.insert_before(graph[0], node)
    for i, value in enumerate(list(graph.outputs)):
        if value.dtype == half.dtype:
            node = ir.node("Cast", [value], attributes={"to": single.dtype})
            node.outputs[0].type, node.outputs[0].shape = single, value.shape
            graph.append(node)
            graph.outputs[i] = node.outputs[0]


def _add_in_float32(graph: ir.Graph) -> None:
    """Sums that scatter: in 16 bits ONNX Runtime's CPU provider has none. What has no type yet is of
    an expert's site."""
    for node in list(graph.all_nodes()):
        if not node.op_type.startswith("Scatter") or "reduction" not in node.attributes:
            continue
        data, out = node.inputs[0], node.outputs[0]
        if data is None or data.dtype not in (None, *HALVES) or node.graph is None:
            continue
        for i in (0, 2):  # data and what is added
            wide = ir.node("Cast", [node.inputs[i]], attributes={"to": ir.DataType.FLOAT})
            wide.outputs[0].name = f"{out.name}.wide_{i}"  # those of subgraphs would all be one
            node.graph.insert_before(node, wide)
            node.replace_input_with(i, wide.outputs[0])
        narrow = ir.node("CastLike", [out, data])
        narrow.outputs[0].type, narrow.outputs[0].shape = out.type, out.shape
        narrow.outputs[0].name = f"{out.name}.narrow"
        ir.convenience.replace_all_uses_with(out, narrow.outputs[0], replace_graph_outputs=True)
        narrow.replace_input_with(0, out)
        out.type = ir.TensorType(ir.DataType.FLOAT)
        node.graph.insert_after(node, narrow)


def _name_outputs(graph: ir.Graph, names: list[str]) -> None:
    """An output that is an input, a weight or another output as well gets a node of its own."""
    seen: set[int] = set()
    for i, (value, name) in enumerate(zip(list(graph.outputs), names, strict=True)):
        if value.producer() is None or id(value) in seen:
            copy = ir.node("Identity", [value])
            graph.append(copy)
            copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
            graph.outputs[i] = value = copy.outputs[0]
        seen.add(id(value))
        value.name = name


def _name_dimensions(model: ir.Model, plain: Plain) -> None:
    """``batch``, ``sequence`` and the like for the symbols of the trace."""
    words: dict[str, str] = {}
    cached = any(n.startswith(CACHE) for n in plain.inputs)
    for value in model.graph.inputs:
        taken = set(words.values())
        for d, size in enumerate(value.shape or ()):
            symbol = None if isinstance(size, int) else size.value
            if symbol is None or not re.fullmatch(r"[a-z]\w*", symbol) or symbol in words:
                continue
            word = _word(str(value.name), d, cached)
            words[symbol] = word if word not in taken or cached else f"{value.name}_{d}"
            taken.add(words[symbol])
    pattern = re.compile(r"[A-Za-z_]\w*")
    for value in _values(model):
        if value.shape is not None:
            value.shape = ir.Shape(
                d if isinstance(d, int) or d.value is None
                else pattern.sub(lambda m: words.get(m[0], m[0]), d.value)
                for d in value.shape
            )  # fmt: skip


def _word(name: str, dim: int, cached: bool) -> str:
    if dim == 0:
        return "batch"
    if cached and name.startswith(CACHE):
        return "past"
    if cached and "mask" in name:
        return "past + sequence"
    return {1: "sequence"}.get(dim, f"{name}_{dim}")

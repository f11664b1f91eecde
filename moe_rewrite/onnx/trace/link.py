"""Graphs of parts -> one graph: each in the place of its call, values and sizes under their names."""

from __future__ import annotations

import re
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes

from .dynamic_dims import Dims, input_dims, size_words, to_trace
from .ffn_placeholder import DOMAIN, OPERATOR
from .functional import FunctionalModel
from .segment_export import Seen, SegmentModule, Template
from .segments import Segment

ONCE = ir.passes.Sequential(  # what each part has
    passes.DeduplicateInitializersPass(), passes.CommonSubexpressionEliminationPass()
)
AUTO = torch.export.Dim.AUTO
SYMBOL = re.compile(r"[A-Za-z_]\w*")


def linked(
    functional: FunctionalModel, segment_modules: list[SegmentModule], opset: int, translations: Any
) -> ir.Model:
    """The graph of a whole call, whose inputs bear the names of leaves, tensors and state."""
    tensors, dims, words = to_trace(functional), input_dims(functional), size_words(functional)
    given = dict(
        zip(
            [*functional.inputs, *functional.past],
            [*functional.example, *functional.state(1)],
            strict=True,
        )
    )
    inputs = {n: _input(n, dims[n], t) for n, t in (tensors | given).items()}
    values = {n: [inputs[m]] for n, m in zip(functional.given, given, strict=True)}
    free = {
        n: {functional.stacks[n].dim: AUTO} if n in functional.stacks else None for n in tensors
    }
    as_one_segment = GraphLinker([inputs[name] for name in dims])
    templates: dict[Any, Template] = {}
    for module in segment_modules:
        if (key := module.key(tensors)) not in templates:
            templates[key] = module.translated(
                tensors, free, opset, optimize=True, custom_translation_table=translations
            )
        taken = [value for name in module.segment.takes for value in values[name]]
        own = [inputs[name] for name in module.names]
        made = iter(as_one_segment.add(templates[key], module.segment, [*own, *taken]))
        for name, seen, of in zip(module.segment.left, module.made, module.captured, strict=True):
            known = of or [None] * len(seen)
            values[name] = [
                _sized(next(made), s, captured, words)
                for s, captured in zip(seen, known, strict=True)
                if s.traced
            ]
    return as_one_segment.finished([values[name][0] for name in functional.kept])


def _input(name: str, dims: Dims, like: torch.Tensor) -> ir.Value:
    kind = ir.TensorType(ir.tensor_adapters.from_torch_dtype(like.dtype))
    return ir.Value(name=name, shape=ir.Shape(dims), type=kind)


def _sized(
    value: ir.Value, seen: Seen, captured: tuple[Any, ...] | None, words: dict[Any, str]
) -> ir.Value:
    """With its words, where it is a size."""
    if seen.dtype is None:
        (size,), (other,) = seen.sizes
        value.meta["size"] = words.get(captured[0] if captured else (size, other))
    return value


class GraphLinker:
    """model: the graph so far, whose open sizes have the words of its inputs."""

    def __init__(self, inputs: list[ir.Value]) -> None:
        graph = ir.Graph(inputs, [], nodes=[], name="main_graph")
        self.model = ir.Model(graph, ir_version=0)
        self._segments: set[str] = set()
        self._same: dict[str, str] = {}  # of words that are one size: the other, the earlier one

    def add(self, template: Template, made_of: Segment, given: list[ir.Value]) -> list[ir.Value]:
        """What the template's graph makes of these values. A given size has its words under
        "size" in its `meta`."""
        name = self._fresh(made_of.name)
        segment = ir.from_proto(onnx.ModelProto.FromString(template.model))
        self.model.ir_version = segment.ir_version
        self.model.graph.opset_imports.update(segment.opset_imports)
        words = self._words(template, given, list(segment.graph.inputs))
        number_of = dict(zip(template.calls, made_of.calls, strict=True))
        outputs = _with_inputs(segment.graph, given)
        initializers = list(segment.graph.initializers.values())
        segment.graph.initializers.clear()
        nodes = list(segment.graph)
        for node in segment.graph.all_nodes():
            node.name = f"{name}/{node.name}"
            for value in node.outputs:
                value.name = f"{name}/{value.name}"
                _reworded(value, words)
            if (node.domain, node.op_type) == (DOMAIN, OPERATOR):
                number = number_of[node.attributes["number"].as_int()]
                node.attributes["number"] = ir.AttrInt64("number", number)
        segment.graph.remove(nodes)
        for value in initializers:
            value.name = f"constants/{name}/{value.name}"
            self.model.graph.register_initializer(value)
        self.model.graph.extend(nodes)
        return outputs

    def _fresh(self, name: str) -> str:
        """The name, or one like it where a part has it."""
        fresh, count = name, 1
        while fresh in self._segments:
            count += 1
            fresh = f"{name}.{count}"
        self._segments.add(fresh)
        return fresh

    def _words(
        self, template: Template, given: list[ir.Value], inputs: list[ir.Value]
    ) -> dict[str, str]:
        """What the symbols of a part's shapes are in the whole graph. Two words of one symbol are
        the same size: only this part shows it."""
        pairs = [(s, given[i].meta.get("size")) for i, s in template.sizes.items()]
        for value, outer in zip(inputs, given, strict=True):
            sizes = zip(value.shape or (), outer.shape or (), strict=True)
            pairs += [(str(getattr(a, "value", a)), str(b)) for a, b in sizes]
        words: dict[str, str] = {}
        for symbol, word in pairs:
            if word is None or not symbol.isidentifier():
                continue
            known = words.setdefault(symbol, self._same.get(word, word))
            if known != word and known.isidentifier() and word.isidentifier():
                self._unify(known, word)
        return {s: w if w.isidentifier() else f"({w})" for s, w in words.items()}

    def _unify(self, word: str, other: str) -> None:
        order = [str(size) for value in self.model.graph.inputs for size in value.shape or ()]
        rank = {size: i for i, size in reversed(list(enumerate(order)))}
        kept, gone = sorted((word, other), key=lambda w: rank.get(w, len(order)))
        self._same |= {w: kept for w, to in self._same.items() if to == gone} | {gone: kept}

    def finished(self, outputs: list[ir.Value]) -> ir.Model:
        self.model.graph.outputs.extend(outputs)
        made = (value for node in self.model.graph.all_nodes() for value in node.outputs)
        for value in (*self.model.graph.inputs, *made):
            _reworded(value, self._same)
        return ONCE(self.model).model


def _with_inputs(graph: ir.Graph, given: list[ir.Value]) -> list[ir.Value]:
    """The outputs, with these values in the place of the inputs."""
    stands_for = dict(zip(graph.inputs, given, strict=True))
    outputs = [stands_for.get(value, value) for value in graph.outputs]
    graph.outputs.clear()
    for value, outer in stands_for.items():
        value.replace_all_uses_with(outer)
    graph.inputs.clear()
    return outputs


def _reworded(value: ir.Value, words: dict[str, str]) -> None:
    if value.shape is not None:
        value.shape = ir.Shape(
            size if isinstance(size, int) or size.value is None
            else words.get(size.value) or SYMBOL.sub(lambda m: words.get(m[0], m[0]), size.value)
            for size in value.shape
        )  # fmt: skip

"""Link the graphs of segments into one graph, with names for its values and sizes."""

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

ONCE = ir.passes.Sequential(  # each segment has its own of these
    passes.DeduplicateInitializersPass(), passes.CommonSubexpressionEliminationPass()
)
AUTO = torch.export.Dim.AUTO
SYMBOL = re.compile(r"[A-Za-z_]\w*")


def linked(
    functional: FunctionalModel, segment_modules: list[SegmentModule], opset: int, translations: Any
) -> ir.Model:
    """The graph of a whole call, whose inputs have the names of leaves, tensors and state."""
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
    linker = GraphLinker([inputs[name] for name in dims])
    templates: dict[Any, Template] = {}
    for module in segment_modules:
        if (key := module.key(tensors)) not in templates:
            templates[key] = module.translated(
                tensors, free, opset, optimize=True, custom_translation_table=translations
            )
        taken = [value for name in module.segment.takes for value in values[name]]
        own = [inputs[name] for name in module.names]
        made = iter(linker.add(templates[key], module.segment, [*own, *taken]))
        for name, seen, of in zip(module.segment.left, module.made, module.captured, strict=True):
            known = of or [None] * len(seen)
            values[name] = [
                _sized(next(made), s, captured, words)
                for s, captured in zip(seen, known, strict=True)
                if s.traced
            ]
    return linker.finished([values[name][0] for name in functional.kept])


def _input(name: str, dims: Dims, like: torch.Tensor) -> ir.Value:
    kind = ir.TensorType(ir.tensor_adapters.from_torch_dtype(like.dtype))
    return ir.Value(name=name, shape=ir.Shape(dims), type=kind)


def _sized(
    value: ir.Value, seen: Seen, captured: tuple[Any, ...] | None, words: dict[Any, str]
) -> ir.Value:
    """The value; if it is a size, with its name put into `meta`."""
    if seen.dtype is None:
        (size,), (other,) = seen.sizes
        value.meta["size"] = words.get(captured[0] if captured else (size, other))
    return value


class GraphLinker:
    """Joins segments' graphs. model: the graph so far; dynamic sizes have its inputs' names."""

    def __init__(self, inputs: list[ir.Value]) -> None:
        graph = ir.Graph(inputs, [], nodes=[], name="main_graph")
        self.model = ir.Model(graph, ir_version=0)
        self._segments: set[str] = set()
        self._same: dict[str, str] = {}  # of two names of one size: the later -> the earlier

    def add(self, template: Template, segment: Segment, given: list[ir.Value]) -> list[ir.Value]:
        """Append the template's graph, applied to these values; returns its outputs. A size among
        `given` has its name under "size" in its `meta`."""
        name = self._fresh(segment.name)
        loaded = ir.from_proto(onnx.ModelProto.FromString(template.model))
        self.model.ir_version = loaded.ir_version
        self.model.graph.opset_imports.update(loaded.opset_imports)
        words = self._words(template, given, list(loaded.graph.inputs))
        number_of = dict(zip(template.calls, segment.calls, strict=True))
        outputs = _with_inputs(loaded.graph, given)
        initializers = list(loaded.graph.initializers.values())
        loaded.graph.initializers.clear()
        nodes = list(loaded.graph)
        for node in loaded.graph.all_nodes():
            node.name = f"{name}/{node.name}"
            for value in node.outputs:
                value.name = f"{name}/{value.name}"
                _reworded(value, words)
            if (node.domain, node.op_type) == (DOMAIN, OPERATOR):
                number = number_of[node.attributes["number"].as_int()]
                node.attributes["number"] = ir.AttrInt64("number", number)
        loaded.graph.remove(nodes)
        for value in initializers:
            value.name = f"constants/{name}/{value.name}"
            self.model.graph.register_initializer(value)
        self.model.graph.extend(nodes)
        return outputs

    def _fresh(self, name: str) -> str:
        """The name, with a number if another segment has it."""
        fresh, count = name, 1
        while fresh in self._segments:
            count += 1
            fresh = f"{name}.{count}"
        self._segments.add(fresh)
        return fresh

    def _words(
        self, template: Template, given: list[ir.Value], inputs: list[ir.Value]
    ) -> dict[str, str]:
        """Symbol in the segment's shapes -> its name in the whole graph. Two names for one symbol
        are names of the same size, and become one."""
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
        """The model with these outputs, each size under one name, and duplicates removed."""
        self.model.graph.outputs.extend(outputs)
        made = (value for node in self.model.graph.all_nodes() for value in node.outputs)
        for value in (*self.model.graph.inputs, *made):
            _reworded(value, self._same)
        return ONCE(self.model).model


def _with_inputs(graph: ir.Graph, given: list[ir.Value]) -> list[ir.Value]:
    """The outputs, with these values instead of the inputs."""
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

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
from .functional import Plain
from .segment_export import Piece, Seen, Template
from .segments import Part

ONCE = ir.passes.Sequential(  # what each part has
    passes.DeduplicateInitializersPass(), passes.CommonSubexpressionEliminationPass()
)
AUTO = torch.export.Dim.AUTO
SYMBOL = re.compile(r"[A-Za-z_]\w*")


def joined(plain: Plain, pieces: list[Piece], opset: int, translations: Any) -> ir.Model:
    """The graph of a whole call, whose inputs bear the names of leaves, tensors and state."""
    tensors, dims, words = to_trace(plain), input_dims(plain), size_words(plain)
    given = dict(zip([*plain.inputs, *plain.past], [*plain.example, *plain.state(1)], strict=True))
    inputs = {n: _input(n, dims[n], t) for n, t in (tensors | given).items()}
    values = {n: [inputs[m]] for n, m in zip(plain.given, given, strict=True)}
    free = {n: {plain.stacks[n].dim: AUTO} if n in plain.stacks else None for n in tensors}
    whole = Joined([inputs[name] for name in dims])
    templates: dict[Any, Template] = {}
    for piece in pieces:
        if (key := piece.key(tensors)) not in templates:
            templates[key] = piece.translated(
                tensors, free, opset, optimize=True, custom_translation_table=translations
            )
        taken = [value for name in piece.part.takes for value in values[name]]
        own = [inputs[name] for name in piece.names]
        made = iter(whole.add(templates[key], piece.part, [*own, *taken]))
        for name, seen, of in zip(piece.part.left, piece.made, piece.captured, strict=True):
            known = of or [None] * len(seen)
            values[name] = [
                _sized(next(made), s, captured, words)
                for s, captured in zip(seen, known, strict=True)
                if s.traced
            ]
    return whole.finished([values[name][0] for name in plain.kept])


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


class Joined:
    """model: the graph so far, whose open sizes have the words of its inputs."""

    def __init__(self, inputs: list[ir.Value]) -> None:
        graph = ir.Graph(inputs, [], nodes=[], name="main_graph")
        self.model = ir.Model(graph, ir_version=0)
        self._parts: set[str] = set()
        self._same: dict[str, str] = {}  # of words that are one size: the other, the earlier one

    def add(self, template: Template, made_of: Part, given: list[ir.Value]) -> list[ir.Value]:
        """What the template's graph makes of these values. A given size has its words under
        "size" in its `meta`."""
        name = self._fresh(made_of.name)
        part = ir.from_proto(onnx.ModelProto.FromString(template.model))
        self.model.ir_version = part.ir_version
        self.model.graph.opset_imports.update(part.opset_imports)
        words = self._words(template, given, list(part.graph.inputs))
        number_of = dict(zip(template.calls, made_of.calls, strict=True))
        outputs = _with_inputs(part.graph, given)
        initializers = list(part.graph.initializers.values())
        part.graph.initializers.clear()
        nodes = list(part.graph)
        for node in part.graph.all_nodes():
            node.name = f"{name}/{node.name}"
            for value in node.outputs:
                value.name = f"{name}/{value.name}"
                _reworded(value, words)
            if (node.domain, node.op_type) == (DOMAIN, OPERATOR):
                number = number_of[node.attributes["number"].as_int()]
                node.attributes["number"] = ir.AttrInt64("number", number)
        part.graph.remove(nodes)
        for value in initializers:
            value.name = f"constants/{name}/{value.name}"
            self.model.graph.register_initializer(value)
        self.model.graph.extend(nodes)
        return outputs

    def _fresh(self, name: str) -> str:
        """The name, or one like it where a part has it."""
        fresh, count = name, 1
        while fresh in self._parts:
            count += 1
            fresh = f"{name}.{count}"
        self._parts.add(fresh)
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

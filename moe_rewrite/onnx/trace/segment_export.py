"""A segment -> an ONNX graph: from its tensors and the values that it takes to those it gives."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.utils import _pytree as pytree

from ...errors import CaptureError
from .dynamic_dims import two_calls
from .functional import FunctionalModel
from .segments import Leaf, Segment, spread
from .torch_export import onnx_program, quiet


@dataclass(frozen=True)
class Seen:
    """A tensor or a size, as seen in two calls with different sizes.

    sizes: its shape, or (size,), in both calls.
    open: its dynamic dimensions: those that the capture has as symbols, or that differ between the
        calls. A dynamic size counts as dimension 0.
    strides: in the first call.
    dtype: None for a size.
    """

    sizes: tuple[tuple[int, ...], tuple[int, ...]]
    open: tuple[int, ...]
    strides: tuple[int, ...] = ()
    dtype: torch.dtype | None = None

    @classmethod
    def of(cls, leaf: Leaf, other: Leaf, captured: tuple[Any, ...] | None) -> Seen:
        """captured: the sizes as ints or symbols of the capture; None if it does not know them."""
        if isinstance(leaf, torch.Tensor) and isinstance(other, torch.Tensor):
            sizes = tuple(leaf.shape), tuple(other.shape)
            rest: tuple[Any, Any] = leaf.stride(), leaf.dtype
        else:
            sizes, rest = ((int(leaf),), (int(other),)), ((), None)
        numbers = captured or sizes[0]
        pairs = zip(*sizes, numbers, strict=True)
        opened = (d for d, (a, b, n) in enumerate(pairs) if a != b or not isinstance(n, int))
        return cls(sizes, tuple(opened), *rest)

    @property
    def traced(self) -> bool:
        """Whether it is a value of the graph, not a constant."""
        return self.dtype is not None or bool(self.open)

    def example(self) -> Any:
        """An input to trace with. Never written to, so it takes no memory."""
        if self.dtype is None:
            return self.sizes[0][0]
        return torch.empty_strided(self.sizes[0], self.strides, dtype=self.dtype)

    def free(self) -> Any:
        """Its entry in torch.export's `dynamic_shapes`."""
        auto = torch.export.Dim.AUTO
        return auto if self.dtype is None else dict.fromkeys(self.open, auto)


@dataclass(frozen=True)
class Template:
    """The ONNX graph of a segment, which segments with the same key share.

    model: the graph, a serialized ModelProto.
    sizes: index of each input that is a size -> its symbol in the graph's shapes.
    calls: the numbers of its feed-forward regions.
    """

    model: bytes
    sizes: dict[int, str]
    calls: tuple[int, ...]


def segment_modules(functional: FunctionalModel) -> list[SegmentModule]:
    """Every segment with the values of two calls with different sizes. These calls also fill the
    caches of tables, which a trace must not fill."""
    calls = two_calls(functional)
    runs = [functional.values(leaves, state) for leaves, _, state in calls]
    made = []
    with torch.enable_grad(), quiet():  # without gradients a region folds its norms each call
        for segment in functional.segments:
            taken = [[values[n] for n in segment.takes] for values in runs]
            for (_, tensors, _), values in zip(calls, runs, strict=True):
                require_own(segment, values)
                segment(tensors, values)
            left = [[values[n] for n in segment.left] for values in runs]
            made.append(SegmentModule(segment, taken, left, functional.graph.emitted.sizes))
    return made


def require_own(segment: Segment, values: dict[str, Any]) -> None:
    """Raises CaptureError where a segment writes to a value that shares memory with another one,
    which would not see the write if the segment is traced by itself."""
    tensors = [leaf for value in values.values() for leaf in spread(value)[0]]
    shown = Counter(t.untyped_storage().data_ptr() for t in tensors if isinstance(t, torch.Tensor))
    for name in (segment.takes[i] for i in segment.writes):
        if shown[values[name].untyped_storage().data_ptr()] > 1:
            raise CaptureError(f"{segment.name} writes to {name}, of which another value is a view")


class SegmentModule(nn.Module):
    """A segment as a module of tensors and dynamic sizes only: forward(given) -> made.

    given: the tensors of `names`, then the traced leaves of the values taken.
    taken, made: for each value taken, and for each left, its leaves as seen in two calls.
    captured: for each value left, the sizes of its leaves in the capture, or None.
    """

    def __init__(
        self, segment: Segment, taken: list[list[Any]], made: list[list[Any]], sizes: dict[str, Any]
    ) -> None:  # fmt: skip
        """taken, made: the values taken and left, a list for each of two calls.
        sizes: the capture's sizes, by name of the value."""
        super().__init__()
        self.segment = segment
        owned = pytree.tree_leaves(segment.owned)
        self.names = list(dict.fromkeys(name for name in owned if isinstance(name, str)))
        self.captured = [sizes.get(name) for name in segment.left]
        self.taken = [
            _seen(a, b, segment, sizes.get(n))
            for a, b, n in zip(*taken, segment.takes, strict=True)
        ]
        self.made = [
            _seen(a, b, segment, of) for a, b, of in zip(*made, self.captured, strict=True)
        ]
        # `taken` has all that is needed of a tensor, which may be large
        self._forms = [None if isinstance(value, Leaf) else value for value in taken[0]]

    def forward(self, given: list[Any]) -> list[Any]:
        left = iter(given)
        tensors = {name: next(left) for name in self.names}
        taken = []
        for form, seen in zip(self._forms, self.taken, strict=True):
            leaves: list[Any] = [next(left) if s.traced else s.sizes[0][0] for s in seen]
            taken.append(leaves[0] if seen and form is None else spread(form)[1](leaves))
        for i in self.segment.writes:
            taken[i] = torch.clone(taken[i])
        values = dict(zip(self.segment.takes, taken, strict=True))
        self.segment(tensors, values)
        made = [leaf for name in self.segment.left for leaf in spread(values[name])[0]]
        seen = [s for value in self.made for s in value]
        return [leaf for leaf, s in zip(made, seen, strict=True) if s.traced]

    def key(self, tensors: dict[str, torch.Tensor]) -> tuple:
        """Equal for segments of one functional call that have the same graph."""
        place = {name: i for i, name in enumerate(self.names)}
        owned, structure = pytree.tree_flatten(self.segment.owned)
        return (
            self.segment.signature, structure,
            tuple(place[o] if isinstance(o, str) else id(o) for o in owned),
            tuple((tensors[n].shape, tensors[n].stride(), tensors[n].dtype) for n in self.names),
            tuple(map(id, self._forms)),
            tuple(map(tuple, self.taken)), tuple(map(tuple, self.made)),
            tuple([*self.segment.takes, *self.segment.gives].index(n) for n in self.segment.left),
        )  # fmt: skip

    def translated(
        self, tensors: dict[str, torch.Tensor], shapes: dict[str, Any], opset: int, **options: Any
    ) -> Template:
        """tensors: to trace with. shapes: their entries in torch.export's `dynamic_shapes`."""
        seen = [s for value in self.taken for s in value if s.traced]
        given = [*(tensors[n] for n in self.names), *(s.example() for s in seen)]
        free = [*(shapes[n] for n in self.names), *(s.free() for s in seen)]
        program = onnx_program(self, (given,), (free,), opset, **options)
        traced = program.exported_program
        value_of = {n.name: n.meta["val"] for n in traced.graph.find_nodes(op="placeholder")}
        values = [value_of.get(name) for name in traced.graph_signature.user_inputs]
        sizes = {i: str(v) for i, v in enumerate(values) if isinstance(v, torch.SymInt)}
        model = program.model
        for item in (*model.graph.all_nodes(), *model.graph.inputs):
            item.meta.clear()
        return Template(ir.to_proto(model).SerializeToString(), sizes, self.segment.calls)


def _seen(value: Any, other: Any, segment: Segment, captured: Any) -> list[Seen]:
    leaves, others = spread(value)[0], spread(other)[0]
    known = (
        captured if captured is not None and len(captured) == len(leaves) else [None] * len(leaves)
    )
    opened = any(not isinstance(n, (int, float)) for each in captured or () for n in each)
    if not leaves and (value != other or opened):
        raise CaptureError(
            f"{segment.name} takes or returns a {type(value).__name__} that depends on the sizes "
            "of a call"
        )
    return [Seen.of(*each) for each in zip(leaves, others, known, strict=True)]

"""Feed-forward regions, found by dataflow: products of the same rows, pointwise operations, and a
product back to the rows' width. Names and modules are not considered.

Found are plain and gated ones, with biases and dropout, with gate and up in one product, as 1 x 1
convolutions, with a norm over the hidden width, and ones that no module contains as a whole.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..ir.any_layout import allow_any_layout
from ..ir.aten import value
from ..ir.ops import alias_chain, argument, first, is_pointwise, mutated, op, op_name, set_argument
from ..ir.program import Code, Program
from .linear_ops import Product, find_product, innermost_module
from .row_dims import same_sizes
from .static_values import Static, static_values


@dataclass(frozen=True)
class Linear:
    """A product of the region.

    weight, bias: indices into the region's weights.
    transposed: the weight is stored as (in, out).
    pointwise: it is stored as a 1 x 1 convolution.
    """

    weight: int
    bias: int | None
    transposed: bool
    pointwise: bool


@dataclass(frozen=True)
class FeedForward:
    """A region down(middle(up_0(x), up_1(x), ...)).

    entry: the node x.
    exit: the last product.
    nodes: the region, in graph order.
    weights: their placeholders.
    ups, down: the products.
    middle: code(*products of x, *weights[extra]), over the last dimension.
    extra: indices of the weights that `middle` takes.
    channels: dimension of x that holds the features: 1 for a map, else -1.
    """

    entry: fx.Node
    exit: fx.Node
    nodes: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]
    ups: tuple[Linear, ...]
    down: Linear
    middle: Code
    extra: tuple[int, ...]
    channels: int

    def name(self, program: Program) -> str:
        """The longest dotted prefix that the weights of all products share; else the last one's
        module."""
        names = [program.inputs[self.weights[p.weight].name].name for p in (*self.ups, self.down)]
        parts = [n.removesuffix(".weight").split(".") for n in names]
        shared = []
        for level in zip(*parts, strict=False):
            if len(set(level)) > 1:
                break
            shared.append(level[0])
        return ".".join(shared) or innermost_module(self.exit)

    @property
    def hidden(self) -> int:
        """The width of the last product's input."""
        return _sides(value(self.weights[self.down.weight]), self.down)[0]


def find_feedforward(program: Program, nodes: list[fx.Node]) -> Iterator[FeedForward | tuple]:
    """Every feed-forward region among these nodes, and (name, reason) for each that almost is one.

    In a chain of products each belongs to one region at most: the first that it fits.
    """
    taken: set[fx.Node] = set()
    static = static_values(program)
    for node in nodes:
        product = find_product(static, node)
        if not isinstance(product, Product) or not _is_rowwise(product):
            continue
        if not _is_parameter(program, product.weight):
            yield innermost_module(node), COMPUTED
            continue
        try:
            found = _Reader(program, static, set(nodes)).read(product)
        except _Unfit as error:
            yield innermost_module(node), str(error)
            continue
        if found is not None and any(map(program.quantized, found.weights)):
            yield found.name(program), QUANTIZED
        elif found is not None and taken.isdisjoint(found.nodes):
            taken.update(found.nodes)
            yield found


QUANTIZED = (
    "its weights are quantised, so that copies of them could not be trained: LoRAExperts stand "
    "beside them"
)
COMPUTED = "its weight is no parameter but computed, so an expert could not have a copy of it"


class _Unfit(Exception):
    """Why something that looks like a feed-forward region cannot be replaced."""


class _Foreign(Exception):
    """An operation that no feed-forward region contains."""


def _is_rowwise(product: Product) -> bool:
    weight = value(product.weight)
    if weight.ndim == 2:
        return True
    if product.transposed or weight.ndim != 4:
        return False
    stride, padding, dilation = product.options
    plain = stride == [1, 1] and dilation == [1, 1] and padding in ([0, 0], "valid", "same")
    groups = weight.shape[1] == value(product.rows).shape[1]
    return plain and groups and tuple(weight.shape[2:]) == (1, 1)


def _is_parameter(program: Program, weight: fx.Node) -> bool:
    return weight.op == "placeholder" and program.inputs[weight.name].kind == "weight"


def _sides(weight: torch.Tensor, linear: Linear) -> tuple[int, int]:
    """(in, out) features."""
    out, into = int(weight.shape[0]), int(weight.shape[1])
    return (out, into) if linear.transposed else (into, out)


class _Reader:
    """Reads one region from its last product back to its rows, and copies the nodes between."""

    def __init__(self, program: Program, static: Static, allowed: set[fx.Node]) -> None:
        self.program, self.static, self.allowed = program, static, allowed
        self.weights: dict[fx.Node, int] = {}
        self.products: dict[fx.Node, Product] = {}
        self.inside: set[fx.Node] = set()
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.last_input: fx.Node | None = None
        self.worked = False

    def read(self, down: Product) -> FeedForward | None:
        self.channels = 1 if value(down.weight).ndim == 4 else -1
        try:
            out = self._copy(down.rows)
            last = self._linear(down)
        except (_Foreign, RecursionError):
            return None
        entries = {self._unviewed(p.rows) for p in self.products.values()}
        ups = tuple(self._linear(p) for p in self.products.values())
        weights = list(self.weights)
        if len(entries) != 1 or not self.worked or not ups:
            return None
        widths = {_sides(value(weights[p.weight]), p)[0] for p in ups}
        if widths != {_sides(value(weights[last.weight]), last)[1]}:
            return None
        entry = entries.pop()
        nodes = self._closed(entry, down)
        extra = [n for n in weights if n in self.copies]
        for node in (*self.products, *extra):
            self._placeholder_first(self.copies[node])
        self.graph.output(out)
        allow_any_layout(self.graph)
        return FeedForward(
            entry, down.node, nodes, tuple(weights), ups, last,
            Code(fx.GraphModule(torch.nn.Module(), self.graph)),
            tuple(self.weights[n] for n in extra), self.channels,
        )  # fmt: skip

    def _placeholder_first(self, node: fx.Node) -> None:
        """Move a placeholder after the ordered placeholders and before everything else."""
        if self.last_input is None:
            next(iter(self.graph.nodes)).prepend(node)
        else:
            self.last_input.append(node)
        self.last_input = node

    def _linear(self, product: Product) -> Linear:
        bias = product.bias
        if bias is not None and not self._is_weight(bias):
            raise _Foreign
        return Linear(
            self._weight(product.weight), None if bias is None else self._weight(bias),
            product.transposed, value(product.weight).ndim == 4,
        )  # fmt: skip

    def _weight(self, node: fx.Node) -> int:
        return self.weights.setdefault(node, len(self.weights))

    def _is_weight(self, node: fx.Node) -> bool:
        kinds = ("weight", "buffer", "constant")
        return node.op == "placeholder" and self.program.inputs[node.name].kind in kinds

    def _copy(self, node: fx.Node) -> fx.Node:
        """The copy of a value between the products, with everything that it depends on."""
        if node in self.copies:
            return self.copies[node]
        if self._is_weight(node):
            return self._copy_weight(node)
        if node not in self.allowed:
            raise _Foreign
        product = find_product(self.static, node)
        if isinstance(product, Product):
            if not _is_parameter(self.program, product.weight):
                raise _Unfit(COMPUTED)
            if not _is_rowwise(product) or (value(product.weight).ndim == 4) != (
                self.channels == 1
            ):
                raise _Foreign
            self.products[node] = product
            self.inside.add(node)
            made = self.graph.placeholder(node.name)
        else:
            made = self._copy_operation(node)
        self.copies[node] = made
        return made

    def _copy_weight(self, node: fx.Node) -> fx.Node:
        """A scale or bias over the features."""
        if self.channels == 1 or value(node).ndim > 1:
            raise _Foreign
        self._weight(node)
        self.copies[node] = self.graph.placeholder(node.name)
        return self.copies[node]

    def _copy_operation(self, node: fx.Node) -> fx.Node:
        self.inside.add(node)
        of, given = op(node), first(node)
        if of.view and self.channels == -1:
            if not same_sizes(value(node).shape[-1:], value(given).shape[-1:]):
                raise _Foreign
            return self._copy(given)
        if op_name(node) == "dropout" and not (argument(node, "p") and argument(node, "train")):
            return self._copy(given)
        self._check(node)
        parts = of.positions in ("slice", "split") or node.target is operator.getitem
        self.worked |= not (of.cast or of.normalized or parts)
        args, kwargs = pytree.tree_map_only(fx.Node, self._copy, (node.args, dict(node.kwargs)))
        made = self.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        if of.along:  # in the copy, features are the last dimension
            set_argument(made, of.along, -1)
        return made

    def _check(self, node: fx.Node) -> None:
        """Raise _Foreign unless the operation treats each row of features separately."""
        of = op(node)
        if node.target is operator.getitem:
            return
        if of.along:
            rank = value(first(node)).ndim
            if argument(node, of.along) % rank != self.channels % rank:
                raise _Foreign
            return
        if of.normalized:
            if self.channels == 1 or len(argument(node, of.normalized)) != 1:
                raise _Foreign
            return
        if not is_pointwise(node):
            raise _Foreign
        for written in mutated(node):
            if any(len(n.users) > 1 for n in alias_chain(written)):
                raise _Foreign  # other nodes read the tensor that it writes to

    def _unviewed(self, node: fx.Node) -> fx.Node:
        """The rows before they were merged into one dimension; each product may merge them. A view
        that takes rows apart belongs to what comes before."""
        while op(node).view and self.channels == -1:
            given = first(node)
            if not same_sizes(value(node).shape[-1:], value(given).shape[-1:]):
                break
            if value(given).ndim < value(node).ndim:
                break
            node = given
        return node

    def _closed(self, entry: fx.Node, down: Product) -> tuple[fx.Node, ...]:
        """The region's nodes. Raises _Unfit if a value inside is used outside."""
        inside = self.inside | {down.node}
        for node in inside - {down.node}:
            outside = [u for u in node.users if u not in inside]
            if outside:
                raise _Unfit(f"{outside[0].name} reads {node.name} inside of the feed-forward")
        if value(down.node).ndim > value(entry).ndim:
            raise _Unfit("its output has more dimensions than its input")
        return tuple(n for n in self.program.graph.nodes if n in inside)

"""Find the sites of the deep segment, and match their rows to the plan's.

A site is a product of activations with a 2-d parameter, whatever form it has: nn.Linear, addmm
with the weight stored (in, out), a matmul with a bare or transposed parameter, a tied weight; or a
2-d convolution over the cut's positions. What cannot be converted is rejected with a reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..analysis.positions import NCHW, Place, maps, pair
from ..analysis.rows import flattened_from, lead_of, same_sizes
from ..config import LoRAExperts, PatchRouter, RouterSpec
from ..program import Program, Rejection, Site, module_paths, op_name, value
from ..routing.plan import Layout
from .split import segments

aten = torch.ops.aten
TRANSPOSES = {aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default}
CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}
CONVOLUTIONS |= {aten.convolution.default, aten.conv2d.padding, aten.conv1d.padding}
OTHER_PRODUCTS = {aten.bmm.default, aten.baddbmm.default, aten.einsum.default}


@dataclass(frozen=True)
class Match:
    """A node that applies a site's weight: its input, and how the plan's rows lie in it."""

    node: fx.Node
    rows: fx.Node
    layout: Layout
    options: tuple[Any, ...] = ()  # stride, padding and dilation of a convolution


@dataclass(frozen=True)
class _Product:
    node: fx.Node
    rows: fx.Node
    weight: fx.Node
    transposed: bool = False
    options: tuple[Any, ...] = ()


def find_sites(
    program: Program, experts: LoRAExperts, router: RouterSpec
) -> tuple[dict[Site, list[Match]], list[Rejection]]:
    """Sites that can hold experts with their nodes, and those that cannot with the reason."""
    _, deep = segments(program)
    products: dict[str, list[_Product]] = {}
    rejected: dict[str, str] = {}
    for node in deep:
        found = _product(program, node)
        if isinstance(found, _Product):
            products.setdefault(program.inputs[found.weight.name].name, []).append(found)
        elif found is not None:
            rejected.setdefault(_place(node), found)
    head = _head(program, deep, products)
    layouts = _Layouts(program, deep, experts, router)
    sites: dict[Site, list[Match]] = {}
    named: set[str] = set()
    for weight, uses in products.items():
        name = _site_name(weight, uses[0].node)
        if name in named:  # a module that applies several weights of others
            name = weight.removesuffix(".weight")
        named.add(name)
        if not experts.wants(name):
            rejected[name] = f"not named in sites={experts.sites}"
        elif weight == head and experts.sites == "all":
            rejected[name] = "output head: left out by sites='all' (\"all+head\" takes it in)"
        else:
            matches = [layouts.match(use) for use in uses]
            reason = next((m for m in matches if isinstance(m, str)), None)
            if reason is not None:
                rejected[name] = reason
            else:
                sites[_site(name, weight, uses[0])] = [m for m in matches if isinstance(m, Match)]
    return sites, [Rejection(n, r) for n, r in rejected.items()]


def _site(name: str, weight: str, use: _Product) -> Site:
    rows, columns, *kernel = (int(s) for s in value(use.weight).shape)
    if kernel:  # grouped or not, the experts read every input channel
        return Site(name, weight, int(value(use.rows).shape[1]), rows, False, tuple(kernel))
    inside, out = (rows, columns) if use.transposed else (columns, rows)
    return Site(name, weight, inside, out, use.transposed)


def _site_name(weight: str, node: fx.Node) -> str:
    """The module that applies the weight: of a tied one, the head and not the embedding."""
    owner = weight.removesuffix(".weight")
    place = _place(node)
    inside = owner == place or owner.startswith(place + ".")
    return owner if inside or not module_paths(node) else place


def _place(node: fx.Node) -> str:
    paths = module_paths(node)
    return paths[-1][0] if paths else node.name


def _product(program: Program, node: fx.Node) -> _Product | str | None:
    """The product that a node computes, or why it is not a site, or None where it is nothing."""

    def weight(n: Any) -> bool:
        return (
            isinstance(n, fx.Node) and n.op == "placeholder"
            and program.inputs[n.name].kind == "weight" and value(n).ndim == 2
        )  # fmt: skip

    if node.target in CONVOLUTIONS:
        return _convolution(program, node)
    if node.target in OTHER_PRODUCTS:
        if any(isinstance(a, fx.Node) and weight(a) for a in pytree.tree_leaves(node.args)):
            return f"{node.target} with a parameter is not a plain linear map"
        return None
    rows: Any
    factor: Any
    if node.target is aten.linear.default:
        rows, factor = node.args[:2]
        if weight(factor):
            return _Product(node, rows, factor)
        return "the weight is computed in the graph, not a parameter"
    if node.target is aten.addmm.default:
        rows, factor = node.args[1:3]
        if any(node.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")):
            return "addmm with alpha or beta"
    elif node.target in (aten.mm.default, aten.matmul.default):
        rows, factor = node.args[:2]
    else:
        return None
    if weight(factor):
        return _Product(node, rows, factor, transposed=True)
    if isinstance(factor, fx.Node) and factor.target in TRANSPOSES and weight(factor.args[0]):
        stored: Any = factor.args[0]
        return _Product(node, rows, stored)
    return None


def _convolution(program: Program, node: fx.Node) -> _Product | str:
    rows: Any
    weight: Any
    rows, weight = node.args[:2]
    transposed = op_name(node) == "convolution" and node.args[6]
    if value(node).ndim != 4 or transposed:
        return "a convolution that is not a plain 2-d one"
    if weight.op != "placeholder" or program.inputs[weight.name].kind != "weight":
        return "the weight is computed in the graph, not a parameter"
    options: list[Any] = [[1, 1], [0, 0], [1, 1]]
    given = node.args[3:6]
    options[: len(given)] = given
    padding = options[1] if isinstance(options[1], str) else list(pair(options[1]))
    return _Product(
        node, rows, weight, options=(list(pair(options[0])), padding, list(pair(options[2])))
    )


def _head(program: Program, deep: list[fx.Node], products: dict[str, list[_Product]]) -> str | None:
    """The weight of the last product after the last block, if there is one: the output head."""
    assert program.depth is not None
    if program.depth.head is None:
        return None
    names = [n.name for n in deep]
    last_exit = program.depth.blocks[-1].exit
    after = set(deep[names.index(last_exit) + 1 :]) if last_exit in names else set(deep)
    for weight, uses in reversed(products.items()):
        if uses[-1].node in after:
            return weight
    return None


class _Layouts:
    """How the plan's rows lie in the sites of one program."""

    def __init__(
        self, program: Program, deep: list[fx.Node], experts: LoRAExperts, router: RouterSpec
    ) -> None:
        assert program.cut is not None
        cut = program.node(program.cut.node)
        self.lead = lead_of(value(cut).shape)
        self.places = maps(deep, cut) if value(cut).ndim == 4 else {}
        self.experts = experts
        self.patches = isinstance(router, PatchRouter) and value(cut).ndim == 4
        granularity = "token" if isinstance(router, PatchRouter) else router.granularity
        self.per_sample = granularity == "sequence" or len(self.lead) == 1

    def match(self, use: _Product) -> Match | str:
        if value(use.weight).ndim == 4:
            return self._of_map(use, use.node, "map")
        if self.patches:
            place = self.places.get(use.rows)
            if place != Place(1, 2, 3):
                shown = ", ".join(str(s) for s in value(use.rows).shape)
                return f"its input ({shown}) has no patches of the map at the cut"
            return self._of_map(use, use.rows, "map_last")
        kind = _layout_kind(use.rows, self.lead, self.per_sample)
        if kind is None:
            shown = ", ".join(str(s) for s in value(use.rows).shape)
            plan = ", ".join(str(s) for s in self.lead)
            return f"its input ({shown}) has rows that are not the plan's ({plan})"
        return self._made(use, kind)

    def _of_map(self, use: _Product, over: fx.Node, kind: Any) -> Match | str:
        """A site on a feature map, `over` whose positions the gates lie."""
        if kind == "map" and not self.patches:
            same_batch = same_sizes(value(use.rows).shape[:1], self.lead[:1])
            if not self.per_sample or not same_batch:
                return "a convolution whose positions are not the plan's rows"
            return self._made(use, kind)
        place = self.places.get(over)
        if place is None or (kind == "map" and self.places.get(use.rows) != NCHW):
            return "its input does not lie over the map at the cut"
        height, width = (value(over).shape[d] for d in (place.rows, place.cols))
        if not isinstance(height, int) or not isinstance(width, int):
            return f"its map has no fixed size ({height}, {width})"
        return self._made(use, kind, (height, width))

    def _made(self, use: _Product, kind: Any, size: tuple[int, int] | None = None) -> Match:
        rows = value(use.rows)
        layout = Layout(
            kind, rows.ndim, rows.dtype, self.experts.rank, self.experts.scale, size
        )
        return Match(use.node, use.rows, layout, use.options)


def _layout_kind(rows: fx.Node, lead: tuple, per_sample: bool) -> Any:
    """How the plan's rows lie in a site's input, judged by symbolic sizes; None: they do not."""
    dims = tuple(value(rows).shape[:-1])
    if per_sample and same_sizes(dims[:1], lead[:1]):
        return "sample"
    if not per_sample and same_sizes(dims[: len(lead)], lead):
        return "rows"
    swapped = lead[::-1]
    if len(lead) == 2 and same_sizes(dims[:2], swapped):
        return "swapped"
    source = flattened_from(rows) if len(dims) == 1 and len(lead) == 2 else None
    if source is None:
        return None
    before = tuple(value(source).shape)
    if not same_sizes((before[0] * before[1],), dims):
        return None
    if same_sizes(before[:2], lead):
        return "flat"
    return "swapped_flat" if same_sizes(before[:2], swapped) else None

"""Find the linear sites of the deep segment, and match their rows to the plan's.

A site is a product of activations with a 2-d parameter, whatever form it has: nn.Linear, addmm
with the weight stored (in, out), a matmul with a bare or transposed parameter, a tied weight.
What cannot be converted is rejected with a reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..analysis.rows import flattened_from, lead_of, same_sizes
from ..config import LoRAExperts
from ..program import Program, Rejection, Site, module_paths, value
from ..routing import Layout
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


@dataclass(frozen=True)
class _Product:
    node: fx.Node
    rows: fx.Node
    weight: fx.Node
    transposed: bool


def find_sites(
    program: Program, experts: LoRAExperts, granularity: str
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
            matches = [_match(program, use, experts, granularity) for use in uses]
            reason = next((m for m in matches if isinstance(m, str)), None)
            if reason is not None:
                rejected[name] = reason
            else:
                sites[_site(name, weight, uses[0])] = [m for m in matches if isinstance(m, Match)]
    return sites, [Rejection(n, r) for n, r in rejected.items()]


def _site(name: str, weight: str, use: _Product) -> Site:
    rows, columns = (int(s) for s in value(use.weight).shape)
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
        return "a convolution: LoRA experts here work on linear sites only"
    if node.target in OTHER_PRODUCTS:
        if any(isinstance(a, fx.Node) and weight(a) for a in pytree.tree_leaves(node.args)):
            return f"{node.target} with a parameter is not a plain linear map"
        return None
    rows: Any
    factor: Any
    if node.target is aten.linear.default:
        rows, factor = node.args[:2]
        if weight(factor):
            return _Product(node, rows, factor, transposed=False)
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
        return _Product(node, rows, stored, transposed=False)
    return None


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


def _match(
    program: Program, use: _Product, experts: LoRAExperts, granularity: str
) -> Match | str:
    assert program.cut is not None
    lead = lead_of(value(program.node(program.cut.node)).shape)
    kind = _layout_kind(use.rows, lead, granularity)
    if kind is None:
        shown = ", ".join(str(s) for s in value(use.rows).shape)
        plan = ", ".join(str(s) for s in lead)
        return f"its input ({shown}) has rows that are not the plan's ({plan})"
    rows = value(use.rows)
    return Match(
        use.node, use.rows, Layout(kind, rows.ndim, rows.dtype, experts.rank, experts.scale)
    )


def _layout_kind(rows: fx.Node, lead: tuple, granularity: str) -> Any:
    """How the plan's rows lie in a site's input, judged by symbolic sizes; None: they do not."""
    dims = tuple(value(rows).shape[:-1])
    per_sample = granularity == "sequence" or len(lead) == 1
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

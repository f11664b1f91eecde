"""Find the linear sites of the deep segment, and match their rows to the plan's.

A site is a product of activations with a 2-d parameter, whatever form it has: nn.Linear, addmm
with the weight stored (in, out), a matmul with a bare or transposed parameter, a tied weight.
What cannot be converted is rejected with a reason.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..config import LoRAExperts
from ..program import Program, Rejection, Site, module_paths, value
from ..routing import Layout
from .split import segments

aten = torch.ops.aten
TRANSPOSES = {aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default}
CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}
CONVOLUTIONS |= {aten.convolution.default, aten.conv2d.padding, aten.conv1d.padding}
OTHER_PRODUCTS = {aten.bmm.default, aten.baddbmm.default, aten.einsum.default}
RESHAPES = {aten.view.default, aten.reshape.default, aten.flatten.using_ints}
ROW_PRESERVING = {
    aten.linear.default, aten.addmm.default, aten.mm.default, aten.layer_norm.default,
    aten.rms_norm.default, aten.dropout.default, aten.contiguous.default, aten.clone.default,
    aten.to.dtype, aten.softmax.int, aten._unsafe_view.default,
}  # fmt: skip


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
    for weight, uses in products.items():
        name = weight.removesuffix(".weight")
        if not experts.wants(name):
            rejected[name] = f"not named in sites={experts.sites}"
        elif weight == head and experts.sites == "all":
            rejected[name] = "output head: left out by sites='all' (\"all+head\" takes it in)"
        else:
            matches = [_match(program, use, granularity) for use in uses]
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


def _place(node: fx.Node) -> str:
    paths = module_paths(node)
    return paths[-1][0] if paths else node.name


def _product(program: Program, node: fx.Node) -> _Product | str | None:
    """The product that a node computes, or why it is not a site, or None where it is nothing."""

    def weight(n: object) -> bool:
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
    if node.target is aten.linear.default:
        if weight(node.args[1]):
            return _Product(node, node.args[0], node.args[1], transposed=False)
        return "the weight is computed in the graph, not a parameter"
    if node.target is aten.addmm.default:
        rows, factor = node.args[1], node.args[2]
        if any(node.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")):
            return "addmm with alpha or beta"
    elif node.target in (aten.mm.default, aten.matmul.default):
        rows, factor = node.args[0], node.args[1]
    else:
        return None
    if weight(factor):
        return _Product(node, rows, factor, transposed=True)
    if isinstance(factor, fx.Node) and factor.target in TRANSPOSES and weight(factor.args[0]):
        return _Product(node, rows, factor.args[0], transposed=False)
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


def _match(program: Program, use: _Product, granularity: str) -> Match | str:
    assert program.cut is not None
    features = value(program.node(program.cut.node)).shape
    layout = layout_of(use.rows, lead_of(features), granularity)
    if layout is None:
        shown = ", ".join(str(s) for s in value(use.rows).shape)
        plan = ", ".join(str(s) for s in lead_of(features))
        return f"its input ({shown}) has rows that are not the plan's ({plan})"
    return Match(use.node, use.rows, layout)


def lead_of(features: torch.Size) -> tuple:
    """The row dimensions of a value at the cut: (batch, length), or (batch,) of a feature map."""
    return tuple(features[:-1]) if len(features) < 4 else tuple(features[:1])


def layout_of(rows: fx.Node, lead: tuple, granularity: str) -> Layout | None:
    """How the plan's rows lie in a site's input, judged by symbolic sizes; None: they do not."""
    shape, dtype = value(rows).shape, value(rows).dtype
    dims = tuple(shape[:-1])
    per_sample = granularity == "sequence" or len(lead) == 1
    if per_sample and dims and _same(dims[:1], lead[:1]):
        return Layout("sample", len(shape), dtype)
    if not per_sample and _same(dims[: len(lead)], lead):
        return Layout("rows", len(shape), dtype)
    swapped = lead[::-1]
    if len(lead) == 2 and _same(dims[:2], swapped):
        return Layout("swapped", len(shape), dtype)
    if len(dims) != 1 or len(lead) != 2:
        return None
    source = _flattened_from(rows)
    if source is None:
        return None
    before = tuple(value(source).shape)
    if _same(before[:2], lead) and _same((before[0] * before[1],), dims):
        return Layout("flat", 2, dtype)
    if _same(before[:2], swapped) and _same((before[0] * before[1],), dims):
        return Layout("swapped_flat", 2, dtype)
    return None


def _flattened_from(node: fx.Node) -> fx.Node | None:
    """The value whose leading dimensions were merged into this one's rows, row order kept."""
    while node.op == "call_function":
        if node.target in RESHAPES:
            return node.args[0]
        tags = getattr(node.target, "tags", ())
        if node.target not in ROW_PRESERVING and torch.Tag.pointwise not in tags:
            return None
        rows = value(node).shape[0]
        sources = [
            n for n in node.all_input_nodes
            if isinstance(value(n), torch.Tensor) and value(n).ndim == value(node).ndim
            and n.op != "placeholder" and _same((value(n).shape[0],), (rows,))
        ]  # fmt: skip
        if not sources:
            return None
        node = sources[0]
    return None


def _same(a: tuple, b: tuple) -> bool:
    """Equal sizes, symbolic ones by their expression: no guard is added, nothing is assumed."""
    return len(a) == len(b) and all(_expression(x) == _expression(y) for x, y in zip(a, b, strict=True))


def _expression(size: object) -> object:
    return size if isinstance(size, int) else size.node.expr  # type: ignore[attr-defined]

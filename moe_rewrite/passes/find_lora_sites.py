"""Find the sites of the deep segment, and match their rows to the plan's.

A site is a product of activations with a 2-d weight, or a convolution. What cannot be converted is rejected with a reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from ..analysis.grouped_products import Sorted
from ..analysis.infer_layout import Layouts
from ..analysis.linear_ops import Product, find_product, innermost_module, weight_name
from ..analysis.stacked_products import RowDims, Stacked, rows_of
from ..analysis.static_values import Static, static_values
from ..config import LoRAExperts, RouterSpec
from ..ir.aten import module_paths, value
from ..ir.gate_layout import Flat, GateLayout, Rows, Samples
from ..ir.ops import op
from ..ir.program import Program
from ..ir.sites import Found, LoRASite, Rejection
from .base import Decisions, Pass
from .split import segments

OWN_EXPERTS = "the experts of a model that routes already, whose B and A PEFT stores otherwise"
OTHER_ROWS = "the rows of the model's own experts are not known to be the plan's"
ADAPTER = {"lora_A", "lora_B"}  # PEFT's names


Key = tuple[str, str]  # (weight, the module that applies it where it is computed, else "")


@dataclass(frozen=True)
class Match:
    """A node that applies a site's weight, with its input (`rows`) and gate layout."""

    node: fx.Node
    rows: fx.Node
    layout: GateLayout
    options: tuple[Any, ...] = ()  # of a convolution, see `analysis.convolutions`
    groups: Sorted | None = None  # of a product with the weights of the model's own experts
    stacked: Stacked | None = None  # the same, as one product with all of them or a chosen one
    of: RowDims | None = None  # where its input has the plan's rows


@dataclass(frozen=True)
class FindLoRASites(Pass):
    """Exact: the graph is only read."""

    experts: LoRAExperts
    name = "sites"

    def apply(self, program: Program, decisions: Decisions) -> Program:
        sites, rejected = self._find(program, decisions.chosen)
        reasons = tuple(Rejection(n, r) for n, r in rejected.items())
        return self.done(program, found=Found(sites, reasons))

    def _find(
        self, program: Program, router: RouterSpec
    ) -> tuple[dict[LoRASite, list[Match]], dict[str, str]]:
        """(sites that can hold experts, with their nodes; reasons of the others, by name)."""
        _, deep = segments(program)
        static = static_values(program)
        products: dict[Key, list[Product]] = {}
        rejected: dict[str, str] = {}
        for node in deep:
            found = find_product(static, node)
            if isinstance(found, Product):
                products.setdefault(_key(program, static, found), []).append(found)
            elif found is not None:
                rejected.setdefault(innermost_module(node), found)
        head, experts = _head(program, deep, products), self.experts
        layouts = Layouts(program, deep, router)
        sites: dict[LoRASite, list[Match]] = {}
        named: set[str] = set()
        for key, uses in products.items():
            weight, _ = key
            name = _site_name(weight, uses[0])
            if name in named:  # a module that applies several weights of other modules
                name = weight.removesuffix(".weight")
            name = _free_name(name, named)
            named.add(name)
            if ADAPTER & set(name.split(".")):
                rejected[name] = "a factor of the base model's own LoRA adapter"
            elif not experts.wants(name):
                rejected[name] = f"not named in sites={experts.sites}"
            elif key == head and experts.sites == "all":
                rejected[name] = "output head: left out by sites='all' (\"all+head\" takes it in)"
            else:
                matches = [_match(static, layouts, use) for use in uses]
                reason = next((m for m in matches if isinstance(m, str)), None)
                if reason is not None:
                    rejected[name] = reason
                else:
                    of = [m for m in matches if isinstance(m, Match)]
                    sites[_site(name, weight, uses[0])] = of
        return sites, rejected


def _match(static: Static, layouts: Layouts, use: Product) -> Match | str:
    if use.stacked is not None:
        return _match_stacked(static, layouts, use, use.stacked)
    if use.groups is not None:
        layout = layouts.of_rows(use.groups.source, use.groups.source)
        if _leading(layout) != 1 and not isinstance(layout, str):
            layout = OTHER_ROWS
    else:
        convolution = value(use.weight).ndim > 2
        of = layouts.of_map if convolution else layouts.of_rows
        layout = of(use.rows, use.node)
    if isinstance(layout, str):
        return layout
    return Match(use.node, use.rows, layout, use.options, use.groups)


def _match_stacked(static: Static, layouts: Layouts, use: Product, how: Stacked) -> Match | str:
    """The gates are those of the rows that the product's input has, wherever it has them."""

    def known(node: fx.Node) -> int:
        return _leading(layouts.of_rows(node, node)) if value(node).ndim in (2, 3) else 0

    of = rows_of(static, use.rows, known)
    if of is None:
        return OTHER_ROWS
    letters = {how.given[d] for d in of.dims}
    own = {how.inside, *(how.group if how.index is None else "")}
    layout = layouts.of_rows(of.source, of.source)
    if isinstance(layout, str) or of.tiled or letters & own or not letters <= {*how.made}:
        return OTHER_ROWS
    return Match(use.node, use.rows, layout, stacked=how, of=of)


def _leading(layout: GateLayout | str) -> int:
    """How many leading dimensions have the plan's rows, if these are all but the features'."""
    if isinstance(layout, Flat):
        return 1
    return layout.ndim - 1 if isinstance(layout, Rows | Samples) and layout.ndim in (2, 3) else 0


def _site(name: str, weight: str, use: Product) -> LoRASite:
    if use.groups is not None or use.stacked is not None:
        groups, rows, columns = (int(s) for s in value(use.weight).shape)
        inside, out = (rows, columns) if use.transposed else (columns, rows)
        return LoRASite(name, weight, inside, out, use.transposed, (), OWN_EXPERTS, groups)
    rows, columns, *kernel = (int(s) for s in value(use.weight).shape)
    if kernel:  # grouped or not, the experts read every input channel
        inside, out = (int(value(n).shape[1]) for n in (use.rows, use.node))
        apart = _unlike_peft(use)
        return LoRASite(name, weight, inside, out, use.transposed, tuple(kernel), apart)
    inside, out = (rows, columns) if use.transposed else (columns, rows)
    return LoRASite(name, weight, inside, out, use.transposed)


def _unlike_peft(use: Product) -> str:
    """Why PEFT's LoRA of a convolution computes something else than an expert beside it."""
    if use.transposed:
        return "a transposed convolution, for which PEFT has no LoRA"
    if value(use.weight).shape[1] != value(use.rows).shape[1]:
        return "a convolution in groups, into which PEFT divides B too"
    _, _, dilation = use.options
    if set(dilation) != {1}:
        return "a dilated convolution, whose dilation PEFT's LoRA leaves out"
    padded = op(use.rows).positions == "pad" and use.rows.op == "call_function"
    if padded and innermost_module(use.rows) == innermost_module(use.node):
        return "a convolution that pads its input in a way of its own, which PEFT's LoRA does not"
    return ""


def _site_name(weight: str, use: Product) -> str:
    """Name of the module that applies the weight: for a tied one, the head, not the embedding."""
    owner = weight.removesuffix(".weight")
    at = innermost_module(use.node)
    inside = owner == at or owner.startswith(at + ".")
    alone = use.weight.op != "placeholder" and at != innermost_module(use.rows)
    name = owner if (inside and not alone) or not module_paths(use.node) else at
    return name.removesuffix(".base_layer")  # PEFT's wrapper of the module that users know


def _free_name(name: str, taken: set[str]) -> str:
    """With a number if a product with the same weight, otherwise computed, has the name already."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}.{number}"
    return free


def _key(program: Program, static: Static, use: Product) -> Key:
    at = "" if use.weight.op == "placeholder" else innermost_module(use.node)
    return weight_name(program, static, use), at


def _head(program: Program, deep: list[fx.Node], products: dict[Key, list[Product]]) -> Key | None:
    """The last product after the last block, if there is one: the output head."""
    assert program.depth is not None
    if program.depth.head is None:
        return None
    names = [n.name for n in deep]
    last_exit = program.depth.blocks[-1].exit
    after = set(deep[names.index(last_exit) + 1 :]) if last_exit in names else set(deep)
    for key, uses in reversed(products.items()):
        if uses[-1].node in after:
            return key
    return None

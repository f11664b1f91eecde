"""Find the sites of the deep segment, and match their rows to the plan's.

A site is a product of activations with a 2-d parameter, or a 2-d convolution over the cut's
positions. What cannot be converted is rejected with a reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from ..analysis.infer_layout import Layouts
from ..analysis.linear_ops import Product, find_product, innermost_module
from ..config import LoRAExperts, RouterSpec
from ..ir.aten import module_paths, value
from ..ir.gate_layout import GateLayout
from ..ir.program import Program
from ..ir.sites import Found, LoRASite, Rejection
from .base import Decisions, Pass
from .split import segments


@dataclass(frozen=True)
class Match:
    """A node that applies a site's weight, with its input (`rows`) and gate layout."""

    node: fx.Node
    rows: fx.Node
    layout: GateLayout
    options: tuple[Any, ...] = ()  # stride, padding and dilation of a convolution


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
        products: dict[str, list[Product]] = {}
        rejected: dict[str, str] = {}
        for node in deep:
            found = find_product(program, node)
            if isinstance(found, Product):
                products.setdefault(program.inputs[found.weight.name].name, []).append(found)
            elif found is not None:
                rejected.setdefault(innermost_module(node), found)
        head, experts = _head(program, deep, products), self.experts
        layouts = Layouts(program, deep, router)
        sites: dict[LoRASite, list[Match]] = {}
        named: set[str] = set()
        for weight, uses in products.items():
            name = _site_name(weight, uses[0].node)
            if name in named:  # a module that applies several weights of other modules
                name = weight.removesuffix(".weight")
            named.add(name)
            if not experts.wants(name):
                rejected[name] = f"not named in sites={experts.sites}"
            elif weight == head and experts.sites == "all":
                rejected[name] = "output head: left out by sites='all' (\"all+head\" takes it in)"
            else:
                matches = [_match(layouts, use) for use in uses]
                reason = next((m for m in matches if isinstance(m, str)), None)
                if reason is not None:
                    rejected[name] = reason
                else:
                    of = [m for m in matches if isinstance(m, Match)]
                    sites[_site(name, weight, uses[0])] = of
        return sites, rejected


def _match(layouts: Layouts, use: Product) -> Match | str:
    convolution = value(use.weight).ndim == 4
    layout = layouts.of_map(use.rows, use.node) if convolution else layouts.of_rows(use.rows)
    return layout if isinstance(layout, str) else Match(use.node, use.rows, layout, use.options)


def _site(name: str, weight: str, use: Product) -> LoRASite:
    rows, columns, *kernel = (int(s) for s in value(use.weight).shape)
    if kernel:  # grouped or not, the experts read every input channel
        return LoRASite(name, weight, int(value(use.rows).shape[1]), rows, False, tuple(kernel))
    inside, out = (rows, columns) if use.transposed else (columns, rows)
    return LoRASite(name, weight, inside, out, use.transposed)


def _site_name(weight: str, node: fx.Node) -> str:
    """Name of the module that applies the weight: for a tied one, the head, not the embedding."""
    owner = weight.removesuffix(".weight")
    at = innermost_module(node)
    inside = owner == at or owner.startswith(at + ".")
    return owner if inside or not module_paths(node) else at


def _head(program: Program, deep: list[fx.Node], products: dict[str, list[Product]]) -> str | None:
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

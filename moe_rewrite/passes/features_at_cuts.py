"""The features at every cut at a block, by one graph: what a router would read there."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..config import RouterSpec, TokenRouter
from ..errors import ConversionError, MoeRewriteError
from ..frontend.host import Host
from ..ir.any_layout import allow_any_layout, written_roots
from ..ir.aten import value
from ..ir.conditions import Conditions, conditions_of
from ..ir.ops import alias_root, must_stay
from ..ir.program import Cut, Program
from ..routing.packed_rows import PackedRows, RowMask
from .base import Decisions
from .clean import Clean
from .decide import choose_router
from .inline_regions import InlineRegions
from .pipeline import run, to_sites
from .quantized_products import call_functions
from .recipe import Recipe
from .split import FindDepth, Split

Read = tuple[torch.Tensor, RowMask]  # the features at a cut, and the mask of their rows


@dataclass(frozen=True)
class CutAtBlock:
    """A cut before a block, as `convert` would make it.

    index, label: of the block.
    after: share of the parameters that lie after it.
    router: a gate in closed form that reads what the router there would read; None with a problem.
    problem: why nothing can be converted here; empty if something can.
    """

    index: int
    label: str
    after: float
    router: TokenRouter | None = None
    problem: str = ""


@dataclass(frozen=True)
class FeatureGraph:
    """A graph that computes nothing but features at cuts.

    blocks: names of the blocks of its model.
    cuts: those whose features it gives, by index of the first deep block.
    conditions: what a call must meet.
    """

    blocks: tuple[str, ...]
    cuts: dict[int, Cut]
    conditions: Conditions
    _program: Program
    _call: Callable[..., tuple[torch.Tensor, ...]]
    _gives: tuple[str, ...]
    _written: frozenset[str]

    def serves(self, leaves: list[Any]) -> bool:
        """Whether a call meets the conditions; sizes that capture took for 2 or more must be."""
        pattern = self.conditions.pattern(leaves)
        return pattern is not None and all(size == 2 for size in pattern)

    def read(self, leaves: list[Any], tensors: dict[str, torch.Tensor]) -> dict[int, Read]:
        """The features at each cut. leaves: of the call. tensors: the model's, by name; neither is
        written to."""
        users, values = iter(leaves), []
        for node in self._program.graph.find_nodes(op="placeholder"):
            of = self._program.inputs[node.name]
            if of.kind in ("weight", "buffer"):
                tensor = tensors[of.name]
            else:
                tensor = self._program.constants[of.name] if of.kind == "constant" else next(users)
            values.append(tensor.clone() if node.name in self._written else tensor)
        made = dict(zip(self._gives, self._call(*values), strict=True))
        known = dict(zip(self.conditions.leaves, leaves, strict=True))
        return {
            index: (made[cut.node], _mask(cut, made, known)) for index, cut in self.cuts.items()
        }


def _mask(cut: Cut, made: dict[str, torch.Tensor], known: dict[str, Any]) -> RowMask:
    mask = known.get(cut.mask or "")
    if not cut.tables:
        return mask
    return PackedRows(tuple((made[t.node], t.attends) for t in cut.tables), mask)


def with_depth(captured: Program) -> Program:
    """Raises ConversionError for a model in which a split has to name a module."""
    program = run((InlineRegions(), Clean(), FindDepth()), captured, Decisions("auto"))
    assert program.depth is not None
    if program.depth.must_name:
        raise ConversionError(
            f"{program.model} has several mainlines: name the module that the deep segment starts "
            f"with, instead of split='auto', for example split={program.depth.blocks[-1].name!r}.\n"
            f"{program.depth}"
        )
    return program


def cuts_at_blocks(
    program: Program, host: Host, recipe: Recipe, arguments: dict[str, Any]
) -> tuple[CutAtBlock, ...]:
    """Every cut before a block of a program from `with_depth`, which is not changed.

    arguments: of a call. Routers are chosen once for features of one shape, since that can run the
    model.
    """
    known: dict[Any, RouterSpec] = {}
    assert program.depth is not None
    return tuple(
        _cut_at_block(program, index, host, recipe, arguments, known)
        for index in range(len(program.depth))
    )


def _cut_at_block(
    program: Program, index: int, host: Host, recipe: Recipe, arguments: dict[str, Any],
    known: dict[Any, RouterSpec],
) -> CutAtBlock:  # fmt: skip
    depth = program.depth
    assert depth is not None
    at = index + (depth.stem is not None)
    total = sum(b.params for b in depth.parts) or 1
    after = sum(b.params for b in depth.parts[at:]) / total
    plain = CutAtBlock(index, depth.blocks[index].name, after)
    try:
        cut = run((Split(),), program.copy(), Decisions(index))
        assert cut.cut is not None
        shape = tuple(map(str, value(cut.node(cut.cut.node)).shape[1:]))
        kind = shape, cut.cut.line, cut.cut.token_map
        if kind not in known:
            known[kind] = choose_router(cut, host, arguments, recipe)
        found = run(to_sites(recipe), cut, Decisions(index, known[kind])).found
    except MoeRewriteError as error:
        reason = str(error).split("\n")[0].removesuffix(" The model's blocks:")
        return replace(plain, problem=reason)
    assert found is not None
    if not found.sites:
        return replace(plain, problem="nothing after the cut has the form of these experts")
    return replace(plain, router=_in_closed_form(known[kind]))


def _in_closed_form(router: RouterSpec) -> TokenRouter:
    """A gate that reads what this router reads; of one over patches, their mean over the sample."""
    if not isinstance(router, TokenRouter):
        return TokenRouter(granularity="sequence", fit="analytic")
    if router.policy == "expert":
        return TokenRouter(fit="analytic", normalize=router.normalize, pool=router.pool)
    return replace(router, fit="analytic")


def feature_graph(program: Program, indices: Collection[int]) -> FeatureGraph:
    """The graph of a program from `with_depth`, which becomes its own; of the cuts before these
    blocks."""
    cuts: dict[int, Cut] = {}
    for index in sorted(indices):
        program = run((Split(),), program, Decisions(index))
        assert program.cut is not None and program.depth is not None
        cuts[index] = program.cut
    leaves = program.leaves("user", "cache", "int")
    conditions = conditions_of(leaves, program.relations, program.values)
    gives = [c.node for c in cuts.values()] + [t.node for c in cuts.values() for t in c.tables]
    kept = tuple(dict.fromkeys(gives))
    _give_only(program, kept)
    allow_any_layout(program.graph)
    call_functions(program)
    written = frozenset(node.name for node in written_roots(program.graph.nodes))
    assert program.depth is not None
    return FeatureGraph(
        tuple(b.name for b in program.depth.blocks), cuts, conditions, program,
        fx.GraphModule(program.root, program.graph).forward, kept, written,
    )  # fmt: skip


def _give_only(program: Program, names: tuple[str, ...]) -> None:
    """Let a graph return these values, as they are where they are made, and compute nothing after the
    last of them."""
    graph, written = program.graph, written_roots(program.graph.nodes)
    returned = []
    for node in map(program.node, names):
        if alias_root(node) in written:
            with graph.inserting_after(node):
                node = graph.call_function(torch.ops.aten.clone.default, (node,))
        returned.append(node)
    order = {n: i for i, n in enumerate(graph.nodes)}
    last = max(order[n] for n in returned)
    graph.erase_node(graph.output_node())
    for node in reversed([n for n in graph.nodes if n.op != "placeholder" and order[n] > last]):
        graph.erase_node(node)
    graph.output(tuple(returned))
    graph.eliminate_dead_code(is_impure_node=must_stay)

"""Every split of a model at a block, analysed as `convert` would: what lands on each side, what
crosses, and which sites take experts. The model is captured once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..analysis.depth import depth_map
from ..analysis.flops import Sizes
from ..config import RouterSpec
from ..errors import MoeRewriteError
from ..frontend.host import Host
from ..ir.aten import module_paths, value
from ..ir.depth_map import Block, DepthMap
from ..ir.program import Program
from .base import Decisions
from .clean import Clean
from .decide import choose_router
from .inline_regions import InlineRegions
from .kinds import kind_of
from .pipeline import Compiler, Timer, run, to_sites
from .recipe import Recipe
from .split import Split, segments


@dataclass(frozen=True)
class Crossing:
    """A tensor that is known before the cut and read after it.

    name: of its graph node, or of the call's argument.
    maker: class and dotted name of the module that makes it; ``"the call"`` for an argument.
    shape: with names for symbolic sizes.
    routed: the router reads it.
    """

    name: str
    maker: str
    shape: tuple[str, ...]
    dtype: str
    routed: bool


@dataclass(frozen=True)
class SitesOf:
    """What one kind of experts finds after a cut.

    experts: name of the kind.
    router: the router that would be inserted; None where that is not possible.
    takes: (name, input features, output features) of the sites that take experts.
    rejected: (name, reason) of the others.
    notes: what else the report of a conversion says about these sites.
    problem: why nothing can be converted here; empty if something can.
    """

    experts: str
    router: RouterSpec | None = None
    takes: tuple[tuple[str, Any, Any], ...] = ()
    rejected: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class PossibleSplit:
    """A split at the beginning of a block.

    index: of the first deep block.
    label: its name.
    cut: graph node at which the model is cut.
    shallow, deep: the blocks on each side, with stem and head.
    crosses: what crosses the cut, the features that the router reads first.
    token_map: see `Cut`.
    kinds: for each recipe.
    problem: why the model cannot be cut here; empty if it can.
    """

    index: int
    label: str
    cut: str = ""
    shallow: tuple[Block, ...] = ()
    deep: tuple[Block, ...] = ()
    crosses: tuple[Crossing, ...] = ()
    token_map: tuple[int, int] | None = None
    kinds: tuple[SitesOf, ...] = ()
    problem: str = ""


def possible_splits(
    host: Host, recipes: Sequence[Recipe], arguments: dict[str, Any]
) -> tuple[DepthMap, tuple[PossibleSplit, ...]]:
    """The depth map of the host's module, and every split at a block.

    recipes: options of conversions to analyse; their `split` is not used.
    arguments: of a call, from `Host.arguments`.

    Raises CaptureError where the module cannot be captured, SplitError where no output depends on
    both an input and a parameter.
    """
    compiler = Compiler(host, recipes[0], Decisions("auto"), Timer())
    captured = compiler.capture(arguments, "eval")
    captured = run((InlineRegions(), Clean()), captured, compiler.decisions)
    depth = depth_map(captured, recipes[0].split)
    return depth, tuple(
        _possible_split(captured, depth, index, host, recipes, arguments)
        for index in range(len(depth))
    )


def _possible_split(
    captured: Program, depth: DepthMap, index: int, host: Host, recipes: Sequence[Recipe],
    arguments: dict[str, Any],
) -> PossibleSplit:  # fmt: skip
    label = depth.blocks[index].name
    program = replace(captured.copy(), depth=depth)
    try:
        program = run((Split(),), program, Decisions(index))
    except MoeRewriteError as error:
        return PossibleSplit(index, label, problem=_in_a_line(error))
    assert program.cut is not None
    at = index + (depth.stem is not None)
    known: dict[Any, RouterSpec] = {}

    def router(recipe: Recipe) -> RouterSpec:  # kinds share one: choosing it can run the model
        asked = recipe.mode, recipe.router, getattr(recipe.experts, "by_layer", False)
        if asked not in known:
            known[asked] = choose_router(program, host, arguments, recipe)
        return known[asked]

    kinds = tuple(_sites(program, recipe, router) for recipe in recipes)
    sides = depth.parts[:at], depth.parts[at:]
    cut = program.cut
    return PossibleSplit(index, label, cut.node, *sides, _crossing(program), cut.token_map, kinds)


def _sites(program: Program, recipe: Recipe, choose: Callable[[Recipe], RouterSpec]) -> SitesOf:
    kind = kind_of(recipe.experts)
    try:
        router = choose(recipe)
        found = run(to_sites(recipe), program, Decisions("auto", router)).found
    except MoeRewriteError as error:
        return SitesOf(kind.title, problem=_in_a_line(error))
    assert found is not None
    takes = tuple((s.name, s.in_features, s.out_features) for s in found.sites)
    rejected = tuple((r.name, r.reason) for r in found.rejected)
    problem = "" if takes else "nothing after the cut has their form"
    return SitesOf(kind.title, router, takes, rejected, kind.notes(found.sites), problem)


def _crossing(program: Program) -> tuple[Crossing, ...]:
    assert program.cut is not None
    before, after = segments(program)
    deep, sizes = set(after), Sizes(program)
    found = []
    for node in [*program.leaves(), *before]:
        made = value(node)
        if deep.isdisjoint(node.users) or not isinstance(made, torch.Tensor):
            continue
        given, paths = program.inputs.get(node.name), module_paths(node)
        maker = "the call" if given else paths[-1][0] if paths else program.model
        shape, dtype = tuple(map(sizes.word, made.shape)), str(made.dtype).removeprefix("torch.")
        routed = node.name == program.cut.node
        found.append(Crossing(given.name if given else node.name, maker, shape, dtype, routed))
    return tuple(sorted(found, key=lambda c: not c.routed))


def _in_a_line(error: MoeRewriteError) -> str:
    """Without the tables that some errors end with."""
    return str(error).split("\n")[0].removesuffix(" The model's blocks:")

"""The decisions of a conversion, taken on an evaluation graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from ..analysis.causality import has_positions_first, is_causal
from ..analysis.depth import depth_map
from ..config import PatchRouter, RouterSpec
from ..errors import ConfigError, ConversionError, SplitError
from ..frontend.host import Host
from ..ir.aten import value
from ..ir.ops import output_of
from ..ir.program import Program
from ..routing.select import resolve_router
from .base import Decisions
from .kinds import kind_of
from .pipeline import TO_CUT, Compiler, Timer, run, shallow_of, to_sites
from .recipe import UPCYCLE, Recipe
from .split import weights_by_side

NOT_ONE = "  nothing after the split has the form that these experts replace"


def plan_conversion(
    host: Host, recipe: Recipe, arguments: dict[str, Any], timed: Timer
) -> tuple[Compiler, Program]:
    """Capture the evaluation graph, take every decision on it, and return it with experts.

    Raises SplitError, ConfigError, ConversionError or CaptureError.
    """
    compiler = Compiler(host, recipe, Decisions(recipe.split), timed)
    program, decisions = _cut(compiler, arguments)
    decisions = replace(decisions, router=choose_router(program, host, arguments, recipe))
    program = run(to_sites(recipe), program, decisions, timed)
    compiler.decisions = _with_sites(decisions, program, recipe)
    return compiler, compiler.with_experts(program)


def _cut(compiler: Compiler, arguments: dict[str, Any]) -> tuple[Program, Decisions]:
    """The eval graph, cut as asked for; all later graphs are cut at the same place."""
    captured = compiler.capture(arguments, "eval")
    nodes = list(captured.graph.nodes)
    program = run(TO_CUT, captured, compiler.decisions, compiler.timed)
    depth, cut, asked = program.depth, program.cut, compiler.recipe.split
    assert depth is not None and cut is not None
    named = isinstance(asked, str) and asked != "auto"
    if depth.must_name and not named:
        raise ConversionError(
            f"{depth.model} has several mainlines: name the module that the deep segment starts "
            f"with, for example split={depth.blocks[-1].name!r}.\n{depth}"
        )
    split = cut.label if named or _is_named(program) else cut.index
    shallow = shallow_of(program, compiler.host, nodes)
    weights = weights_by_side(program)
    return program, Decisions(split, shallow=shallow, weights=weights)


def _is_named(program: Program) -> bool:
    """Whether the name of the first deep block says where the cut is. An index would count other
    blocks in a graph whose mainline is another (a decoder's, with labels instead of its ids)."""
    depth, cut = program.depth, program.cut
    assert depth is not None and cut is not None
    try:
        named = depth if depth.only else depth_map(program, cut.label)
        return named.resolve(cut.label) == depth.resolve(cut.index)
    except SplitError:
        return False


def choose_router(
    program: Program, host: Host, arguments: dict[str, Any], recipe: Recipe
) -> RouterSpec:
    """The recipe's router, or the one that fits what the cut of this program carries. Raises
    ConfigError for one that cannot work there."""
    assert program.cut is not None
    if getattr(recipe.experts, "by_layer", False):  # it reads no features at the cut
        assert recipe.router is not None
        return recipe.router
    features = value(program.node(program.cut.node))
    by_row = getattr(recipe.router, "granularity", None) == "token"
    rows = features.ndim == 3 and not program.cut.line
    if rows and not by_row and has_positions_first(program, host, arguments):
        shape = tuple(map(str, features.shape))
        raise ConfigError(
            f"the features at the cut, {shape}, have positions in their first dimension (as those "
            "of nn.LSTM and nn.TransformerEncoder with batch_first=False), and routers average over "
            "the second: convert a module that takes (batch, positions, ...) and transposes, or use "
            "TokenRouter(granularity='token')"
        )
    ordered = features.ndim == 3 and not isinstance(recipe.router, PatchRouter)
    causal = ordered and _causal(program, host, arguments, recipe)
    default = UPCYCLE if recipe.mode == "upcycle" else None
    line = program.cut.line
    return resolve_router(
        recipe.router, features.shape, causal, default, program.cut.token_map, line,
        recipe.default_fit,
    )  # fmt: skip


def _causal(program: Program, host: Host, arguments: dict[str, Any], recipe: Recipe) -> bool:
    assert program.cut is not None
    if not program.cut.line:
        return is_causal(program, host, arguments)
    # whether outputs over a line look ahead is not tested: a gate that was asked for is given, and
    # otherwise one that looks back if there is such an output
    outputs = [n for n in pytree.tree_leaves(output_of(program.graph)) if isinstance(n, fx.Node)]
    return recipe.router is None and any(getattr(value(n), "ndim", 0) > 2 for n in outputs)


def _with_sites(decisions: Decisions, program: Program, recipe: Recipe) -> Decisions:
    """Choose the sites. Raises ConversionError if there are none."""
    found = program.found
    assert found is not None
    if not found.sites:
        reasons = "\n".join(f"  {r.name}: {r.reason}" for r in found.rejected) or NOT_ONE
        more = kind_of(recipe.experts).elsewhere
        raise ConversionError(
            f"no site to convert after split={recipe.split!r}. Sites and reasons:\n{reasons}\n"
            f"Split earlier{', ' + more if more else ''}."
        )
    names = frozenset(site.name for site in found.sites)
    return replace(decisions, sites=names, rejected=found.rejected)

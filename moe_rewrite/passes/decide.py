"""The decisions of a conversion, taken on an evaluation graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..analysis.causality import is_causal
from ..analysis.line_maps import is_line_map
from ..config import RouterSpec
from ..errors import ConversionError
from ..frontend.host import Host
from ..ir.aten import value
from ..ir.program import Program
from ..routing.select import resolve_router
from .base import Decisions
from .pipeline import TO_CUT, Compiler, Timer, run, shallow_of, to_sites
from .recipe import UPCYCLE, Recipe

NOT_ONE = "  nothing after the split has the form that these experts replace"


def plan_conversion(
    host: Host, recipe: Recipe, arguments: dict[str, Any], timed: Timer
) -> tuple[Compiler, Program]:
    """Capture the evaluation graph, take every decision on it, and return it with experts.

    Raises SplitError, ConfigError, ConversionError or CaptureError.
    """
    compiler = Compiler(host, recipe, Decisions(recipe.split), timed)
    program, decisions = _cut(compiler, arguments)
    decisions = replace(decisions, router=_router(program, host, arguments, recipe))
    program = run(to_sites(recipe), program, decisions, timed)
    compiler.decisions = _with_sites(decisions, program, recipe)
    return compiler, compiler.with_experts(program)


def _cut(compiler: Compiler, arguments: dict[str, Any]) -> tuple[Program, Decisions]:
    """The eval graph, cut as asked for; all later graphs are cut at the same place."""
    captured = compiler.capture(arguments, "eval")
    program = run(TO_CUT, captured, compiler.decisions, compiler.timed)
    depth, cut, asked = program.depth, program.cut, compiler.recipe.split
    assert depth is not None and cut is not None
    named = isinstance(asked, str) and asked != "auto"
    if depth.must_name and not named:
        raise ConversionError(
            f"{depth.model} has several mainlines: name the module that the deep segment starts "
            f"with, for example split={depth.blocks[-1].name!r}.\n{depth}"
        )
    split = cut.label if named else cut.index
    return program, Decisions(split, shallow=shallow_of(program, compiler.host))


def _router(program: Program, host: Host, arguments: dict[str, Any], recipe: Recipe) -> RouterSpec:
    assert program.cut is not None
    cut = program.node(program.cut.node)
    features = value(cut)
    if features.ndim == 3 and is_line_map(cut):
        raise ConversionError(
            f"split={recipe.split!r}: the cut carries a map over a line (batch, channels, length), "
            "whose positions no router reads: split where features are the last dimension (after "
            f"a transpose), or after the length is pooled.\n{program.depth}"
        )
    causal = features.ndim == 3 and is_causal(program, host, arguments)
    default = UPCYCLE if recipe.mode == "upcycle" else None
    return resolve_router(recipe.router, features.shape, causal, default, program.cut.token_map)


def _with_sites(decisions: Decisions, program: Program, recipe: Recipe) -> Decisions:
    """Choose the sites. Raises ConversionError if there are none."""
    found = program.found
    assert found is not None
    if not found.sites:
        reasons = "\n".join(f"  {r.name}: {r.reason}" for r in found.rejected) or NOT_ONE
        raise ConversionError(
            f"no site to convert after split={recipe.split!r}. Sites and reasons:\n{reasons}\n"
            "Split earlier, choose other sites (LoRAExperts(sites='all+head') takes the head in), "
            "or another router granularity."
        )
    names = frozenset(site.name for site in found.sites)
    return replace(decisions, sites=names, rejected=found.rejected)

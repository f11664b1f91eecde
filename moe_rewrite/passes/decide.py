"""The decisions of a conversion, taken on its first two graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..analysis.causality import is_causal
from ..config import RouterSpec
from ..errors import CaptureError, ConversionError
from ..frontend.host import Host
from ..ir.aten import value
from ..ir.program import Program
from ..ir.sites import Found, Rejection
from ..routing.select import resolve_router
from .base import Decisions
from .pipeline import TO_CUT, Compiler, Timer, run, to_experts, to_sites
from .recipe import UPCYCLE, Recipe
from .split import shallow_modules


def plan_conversion(
    host: Host, recipe: Recipe, arguments: dict[str, Any], timed: Timer
) -> tuple[Compiler, list[Program]]:
    """Capture in both modes, take every decision, and hand back the routed programs: that of
    evaluation, and that of training where no decision changes how it is to be captured.

    Raises SplitError, ConfigError, ConversionError or CaptureError.
    """
    first = Decisions(recipe.split)
    evaluated, decisions = _cut(Compiler(host, recipe, first, timed), arguments)
    router = _router(evaluated, host, arguments, recipe)
    decisions = replace(decisions, router=router)
    evaluated = run(to_sites(recipe), evaluated, decisions, timed)

    trained, decisions = _captured_in_training(host, recipe, arguments, timed, decisions)
    reusable = _shallow(trained, host) <= decisions.shallow  # a dropout shows in training only
    decisions = replace(decisions, shallow=decisions.shallow | _shallow(trained, host))
    trained = run(to_sites(recipe), trained, decisions, timed)

    decisions = _with_sites(decisions, evaluated, trained, recipe)
    routed = [
        run(to_experts(recipe, router), program, decisions, timed)
        for program in (evaluated, trained)
    ]
    return Compiler(host, recipe, decisions, timed), routed if reusable else routed[:1]


def _cut(compiler: Compiler, arguments: dict[str, Any]) -> tuple[Program, Decisions]:
    """The evaluation graph, cut as asked for; from now on, all graphs are cut there."""
    captured = compiler.capture(arguments, "eval")
    program = run(TO_CUT, captured, compiler.decisions, compiler.timed)
    depth, cut, asked = program.depth, program.cut, compiler.recipe.split
    assert depth is not None and cut is not None
    named = isinstance(asked, str) and asked != "auto"
    if depth.stack is not None and not named:
        raise ConversionError(
            f"{depth.model} has several mainlines: name the module that the deep segment starts "
            f"with, such as split={depth.blocks[-1].name!r}.\n{depth}"
        )
    split = cut.label if named else cut.index
    return program, Decisions(split, shallow=_shallow(program, compiler.host))


def _shallow(program: Program, host: Host) -> frozenset[str]:
    """Those of the host's modules that run before the cut only."""
    known = {name for name, _ in host.module.named_modules(remove_duplicate=False)}
    return frozenset(shallow_modules(program) & known)


def _router(program: Program, host: Host, arguments: dict[str, Any], recipe: Recipe) -> RouterSpec:
    assert program.cut is not None
    features = value(program.node(program.cut.node))
    causal = features.ndim == 3 and is_causal(program, host, arguments)
    default = UPCYCLE if recipe.mode == "upcycle" else None
    return resolve_router(recipe.router, features.shape, causal, default)


def _captured_in_training(
    host: Host, recipe: Recipe, arguments: dict[str, Any], timed: Timer, decisions: Decisions
) -> tuple[Program, Decisions]:
    """The training graph, cut; where a module around the cut cannot be traced in training mode
    (layer drop), with those modules in evaluation, which the report says."""
    try:
        captured = Compiler(host, recipe, decisions, timed).capture(arguments, "train")
    except CaptureError as error:
        note = f"modules around the cut train in eval mode: {error}".split("\n")[0]
        decisions = replace(decisions, containers_eval=True, train_note=note)
        try:
            captured = Compiler(host, recipe, decisions, timed).capture(arguments, "train")
        except CaptureError:
            raise error from None
    return run(TO_CUT, captured, decisions, timed), decisions


def _with_sites(
    decisions: Decisions, evaluated: Program, trained: Program, recipe: Recipe
) -> Decisions:
    """Experts go where both graphs have a site. Raises ConversionError where there is none."""
    found, in_training = _found(evaluated), {site.name for site in _found(trained).sites}
    names = [site.name for site in found.sites]
    lost = [Rejection(name, "absent in training") for name in names if name not in in_training]
    rejected = (*found.rejected, *lost)
    sites = in_training.intersection(names)
    if not sites:
        reasons = "\n".join(f"  {r.name}: {r.reason}" for r in rejected) or "  none found"
        raise ConversionError(
            f"no site to convert after split={recipe.split!r}. Sites and reasons:\n{reasons}\n"
            "Split earlier, choose other sites (LoRAExperts(sites='all+head') takes the head in), "
            "or another router granularity."
        )
    return replace(decisions, sites=frozenset(sites), rejected=rejected)


def _found(program: Program) -> Found:
    assert program.found is not None
    return program.found

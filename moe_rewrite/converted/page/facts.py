"""What the page shows, as plain values for JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ...config import PatchRouter, RouterSpec, TokenRouter
from ...ir.depth_map import Block, DepthMap
from ...ir.split_curve import SplitCurve
from ...passes.possible_splits import PossibleSplit, SitesOf

READS = {
    "token": "each token by its own features",
    "prefix": "each token by the mean of the features up to it",
    "sequence": "each sample as a whole, by the mean of its features",
}


def page_facts(
    depth: DepthMap,
    splits: Sequence[PossibleSplit],
    start: int,
    converted: dict[str, Any] | None = None,
    routing: dict[str, Any] | None = None,
    run: dict[str, Any] | None = None,
    curve: SplitCurve | None = None,
) -> dict[str, Any]:
    """start: the split that is shown first. converted, routing, run, curve: the page's further
    sections; None: without."""
    indices = {id(b): i for i, b in enumerate(depth.blocks)}
    made = {
        "model": depth.model,
        "stack": depth.stack,
        "lengths": [list(pair) for pair in depth.lengths],
        "parts": [
            {"index": indices.get(id(b)), "name": b.name, "shape": " × ".join(b.shape),
             "params": b.params, "flops": b.flops}
            for b in depth.parts
        ],
        "splits": [_split(split) for split in splits],
        "start": start,
        "curve": None if curve is None else _curve(curve),
        "converted": converted,
        "routing": routing,
        "run": run,
    }  # fmt: skip
    return _plain(made)


def _plain(value: Any) -> Any:
    """Without numbers that JSON has no form for: NaN and infinities become None."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _curve(curve: SplitCurve) -> dict[str, Any]:
    points = [asdict(point) | {"chosen": point is curve.chosen} for point in curve.points]
    return {"title": curve.title, "points": points}


def _split(split: PossibleSplit) -> dict[str, Any]:
    crosses = [asdict(c) | {"shape": " × ".join(c.shape)} for c in split.crosses]
    return {
        "index": split.index,
        "label": split.label,
        "cut": split.cut,
        "problem": split.problem,
        "shallow": _side(split.shallow),
        "deep": _side(split.deep),
        "crosses": crosses,
        "kinds": [_kind(kind) for kind in split.kinds],
    }


def _side(parts: Sequence[Block]) -> dict[str, int]:
    return {"params": sum(b.params for b in parts), "flops": sum(b.flops for b in parts)}


def _kind(kind: SitesOf) -> dict[str, Any]:
    takes = [[name, str(inside), str(out)] for name, inside, out in kind.takes]
    rejected = [list(pair) for pair in kind.rejected]
    return {
        "experts": kind.experts,
        "router": router_words(kind.router),
        "problem": kind.problem,
        "notes": list(kind.notes),
        "takes": takes,
        "rejected": rejected,
    }


def router_words(router: RouterSpec | None) -> str:
    """What a router does, as a sentence; empty for None."""
    if isinstance(router, PatchRouter):
        grid = f"{router.grid} × {router.grid} patches"
        return f"Each expert takes {router.per_expert} of the {grid} of a sample."
    if not isinstance(router, TokenRouter):
        return "" if router is None else str(router)
    if router.policy == "expert":
        return "Each expert takes its best tokens of a sample."
    top = f", to at most {router.top_k} experts" if router.top_k else ""
    return f"The router sends {READS[router.granularity]}{top}."

"""Carved feed-forwards with one chosen expert: what keeps their training from collapsing."""

# python -m benchmarks.papers.carving_balance [--quick]: the GPT-2 with ReLU of `carving`, 16 experts of
# which 11 are shared, one of the other 5 chosen, without a bias (what a standard checkpoint holds).
# Trained on 2,000 samples, others for each seed, with a load-balancing loss of several weights, and with
# routers that stay as they were fitted. The dense network is trained once. For each: held-out perplexity
# over the dense one's, and the largest share of a layer's choices that one expert has, the mean of the
# layers (0.2 where 5 experts are balanced).

from __future__ import annotations

import copy
import statistics
from typing import Any

import torch

import moe_rewrite
from moe_rewrite import CarvedExperts

from ..tools.report import finish, is_quick, save
from .carving import BATCH, RATE, Texts, learn, perplexity, source_bytes, trained_here, windows

WAYS = (
    ("nothing", 0.0, True), ("loss x 0.01", 0.01, True), ("loss x 0.1", 0.1, True),
    ("routers as fitted", 0.0, False),
)  # fmt: skip
EXPERTS, SHARED, TAKEN = 16, 11, 12
SEEDS = (0, 1)


def trained(moe: Any, texts: torch.Tensor, seed: int, balance: float, routers: bool) -> Any:
    """A copy that was trained on these texts."""
    again = copy.deepcopy(moe)
    torch.manual_seed(seed)
    if not routers:
        for site in again.expert_sites():
            site.rows.requires_grad_(False)
    learn(again, again.trainable_parameters(), texts, RATE, balance)
    return again


@torch.no_grad()
def largest_share(moe: Any, texts: torch.Tensor) -> float:
    """Of the choices of a layer, those that went to one of its experts; the mean of the layers."""
    layers = moe.route(input_ids=texts[: 2 * BATCH]).layers.values()
    shares = [of.gates[..., SHARED:].flatten(0, -2).mean(0) for of in layers]
    return statistics.fmean(float((s / s.sum()).max()) for s in shares)


def cells(model: Any, texts: Texts, quick: bool) -> list[dict[str, Any]]:
    dense, found = perplexity(model, texts["held-out"]), []
    calibration = [{"input_ids": ids} for ids in texts["calibration"].split(BATCH)]
    samples = {
        seed: windows(source_bytes(False), 64 if quick else 2000, 100 + seed)
        for seed in SEEDS[: 1 if quick else None]
    }
    spec = CarvedExperts(EXPERTS, SHARED, TAKEN / EXPERTS, calibration=calibration, bias=False)
    moe: Any = moe_rewrite.convert(model, "carve", experts=spec)
    before = perplexity(moe, texts["held-out"]) / dense - 1
    at_first = largest_share(moe, texts["held-out"])
    for way, balance, routers in WAYS:
        after = [trained(moe, of, seed, balance, routers) for seed, of in samples.items()]
        cell = {
            "way": way, "untrained": before, "largest_share_untrained": at_first,
            "over_dense": [perplexity(m, texts["held-out"]) / dense - 1 for m in after],
            "largest_share": [largest_share(m, texts["held-out"]) for m in after],
        }  # fmt: skip
        print(cell, flush=True)
        found.append(cell)
    return found


def main() -> None:
    quick = is_quick(__doc__)
    torch.set_num_threads(1)
    figures = {"cells": cells(*trained_here(quick), quick)}
    if not quick:
        save("carving_balance", figures)
    rows = [
        (c["way"], f"{100 * c['untrained']:+.1f}%",
         ", ".join(f"{100 * x:+.1f}%" for x in c["over_dense"]),
         ", ".join(f"{x:.2f}" for x in c["largest_share"]))
        for c in figures["cells"]
    ]  # fmt: skip
    columns = ["against collapse", "untrained", "trained, by seed", "largest share"]
    finish("carving_balance", columns, rows, **figures)


if __name__ == "__main__":
    main()

"""Carved feed-forwards that learn the dense model's predictions: what of the loss comes back."""

# python -m benchmarks.papers.carving_distilled [--quick]: stories260K (needs the shared data), 43 experts
# of 4 hidden units, 4 of them shared, 32 running, by co-activation. The 2,000 samples of `carving`, which
# the model wrote; instead of the next token, the dense model's probabilities of all tokens are learnt
# (Kullback-Leibler), by experts and routers alone, for one and for eight passes over the samples, at two
# seeds of their order. Held-out perplexity over the dense model's.

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import moe_rewrite
from moe_rewrite import CarvedExperts

from ..tools.report import finish, is_quick, save
from .carving import BATCH, Texts, perplexity, stories

EXPERTS, SHARED, TAKEN = 43, 4, 32
RATES = {1: 1e-3, 8: 2e-3}  # by passes
SEEDS = (0, 1)


def distill(moe: Any, dense: nn.Module, tokens: torch.Tensor, passes: int) -> None:
    """Learn the dense model's probabilities of each next token."""
    parameters, rate = moe.trainable_parameters(), RATES[passes]
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0)
    orders = [torch.randperm(len(tokens)) for _ in range(passes)]
    batches = [ids for order in orders for ids in tokens[order].split(BATCH)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(batches))
    moe.train()
    for ids in batches:
        with torch.no_grad():
            wanted = dense(input_ids=ids).logits.log_softmax(-1)
        said = moe(input_ids=ids).logits.log_softmax(-1)
        loss = nn.functional.kl_div(said, wanted, log_target=True, reduction="none").sum(-1).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    moe.eval()


def cells(model: nn.Module, texts: Texts, quick: bool) -> list[dict[str, Any]]:
    calibration = [{"input_ids": ids} for ids in texts["calibration"].split(BATCH)]
    spec = CarvedExperts(EXPERTS, SHARED, TAKEN / EXPERTS, calibration=calibration)
    moe: Any = moe_rewrite.convert(model, "carve", experts=spec)
    dense = perplexity(model, texts["held-out"])
    found: list[dict[str, Any]] = [
        {"passes": 0, "over_dense": [perplexity(moe, texts["held-out"]) / dense - 1]}
    ]
    for passes in RATES:
        over = []
        for seed in SEEDS[: 1 if quick else None]:
            again = copy.deepcopy(moe)
            torch.manual_seed(seed)
            distill(again, model, texts["training"], passes)
            over.append(perplexity(again, texts["held-out"]) / dense - 1)
        found.append({"passes": passes, "over_dense": over})
        print(found[-1], flush=True)
    return found


def main() -> None:
    quick = is_quick(__doc__)
    torch.set_num_threads(1)
    if (small := stories(quick)) is None:
        print("stories260K is not there: set MOE_REWRITE_DATA to the shared data")
        return
    figures = {"samples": 64 if quick else 2000, "cells": cells(*small, quick)}
    if not quick:
        save("carving_distilled", figures)
    rows = [
        (c["passes"], ", ".join(f"{100 * x:+.1f}%" for x in c["over_dense"]))
        for c in figures["cells"]
    ]
    finish("carving_distilled", ["passes", "over dense, by seed"], rows, **figures)


if __name__ == "__main__":
    main()

"""Carved feed-forwards: perplexity and time by the share of hidden units that a token runs."""

# python -m benchmarks.papers.carving [--quick]: stories260K (where the shared data has it) on texts that
# it wrote, and a GPT-2 with ReLU that is trained here on bytes of Python's standard library, on files
# that it has not seen. Units grouped by co-activation, magnitude and at random; before and after 2,000
# samples of training, of which the experts and routers alone learn. At share 1 nothing is left out:
# that row after training is what the samples themselves teach. Then the time of a forward pass, of one
# feed-forward of each network and of a wide one, side by side, on one thread.

from __future__ import annotations

import copy
import json
import math
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import moe_rewrite
from moe_rewrite import CarvedExperts
from moe_rewrite.experts.ffn.call import FeedForwardCall
from moe_rewrite.routing.carve_rule import CarveRule
from moe_rewrite.routing.layer_plan import LayerView, layer_gates, layer_logits

from ..tools.data import model_folder
from ..tools.report import finish, is_quick, save
from ..tools.timing import processor, side_by_side, wall

GROUPINGS = ("coactivation", "magnitude", "random")
BATCH, LENGTH, RATE, GOAL = 16, 64, 1e-3, 0.05
RELU, STORIES = "GPT-2 with ReLU", "stories260K"
Texts = dict[str, torch.Tensor]  # calibration, training and held-out tokens, (N, length)


class Gated(nn.Module):
    """A residual SwiGLU feed-forward."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.gate = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Relu(Gated):
    """The same with one product and a ReLU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width, hidden)
        del self.gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


# -- networks and texts -----------------------------------------------------------------------------


def stories(quick: bool) -> tuple[nn.Module, Texts] | None:
    folder = model_folder("stories260K")
    if not folder.exists():
        return None
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    counts = {
        "calibration": 96,
        "training": 64 if quick else 2000,
        "held-out": 16 if quick else 128,
    }
    texts: Texts = {}
    for seed, (name, count) in enumerate(counts.items()):
        torch.manual_seed(seed)
        start = torch.full((count, 1), model.config.bos_token_id)
        texts[name] = model.generate(
            input_ids=start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0,
            max_new_tokens=LENGTH - 1, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return model, texts


def source_bytes(held_out: bool) -> torch.Tensor:
    """The bytes of every tenth file of Python's standard library, or of the others."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    chosen = [f for i, f in enumerate(files) if (i % 10 == 0) == held_out]
    return torch.tensor(list(b"".join(f.read_bytes() for f in chosen)), dtype=torch.int64)


def trained_here(quick: bool) -> tuple[nn.Module, Texts]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256, n_embd=128, n_layer=4, n_head=4, n_positions=LENGTH, activation_function="relu",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model: Any = GPT2LMHeadModel(config)
    learn(model, model.parameters(), windows(source_bytes(False), 128 if quick else 24000, 0), 2e-3)
    sizes = {"calibration": 96, "training": 64 if quick else 2000, "held-out": 16 if quick else 256}
    return model.eval(), {
        name: windows(source_bytes(name == "held-out"), count, seed)
        for seed, (name, count) in enumerate(sizes.items(), 1)
    }


def windows(tokens: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """(count, LENGTH) pieces from anywhere in a text."""
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - LENGTH, (count, 1), generator=draw)
    return tokens[starts + torch.arange(LENGTH)]


def learn(
    model: Any, parameters: Any, tokens: torch.Tensor, rate: float, balance: float = 0.0
) -> None:
    """One pass over these samples. balance: weight of the routers' load-balancing loss."""
    optimizer = torch.optim.AdamW(parameters, rate)
    batches = tokens.split(BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(batches))
    model.train()
    for ids in batches:
        if balance:
            out, plan = model.with_plan(input_ids=ids, labels=ids)
            (out.loss + balance * plan.load_balance_loss()).backward()
        else:
            model(input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


@torch.no_grad()
def perplexity(model: nn.Module, tokens: torch.Tensor) -> float:
    losses = [model(input_ids=ids, labels=ids).loss for ids in tokens.split(BATCH)]
    return math.exp(sum(map(float, losses)) / len(losses))


# -- measurements -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """Ways to carve a network: into how many experts, how many of them shared, how many running."""

    experts: int
    shared: int
    counts: tuple[int, ...]
    groupings: tuple[str, ...] = GROUPINGS
    bias: bool = True


def quality(model: nn.Module, texts: Texts, cut: Cut) -> list[dict[str, Any]]:
    """Held-out perplexity over the dense model's, by grouping and share, before and after training."""
    dense, cells = perplexity(model, texts["held-out"]), []
    calibration = [{"input_ids": ids} for ids in texts["calibration"].split(BATCH)]
    for grouping in cut.groupings:
        spec = CarvedExperts(
            cut.experts, cut.shared, 1.0, grouping, calibration, bias=cut.bias  # type: ignore[arg-type]
        )  # fmt: skip
        moe: Any = moe_rewrite.convert(model, "carve", experts=spec)
        for taken in cut.counts:
            if taken == cut.experts and grouping != GROUPINGS[0]:
                continue  # nothing is left out: the same for all
            moe.set_active(taken / cut.experts)
            before = perplexity(moe, texts["held-out"])
            again = copy.deepcopy(moe)
            torch.manual_seed(0)
            learn(again, again.trainable_parameters(), texts["training"], RATE)
            after = perplexity(again, texts["held-out"])
            cells.append({
                "experts": cut.experts, "shared": cut.shared, "active": taken / cut.experts,
                "bias": cut.bias, "grouping": grouping, "over_dense": before / dense - 1,
                "over_dense_trained": after / dense - 1,
            })  # fmt: skip
            print(json.dumps(cells[-1]), flush=True)
    return cells


CO = GROUPINGS[:1]
# stories260K has 172 hidden units a layer, the GPT-2 512; one chosen expert without a bias is what a
# standard checkpoint holds
CUTS = {
    RELU: (
        Cut(16, 2, (16, 14, 12, 8)), Cut(64, 8, (56, 48, 32), CO), Cut(16, 11, (12,), CO, bias=False),
    ),
    STORIES: (Cut(43, 4, (43, 38, 32, 22)), Cut(4, 1, (3,)), Cut(43, 31, (32,), CO, bias=False)),
}  # fmt: skip
QUICK = {RELU: (Cut(16, 2, (16, 12), CO),), STORIES: (Cut(4, 1, (3,), CO),)}


def of_model(
    model: nn.Module, given: dict[str, Any], experts: int, counts: Sequence[int]
) -> dict[str, Callable[[], Any]]:
    """A call of the dense model, and of the carved one by share."""
    spec = CarvedExperts(experts, 1, 1.0, "random", [given])
    moe: Any = moe_rewrite.convert(model, "carve", experts=spec, example_inputs=given)
    runs: dict[str, Callable[[], Any]] = {"dense": lambda: model(**given)}
    for taken in counts:
        share = copy.deepcopy(moe)
        share.set_active(taken / experts)
        runs[f"{taken / experts:.3f}"] = partial(share, **given)
    return runs


def of_feedforward(
    layer: nn.Module, x: torch.Tensor, experts: int, counts: Sequence[int]
) -> dict[str, Callable[[], Any]]:
    """The feed-forward inside a layer alone, dense and by share: its router, gates and experts."""
    moe: Any = moe_rewrite.convert(
        layer, "carve", experts=CarvedExperts(experts, 1, 1.0, "random", [x]), example_inputs=x
    )
    (site,) = moe.expert_sites()
    stacks = dict(zip(site.parts, site.stacked(range(experts)), strict=True))
    graph, _ = moe.graph_for(moe.normalized((x,), {})[0])
    steps = [bound.step for _, bound in graph.steps]
    found = ((s, n) for s in steps for n in s.code.module.graph.nodes)
    step, node = next((s, n) for s, n in found if isinstance(n.target, FeedForwardCall))
    names = dict(zip(step.code.module.graph.find_nodes(op="placeholder"), step.owned, strict=False))
    weights = dict(layer.named_parameters())
    dense = tuple(weights[names[n][1]] for n in node.args[2])
    own = tuple(None if n is None else stacks[names[n][1].rpartition(":")[2]] for n in node.args[3])

    def run(taken: int) -> torch.Tensor:
        view = LayerView(tuple(range(experts)), CarveRule(1, taken - 1))
        gates = layer_gates(view, layer_logits(view, x, stacks[site.router], -1))
        return node.target(x, gates, dense, own)

    runs: dict[str, Callable[[], Any]] = {"dense": lambda: node.target(x, None, dense, own)}
    return runs | {f"{taken / experts:.3f}": partial(run, taken) for taken in counts}


def timed(quick: bool, networks: dict[str, tuple[nn.Module, Texts]]) -> dict[str, Any]:
    """Processor and wall milliseconds, dense and by share, and ratios to dense, side by side."""
    rounds, rows = (3, 64) if quick else (30, 512)
    runs: dict[str, dict[str, Callable[[], Any]]] = {}
    for name, (model, texts) in networks.items():
        experts, counts = (4, (3, 2)) if name == STORIES else (8, (7, 6, 4))
        given = {"input_ids": texts["held-out"][: 2 if quick else 16]}
        runs[f"{name}, the model"] = of_model(model, given, experts, (experts, *counts))
    for name, layer, width, experts, counts in (
        ("64 x 172 gated (stories260K)", Gated(64, 172), 64, 4, (4, 3, 2)),
        ("128 x 512 ReLU (the GPT-2)", Relu(128, 512), 128, 8, (8, 7, 6, 4)),
        ("512 x 2048 ReLU", Relu(512, 2048), 512, 8, (8, 7, 6, 4)),
        ("1024 x 2816 gated", Gated(1024, 2816), 1024, 8, (8, 7, 6, 4)),
    ):
        for n in (rows, 1):
            x = torch.randn(1, n, width)
            runs[f"{name}, {n} rows"] = of_feedforward(layer.eval(), x, experts, counts)
    found: dict[str, Any] = {name: {} for name in runs}
    with torch.no_grad():
        for name, of in runs.items():
            for clock in (processor, wall):
                made = side_by_side(of, rounds, clock=clock)
                found[name][clock.__name__] = {
                    n: {"milliseconds": ms, "of_dense": made.ratio(n, "dense")}
                    for n, ms in made.medians().items()
                }
    return found


def goal(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Whether a quarter of the feed-forwards' multiply-adds is saved at 5% of perplexity."""
    lean = [c for c in cells if c["active"] <= 0.751 and c["grouping"] == "coactivation"]
    if not lean:
        return {}
    return {
        key: {"best": min(c[key] for c in lean), "met": min(c[key] for c in lean) <= GOAL}
        for key in ("over_dense", "over_dense_trained")
    }


def main() -> None:
    quick = is_quick(__doc__)
    torch.set_num_threads(1)
    networks = {RELU: trained_here(quick)}
    if (small := stories(quick)) is not None:
        networks[STORIES] = small
    else:
        print("stories260K is not there: set MOE_REWRITE_DATA to the shared data")
    figures: dict[str, Any] = {"samples": 64 if quick else 2000, "networks": {}}
    for name, (model, texts) in networks.items():
        cells = [c for cut in (QUICK if quick else CUTS)[name] for c in quality(model, texts, cut)]
        dense = perplexity(model, texts["held-out"])
        figures["networks"][name] = {"perplexity": dense, "cells": cells, "goal": goal(cells)}
    figures["times"] = timed(quick, networks)
    rows = [
        (name, c["experts"], c["shared"], f"{c['active']:.3f}", c["grouping"],
         f"{100 * c['over_dense']:+.1f}%", f"{100 * c['over_dense_trained']:+.1f}%")
        for name, of in figures["networks"].items() for c in of["cells"]
    ]  # fmt: skip
    rows += [
        (name, "", "", share, clock, f"{of['milliseconds']:.3f} ms", f"{of['of_dense']:.2f} of dense")
        for name, by in figures["times"].items() for clock, at in by.items() for share, of in at.items()
    ]  # fmt: skip
    if not quick:
        save("carving", figures)
    columns = [
        "network",
        "experts",
        "shared",
        "active",
        "grouping or clock",
        "untrained",
        "trained",
    ]
    finish("carving", columns, rows, **figures)


if __name__ == "__main__":
    main()

"""Random modules whose forward branches, loops and computes on sizes: every call is right, or refused.

One call a module, every other one in training, of half of the modules; `pytest -m sweep` takes the
others, makes five calls of each, and lets `convert` verify.
"""

import math
import random

import pytest
import torch
from sweeps import some
from torch import nn

import moe_rewrite
from moe_rewrite import MoeRewriteError, TokenRouter

WIDTH, A_RUN, SEEDS = 6, 10, 500


def statement(draw, rank):
    """A function of a value and what computes with one of its sizes."""
    dim = draw.choice((0, 1) if rank == 3 else (0, 2, 3))
    limit, modulus, factor = draw.randint(1, 12), draw.randint(2, 5), draw.uniform(0.5, 2)
    rest = draw.randrange(modulus)
    kinds = {
        "longer": lambda x: x * factor if x.shape[dim] > limit else x,
        "shorter": lambda x: x - factor if x.shape[dim] <= limit else x + factor,
        "modulus": lambda x: x + factor if x.shape[dim] % modulus == rest else x,
        "equal": lambda x: x * 2 if x.shape[dim] == limit else x,
        "both": lambda x: x * 3 if x.shape[0] > 2 and x.shape[dim] < limit else x,
        "other size": lambda x: -x if x.shape[0] == x.shape[dim] else x,
        "root": lambda x: x * math.sqrt(x.shape[dim]),
        "whole root": lambda x: x + math.isqrt(x.shape[dim]),
        "share": lambda x: x / x.shape[dim],
        "half": lambda x: x + int(x.shape[dim] * 0.5),
        "quotient": lambda x: x + x.shape[dim] // modulus,
        "loop": lambda x: looped(x, dim),
        "table": lambda x: x + torch.arange(x.shape[dim]).sum(),
        "cut": lambda x: x * x.narrow(dim, 0, min(limit, x.shape[dim])).mean(),
        "product": lambda x: x * 1.5 if x.shape[0] * x.shape[dim] > 2 * limit else x,
    }
    return kinds[draw.choice(sorted(kinds))]


def looped(x, dim):
    total = torch.zeros_like(x)
    for i in range(x.shape[dim]):
        total = total * 0.5 + x.select(dim, i).mean()
    return x + total


class Net(nn.Module):
    """Three layers, and statements before and after any of them."""

    def __init__(self, draw, rank):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(WIDTH, WIDTH) if rank == 3 else nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
            for _ in range(3)
        )
        self.head = nn.Linear(WIDTH, 3)
        count = draw.randint(1, 3)
        self.work = [(draw.randrange(3), statement(draw, rank)) for _ in range(count)]

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            for at, work in self.work:
                x = work(x) if at == i else x
            x = x + torch.tanh(layer(x))
        return self.head(x if x.ndim == 3 else x.mean((2, 3)))


def shape(draw, rank):
    sizes = [draw.choice((1, 2, 3, 4, 5, 7, 8, 9, 12, 13)) for _ in range(3)]
    return (sizes[0], sizes[1], WIDTH) if rank == 3 else (sizes[0], WIDTH, sizes[1], sizes[2])


def outcome(seed, calls):
    """ "right", "refused" or what was wrong at one of so many calls."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    rank = draw.choice((3, 3, 4))
    model = Net(draw, rank).eval()
    granularity = draw.choice(("prefix", "token") if rank == 3 else ("sequence",))
    example = torch.randn(shape(draw, rank))
    try:
        moe = moe_rewrite.convert(
            model, split=draw.randint(1, 2), router=TokenRouter(granularity=granularity),
            example_inputs=example, verify=calls > 1,
        )  # fmt: skip
    except MoeRewriteError as error:
        return f"refused: {error}"
    refused = ""
    for call in range(calls):
        x = torch.randn(shape(draw, rank))
        try:
            with moe.dense_plan():
                ours = moe.train((seed + call) % 2 == 1)(x)
        except MoeRewriteError as error:
            refused = f"refused: {error}"
            continue
        if not torch.allclose(ours, model(x), rtol=1e-4, atol=1e-5):
            return f"wrong at {tuple(x.shape)} by {(ours - model(x)).abs().max():.1e}"
    return refused or "right"


@pytest.mark.parametrize("calls", some([1, 5], {1}))
@pytest.mark.parametrize("start", some(range(0, SEEDS, A_RUN), range(0, SEEDS, 2 * A_RUN)))
def test_calls_of_any_size_are_right_or_refused(start, calls):
    outcomes = {seed: outcome(seed, calls) for seed in range(start, start + A_RUN)}
    wrong = {s: o for s, o in outcomes.items() if o.startswith("wrong")}
    assert not wrong
    assert sum(o == "right" for o in outcomes.values()) >= A_RUN // 2, outcomes

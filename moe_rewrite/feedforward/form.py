"""Which fused form a feed-forward region has, judged by what it computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.ffn.reference import ACTIVATIONS
from ..program import Code

ROWS = 4  # of numbers that the work between the products is tried on
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Form:
    """down(act(up x)), or down(act(gate x) * up x).

    gate, up: which product of x, and of one that holds both which half: (product, half or None).
    """

    activation: str
    up: tuple[int, int | None]
    gate: tuple[int, int | None] | None = None


def find_form(middle: Code, widths: Sequence[int]) -> Form | None:
    """The form of a code of products of these widths, or None where no fused one computes the same.

    The code is run on numbers and compared with every candidate: names and operations do not
    matter, so that a hand-written GELU is one.
    """
    drawn = torch.Generator().manual_seed(0)
    given = [3 * torch.randn(ROWS, width, generator=drawn) for width in widths]
    try:
        with torch.no_grad(), torch.random.fork_rng([]):
            made = middle.call(*given)
            again = middle.call(*given)
    except (RuntimeError, TypeError):  # it takes further weights, or is of another device
        return None
    if not torch.equal(made, again):  # a dropout that is on
        return None
    for form, computed in _candidates(given):
        if made.shape != computed.shape or made.dtype != computed.dtype:
            continue
        if float((made - computed).abs().max()) <= TOLERANCE * float(computed.abs().max()):
            return form
    return None


def _candidates(given: list[torch.Tensor]) -> Iterator[tuple[Form, torch.Tensor]]:
    """Each form with what it makes of these products."""
    halves: list[Any] = []
    if len(given) == 1:
        a, b = given[0].chunk(2, dim=-1)
        halves = [((0, 0), a, (0, 1), b), ((0, 1), b, (0, 0), a)]
    elif len(given) == 2:
        halves = [((0, None), given[0], (1, None), given[1])]
        halves.append((*halves[0][2:], *halves[0][:2]))
    for name, act in ACTIVATIONS.items():
        if len(given) == 1:
            yield Form(name, (0, None)), act(given[0])
        for gate, x, up, y in halves:
            yield Form(name, up, gate), act(x) * y

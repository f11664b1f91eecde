"""The arguments of the feed-forward ops: weights as lists by kind, and checks of shapes and dtypes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..plan.op import Plan
from .reference import ACTIVATIONS, Stack


def weight_lists(*given: Stack | None) -> list[list[torch.Tensor]]:
    """A list for each kind: with one stack, with one tensor an expert, or empty."""
    return [[] if w is None else [w] if isinstance(w, torch.Tensor) else list(w) for w in given]


KINDS = ("up", "down", "gate", "up_bias", "gate_bias", "down_bias")


def stacked(kind: str, weights: Sequence[torch.Tensor]) -> bool:
    return len(weights) == 1 and weights[0].ndim == (2 if kind.endswith("bias") else 3)


def expert_count(up: list[torch.Tensor]) -> int:
    return len(up[0]) if stacked("up", up) else len(up)


def check(
    x: torch.Tensor,
    gates: torch.Tensor,
    experts: torch.Tensor | None,
    lists: list[list[torch.Tensor]],
    activation: str,
    joined: bool = False,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation = {activation!r}: expected one of {', '.join(ACTIVATIONS)}")
    if not x.is_floating_point() or not gates.is_floating_point():
        raise ValueError(f"x is {x.dtype} and gates {gates.dtype}: expected floating-point dtypes")
    if gates.shape[:-1] != x.shape[:-1] or (experts is not None and experts.shape != gates.shape):
        got = None if experts is None else tuple(experts.shape)
        raise ValueError(
            f"x {tuple(x.shape)}, gates {tuple(gates.shape)}, experts {got}: expected gates and "
            "experts of one shape, with the leading dimensions of x"
        )
    if not lists[0] or lists[4] and not lists[2]:
        raise ValueError("expected at least one expert, and no gate bias without a gate")
    if joined and (lists[2] or not stacked("up", lists[0]) or lists[0][0].shape[1] % 2):
        raise ValueError(f"joined: expected up as one stack (E, 2H, D), got {lists[0][0].shape}")
    count, width, rows = expert_count(lists[0]), x.shape[-1], lists[0][0].shape[-2]
    hidden = rows // 2 if joined else rows
    matrix, turned, row, column = (rows, width), (width, hidden), (rows,), (width,)
    sizes = matrix, turned, matrix, row, row, column
    for kind, weights, size in zip(KINDS, lists, sizes, strict=True):
        if not weights:
            continue
        shape, many = size, len(weights)
        if stacked(kind, weights):
            shape, many = (count, *size), count
        if many != count:
            raise ValueError(f"{kind} of {many} experts: expected {count}, as many as up has")
        for w in weights:
            if w.shape != shape or w.dtype != x.dtype or w.device != x.device:
                raise ValueError(
                    f"{kind} is {tuple(w.shape)} {w.dtype} on {w.device}: expected {shape} "
                    f"{x.dtype} on {x.device}, for x {tuple(x.shape)} and up's first "
                    f"{tuple(lists[0][0].shape)}"
                )


def check_plan(plan: Plan, experts: torch.Tensor, count: int) -> None:
    pairs = experts.numel()
    sizes = [len(t) for t in plan]
    if sizes != [pairs, count + 1, pairs]:
        raise ValueError(
            f"plan of sizes {sizes}: expected {[pairs, count + 1, pairs]}, the plan of these "
            f"experts {tuple(experts.shape)} among {count}"
        )

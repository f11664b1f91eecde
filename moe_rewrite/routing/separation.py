"""How well a router in closed form tells tasks apart by the features at a cut, on samples that it
was not solved on.

Shapes: N samples of a task, P rows of a sample, M random features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .class_sums import with_one

FOLDS = 4  # each is held out once; with a quarter, the solution is close to that from all samples


@torch.no_grad()
def separation(rows: Sequence[torch.Tensor], ridge: float) -> tuple[float, float]:
    """(accuracy, its standard error) over held-out samples, the mean over tasks; samples count alike.

    rows: for each task (N, P, M) fp32, what `AnalyticGate.sampled` reads; N >= 2 for all of them.
    ridge: as of `TokenRouter`.
    """
    right = [of.new_zeros(len(of), dtype=torch.float64) for of in rows]
    for fold in range(FOLDS):
        held = [torch.arange(len(of), device=of.device) % FOLDS == fold for of in rows]
        solved = _solved([of[~out] for of, out in zip(rows, held, strict=True)], ridge)
        for task, (of, out) in enumerate(zip(rows, held, strict=True)):
            said = (with_one(of[out]).double() @ solved).argmax(-1)
            right[task][out] = (said == task).double().mean(-1)
    accuracy = torch.stack([of.mean() for of in right]).mean()
    error = torch.stack([of.var() / len(of) for of in right]).sum().sqrt() / len(right)
    return float(accuracy), float(error)


def _solved(rows: Sequence[torch.Tensor], ridge: float) -> torch.Tensor:
    """(M + 1, tasks) float64, as `AnalyticGate.solve` solves its rows: all tasks have the same weight.
    With fewer rows than features the system of the rows is solved, which is the smaller: A'(AA' + r)^-1
    is (A'A + r)^-1 A'."""
    counts = [of.shape[0] * of.shape[1] for of in rows]
    flat = [with_one(of.flatten(0, 1)).double() for of in rows]
    weighted = torch.cat([f / n**0.5 for f, n in zip(flat, counts, strict=True)])
    wanted = torch.block_diag(
        *[f.new_full((n, 1), n**-0.5) for f, n in zip(flat, counts, strict=True)]
    )
    added = ridge * weighted.square().sum() / weighted.shape[1]
    if len(weighted) < weighted.shape[1]:
        return weighted.T @ torch.linalg.solve(_plus(weighted @ weighted.T, added), wanted)
    return torch.linalg.solve(_plus(weighted.T @ weighted, added), weighted.T @ wanted)


def _plus(matrix: torch.Tensor, diagonal: torch.Tensor) -> torch.Tensor:
    matrix.diagonal().add_(diagonal)
    return matrix

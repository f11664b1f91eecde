"""Compare two models' outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .program import Numerics

# error of sums in another order, relative to the largest value; a wrong graph errs by far more
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 5e-2}
PIECE = 4096  # values of an output that are compared at once


@dataclass(frozen=True)
class EquivalenceReport:
    """How a converted model's outputs compare with the dense model's.

    equal: whether they are within the tolerance of the passes' numerics at every position that
        the mask keeps.
    exact: whether they are identical, bit for bit.
    max_error, rms_error: over all outputs, relative to max(1, the dense output's largest value).
    shapes: shapes of the inputs compared, as text.
    """

    equal: bool
    exact: bool
    max_error: float
    rms_error: float
    shapes: tuple[str, ...] = ()

    def __str__(self) -> str:
        word = "exactly equal" if self.exact else "equal" if self.equal else "DIFFERENT"
        error = f"max error {self.max_error:.2e}, rms {self.rms_error:.2e}"
        return f"{word} ({error}) on {', '.join(self.shapes) or 'one call'}"


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and restore every module's own mode afterwards."""
    flags = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def tolerance(
    dtype: torch.dtype, numerics: Iterable[tuple[str, Numerics]],
    computed: Iterable[torch.dtype] = (),
) -> float:  # fmt: skip
    """The relative error that these passes may cause: 0 if none is reordered. Approximate passes
    are left out, since comparisons run without what they insert.

    dtype: of the output. computed: dtypes that the model computes in; an output is as exact as
        the least exact of them, whatever it is cast to in the end.
    """
    reordered = any(declared == "reordered" for _, declared in numerics)
    if not reordered or dtype not in TOLERANCE:
        return 0.0
    return max(TOLERANCE[d] for d in (dtype, *computed) if d in TOLERANCE)


def compare(
    dense: list[Any],
    ours: list[Any],
    mask: Any = None,
    numerics: Iterable[tuple[str, Numerics]] = (("any pass", "reordered"),),
    computed: Iterable[torch.dtype] = (),
) -> EquivalenceReport:
    """Compare flattened outputs; caches and other objects that are not tensors are ignored.

    mask: (B, S), nonzero for positions to compare; None compares all.
    numerics: (name, declared numerics) of every pass between the two models.
    computed: see `tolerance`.
    """
    theirs = [t for t in dense if isinstance(t, torch.Tensor)]
    mine = [t for t in ours if isinstance(t, torch.Tensor)]
    equal = exact = len(theirs) == len(mine)
    worst = total = 0.0
    count = 0
    for a, b in zip(theirs, mine, strict=False):
        if a.shape != b.shape or a.dtype != b.dtype:
            return EquivalenceReport(False, False, float("inf"), float("inf"))
        a, b = _counted(a, mask), _counted(b, mask)
        exact = exact and torch.equal(a, b)
        if a.numel() == 0:
            continue
        allowed = tolerance(a.dtype.to_real(), numerics, computed)  # each output has its own
        a, b = (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in (a, b))
        scale = max(1.0, *map(_largest, _pieces(a)))
        for x, y in zip(_pieces(a), _pieces(b), strict=True):
            error = _error(x, y, scale)
            largest = float(error.max())
            equal = equal and largest <= allowed
            worst, total = max(worst, largest), total + float(error.square_().sum())
        count += a.numel()
    return EquivalenceReport(equal, exact, worst, (total / max(count, 1)) ** 0.5)


def _pieces(output: torch.Tensor) -> Iterator[torch.Tensor]:
    """Pieces of an output in float64, since outputs may be large."""
    return (piece.double() for piece in output.reshape(-1).split(PIECE))


def _largest(x: torch.Tensor) -> float:
    """The largest magnitude among finite values."""
    return float(x.masked_fill(~x.isfinite(), 0.0).abs().max())


def _error(x: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
    """Error relative to `scale`; infinite where only one of the two is NaN or infinite."""
    same = (x == y) | (x.isnan() & y.isnan())
    error = (x - y).abs_().div_(scale).masked_fill_(same, 0.0)
    return error.nan_to_num_(nan=float("inf"), posinf=float("inf"))


def _counted(output: torch.Tensor, mask: Any) -> torch.Tensor:
    """The positions of an output that the mask keeps."""
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and output.ndim >= 2:
        length = output.shape[1]
        if output.shape[0] == mask.shape[0] and length <= mask.shape[1] and output.ndim == 3:
            return output[mask[:, mask.shape[1] - length :] != 0]
    return output

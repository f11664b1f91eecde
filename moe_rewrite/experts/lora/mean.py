"""The low-rank map that is nearest to a weighted mean of low-rank maps.

Shapes: n maps, r rank of each, O outputs, I inputs (times the positions of a kernel).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def nearest_to_mean(
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]], weights: Sequence[float], rank: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(A (..., rank, I), B (..., O, rank), error): ``B A`` is the best approximation of
    ``M = sum_i w_i B_i A_i`` of this rank in the Frobenius norm, by the singular value decomposition
    (Eckart and Young, 1936), and the error ``|M - B A| / |M|``, over all leading dimensions.

    factors: (A_i (..., r, I), B_i (..., O, r)). The decomposition is of n r x n r matrices, in float64.
    """
    down = torch.cat([a.double() for a, _ in factors], -2)
    up = torch.cat([w * b.double() for (_, b), w in zip(factors, weights, strict=True)], -1)
    (q_up, r_up), (q_down, r_down) = torch.linalg.qr(up), torch.linalg.qr(down.mT)
    left, values, right = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    root = values[..., :rank].sqrt()
    a = root.unsqueeze(-1) * (right[..., :rank, :] @ q_down.mT)
    b = (q_up @ left[..., :rank]) * root.unsqueeze(-2)
    squares = values.square()
    error = (squares[..., rank:].sum() / squares.sum().clamp_min(1e-300)).sqrt()
    kept = factors[0]
    return a.to(kept[0].dtype), b.to(kept[1].dtype), float(error)

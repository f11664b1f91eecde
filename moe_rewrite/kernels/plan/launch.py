"""Launches of the routing kernels; block sizes depend only on the number of experts."""

from __future__ import annotations

import torch

from ..triton import ceil_div, power_of_two
from . import kernel

SCAN = 1024  # counts that a scan takes at once


def rows_of(experts: int) -> int:
    """Rows, or pairs, of a block: about 4096 elements, at least 4 rows."""
    return max(4, min(128, 4096 // power_of_two(experts, 2)))


def route(logits: torch.Tensor, k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    rows, experts = logits.shape
    gates = logits.new_empty(rows, k, dtype=torch.float32)
    chosen = logits.new_empty(rows, k, dtype=torch.int64)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    block = rows_of(experts)
    if rows:
        kernel.route_kernel[(ceil_div(rows, block),)](
            logits, gates, chosen, rows, experts, k, logits.stride(0), NORMALIZE=normalize,
            ROWS=block, E2=power_of_two(experts, 2), K2=power_of_two(k, 2),
        )  # fmt: skip
    return gates, chosen


def route_backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    gates: torch.Tensor,
    experts: torch.Tensor,
    normalize: bool,
) -> torch.Tensor:
    rows, count = logits.shape
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    block = rows_of(count)
    if rows:
        kernel.route_backward_kernel[(ceil_div(rows, block),)](
            grad.contiguous(), logits, gates, experts, out, rows, count, gates.shape[1],
            logits.stride(0), NORMALIZE=normalize, ROWS=block, E2=power_of_two(count, 2),
            K2=power_of_two(gates.shape[1], 2),
        )  # fmt: skip
    return out


def sort_plan(
    experts: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(order, offsets, inverse); three launches, sizes known on the host."""
    experts = experts.contiguous()
    pairs, block = len(experts), rows_of(num_experts)
    order, inverse = torch.empty_like(experts), torch.empty_like(experts)
    if not pairs:
        return order, experts.new_zeros(num_experts + 1), inverse
    offsets = experts.new_empty(num_experts + 1)
    blocks, wide = ceil_div(pairs, block), power_of_two(num_experts, 2)
    counts = experts.new_empty(num_experts + 1, blocks, dtype=torch.int32)
    totals = experts.new_empty(num_experts + 1, dtype=torch.int32)
    kernel.count_kernel[(blocks,)](
        experts, counts, pairs, num_experts, blocks, PAIRS=block, E2=wide
    )
    kernel.scan_kernel[(num_experts + 1,)](counts, totals, blocks, BLOCKS=SCAN)
    kernel.place_kernel[(blocks,)](
        experts, counts, totals, order, offsets, inverse, pairs, num_experts, blocks,
        PAIRS=block, E2=wide,
    )  # fmt: skip
    return order, offsets, inverse

"""Launches of the feed-forward kernels: shapes, grids, tile sizes.

T rows, K experts a row, S = T * K pairs, E experts, D width, H hidden width. Every size on the host
follows from shapes, so nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .. import tile_sizes
from ..tile_sizes import TileSizes, aligned
from ..triton import ceil_div, power_of_two, precision
from . import kernel
from .cpu_plan import Gradients

ROWS = 2  # rows a program, in combine_kernel and spread_kernel
GROUP = 8  # tiles that go through a weight's columns together
TILES = 64  # tiles a program, in tiles_kernel


class Tiles(NamedTuple):
    """The plan with each tile's expert and first pair, for tiles of m pairs."""

    order: torch.Tensor
    offsets: torch.Tensor
    expert: torch.Tensor
    start: torch.Tensor

    @classmethod
    def of(cls, order: torch.Tensor, offsets: torch.Tensor, m: int) -> Tiles:
        experts = len(offsets) - 1
        bound = ceil_div(len(order), m) + experts
        expert = offsets.new_empty(bound, dtype=torch.int32)
        start = offsets.new_empty(bound)
        kernel.tiles_kernel[(ceil_div(bound, TILES),)](
            offsets, expert, start, experts, bound, M=m, TILES=TILES, E2=power_of_two(experts, 2)
        )
        return cls(order, offsets, expert, start)

    def given(self) -> tuple[torch.Tensor, ...]:
        return self.offsets, self.expert, self.start


def stack(weights: Sequence[torch.Tensor], dims: int) -> torch.Tensor | None:
    """The experts' weights as one tensor (E, ...): as given if it is one, as a view of equally
    spaced tensors in one storage, or as a copy."""
    if not weights:
        return None
    first = weights[0]
    if first.ndim == dims:
        return first
    step = weights[1].data_ptr() - first.data_ptr() if len(weights) > 1 else 0
    fits_padding = all(
        w.data_ptr() - first.data_ptr() == e * step and w.stride() == first.stride()
        and w.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for e, w in enumerate(weights)
    )  # fmt: skip
    if fits_padding and step >= 0 and step % first.element_size() == 0:
        size, strides = (
            (len(weights), *first.shape),
            (step // first.element_size(), *first.stride()),
        )
        return first.as_strided(size, strides)
    return torch.stack(list(weights))


def by_kind(lists: Sequence[Sequence[torch.Tensor]]) -> tuple[torch.Tensor | None, ...]:
    """up, down, gate (E, ...) and the biases (contiguous), each None if experts have none."""
    stacks = [stack(w, 3) for w in lists[:3]]
    biases = [stack(w, 2) for w in lists[3:]]
    return (*stacks, *(b if b is None else b.contiguous() for b in biases))


def forward(
    x: torch.Tensor,
    gates: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    inverse: torch.Tensor,
    lists: Sequence[Sequence[torch.Tensor]],
    activation: str,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `cpu.forward`."""
    up, down, gate, up_bias, gate_bias, down_bias = by_kind(lists)
    assert up is not None and down is not None
    x, gates, S = _rows(x), gates.contiguous(), len(order)
    hidden_width = up.shape[1]
    pre = x.new_empty(1 if gate is None else 2, S if save else 0, hidden_width)
    hidden = x.new_empty(S, hidden_width)
    wide, biased = aligned(*up.shape[1:], x.stride(0)), up_bias is not None or gate_bias is not None
    size = tile_sizes.activated(x, S / len(up), wide, gate is not None, biased)
    tiles = Tiles.of(order, offsets, size.m)
    gating = up if gate is None else gate
    kernel.up_kernel[_grid(tiles, hidden_width, size)](
        x, order, *tiles.given(), up, gating, _or(up_bias, x), _or(gate_bias, x), pre, hidden,
        S, gates.shape[1], x.shape[1], hidden_width, len(tiles.expert), x.stride(0),
        *up.stride(), *gating.stride(),
        ACT=activation, GATED=gate is not None, BIAS=up_bias is not None,
        GATE_BIAS=gate_bias is not None, SAVE=save, **_options(size, x.shape[1], x.dtype),
    )  # fmt: skip
    y = _rows_product(tiles, size, hidden, down, bias=down_bias)
    return combine(y, inverse, gates, offsets, weighed=True), pre


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    gates: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    inverse: torch.Tensor,
    pre: torch.Tensor,
    lists: Sequence[Sequence[torch.Tensor]],
    activation: str,
    need_x: bool,
    need_gates: bool,
    into: Gradients,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """As `cpu.backward`."""
    up, down, gate, _, _, down_bias = by_kind(lists)
    assert up is not None and down is not None
    dy, x, gates, S, H = _rows(dy), _rows(x), gates.contiguous(), len(order), up.shape[1]
    size = tile_sizes.product(x, S / len(up), aligned(x.shape[1], H, dy.stride(0)))
    tiles = Tiles.of(order, offsets, size.m)
    hidden = _rows_product(tiles, size, dy, down.transpose(1, 2), gather=gates.shape[1])
    dpre, shares = torch.empty_like(pre), x.new_empty(S, dtype=torch.float32)
    m, n = 8, min(power_of_two(H), 256)
    kernel.hidden_backward_kernel[(ceil_div(S, m),)](
        hidden, gates, order, offsets, pre, dpre, shares, S, len(up), H,
        ACT=activation, GATED=gate is not None, M=m, N=n,
    )  # fmt: skip
    groups = order, offsets, gates
    if len(into.down):
        _weight_gradient(into.down, spread(dy, inverse, gates.shape[1]), hidden, offsets)
    del hidden
    _bias_gradient(into.down_bias, dy, groups, gather=True)
    given = spread(x, inverse, gates.shape[1]) if len(into.up) or len(into.gate) else x
    for weight, bias, part in zip((into.up, into.gate), (into.up_bias, into.gate_bias), dpre):  # noqa: B905
        _weight_gradient(weight, part, given, offsets)
        _bias_gradient(bias, part, groups, gather=False)
    del given
    dgates = None
    if need_gates:
        dgates = _gates_gradient(shares, dy, down_bias, groups, inverse)
    if not need_x:
        return None, dgates
    second = None if gate is None else (dpre[1], gate.transpose(1, 2))
    dx = _rows_product(tiles, size, dpre[0], up.transpose(1, 2), second)
    return combine(dx, inverse, gates, offsets, weighed=False), dgates


def combine(
    y: torch.Tensor, inverse: torch.Tensor, gates: torch.Tensor, offsets: torch.Tensor,
    weighed: bool,
) -> torch.Tensor:  # fmt: skip
    rows, k = gates.shape
    out = y.new_empty(rows, y.shape[1])
    kernel.combine_kernel[_pieces(out)](
        y, inverse, gates, offsets, out, rows, k, y.shape[1], len(offsets) - 1,
        WEIGHED=weighed, M=ROWS, N=_columns(out),
    )  # fmt: skip
    return out


def spread(x: torch.Tensor, inverse: torch.Tensor, k: int) -> torch.Tensor:
    """(S, D): the rows (T, D) of the pairs in the plan's order."""
    out = x.new_empty(len(inverse), x.shape[1])
    kernel.spread_kernel[_pieces(x)](
        x, inverse, out, len(x), k, x.shape[1], x.stride(0), M=ROWS, N=_columns(x)
    )
    return out


def _columns(rows: torch.Tensor) -> int:
    return min(power_of_two(rows.shape[1]), 1024)


def _pieces(rows: torch.Tensor) -> tuple[int, int]:
    """The grid of kernels that move ROWS rows by _columns."""
    return ceil_div(len(rows), ROWS), ceil_div(rows.shape[1], _columns(rows))


def _rows_product(
    tiles: Tiles,
    size: TileSizes,
    a: torch.Tensor,
    w_ENC: torch.Tensor,
    second: tuple[torch.Tensor, torch.Tensor] | None = None,
    bias: torch.Tensor | None = None,
    gather: int = 0,
) -> torch.Tensor:
    """(S, N): a (S, C) times the experts' weights, plus the same for `second`, plus the bias.

    gather: 0, or K if a is (T, C) and the pairs' rows are to be gathered from it.
    """
    a2, w2 = second or (a, w_ENC)
    width, depth = w_ENC.shape[1:]
    size = tile_sizes.product(a, size.m, aligned(width, depth, a.stride(0)))
    out = a.new_empty(len(tiles.order), width)
    kernel.rows_kernel[_grid(tiles, width, size)](
        a, a2, tiles.order, *tiles.given(), w_ENC, w2, _or(bias, a), out, gather, width, depth,
        len(tiles.expert), a.stride(0), *w_ENC.stride(), *w2.stride(), GATHER=gather > 0,
        TWO=second is not None, BIAS=bias is not None, **_options(size, depth, a.dtype),
    )  # fmt: skip
    return out


Groups = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # order, offsets, gates


def _weight_gradient(
    into: Any, left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor
) -> None:
    """left^T right of each expert into the stack or list of requested gradients."""
    if not len(into):
        return
    shape = len(offsets) - 1, left.shape[1], right.shape[1]
    size = tile_sizes.gradient(left, aligned(*shape[1:]))
    out = into if isinstance(into, torch.Tensor) else left.new_empty(shape)
    grid = ceil_div(shape[1], size.m) * ceil_div(shape[2], size.n), shape[0]
    kernel.weights_kernel[grid](
        left,
        right,
        offsets,
        out,
        *shape[1:],
        PRECISION=precision(left.dtype),
        M=size.m,
        N=size.n,
        BLOCK=size.depth,
        num_warps=size.warps,
        num_stages=size.stages,
    )
    _hand_out(into, out)


def _bias_gradient(into: Any, values: torch.Tensor, groups: Groups, gather: bool) -> None:
    if not len(into):
        return
    order, offsets, gates = groups
    experts, width = len(offsets) - 1, values.shape[1]
    out = into if isinstance(into, torch.Tensor) else values.new_empty(experts, width)
    kernel.bias_kernel[(ceil_div(width, 64), experts)](
        values, gates, order, offsets, out, gates.shape[1], width, values.stride(0),
        GATHER=gather, N=64, BLOCK=32,
    )  # fmt: skip
    _hand_out(into, out)


def _hand_out(into: Any, made: torch.Tensor) -> None:
    if into is not made:
        for mine, own in zip(into, made, strict=True):
            if mine is not None:
                mine.copy_(own)


def _gates_gradient(
    shares: torch.Tensor,
    dy: torch.Tensor,
    down_bias: torch.Tensor | None,
    groups: Groups,
    inverse: torch.Tensor,
) -> torch.Tensor:
    """dgates (T, K) = <dy, FFN_e(x)>, zero for dropped pairs."""
    _, offsets, gates = groups
    made = shares.index_select(0, inverse).view_as(gates)
    if down_bias is not None:
        biased = dy.float() @ down_bias.float().t()  # (T, E)
        expert = torch.searchsorted(offsets[1:], inverse, right=True).view_as(gates)
        own = biased.gather(1, expert.clamp_max(biased.shape[1] - 1))
        made = made + own.where(expert < biased.shape[1], 0.0)
    return made.to(gates.dtype)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _or(given: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """`given`, or another tensor as a pointer that the kernel does not read."""
    return other if given is None else given


def _grid(tiles: Tiles, columns: int, size: TileSizes) -> tuple[int]:
    return (len(tiles.expert) * ceil_div(columns, size.n),)


def _options(size: TileSizes, depth: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "EVEN": depth % size.depth == 0, "PRECISION": precision(dtype), "M": size.m, "N": size.n,
        "BLOCK": size.depth, "GROUP": GROUP, "num_warps": size.warps, "num_stages": size.stages,
    }  # fmt: skip

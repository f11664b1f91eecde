"""Gather patches from a map and scatter them back, in Triton.

B batch, C channels, E experts, L patches an expert takes of each sample, P positions of a patch,
n patches of the grid, Q positions of the map. Patches are stored as (E, B * L, C, P); a slot is one
of the E * B * L. The scatter is a gather too: each position of the map reads the patches that cover
it, in the order of the slots, so no atomic addition is needed.
"""

import triton
import triton.language as tl


@triton.jit
def _slot(slot, B, L):
    """(sample, index into the picks (B, E, L)) of a slot."""
    expert, rest = slot // (B * L), slot % (B * L)
    return rest // L, expert, rest % L


@triton.jit
def gather_kernel(
    x, picks, positions, gates, out, B, C, E, L, P, Q,
    GATED: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    p = tl.program_id(2) * PLACES + tl.arange(0, PLACES)
    sample, expert, i = _slot(slot, B, L)
    pick = (sample * E + expert) * L + i
    at = tl.load(positions + tl.load(picks + pick) * P + p, p < P, 0)
    mask = (c < C)[:, None] & (p < P)[None, :]
    own = tl.load(x + (sample * C + c)[:, None] * Q + at[None, :], mask, 0.0)
    if GATED:
        own = own.to(tl.float32) * tl.load(gates + pick).to(tl.float32)
    place = (slot * C + c)[:, None] * P + p[None, :]
    tl.store(out + place, own.to(out.dtype.element_ty), mask)


@triton.jit
def scatter_kernel(
    patches, gates, order, ends, out, B, C, E, L, P, Q,
    GATED: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """order (B, E * L * P): a sample's patch positions sorted by position in the map, then by slot.
    ends (B, Q + 1): where those of each position of the map begin."""
    sample = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    q = tl.program_id(2) * PLACES + tl.arange(0, PLACES)
    first = tl.load(ends + sample * (Q + 1) + q, q < Q, 0)
    many = tl.load(ends + sample * (Q + 1) + q + 1, q < Q, 0) - first
    acc = tl.zeros((CHANNELS, PLACES), tl.float32)
    for j in range(tl.max(many, 0)):
        here = j < many
        entry = tl.load(order + sample * E * L * P + first + j, here, 0)
        pick, p = entry // P, entry % P
        slot = (pick // L * B + sample) * L + pick % L
        place = (slot * C * P + p)[None, :] + c[:, None] * P
        mask = (c < C)[:, None] & here[None, :]
        own = tl.load(patches + place, mask, 0.0).to(tl.float32)
        if GATED:
            gate = tl.load(gates + sample * E * L + pick, here, 0.0).to(tl.float32)
            own *= gate[None, :]
        acc += own
    mask = (c < C)[:, None] & (q < Q)[None, :]
    tl.store(out + (sample * C + c)[:, None] * Q + q[None, :], acc.to(out.dtype.element_ty), mask)


@triton.jit
def gates_kernel(
    grad, patches, picks, positions, out, B, C, E, L, P, Q,
    CHANNELS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """out (B, E, L): the inner product of each patch with the map's gradient at its positions."""
    slot = tl.program_id(0).to(tl.int64)
    sample, expert, i = _slot(slot, B, L)
    pick = (sample * E + expert) * L + i
    row = positions + tl.load(picks + pick) * P
    acc = tl.zeros((CHANNELS, PLACES), tl.float32)
    for start in range(0, P, PLACES):
        p = start + tl.arange(0, PLACES)
        at = tl.load(row + p, p < P, 0)
        for first in range(0, C, CHANNELS):
            c = first + tl.arange(0, CHANNELS)
            mask = (c < C)[:, None] & (p < P)[None, :]
            seen = tl.load(grad + (sample * C + c)[:, None] * Q + at[None, :], mask, 0.0)
            own = tl.load(patches + (slot * C + c)[:, None] * P + p[None, :], mask, 0.0)
            acc += seen.to(tl.float32) * own.to(tl.float32)
    tl.store(out + pick, tl.sum(tl.sum(acc, 1), 0))

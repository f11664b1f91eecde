"""Routes and counting sort in Triton: one program a block of rows, or of (row, choice) pairs.

T rows, E experts, K experts a row, N = T * K pairs, B blocks of pairs. E2 and K2 are the smallest
powers of two that are at least E and K.
"""

import triton
import triton.language as tl


@triton.jit
def _rising(x):
    """fp32 -> int64 keys of the same order; -0.0 equals 0.0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def route_kernel(
    logits, gates, experts, T, E, K, stride,
    NORMALIZE: tl.constexpr, ROWS: tl.constexpr, E2: tl.constexpr, K2: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    of, to = tl.arange(0, E2), tl.arange(0, K2)
    here = (rows < T)[:, None]
    x = tl.load(
        logits + rows[:, None] * stride + of[None, :], here & (of < E)[None, :], float("-inf")
    ).to(tl.float32)
    # all keys differ: of equal logits, the lower index has the larger key
    keys = tl.where((of < E)[None, :], _rising(x) * 65536 + (E - 1 - of)[None, :], -(2**62))
    best = tl.topk(keys, K2)
    chosen = E - 1 - (best & 65535)
    bits = (best >> 16).to(tl.int32)
    picked = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)
    taken = (to < K)[None, :] & here
    picked = tl.where(taken, picked, float("-inf"))
    top = tl.where(here, tl.max(x, 1, keep_dims=True), 0.0)
    weights = tl.exp(picked - top)
    if NORMALIZE:
        total = tl.sum(weights, 1, keep_dims=True)
    else:
        total = tl.sum(tl.exp(x - top), 1, keep_dims=True)
    place = rows[:, None] * K + to[None, :]
    tl.store(gates + place, weights / tl.where(here, total, 1.0), taken)
    tl.store(experts + place, chosen, taken)


@triton.jit
def route_backward_kernel(
    grad, logits, gates, experts, out, T, E, K, stride,
    NORMALIZE: tl.constexpr, ROWS: tl.constexpr, E2: tl.constexpr, K2: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    of, to = tl.arange(0, E2), tl.arange(0, K2)
    taken = (rows < T)[:, None] & (to < K)[None, :]
    place = rows[:, None] * K + to[None, :]
    weighed = tl.load(grad + place, taken, 0.0) * tl.load(gates + place, taken, 0.0)
    total = tl.sum(weighed, 1)
    here = (rows < T)[:, None] & (of < E)[None, :]
    if NORMALIZE:
        result = tl.zeros((ROWS, E2), tl.float32)
    else:
        x = tl.load(logits + rows[:, None] * stride + of[None, :], here, float("-inf"))
        x = x.to(tl.float32)
        top = tl.where(rows < T, tl.max(x, 1), 0.0)
        raised = tl.exp(x - top[:, None])
        whole = tl.where(rows < T, tl.sum(raised, 1), 1.0)
        result = -raised * (total / whole)[:, None]
    for k in range(K):  # in the order of k: a row's experts differ
        own = rows * K + k
        expert = tl.load(experts + own, rows < T, -1)
        gate = tl.load(gates + own, rows < T, 0.0)
        share = tl.load(grad + own, rows < T, 0.0) * gate
        if NORMALIZE:
            share -= gate * total
        result += tl.where(of[None, :] == expert[:, None], share[:, None], 0.0)
    tl.store(out + rows[:, None] * E + of[None, :], result.to(out.dtype.element_ty), here)


@triton.jit
def count_kernel(experts, counts, N, E, B, PAIRS: tl.constexpr, E2: tl.constexpr):
    """counts (E + 1, B): pairs of each expert in each block; dropped pairs in the last row."""
    block = tl.program_id(0).to(tl.int64)
    pairs, of = block * PAIRS + tl.arange(0, PAIRS), tl.arange(0, E2)
    expert = tl.load(experts + pairs, pairs < N, -1)
    here = (expert[:, None] == of[None, :]).to(tl.int32)
    counted = tl.sum(here, 0)
    tl.store(counts + of * B + block, counted, of < E)
    there = tl.minimum(N - block * PAIRS, PAIRS)
    found = tl.sum(((expert >= 0) & (expert < E)).to(tl.int32), 0)
    tl.store(counts + tl.cast(E, tl.int64) * B + block, (there - found).to(tl.int32))


@triton.jit
def scan_kernel(counts, totals, B, BLOCKS: tl.constexpr):
    """Replace each expert's counts by their sum over earlier blocks; totals (E + 1,)."""
    row = counts + tl.program_id(0).to(tl.int64) * B
    before = tl.zeros((), tl.int32)
    for start in range(0, B, BLOCKS):
        at = start + tl.arange(0, BLOCKS)
        own = tl.load(row + at, at < B, 0)
        tl.store(row + at, before + tl.cumsum(own, 0) - own, at < B)
        before += tl.sum(own, 0)
    tl.store(totals + tl.program_id(0), before)


@triton.jit
def place_kernel(
    experts, counts, totals, order, offsets, inverse, N, E, B,
    PAIRS: tl.constexpr, E2: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    pairs, of = block * PAIRS + tl.arange(0, PAIRS), tl.arange(0, E2)
    expert = tl.load(experts + pairs, pairs < N, -1)
    size = tl.load(totals + of, of < E, 0).to(tl.int64)
    first = tl.cumsum(size, 0) - size
    if block == 0:
        tl.store(offsets + of, first, of < E)
        tl.store(offsets + E, tl.sum(size, 0))
    here = (expert[:, None] == of[None, :]) & (of < E)[None, :]
    rank = tl.cumsum(here.to(tl.int32), 0) - 1
    start = first + tl.load(counts + of * B + block, of < E, 0)
    place = tl.sum(tl.where(here, start[None, :] + rank, 0), 1)
    dropped = ((expert < 0) | (expert >= E)) & (pairs < N)
    end = tl.sum(size, 0) + tl.load(counts + tl.cast(E, tl.int64) * B + block)
    place = tl.where(dropped, end + tl.cumsum(dropped.to(tl.int32), 0) - 1, place)
    tl.store(order + place, pairs, pairs < N)
    tl.store(inverse + pairs, place, pairs < N)

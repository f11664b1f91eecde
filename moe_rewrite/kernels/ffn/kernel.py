"""Feed-forward experts in Triton: products of groups of rows, one program a tile of one group.

T rows, K experts a row, S = T * K pairs in the plan's order, E experts, D width, H hidden width. A
tile is up to M pairs of one expert: `tiles_kernel` finds them for a number of programs that the
host knows (ceil(S / M) + E); superfluous ones have expert -1. Products gather rows while loading
them; for the weights' gradients, which sum over rows, rows are first copied into the plan's order,
since scattered rows take twice the time on an H100. Offsets are int64.
"""

import triton
import triton.language as tl

from ..tl_matmul import dot, product, program_tile
from .epilogues import act, act_slope


@triton.jit
def tiles_kernel(
    offsets, tiles, starts, E, bound,
    M: tl.constexpr, TILES: tl.constexpr, E2: tl.constexpr,
):  # fmt: skip
    """tiles: each tile's expert, int32. starts: its first position in the order, int64."""
    at, of = tl.program_id(0) * TILES + tl.arange(0, TILES), tl.arange(0, E2)
    first = tl.load(offsets + of, of < E, 0)
    many = (tl.load(offsets + of + 1, of < E, 0) - first + M - 1) // M
    ends = tl.cumsum(many, 0)
    over = (ends[None, :] <= at[:, None]) & (of < E)[None, :]
    expert = tl.sum(over.to(tl.int32), 1)
    base = first - (ends - many) * M
    own = tl.sum(tl.where(of[None, :] == expert[:, None], base[None, :], 0), 1)
    tl.store(tiles + at, tl.where(expert < E, expert, -1), at < bound)
    tl.store(starts + at, own + at.to(tl.int64) * M, at < bound)


@triton.jit
def _tile(tiles, starts, offsets, tile, M: tl.constexpr):
    """(expert int64, first position in the plan's order int64, mask of the M rows)."""
    expert = tl.load(tiles + tile).to(tl.int64)
    start = tl.load(starts + tile)
    return expert, start, tl.arange(0, M) < tl.load(offsets + expert + 1) - start


@triton.jit
def up_kernel(
    x, order, offsets, tiles, starts, up, gate, up_bias, gate_bias, pre, hidden,
    S, K, D, H, bound, x_t, up_e, up_h, up_d, gate_e, gate_h, gate_d,
    ACT: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, GATE_BIAS: tl.constexpr,
    SAVE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """hidden (S, H) = act(gate x) * (up x), or act(up x); with SAVE the products go into pre."""
    tile, column = program_tile(tl.cdiv(H, N), bound, GROUP)
    if tl.load(tiles + tile) < 0:
        return
    expert, start, there = _tile(tiles, starts, offsets, tile, M)
    m, n = tl.arange(0, M), tl.arange(0, N)
    skipped = tl.cast(column, tl.int64) * N
    inside = n < H - skipped
    a = x + tl.load(order + start + m, there, 0) // K * x_t
    k = tl.arange(0, BLOCK)
    x_at = a[:, None] + k[None, :]
    up_at = up + expert * up_e + skipped * up_h + (n[None, :] * up_h + k[:, None] * up_d)
    gate_at = gate + expert * gate_e + skipped * gate_h
    gate_at += n[None, :] * gate_h + k[:, None] * gate_d
    lifted = tl.zeros((M, N), tl.float32)
    gating = tl.zeros((M, N), tl.float32)
    for done in range(0, D, BLOCK):  # one load of x for both products
        if EVEN:
            left = tl.load(x_at, there[:, None], 0.0)
            mask = inside[None, :]
        else:
            within = k < D - done
            left = tl.load(x_at, there[:, None] & within[None, :], 0.0)
            mask = inside[None, :] & within[:, None]
        lifted = dot(left, tl.load(up_at, mask, 0.0), lifted, PRECISION)
        if GATED:
            gating = dot(left, tl.load(gate_at, mask, 0.0), gating, PRECISION)
            gate_at += BLOCK * gate_d
        x_at += BLOCK
        up_at += BLOCK * up_d
    if BIAS:
        lifted += tl.load(up_bias + expert * H + skipped + n, inside, 0.0).to(tl.float32)[None, :]
    if GATE_BIAS:
        gating += tl.load(gate_bias + expert * H + skipped + n, inside, 0.0).to(tl.float32)[None, :]
    first = start * H + skipped
    place, mask = m[:, None] * H + n[None, :], there[:, None] & inside[None, :]
    kind = pre.dtype.element_ty
    if SAVE:
        tl.store(pre + first + place, lifted.to(kind), mask)
        if GATED:
            tl.store(pre + (tl.cast(S, tl.int64) * H + first) + place, gating.to(kind), mask)
    if GATED:
        made = act(gating, ACT) * lifted
    else:
        made = act(lifted, ACT)
    tl.store(hidden + first + place, made.to(kind), mask)


@triton.jit
def rows_kernel(
    a, a2, order, offsets, tiles, starts, w, w2, bias, out, K, N_ALL, C, bound, a_s,
    w_e, w_n, w_c, w2_e, w2_n, w2_c,
    GATHER: tl.constexpr, TWO: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out (S, N) = a w_e^T (+ a2 w2_e^T) (+ bias_e). a and a2: (S, C); with GATHER, a is (T, C).
    w_e: (N, C), by strides."""
    tile, column = program_tile(tl.cdiv(N_ALL, N), bound, GROUP)
    if tl.load(tiles + tile) < 0:
        return
    expert, start, there = _tile(tiles, starts, offsets, tile, M)
    m, n = tl.arange(0, M), tl.arange(0, N)
    skipped = tl.cast(column, tl.int64) * N
    inside = n < N_ALL - skipped
    own = w + (expert * w_e + skipped * w_n) + n * w_n
    acc = tl.zeros((M, N), tl.float32)
    if GATHER:
        rows = tl.load(order + start + m, there, 0) // K
    else:
        rows = start + m
    acc = product(acc, a + rows * a_s, own, there, inside, C, w_c, BLOCK, EVEN, PRECISION)
    if TWO:
        own = w2 + (expert * w2_e + skipped * w2_n) + n * w2_n
        acc = product(acc, a2 + rows * a_s, own, there, inside, C, w2_c, BLOCK, EVEN, PRECISION)
    if BIAS:
        acc += tl.load(bias + expert * N_ALL + skipped + n, inside, 0.0).to(tl.float32)[None, :]
    mask = there[:, None] & inside[None, :]
    first = start * N_ALL + skipped
    tl.store(out + first + (m[:, None] * N_ALL + n[None, :]), acc.to(out.dtype.element_ty), mask)


@triton.jit
def hidden_backward_kernel(
    hidden, gates, order, offsets, pre, dpre, shares, S, E, H,
    ACT: tl.constexpr, GATED: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """In: hidden holds dhidden = dy down. Out: hidden (S, H) holds the hidden rows times the gates,
    dpre (1 or 2, S, H) the gradients of the products times the gates, and shares (S,) the gates'
    gradient <dhidden, hidden>, zero for dropped pairs."""
    rows = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    there = rows < tl.load(offsets + E)
    pair = tl.load(order + rows, there, 0)
    weight = tl.load(gates + pair, there, 0.0).to(tl.float32)[:, None]
    kind = pre.dtype.element_ty
    share = tl.zeros((M,), tl.float32)
    for start in range(0, H, N):
        n = start + tl.arange(0, N)
        at, mask = rows[:, None] * H + n[None, :], there[:, None] & (n < H)[None, :]
        grad = tl.load(hidden + at, mask, 0.0).to(tl.float32)
        lifted = tl.load(pre + at, mask, 0.0).to(tl.float32)
        if GATED:
            other = tl.cast(S, tl.int64) * H + at
            gating = tl.load(pre + other, mask, 0.0).to(tl.float32)
            active = act(gating, ACT)
            made = active * lifted
            slope = grad * weight * lifted * act_slope(gating, ACT)
            tl.store(dpre + other, slope.to(kind), mask)
            tl.store(dpre + at, (grad * weight * active).to(kind), mask)
        else:
            made = act(lifted, ACT)
            tl.store(dpre + at, (grad * weight * act_slope(lifted, ACT)).to(kind), mask)
        tl.store(hidden + at, (made * weight).to(kind), mask)
        share += tl.sum(grad * made, 1)
    tl.store(shares + rows, share, rows < S)


@triton.jit
def spread_kernel(x, inverse, out, T, K, D, x_t, M: tl.constexpr, N: tl.constexpr):
    """out (S, D): each row of x (T, D), read once, at the positions of its pairs."""
    rows = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    n = tl.program_id(1) * N + tl.arange(0, N)
    mask = (rows < T)[:, None] & (n < D)[None, :]
    own = tl.load(x + rows[:, None] * x_t + n[None, :], mask, 0.0)
    for k in range(K):
        place = tl.load(inverse + rows * K + k, rows < T, 0)
        tl.store(out + place[:, None] * D + n[None, :], own, mask)


@triton.jit
def weights_kernel(
    left, right, offsets, out, I_ALL, J_ALL,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (E, I, J): left^T right over each expert's pairs, of left (S, I) and right (S, J); zero
    for an expert without pairs."""
    expert, pid = tl.program_id(1).to(tl.int64), tl.program_id(0)
    columns = tl.cdiv(J_ALL, N)
    i_first, j_first = pid // columns * M, pid % columns * N
    i, j = i_first + tl.arange(0, M), j_first + tl.arange(0, N)
    end = tl.load(offsets + expert + 1)
    acc = tl.zeros((M, N), tl.float32)
    for start in range(tl.load(offsets + expert), end, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        there = (rows < end)[:, None]
        a = tl.load(left + rows[:, None] * I_ALL + i[None, :], there & (i < I_ALL)[None, :], 0.0)
        b = tl.load(right + rows[:, None] * J_ALL + j[None, :], there & (j < J_ALL)[None, :], 0.0)
        acc = dot(tl.trans(a), b, acc, PRECISION)
    out += (expert * I_ALL + i_first) * J_ALL + j_first
    place = tl.arange(0, M)[:, None] * J_ALL + tl.arange(0, N)[None, :]
    mask = (i < I_ALL)[:, None] & (j < J_ALL)[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask)


@triton.jit
def bias_kernel(
    values, gates, order, offsets, out, K, N_ALL, stride,
    GATHER: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (E, N): the sum of each expert's rows; with GATHER, of its tokens' rows times gates."""
    expert = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * N + tl.arange(0, N)
    end = tl.load(offsets + expert + 1)
    acc = tl.zeros((N,), tl.float32)
    for start in range(tl.load(offsets + expert), end, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        there = rows < end
        at = rows
        if GATHER:
            at = tl.load(order + rows, there, 0)
        mask = there[:, None] & (n < N_ALL)[None, :]
        if GATHER:
            weight = tl.load(gates + at, there, 0.0).to(tl.float32)
            own = tl.load(values + (at // K * stride)[:, None] + n[None, :], mask, 0.0)
            acc += tl.sum(own.to(tl.float32) * weight[:, None], 0)
        else:
            own = tl.load(values + (at * stride)[:, None] + n[None, :], mask, 0.0)
            acc += tl.sum(own.to(tl.float32), 0)
    tl.store(out + expert * N_ALL + n, acc.to(out.dtype.element_ty), n < N_ALL)


@triton.jit
def combine_kernel(
    y, inverse, gates, offsets, out, T, K, D, E,
    WEIGHED: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """out (T, D): the sum of each row's pairs in the order of its choices, without dropped ones."""
    rows = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    n = tl.program_id(1) * N + tl.arange(0, N)
    kept = tl.load(offsets + E)
    acc = tl.zeros((M, N), tl.float32)
    for k in range(K):
        place = tl.load(inverse + rows * K + k, rows < T, kept)
        mask = (place < kept)[:, None] & (n < D)[None, :]
        own = tl.load(y + place[:, None] * D + n[None, :], mask, 0.0).to(tl.float32)
        if WEIGHED:
            own *= tl.load(gates + rows * K + k, rows < T, 0.0).to(tl.float32)[:, None]
        acc += own
    mask = (rows < T)[:, None] & (n < D)[None, :]
    tl.store(out + rows[:, None] * D + n[None, :], acc.to(out.dtype.element_ty), mask)

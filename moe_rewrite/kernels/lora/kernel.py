"""A product with a low-rank one in its epilogue, in Triton.

T rows, C summed width, N columns, R ranks of all experts together.
"""

import triton
import triton.language as tl

from ..tl_matmul import dot, product, program_tile


@triton.jit
def low_rank_kernel(
    x, w, low, b, y, T, N_ALL, C, R, bound, x_t, w_n, w_c, b_n, b_r,
    EVEN: tl.constexpr, EVEN_R: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, BLOCK: tl.constexpr, RANKS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y (T, N) = x w^T + low b^T; w is (N, C) and b (N, R) by their strides."""
    tile, column = program_tile(tl.cdiv(N_ALL, N), bound, GROUP)
    rows = tile.to(tl.int64) * M + tl.arange(0, M)
    n = column.to(tl.int64) * N + tl.arange(0, N)
    there, inside = rows < T, n < N_ALL
    acc = tl.zeros((M, N), tl.float32)
    acc = product(acc, x + rows * x_t, w + n * w_n, there, inside, C, w_c, BLOCK, EVEN, PRECISION)
    for start in range(0, R, RANKS):
        r = start + tl.arange(0, RANKS)
        left, right = there[:, None], inside[None, :]
        if not EVEN_R:
            left, right = left & (r < R)[None, :], right & (r < R)[:, None]
        own = tl.load(low + rows[:, None] * R + r[None, :], left, 0.0)
        factor = tl.load(b + n[None, :] * b_n + r[:, None] * b_r, right, 0.0)
        acc = dot(own, factor, acc, PRECISION)
    at = rows[:, None] * N_ALL + n[None, :]
    tl.store(y + at, acc.to(y.dtype.element_ty), there[:, None] & inside[None, :])

"""Building blocks of the kernels' products, inside Triton."""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b. PRECISION: Triton's input_precision, or "wide" to cast operands to fp32 first."""
    if PRECISION == "wide":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def program_tile(columns, bound, GROUP: tl.constexpr):
    """(tile, column) of this program. GROUP tiles go through all columns before the next GROUP, so
    that their rows and weights stay in the cache."""
    pid = tl.program_id(0)
    group = pid // (GROUP * columns)
    size = tl.minimum(bound - group * GROUP, GROUP)
    within = pid - group * GROUP * columns
    return group * GROUP + within % size, within // size


@triton.jit
def product(
    acc, a, w, there, inside, depth, w_stride,
    BLOCK: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + a w. a (M,), w (N,): pointers to the start of each row and of each column."""
    k = tl.arange(0, BLOCK)
    a_at, w_at = a[:, None] + k[None, :], w[None, :] + k[:, None] * w_stride
    for start in range(0, depth, BLOCK):
        if EVEN:
            left = tl.load(a_at, there[:, None], 0.0)
            right = tl.load(w_at, inside[None, :], 0.0)
        else:
            within = k < depth - start
            left = tl.load(a_at, there[:, None] & within[None, :], 0.0)
            right = tl.load(w_at, inside[None, :] & within[:, None], 0.0)
        acc = dot(left, right, acc, PRECISION)
        a_at += BLOCK
        w_at += BLOCK * w_stride
    return acc

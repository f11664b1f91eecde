"""Activations and their derivatives inside the Triton kernels, on fp32 values."""

import triton
import triton.language as tl


@triton.jit
def act(x, NAME: tl.constexpr):
    if NAME == "silu":
        return x * tl.sigmoid(x)
    elif NAME == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":  # (1 + tanh u) / 2 = sigmoid(2 u)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif NAME == "quick_gelu":
        return x * tl.sigmoid(1.702 * x)
    elif NAME == "relu":
        return tl.maximum(x, 0.0)
    elif NAME == "relu2":
        return tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    else:
        tl.static_assert(NAME == "identity")
        return x


@triton.jit
def act_slope(x, NAME: tl.constexpr):
    if NAME == "silu":
        gate = tl.sigmoid(x)
        return gate * (1.0 + x * (1.0 - gate))
    elif NAME == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif NAME == "gelu_tanh":
        gate = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        inner = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return gate + x * gate * (1.0 - gate) * inner
    elif NAME == "quick_gelu":
        gate = tl.sigmoid(1.702 * x)
        return gate * (1.0 + 1.702 * x * (1.0 - gate))
    elif NAME == "relu":
        return tl.where(x > 0.0, 1.0, 0.0)
    elif NAME == "relu2":
        return 2.0 * tl.maximum(x, 0.0)
    else:
        tl.static_assert(NAME == "identity")
        return x * 0.0 + 1.0

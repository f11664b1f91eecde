"""Experts beside any convolution or linear map of an untouched model, by plain hooks.

Only the parameters and the gates are read from the converted model.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

EXPERTS = "moe_rewrite.experts."
PLAIN = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def padded(conv, x):
    """The input as the module pads it, and the padding that is left."""
    if getattr(conv, "padding_mode", "zeros") == "zeros":
        return x, conv.padding
    return F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0


def low_rank(conv, x, a, b):
    """B A x, with the geometry of the module."""
    axes = x.ndim - 2
    if isinstance(conv, nn.modules.conv._ConvTransposeNd):
        low = TRANSPOSED[axes](
            x, a.transpose(0, 1), None, conv.stride, conv.padding, conv.output_padding, 1,
            conv.dilation,
        )  # fmt: skip
    else:
        x, padding = padded(conv, x)
        low = PLAIN[axes](x, a, None, conv.stride, padding, conv.dilation)
    return PLAIN[axes](low, b)


@contextmanager
def hooked(model, moe, state, scale, gates_for):
    """Run `model` with experts at the sites of `moe`.

    state: parameters by public state-dict name.
    gates_for: (name of a site, its output) -> a gate for each expert, that broadcasts over it.
    """

    def hook(name):
        def add(module, args, output):
            for e, gate in enumerate(gates_for(name, output)):
                a, b = (state[f"{EXPERTS}{name}.{part}.{e}"] for part in "ab")
                linear = isinstance(module, nn.Linear)
                delta = args[0] @ a.T @ b.T if linear else low_rank(module, args[0], a, b)
                output = output + gate * scale * delta
            return output

        return add

    handles = [
        model.get_submodule(name).register_forward_hook(hook(name))
        for name, _, _ in moe.report.sites
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def assert_equal_forward_and_backward(model, moe, inputs, gates_of, scale, rtol=1e-3, atol=1e-4):
    """On each input, against hooks; gates_of: (x, state) -> `gates_for`. Then backward."""
    from reference import assert_gradients_equal, copied

    state = copied(moe)
    for x in inputs:
        moe.zero_grad()
        for p in state.values():
            p.grad = None
        with hooked(model, moe, state, scale, gates_of(x, state)):
            want = model(x)
        got = moe(x)
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
        assert (got - model(x)).abs().max() > 1e-3
        weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(3))
        (got * weights).sum().backward()
        (want * weights).sum().backward()
        assert_gradients_equal(moe, state)

"""Activations and their derivatives, written into given tensors in as few passes as possible."""

from __future__ import annotations

import torch

aten = torch.ops.aten


def activate(name: str, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``act(x)`` into `out`, which may be `x`."""
    match name:
        case "silu":
            return aten.silu.out(x, out=out)
        case "gelu":
            return aten.gelu.out(x, out=out)
        case "gelu_tanh":
            return aten.gelu.out(x, approximate="tanh", out=out)
        case "relu":
            return torch.clamp_min(x, 0, out=out)
        case "relu2":
            return torch.clamp_min(x, 0, out=out).square_()
        case "quick_gelu":
            return torch.mul(x, torch.sigmoid(1.702 * x), out=out)
        case "identity":
            return out if out is x else out.copy_(x)
    raise ValueError(f"activation = {name!r}")


def activation_backward(
    name: str, grad: torch.Tensor, x: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """``grad * act'(x)`` into `out`, which may be `grad`."""
    match name:
        case "silu":
            return aten.silu_backward.grad_input(grad, x, grad_input=out)
        case "gelu":
            return aten.gelu_backward.grad_input(grad, x, grad_input=out)
        case "gelu_tanh":
            return aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=out)
        case "relu":
            return aten.threshold_backward.grad_input(grad, x, 0, grad_input=out)
        case "relu2":
            return torch.mul(grad, torch.clamp_min(x, 0), out=out).mul_(2)
        case "quick_gelu":
            gate = torch.sigmoid(1.702 * x)
            return torch.mul(grad, gate * (1 + 1.702 * x * (1 - gate)), out=out)
        case "identity":
            return out if out is grad else out.copy_(grad)
    raise ValueError(f"activation = {name!r}")

"""Activations of feed-forward experts, by their usual names."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ...errors import ConfigError

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "identity": lambda x: x,
}


def hidden(up: torch.Tensor, gate: torch.Tensor | None, activation: str) -> torch.Tensor:
    """``act(up)``, or ``act(gate) * up`` of a gated feed-forward. Raises ConfigError."""
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation={activation!r}: expected one of {sorted(ACTIVATIONS)}")
    act = ACTIVATIONS[activation]
    return act(up) if gate is None else act(gate) * up

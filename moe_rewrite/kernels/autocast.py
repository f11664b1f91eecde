"""Whether PyTorch casts operands now, which fused operations do not follow."""

from functools import cache

import torch

is_available = cache(torch.amp.is_autocast_available)


def autocasts(device: str) -> bool:
    """Whether autocast is on for this type of device."""
    return is_available(device) and torch.is_autocast_enabled(device)

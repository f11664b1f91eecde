"""Whether PyTorch casts operands now, which fused operations do not follow."""

import torch


def autocasts(device: str) -> bool:
    """Whether autocast is on for this type of device."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)

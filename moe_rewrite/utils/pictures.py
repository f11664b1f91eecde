"""Tensors as pictures."""

from __future__ import annotations

import base64
import io

import torch

from ..errors import require_package


def visible(image: torch.Tensor) -> torch.Tensor:
    """An image (C, H, W), its first three channels or its only one, as (H, W, 3) fp32 in 0 .. 1."""
    image = (
        image.float().cpu()[:3]
        if image.shape[0] >= 3
        else image.float().cpu()[:1].expand(3, -1, -1)
    )
    low, high = image.amin(), image.amax()
    return ((image - low) / (high - low).clamp_min(1e-6)).permute(1, 2, 0)


def png_uri(image: torch.Tensor) -> str:
    """An image (C, H, W) as a ``data:`` address of a PNG. Raises ConfigError without pillow."""
    require_package("PIL", "plot", "a picture in a page")
    from PIL import Image

    pixels = (visible(image) * 255).round().to(torch.uint8).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

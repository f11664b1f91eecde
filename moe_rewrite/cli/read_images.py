"""Read the images that a command line names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import ConfigError, require_package


def read_images(path: Path, shape: tuple[int, int, int]) -> torch.Tensor:
    """(N, C, H, W) fp32 in 0 .. 1, resized to `shape` (C, H, W).

    path: of a picture, a folder of pictures (read in order of their names), or a .npy file with an
        (N, C, H, W) array. Raises ConfigError if it is none of these or cannot be read.
    """
    pictures = (".png", ".jpg", ".jpeg")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [f for f in files if f.suffix.lower() in (*pictures, ".npy")]
    if not files or not files[0].exists():
        raise ConfigError(f"{path}: expected a .png, .jpg or .npy file, or a folder of them")
    images = []
    for file in files:
        try:
            images.append(_read_picture(file) if file.suffix != ".npy" else _read_array(file))
        except (OSError, ValueError, SyntaxError) as error:
            raise ConfigError(f"{file}: no readable image ({error})") from None
    channels, *size = shape
    fitted = []
    for batch in images:
        if batch.shape[1] not in (1, channels):
            batch = batch[:, :channels] if batch.shape[1] > channels else batch[:, :1]
        if channels == 1 and batch.shape[1] > 1:
            batch = batch.mean(1, keepdim=True)
        batch = batch.expand(-1, channels, -1, -1)
        fitted.append(F.interpolate(batch, size, mode="bilinear", antialias=True))
    return torch.cat(fitted)


def _read_picture(file: Path) -> torch.Tensor:
    require_package("PIL", "plot", f"{file.name}")
    from PIL import Image

    with Image.open(file) as image:
        pixels = np.asarray(image.convert("RGB"))
    return torch.tensor(pixels).permute(2, 0, 1).unsqueeze(0) / 255.0


def _read_array(file: Path) -> torch.Tensor:
    array = np.load(file, allow_pickle=False)
    if array.ndim != 4 or array.dtype.kind not in "fu":
        raise ValueError(f"{array.dtype} array of shape {array.shape}, expected (N, C, H, W)")
    return torch.tensor(array).float() / (255.0 if array.dtype == np.uint8 else 1.0)

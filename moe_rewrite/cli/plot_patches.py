"""Pictures of the patches that experts took."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..converted.model import MoEModel
from ..errors import InputError, require_package
from ..ir.patch_grid import bounds
from ..utils.atomic_files import write_figure
from ..utils.pictures import visible

DIM = 0.25  # brightness of patches that an expert did not take


def draw_patches(moe: MoEModel, images: torch.Tensor, path: str | os.PathLike) -> Path:
    """Save a picture of the patches that each expert took: one row an image, one column an expert.

    images: (N, C, H, W), normalised as for the model.
    path: of the picture, which is replaced atomically.

    Patches that were not taken are dark; the number on a taken one is its gate. Raises InputError
    for a model without a PatchRouter, ConfigError without matplotlib.
    """
    with torch.no_grad():
        plan = moe.route(images)
    if plan.patch_ids is None or plan.patch_gates is None:
        raise InputError("no expert of this model takes patches: convert it with a PatchRouter")
    require_package("matplotlib", "plot", "a picture of patches")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [moe.names[e] for e in plan.active]
    count = len(images)
    figure, axes = plt.subplots(
        count, 1 + len(names), figsize=(1.8 * (1 + len(names)), 1.9 * count), squeeze=False
    )
    for i, row in enumerate(axes):
        shown = visible(images[i])
        row[0].imshow(shown.numpy())
        for e, axis in enumerate(row[1:]):
            light = torch.full(shown.shape[:2], DIM)
            for patch, gate in zip(
                plan.patch_ids[i, e].tolist(), plan.patch_gates[i, e], strict=True
            ):
                (top, bottom), (left, right) = _place(patch, plan.grid, shown.shape)
                light[top:bottom, left:right] = 1.0
                axis.text(
                    (left + right) / 2, (top + bottom) / 2, f"{gate:.1f}", color="white",
                    fontsize=6, ha="center", va="center",
                )  # fmt: skip
            axis.imshow((shown * light.unsqueeze(-1)).numpy())
    for axis, title in zip(axes[0], ["image", *names], strict=True):
        axis.set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.tight_layout()
    target = Path(path)
    write_figure(target, figure)
    return target


def _place(patch: int, grid: int, shape: torch.Size) -> tuple[tuple[int, int], tuple[int, int]]:
    row, column = divmod(patch, grid)
    return bounds(shape[0], grid)[row], bounds(shape[1], grid)[column]

"""How a plan's gates lie over a site's rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Layout:
    """How the plan's rows lie in a site's input of `ndim` dimensions, for experts of a rank.

    kind: ``"rows"`` (B, S, ...), ``"sample"`` (B, ...), ``"swapped"`` (S, B, ...), ``"flat"``
    (B*S, D), ``"swapped_flat"`` (S*B, D), ``"map"`` (B, ..., H, W), ``"map_last"`` (B, H, W, ...);
    ``"plan"``: the plan itself, for a region; ``"head"``: (B, 1 + E) for a head's classes.
    scale: LoRA's alpha / rank. size: (H, W) of a map that a patch plan is laid over.
    sorted: whose rows are wanted instead of scales: ``"experts"``, or ``"all"``, the frozen model's
    too.
    """

    kind: Literal[
        "rows", "sample", "swapped", "flat", "swapped_flat", "map", "map_last", "plan", "head"
    ]
    ndim: int
    dtype: torch.dtype
    rank: int = 1
    scale: float = 1.0
    size: tuple[int, int] | None = None
    sorted: Literal["", "experts", "all"] = ""

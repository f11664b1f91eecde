"""The two halves of a converted model as stages of torch.distributed.pipelining.

Only the features at the cut go from one to the other: what else deep blocks read (masks, positions)
they compute from the call's arguments, which both stages are given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import ConfigError


class ShallowStage(nn.Module):
    """The frozen blocks: from a call's arguments to the features at the cut, (B, S, D), (B, D) or
    (B, C, H, W). Nothing in it requires a gradient, so it has no backward."""

    _moe: Any

    def __init__(self, moe: Any) -> None:
        super().__init__()
        self.blocks = moe.shallow
        self.__dict__["_moe"] = moe  # a stage holds its half only

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._moe.features(*args, **kwargs)


class DeepStage(nn.Module):
    """Router and deep blocks: from features at the cut, and the call's arguments by name, to the
    output `name` of the model, or its first tensor."""

    _moe: Any

    def __init__(self, moe: Any, name: str | None) -> None:
        super().__init__()
        self.router, self.blocks, self.name = moe.router, moe.deep, name
        self.__dict__["_moe"] = moe

    def forward(self, features: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        with self._moe.use_features(features.detach()):
            outputs = self._moe(**kwargs)
        if self.name is not None:
            return outputs[self.name] if isinstance(outputs, dict) else getattr(outputs, self.name)
        return next(o for o in pytree.tree_leaves(outputs) if isinstance(o, torch.Tensor))


def stages_of(moe: Any, output: str | None) -> tuple[ShallowStage, DeepStage]:
    if not moe.recipe.freeze:
        raise ConfigError(
            "pipeline_stages: the shallow half of this model is trained (freeze=False), and its "
            "stage has no backward: convert with freeze=True"
        )
    if hasattr(moe.router, "solved"):
        raise ConfigError(
            "pipeline_stages: an analytic router adds up its sums over all processes, of which only "
            "some run the deep half; convert with router=TokenRouter(fit='gradient')"
        )
    return ShallowStage(moe), DeepStage(moe, output)

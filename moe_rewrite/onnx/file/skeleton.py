"""A graph without its weights, and the weights by name."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import torch

from ..lowerings.choose import Chosen


@dataclass
class Skeleton:
    """model: the graph; what `weights` names are initializers that it lacks. chosen: the lowering of
    each site of feed-forward experts. stand_ins: by name, what quantized weights stand for."""

    model: onnx.ModelProto
    weights: dict[str, torch.Tensor]
    chosen: dict[str, Chosen]
    stand_ins: dict[str, torch.Tensor]

"""A graph without its weights, and the weights by name."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import torch

from ..lowerings.choose import Chosen


@dataclass
class Skeleton:
    """An exported graph before it is written.

    model: the graph, without the initializers in `weights`.
    weights: the initializers, by name.
    chosen: the lowering of each site of feed-forward experts.
    stand_ins: the dequantized values of quantized weights, by name.
    """

    model: onnx.ModelProto
    weights: dict[str, torch.Tensor]
    chosen: dict[str, Chosen]
    stand_ins: dict[str, torch.Tensor]

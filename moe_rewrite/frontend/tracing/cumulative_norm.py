"""Batch norms with momentum=None, whose running statistics are the mean over all batches so far.

PyTorch reads their counter into Python, which no trace can follow. Here the same average is computed
with the counter as a tensor.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

PLAIN = _BatchNorm.forward


def count_in_tensors(model: nn.Module) -> None:
    """Let the norms of a working copy be traced in training mode, too."""
    for module in model.modules():
        if not isinstance(module, _BatchNorm) or module.momentum is not None:
            continue
        kind: Any = type(module)
        if module.training and module.running_mean is not None and kind.forward is PLAIN:
            module.__class__ = _traceable(kind)


@cache
def _traceable(kind: Any) -> Any:
    names = {"forward": _forward, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), names)


def _forward(self: Any, input: torch.Tensor) -> torch.Tensor:
    """running = (1 - 1/n) running + 1/n of this batch, n counted with this batch.

    input: (B, C, ...). With momentum 1, `mean` and `var` become those of the batch.
    """
    self._check_input_dim(input)
    mean, var = torch.zeros_like(self.running_mean), torch.ones_like(self.running_var)
    y = F.batch_norm(input, mean, var, self.weight, self.bias, True, 1.0, self.eps)
    with torch.no_grad():
        self.num_batches_tracked.add_(1)
        share = self.num_batches_tracked.reciprocal()
        for running, batch in ((self.running_mean, mean), (self.running_var, var)):
            running.mul_(1 - share).add_(batch * share)
    return y

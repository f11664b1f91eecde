"""Fine-tuning that keeps the directions in which weights are largest (OSF of PEFT; Nayak et al. 2025,
arXiv 2504.07097)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...errors import require_package
from ..tasks import Task
from .adapters import Adapters
from .base import require_linear


class OSF(Adapters):
    """Sequential training of the smaller singular directions of each site's weight.

    Before a task the weights are decomposed. The directions of the largest singular values stay as
    they are; the gradients of the others are orthogonal to them. After the task the weights are
    whole again. `kept`: the share of directions that stays at the first and at the last task, between
    which it grows evenly, as in PEFT's example of continual learning.

    Raises ConfigError unless every site is a linear map.
    """

    label, rate, kept = "osf", 0.1, (0.3, 0.7)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        require_linear(self.model, self.sites, self.label)
        self.share = self.kept[0]

    def learn(self, tasks: Sequence[Task], number: int) -> None:
        first, last = self.kept
        self.share = first + (last - first) * number / max(1, len(tasks) - 1)
        super().learn(tasks, number)

    def _inject(self, name: str, **options: Any) -> None:
        require_package("peft", "continual", f"method {self.label!r}")
        from peft import OSFConfig, inject_adapter_in_model

        config = OSFConfig(target_modules=self.sites, effective_rank=self.share, **options)
        inject_adapter_in_model(config, self.model, adapter_name=name)
        self.model.to(self.device)

    def after_task(self, task: Task, number: int) -> None:
        """Put the product of its factors into each weight, and take the factors away."""
        for site in self.sites:
            layer: Any = self.model.get_submodule(site)
            layer.merge()
            self.model.set_submodule(site, layer.get_base_layer())
        del self.model.peft_config
        self.names.clear()

    def state(self) -> dict[str, torch.Tensor]:
        weights = {f"{site}.weight" for site in self.sites}
        every = self.model.state_dict()
        return {k: v for k, v in every.items() if k in weights or ".more." in k}

    def restore(self, state: dict[str, torch.Tensor], tasks: Sequence[Task], learnt: int) -> None:
        for task in tasks[:learnt]:
            self._grow_head(task)
        self.model.load_state_dict(state, strict=False)
        self.model.eval()

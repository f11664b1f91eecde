"""An adapter a task, mixed token by token in every layer by what the adapters themselves look for
(Arrow of PEFT; Ostapenko et al. 2024, arXiv 2405.11157)."""

from __future__ import annotations

from typing import Any

from .adapters import Oracle
from .base import Method, require_linear

ROUTER = "arrow_router"  # PEFT's name for it, by which adapters are told from the router


class Arrow(Oracle):
    """Adapters are trained one by one, each alone. In use, every site scores its input by the first
    right singular vector of each adapter's B A and mixes the `top_k` best: nothing is trained for
    it, and no task identity is needed.

    Raises ConfigError unless every site is a linear map.
    """

    label, needs_task_number, top_k = "arrow", False, 3  # PEFT's default

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        require_linear(self.model, self.sites, self.label)

    def _add_adapter(self, name: str) -> None:
        super()._add_adapter(name)
        if len(self.names) == 1:
            self._add_router()
        for module in self.model.modules():
            if hasattr(module, "lora_arrow"):
                module.lora_arrow[ROUTER].top_k = min(self.top_k, len(self.names))  # type: ignore[index,union-attr]

    def _add_router(self) -> None:
        """PEFT's `create_arrow_model` without the files that it reads adapters from."""
        from peft import ArrowConfig

        config = ArrowConfig(top_k=1, rng_seed=0)
        config.task_adapter_names, config.gks_adapter_names = list(self.names), []
        self._inject(ROUTER, arrow_config=config)

    def model_for(self, number: int | None) -> Any:
        self._use([ROUTER] if self.names else [])
        return Method.model_for(self, number)

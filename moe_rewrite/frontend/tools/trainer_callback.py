"""A callback that logs how rows are routed to whatever transformers' Trainer reports to."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback

from ...errors import ConfigError
from ...routing.statistics import RoutingStatistics


class RoutingCallback(TrainerCallback):
    """Logs the share of each expert, the gates' entropy, dropped rows and the load of the training
    steps since the last log, as ``routing/...`` (`RoutingStatistics.summary`).

    trainer: the Trainer that it is then added to:
        ``trainer.add_callback(moe_rewrite.RoutingCallback(trainer))``.

    Raises ConfigError if the trainer's model was not converted.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._statistics = trainer, RoutingStatistics()
        self._moe: Any = trainer.accelerator.unwrap_model(trainer.model)
        self._logging = False
        if not hasattr(self._moe, "watchers"):
            raise ConfigError(
                f"RoutingCallback: the trainer's model is a {type(self._moe).__name__}, which was not "
                "converted: pass it to moe_rewrite.convert first"
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._statistics not in self._moe.watchers:
            self._moe.watchers.append(self._statistics)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._statistics in self._moe.watchers:
            self._moe.watchers.remove(self._statistics)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if self._logging or "loss" not in (logs or {}):
            return
        found = self._statistics.summary(self._moe.names)
        self._logging = True  # this log calls the callbacks again
        try:
            self._trainer.log({f"routing/{name}": value for name, value in found.items()})
        finally:
            self._logging = False

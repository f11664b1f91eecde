"""Any-SSR's routing: one expert for a whole answer, chosen by its prompt, and none for what the model
could do before (Tong et al. 2025, arXiv 2503.13575)."""

from __future__ import annotations

from typing import Any

import torch

from ...converted.model import MoEModel
from ...errors import ConfigError
from ..learner import Learner
from ..problem import Problem
from ..tasks import Task


class AnySSR(Learner):
    """PMoE with a router of another kind: ``TokenRouter(fit="analytic", base=False, top_k=1)``.

    A generated answer is all of one expert, which the gate of the prompt's last position names: with
    a prefix gate it reads the mean over the prompt, as the authors' code does. Other calls are routed
    position by position. Fitted, unlike there, on every prefix of the training texts, with a
    nonlinear lift.

    Raises ConfigError for a problem whose answers are not generated.
    """

    def __init__(self, moe: MoEModel, problem: Problem, *args: Any, **kwargs: Any) -> None:
        if "task" not in problem.scores:
            raise ConfigError("method 'anyssr' is for language models: it routes whole answers")
        super().__init__(moe, problem, *args, **kwargs)

    def begin(self, base_task: Task | None) -> None:
        """There is no output for the base task."""

    def model_for(self, number: int | None) -> Any:
        return ChosenOnce(super().model_for(number))


class ChosenOnce:
    """A converted model that gives the expert of each prompt all of its answer."""

    def __init__(self, moe: MoEModel) -> None:
        self.moe = moe
        self.generation_config = getattr(moe, "generation_config", None)

    def __call__(self, **inputs: Any) -> Any:
        return self.moe(**inputs)

    def generate(self, **given: Any) -> torch.Tensor:
        """(B, prompt + answer): as the model's own, for input_ids (B, prompt) and attention_mask,
        padded on the left. Raises as that does."""
        ids, mask = given.pop("input_ids"), given.pop("attention_mask")
        plan = self.moe.route(input_ids=ids, attention_mask=mask)
        chosen = plan.weights[:, -1].argmax(-1)
        made: dict[int, list[int]] = {}
        for expert in chosen.unique().tolist():
            rows = (chosen == expert).nonzero().flatten()
            with self.moe.use_expert(plan.active[expert]):
                said = self.moe.generate(input_ids=ids[rows], attention_mask=mask[rows], **given)
            made |= dict(zip(rows.tolist(), said.tolist(), strict=True))
        longest = max(map(len, made.values()))
        padding = given["pad_token_id"]
        filled = [made[i] + [padding] * (longest - len(made[i])) for i in range(len(ids))]
        return torch.tensor(filled, device=ids.device)

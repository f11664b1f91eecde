"""How rows are spread over experts, over several plans."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .layer_plan import LayerPlan
from .plan import RoutingPlan


class RoutingStatistics:
    """Sums over the rows of plans, read by `summary`, which starts anew."""

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None
        self._base = False

    def add(self, plan: RoutingPlan | LayerPlan, mask: torch.Tensor | None = None) -> None:
        """Count a plan's rows, those of every layer where layers route. mask: (B, S), nonzero for
        rows that count; used if rows are (B, S)."""
        for one in plan.layers.values() if isinstance(plan, LayerPlan) else (plan,):
            self._add(one, mask)

    @torch.no_grad()
    def _add(self, plan: RoutingPlan, mask: torch.Tensor | None) -> None:
        gates = plan.gates.detach().flatten(0, -2).double()
        if isinstance(mask, torch.Tensor) and mask.shape == plan.weights.shape[:-1]:
            gates = gates[mask.flatten() != 0]
        shares = gates / gates.sum(-1, keepdim=True).clamp_min(torch.finfo(gates.dtype).tiny)
        entropy = -torch.special.xlogy(shares, shares).sum()
        dropped = (gates == 0).all(-1).sum()
        of_rows = gates.new_tensor([len(gates)]), entropy.view(1), dropped.double().view(1)
        sums = torch.cat([*of_rows, gates.sum(0), (gates != 0).sum(0).double()])
        if self._sums is not None and self._sums.shape == sums.shape:
            sums = sums + self._sums.to(sums.device)
        self._sums, self._base = sums, plan.base is not None  # anew after an expert was added

    def summary(self, names: Sequence[str]) -> dict[str, float]:
        """Since the last summary: the mean gate of each expert (``share/NAME``, ``share/frozen`` of
        the frozen model), the mean entropy of a row's gates in nats, the share of rows that no
        expert takes (``dropped``), and the largest number of an output's rows by the mean
        (``load``: 1 where they are spread evenly). Empty without rows.
        """
        if self._sums is None:
            return {}
        rows, entropy, dropped, *rest = self._sums.tolist()
        self._sums = None
        outputs = len(rest) // 2
        gates, chosen = rest[:outputs], rest[outputs:]
        if not rows or not outputs:
            return {}
        labels = ["frozen", *names] if self._base else list(names)
        found = {f"share/{n}": g / rows for n, g in zip(labels, gates, strict=False)}
        load = max(chosen) * outputs / sum(chosen) if sum(chosen) else 0.0
        return found | {"entropy": entropy / rows, "dropped": dropped / rows, "load": load}

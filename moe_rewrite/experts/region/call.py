"""The call that replaces a convolutional region: runs the dense one, or experts on patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...errors import InvariantError
from ...ir.program import Code
from ...kernels.patches.op import gather_patches, scatter_patches
from ...routing.plan import RoutingPlan
from .fold_batch_norm import for_inference
from .patch_code import PatchCode


class RegionCall:
    """The target of a region's node: call(x, plan, dense, experts) -> the region's output.

    x: (B, C, H, W).
    dense: the frozen region's tensors.
    experts: for each of these, the active experts' tensors, or None for a constant that all share.

    Without patches in the plan the dense region runs; with patches and no active expert, the dense
    region's weights run on the patches.
    """

    __module__, __qualname__, __name__ = __name__, "RegionCall", "region_call"

    def __init__(
        self, whole: Code, patches: PatchCode, size: tuple[int, int], concat: bool,
        written: tuple[int, ...],
    ) -> None:  # fmt: skip
        self.whole, self.patches, self.size, self.concat = whole, patches, size, concat
        self.written = written  # indices into `dense` and `experts` of tensors written in place
        self.frugal = for_inference(patches.code)
        self._tables: dict[torch.device, tuple[torch.Tensor, ...]] = {}

    def __deepcopy__(self, memo: dict) -> RegionCall:
        return self

    def writes(self, node: fx.Node) -> list[fx.Node]:
        """The arguments of this call that are written in place (batch statistics)."""
        dense: Any
        experts: Any
        _, _, dense, experts = node.args
        return [tensors[i] for tensors in (dense, experts) for i in self.written]

    @staticmethod
    def _weights(dense: tuple, experts: tuple, expert: int) -> list[torch.Tensor]:
        both = zip(dense, experts, strict=True)
        return [shared if own is None else own[expert] for shared, own in both]

    def __call__(
        self, x: torch.Tensor, plan: RoutingPlan, dense: tuple, experts: tuple
    ) -> torch.Tensor:
        if plan.patch_ids is None or plan.patch_gates is None:
            return self.whole.call(x, *dense)
        entry, exit_, *of_patches = self._on(x.device)
        count = len(plan.active)
        weights = [self._weights(dense, experts, i) for i in range(count)] or [list(dense)]
        size = (self.patches.entry.rows, self.patches.entry.cols)
        code = self.patches.code if torch.is_grad_enabled() else self.frugal
        gathered = gather_patches(x, plan.patch_ids, entry, size).unbind()
        taken = [plan.patch_ids.shape[-1]] if self.patches.counts else []
        made = []
        for i, patches in enumerate(gathered):
            tables = [table[plan.patch_ids[:, i].flatten()] for table in of_patches]
            y = code.call(patches, *taken, *tables, *weights[i])
            made.append(self._own(y, plan.patch_ids[:, i]))
        if not self.concat or not count:
            return self._scattered(made, plan.patch_gates, plan.patch_ids, exit_)
        return self._concatenated(made, plan, exit_)

    def _own(self, y: torch.Tensor, patch_ids: torch.Tensor) -> torch.Tensor:
        """Set to zero the positions that pad a smaller patch and belong to a neighbour."""
        inside = self.patches.exit.inside
        if inside is None:
            return y
        return y * inside.to(y)[patch_ids.flatten()].unsqueeze(1)

    def _scattered(
        self, made: list[torch.Tensor], patch_gates: torch.Tensor, patch_ids: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        apart = self.patches.exit.inside is None
        return scatter_patches(made, patch_gates, patch_ids, positions, self.size, apart)

    def _concatenated(
        self, made: list[torch.Tensor], plan: RoutingPlan, positions: torch.Tensor
    ) -> torch.Tensor:
        """Expert e fills the e-th slice of the channels; an inactive one leaves zeros."""
        if plan.patch_ids is None or plan.patch_gates is None:
            raise InvariantError("a plan without patches")
        slices: list[torch.Tensor | None] = [None] * plan.num_experts
        for i, expert in enumerate(plan.active):
            one = slice(i, i + 1)
            slices[expert] = self._scattered(
                [made[i]], plan.patch_gates[:, one], plan.patch_ids[:, one], positions
            )
        like = next(s for s in slices if s is not None)
        return torch.cat([torch.zeros_like(like) if s is None else s for s in slices], dim=1)

    def _on(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """The tables of positions, and those that the code takes, on a device."""
        if device not in self._tables:
            code = self.patches
            tables = (code.entry.positions, code.exit.positions, *code.tables)
            self._tables[device] = tuple(t.to(device) for t in tables)
        return self._tables[device]

"""Expert choice: every expert scores all patches of a sample and takes its best.

pMoE, arXiv 2306.04073, equations 2 (top-l routing) and 3 (gates). Shapes: B batch, C channels,
n = g * g patches, E active experts, l patches that each takes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..config import PatchRouter
from ..errors import InputError
from ..ir import patch_grid
from ..kernels.patches.op import gather_patches
from ..kernels.plan.op import largest
from .packed_rows import RowMask
from .plan import RoutingPlan
from .router import GivenRows, Router


class PatchGate(Router):
    """The gate of a PatchRouter.

    rows[e]: weights of expert e's score, (C * h * w,) for patches of h x w, or (C,) if pooled.
    spec: without any None.
    size: (C, H, W) of the map at the cut; for a ViT's tokens, the width and the sides of the map
        of patch tokens.
    """

    def __init__(self, spec: PatchRouter, size: tuple[int, int, int], device: torch.device) -> None:
        channels, *sides = size
        self.grid: int = spec.grid or 1
        self.sides = sides[0], sides[1]
        self.patch = tuple(patch_grid.largest(n, self.grid) for n in sides)
        pooled = spec.features == "pooled"
        super().__init__(spec, channels * (1 if pooled else self.patch[0] * self.patch[1]), device)

    def new_row(self) -> torch.Tensor:
        row = super().new_row()
        return row if row.is_meta else row.normal_(0.0, 1.0) * (self.spec.init / self.size**0.5)

    def forward(
        self, features: torch.Tensor, mask: RowMask, state: Any,
        given: GivenRows | None = None,
    ) -> tuple[RoutingPlan, None]:  # fmt: skip
        """The plan for a map (B, C, H, W), or for tokens (B, S, C) that end with H * W patches."""
        active, rows = self._chosen(given)
        if rows is None:
            return self.without_experts(features), None
        self._require_sides(features)
        x = self._map(features)
        scale = self._scale(x)
        few = given is None and torch.is_grad_enabled() and self._few_matter(len(active))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not few):
            scores = self._scores(x, rows) * scale
        patch_ids = largest(scores.detach(), self.spec.per_expert or 1)
        taken = self._scores_of(x, rows, patch_ids) * scale if few else scores.gather(-1, patch_ids)
        return self._plan(features, active, patch_ids, self._gates(scores, taken)), None

    def _few_matter(self, experts: int) -> bool:
        """Whether the gates depend on so few patches that scoring those again for the backward pass
        is cheaper than a backward pass through all scores."""
        selected = self.spec.gate == "selected" and self.spec.features == "flat"
        return selected and experts * (self.spec.per_expert or 1) < self.grid**2

    def without_experts(self, features: torch.Tensor) -> RoutingPlan:
        rows = self._rows(features)
        none = features.new_zeros(*rows, 0, dtype=torch.float32)
        return RoutingPlan((), none, None, len(self), rows, grid=self.grid)

    def everything(self, features: torch.Tensor) -> RoutingPlan:
        """The plan in which the frozen region takes every patch."""
        patches = torch.arange(self.grid**2, device=features.device)
        patch_ids = patches.expand(features.shape[0], 1, -1)
        patch_gates = torch.ones_like(patch_ids, dtype=torch.float32)
        dense = self.without_experts(features)
        return RoutingPlan(
            (), dense.weights, None, len(self), dense.rows, patch_ids, patch_gates, self.grid
        )

    def _rows(self, features: torch.Tensor) -> tuple[int, int]:
        tokens = features.shape[1] if features.ndim == 3 else self.grid**2
        return features.shape[0], tokens

    def _map(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) fp32 features to score."""
        x = features.float()
        if x.ndim == 3:
            x = x[:, self.spec.prefix_tokens :].transpose(1, 2).unflatten(2, self.sides)
        return x

    def _require_sides(self, features: torch.Tensor) -> None:
        """Raises InputError where the map of this call has no patches as the router scores them."""
        height, width = self.sides
        if features.ndim == 3:
            wanted = (self.spec.prefix_tokens or 0) + height * width
            if features.shape[1] != wanted:
                raise InputError(
                    f"{features.shape[1]} tokens at the cut: the router was made for {wanted}, of "
                    f"a map of {height}x{width} patches; pass images of the size of the example"
                )
            return
        found = features.shape[2], features.shape[3]
        if found != self.sides and self.spec.features == "flat":
            raise InputError(
                f"the map at the cut is {found[0]}x{found[1]}: PatchRouter(features='flat') weighs "
                f"every value of a patch of the {height}x{width} map of the example; pass images "
                "of that size, or convert with PatchRouter(features='pooled')"
            )
        if min(found) < self.grid:
            raise InputError(
                f"the map at the cut is {found[0]}x{found[1]}: expected at least {self.grid} "
                f"positions a side for grid={self.grid}"
            )

    def _scores(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """(B, E, n): the inner product of each patch with each row."""
        g = self.grid
        if self.spec.features == "pooled":
            down, across = (_means(n, g).to(x) for n in x.shape[2:])
            pooled = torch.einsum("iy,jx,bcyx->bcij", down, across, x)
            return torch.einsum("ec,bcn->ben", rows, pooled.flatten(2))
        weight = rows.unflatten(1, (x.shape[1], *self.patch))
        if all(n % g == 0 for n in self.sides):
            return F.conv2d(x, weight, stride=self.patch).flatten(2)
        table = patch_grid.patches(*self.sides, g)
        assert table.inside is not None
        patches = x.flatten(2)[..., table.positions.to(x.device)].unflatten(-1, self.patch)
        patches = patches * table.inside.to(x)
        return torch.einsum("echw,bcnhw->ben", weight, patches)

    def _scores_of(
        self, x: torch.Tensor, rows: torch.Tensor, patch_ids: torch.Tensor
    ) -> torch.Tensor:
        """(B, E, l): the same for these patches only."""
        table = patch_grid.patches(*self.sides, self.grid)
        positions = table.positions.to(x.device)
        patches = gather_patches(x, patch_ids, positions, (table.rows, table.cols)).flatten(2)
        if table.inside is not None:
            inside = table.inside.to(x).flatten(1)[patch_ids].transpose(0, 1)  # (E, B, l, h * w)
            patches = patches.unflatten(2, (x.shape[1], -1)) * inside.flatten(1, 2).unsqueeze(2)
            patches = patches.flatten(2)
        products = torch.einsum("end,ed->en", patches, rows)
        return products.view(len(rows), len(x), patch_ids.shape[2]).transpose(0, 1)

    def _scale(self, x: torch.Tensor) -> torch.Tensor | float:
        """(B, 1, 1) factor of the scores: like scaling the features, but without copying them."""
        if not self.spec.normalize:
            return 1.0
        square = torch.linalg.vector_norm(x.flatten(1), dim=1).square() / x.shape[1:].numel()
        return torch.rsqrt(square + 1e-6)[:, None, None]

    def _gates(self, scores: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
        """(B, E, l): gates of the patches taken, whose scores are `taken`."""
        if self.spec.gate == "hard":
            return torch.ones_like(taken)
        over = scores if self.spec.gate == "all" else taken
        gates = (taken - over.logsumexp(-1, keepdim=True)).exp()
        return gates * taken.shape[-1] if self.spec.scale == "mean-one" else gates

    def _plan(
        self,
        features: torch.Tensor,
        active: tuple[int, ...],
        patch_ids: torch.Tensor,
        patch_gates: torch.Tensor,
    ) -> RoutingPlan:
        batch, experts, _ = patch_ids.shape
        weights = patch_gates.new_zeros(batch, experts, self.grid**2).scatter(
            -1, patch_ids, patch_gates
        )
        if features.ndim == 3:
            weights = self._over_tokens(weights, patch_gates)
        return RoutingPlan(
            active, weights.transpose(1, 2), None, len(self), self._rows(features), patch_ids, patch_gates,
            self.grid,
        )  # fmt: skip

    def _over_tokens(self, weights: torch.Tensor, patch_gates: torch.Tensor) -> torch.Tensor:
        """(B, E, S): patch tokens have their patch's gate, prefix tokens the mean of the gates."""
        cells = weights.unflatten(2, (self.grid, self.grid))
        down, across = (patch_grid.shares(n, self.grid).to(weights) for n in self.sides)
        tokens = torch.einsum("yi,xj,beij->beyx", down, across, cells).flatten(2)
        before = patch_gates.mean(-1, keepdim=True).expand(-1, -1, self.spec.prefix_tokens)
        return torch.cat([before, tokens], dim=-1)


def _means(length: int, grid: int) -> torch.Tensor:
    """(g, length) fp32: averages the positions of each patch of an axis."""
    owned = patch_grid.shares(length, grid).T
    return owned / owned.sum(1, keepdim=True)

"""A token gate in closed form: ridge regression of the expert's identity on random features.

The shallow segment is frozen, so the features never drift and sums over samples are sufficient: the
solution does not depend on the order of tasks, and no sample has to be kept (RanPAC, arXiv
2307.02251, section 4; Any-SSR, arXiv 2503.13575).

Shapes: D width of the features, M random features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from ..config import TokenRouter
from ..errors import InputError
from ..utils.sharded import fill_whole
from .class_sums import ClassSums, over_processes, products_of, with_one
from .packed_rows import RowMask
from .packed_sums import PackedSums, packed
from .plan import PrefixState, RoutingPlan
from .router import Router
from .shared_sums import SharedSums
from .token_gate import TokenGate, counted_rows


class AnalyticGate(TokenGate):
    """The gate of ``TokenRouter(fit="analytic")``.

    rows[e]: (M + 1,) fp32, solved and never trained.
    frozen: (M + 1,) fp32, the frozen model's row.
    lift: (D, M) fixed random projection.
    moments: sums over the rows of each class, `ClassSums` or (``sums="shared"``) `SharedSums`. Class
        0 is the frozen model, class e + 1 expert e.
    before[e]: (e, 2), flags just before expert e was added: its rows are solved again from the sums.
    told[e]: the sums of expert e were given (`MoEModel.fit_router`); training adds nothing to them.
    solved: the rows are those of the sums.
    unknown: experts without sums, as of the last time that the rows were solved or loaded.
    knows_base: whether there are sums of the frozen model, likewise; without, it has no prior.
    """

    by_sums = True
    frozen: torch.Tensor
    lift: torch.Tensor
    moments: PackedSums

    def __init__(self, spec: TokenRouter, width: int, device: torch.device) -> None:
        Router.__init__(self, spec, spec.projection + 1, device)
        draw = torch.Generator().manual_seed(0)
        lift = torch.randn(width, spec.projection, generator=draw) / width**0.5
        self.register_buffer("lift", lift.to(device))
        self.register_buffer("frozen", torch.zeros(self.size, device=device))
        shared = spec.sums == "shared"
        self.moments = SharedSums(self.size, device) if shared else ClassSums(self.size)
        self.moments.append(device)
        self.told: list[bool] = []
        self.solved = True
        self.unknown: tuple[int, ...] = ()
        self.knows_base = False

    def require_analytic(self) -> None:
        pass

    def add(self, count: int, active: bool) -> list[nn.Parameter]:
        """Add rows; no parameters are returned, since rows are solved and not trained."""
        self.settle()
        for row in super().add(count, active):
            row.requires_grad_(False)
            self.moments.append(self.device)
            self.told.append(False)
        self._look_for_unknown()
        return []

    def remove_last(self) -> None:
        super().remove_last()
        self._forget(len(self.told) - 1)

    def _rows_before(self) -> torch.Tensor:
        return torch.zeros(len(self.rows), 0, device=self.device)

    def remove(self, index: int) -> None:
        """The other rows are solved again, as if this expert had never been added; with shared sums,
        see `SharedSums`."""
        super().remove(index)
        self._forget(index)

    def _forget(self, index: int) -> None:
        """Whoever removes experts calls `settle` after the last."""
        with torch.inference_mode(False):  # what is left is added to elsewhere
            self.moments.drop(index + 1)
        del self.told[index]
        self.solved = False

    def join(self, index: int, other: int) -> None:
        self.moments.join(index + 1, other + 1)
        self.told[index] = self.told[index] or self.told[other]

    # -- sums -------------------------------------------------------------------------------------

    @torch.no_grad()
    def products(self, features: torch.Tensor, mask: RowMask) -> torch.Tensor:
        """(M + 1, M + 1) float64: the sum of f f^T over the rows that the gate would read here.
        Masked rows are left out."""
        read, _, _ = self._read(features, mask, None)
        return self._products(features, mask, read)

    def _products(self, features: torch.Tensor, mask: RowMask, read: torch.Tensor) -> torch.Tensor:
        rows = read.reshape(-1, read.shape[-1])
        if mask is not None and read.ndim == 3 and read.shape[1] == features.shape[1]:
            return products_of(rows, counted_rows(mask, read).reshape(-1))
        return products_of(rows, None)

    def tell(self, expert: int | None, products: torch.Tensor) -> None:
        """Add to the sums of an expert, or (None) of the frozen model. What training had added to
        those of an expert is dropped the first time. The rows are solved."""
        if not products.is_meta and not bool(products.isfinite().all()):
            raise InputError(
                "the features at the cut of these samples hold infinities or NaN, from which no "
                "router can be solved: pass samples on which the model computes finite values"
            )
        if expert is not None and not self.told[expert]:
            self.moments.clear(expert + 1)
            self.told[expert] = True
        self.moments.add(0 if expert is None else expert + 1, products)
        self.solve()

    @torch.no_grad()
    def learn(
        self, expert: int, features: torch.Tensor, mask: RowMask, state: PrefixState | None,
        counts: bool, keeps: bool,
    ) -> tuple[RoutingPlan, PrefixState | None]:  # fmt: skip
        """The plan of training, in which this expert gets every row with gate 1, and the state after
        these rows.

        counts: add the rows to the expert's sums, those of all processes.
        keeps: the state is asked for.
        """
        after = None
        if counts or keeps:
            read, after, _ = self._read(features, mask, state)
            if counts:
                products = self._products(features, mask, read)
                self.moments.add(expert + 1, products if self.copied else over_processes(products))
                self.solved = False
        return self.fixed_gates(features, {expert: 1.0}), after

    @property
    def forgets_base(self) -> bool:
        """Whether the frozen model has an output, and the router knows none of its rows."""
        return self.spec.base and not self.frozen.is_meta and not self.knows_base

    def facts(self) -> dict[str, Any]:
        return {"told": list(self.told), "solved": self.solved}

    def close_sums(self) -> None:
        self.moments.close()

    def in_this_layout(
        self, state: Mapping[str, torch.Tensor], prefix: str
    ) -> dict[str, torch.Tensor]:
        """Older versions saved whole matrices of sums, and the rows before each expert."""
        found = {}
        for name, tensor in state.items():
            group, _, number = name.removeprefix(prefix).rpartition(".")
            if name.startswith(prefix) and number.isdecimal() and tensor.ndim == 2:
                if group == "moments":
                    found[name] = packed(tensor)
                elif group == "before":
                    found[name] = tensor[:, -2:]
        return found

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *given: Any) -> None:
        state_dict.update(self.in_this_layout(state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, *given)

    def settle(self) -> None:
        if not self.solved:
            self.solve()

    def after_loading(self, told: list[bool] | None, solved: bool) -> None:
        self.solved = solved
        if not self.frozen.is_meta:
            counts = self.moments.counts()[1:]
            self.told = [c > 0 for c in counts] if told is None else list(told)
        self._look_for_unknown()

    def _look_for_unknown(self) -> None:
        if not self.frozen.is_meta:
            known = [c > 0 for c in self.moments.counts()]
            self.knows_base = known[0]
            self.unknown = tuple(e for e, is_known in enumerate(known[1:]) if not is_known)

    @torch.no_grad()
    def solve(self) -> None:
        """Solve every row, ``(G + r I)^-1 c``, from the sums; all classes have the same weight.

        G is the sum over classes of their mean f f^T, c a class's mean f, r is `ridge` times the
        mean diagonal of G. A class without samples gets a row of zeros.
        """
        self.solved = True
        if self.frozen.is_meta:
            return
        self._look_for_unknown()
        if not any(self.moments.counts()):
            return
        total = self.moments.gram()
        if not bool(total.isfinite().all()):
            self._refuse_infinities()
        total.diagonal().add_(self.spec.ridge * total.diagonal().mean())
        here = self.frozen.device
        solved = torch.linalg.solve(total.to(here), self.moments.sides().to(here))
        self.frozen.copy_(solved[:, 0])
        for row, column in zip(self.rows, solved[:, 1:].T, strict=True):
            fill_whole(row, column)

    def _refuse_infinities(self) -> NoReturn:
        self.solved = False
        odd = self.moments.holds_infinities() - 1
        raise InputError(
            f"the sums of expert {odd}'s rows hold infinities or NaN: so did the features at the "
            f"cut in training. moe.fit_router({odd}, batches) replaces them by those of its "
            "samples; moe.remove(name) removes the expert"
        )

    def _lifted(self, x: torch.Tensor) -> torch.Tensor:
        """Random features of each position: averaging comes later, since their mean holds more
        information than the random features of a mean."""
        return (x @ self.lift).relu()

    def _with_prior(self, logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        if not (self.spec.base and self.knows_base):
            return logits
        base = logits[..., :1] + self.spec.sharpness * self.spec.prior / seen
        return torch.cat([base, logits[..., 1:]], dim=-1)

    def _logits(self, read: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        solved = [self.frozen.unsqueeze(0)] if self.spec.base else []
        if rows is not None:
            solved.append(rows)
        if not solved:
            return read.new_zeros(*read.shape[:-1], 0)
        return self.spec.sharpness * (with_one(read) @ torch.cat(solved).T)

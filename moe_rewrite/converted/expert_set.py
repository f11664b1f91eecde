"""A model whose experts come and go: added, switched on and off, taken back."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import ConfigError
from ..experts.base import ExpertSite
from ..experts.head import HeadColumns
from ..experts.lora.parameters import LoRASite
from .parameters import Ownership
from .plan_override import Planning


class Growing(Planning):
    """names: of the experts, in their order. trained: of each, whether it was trained since it came,
    or its row of the router fitted."""

    names: list[str]
    trained: list[bool]
    _expansions: list[int]  # of each expert, which expansion it came with
    _owned: Ownership

    @property
    def num_experts(self) -> int:
        return len(self.router)

    def _add(
        self, names: list[str | None], active: bool, classes: int | None = None
    ) -> list[nn.Parameter]:
        new = self.router.add(len(names), active)
        for site in self._owned.sites.values():
            dense = {w: self._owned.refs[w].get() for w in site.site.weights}
            for _ in names:
                new += site.add(dense)
        number = self._expansions[-1] + 1 if self._expansions else 0
        for name in names:
            self.names.append(name or self._free_name())
            self.trained.append(False)
            self._expansions.append(number)
        if classes is not None and self._head is not None:
            new += self._head.widen(self.num_experts - 1, classes)
        self._train_newest()
        return new

    @property
    def _head(self) -> HeadColumns | None:
        """The columns of the classification head, if the model has one."""
        return next((s for s in self._owned.sites.values() if isinstance(s, HeadColumns)), None)

    def _train_newest(self) -> None:
        """Only the experts of the last expansion are trained; the older ones are frozen."""
        trained = [number == self._expansions[-1] for number in self._expansions]
        for site in self._owned.sites.values():
            site.set_trained(trained)

    def _begin_training(self) -> None:
        """A forward in training mode comes: experts that wait are turned on, the newest trained."""
        self.router.activate_pending()
        if torch.is_grad_enabled():
            newest = self._expansions[-1]
            self.trained = [
                done or number == newest
                for done, number in zip(self.trained, self._expansions, strict=True)
            ]

    def _free_name(self) -> str:
        number = len(self.names)
        while f"expert{number}" in self.names:
            number += 1
        return f"expert{number}"

    def expand(
        self, n: int = 1, name: str | None = None, classes: int | None = None
    ) -> list[nn.Parameter]:
        """Add n experts, freeze the older ones, and return the new parameters.

        The new ones are off, so no output changes, until `activate(name)` or the first forward
        in training mode. Rows of the router stay trainable. name: of the expert; with n > 1,
        ``name.0``, ``name.1``, ... classes: columns that the expert (of the last, if several)
        brings to a classification head, behind the present ones, which stay as they are; while it
        is off they are minus infinity, or absent where none behind is on. Raises ConfigError.
        """
        if getattr(self._compiler.recipe.experts, "combine", "sum") == "concat":
            raise ConfigError(
                "combine='concat': the experts share the region's output channels out among them, "
                "none is left for another; convert with combine='sum' to expand"
            )
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ConfigError(f"n={n!r}: expected an int >= 1")
        if name is not None and not (isinstance(name, str) and name):
            raise ConfigError(f"name={name!r}: expected a name or None")
        names: list[str | None] = [name] if n == 1 else [name and f"{name}.{i}" for i in range(n)]
        taken = [x for x in names if x in self.names]
        if taken:
            raise ConfigError(f"name={taken[0]!r}: there is an expert of this name; choose another")
        if classes is not None:
            if not isinstance(classes, int) or isinstance(classes, bool) or classes < 1:
                raise ConfigError(f"classes={classes!r}: expected None or an int >= 1")
            if self._head is None:
                raise ConfigError(
                    f"classes={classes}: this model ends in no classification head, a linear map "
                    "to (batch, classes) behind the cut"
                )
        return self._add(names, active=False, classes=classes)

    def _index(self, name: str | int) -> int:
        if isinstance(name, int) and not isinstance(name, bool) and 0 <= name < len(self.names):
            return name
        if name not in self.names:
            raise ConfigError(f"expert {name!r}: expected one of {self.names}")
        return self.names.index(str(name))

    def activate(self, name: str | int) -> None:
        """Let an expert, by name or index, take part in routing."""
        self.router.set_active(self._index(name), True)

    def deactivate(self, name: str | int) -> None:
        """Take an expert out of routing; its parameters stay."""
        self.router.set_active(self._index(name), False)

    def remove_last(self) -> None:
        """Remove the newest expert; the router is bitwise what it was before it came."""
        if self.num_experts <= 1:
            raise ConfigError("the only expert cannot be removed: use to_dense()")
        self.router.remove_last()
        self.names.pop()
        self.trained.pop()
        self._expansions.pop()
        for site in self._owned.sites.values():
            site.remove_last()
        self._train_newest()

    @property
    def sites(self) -> list[str]:
        """Dotted names of the modules with LoRA experts, as PEFT's target_modules take them."""
        return [s.site.name for s in self.expert_sites() if isinstance(s, LoRASite)]

    def expert_sites(self) -> list[ExpertSite]:
        """Where experts work, each with the parameters of all of them."""
        return list(self._owned.sites.values())

"""The experts of a converted model: adding, switching on and off, removing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..experts.base import ExpertParameters
from ..experts.head import HeadColumns
from ..routing.router import Router
from . import low_precision
from .parameters import ParameterStore
from .saving.checkpoint import Facts


class ExpertSet:
    """Router rows and site parameters of every expert, kept in step.

    names: one for each expert, in order.
    trained: whether each was trained since it was added, or its row of the router was fitted.
    expansions: the number of the `expand` call that added each.
    frozen: names of those that are not trained although they are the newest.
    """

    def __init__(
        self, router: Router, sites: Iterable[ExpertParameters], store: ParameterStore,
        fixed: str = "",
    ) -> None:  # fmt: skip
        """fixed: why experts cannot be added; empty where they can."""
        self.router, self.sites = router, list(sites)
        self._store, self._fixed = store, fixed
        self.names: list[str] = []
        self.trained: list[bool] = []
        self.expansions: list[int] = []
        self.frozen: set[str] = set()

    def __len__(self) -> int:
        return len(self.router)

    @property
    def head(self) -> HeadColumns | None:
        """The columns of the classification head, if the model has one."""
        return next((s for s in self.sites if isinstance(s, HeadColumns)), None)

    def add(
        self, names: list[str | None], active: bool, classes: int | None = None
    ) -> list[nn.Parameter]:
        self._store.require_room()
        new = self.router.add(len(names), active)
        for site in self.sites:
            dense = self._store.like(site.site.weights)
            for _ in names:
                new += site.add(dense)
        number = self.expansions[-1] + 1 if self.expansions else 0
        for name in names:
            self.names.append(name or self._free_name())
            self.trained.append(False)
            self.expansions.append(number)
        if classes is not None and self.head is not None:
            new += self.head.widen(len(self) - 1, classes)
        new = self._store.divided((self.router, *self.sites), new)
        self.train_newest()
        return new

    def forget(self) -> None:
        """Drop cached stacks and casts of every site, and of the router."""
        self.router.forget()
        for site in self.sites:
            site.forget()

    def train_newest(self) -> None:
        """Make the experts of the last expansion trainable and freeze the older ones, with what they
        share."""
        newest = [
            number == self.expansions[-1] and name not in self.frozen
            for number, name in zip(self.expansions, self.names, strict=True)
        ]
        self._store.off_device.trained = tuple(e for e, on in enumerate(newest) if on)
        for site in self.sites:
            site.set_trained(newest)
            site.train_shared(not any(self.expansions))

    def learner(self, strict: bool) -> int | None:
        """Index of the expert that gets every row in training with gate 1: the only one that is
        trained, if the router is analytic. None: rows are routed in training as in evaluation.

        strict: raise ConfigError where several are trained at once and nobody told the router whose
        rows are whose.
        """
        if not self.router.by_sums:
            return None
        on = self.router.on_in_training()
        each = zip(self.expansions, self.names, on, strict=True)
        newest = [
            e for e, (number, name, is_on) in enumerate(each)
            if number == self.expansions[-1] and name not in self.frozen and is_on
        ]  # fmt: skip
        if len(newest) == 1:
            return newest[0]
        untold = [self.names[e] for e in newest if not self.router.told[e]]
        if strict and untold:
            raise ConfigError(
                f"experts {', '.join(self.names[e] for e in newest)} are trained at once, so an "
                f"analytic router cannot know whose rows these are, nor those of {untold[0]!r} "
                "later: add experts one by one, expand(1) before each task; or call "
                "moe.fit_router(name, batches) for each; or train within moe.use_expert(name); or "
                "convert with TokenRouter(fit='gradient')"
            )
        return None

    def require_known(self) -> None:
        """Raises ConfigError if an expert that was trained and is on has no rows in the sums of an
        analytic router, which would then route by chance."""
        for e in self.router.unknown:
            if self.trained[e] and self.router.active[e]:
                name = self.names[e]
                raise ConfigError(
                    f"expert {name!r} was trained and is on, but the analytic router knows none of "
                    "its rows, which it takes from training outside of use_expert(): call "
                    f"moe.fit_router({name!r}, batches) with its samples, or "
                    f"moe.deactivate({name!r})"
                )

    def begin_training(self) -> None:
        """Before a forward in training mode: turn pending experts on, mark the newest trained. Raises
        ConfigError for quantised experts."""
        low_precision.require_not_quantized(self.sites, "a call in training mode")
        self.router.activate_pending()
        if torch.is_grad_enabled():
            newest = self.expansions[-1]
            each = zip(self.trained, self.expansions, self.names, strict=True)
            self.trained = [
                done or number == newest and name not in self.frozen for done, number, name in each
            ]

    def _free_name(self) -> str:
        number = len(self.names)
        while f"expert{number}" in self.names:
            number += 1
        return f"expert{number}"

    def expand(self, n: int, name: str | None, classes: int | None) -> list[nn.Parameter]:
        """See `MoEModel.expand`."""
        if self._fixed:
            raise ConfigError(self._fixed)
        low_precision.require_not_quantized(self.sites, "expand()")
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ConfigError(f"n={n!r}: expected an int >= 1")
        if name is not None and not (isinstance(name, str) and name):
            raise ConfigError(f"name={name!r}: expected a name or None")
        names: list[str | None] = [name] if n == 1 else [name and f"{name}.{i}" for i in range(n)]
        taken = [x for x in names if x in self.names]
        if taken:
            raise ConfigError(f"name={taken[0]!r}: an expert has this name already; choose another")
        if classes is not None:
            if not isinstance(classes, int) or isinstance(classes, bool) or classes < 1:
                raise ConfigError(f"classes={classes!r}: expected None or an int >= 1")
            if self.head is None:
                raise ConfigError(
                    f"classes={classes}: this model ends in no classification head, a linear map "
                    "to (batch, classes) after the cut"
                )
        return self.add(names, active=False, classes=classes)

    def index(self, name: str | int) -> int:
        if isinstance(name, int) and not isinstance(name, bool) and 0 <= name < len(self.names):
            return name
        if name not in self.names:
            raise ConfigError(f"expert {name!r}: expected one of {self.names}")
        return self.names.index(str(name))

    def set_active(self, name: str | int, on: bool) -> None:
        self.router.set_active(self.index(name), on)

    def take_over(self, facts: Facts) -> None:
        """Take names, flags and expansions over from a save."""
        flags = facts.trained or [bool(row.any()) for row in self.router.rows]
        self.names, self.trained = list(facts.names), list(flags)
        self.expansions, self.frozen = list(facts.expansions), set(facts.frozen)
        self.train_newest()

    def after_loading(self, facts: Facts) -> None:
        """Tensors were loaded, from a save with these facts."""
        self.router.after_loading(facts.told, facts.solved)

    def facts(self) -> dict[str, Any]:
        """What a save says about the experts; see `checkpoint.Facts`."""
        return {
            "names": self.names,
            "trained": self.trained,
            "expansions": self.expansions,
            "classes": [] if self.head is None else self.head.classes,
            "frozen": sorted(self.frozen),
            **self.router.facts(),
            **({"quantized": dtype} if (dtype := low_precision.quantized(self.sites)) else {}),
        }

    def become(self, facts: Facts) -> None:
        """Have experts like those of a save, with any values. Raises ConfigError where none can be
        added."""
        change = len(facts.names) - len(self)
        if change > 0:
            low_precision.require_not_quantized(self.sites, f"loading {len(facts.names)} experts")
        if change and self._fixed:
            raise ConfigError(f"{len(facts.names)} experts are to be loaded: {self._fixed}")
        if change < 0:
            self._store.require_whole(f"loading {len(facts.names)} experts into {len(self)}")
        for _ in range(-change):
            self.remove_last()
        if change > 0:
            self.add([None] * change, active=False)
        if self.head is not None and self.head.classes != facts.classes:
            self._store.require_whole(f"loading columns of a head, {facts.classes}")
            self.head.widen_all(facts.classes)
        low_precision.become(self.sites, facts.quantized)
        self.take_over(facts)

    def remove(self, *names: str | int) -> None:
        """Remove experts; the others stay bitwise what they are. Raises ConfigError for the only one,
        and where the router would be left with none that is on."""
        indices = sorted({self.index(name) for name in names}, reverse=True)
        self._require_others(len(indices))
        self._require_open(f"remove({', '.join(map(repr, names))})")
        on = self.router.active_indices()
        if len(indices) > 1 and self.router.needs_one() and set(on) <= set(indices):
            raise ConfigError(
                f"{', '.join(self.names[e] for e in on)} are the last ones that are on, and the "
                "router has no base: activate another first"
            )
        for index in indices:
            self.router.set_active(index, False)
            for site in self.sites:
                site.remove(index)
            self.router.remove(index)
            self._drop(index)
        self.router.settle()

    def remove_last(self) -> None:
        """Remove the newest expert; the router is bitwise what it was before that was added. Raises
        ConfigError as `remove`."""
        self._require_others()
        self._require_open("remove_last()")
        self.router.remove_last()
        for site in self.sites:
            site.remove_last()
        self._drop(len(self.names) - 1)
        self.router.settle()

    def _require_open(self, what: str) -> None:
        if self._fixed:
            raise ConfigError(f"{what}: the number of these experts is fixed: {self._fixed}")

    def _require_others(self, gone: int = 1) -> None:
        if len(self) <= gone:
            raise ConfigError("the only expert cannot be removed: use to_dense()")

    def _drop(self, index: int) -> None:
        self.frozen.discard(self.names[index])
        for of_each in (self.names, self.trained, self.expansions):
            del of_each[index]
        self.train_newest()

    def rename(self, name: str | int, new: str) -> None:
        """Give an expert another name. Raises ConfigError for one that is taken."""
        index = self.index(name)
        if not (isinstance(new, str) and new) or new in self.names:
            raise ConfigError(f"rename to {new!r}: expected a name that no expert has")
        if self.names[index] in self.frozen:
            self.frozen ^= {self.names[index], new}
        self.names[index] = new

    def freeze(self, name: str | int, frozen: bool) -> None:
        """Keep an expert's parameters as they are in training, or (False) train it again if it is
        among the newest. Its row of the router stays trainable, as those of older experts do."""
        of = self.names[self.index(name)]
        self.frozen = self.frozen | {of} if frozen else self.frozen - {of}
        self.train_newest()

"""How a converted model's analytic router comes to know whose rows are whose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..config import is_int, require
from ..errors import ConfigError, InputError
from ..frontend.own_texts import own_texts
from ..routing.plan import Planner, RoutingPlan
from ..utils.warn import warn
from .expert_methods import ExpertMethods
from .saving.checkpoint import Facts
from .saving.state_dict import ADDED

CHUNK = 64  # texts that are written at once


class RouterFit(ExpertMethods):
    """The methods that tell an analytic router its rows, and what training does without them.

    In training mode the newest expert gets every row with gate 1, and each forward with gradients
    adds its rows to the expert's sums; going to eval solves the router.
    """

    _warned = False
    device: Any
    bound: Callable[..., tuple[dict[str, Any], Any]]
    graph_for: Callable[..., tuple[Any, list[Any]]]
    generate: Callable[..., Any]

    def fit_router(self, expert: str | int | None, batches: Iterable[Any]) -> None:
        """Add samples of an expert to an analytic router's sums, and solve the router again.

        It is needed only where training does not do it: for an expert that is trained within
        `use_expert`, or by another program. The first call for an expert replaces what training
        added to its sums, and training adds nothing to them from then on.

        expert: name or index; None for the frozen model, with samples of its original task.
        batches: inputs in the form of `example_inputs` (tensor, tuple or dict).

        Only sums are kept, over all calls and in any order; if a batch fails, nothing is added.
        Raises ConfigError unless the router is analytic (``TokenRouter(fit="analytic")``), and
        InputError for features that are not finite.
        """
        router, index = self.router, None if expert is None else self._experts.index(expert)
        router.require_analytic()
        total: torch.Tensor | None = None
        for products in self._products(batches):
            total = products if total is None else total.add_(products)
        if total is not None:
            router.tell(index, total)  # type: ignore[operator]
        if index is not None:
            self._experts.trained[index] = True

    @torch.no_grad()
    def _products(self, batches: Iterable[Any]) -> Iterator[torch.Tensor]:
        """The router's products of each batch, whose features an eval graph computes."""
        if isinstance(batches, (torch.Tensor, Mapping)):
            raise InputError(
                f"batches={type(batches).__name__}: this is one batch; pass a list of batches"
            )
        router, found = self.router, []

        def look(features: torch.Tensor, mask: Any) -> tuple[RoutingPlan, None]:
            with torch.autocast(features.device.type, enabled=False):
                found.append(router.products(features, mask))  # type: ignore[operator]
            return router.without_experts(features), None

        for batch in batches:
            here = pytree.tree_map_only(torch.Tensor, lambda t: t.to(self.device), batch)
            arguments, _ = self.bound((), self._compiler.host.arguments(here), training=False)
            graph, leaves = self.graph_for(arguments, training=False)
            graph.plan(leaves, look)
            yield found.pop()

    def remember(
        self, batches: Iterable[Any] | None = None, *, texts: int = 256, length: int = 64,
        seed: int = 0,
    ) -> None:  # fmt: skip
        """Tell an analytic router what the model could do before it was converted, so that such
        rows stay the frozen model's. Once is enough, before or after training.

        batches: inputs as for `fit_router`. None: texts that the frozen model writes itself, as
            many as `texts` with up to `length` tokens, sampled at temperature 1 under this seed.
        texts: number of texts.
        length: most tokens of a text.
        seed: of the sampling.

        Calls add up. Raises ConfigError for wrong values, for a router that is trained, and for
        batches=None where the model is no language model.
        """
        self.router.require_analytic()
        if batches is None:
            for name, value in (("texts", texts), ("length", length)):
                require(is_int(value) and value >= 2, name, value, "an int >= 2")
            batches = self._own_texts(texts, length, seed)
        self.fit_router(None, batches)

    def _own_texts(self, texts: int, length: int, seed: int) -> list[dict[str, torch.Tensor]]:
        if not getattr(self._compiler.host, "is_causal_lm", False):
            raise ConfigError(
                "remember(): only a language model writes texts itself; pass batches with samples "
                "of what the model could do before"
            )
        devices = [self.device] if self.device.type == "cuda" else []
        training = self.training
        self.eval()
        try:
            with self.disable_experts(), torch.random.fork_rng(devices):
                torch.manual_seed(seed)
                sizes = [min(CHUNK, texts - at) for at in range(0, texts, CHUNK)]
                return [
                    own_texts(self.generate, self.config, self.device, n, length) for n in sizes
                ]
        finally:
            self.train(training)

    # -- training ---------------------------------------------------------------------------------

    def learning_planner(self, state: Any, counts: bool, keeps: bool) -> Planner | None:
        """What makes the plan of a call in training mode where one expert gets every row; else None.

        counts: the call is a forward. keeps: the router's state after these rows is asked for.
        Raises ConfigError where several experts are trained at once whose rows nobody tells apart.
        """
        grad = torch.is_grad_enabled()
        expert = self._experts.learner(grad)
        if expert is None:
            return None
        router: Any = self.router
        counts = counts and grad and not router.told[expert]
        if counts and not self.recipe.freeze:
            raise ConfigError(
                "freeze=False: training changes the features at the cut, from which an analytic "
                "router is solved. Convert with freeze=True; or train within moe.use_expert(name) "
                "and call moe.fit_router(name, batches) afterwards"
            )
        return lambda features, mask: router.learn(expert, features, mask, state, counts, keeps)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """For DistributedDataParallel, which would send them before every forward: sums are those of
        all processes already; which experts are on is alike in all, and on the CPU, of which the
        backends of GPUs send nothing."""
        names = [name for name, _ in self.router.named_buffers()]
        kept = [n for n in names if "moments." in n or n in ("active", "pending")]
        return [f"{ADDED}router.{name}" for name in kept]

    def settle_router(self) -> None:
        """Solve an analytic router from what training added to its sums."""
        router: Any = self.router
        if getattr(router, "solved", True):
            return
        router.settle()
        if router.forgets_base and not self._warned:
            self._warned = True
            writes = getattr(self._compiler.host, "is_causal_lm", False)
            warn(
                "the router knows no rows of what the model did before it was converted, so all "
                "rows go to experts: call moe.remember(batches) with samples of that"
                + (", or moe.remember() for texts that the model writes itself" if writes else "")
            )

    def after_loading(self, facts: Facts) -> None:
        """Tensors were loaded, from a save with these facts, perhaps in the middle of training."""
        self._experts.after_loading(facts)
        if not self.training:
            self.settle_router()

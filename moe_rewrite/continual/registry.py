"""The methods of learning a stream, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import nn

from ..config import LoRAExperts, TokenRouter
from ..convert import convert, load
from ..converted.model import MoEModel
from ..converted.report import Report
from ..errors import ConfigError
from .features import FeatureCache
from .learner import Learner
from .methods.adapters import EWC, Adapters, Joint, LwF, OLoRA, Oracle, Replay
from .methods.any_ssr import AnySSR
from .methods.arrow import Arrow
from .methods.base import Method
from .methods.fine_tuning import FineTuning
from .methods.osf import OSF
from .methods.ranpac import RanPAC
from .problem import Problem
from .training import Training


@dataclass(frozen=True)
class Setup:
    """The options that the methods of one comparison share.

    split: as for `convert`. ``"auto"`` is half of the FLOPs: when a stream begins, only the base task
        and the first task are known, and these are told apart nearly everywhere, which says nothing
        of later tasks (docs/measurements/continual.md, "Where to cut").
    rank, alpha: as for LoRAExperts. Adapters of other methods have the experts' sites, rank, alpha.
    granularity, top_k: of the TokenRouter; None for the default.
    replay: share of older tasks' items kept by the methods that keep any.
    balanced: keep equally many items of each task; otherwise a reservoir.
    training: how each task is trained.
    router: further options of the TokenRouter.
    learner: further options of the Learner.
    cache: folder of the FeatureCache; True: in memory; False: none.
    """

    split: int | float | str = "auto"
    rank: int = 8
    alpha: float = 16.0
    granularity: str | None = None
    top_k: int | None = None
    replay: float = 0.2
    balanced: bool = True
    training: Training = field(default_factory=Training)
    router: dict[str, Any] = field(default_factory=dict)
    learner: dict[str, Any] = field(default_factory=dict)
    cache: str | bool = False


def _converted(
    dense: nn.Module, setup: Setup, fit: str, example: Any, dry_run: bool = False
) -> MoEModel | Report:
    chosen = setup.granularity or _granularity(dense)
    router = TokenRouter(fit=fit, granularity=chosen, top_k=setup.top_k, **setup.router)  # type: ignore[arg-type]
    experts = LoRAExperts(rank=setup.rank, alpha=setup.alpha)
    return convert(
        dense, split=setup.split, router=router, experts=experts, example_inputs=example,
        dry_run=dry_run,
    )  # fmt: skip


def _granularity(dense: nn.Module) -> str:
    """Causal models take the running mean of their prefix, others the whole sequence."""
    return "prefix" if getattr(dense, "generation_config", None) is not None else "sequence"


def _learner(fit: str, kind: type[Learner] = Learner, **router: Any) -> Callable[..., Method]:
    """router: options of the TokenRouter that the method has, whatever the setup's are."""

    def build(
        dense: nn.Module, problem: Problem, setup: Setup, example: Any, saved: Path | None
    ) -> Method:
        top_k = router.get("top_k", setup.top_k)
        own = {k: v for k, v in router.items() if k != "top_k"}
        setup = replace(setup, top_k=top_k, router=setup.router | own)
        made = load(saved, dense, example) if saved else _converted(dense, setup, fit, example)
        moe = cast(MoEModel, made)
        cache = None
        if setup.cache:
            cache = FeatureCache(moe, None if setup.cache is True else setup.cache)
        return kind(
            moe, problem, setup.training, replay=setup.replay, balanced=setup.balanced,
            cache=cache, **setup.learner,
        )  # fmt: skip

    return build


def _baseline(kind: Any) -> Callable[..., Method]:
    def build(
        dense: nn.Module, problem: Problem, setup: Setup, example: Any, saved: Path | None
    ) -> Method:
        given: dict[str, Any] = {"replay": setup.replay, "balanced": setup.balanced}
        if issubclass(kind, Adapters):
            given |= {
                "sites": _sites(dense, setup, example),
                "rank": setup.rank,
                "alpha": setup.alpha,
            }
        return kind(dense, problem, setup.training, **given)

    return build


_SITES: WeakKeyDictionary[nn.Module, dict[Any, list[str]]] = WeakKeyDictionary()


def _sites(dense: nn.Module, setup: Setup, example: Any) -> list[str]:
    """The sites where experts would be; found once for all methods of one comparison."""
    known = _SITES.setdefault(dense, {})
    key = (setup.split, setup.granularity)
    if key not in known:
        report = cast(Report, _converted(dense, setup, "analytic", example, dry_run=True))
        known[key] = [name for name, _, _ in report.sites]
    return known[key]


METHODS: dict[str, Callable[..., Method]] = {
    "pmoe": _learner("analytic"),
    "pmoe-gradient": _learner("gradient"),
    "anyssr": _learner("analytic", AnySSR, base=False, top_k=1),
    "full": _baseline(FineTuning),
    "lora": _baseline(Adapters),
    "replay": _baseline(Replay),
    "ewc": _baseline(EWC),
    "lwf": _baseline(LwF),
    "olora": _baseline(OLoRA),
    "osf": _baseline(OSF),
    "arrow": _baseline(Arrow),
    "ranpac": _baseline(RanPAC),
    "oracle": _baseline(Oracle),
    "joint": _baseline(Joint),
}


def make_method(
    name: str, dense: nn.Module, problem: Problem, setup: Setup, example: Any = None,
    saved: Path | None = None,
) -> Method:  # fmt: skip
    """Make a method by name. Raises ConfigError for an unknown name.

    example: `example_inputs` of `convert`; None: inferred.
    saved: folder of the converted model of an earlier run, to resume it.
    """
    if name not in METHODS:
        raise ConfigError(f"method {name!r}: expected one of {', '.join(METHODS)}")
    return METHODS[name](dense, problem, setup, example, saved)

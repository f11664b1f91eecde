"""What a user can ask for: routers, experts and the recipes (modes) that combine them.

Everything here is a frozen dataclass that checks itself, so a wrong value fails before any work.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from .errors import ConfigError

Granularity = Literal["token", "prefix", "sequence"]


def _require(ok: bool, what: str, value: object, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{what}={value!r}: expected {expected}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class TokenRouter:
    """Route every position of a sequence by a linear softmax gate on the features at the cut.

    top_k: experts kept per row, gates renormalised over them; None keeps all (dense gate).
    granularity: what a gate reads. ``"token"``: the position itself; ``"prefix"``: the mean of the
        unmasked positions up to and including it (causal, so it can be decoded step by step);
        ``"sequence"``: the mean of all unmasked positions (not for causal models).
    base: whether output 0 means "the frozen model", with the constant logit 0. A softmax does not
        change when one number is added to all logits, so this output needs no parameters.
    normalize: divide the features by their root mean square before they are read, so that the
        gate's scale does not depend on the depth of the cut.
    """

    top_k: int | None = None
    granularity: Granularity = "token"
    base: bool = True
    normalize: bool = True

    def __post_init__(self) -> None:
        k = self.top_k
        _require(k is None or (_is_int(k) and k >= 1), "TokenRouter top_k", k, "None or int >= 1")
        _require(
            self.granularity in ("token", "prefix", "sequence"),
            "TokenRouter granularity", self.granularity, "'token', 'prefix' or 'sequence'",
        )  # fmt: skip
        for name in ("base", "normalize"):
            value = getattr(self, name)
            _require(isinstance(value, bool), f"TokenRouter {name}", value, "True or False")


def fit_router(spec: TokenRouter | None, ndim: int, causal: bool) -> TokenRouter:
    """The router for features of `ndim` dimensions: the one asked for, or the one that fits (None).

    Raises ConfigError where the one asked for cannot work.
    """
    if spec is None:
        return TokenRouter(granularity="prefix" if causal else "sequence")
    if causal and spec.granularity == "sequence":
        raise ConfigError(
            "TokenRouter granularity='sequence': the model is causal, and a mean over the whole "
            "sequence would look ahead; use 'prefix' or 'token'"
        )
    if ndim == 4 and spec.granularity != "sequence":
        raise ConfigError(
            f"TokenRouter granularity={spec.granularity!r}: the cut carries a feature map, for "
            "which only 'sequence' (one gate per sample) is there"
        )
    return spec


@dataclass(frozen=True)
class LoRAExperts:
    """Low-rank experts: each adds ``alpha / rank * B @ A`` to a frozen linear site, times its gate.

    rank: rows of A and columns of B, per expert.
    alpha: numerator of the scale (LoRA, arXiv 2106.09685, section 4.1).
    sites: ``"all"`` for every linear site of the deep segment but the output head,
        ``"all+head"`` for the head too, or a tuple of name endings (``("q_proj", "v_proj")``).
    """

    rank: int = 8
    alpha: float = 16.0
    sites: str | tuple[str, ...] = "all"

    def __post_init__(self) -> None:
        rank, alpha, sites = self.rank, self.alpha, self.sites
        _require(_is_int(rank) and rank >= 1, "LoRAExperts rank", rank, "int >= 1")
        number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool) and alpha > 0
        _require(number, "LoRAExperts alpha", alpha, "a number > 0")
        if isinstance(sites, list):
            object.__setattr__(self, "sites", tuple(sites))
        named = isinstance(self.sites, tuple) and all(isinstance(s, str) for s in self.sites)
        _require(
            self.sites in ("all", "all+head") or (named and len(self.sites) > 0),
            "LoRAExperts sites", sites, "'all', 'all+head' or a list of module name endings",
        )  # fmt: skip

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def wants(self, module: str) -> bool:
        """Whether a list of endings selects this module path (``"all..."`` selects every one)."""
        if isinstance(self.sites, str):
            return True
        return any(module == s or module.endswith("." + s) for s in self.sites)


@dataclass(frozen=True)
class Recipe:
    """Everything about a conversion that is decided before the model is looked at."""

    mode: str
    split: int | float | str
    router: TokenRouter | None  # None: chosen from what the cut carries
    experts: LoRAExperts
    num_experts: int
    batch_norm: Literal["frozen", "update"]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(saved: dict[str, Any]) -> Recipe:
        """Raises TypeError, KeyError or ConfigError where `saved` is no recipe."""
        return make_recipe(
            **{k: saved[k] for k in ("mode", "split", "num_experts", "batch_norm")},
            router=TokenRouter(**saved["router"]), experts=LoRAExperts(**saved["experts"]),
        )  # fmt: skip


ROUTERS = {"auto": None, "token": TokenRouter()}
MODES = ("pmoe",)
BACKENDS = ("auto", "reference")


def make_recipe(
    mode: str = "pmoe",
    split: int | float | str = "auto",
    router: str | TokenRouter = "auto",
    experts: LoRAExperts | None = None,
    num_experts: int | None = None,
    backend: str = "auto",
    batch_norm: str = "frozen",
) -> Recipe:
    """Check the arguments of `convert` and return them as one Recipe. Raises ConfigError."""
    _require(mode in MODES, "mode", mode, " or ".join(map(repr, MODES)))
    _require(backend in BACKENDS, "backend", backend, " or ".join(map(repr, BACKENDS)))
    _require(batch_norm in ("frozen", "update"), "batch_norm", batch_norm, "'frozen' or 'update'")
    if isinstance(router, str) and router in ROUTERS:
        router_spec = ROUTERS[router]
    else:
        _require(
            isinstance(router, TokenRouter), "router", router, "'auto', 'token' or a TokenRouter"
        )
        router_spec = router  # type: ignore[assignment]
    experts = LoRAExperts() if experts is None else experts
    _require(isinstance(experts, LoRAExperts), "experts", experts, "None or LoRAExperts(...)")
    count = 1 if num_experts is None else num_experts
    _require(_is_int(count) and count >= 1, "num_experts", num_experts, "None or int >= 1")
    return Recipe(mode, split, router_spec, experts, count, batch_norm)  # type: ignore[arg-type]

"""A Recipe: the arguments of convert(), checked, before the model is looked at."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from ..config import (
    FFNExperts,
    Fit,
    LoRAExperts,
    PatchRouter,
    RegionExperts,
    RouterSpec,
    TokenRouter,
    is_int,
    require,
)
from ..experts.carved import CarvedExperts

Experts = Any  # an instance of one of the classes in EXPERTS
EXPERTS: dict[str, type] = {
    k.__name__: k for k in (LoRAExperts, FFNExperts, CarvedExperts, RegionExperts)
}


@dataclass(frozen=True)
class Recipe:
    """The options of a conversion, before the model is looked at; see `convert`."""

    mode: str
    split: int | float | str
    router: RouterSpec | None  # None: chosen from what the cut carries
    experts: Experts
    num_experts: int
    batch_norm: Literal["frozen", "update"]
    freeze: bool
    backend: str = "auto"

    @property
    def default_fit(self) -> Fit:
        """How a TokenRouter that nobody asked for is fitted: in closed form where it can be, since
        that forgets least (docs/measurements/continual.md)."""
        one_by_one = isinstance(self.experts, LoRAExperts) and self.num_experts == 1
        return "analytic" if self.mode == "pmoe" and one_by_one and self.freeze else "gradient"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; routers and experts have their class as ``kind``."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return plain | {k: _with_kind(plain[k]) for k in ("router", "experts")}

    @staticmethod
    def from_dict(saved: dict[str, Any]) -> Recipe:
        """Raises TypeError, KeyError or ConfigError if `saved` is not a valid recipe."""
        plain = ("mode", "split", "num_experts", "batch_norm", "freeze")
        return make_recipe(
            **{k: saved[k] for k in plain},
            backend=saved.get("backend", "auto"),
            router=_of_kind(saved["router"], TokenRouter, PatchRouter),
            experts=_of_kind(_as_now(saved["experts"]), *EXPERTS.values()),
        )


def gates_sum_to_one(experts: Experts, router: RouterSpec) -> bool:
    """Whether the gates of every row do."""
    sigmoid = getattr(experts, "score", "softmax") == "sigmoid"
    return router.sums_to_one and (not sigmoid or getattr(router, "gate", "") == "selected")


def require_trainable(recipe: Recipe) -> None:
    """Raises ConfigError for a router that gets no gradient however it is trained."""
    router = recipe.router
    if not isinstance(router, TokenRouter) or router.top_k != 1 or router.fit != "gradient":
        return
    if isinstance(recipe.experts, CarvedExperts):  # its gradient is made, see `CarveRule`
        return
    one = "TokenRouter top_k=1 with fit='gradient'"
    require(
        router.gate == "all", f"{one}: gate", router.gate,
        "'all', since a softmax over the one output chosen is constant (Switch Transformer, arXiv "
        "2101.03961, section 2.1, takes it over all)",
    )  # fmt: skip
    require(
        router.init > 0, f"{one}: init", router.init,
        "a number > 0 (0.5, say), since with equal logits every row goes to the first output",
    )  # fmt: skip


def _with_kind(spec: Any) -> dict[str, Any]:
    saved = {
        f.name: getattr(spec, f.name) for f in fields(spec) if f.compare
    }  # others are no options
    return {"kind": type(spec).__name__, **saved}


def _as_now(experts: dict[str, Any]) -> dict[str, Any]:
    """Saves of versions without a router a layer do not say where their router is: at the cut."""
    return {"router": "cut"} | experts if experts["kind"] == FFNExperts.__name__ else experts


def _of_kind(saved: dict[str, Any], *kinds: type) -> Any:
    by_name = {k.__name__: k for k in kinds}
    return by_name[saved["kind"]](**{k: v for k, v in saved.items() if k != "kind"})


ROUTERS: dict[str, RouterSpec | None] = {
    "auto": None, "token": TokenRouter(), "patch": PatchRouter(),
}  # fmt: skip
MADE_BY: dict[str, type] = {"pmoe": LoRAExperts, "upcycle": FFNExperts, "carve": CarvedExperts}
UPCYCLE = TokenRouter(
    top_k=2, base=False, init=0.5
)  # random, or all rows would go to the first two
BY_LAYER = TokenRouter(top_k=2, base=False, normalize=False, init=0.5)
BACKENDS = ("auto", "reference", "dense", "grouped")


def make_recipe(
    mode: str = "pmoe",
    split: int | float | str = "auto",
    router: str | RouterSpec = "auto",
    experts: Experts | None = None,
    num_experts: int | None = None,
    backend: str = "auto",
    batch_norm: str = "frozen",
    freeze: bool | None = None,
) -> Recipe:
    """Check the arguments of `convert` and return them as one Recipe. Raises ConfigError."""
    require(mode in MADE_BY, "mode", mode, " or ".join(map(repr, MADE_BY)))
    require(backend in BACKENDS, "backend", backend, " or ".join(map(repr, BACKENDS)))
    require(batch_norm in ("frozen", "update"), "batch_norm", batch_norm, "'frozen' or 'update'")
    freeze = mode != "upcycle" if freeze is None else freeze
    require(isinstance(freeze, bool), "freeze", freeze, "None, True or False")
    spec = ROUTERS.get(router) if isinstance(router, str) else router
    named = isinstance(router, str) and router in ROUTERS
    require(
        named or isinstance(spec, (TokenRouter, PatchRouter)), "router", router,
        "'auto', 'token', 'patch', a TokenRouter or a PatchRouter",
    )  # fmt: skip
    upcycle = mode == "upcycle"
    experts = experts or MADE_BY[mode]()
    require(
        type(experts) in EXPERTS.values(), "experts", experts,
        f"None, or one of {', '.join(f'{name}(...)' for name in EXPERTS)}",
    )  # fmt: skip
    require(
        isinstance(experts, MADE_BY[mode]) or mode == "pmoe", "experts", experts,
        f"{MADE_BY[mode].__name__}(...) with mode={mode!r}",
    )  # fmt: skip
    if isinstance(experts, CarvedExperts):
        return _carving(mode, split, router, experts, num_experts, backend, batch_norm, freeze)
    spec = UPCYCLE if upcycle and router == "token" else spec
    if isinstance(experts, FFNExperts):
        where = experts.router or ("layer" if upcycle and router in ("auto", "token") else "cut")
        experts = replace(experts, router=where)
        spec = _router_of_layers(router, experts) if experts.by_layer else spec
        _require_options_of_layers(experts, spec)
    if getattr(experts, "on_patches", False):
        require(
            not isinstance(spec, TokenRouter), "router", router,
            f"'patch' or a PatchRouter, since {type(experts).__name__} work on patches",
        )  # fmt: skip
        spec = spec or PatchRouter()
    count = num_experts
    if count is None:
        count = getattr(experts, "num", None) or (8 if upcycle else 1)
        count *= getattr(experts, "granularity", 1)
    require(is_int(count) and count >= 1, "num_experts", num_experts, "None or int >= 1")
    cut = getattr(experts, "granularity", 1)
    require(count % cut == 0, "num_experts", count, f"a multiple of granularity={cut}")
    return Recipe(mode, split, spec, experts, count, batch_norm, freeze, backend)  # type: ignore[arg-type]


def _carving(
    mode: str, split: int | float | str, router: str | RouterSpec, experts: CarvedExperts,
    num_experts: int | None, backend: str, batch_norm: str, freeze: bool,
) -> Recipe:  # fmt: skip
    """The recipe of carved experts, whose options say all of their routers. Raises ConfigError."""
    require(mode == "carve", "mode", mode, "'carve' with CarvedExperts(...)")
    require(
        router in ("auto", "token", experts.router), "router", router,
        "'auto' with CarvedExperts(...), whose routers are fitted; its active and shared say what they "
        "take",
    )  # fmt: skip
    require(
        num_experts in (None, experts.experts), "num_experts", num_experts,
        f"None, or the {experts.experts} of CarvedExperts(experts={experts.experts})",
    )  # fmt: skip
    split = 0 if split == "auto" else split  # the whole model
    return Recipe(
        mode, split, experts.router, experts, experts.experts, batch_norm, freeze, backend  # type: ignore[arg-type]
    )  # fmt: skip


def _require_options_of_layers(experts: FFNExperts, router: RouterSpec | None) -> None:
    """Raises ConfigError for options that only a router a layer has, and a top k that would take
    parts of copies."""
    plain = FFNExperts()
    for name in ("score", "granularity", "reinit", "scaled", "shared"):
        require(
            experts.by_layer or getattr(experts, name) == getattr(plain, name),
            f"FFNExperts {name}", getattr(experts, name),
            f"{getattr(plain, name)!r} with a router at the cut; FFNExperts(router='layer') has others",
        )  # fmt: skip
    top_k = getattr(router, "top_k", None)
    require(
        (top_k or 0) % experts.granularity == 0, "TokenRouter top_k", top_k,
        f"a multiple of granularity={experts.granularity}, which takes whole copies at the start",
    )  # fmt: skip


def _router_of_layers(router: str | RouterSpec, experts: FFNExperts) -> TokenRouter:
    """The TokenRouter that every region has. Raises ConfigError for one that only works at the cut."""
    if isinstance(router, str):
        require(
            router in ("auto", "token"), "router", router,
            "'auto', 'token' or a TokenRouter with FFNExperts(router='layer')",
        )  # fmt: skip
        return replace(BY_LAYER, top_k=2 * experts.granularity)  # the parts of two copies
    require(
        isinstance(router, TokenRouter), "router", router,
        "a TokenRouter with FFNExperts(router='layer'); patches are chosen at the cut only, with "
        "FFNExperts(router='cut')",
    )  # fmt: skip
    free = {name: getattr(router, name) for name in ("top_k", "gate", "init")}
    plain = replace(BY_LAYER, **free)
    odd = [f.name for f in fields(plain) if getattr(router, f.name) != getattr(plain, f.name)]
    for name in odd[:1]:
        require(
            False, f"TokenRouter {name}", getattr(router, name),
            f"{getattr(plain, name)!r} with FFNExperts(router='layer'), whose routers are linear "
            "maps of each row; a router with other features is at the cut, with "
            "FFNExperts(router='cut')",
        )  # fmt: skip
    return plain

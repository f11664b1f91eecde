"""What a user can ask for: routers and experts.

Everything here is a frozen dataclass that checks itself, so a wrong value fails before any work.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from .utils.checks import choose, ends_in, is_int, is_number, name_endings, named_dtype, require

Granularity = Literal["token", "prefix", "sequence"]
Fit = Literal["gradient", "analytic"]


@dataclass(frozen=True)
class TokenRouter:
    """Route every position of a sequence by a linear softmax gate on the features at the cut.

    Raises ConfigError for a wrong value, as every class here does.

    top_k: experts kept per row; None keeps all (dense gate).
    granularity: what the gate reads. ``"token"``: the position itself; ``"prefix"``: the mean of
        the unmasked positions up to and including it (causal, so it can be decoded step by step);
        ``"sequence"``: the mean of all unmasked positions (not for causal models).
    base: whether output 0 stands for the frozen model, with the constant logit 0. A softmax does
        not change when one number is added to all logits, so this output needs no parameters.
    normalize: divide the features by their root mean square first, so that the scale of the
        logits does not depend on the depth of the cut.
    fit: ``"gradient"``: trained with the experts. ``"analytic"``: solved in closed form from the
        rows that each expert is trained on, by ridge regression on random features (RanPAC, arXiv
        2307.02251, section 4), `convert`'s default where it works. In training the newest expert gets every row with gate 1. The frozen
        model's output is fitted to the rows that `MoEModel.remember` gives.
    projection: number of random features of an analytic gate.
    ridge: regularisation of an analytic gate, as a share of the Gram matrix's mean diagonal.
    sharpness: an analytic gate's scores, near 1 for the right expert and near 0 for the others,
        are multiplied by this before the softmax.
    prior: ``prior / positions`` is added to the frozen model's score in an analytic prefix gate,
        since a short prefix says little.
    sums: an analytic gate keeps a matrix in host memory for ``"each"`` expert, so that `remove` is
        exact; or three ``"shared"`` ones, in which a removed expert's rows become the frozen model's.
    pool: a feature map at the cut is read as the means of its pool x pool cells, a volume as those
        of pool x pool x pool.
    gate: softmax over the top k (``"selected"``), or over all outputs (``"all"``), in which case
        the gates of a row do not sum to one.
    policy: ``"token"``: a row chooses its experts; ``"expert"``: each expert chooses its best
        ``capacity * S / E`` of a sample's S rows by their softmax over E experts (expert choice,
        arXiv 2202.09368, section 3.2); needs base=False and a model that is not causal.
    capacity: mean number of experts a row, under expert choice.
    init: standard deviation of the logits at the start, for features of unit root mean square.
    """

    top_k: int | None = None
    granularity: Granularity = "token"
    base: bool = True
    normalize: bool = True
    fit: Fit = "gradient"
    projection: int = 1024
    ridge: float = 1e-3
    sharpness: float = 12.0
    prior: float = 2.0
    sums: Literal["each", "shared"] = "each"
    pool: int = 4
    gate: Literal["selected", "all"] = "selected"
    policy: Literal["token", "expert"] = "token"
    capacity: float = 2.0
    init: float = 0.0

    def __post_init__(self) -> None:
        k = self.top_k
        require(k is None or (is_int(k) and k >= 1), "TokenRouter top_k", k, "None or int >= 1")
        choose(self, "granularity", "token", "prefix", "sequence")
        choose(self, "fit", "gradient", "analytic")
        choose(self, "sums", "each", "shared")
        choose(self, "gate", "selected", "all")
        choose(self, "policy", "token", "expert")
        if self.policy == "expert":
            plain = self.granularity == "token" and self.fit == "gradient" and k is None
            require(
                plain and not self.base, "TokenRouter policy", self.policy,
                "base=False, top_k=None, granularity='token' and fit='gradient' beside 'expert'",
            )  # fmt: skip
        n = self.projection
        require(is_int(n) and n >= 1, "TokenRouter projection", n, "int >= 1")
        ok = is_int(self.pool) and self.pool >= 1
        require(ok, "TokenRouter pool", self.pool, "int >= 1")
        for name in ("prior", "init"):
            value = getattr(self, name)
            ok = is_number(value) and value >= 0
            require(ok, f"TokenRouter {name}", value, "a number >= 0")
        for name in ("ridge", "sharpness", "capacity"):
            value = getattr(self, name)
            ok = is_number(value) and value > 0
            require(ok, f"TokenRouter {name}", value, "a number > 0")
        for name in ("base", "normalize"):
            value = getattr(self, name)
            require(isinstance(value, bool), f"TokenRouter {name}", value, "True or False")

    @property
    def sums_to_one(self) -> bool:
        """Whether the gates of every row sum to one."""
        return self.policy == "token" and (self.gate == "selected" or self.top_k is None)


@dataclass(frozen=True)
class PatchRouter:
    """Expert choice over patches: each expert scores every patch and takes its best per sample
    (pMoE, arXiv 2306.04073, equations 2 and 3).

    grid: g, for g x g patches over the feature map at the cut or over a ViT's patch tokens. None
        takes the largest g <= 8 that divides the map; for tokens, their own grid. Where g does not
        divide a side, patches differ in size by one: patch i covers rows
        ``i * H // g .. (i + 1) * H // g``, and smaller ones are padded with zeros at the bottom
        and right before they are scored.
    per_expert: l, the number of patches that each expert takes of each sample; None takes a
        quarter of them. Ties go to the first patch in row-major order.
    gate: ``"selected"``: softmax of the scores over the l patches taken; ``"all"``: softmax over
        all n patches; ``"hard"``: 1.
    scale: ``"mean-one"`` multiplies softmax gates by l, so that they are 1 where scores are equal;
        ``"paper"`` leaves them.
    features: ``"flat"`` scores every value of a patch; ``"pooled"`` its mean over positions.
    normalize: divide the features by their root mean square over the sample before scoring.
    init: standard deviation of the scores at the start, for features of unit root mean square;
        with 0 all scores are equal.
    prefix_tokens: tokens before a ViT's patch tokens (class, registers); every expert gets them,
        with the mean of its gates. None: those that the map of patches leaves.
    """

    grid: int | None = None
    per_expert: int | None = None
    gate: Literal["selected", "all", "hard"] = "selected"
    scale: Literal["mean-one", "paper"] = "mean-one"
    features: Literal["flat", "pooled"] = "flat"
    normalize: bool = True
    init: float = 0.01
    prefix_tokens: int | None = None

    granularity: ClassVar[str] = "token"
    policy: ClassVar[str] = "patch"
    top_k: ClassVar[None] = None
    sums_to_one: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, low in (("grid", 1), ("per_expert", 1), ("prefix_tokens", 0)):
            n = getattr(self, name)
            ok = n is None or (is_int(n) and n >= low)
            require(ok, f"PatchRouter {name}", n, f"None or int >= {low}")
        choose(self, "gate", "selected", "all", "hard")
        choose(self, "scale", "mean-one", "paper")
        choose(self, "features", "flat", "pooled")
        require(
            isinstance(self.normalize, bool), "PatchRouter normalize", self.normalize,
            "True or False",
        )  # fmt: skip
        require(
            is_number(self.init) and self.init >= 0, "PatchRouter init", self.init, "a number >= 0"
        )
        if self.grid is not None and self.per_expert is not None:
            self._require_enough(self.grid**2)

    def _require_enough(self, patches: int) -> None:
        require(
            self.per_expert is None or self.per_expert <= patches,
            "PatchRouter per_expert", self.per_expert, f"at most the grid's {patches} patches",
        )  # fmt: skip

    def fitted(self, height: int, width: int, prefix: int = 0) -> PatchRouter:
        """A copy with every None filled in for a map (or token grid) of this size.

        Raises ConfigError if the map has too few positions for the grid or for `per_expert`.
        """
        grid = self.grid
        if grid is None:
            grid = max(g for g in range(1, 9) if height % g == 0 and width % g == 0)
        require(
            grid <= min(height, width), "PatchRouter grid", grid,
            f"at most the smaller side of the {height}x{width} map at the cut",
        )  # fmt: skip
        self._require_enough(grid**2)
        taken = self.per_expert or max(1, grid**2 // 4)
        return replace(self, grid=grid, per_expert=taken, prefix_tokens=prefix)


@dataclass(frozen=True)
class LoRAExperts:
    """Low-rank experts: each adds ``alpha / rank * B @ A`` to a frozen site, times its gate.

    A site is a linear map or a convolution (over a line, a map or a volume; transposed too). On a
    convolution A is one with the site's kernel, stride, padding and dilation to `rank` channels
    (over all input channels, whatever the site's groups), B a pointwise convolution.

    rank: rows of A and columns of B, per expert.
    alpha: numerator of the scale (LoRA, arXiv 2106.09685, section 4.1).
    sites: ``"all"``: every site of the deep segment except the output head; ``"all+head"``: the
        head too; or a tuple of name endings (``("q_proj", "v_proj")``).
    dtype: of the experts' parameters, a name or a torch.dtype; None: float32, or the model's if that
        is wider, so that small steps count where the model is in 16 bits. Experts compute in the
        model's dtype, or autocast's.
    """

    rank: int = 8
    alpha: float = 16.0
    sites: str | tuple[str, ...] = "all"
    dtype: Any = None

    def __post_init__(self) -> None:
        named_dtype(self)
        rank, alpha = self.rank, self.alpha
        require(is_int(rank) and rank >= 1, "LoRAExperts rank", rank, "int >= 1")
        require(is_number(alpha) and alpha > 0, "LoRAExperts alpha", alpha, "a number > 0")
        name_endings(self, "all", "all+head")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def wants(self, module: str) -> bool:
        """Whether a list of endings selects this module path (``"all..."`` selects every one)."""
        return isinstance(self.sites, str) or ends_in(module, self.sites)


@dataclass(frozen=True)
class FFNExperts:
    """Feed-forward experts: each replaces a dense region and starts as a copy of it (sparse
    upcycling, arXiv 2212.05055, section 3).

    num: experts to begin with; None means eight in mode "upcycle" and one in "pmoe".
    every: convert every n-th region of the deep segment, counted from the last.
    sites: ``"all"``, or endings of the regions' names (``("layers.3.mlp",)``), which
        ``convert(..., dry_run=True)`` lists.
    dtype: as for `LoRAExperts`.
    router: ``"layer"``: every region has a router of its own, a linear map without bias on the
        region's own input, as in Mixtral, Qwen-MoE, OLMoE and GLM-4-MoE. `convert`'s TokenRouter
        gives `top_k`, `gate` (``"selected"`` is their norm_topk_prob) and `init`; it needs
        normalize=False, base=False and its other options as they are. ``"cut"``: the one at the
        cut serves them all. None: ``"layer"`` in mode "upcycle" unless a TokenRouter or
        PatchRouter is passed, which then is the one at the cut; else ``"cut"``.
    score: with router="layer", as the options below: what it makes of its logits before the top k,
        ``"softmax"`` or ``"sigmoid"`` (GLM-4-MoE).
    granularity: experts that a copy is cut into along its hidden width (arXiv 2401.06066, section
        3.1; begun as virtual groups, arXiv 2410.07524, section 3.2). The experts of a copy begin with
        one row of the router, so a `top_k` that is a multiple of it takes whole copies, and outputs
        are the dense model's. Experts number num * granularity; none can be added or removed.
    reinit: share of each expert's hidden units whose weights are drawn anew, from a normal
        distribution with mean and deviation of the dense weight (Drop-Upcycling, arXiv 2502.19261,
        section 3). Outputs at the start are not the dense model's.
    scaled: multiply what experts give so that equal logits (``TokenRouter(init=0)``) give the dense
        model's output where a row's gates do not sum to one (arXiv 2410.07524, section 3.3).
    shared: with router="layer", a feed-forward of the dense one's width that every row has beside
        the routed experts: ``"plain"``: added as it is (GLM-4-MoE, DeepSeek-V3); ``"sigmoid"``:
        times the sigmoid of a linear map of the row, zero at the start (Qwen2-MoE). It and the
        routed ones begin with half of the dense output each. It is trained until experts are added;
        where no expert is on, the dense model runs, without it.
    """

    num: int | None = None
    every: int = 1
    sites: str | tuple[str, ...] = "all"
    dtype: Any = None
    router: Literal["cut", "layer"] | None = None
    score: Literal["softmax", "sigmoid"] = "softmax"
    granularity: int = 1
    reinit: float = 0.0
    scaled: bool = False
    shared: Literal["plain", "sigmoid"] | None = None

    def __post_init__(self) -> None:
        named_dtype(self)
        name_endings(self, "all")
        num, cut, share = self.num, self.granularity, self.reinit
        for name, ok, expected in (
            ("num", num is None or (is_int(num) and num >= 1), "None or int >= 1"),
            ("every", is_int(self.every) and self.every >= 1, "int >= 1"),
            ("router", self.router in (None, "cut", "layer"), "None, 'cut' or 'layer'"),
            ("granularity", is_int(cut) and cut >= 1, "int >= 1"),
            ("reinit", is_number(share) and 0 <= share <= 1, "a number from 0 to 1"),
            ("scaled", isinstance(self.scaled, bool), "True or False"),
        ):  # fmt: skip
            require(ok, f"FFNExperts {name}", getattr(self, name), expected)
        choose(self, "score", "softmax", "sigmoid")
        choose(self, "shared", None, "plain", "sigmoid")

    @property
    def by_layer(self) -> bool:
        """Whether every region has a router of its own."""
        return self.router == "layer"

    def refuses(self, region: str, following: int) -> str | None:
        """Why a region is not converted, or None. following: how many regions come after it."""
        if isinstance(self.sites, tuple) and not ends_in(region, self.sites):
            return f"not named in sites={self.sites}"
        return f"left out by every={self.every}" if following % self.every else None


@dataclass(frozen=True)
class RegionExperts:
    """Experts that replace a convolutional region, each run on its own patches only (pMoE, arXiv
    2306.04073).

    Experts start as copies; their outputs are summed, weighted by their gates, and patches that no
    expert takes give zero. In training, batch norm's statistics are over the gathered patches.

    region: dotted name of a module, or of several consecutive ones; None: from the cut to the last
        point before an operation that mixes all positions.
    halo: gather each patch with the neighbouring positions that the region reads, so that it
        computes what the dense region does there; False: isolated patches, as in the paper.
    width: share of the hidden channels that each expert keeps (hidden: shared neither with the
        region's entry nor with its exit); expert e starts from the e-th slice of them.
    combine: ``"sum"``; or ``"concat"``: each expert computes its own slice of the output channels.
    dtype: as for `LoRAExperts`.
    statistics: ``"patches"``: norms over positions and squeeze-and-excite take theirs over the
        patches that an expert took of a sample, an approximation. None: they end a region.
    """

    region: str | tuple[str, ...] | None = None
    halo: bool = True
    width: float = 1.0
    combine: Literal["sum", "concat"] = "sum"
    dtype: Any = None
    statistics: Literal["patches"] | None = None

    on_patches: ClassVar[bool] = True  # needs a PatchRouter

    def __post_init__(self) -> None:
        named_dtype(self)
        if isinstance(self.region, list):
            object.__setattr__(self, "region", tuple(self.region))
        names = (self.region,) if isinstance(self.region, str) else self.region
        ok = names is None or (
            isinstance(names, tuple) and names and all(isinstance(n, str) and n for n in names)
        )
        require(bool(ok), "RegionExperts region", self.region, "None, a module's name or several")
        require(isinstance(self.halo, bool), "RegionExperts halo", self.halo, "True or False")
        ok = is_number(self.width) and 0 < self.width <= 1
        require(ok, "RegionExperts width", self.width, "a share, 0 < width <= 1")
        choose(self, "combine", "sum", "concat")
        choose(self, "statistics", None, "patches")

    @property
    def names(self) -> tuple[str, ...]:
        if self.region is None:
            return ()
        return (self.region,) if isinstance(self.region, str) else self.region


RouterSpec = TokenRouter | PatchRouter

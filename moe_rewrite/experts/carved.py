"""What a user can ask for in mode "carve"; it checks itself, as the classes of `config` do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from ..config import TokenRouter
from ..errors import ConfigError
from ..utils.checks import choose, ends_in, is_int, is_number, name_endings, named_dtype, require


@dataclass(frozen=True)
class CarvedExperts:
    """A dense feed-forward's own hidden units as experts of equal size, of which a token runs a
    share (MoEfication, arXiv 2110.01786, sections 3.2 and 3.3; with shared ones, CMoE, arXiv
    2502.04416, section 3).

    Chosen experts have gate 1, so with all of them on the outputs are the dense model's. What is
    left out for a token is what is saved.

    experts: of a region, the shared ones included; a number that divides its hidden width.
    shared: of these, run for every token: the hidden units that contribute most.
    active: share of the hidden units that run for a token, shared and chosen; a multiple of
        ``1 / experts``.
    grouping: which hidden units form an expert. ``"coactivation"``: ones that contribute to the
        same tokens (k-means over calibration tokens, balanced by a linear assignment; needs scipy,
        the extra "carve"); ``"magnitude"``: ones of like weight norms; ``"random"``.
    calibration: batches of inputs in the form of `example_inputs`, of which some thousand tokens
        are enough. They group the units and fit the routers, by ridge regression of the norm of
        each expert's output on the region's input. None: texts that the model, if it is a causal
        language model, writes itself. Not saved.
    bias: whether a router adds one to its logits; standard checkpoints have none.
    ridge: regularisation of the fit, as a share of the Gram matrix's mean diagonal.
    seed: of the grouping and of the texts.
    sites, dtype: as for `FFNExperts`.
    """

    experts: int = 8
    shared: int = 1
    active: float = 0.75
    grouping: Literal["coactivation", "magnitude", "random"] = "coactivation"
    calibration: Iterable[Any] | None = field(default=None, compare=False, repr=False)
    bias: bool = True
    ridge: float = 1e-3
    seed: int = 0
    sites: str | tuple[str, ...] = "all"
    dtype: Any = None

    by_layer = True  # every region has a router of its own

    def __post_init__(self) -> None:
        named_dtype(self)
        name_endings(self, "all")
        count, shared, share, ridge = self.experts, self.shared, self.active, self.ridge
        for name, ok, expected in (
            ("experts", is_int(count) and count >= 2, "int >= 2"),
            ("shared", is_int(shared) and is_int(count) and 0 <= shared < count,
             f"an int from 0 to {count - 1 if is_int(count) else 'experts - 1'}"),
            ("active", is_number(share) and 0 < share <= 1, "a share, 0 < active <= 1"),
            ("bias", isinstance(self.bias, bool), "True or False"),
            ("ridge", is_number(ridge) and ridge > 0, "a number > 0"),
            ("seed", is_int(self.seed) and self.seed >= 0, "int >= 0"),
        ):  # fmt: skip
            require(ok, f"CarvedExperts {name}", getattr(self, name), expected)
        choose(self, "grouping", "coactivation", "magnitude", "random")
        self._require_whole_experts()

    def _require_whole_experts(self) -> None:
        count, taken = self.experts, self.taken
        if abs(taken - self.active * count) > 1e-6 * count:
            below = int(self.active * count)
            near = " or ".join(f"{n / count:g}" for n in (below, below + 1) if n > self.shared)
            raise ConfigError(
                f"CarvedExperts active={self.active!r}: expected a multiple of 1/{count}, since a "
                f"token runs whole experts: {near}; or another number of experts"
            )
        require(
            self.shared < taken or taken == count, "CarvedExperts active", self.active,
            f"more than shared={self.shared} of {count} experts, {(self.shared + 1) / count:g} at least",
        )  # fmt: skip

    @property
    def taken(self) -> int:
        """Experts that run for a token, the shared ones included."""
        return round(self.active * self.experts)

    @property
    def router(self) -> TokenRouter:
        """The router of a layer, in the words of others."""
        return TokenRouter(top_k=self.taken, base=False, normalize=False, gate="all")

    def refuses(self, region: str, following: int) -> str | None:
        """As `FFNExperts.refuses`."""
        if isinstance(self.sites, tuple) and not ends_in(region, self.sites):
            return f"not named in sites={self.sites}"
        return None

    def uncut(self, hidden: int) -> str | None:
        """Why a region of this hidden width has no experts of equal size, or None."""
        if hidden % self.experts == 0:
            return None
        counts = [n for n in range(2, hidden + 1) if hidden % n == 0]
        below = [n for n in counts if n < self.experts][-1:]
        near = " and ".join(map(str, (*below, *[n for n in counts if n > self.experts][:1])))
        return (
            f"hidden width {hidden} has no {self.experts} parts of equal size: the nearest numbers "
            f"of experts that do are {near}"
        )

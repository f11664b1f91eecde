"""Sites: where experts work; and rejections: sites that cannot hold experts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ..utils.text_tables import count


@dataclass(frozen=True)
class LoRASite:
    """A site of LoRA experts: one frozen weight and every node that applies it.

    name: dotted name of the module that owns the weight, or of a bare parameter.
    weight: state-dict name of the weight, or of a tensor that it is computed from.
    transposed: the weight is stored as (in, out); a convolution with such a weight is transposed.
    kernel: size of a convolution along each axis, empty for a linear map.
    groups: experts of the model's own, each of which has a weight; 0 for a single weight.
    unlike_peft: why PEFT's layer for this module computes something else; empty if it does not.
    """

    name: str
    weight: str
    in_features: int
    out_features: int
    transposed: bool
    kernel: tuple[int, ...] = ()
    unlike_peft: str = ""
    groups: int = 0

    @property
    def weights(self) -> tuple[str, ...]:
        return (self.weight,)


@dataclass(frozen=True)
class Part:
    """A weight or buffer of a region, of which each expert has a copy.

    name: state-dict name of the dense tensor.
    kind: ``"weight"`` or ``"buffer"``.
    kept: (dimension, elements that an expert has of it), for dimensions that experts have a share
        of.
    """

    name: str
    kind: str
    kept: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class RegionSite:
    """A convolutional region that experts run.

    parts: its weights and buffers.
    in_features, out_features: (C, H, W) of its entry and exit, as text.
    dense_macs: multiply-adds of the dense region on one sample.
    expert_macs: multiply-adds of one expert on one patch.
    score_macs: multiply-adds of one expert's scores of a sample's patches.
    ends: why the region goes no further; empty if it was named.
    """

    name: str
    parts: tuple[Part, ...]
    in_features: str
    out_features: str
    dense_macs: int
    expert_macs: int
    score_macs: int
    ends: str

    @property
    def weights(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.parts)


@dataclass(frozen=True)
class FeedForwardSite:
    """A feed-forward region that experts replace.

    parts: its weights.
    features: width of its rows.
    hidden: width inside of an expert.
    macs: multiply-adds of the dense region on one row.
    gated: whether one product gates another.
    down: names of the last product's weight and, if it has one, bias.
    matrices: weights that products alone read, and whether each is stored as (in, out).
    """

    name: str
    parts: tuple[Part, ...]
    features: int
    hidden: int
    macs: int
    gated: bool
    down: tuple[str, ...]
    matrices: tuple[tuple[str, bool], ...] = ()

    @property
    def in_features(self) -> int:
        return self.features

    out_features = in_features

    @property
    def weights(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.parts)

    @property
    def router(self) -> str:
        """The part of an expert that is its row of the region's own router; no weight is called so."""
        return self._free(f"{self.name}.router", self.weights)

    def shared(self, weight: str) -> str:
        """The part that is the shared expert's copy of a weight; no weight is called so."""
        prefix = "shared."
        while any(w.startswith(prefix) for w in self.weights):
            prefix = f"_{prefix}"
        return prefix + weight

    @property
    def shared_gate(self) -> str:
        """The part that is the shared expert's gate."""
        return self._free(self.shared("gate"), [self.shared(w) for w in self.weights])

    @staticmethod
    def _free(name: str, taken: Collection[str]) -> str:
        while name in taken:
            name += "_"
        return name


@dataclass(frozen=True)
class HeadSite:
    """A classification head that experts can widen. weight: state-dict name."""

    name: str
    weight: str
    in_features: int

    @property
    def weights(self) -> tuple[str, ...]:
        return (self.weight,)


AnySite = Any  # with a name, in_features, out_features and the names of its weights


@dataclass(frozen=True)
class Macs:
    """Multiply-adds of one sample, or of another unit: dense region, the experts that replace it,
    and their router."""

    dense: int
    experts: int
    router: int
    unit: str = "sample"

    @property
    def routed(self) -> int:
        return self.experts + self.router

    def __add__(self, other: Macs) -> Macs:
        return Macs(
            self.dense + other.dense, self.experts + other.experts, self.router + other.router,
            self.unit,
        )  # fmt: skip

    def __str__(self) -> str:
        share = f"{100 * self.routed / self.dense:.1f}%" if self.dense else "100%"
        return (
            f"{count(self.experts)} multiply-adds a {self.unit} and {count(self.router)} of the router, "
            f"{share} of the dense region's {count(self.dense)}"
        )


@dataclass(frozen=True)
class Rejection:
    """A site that could have held experts, and why it does not."""

    name: str
    reason: str


@dataclass(frozen=True)
class Found:
    """The sites of one graph. sites: each with its uses in the graph, to insert experts at."""

    sites: dict[Any, Any]
    rejected: tuple[Rejection, ...] = ()

"""Places where experts work, and those that could not be such."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..utils.text_tables import count


@dataclass(frozen=True)
class LoRASite:
    """A place where LoRA experts work: one frozen weight and every node that applies it.

    name: dotted name of the module that owns the weight, or of a bare parameter.
    weight: state-dict name. transposed: the weight is stored as (in, out). kernel: (h, w) of a
    convolution, empty for a linear map.
    """

    name: str
    weight: str
    in_features: int
    out_features: int
    transposed: bool
    kernel: tuple[int, ...] = ()

    @property
    def weights(self) -> tuple[str, ...]:
        return (self.weight,)


@dataclass(frozen=True)
class Part:
    """A weight or buffer of a region, as each expert has it.

    name: state-dict name of the dense one. kept: (dimension, elements that an expert has of it) of
    the dimensions of which it has a share.
    """

    name: str
    kind: str
    kept: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class RegionSite:
    """A region that experts run: its weights, and the shapes (C, H, W) of its entry and exit.

    dense_macs: multiply-adds of the dense region on one sample; expert_macs: of one expert on one
    patch; score_macs: of one expert's scores of a sample.
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
    """A feed-forward region in whose place experts run: its weights, the width of its rows and of
    what lies inside, and whether one product gates another."""

    name: str
    parts: tuple[Part, ...]
    features: int
    hidden: int
    gated: bool

    @property
    def in_features(self) -> int:
        return self.features

    out_features = in_features

    @property
    def weights(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.parts)


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
    """Multiply-adds of one sample: of the dense region, and of what replaces it."""

    dense: int
    experts: int
    router: int

    @property
    def routed(self) -> int:
        return self.experts + self.router

    def __str__(self) -> str:
        share = f"{100 * self.routed / self.dense:.1f}%" if self.dense else "100%"
        return (
            f"{count(self.experts)} multiply-adds a sample and {count(self.router)} of the router, "
            f"{share} of the dense region's {count(self.dense)}"
        )


@dataclass(frozen=True)
class Rejection:
    """A site that could have held experts, and why it does not."""

    name: str
    reason: str


@dataclass(frozen=True)
class Found:
    """sites: each with what inserting experts there needs to know of its uses in one graph."""

    sites: dict[Any, Any]
    rejected: tuple[Rejection, ...] = ()

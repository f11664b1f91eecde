"""Choose the router that fits what the cut carries, and build it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..config import PatchRouter, RouterSpec, TokenRouter
from ..errors import ConfigError
from .patch_gate import PatchGate
from .ridge_gate import AnalyticGate
from .router import Router
from .token_gate import TokenGate


def resolve_router(
    spec: RouterSpec | None, features: Sequence[Any], causal: bool,
    default: TokenRouter | None = None,
) -> RouterSpec:  # fmt: skip
    """The router for features of this shape.

    spec: the router asked for; None chooses: `default` (with one gate a sample for a feature map)
        if there is one, else by the shape of the features and by `causal`.

    Raises ConfigError if the router asked for cannot work here.
    """
    if spec is None and default is not None:
        spec = replace(default, granularity="sequence") if len(features) == 4 else default
    if isinstance(spec, PatchRouter) or (spec is None and len(features) == 4):
        return _fit_patches(spec or PatchRouter(), features)
    if spec is None:
        return TokenRouter(granularity="prefix" if causal else "sequence")
    if causal and spec.granularity == "sequence":
        raise ConfigError(
            "TokenRouter granularity='sequence': the model is causal, and a mean over the whole "
            "sequence would look ahead; use 'prefix' or 'token'"
        )
    if spec.policy == "expert" and (causal or len(features) != 3):
        raise ConfigError(
            "TokenRouter policy='expert': experts choose among all rows of a sequence: a causal "
            "model would look ahead, and a feature map has no such rows (use a PatchRouter "
            "there); use policy='token'"
        )
    if len(features) == 4 and spec.granularity != "sequence":
        raise ConfigError(
            f"TokenRouter granularity={spec.granularity!r}: the cut carries a feature map, for "
            "which only 'sequence' (one gate per sample) exists; use a PatchRouter for patches"
        )
    return spec


def _fit_patches(spec: PatchRouter, features: Sequence[Any]) -> PatchRouter:
    shape = "x".join(str(s) for s in features)
    fixed = all(isinstance(s, int) for s in features[1:])
    if not fixed or len(features) not in (3, 4):
        raise ConfigError(
            f"PatchRouter: the cut carries {shape}, which is neither a feature map nor an image's "
            "patch tokens of fixed number; use a TokenRouter"
        )
    if len(features) == 4:
        return spec.fitted(*features[2:])
    tokens = features[1]
    prefix = spec.prefix_tokens
    side = math.isqrt(tokens - (prefix or 0))
    if prefix is None:
        prefix = tokens - side**2
    if side < 1 or side**2 + prefix != tokens:
        raise ConfigError(
            f"PatchRouter prefix_tokens={prefix}: {tokens} tokens at the cut less {prefix} do not "
            "form a square"
        )
    if spec.grid is None:
        spec = replace(spec, grid=side)
    return spec.fitted(side, side, prefix)


def make_router(spec: RouterSpec, features: Sequence[Any], device: torch.device) -> Router:
    """The router's module. features: shape of the value at the cut, of fixed sizes for patches."""
    if isinstance(spec, TokenRouter):
        pooled = len(features) == 4
        width = features[1] * spec.pool**2 if pooled else features[-1]
        gate = AnalyticGate if spec.fit == "analytic" else TokenGate
        return gate(spec, int(width), device)
    if len(features) == 4:
        return PatchGate(spec, (features[1], features[2], features[3]), device)
    side = math.isqrt(features[1] - (spec.prefix_tokens or 0))
    return PatchGate(spec, (features[2], side, side), device)

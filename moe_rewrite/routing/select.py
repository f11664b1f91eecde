"""Choose the router that fits what the cut carries, and build it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..config import Fit, PatchRouter, RouterSpec, TokenRouter
from ..errors import ConfigError
from .carve_rule import CarveRule
from .layer_plan import GateRule
from .layer_router import LayerRouter
from .patch_gate import PatchGate
from .ridge_gate import AnalyticGate
from .router import Router
from .token_gate import TokenGate


def resolve_router(
    spec: RouterSpec | None, features: Sequence[Any], causal: bool,
    default: TokenRouter | None = None, token_map: tuple[int, int] | None = None,
    line: bool = False, fit: Fit = "gradient",
) -> RouterSpec:  # fmt: skip
    """The router for features of this shape.

    spec: the router asked for; None chooses: `default` (with one gate a sample for a feature map)
        if there is one, else by the shape of the features and by `causal`.
    line: the features are those of a map over a line.
    fit: of a TokenRouter that is chosen by the shape.

    Raises ConfigError if the router asked for cannot work here.
    """
    mapped = len(features) > 3
    if spec is None and default is not None:
        spec = replace(default, granularity="sequence") if mapped else default
    if isinstance(spec, PatchRouter) and line:
        raise ConfigError(
            "PatchRouter: the cut carries a map over a line (batch, channels, length), and patches "
            "are cells of a grid over two axes; use TokenRouter(granularity='token'), whose gates "
            "lie along the line, or granularity='sequence', one gate a sample"
        )
    if isinstance(spec, PatchRouter) or (spec is None and len(features) == 4):
        return _fit_patches(spec or PatchRouter(), features, token_map)
    if spec is None:
        return TokenRouter(granularity="prefix" if causal and not mapped else "sequence", fit=fit)
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
    if mapped and spec.granularity != "sequence":
        raise ConfigError(
            f"TokenRouter granularity={spec.granularity!r}: the cut carries a feature map, for "
            "which only 'sequence' (one gate per sample) exists; use a PatchRouter for patches"
        )
    return spec


def _fit_patches(
    spec: PatchRouter, features: Sequence[Any], token_map: tuple[int, int] | None
) -> PatchRouter:
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
    if token_map is None or math.prod(token_map) > tokens:
        raise ConfigError(
            f"PatchRouter: no map of patches becomes the {tokens} tokens at the cut {shape} in the "
            "graph, so their rows and columns are not known; use a TokenRouter"
        )
    height, width = token_map
    prefix = tokens - height * width
    if spec.prefix_tokens not in (None, prefix):
        raise ConfigError(
            f"PatchRouter prefix_tokens={spec.prefix_tokens}: the {tokens} tokens at the cut are "
            f"{prefix} and a map of {height}x{width} patches; expected None or {prefix}"
        )
    if spec.grid is None and height == width:
        spec = replace(spec, grid=height)
    return spec.fitted(height, width, prefix)


def make_router(
    spec: RouterSpec, features: Sequence[Any], device: torch.device,
    token_map: tuple[int, int] | None = None, of_layers: GateRule | CarveRule | None = None,
) -> Router:  # fmt: skip
    """features: shape of the value at the cut, with fixed sizes where patches are routed.
    token_map: (H, W) of the map that became its tokens.
    of_layers: the rule of the layers' routers, where every layer has one."""
    if of_layers is not None:
        assert isinstance(spec, TokenRouter)
        return LayerRouter(spec, of_layers, device)
    if isinstance(spec, TokenRouter):
        pooled = len(features) > 3
        width = features[1] * spec.pool ** (len(features) - 2) if pooled else features[-1]
        gate = AnalyticGate if spec.fit == "analytic" else TokenGate
        return gate(spec, int(width), device)
    if len(features) == 4:
        return PatchGate(spec, (features[1], features[2], features[3]), device)
    assert token_map is not None
    return PatchGate(spec, (features[2], *token_map), device)

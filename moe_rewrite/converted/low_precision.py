"""Experts whose matrices are kept in int8 or bfloat16, for inference."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..config import require
from ..errors import CheckpointError, ConfigError
from ..experts.base import ExpertParameters
from ..experts.copies import CopiedParameters
from ..experts.ffn.low_precision_call import TRAIN
from ..ir.sites import FeedForwardSite
from ..kernels.ffn.low_precision import DTYPES
from ..utils.quantized import stored_bytes


def quantized(sites: Iterable[ExpertParameters]) -> str | None:
    """The dtype of the experts' matrices, None for experts that can be trained."""
    return next((s.quantized for s in sites if s.quantized), None)


def quantize(sites: Iterable[ExpertParameters], dtype: Any) -> None:
    """See `ExpertMethods.quantize_experts`."""
    sites = list(sites)
    name = str(dtype).removeprefix("torch.")
    require(name in DTYPES, "dtype", dtype, " or ".join(map(repr, DTYPES)))
    require_not_quantized(sites, "quantize_experts()")
    found = [s for s in sites if isinstance(s, CopiedParameters) and _has_matrices(s)]
    if not found:
        raise ConfigError(
            f"quantize_experts({name!r}): only feed-forward experts (FFNExperts) are quantised; this "
            "model's are small beside its dense weights: convert a dense model that torchao or "
            "bitsandbytes quantised"
        )
    for site in found:
        site.quantize(name)


def _has_matrices(site: CopiedParameters) -> bool:
    return isinstance(site.site, FeedForwardSite) and len(site.site.matrices) > 0


def require_not_quantized(sites: Iterable[ExpertParameters], what: str) -> None:
    """Raise ConfigError, with the way on, for what quantised experts cannot do."""
    dtype = quantized(sites)
    if dtype is not None:
        raise ConfigError(f"{what}: these experts are in {dtype}, for inference; {TRAIN}")


def become(sites: Iterable[ExpertParameters], saved: str | None) -> None:
    """Keep matrices as a save does that is about to be loaded. Raises CheckpointError where ours are
    quantised, and those of the save are not, or otherwise."""
    sites = list(sites)
    ours = quantized(sites)
    if ours is None and saved is not None:
        quantize(sites, saved)
    elif ours != saved:
        raise CheckpointError(
            f"the saved experts are in {saved or 'full precision'}, this model's in {ours}: load them "
            "into a model whose experts are not quantised, as moe_rewrite.load(folder, model) makes it"
        )


def described(sites: Iterable[ExpertParameters]) -> str:
    """Text for the report; empty for experts that can be trained."""
    sites = list(sites)
    dtype = quantized(sites)
    if dtype is None:
        return ""
    held = sum(stored_bytes(t) for s in sites for t in s.parameters())
    scales = ", a scale for each output channel" if dtype == "int8" else ""
    return f"in {dtype}{scales}: {held / 1e6:.1f} MB with all else that experts have, for inference"

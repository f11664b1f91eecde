"""A dense model with one expert merged into its weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import ConfigError, EquivalenceError
from ..ir.equivalence import evaluating
from ..utils.quantized import is_quantized
from .dense_reference import fresh

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}  # of the largest output; of others:
COARSE = 0.1  # in 16 bits, merged weights are rounded


def merge_expert(moe: Any, expert: int, example_inputs: Any) -> nn.Module:
    """See `ExpertMethods.merge_expert`."""
    arguments = moe.host.arguments(example_inputs)
    with moe.use_expert(expert), torch.no_grad(), evaluating(moe):
        ours = pytree.tree_leaves(moe(**{k: fresh(v) for k, v in arguments.items()}))
    merged = copy.deepcopy(moe._host_module())
    weights = _merged_weights(moe, expert)
    own = dict(merged.named_parameters(remove_duplicate=False))
    own |= dict(merged.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in weights.items():
            if is_quantized(own[name]):
                owner, _, leaf = name.rpartition(".")
                own[name] = nn.Parameter(tensor, requires_grad=False)
                setattr(merged.get_submodule(owner), leaf, own[name])
            else:
                own[name].copy_(tensor)
    with torch.no_grad(), evaluating(merged):
        theirs = pytree.tree_leaves(merged(**{k: fresh(v) for k, v in arguments.items()}))
    _require_equal(ours, theirs, moe.names[expert])
    for name, p in moe.reference.original.named_parameters():
        own[name].requires_grad_(p.requires_grad)
    return merged.train(moe.training)


def _merged_weights(moe: Any, expert: int) -> dict[str, torch.Tensor]:
    scale = getattr(moe.recipe.experts, "scale", 1.0)
    tied = {*moe._store.aliases.values()}
    weights: dict[str, torch.Tensor] = {}
    for site in moe.expert_sites():
        dense = moe._store.dequantized(site.site.weights)
        for name, tensor in site.merged(expert, dense, scale).items():
            if name in tied or name in weights:
                raise ConfigError(
                    f"{site.site.name}: its weight {name} is used elsewhere too, where it would "
                    "change: convert with experts=LoRAExperts(sites=[...]) that leave it out"
                )
            weights[name] = tensor
    return weights


def _require_equal(ours: list[Any], theirs: list[Any], name: str) -> None:
    """Raises EquivalenceError where a weight is not used as the sites say, such as one that the
    module computes anew from the merged tensor."""
    for mine, other in zip(ours, theirs, strict=True):
        if not isinstance(mine, torch.Tensor) or not mine.is_floating_point():
            continue
        allowed = TOLERANCE.get(mine.dtype, COARSE) * max(float(mine.abs().max()), 1e-6)
        error = float((mine.double() - other.double()).abs().max())
        if not error <= allowed:
            raise EquivalenceError(
                f"with expert {name!r} merged in, the outputs differ by {error:.2e} from those within "
                "use_expert(): a module computes a weight from the tensor that an expert stands "
                "beside. Leave these sites out by LoRAExperts(sites=[...]) to merge experts"
            )

"""Parameters that DeepSpeed's ZeRO stage 3 has taken: empty, and filled while a module runs to which
they are known, each process keeping a part.

DeepSpeed fills what a running module owns itself. The blocks of a converted model run over tensors
of other modules, so these are registered with them as DeepSpeed's external parameters; their
gradients are reduced as each of them is complete, whatever the inputs of a block are.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError

WAY = "docs/many_gpus.md"


def _zero() -> Any:
    """`deepspeed.zero`, which is no module that could be imported."""
    return importlib.import_module("deepspeed").zero


def is_parted_by_zero(tensor: Any) -> bool:
    return hasattr(tensor, "ds_id")


def whole_size(tensor: Any) -> torch.Size:
    return torch.Size(tensor.ds_shape)


def is_filled(tensor: Any) -> bool:
    return tensor.ds_status.name == "AVAILABLE"


def require_filled(tensor: Any) -> Any:
    """The tensor. Raises ConfigError where DeepSpeed has not filled it for the block that runs."""
    if not is_filled(tensor):
        raise ConfigError(
            f"a weight of size {tuple(whole_size(tensor))} is empty where a block runs: DeepSpeed's "
            "ZeRO stage 3 fills weights of models that deepspeed.initialize was given: call what it "
            f"returned, with the converted model itself as model= ({WAY})"
        )
    return tensor


@contextmanager
def own_linear() -> Iterator[None]:
    """In this context, `torch.nn.functional.linear` is PyTorch's own: DeepSpeed replaces it for the
    whole process by products in which no trace knows a linear map."""
    functional: Any = torch.nn.functional
    replaced = functional.linear
    if replaced.__module__.startswith("deepspeed"):
        functional.linear = torch._C._nn.linear
    try:
        yield
    finally:
        functional.linear = replaced


@torch.no_grad()
def whole_values(tensor: Any) -> torch.Tensor:
    """All of its values, in memory of their own, which every process must ask for."""
    if is_filled(tensor):
        return tensor.detach().clone()
    with _zero().GatheredParameters([tensor]):
        return tensor.detach().clone()


@torch.no_grad()
def fill_parted(tensor: Any, values: torch.Tensor) -> None:
    """Write all of its values, those of the first process in all of them."""
    with _zero().GatheredParameters([tensor], modifier_rank=0):
        tensor.copy_(values)


def require_no_recomputing(checkpointing: bool) -> None:
    if checkpointing:
        raise ConfigError(
            "gradient checkpointing of a model whose weights DeepSpeed's ZeRO stage 3 has taken: "
            "blocks would be recomputed on weights that come and go meanwhile: call "
            f"moe.gradient_checkpointing_disable(), or use FSDP2 or ZeRO stage 2 ({WAY})"
        )


def show_to_zero(uses: Iterable[tuple[nn.Module, Any]]) -> None:
    """Have DeepSpeed fill tensors while a module runs. uses: (the module, a tensor); tensors that it
    has not taken are left out, and empty ones, which it cannot gather.

    Raises ConfigError for a leaf module of DeepSpeed: it reduces the gradients of one in a hook that
    PyTorch calls before there are any where no input of the module needs a gradient.
    """
    register = _zero().register_external_parameter
    for module, tensor in uses:
        if not is_parted_by_zero(tensor) or not whole_size(tensor).numel():
            continue
        if hasattr(tensor, "ds_z3_leaf_module"):
            raise ConfigError(
                "this model, or a part of it, is a leaf module of DeepSpeed (set_z3_leaf_modules, "
                "stage3_module_granularity_threshold), whose gradients would be reduced before they "
                f"are there: leave that out, a converted model needs none ({WAY})"
            )
        if id(tensor) not in vars(module).get("_external_params", ()):
            register(module, tensor)

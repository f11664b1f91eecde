"""Copies of a model's structure over the same storage, and the names of its tensors."""

from __future__ import annotations

import copy
import copyreg
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from ...errors import CaptureError, InputError
from ...utils.sharded import is_engine, is_parted_by_zero, is_sharded
from ..blocks.repeated_blocks import REGISTERED
from ..hooks import hooks_of_users
from .packed_weight import packed_modules

# attributes of every module, and values in them, that a search for further tensors can leave out
_OF_MODULES = {*vars(nn.Module())}
_PLAIN = {bool, int, float, str, type(None)}
_TABLES = {dict, OrderedDict, set, list}
_RULES = (
    "__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__", "__setstate__", "__new__",
    "__getnewargs__", "__getnewargs_ex__",
)  # fmt: skip


def structural_copy(model: nn.Module) -> nn.Module:
    """A copy of the model whose tensors are new objects over the same storage.

    The copy can change its mode, be cast or traced without any effect on the original. Its
    parameters do not require gradients, since dense weights are frozen. Users' hooks are left out.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise InputError(
                f"{name} of {type(model).__name__} has no shape yet: run the model once on its "
                "inputs, so that its lazy layers are initialised"
            )
        if tensor.is_inference():
            raise InputError(
                f"{name} of {type(model).__name__} was made in torch.inference_mode(), and PyTorch "
                "computes no gradients beside such tensors: make or load the model outside of it "
                "(torch.no_grad() does no harm)"
            )
        if is_sharded(tensor) or is_parted_by_zero(tensor):
            _refuse_divided(name, model)
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.detach(), requires_grad=False)
    for b in model.buffers():
        memo[id(b)] = b.detach()
    for module, linear, weight in packed_modules(model):
        bias = linear.bias
        linear.bias = None if bias is None else memo[id(bias)]
        memo[id(module)], memo[id(module.weight)] = linear, weight
    for t in tensors_of(model):
        if not t.is_leaf:  # a weight that a hook computes anew in every call
            memo[id(t)] = t.detach()
    for _, _, hooks, key in hooks_of_users(model):
        memo[id(hooks[key])] = None
    copied = _copy(model, memo)
    for _, _, hooks, key in list(hooks_of_users(copied)):
        del hooks[key]
    return copied


def _refuse_divided(name: str, model: nn.Module) -> NoReturn:
    by_zero = any(map(is_parted_by_zero, model.parameters()))
    if by_zero or any(is_engine(module) for module in model.modules()):
        raise InputError(
            f"{name} of {type(model).__name__} is sharded over processes, and a capture needs "
            "whole tensors. Convert the model before it is sharded, then shard the converted model "
            "(docs/many_gpus.md)"
        )
    raise InputError(
        f"{name} of {type(model).__name__} is divided by a tensor parallel plan (tp_plan, tp_size, "
        "parallelize_module), and a capture needs whole tensors. Load the model without a plan in "
        "every process, convert it, then divide the converted model by its plan, "
        "moe.tensor_parallel(mesh), or by FSDP2: fully_shard for each block of moe.shallow and "
        "moe.deep, then for moe (docs/many_gpus.md)"
    )


def working_copy(model: nn.Module, own: Mapping[int, torch.Tensor] | None = None) -> nn.Module:
    """A copy to trace or run, with the very same tensors: whatever that leaves in attributes of
    modules goes with the copy. own: by the id of a tensor, another in its place."""
    memo: dict[int, Any] = {id(t): t for t in tensors_of(model)}
    return _copy(model, memo | dict(own or {}))


def _copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        return _copied(model, memo)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied in structure ({error}). Remove attributes "
            "that Python's copy.deepcopy refuses (open files, locks, non-leaf tensors)."
        ) from error


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """What copy.deepcopy makes of it, in a fifth of the time: most of a module are empty tables."""
    kinds: dict[nn.Module, Any] = {m: type(m) for m in model.modules() if id(m) not in memo}
    copies = {m: k.__new__(k) for m, k in kinds.items() if _is_copied_by_attributes(k)}
    memo.update((id(m), made) for m, made in copies.items())
    for module, made in copies.items():
        for name, value in vars(module).items():
            made.__dict__[name] = _copied_value(name, value, memo)
    return copy.deepcopy(model, memo)


def _copied_value(name: str, value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind in _TABLES and not value:
        return kind()
    if kind is dict and name in REGISTERED:
        return {n: v if v is None else copy.deepcopy(v, memo) for n, v in value.items()}
    return copy.deepcopy(value, memo)


@cache
def _is_copied_by_attributes(kind: Any) -> bool:
    """Whether copy.deepcopy has no rules of its own for modules of this class."""
    own_slots = any("__slots__" in vars(base) for base in kind.__mro__)
    return (
        not own_slots
        and kind not in copyreg.dispatch_table
        and all(getattr(kind, rule, None) is getattr(nn.Module, rule, None) for rule in _RULES)
    )


def tensors_of(model: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, buffers, and tensors among other attributes."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in _OF_MODULES and type(value) not in _PLAIN:
                yield from (t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor))


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers, under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Every state-dict name, tied ones included, to the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(t), name) for name, t in named_tensors(model)}

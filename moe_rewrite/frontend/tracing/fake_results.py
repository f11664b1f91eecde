"""Results of operators on fake tensors, remembered within one trace.

In a trace PyTorch computes the sizes of every operator's result, which with symbolic sizes takes most
of the time. Blocks that are alike, and parts inside a block, call the same operators on tensors of
the same sizes; those are computed once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import snapshot_fake
from torch.utils import _pytree as pytree

from ...ir.aten import expression
from ...utils.content_key import content_key
from .trace_memory import replaced

COMPUTES = "_dispatch_impl"  # the method that computes results; left alone in a version without
SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)
BY_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class _ComputedAnew(Exception):
    """The operator's arguments or results are of a kind that is not remembered."""


def remembered_results() -> AbstractContextManager[None]:
    """The context of a trace in which this thread computes a result once.

    A result that comes again is a new tensor over the storage of the first: there are no values in
    it, and which tensors are views is known by the graph.
    """
    compute = getattr(FakeTensorMode, COMPUTES, None)
    return replaced(FakeTensorMode, COMPUTES, compute and _remembering(compute))


def _remembering(compute: Callable) -> Callable:
    here = threading.get_ident()
    known: dict[Any, Any] = {}

    def remembered(mode: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != here or not _depends_on_sizes_alone(func):
            return compute(mode, func, types, args, kwargs)
        key = None
        with torch._C.DisableTorchFunction(), suppress(_ComputedAnew):
            key = mode, func, tracing_context(), _key((args, dict(kwargs)), mode)
            if (first := known.get(key)) is not None:
                return pytree.tree_map_only(FakeTensor, snapshot_fake, first)
        output = compute(mode, func, types, args, kwargs)
        if key is not None:
            with torch._C.DisableTorchFunction():
                if _can_come_again(output, (args, kwargs)):
                    known[key] = pytree.tree_map_only(FakeTensor, snapshot_fake, output)
        return output

    return remembered


def _depends_on_sizes_alone(func: Any) -> bool:
    if not isinstance(func, torch._ops.OpOverload) or func.namespace != "aten":
        return False
    return not (BY_VALUES & set(func.tags) or func._schema.is_mutable)


def tracing_context() -> tuple:
    """What a trace depends on besides a module or an operator and its arguments."""
    autocast = tuple(
        (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda")
    )
    return torch.is_grad_enabled(), torch.get_default_dtype(), autocast


def _key(given: Any, mode: Any) -> Any:
    def other(value: Any) -> Any:
        if isinstance(value, FakeTensor) and value.fake_mode is mode and _is_plain(value):
            return _tensor_key(value)
        if isinstance(value, SIZES):
            return type(value), expression(value)
        raise _ComputedAnew

    return content_key(given, other)


def _tensor_key(tensor: Any) -> tuple:
    sizes = tuple(map(expression, (*tensor.shape, *tensor.stride(), tensor.storage_offset())))
    return sizes, tensor.dtype, tensor.device, tensor.requires_grad, type(tensor)


def _is_plain(tensor: Any) -> bool:
    """Whether sizes, strides, dtype and device say all that is known of it."""
    strided = tensor.layout is torch.strided and not tensor.dtype.is_complex
    return strided and tensor.constant is None and not tensor.is_neg()


def _can_come_again(output: Any, given: Any) -> bool:
    """Whether it is one or several new tensors; an operator may return what it was given."""
    arguments = {id(leaf) for leaf in pytree.tree_leaves(given)}
    return all(
        leaf is None or (type(leaf) is FakeTensor and _is_plain(leaf) and id(leaf) not in arguments)
        for leaf in pytree.tree_leaves(output)
    )

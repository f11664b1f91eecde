"""A module -> an ONNXProgram of PyTorch, traced with little memory."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ...frontend.tracing.trace_memory import forget_inputs, tracing

MAKE = "from_torchlib"  # the constructor of ONNXRegistry, PyTorch's table of translations
_tables: dict[tuple, Any] = {}  # by the constructor's arguments


def onnx_program(
    module: torch.nn.Module, given: Any, shapes: Any, opset: int, **options: Any
) -> Any:
    """Export a module. given: positional arguments. shapes: torch.export's `dynamic_shapes`. Raises
    what torch.export and torch.onnx.export raise."""
    with quiet(), tracing():
        exported = torch.export.export(module, given, dynamic_shapes=shapes, strict=False)
        forget_inputs(exported)
        return torch.onnx.export(
            exported, dynamo=True, opset_version=opset, verbose=False, **options
        )


@contextmanager
def one_registry() -> Iterator[None]:
    """Build PyTorch's table of translations once a process instead of once a trace: it takes as
    long as tracing a small block. No effect if this version of PyTorch lacks that class."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        made = vars(ONNXRegistry)[MAKE]
    except (ImportError, KeyError):
        yield
        return
    setattr(ONNXRegistry, MAKE, staticmethod(partial(_table, getattr(ONNXRegistry, MAKE))))
    try:
        yield
    finally:
        setattr(ONNXRegistry, MAKE, made)


def _table(make: Callable[..., Any], **given: Any) -> Any:
    """A copy of the cached table with lists of its own, to which a trace adds translations."""
    key = tuple(given.items())
    made = _tables[key] = _tables.get(key) or make(**given)
    table = copy.copy(made)
    table.functions = {target: list(found) for target, found in made.functions.items()}
    return table


def root_cause(error: BaseException) -> BaseException:
    """The first error in the chain of causes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's log and warnings, such as those on missing packages."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)

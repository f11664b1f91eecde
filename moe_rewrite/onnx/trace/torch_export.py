"""A module -> PyTorch's program in ONNX, traced in little memory."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ...frontend.trace_memory import forget_inputs, tracing

MAKE = "from_torchlib"  # of PyTorch's class of tables of translations
_tables: dict[tuple, Any] = {}  # by what they were asked for


def onnx_program(
    module: torch.nn.Module, given: Any, shapes: Any, opset: int, **options: Any
) -> Any:
    """given: positional arguments. shapes: which of their dimensions stay open. Raises as
    torch.export and torch.onnx.export do."""
    with quiet(), tracing():
        exported = torch.export.export(module, given, dynamic_shapes=shapes, strict=False)
        forget_inputs(exported)
        return torch.onnx.export(
            exported, dynamo=True, opset_version=opset, verbose=False, **options
        )


@contextmanager
def one_registry() -> Iterator[None]:
    """PyTorch makes its table of translations, which takes as long as the trace of a small block,
    once in a process and not for every trace. Where it has another name nothing is done."""
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
    """With lists of its own: a trace puts its translations into them."""
    key = tuple(given.items())
    made = _tables[key] = _tables.get(key) or make(**given)
    table = copy.copy(made)
    table.functions = {target: list(found) for target, found in made.functions.items()}
    return table


def root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's remarks on what is not installed."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)

"""A module -> PyTorch's program in ONNX, traced in little memory."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from ..traces import frugal_traces

MAKE = "from_torchlib"  # of PyTorch's class of such tables


def onnx_program(
    module: torch.nn.Module, given: Any, shapes: Any, opset: int, **options: Any
) -> Any:
    """given: positional arguments. shapes: which of their dimensions stay open. Raises as
    torch.export and torch.onnx.export do."""
    with quiet(), frugal_traces():
        return torch.onnx.export(
            torch.export.export(module, given, dynamic_shapes=shapes, strict=False),
            dynamo=True, opset_version=opset, verbose=False, **options,
        )  # fmt: skip


@contextmanager
def one_registry() -> Iterator[None]:
    """PyTorch makes its table of translations, which takes as long as the trace of a small block,
    once meanwhile and not for every trace. Where it has another name nothing is done."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        made = vars(ONNXRegistry)[MAKE]
    except (ImportError, KeyError):
        yield
        return
    setattr(ONNXRegistry, MAKE, staticmethod(cache(getattr(ONNXRegistry, MAKE))))
    try:
        yield
    finally:
        setattr(ONNXRegistry, MAKE, made)


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

"""ONNX: export converted models and run them. Optional packages are imported on first use."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConfigError, require_package
from ..frontend.tracing.trace_memory import low_memory_export as low_memory_export

if TYPE_CHECKING:
    import torch

    from ..converted.model import MoEModel
    from .report import OnnxReport


def require() -> None:
    """Raises ConfigError if the optional packages are missing."""
    for package in ("onnx", "onnx_ir", "onnxruntime", "onnxscript"):
        require_package(package, "onnx", "ONNX")


def export_onnx(
    moe: MoEModel,
    path: str | os.PathLike,
    lowering: Literal["auto", "dense", "sparse", "contrib"] = "auto",
    dtype: torch.dtype | str | None = None,
    opset: int = 20,
    example_inputs: Any = None,
    cache: bool = False,
    external_data: bool | None = None,
    open_experts: bool = False,
    open_inputs: bool = False,
    verify: bool = True,
) -> OnnxReport:
    """Write a converted model as an ONNX file, and verify it in ONNX Runtime against PyTorch.

    Batch and sequence dimensions are dynamic. Inputs have the names of the call's arguments,
    outputs those of the output's fields, initializers the state-dict names. Inactive experts are
    left out.

    path: the .onnx file.
    lowering: how feed-forward experts are written. ``"dense"``: every expert on every row;
        ``"sparse"``: each on its own rows, in standard operators; ``"contrib"``: ONNX Runtime's
        com.microsoft.MoE; ``"auto"``: the fastest by measured times, which the report explains.
    dtype: float16 or bfloat16 (a name or torch's) exports a cast copy; ``"int8"`` or ``"int4"``
        quantizes the weights of feed-forward experts for com.microsoft.QMoE. The file is then
        compared with a model that has the dequantized weights.
    opset: operator set, 20 to 23.
    example_inputs: as for `convert`.
    cache: the graph also takes and returns the key-value cache (and a prefix router's running
        sums): one graph for a prompt and for every token after it.
    external_data: weights in a file next to the model; None: if they exceed 1.5 GB.
    open_experts: write feed-forward experts as stacks that a file of `export_experts` can replace
        with any number of experts; LoRA experts always are.
    open_inputs: experts and router are graph inputs with a default value.
    verify: compare the file with PyTorch on other inputs, sizes and routes.

    Within ``with moe_rewrite.onnx.low_memory_export():`` conversion and export take less memory.

    A file at `path` is only replaced if everything succeeds. Raises ConfigError for a wrong option,
    CaptureError for an operator that ONNX cannot express, EquivalenceError if the file computes
    something else.
    """
    require()
    from ..converted.model import MoEModel
    from .export import export
    from .options import ExportOptions

    if not isinstance(moe, MoEModel):
        raise ConfigError(f"moe={type(moe).__name__}: expected a converted model; call convert()")
    options = ExportOptions(
        lowering, dtype, opset, example_inputs, cache, external_data, open_experts, open_inputs,
        verify,
    )  # fmt: skip
    return export(moe, path, options)


def load(path: str | os.PathLike, experts: str | os.PathLike | None = None, **options: Any) -> Any:
    """See `moe_rewrite.onnx.runtime.generate.load`."""
    require()
    from .runtime.generate import load

    return load(path, experts, **options)


def export_experts(
    moe: MoEModel, file: str | os.PathLike, example_inputs: Any = None
) -> dict[str, tuple[int, ...]]:
    """See `moe_rewrite.onnx.runtime.expert_files.export_experts`."""
    require()
    from .runtime.expert_files import export_experts

    return export_experts(moe, file, example_inputs)


def export_adapter(
    moe: MoEModel, name: str | int, file: str | os.PathLike, example_inputs: Any = None
) -> None:
    """See `moe_rewrite.onnx.runtime.expert_files.export_adapter`."""
    require()
    from .runtime.expert_files import export_adapter

    export_adapter(moe, name, file, example_inputs)


def generator(
    path: str | os.PathLike, experts: str | os.PathLike | None = None, **options: Any
) -> Any:
    """See `moe_rewrite.onnx.runtime.generate.Generator`; for files exported with ``cache=True``."""
    require()
    from .runtime.generate import Generator

    return Generator(path, experts, **options)

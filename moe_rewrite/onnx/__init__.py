"""ONNX: export, run and serve what was converted. Nothing is imported before it is used."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConfigError, require_package
from ..frontend.trace_memory import low_memory_export as low_memory_export

if TYPE_CHECKING:
    import torch

    from ..converted.model import MoEModel
    from .report import OnnxReport


def require() -> None:
    """Raises ConfigError where the optional packages are missing."""
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
    """Write a converted model as an ONNX file that ONNX Runtime has been held against.

    Batch and sequence stay open. Inputs bear the names of the call's arguments, outputs those of
    the output's fields, initializers the state-dict names; experts that are off are left out.

    lowering: how feed-forward experts are written. ``"dense"``: every expert on every row;
    ``"sparse"``: each on its rows, in standard operators; ``"contrib"``: ONNX Runtime's
    com.microsoft.MoE; ``"auto"`` chooses from measured times. The report says what, and why.
    dtype: float16 or bfloat16 (names or torch's) to export a cast copy; ``"int8"`` or ``"int4"``:
    weights of feed-forward experts in com.microsoft.QMoE, of which the proof is against what these
    stand for. example_inputs: as for `convert`.
    cache: also take and give the key-value cache (and a prefix router's running sums): one graph
    for a prompt and for each token behind it. external_data: weights in a file beside the model;
    None: where they exceed 1.5 GB. open_experts: feed-forward experts in stacks, one after the
    other, so that a file of `export_experts` may bring others, and more of them, as it may for LoRA
    experts anyway. open_inputs: experts and router are inputs with a default.
    verify: run the file in ONNX Runtime against PyTorch, on other inputs, sizes and routes.

    Within ``with moe_rewrite.onnx.low_memory_export():`` conversion and export take less memory.

    Nothing is left at `path` unless all of that succeeds, and what was there stays. Raises
    ConfigError for a wrong option, CaptureError for an operator that ONNX cannot express,
    EquivalenceError where the file computes something else.
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
    """See `moe_rewrite.onnx.runtime.load`."""
    require()
    from .runtime.generate import load

    return load(path, experts, **options)


def export_experts(
    moe: MoEModel, file: str | os.PathLike, example_inputs: Any = None
) -> dict[str, tuple[int, ...]]:
    """See `moe_rewrite.onnx.experts.export_experts`."""
    require()
    from .runtime.expert_files import export_experts

    return export_experts(moe, file, example_inputs)


def export_adapter(
    moe: MoEModel, name: str | int, file: str | os.PathLike, example_inputs: Any = None
) -> None:
    """See `moe_rewrite.onnx.experts.export_adapter`."""
    require()
    from .runtime.expert_files import export_adapter

    export_adapter(moe, name, file, example_inputs)


def generator(
    path: str | os.PathLike, experts: str | os.PathLike | None = None, **options: Any
) -> Any:
    """See `moe_rewrite.onnx.runtime.Generator`; a file exported with ``cache=True``."""
    require()
    from .runtime.generate import Generator

    return Generator(path, experts, **options)

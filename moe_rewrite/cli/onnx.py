"""``moe-rewrite export``: a saved conversion as a file for ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError


def export(
    model: Annotated[
        str, typer.Argument(help="Hugging Face folder, hub name, or package.module:factory")
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="The .onnx file; .safetensors with --experts-only, .onnx_adapter with --adapter"
        ),
    ],
    experts: Annotated[
        Path | None, typer.Option(help="Folder of saved experts; without, freshly converted")
    ] = None,
    split: Annotated[
        str, typer.Option(help="Without --experts: where the deep segment starts")
    ] = "auto",
    mode: Annotated[str, typer.Option(help="Without --experts: pmoe or upcycle")] = "pmoe",
    lowering: Annotated[
        str, typer.Option(help="Of feed-forward experts: auto, dense, sparse or contrib")
    ] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16, bfloat16; int8 or int4 for experts alone")
    ] = None,
    opset: Annotated[int, typer.Option(help="ONNX operator set, 20 to 23")] = 20,
    cache: Annotated[
        bool, typer.Option("--cache", help="Take and give the key-value cache, to generate")
    ] = False,
    external_data: Annotated[
        bool | None, typer.Option(help="Weights in a file beside; default: above 1.5 GB")
    ] = None,
    open_experts: Annotated[
        bool, typer.Option("--open-experts", help="Feed-forward experts whose number may change")
    ] = False,
    open_inputs: Annotated[
        bool, typer.Option("--open-inputs", help="Experts and router are inputs with a default")
    ] = False,
    experts_only: Annotated[
        bool, typer.Option("--experts-only", help="Only experts and router, for a deployed file")
    ] = False,
    adapter: Annotated[
        str | None, typer.Option(help="Only this expert, as an adapter file of ONNX Runtime")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Compare ONNX Runtime with PyTorch")] = True,
) -> None:
    """Write a converted model as an ONNX file, and compare it in ONNX Runtime with PyTorch.

    Example: moe-rewrite export ./my-llama --experts ./my-experts --out my-llama.onnx

    moe-rewrite export ./my-llama --experts ./more-experts --experts-only --out more.safetensors
    """
    import moe_rewrite

    from .loading import load_model, parse_split

    moe_rewrite.onnx.require()
    wanted = ".safetensors" if experts_only else ".onnx_adapter" if adapter else ".onnx"
    if out.suffix != wanted:
        raise ConfigError(f"--out {out}: expected the name of a file that ends in {wanted}")
    dense = load_model(model)
    moe: Any
    with moe_rewrite.onnx.low_memory_export():  # the process does nothing else
        if experts is not None:
            moe = moe_rewrite.load(experts, dense)
        else:
            moe = moe_rewrite.convert(dense, mode=mode, split=parse_split(split))
    if experts_only:
        shapes = moe_rewrite.onnx.export_experts(moe, out)
        typer.echo(f"{out}: {out.stat().st_size} bytes, {len(shapes)} tensors, to be read by")
        typer.echo(f"moe_rewrite.onnx.load('model.onnx', experts={str(out)!r})")
        return
    if adapter is not None:
        moe_rewrite.onnx.export_adapter(moe, adapter, out)
        typer.echo(f"{out}: expert {adapter}, for a file that was exported with --open-inputs")
        return
    with moe_rewrite.onnx.low_memory_export():
        report = moe_rewrite.export_onnx(
            moe, out, lowering=lowering, dtype=dtype, opset=opset, cache=cache,  # type: ignore[arg-type]
            external_data=external_data, open_experts=open_experts, open_inputs=open_inputs,
            verify=verify,
        )  # fmt: skip
    typer.echo(str(report))

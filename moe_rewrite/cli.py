"""The command line: the same words as the functions."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import typer

app = typer.Typer(
    help="Rewrite dense PyTorch models into mixture-of-experts models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
Model = Annotated[
    str, typer.Argument(help="Hugging Face folder, hub name, or package.module:factory")
]
Split = Annotated[
    str, typer.Option(help="Block index, negative index, fraction of FLOPs, module name or auto")
]


@app.command("inspect")
def inspect_command(
    model: Model,
    split: Annotated[
        str | None, typer.Option(help="Also say where this split, as convert takes it, would cut")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the blocks to this file, as JSON")
    ] = None,
) -> None:
    """Print the blocks of a model, with output shape, parameters and FLOPs.

    Example: moe-rewrite inspect ./my-llama --split 0.5 --json blocks.json
    """
    import moe_rewrite

    from .loading import load_model, parse_split

    depth = moe_rewrite.inspect(load_model(model))
    typer.echo(str(depth))
    facts: dict[str, Any] = {
        "model": depth.model,
        "blocks": [asdict(block) for block in depth.blocks],
    }
    if split is not None:
        index, node = depth.resolve(parse_split(split))
        facts["split"] = {"asked": split, "first_deep_block": index, "cut": node}
        typer.echo(
            f"split {split}: blocks 0..{index - 1} are shallow"
            if index > 0
            else f"split {split}: every block is deep"
        )
    if json_file is not None:
        json_file.write_text(json.dumps(facts, indent=1) + "\n")
        typer.echo(f"written to {json_file}")


@app.command()
def convert(
    model: Model,
    out: Annotated[Path | None, typer.Option(help="Folder to save the experts in")] = None,
    split: Split = "auto",
    mode: Annotated[str, typer.Option(help="Recipe: pmoe")] = "pmoe",
    router: Annotated[str, typer.Option(help="Kind of router: auto or token")] = "auto",
    granularity: Annotated[
        str, typer.Option(help="What a gate reads: auto, token, prefix or sequence")
    ] = "auto",
    top_k: Annotated[int | None, typer.Option(help="Experts kept per row; default all")] = None,
    rank: Annotated[int, typer.Option(help="Rank of each LoRA expert")] = 8,
    alpha: Annotated[float, typer.Option(help="LoRA alpha; the scale is alpha / rank")] = 16.0,
    sites: Annotated[str, typer.Option(help="all, all+head, or endings with commas")] = "all",
    num_experts: Annotated[int, typer.Option(help="Experts to begin with")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the report")] = False,
) -> None:
    """Convert a model, print what was done, and save what was added.

    Example: moe-rewrite convert ./my-llama --split 16 --out ./my-experts
    """
    import moe_rewrite

    from .loading import load_model, parse_split

    spec: Any = router  # a name that convert() checks, unless an option asks for more
    if router in ("auto", "token") and not (granularity == "auto" and top_k is None):
        default = "prefix" if router == "auto" else moe_rewrite.TokenRouter().granularity
        spec = moe_rewrite.TokenRouter(
            top_k=top_k, granularity=cast(Any, default if granularity == "auto" else granularity)
        )
    chosen = sites if sites in ("all", "all+head") else tuple(sites.split(","))
    experts = moe_rewrite.LoRAExperts(rank=rank, alpha=alpha, sites=chosen)
    done = moe_rewrite.convert(
        load_model(model), mode=mode, split=parse_split(split), router=spec,
        experts=experts, num_experts=num_experts, dry_run=dry_run,
    )  # fmt: skip
    if not isinstance(done, moe_rewrite.MoEModel):
        typer.echo(str(done))
        return
    typer.echo(str(done.report))
    if out is not None:
        done.save_pretrained(out)
        typer.echo(f"saved to {out}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture and figures")] = Path(
        "moe-rewrite-demo"
    ),
    model: Annotated[str | None, typer.Option(help="A causal language model instead")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of TRACE-format tasks")] = None,
    split: Split = "auto",
    epochs: Annotated[int, typer.Option(help="Epochs per language task")] = 1,
    max_samples: Annotated[int, typer.Option(help="Training items per language task")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of everything random")] = 0,
) -> None:
    """Teach a converted network new tasks and see what it forgets, against plain fine-tuning.

    With no options: handwritten digits, offline, in about a minute.
    Example: moe-rewrite demo --model ./my-llama --data ./TRACE
    """
    from .errors import ConfigError
    from .loading import load_model, parse_split, read_tasks

    if (model is None) != (data is None):
        raise ConfigError("--model and --data go together")
    if model is None or data is None:
        from .demo.digits import digits

        digits(out, seed)
        return
    tasks = {part: read_tasks(data, part) for part in ("train", "test")}
    from .demo.language import language

    language(model, load_model(model), tasks, out, parse_split(split), epochs, max_samples, seed)


def main() -> None:
    """Entry point: an error of the library is one red line, not a traceback."""
    from .errors import MoeRewriteError

    try:
        app()
    except MoeRewriteError as error:
        typer.secho(str(error), fg=typer.colors.RED, err=True)
        raise SystemExit(1) from None

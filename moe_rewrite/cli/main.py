"""The command line: the same names as the functions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from ..errors import ConfigError, MoeRewriteError
from . import continual
from .inspect import inspect_command
from .onnx import export
from .serve import say_without_tokenizer, serve, serve_adapters

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


app.command("inspect")(inspect_command)


@app.command()
def convert(
    context: typer.Context,
    model: Model,
    out: Annotated[Path | None, typer.Option(help="Folder to save the experts in")] = None,
    standard: Annotated[
        Path | None, typer.Option(help="Folder for a checkpoint of a standard class (upcycling)")
    ] = None,
    standalone: Annotated[
        Path | None, typer.Option(help="Folder that transformers reads without this package")
    ] = None,
    split: Split = "auto",
    mode: Annotated[str, typer.Option(help="Recipe: pmoe, upcycle or carve")] = "pmoe",
    router: Annotated[str, typer.Option(help="Kind of router: auto, token or patch")] = "auto",
    granularity: Annotated[
        str, typer.Option(help="What a token gate reads: auto, token, prefix or sequence")
    ] = "auto",
    top_k: Annotated[int | None, typer.Option(help="Experts kept per row; default all")] = None,
    grid: Annotated[int | None, typer.Option(help="Patches along each side of the map")] = None,
    per_expert: Annotated[
        int | None, typer.Option(help="Patches that each expert takes of a sample")
    ] = None,
    gate: Annotated[
        str | None,
        typer.Option(help="Gates: selected (the default) or all; of patches also hard"),
    ] = None,
    experts: Annotated[
        str, typer.Option(help="Kind of experts: auto (the recipe's), lora, ffn, carved or region")
    ] = "auto",
    rank: Annotated[int, typer.Option(help="Rank of each LoRA expert")] = 8,
    alpha: Annotated[float, typer.Option(help="LoRA alpha; the scale is alpha / rank")] = 16.0,
    sites: Annotated[str, typer.Option(help="all, all+head, or endings with commas")] = "all",
    region: Annotated[
        str | None, typer.Option(help="Modules that experts replace, with commas")
    ] = None,
    halo: Annotated[bool, typer.Option(help="Gather patches with their neighbours")] = True,
    width: Annotated[float, typer.Option(help="Share of a region's hidden channels")] = 1.0,
    every: Annotated[int, typer.Option(help="Of the feed-forward regions, each n-th")] = 1,
    shared: Annotated[
        str | None, typer.Option(help="A feed-forward beside routed ones: plain or sigmoid")
    ] = None,
    active: Annotated[
        float, typer.Option(help="Share of hidden units a token runs, carved")
    ] = 0.75,
    num_experts: Annotated[
        int | None,
        typer.Option(help="Experts to begin with; default 1, or 8 in upcycling and carving"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the report")] = False,
) -> None:
    """Convert a model, print what was done, and save what was added.

    Examples: moe-rewrite convert ./my-llama --split 16 --out ./my-experts

    moe-rewrite convert mine:resnet --split layer3 --experts region --grid 8 --per-expert 16
    """
    import moe_rewrite
    from moe_rewrite import CarvedExperts, FFNExperts, LoRAExperts, PatchRouter, RegionExperts

    from ..utils.folders import require_place
    from .loading import load_model, parse_split, token_router

    patches = router == "patch" or experts == "region" or not (grid is per_expert is None)
    spec: Any = router  # a name that convert() checks, unless an option asks for more
    asked = {"gate": gate, "top_k": top_k, "granularity": granularity}
    asked = {name: value for name, value in asked.items() if value not in (None, "auto")}
    if patches and router in ("auto", "patch"):
        spec = PatchRouter(grid=grid, per_expert=per_expert, gate=cast(Any, gate or "selected"))
    elif router in ("auto", "token") and asked:
        spec = token_router(mode, router, asked)
    chosen = sites if sites in ("all", "all+head") else tuple(sites.split(","))
    bodies: dict[str, Any] = {
        "lora": lambda: LoRAExperts(rank=rank, alpha=alpha, sites=chosen),
        "ffn": lambda: FFNExperts(every=every, sites=chosen, shared=cast(Any, shared)),
        "carved": lambda: CarvedExperts(num_experts or 8, active=active, sites=chosen),
        "region": lambda: RegionExperts(tuple(region.split(",")) if region else None, halo, width),
    }
    own = {"upcycle": "ffn", "carve": "carved"}.get(mode, "lora")
    kind = own if experts == "auto" else experts
    if kind not in bodies:
        raise ConfigError(f"--experts {experts}: expected auto, lora, ffn, carved or region")
    _require_used(context, kind)
    for folder in () if dry_run else (out, standard, standalone):
        if folder is not None:
            require_place(folder)  # before the work
    dense = load_model(model)
    done = moe_rewrite.convert(
        dense, mode=mode, split=parse_split(split), router=spec,
        experts=bodies[kind](), num_experts=num_experts, dry_run=dry_run,
    )  # fmt: skip
    if not isinstance(done, moe_rewrite.MoEModel):
        typer.echo(str(done))
        return
    typer.echo(str(done.report))
    if out is not None:
        done.save_pretrained(out)
        typer.echo(f"saved to {out}")
    if standard is not None:
        typer.echo(f"{done.save_standard(standard)} checkpoint saved to {standard}")
    if standalone is not None:
        done.save_pretrained(standalone, standalone=True)
        typer.echo(f"saved to {standalone}, to be read with trust_remote_code=True")
    for folder in (standard, standalone):
        if folder is not None:
            say_without_tokenizer(dense, folder)


KIND_OF = {  # options of convert that only one kind of experts has
    "rank": "lora", "alpha": "lora", "every": "ffn", "shared": "ffn", "active": "carved",
    "region": "region", "halo": "region", "width": "region",
}  # fmt: skip


def _require_used(context: typer.Context, kind: str) -> None:
    """Raises ConfigError for an option on the command line that these experts do not have."""
    for name, of in KIND_OF.items():
        source = context.get_parameter_source(name)
        if of != kind and source is not None and source.name == "COMMANDLINE":
            raise ConfigError(
                f"--{name} is for experts of the kind {of}, and these are {kind}: leave it out, or "
                f"convert with another --experts or --mode"
            )


@app.command()
def patches(
    model: Model,
    images: Annotated[Path, typer.Option(help="A .png, .jpg or .npy file, or a folder of them")],
    experts: Annotated[
        Path | None, typer.Option(help="Folder of saved experts; without, freshly converted")
    ] = None,
    split: Split = "auto",
    grid: Annotated[int | None, typer.Option(help="Patches along each side of the map")] = None,
    per_expert: Annotated[int | None, typer.Option(help="Patches that each expert takes")] = None,
    mean: Annotated[str, typer.Option(help="Subtracted from each channel, with commas")] = "0",
    std: Annotated[str, typer.Option(help="Each channel is divided by, with commas")] = "1",
    count: Annotated[int, typer.Option(help="Images at most")] = 8,
    out: Annotated[Path, typer.Option(help="The picture")] = Path("patches.png"),
) -> None:
    """Save a picture of which patches each expert takes over real images.

    Example: moe-rewrite patches mine:resnet --experts ./my-experts --images ./photos
    """
    import moe_rewrite

    from ..frontend.choose_host import host_of
    from .loading import load_model, parse_numbers, parse_split
    from .plot_patches import draw_patches
    from .read_images import read_images

    dense = load_model(model)
    leaf = next(iter(host_of(dense).arguments(None).values()))
    if leaf.ndim != 4:
        raise ConfigError(f"{model} takes {tuple(leaf.shape)}: expected a model of images")
    x = read_images(images, tuple(leaf.shape[1:]))[:count]
    x = (x - parse_numbers(mean).view(-1, 1, 1)) / parse_numbers(std).view(-1, 1, 1)
    if experts is not None:
        moe = moe_rewrite.load(experts, dense)
    else:
        router = moe_rewrite.PatchRouter(grid=grid, per_expert=per_expert)
        moe = cast(Any, moe_rewrite.convert(dense, split=parse_split(split), router=router))
    typer.echo(f"picture: {draw_patches(moe, x.to(leaf), out)}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of tables, pictures and checkpoints")] = Path(
        "moe-rewrite-demo"
    ),
    kind: Annotated[str, typer.Option(help="digits, or language: short texts")] = "digits",
    model: Annotated[str | None, typer.Option(help="Your own model instead, with --tasks")] = None,
    tasks: Annotated[
        list[Path] | None, typer.Option(help="Folders of its tasks, as compare takes them")
    ] = None,
    more: continual.More = None,
    split: Split = "auto",
    epochs: Annotated[int, typer.Option(help="Epochs of each of your tasks")] = 1,
    max_samples: Annotated[int, typer.Option(help="Items of each part of a task at most")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of everything random")] = 0,
) -> None:
    """Teach a converted network new tasks and see what it forgets, compared with fine-tuning.

    With no options: handwritten digits; --kind language: a small decoder that tells stories learns
    recipes, counting and Spanish. Both offline, in two or three minutes.

    Example: moe-rewrite demo --model ./my-llama --tasks ./TRACE
    """
    from ..demo.digits import METHODS, digits
    from ..demo.language import language

    kinds = {"digits": digits, "language": language}
    if kind not in kinds:
        raise ConfigError(f"--kind {kind}: expected one of {', '.join(kinds)}")
    if (model is None) != (tasks is None):
        raise ConfigError("--model and --tasks go together")
    if model is None or tasks is None:
        kinds[kind](out, seed)
        return
    continual.run_methods(
        list(METHODS), model=model, tasks=tasks, more=more, split=split, epochs=epochs,
        max_samples=max_samples, seed=seed, out=out,
    )  # fmt: skip


app.command()(export)
app.command()(serve_adapters)
app.command()(serve)
app.command()(continual.learn)
app.command()(continual.compare)


def main() -> None:
    """Entry point: an error of the library is one red line, not a traceback."""
    try:
        app()
    except MoeRewriteError as error:
        typer.secho(str(error), fg=typer.colors.RED, err=True)
        raise SystemExit(1) from None

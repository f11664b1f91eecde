"""``moe-rewrite inspect``: the blocks of a model, as a table, as JSON, and as a page to look at."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import require
from ..errors import ConfigError


def inspect_command(
    model: Annotated[
        str, typer.Argument(help="Hugging Face folder, hub name, or package.module:factory")
    ],
    split: Annotated[
        str | None, typer.Option(help="Also say where this split, as convert takes it, would cut")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the blocks to this file, as JSON")
    ] = None,
    tasks: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folders of tasks, as learn takes them: measure how well they are told apart at "
            "every split, by which --split auto then chooses"
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="With --tasks: what the model can do already; default: its own text"),
    ] = None,
    samples: Annotated[int, typer.Option(help="With --tasks: items of each at most")] = 32,
    max_length: Annotated[int, typer.Option(help="With --tasks: tokens of an item at most")] = 512,
    per_task: Annotated[
        int | None, typer.Option(help="With --tasks: classes of a task, as learn takes them")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Also write a page: what each split would do. It needs no network"),
    ] = None,
    experts: Annotated[
        Path | None, typer.Option(help="Folder of saved experts: the page shows these")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="Folder of learn: the page shows its experts and their shares over time"),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="The page shows how this text is routed (with experts)")
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(help="The page shows how this .png, .jpg or .npy is routed (with experts)"),
    ] = None,
    mean: Annotated[str, typer.Option(help="Subtracted from each channel, with commas")] = "0",
    std: Annotated[str, typer.Option(help="Each channel is divided by, with commas")] = "1",
) -> None:
    """Print the blocks of a model, with output shape, parameters and FLOPs.

    Examples: moe-rewrite inspect ./my-llama --split 0.5 --json blocks.json

    moe-rewrite inspect ./my-llama --split auto --tasks ./TRACE

    moe-rewrite inspect ./my-llama --html page.html --run ./run --text "Once upon a time"
    """
    import moe_rewrite

    from ..utils.atomic_files import write_json
    from .loading import load_model, parse_split
    from .read_tasks import read_calibration, require_folders

    _require_together(html, experts, run, text, image)
    if base is not None and not tasks:
        raise ConfigError("--base is one of the tasks to tell apart: add --tasks FOLDER")
    require(samples >= 2, "samples", samples, "an int >= 2")
    require_folders(tasks or [])
    dense = load_model(model)
    asked = "auto" if split is None else parse_split(split)
    calibration = None
    if tasks:
        options = {"max_length": max_length, "per_task": per_task, "mean": mean, "std": std}
        calibration = read_calibration(dense, model, tasks, base, samples, **options)
    example = None if calibration is None else next(iter(calibration.values()))[0]
    own_page = html if experts is None and run is None else None
    depth = moe_rewrite.inspect(dense, example, own_page, asked, calibration)
    typer.echo(str(depth))
    facts: dict[str, Any] = {
        "model": depth.model,
        "blocks": [asdict(block) for block in depth.blocks],
    }
    if depth.curve is not None:
        facts["curve"] = asdict(depth.curve) | {"chosen": depth.curve.split}
    if split is not None:
        index, node = depth.resolve(asked)
        facts["split"] = {"asked": split, "first_deep_block": index, "cut": node}
        typer.echo(
            f"split {split}: blocks 0..{index - 1} are shallow"
            if index > 0
            else f"split {split}: every block is deep"
        )
    if json_file is not None:
        write_json(json_file, facts)
        typer.echo(f"written to {json_file}")
    if html is not None:
        if experts is not None or run is not None:
            _write_page(html, model, dense, experts, run, text, image, (mean, std))
        typer.echo(f"page: {html}")


def _require_together(
    html: Path | None, experts: Path | None, run: Path | None, text: str | None, image: Path | None
) -> None:
    given = {"--experts": experts, "--run": run, "--text": text, "--image": image}
    used = [name for name, value in given.items() if value is not None]
    if used and html is None:
        raise ConfigError(f"{used[0]} is for the page: add --html FILE")
    if text is not None and image is not None:
        raise ConfigError("--text and --image: expected one sample")
    if used and experts is None and run is None:
        raise ConfigError(
            f"{used[0]} shows how trained experts route: add --experts FOLDER (of convert --out) or "
            "--run FOLDER (of learn --out)"
        )


def _write_page(
    html: Path, model: str, dense: Any, experts: Path | None, run: Path | None, text: str | None,
    image: Path | None, scale: tuple[str, str],
) -> None:  # fmt: skip
    """The page of saved experts."""
    import moe_rewrite

    from ..continual.expert_shares import expert_shares

    shares = None if run is None else expert_shares(run)
    folder = experts
    if folder is None:
        assert shares is not None
        folder = shares.experts
    moe = moe_rewrite.load(folder, dense)
    inputs, tokens = None, None
    if text is not None:
        inputs, tokens = _of_text(model, text)
    elif image is not None:
        inputs = _of_image(model, dense, image, *scale)
    over_time = None if shares is None else shares.facts(moe.names)
    moe.report.html(html, inputs, tokens, over_time)


def _of_text(model: str, text: str) -> tuple[dict[str, Any], list[str]]:
    """(input ids of one sample, the text of each token)."""
    from transformers import AutoTokenizer

    if ":" in model and not Path(model).exists():
        raise ConfigError(f"--text: {model} has no tokenizer; expected a Hugging Face model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text, return_tensors="pt").input_ids
    if not ids.numel():
        raise ConfigError(f"--text {text!r}: it has no tokens; expected some words")
    pieces = tokenizer.convert_ids_to_tokens(ids[0].tolist())
    return {"input_ids": ids}, [_shown(tokenizer, piece) for piece in pieces]


def _shown(tokenizer: Any, piece: str) -> str:
    """A token's text, with the space that it begins with; part of a character as its own name."""
    text = tokenizer.convert_tokens_to_string([piece])
    if "\ufffd" in text:
        return piece
    begins = piece[:1] in ("\u2581", "\u0120") and not text.startswith(" ")
    return f" {text}" if begins else text


def _of_image(model: str, dense: Any, image: Path, mean: str, std: str) -> Any:
    """(1, C, H, W), normalised."""
    from ..frontend.choose_host import host_of
    from .loading import parse_numbers
    from .read_images import read_images

    leaf = next(iter(host_of(dense).arguments(None).values()))
    if leaf.ndim != 4:
        raise ConfigError(f"--image: {model} takes {tuple(leaf.shape)}: expected a model of images")
    x = read_images(image, tuple(leaf.shape[1:]))[:1].to(leaf)
    return (x - parse_numbers(mean).view(-1, 1, 1)) / parse_numbers(std).view(-1, 1, 1)

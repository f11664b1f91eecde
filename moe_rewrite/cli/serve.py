"""``moe-rewrite serve-adapters`` and ``serve``: experts as adapters, and a proxy that chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError


def serve_adapters(
    model: Annotated[
        str, typer.Argument(help="Hugging Face folder, hub name, or package.module:factory")
    ],
    out: Annotated[Path, typer.Argument(help="New folder for adapters and router")],
    experts: Annotated[Path, typer.Option(help="Folder of saved experts")],
    verify: Annotated[bool, typer.Option(help="Compare what was written before it is kept")] = True,
) -> None:
    """Write every saved expert as a PEFT adapter, and the router that chooses among them.

    Example: moe-rewrite serve-adapters ./my-llama ./served --experts ./my-experts
    """
    import moe_rewrite

    from ..serve.facts import ROUTER
    from .loading import load_model

    dense = load_model(model)
    moe_rewrite.load(experts, dense).save_adapters(out, verify=verify)
    typer.echo(f"adapters and router saved to {out}")
    say_without_tokenizer(dense, out / ROUTER)


def say_without_tokenizer(dense: Any, folder: Path) -> None:
    """Print what to do where a language model was written without a tokenizer."""
    reads_text = getattr(dense, "main_input_name", "") == "input_ids"
    if reads_text and not (folder / "tokenizer_config.json").exists():
        typer.echo(
            f"without a tokenizer: none is in the model's folder. Copy its files to {folder} to send "
            "texts instead of token ids"
        )


def serve(
    folder: Annotated[Path, typer.Argument(help="Folder of adapters, as serve-adapters wrote it")],
    url: Annotated[str, typer.Option(help="The engine's address")] = "http://127.0.0.1:8000",
    engine: Annotated[str, typer.Option(help="vllm, sglang or llama.cpp")] = "vllm",
    base: Annotated[
        str | None, typer.Option(help="The frozen model's name at the engine; default: its path")
    ] = None,
    name: Annotated[str, typer.Option(help="The model that clients ask for")] = "moe",
    mixture: Annotated[
        bool, typer.Option("--mixture", help="All adapters with their gates (llama.cpp)")
    ] = False,
    host: Annotated[str, typer.Option(help="Address to listen at")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at")] = 8080,
) -> None:
    """Choose an adapter for every request of OpenAI's clients, and forward it to an engine.

    Example: moe-rewrite serve ./served --engine vllm --url http://127.0.0.1:8000
    """
    from ..serve.proxy import Proxy
    from ..serve.router import AdapterRouter

    try:
        proxy = Proxy(
            AdapterRouter.load(folder), url, engine, base=base, name=name, mixture=mixture,
            host=host, port=port,
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(f"{host}:{port} cannot be listened at ({error})") from None
    address, number = proxy.server_address[:2]
    typer.echo(f"model {name!r} at http://{address!s}:{number}/v1, engine at {url}")
    with proxy:
        proxy.serve_forever()

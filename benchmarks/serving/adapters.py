"""Adapters behind the proxy, compared with the converted model restricted to what was chosen."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from moe_rewrite.serve.facts import BASE
from moe_rewrite.serve.proxy import Proxy
from moe_rewrite.serve.router import AdapterRouter

from .answers import Answer, compared, greedy

MODEL = "trace"  # the dense model's name at the engine


@contextmanager
def proxied(folder: Path, engine_url: str, engine: str, **options: Any) -> Iterator[str]:
    """The address of a proxy before an engine."""
    proxy = Proxy(AdapterRouter.load(folder), engine_url, engine, base=MODEL, port=0, **options)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{proxy.server_address[1]}"
    finally:
        proxy.shutdown()
        proxy.server_close()


def gates_of(moe: Any, ids: list[int]) -> dict[str, float]:
    """The converted model's gates after a prompt, the frozen model's among them."""
    gates = moe.route(input_ids=torch.tensor([ids])).gates[0, -1]
    return dict(zip([BASE, *moe.names], gates.tolist(), strict=True))


def restricted(moe: Any, gates: dict[str, float], mixture: bool) -> AbstractContextManager:
    """The converted model with the gates of a request for all its positions."""
    if mixture:
        return moe.use_experts({name: gates[name] for name in moe.names})
    best = max(gates, key=lambda name: gates[name])
    return moe.disable_experts() if best == BASE else moe.use_expert(best)


def compared_adapters(
    moe: Any, dense: Any, tokens: Any, prompts: Sequence[tuple[str, str]],
    ask: Callable[[list[int], str], Answer], mixture: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row a prompt. ask: sends a prompt, as ids or as text, through the proxy."""
    rows = []
    for task, text in prompts:
        ids = tokens(text)["input_ids"]
        answer = ask(ids, text)
        gates = gates_of(moe, ids)
        with restricted(moe, gates, mixture):
            row = compared(task, ids, answer, moe, dense)
        row["router"] = max(gates, key=lambda name: gates[name]) == answer["choice"]
        row["own"] = answer["tokens"] == greedy(moe, ids)
        rows.append(row)
    return rows

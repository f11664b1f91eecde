"""One small random model of every family of timm, where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

from torch import nn

SMALL = ("test", "atto", "femto", "pico", "nano", "tiny", "mini", "xxs", "small", "xs", "18", "_s")


def families() -> Iterator[tuple[str, str, Callable[[], nn.Module]]]:
    """(task, name of the model, what makes it)."""
    if find_spec("timm") is None:
        return
    import timm

    for module in timm.list_modules():
        names = timm.list_models(module=module)
        if names:
            name = min(names, key=_size)
            yield "timm", name, partial(_made, name)


def _made(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False).eval()


def _size(name: str) -> tuple[int, int, str]:
    """Small models first, by the words in their names."""
    return next((i for i, word in enumerate(SMALL) if word in name), len(SMALL)), len(name), name

"""The training flags of a host's modules while a graph is captured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.modules.batchnorm import _NormBase

from ..frontend.host import Host
from .base import Decisions
from .recipe import Recipe


@contextmanager
def modules_in_mode(host: Host, mode: str, recipe: Recipe, decisions: Decisions) -> Iterator[None]:
    """Put a host in eval mode, or in training mode except for what is frozen: modules before the
    cut, batch norms unless the recipe updates them, other modules that would write statistics, and
    modules that contain the cut if they cannot be traced in training mode."""
    model = host.module
    flags = [(m, m.training) for m in model.modules()]
    shallow = decisions.shallow if recipe.freeze else frozenset()
    try:
        model.train(mode == "train")
        for path in shallow if mode == "train" else ():
            model.get_submodule(path).eval()
        for name, module in model.named_modules() if mode == "train" else ():
            frozen = isinstance(module, _NormBase) and recipe.batch_norm == "frozen"
            around = decisions.containers_eval and _is_around(name, decisions.shallow)
            if frozen or around or name in decisions.evaluated:
                module.training = False
        yield
    finally:
        for module, training in flags:
            module.training = training


def _is_around(name: str, shallow: frozenset[str]) -> bool:
    return name == "" or any(path.startswith(name + ".") for path in shallow)

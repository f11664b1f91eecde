"""Hooks that users put on modules: a graph would run them once, when it is captured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..errors import ConversionError

KINDS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}
# transformers' enable_input_require_grads(): experts need no gradient of the frozen embeddings
HARMLESS = ("make_inputs_require_grads",)


def require_no_hooks(model: nn.Module) -> None:
    """Raise ConversionError if a user's hook is on a module."""
    named = [
        f"{name or 'the model itself'}: {KINDS[kind]} {_name(table[key])}"
        for name, kind, table, key in hooks_of_users(model)
        if not _name(table[key]).endswith(HARMLESS)
    ]
    if named:
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        raise ConversionError(
            f"{type(model).__name__} has hooks, which a captured graph would run only once, when "
            f"it is captured ({'; '.join(named[:3])}{more}). Remove them before converting "
            "(handle.remove()); they can be put back on the original afterwards. On the converted "
            "model put hooks on the blocks in moe.shallow and moe.deep."
        )


def hooks_of_users(model: nn.Module) -> Iterator[tuple[str, str, dict[int, Any], int]]:
    """(module, kind, table, key) of every hook but those by which PyTorch itself computes weights
    (spectral norm, weight norm, pruning, lazy layers)."""
    for name, module in model.named_modules():
        for kind in KINDS:
            table = getattr(module, kind)
            for key, hook in list(table.items()):
                made = getattr(hook, "__module__", None) or type(hook).__module__
                if not made.startswith("torch.nn."):
                    yield name, kind, table, key


def _name(hook: Any) -> str:
    return getattr(hook, "__qualname__", type(hook).__qualname__)

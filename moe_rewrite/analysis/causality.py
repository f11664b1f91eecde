"""Whether a model looks ahead: tried out on random inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..capture import is_hf
from ..examples import random_arguments


@torch.no_grad()
def is_causal(host: nn.Module, arguments: dict[str, Any], rows: str | None) -> bool:
    """Whether no output at a position depends on a later position of the argument `rows`.

    rows: the argument that holds the routed positions, such as ``input_ids``; None: no argument
    does (the patches of an image), and the model counts as one that looks at everything. On the
    meta device nothing can be tried: Hugging Face's word is taken, else True, since gates that
    look back only are right for every model.
    """
    if rows is None:
        return False
    if any(p.is_meta for p in host.parameters()):
        if not is_hf(host):
            return True
        from ..hf import is_causal_lm

        return is_causal_lm(host) or rows.startswith("decoder_")
    given = random_arguments(arguments, host)
    changed = given[rows].clone()
    changed[:, -1] = changed[:, -1] + 1 if changed.is_floating_point() else 0
    try:
        before = _of_positions(host(**given), changed.shape[:2])
        after = _of_positions(host(**(given | {rows: changed})), changed.shape[:2])
    except (IndexError, RuntimeError, ValueError):
        return True
    if not before:
        return False  # one output a sample: there is nothing ahead of it
    return all(
        torch.allclose(a[:, :-1], b[:, :-1], rtol=1e-4, atol=1e-5, equal_nan=True)
        for a, b in zip(before, after, strict=True)
    )


def _of_positions(outputs: Any, rows: torch.Size) -> list[torch.Tensor]:
    """The outputs that have one value a position."""
    leaves = pytree.tree_leaves(outputs)
    tensors = [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return [t for t in tensors if t.ndim == 3 and t.shape[:2] == rows]

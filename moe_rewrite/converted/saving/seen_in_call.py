"""Where a converted model's features and rows are in the modules of the dense one, seen in a call.

Imports transformers, so it is imported only when it is asked for.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...errors import ConversionError
from ...experts.lora.parameters import LoRAParameters
from ...frontend.example_inputs import random_arguments
from ...ir.equivalence import TOLERANCE


def lora_sites(moe: Any) -> dict[str, LoRAParameters]:
    """The sites with LoRA experts, by module name."""
    return {s.site.name: s for s in moe.expert_sites() if isinstance(s, LoRAParameters)}


def observed(moe: Any, what: str) -> tuple[str, str, dict[str, str]]:
    """(module whose input are the features at the cut, the argument's name, layout of the rows at
    each site), seen in a call of the dense model.

    what: was asked for, which errors name. Raises ConversionError where one of them is in no module.
    """
    dense = moe._host_module()
    arguments = random_arguments(moe.host.arguments(None), moe.host.vocabulary(), batch=3)
    features = moe.features(**arguments)
    if features.ndim != 3:
        raise ConversionError(
            f"{what}: the cut carries {tuple(features.shape)}, expected a sequence (batch, length, "
            "width): split the model where it has one"
        )
    copy = moe.host.working_copy().module.eval()
    sites, seen = lora_sites(moe), _Seen(features)
    for name, module in copy.named_modules():
        if name in sites:
            _require_map(dense, name, module, sites[name], what)
        module.register_forward_pre_hook(seen.hook(name, name in sites), with_kwargs=True)
    copy(**arguments)
    if seen.error > TOLERANCE[features.dtype] * max(1.0, float(features.abs().max())):
        raise ConversionError(
            f"{what}: no module's input is what the router reads, so there is no place for it: split "
            "the model before one of its blocks (split=k)"
        )
    if seen.calls[seen.place] > 1:
        raise ConversionError(
            f"{what}: {seen.place}, at the cut, runs {seen.calls[seen.place]} times in a call, and the "
            "router once: split a model whose layers share no weights"
        )
    missing = sorted(set(sites) - set(seen.layouts))
    odd = [n for n, kinds in seen.layouts.items() if len(kinds) != 1 or "" in kinds]
    for name in [*missing, *odd][:1]:
        raise ConversionError(
            f"{what}: {name} is no module that is called on the router's rows: leave it out by "
            "LoRAExperts(sites=[...])"
        )
    return seen.place, seen.argument, {n: kinds.pop() for n, kinds in seen.layouts.items()}


class _Seen:
    """What hooks saw in a call: the first module whose input is nearest to the features, and the
    layouts of the rows at sites."""

    def __init__(self, features: torch.Tensor) -> None:
        self.features = features
        self.place, self.argument, self.error = "", "", float("inf")
        self.layouts: dict[str, set[str]] = {}
        self.calls: Counter[str] = Counter()

    def hook(self, name: str, is_site: bool) -> Any:
        def look(module: nn.Module, unnamed: tuple, kwargs: dict[str, Any]) -> None:
            self.calls[name] += 1
            given = (("", unnamed[0]),) if unnamed else kwargs.items()
            argument, x = next(
                ((n, v) for n, v in given if isinstance(v, torch.Tensor)), ("", None)
            )
            if x is None:
                return
            if is_site:
                self.layouts.setdefault(name, set()).add(self._layout(x))
            if name and x.shape == self.features.shape and x.dtype == self.features.dtype:
                error = float((x - self.features).abs().max())
                if error < self.error:
                    self.place, self.argument, self.error = name, argument, error

        return look

    def _layout(self, x: torch.Tensor) -> str:
        """Empty for an unknown one."""
        batch, length = self.features.shape[:2]
        if x.ndim > 2 and x.shape[:2] == (batch, length):
            return "rows"
        if x.ndim == 2:
            return {batch * length: "flat", batch: "samples"}.get(x.shape[0], "")
        return ""


def _require_map(dense: Any, name: str, module: nn.Module, site: LoRAParameters, what: str) -> None:
    """Raises ConversionError unless a site is a linear map with a weight of its own."""
    plain = isinstance(module, nn.Linear | Conv1D) and not (site.site.kernel or site.site.groups)
    if not plain or site.site.weight != f"{name}.weight":
        raise ConversionError(
            f"{what}: {name} is no linear map with a weight of its own: leave it out by "
            "LoRAExperts(sites=[...])"
        )
    if dense.get_submodule(name) is dense.get_output_embeddings():
        raise ConversionError(
            f"{what}: {name} is the output head, which engines have in a form of their own: leave it "
            "out by LoRAExperts(sites='all')"
        )

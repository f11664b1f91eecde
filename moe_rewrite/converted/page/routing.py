"""The routing of one sample, as plain values for the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ...errors import InputError
from ...routing.plan import RoutingPlan
from ...utils.pictures import png_uri

DIGITS = 4  # of a gate


@torch.no_grad()
def routing_facts(
    moe: Any, inputs: Any, tokens: Sequence[str] | None, token_map: tuple[int, int] | None
) -> dict[str, Any]:
    """The routing of the first sample of a call.

    moe: a MoEModel.
    inputs: of the call: a tensor, tuple or dict of tensors with a batch dimension first.
    tokens: texts of the first sample's rows; None: their numbers.
    token_map: (H, W) of the map whose patches are the last H * W rows, or None.

    Raises InputError for a model whose layers have routers of their own, and for another number of
    texts than of rows.
    """
    if moe.router.by_layer:
        raise InputError(
            "the routing of a sample: every layer of this model has a router of its own, and the "
            "page shows the one at the cut; leave the sample out, or convert with "
            "FFNExperts(router='cut')"
        )
    arguments = moe.host.arguments(inputs)
    plan = moe.route(**arguments)
    image = next((v[0] for v in arguments.values() if _is_image(v)), None)
    shared = {
        "outputs": _outputs(plan, moe.names),
        "image": None if image is None else png_uri(image),
    }
    if plan.patch_ids is not None:
        return shared | _patches(plan, moe.names)
    gates, chosen = plan.gates[0], plan.selected[0]
    if gates.ndim == 2 and len(gates) == 1:  # of a sequence as a whole
        gates, chosen = gates[0], chosen[0]
    if gates.ndim == 1:  # one gate a sample
        return shared | {"kind": "sample", "rows": [_row("the whole sample", gates, chosen)]}
    length = plan.rows[1]
    if tokens is not None and len(tokens) != length:
        raise InputError(f"tokens: {len(tokens)} texts for {length} rows; expected one a row")
    texts = tokens or [f"row {i}" for i in range(length)]
    rows = [_row(*of) for of in zip(texts, gates, chosen, strict=True)]
    if token_map is None or image is None or math.prod(token_map) > length:
        return shared | {"kind": "tokens", "rows": rows}
    prefix = length - math.prod(token_map)
    return shared | {"kind": "map", "rows": rows, "grid": list(token_map), "prefix": prefix}


def _is_image(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.ndim == 4 and leaf.is_floating_point()


def _outputs(plan: RoutingPlan, names: Sequence[str]) -> list[str]:
    return [*(["frozen model"] if plan.base is not None else []), *names]


def _row(text: str, gates: torch.Tensor, chosen: torch.Tensor) -> dict[str, Any]:
    return {"text": text, "gates": _numbers(gates), "chosen": int(chosen)}


def _patches(plan: RoutingPlan, names: Sequence[str]) -> dict[str, Any]:
    """The patches that each active expert takes, best first, with their gates."""
    assert plan.patch_ids is not None and plan.patch_gates is not None
    taken = [
        {"expert": names[e], "patches": ids.tolist(), "gates": _numbers(gates)}
        for e, ids, gates in zip(plan.active, plan.patch_ids[0], plan.patch_gates[0], strict=False)
    ]
    return {"kind": "patches", "grid": [plan.grid, plan.grid], "taken": taken}


def _numbers(values: torch.Tensor) -> list[float]:
    return [round(v, DIGITS) for v in values.tolist()]

"""A dense model with experts, in plain PyTorch: every product and module is followed as it runs.

Of the converted model only parameters, by state-dict names, and the features at its cut are read.
The cut is where the dense model first computes these features, counted in operations.
"""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from tests.helpers.reference_patches import choose, rows_of, spans

LOW = (torch.float16, torch.bfloat16)
EXPERTS = "moe_rewrite.experts."
PRODUCTS = (
    F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.functional.einsum,
)  # fmt: skip
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class NotFollowed(Exception):
    """The reference does not know this form; other checks still hold."""


class Counted(TorchFunctionMode):
    """Calls `seen(number, output)` after each operation."""

    def __init__(self, seen):
        super().__init__()
        self.seen, self.number = seen, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.number += 1
        return self.seen(self.number, func, args, kwargs or {}, output)


MOVED = {  # where routers read features: last in a sequence, second in a map
    "as it is": lambda x: x,
    "a line": lambda x: x.transpose(-1, -2),
    "channels last": lambda x: x.movedim(-1, 1),
    "positions first": lambda x: x.transpose(0, 1),
}


def where_cut(model, arguments, features):
    """(number of the operation whose output is nearest to these features, 0 for the input itself,
    the first if there are several; how it is moved to be them; number of the last)."""
    best, allowed = [float("inf")], 1e-2 if features.dtype in LOW else 1e-5

    def seen(number, func, args, kwargs, output):
        if not isinstance(output, torch.Tensor) or output.dtype != features.dtype:
            return output
        for how, move in MOVED.items():
            if how != "as it is" and output.ndim < 3:
                continue
            moved = move(output)
            if moved.shape == features.shape and features.numel():
                error = (moved - features).abs().nan_to_num(nan=0.0, posinf=0.0).max().item()
                error /= max(1.0, features.abs().nan_to_num(0.0, 0.0, 0.0).max().item())
                if error < best[0]:
                    best[:] = error, number, how, number
                elif error == best[0]:
                    best[3] = number
        return output

    seen(0, None, (), {}, arguments["x"])
    with torch.no_grad(), Counted(seen):
        model(**arguments)
    if best[0] > allowed:
        raise NotFollowed("the cut is inside an operation")
    return best[1:]


def token_gates(features, mask, state, spec, active):
    """(gates of the active experts (..., E), gate of the frozen model (..., 1) or 0)."""
    x = features.float()
    if x.ndim > 3:
        pool = F.adaptive_avg_pool2d if x.ndim == 4 else F.adaptive_avg_pool3d
        x = pool(x, spec.pool).flatten(1)
    if spec.normalize:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    if x.ndim == 3 and spec.granularity != "token":
        of_rows = mask is not None and mask.shape == x.shape[:2]  # not where rows were taken out
        counts = mask.float() if of_rows else torch.ones(x.shape[:2])
        kept = torch.where(counts[..., None] > 0, x, torch.zeros(()))
        if spec.granularity == "prefix":
            x = kept.cumsum(1) / counts.cumsum(1).clamp_min(1)[..., None]
        else:
            x = kept.sum(1, keepdim=True) / counts.sum(1).clamp_min(1)[:, None, None]
    rows = torch.stack([state[f"moe_rewrite.router.rows.{e}"] for e in active])
    logits = x @ rows[:, :-1].T + rows[:, -1]
    if spec.base:
        logits = torch.cat([torch.zeros(*x.shape[:-1], 1), logits], -1)
    if spec.policy == "expert":
        return expert_choice(logits, mask, spec.capacity), 0.0
    full = logits.softmax(-1)
    if spec.top_k is not None and spec.top_k < logits.shape[-1]:
        low = logits.topk(spec.top_k, -1).values[..., -1:]
        dropped = logits < low
        if spec.gate == "all":
            full = full.masked_fill(dropped, 0.0)
        else:
            full = logits.masked_fill(dropped, float("-inf")).softmax(-1)
    return (full[..., 1:], full[..., :1]) if spec.base else (full, 0.0)


def expert_choice(logits, mask, capacity):
    gates = logits.softmax(-1)
    _, length, experts = gates.shape
    taken = max(1, min(length, round(capacity * length / experts)))
    scores = gates.detach()
    if mask is not None:
        scores = scores.masked_fill(mask[..., None] == 0, -1.0)
    picks = scores.sort(dim=1, descending=True, stable=True).indices[:, :taken]  # first of equals
    chosen = torch.zeros_like(gates).scatter(1, picks, 1.0)
    return gates * chosen * (scores >= 0)


def over_axis(length, grid):
    """(length, g): the share of each patch in each position."""
    share = torch.zeros(length, grid)
    for i, (low, high) in enumerate(spans(length, grid)):
        share[low:high, i] = 1.0
    if length < grid:
        for y in range(length):
            low, high = y * grid // length, -(-(y + 1) * grid // length)
            share[y, low:high] = 1 / (high - low)
    return share


class Patches:
    """Gates of a PatchRouter's plan over maps of any size, and over tokens."""

    def __init__(self, features, state, spec, sides):
        prefix = spec.prefix_tokens or 0
        if features.ndim == 3:
            features = features[:, prefix:].transpose(1, 2).unflatten(2, sides)
        self.picks, taken = choose(features, rows_of(state), spec)
        batch, experts, _ = taken.shape
        flat = torch.zeros(batch, experts, spec.grid**2).scatter(-1, self.picks, taken)
        self.cells = flat.unflatten(2, (spec.grid, spec.grid))
        self.grid, self.sides, self.prefix = (
            spec.grid,
            sides,
            taken.mean(-1)[:, None].expand(-1, prefix, -1),
        )

    def over_map(self, height, width):
        """(B, E, H, W)"""
        down, across = over_axis(height, self.grid), over_axis(width, self.grid)
        return torch.einsum("yi,xj,beij->beyx", down, across, self.cells)

    def over_tokens(self):
        """(B, S, E)"""
        return torch.cat([self.prefix, self.over_map(*self.sides).flatten(2).transpose(1, 2)], 1)


def laid_out(gates, y, layout, lead):
    """(B, S, E) or (B, E) gates, shaped to broadcast over rows y (..., D)."""
    if layout == "other":
        raise NotFollowed("rows of a form that the reference does not know")
    if layout in ("flat", "flat swapped", "swapped") and len(lead) == 1:  # gates of a map's samples
        rows = y.shape[0] // lead[0]
        if layout == "swapped":
            gates = gates[None]
        else:
            gates = gates.repeat(rows, 1) if layout != "flat" else gates.repeat_interleave(rows, 0)
    elif layout in ("flat", "flat swapped", "swapped"):
        full = gates.expand(*lead, -1)
        full = full.transpose(0, 1) if "swapped" in layout else full
        gates = full.flatten(0, 1) if "flat" in layout else full
    elif gates.ndim == 3 and gates.shape[1] == 1:
        gates = gates.squeeze(1)
    if gates.ndim == 3 and layout == "one before":  # which has no row at the cut
        gates = F.pad(gates, (0, 0, 1, 0))
    if gates.ndim == 3 and layout == "every second" and gates.shape[1] > y.shape[1]:  # at the cut
        gates = gates[:, ::2]
    if layout == "sample" and gates.ndim == 3:
        raise AssertionError("rows that are not the plan's have experts")
    while gates.ndim < y.ndim:
        gates = gates.unsqueeze(-2)
    lead_y, lead_g = y.shape[:-1], gates.shape[:-1]
    fits = all(g in (1, n) for g, n in zip(lead_g, lead_y, strict=True)) and lead_g[0] == lead_y[0]
    assert fits, f"gates {tuple(gates.shape)} at rows {tuple(y.shape)}"
    return gates

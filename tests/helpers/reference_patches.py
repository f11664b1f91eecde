"""Expert choice over patches in plain loops, and regions with experts as masked dense runs.

Only the parameters are read from the converted model, by their state-dict names.
"""

from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

EXPERTS = "moe_rewrite.experts."


def spans(length, grid):
    return [(i * length // grid, (i + 1) * length // grid) for i in range(grid)]


def choose(features, rows, spec):
    """For a (B, C, H, W) map: (B, E, l) patches taken, and (B, E, l) their gates."""
    x = features.float()
    if spec.normalize:
        x = x / (x.square().mean((1, 2, 3), keepdim=True) + 1e-6).sqrt()
    B, C, H, W = x.shape
    g = spec.grid
    h, w = -(-H // g), -(-W // g)
    scores = []
    for top, bottom in spans(H, g):
        for left, right in spans(W, g):
            patch = x[:, :, top:bottom, left:right]
            if spec.features == "pooled":
                scores.append(patch.mean((2, 3)) @ rows.T)
                continue
            padded = torch.zeros(B, C, h, w)
            padded[:, :, : bottom - top, : right - left] = patch
            scores.append(padded.flatten(1) @ rows.T)
    scores = torch.stack(scores, -1)  # (B, E, n)
    picks, gates = [], []
    for sample in scores:
        for row in sample:
            order = sorted(range(g * g), key=lambda p: (-row[p].item(), p))[: spec.per_expert]
            taken = row[order]
            if spec.gate == "selected":
                gate = taken.softmax(0)
            elif spec.gate == "all":
                gate = row.softmax(0)[order]
            else:
                gate = torch.ones(len(order))
            if spec.gate != "hard" and spec.scale == "mean-one":
                gate = gate * len(order)
            picks.append(order)
            gates.append(gate)
    shape = (B, len(rows), spec.per_expert)
    return torch.tensor(picks).view(shape), torch.stack(gates).view(shape)


def gate_maps(picks, gates, grid, size):
    """(E, B, 1, H, W): each expert's gates over a map of this size, zero where it took nothing."""
    B, E, _ = picks.shape
    maps = []
    for e in range(E):
        of_expert = []
        for b in range(B):
            canvas = torch.zeros(size)
            for p, gate in zip(picks[b, e].tolist(), gates[b, e], strict=True):
                (top, bottom), (left, right) = (
                    spans(size[0], grid)[p // grid],
                    spans(size[1], grid)[p % grid],
                )
                mask = torch.zeros(size)
                mask[top:bottom, left:right] = 1
                canvas = canvas + gate * mask
            of_expert.append(canvas)
        maps.append(torch.stack(of_expert).unsqueeze(1))
    return torch.stack(maps)


def averaged(patch_ids, gates, grid, size):
    """Gate maps; where the map has fewer positions than the grid, means of the patches there."""
    if min(size) >= grid:
        return gate_maps(patch_ids, gates, grid, size)
    fine = gate_maps(patch_ids, gates, grid, (grid, grid))
    return F.adaptive_avg_pool2d(fine.flatten(0, 1), size).unflatten(0, fine.shape[:2])


def rows_of(state):
    names = [k for k in state if k.startswith("moe_rewrite.router.rows.")]
    return torch.stack([state[f"moe_rewrite.router.rows.{e}"] for e in range(len(names))])


def weights_of(state, expert):
    """An expert's tensors by the names of the dense ones."""
    found = {}
    for name, tensor in state.items():
        if name.startswith(EXPERTS) and ".copies." in name:
            dense, _, number = name.split(".copies.", 1)[1].rpartition(".")
            if int(number) == expert:
                found[dense] = tensor
    return found


class Squeeze(nn.Module):
    """The means of a map over all positions, as models write them."""

    def __init__(self, form="pool"):
        super().__init__()
        self.form = form

    def forward(self, x):
        if self.form == "pool":
            return F.adaptive_avg_pool2d(x, 1)
        return x.mean((2, 3), keepdim=self.form == "kept")


@contextmanager
def statistics_over(model, seen, part):
    """Norms and squeezes of the model take their statistics, for each row of the batch, over the
    values seen(x, row), of shape (C, positions), and not over the row's map.

    part: part(weight, row), where a row lies in a weight that varies by position.
    """

    def forward(module, x):
        rows = []
        for row in range(len(x)):
            values = seen(x, row)
            if isinstance(module, Squeeze):
                mean = values.mean(1)
                rows.append(mean if module.form == "flat" else mean[:, None, None])
                continue
            C, layer = x.shape[1], isinstance(module, nn.LayerNorm)
            groups = (
                1 if layer else C if isinstance(module, nn.InstanceNorm2d) else module.num_groups
            )
            of_group = values.reshape(groups, -1)
            mean, square = of_group.mean(1), of_group.var(1, correction=0)
            y = x[row].unflatten(0, (groups, -1)) - mean[:, None, None, None]
            y = (y / (square + module.eps).sqrt()[:, None, None, None]).flatten(0, 1)
            if module.weight is not None:
                each = (module.weight, module.bias)
                scale, shift = (part(t, row) if layer else t[:, None, None] for t in each)
                y = y * scale + shift
            rows.append(y)
        return torch.stack(rows)

    kinds = (nn.GroupNorm, nn.InstanceNorm2d, nn.LayerNorm, Squeeze)
    found = [m for m in model.modules() if isinstance(m, kinds)]
    for module in found:
        module.forward = partial(forward, module)
    try:
        yield
    finally:
        for module in found:
            del module.forward


def over_taken(model, picks, grid):
    """Statistics of maps over the positions of an expert's patches. picks: (B, l)."""

    def seen(x, row):
        size, g = x.shape[2:], grid
        taken = torch.zeros(size, dtype=torch.bool)
        for p in picks[row].tolist():
            (top, bottom), (left, right) = spans(size[0], g)[p // g], spans(size[1], g)[p % g]
            taken[top:bottom, left:right] = True
        return x[row][:, taken]

    return statistics_over(model, seen, lambda weight, row: weight)


def over_patches(model, picks, grid):
    """Statistics of patches, of which each sample has as many rows, over all of a sample's."""
    taken = picks.shape[1]

    def seen(x, row):
        first = row // taken * taken
        return torch.cat([x[i].flatten(1) for i in range(first, first + taken)], 1)

    def part(weight, row):
        p = picks.flatten()[row].item()
        rows, cols = (spans(n, grid) for n in weight.shape[1:])
        (top, bottom), (left, right) = rows[p // grid], cols[p % grid]
        return weight[:, top:bottom, left:right]

    return statistics_over(model, seen, part)


def masked_dense(model, x, state, spec, cut, exit_, entry=None, statistics=False):
    """The model with a region's experts: every expert runs the whole map, gates mask its output.

    cut: module whose input the router reads. exit_: module whose output is the region's.
    statistics: are taken over the patches of each expert.
    """
    seen = {}
    handle = model.get_submodule(cut).register_forward_pre_hook(
        lambda module, args: seen.setdefault("features", args[0])
    )
    with torch.no_grad():
        model(x)
    handle.remove()
    rows = rows_of(state)
    picks, gates = choose(seen["features"], rows, spec)
    outputs = []
    for e in range(len(rows)):
        handle = model.get_submodule(exit_).register_forward_hook(
            lambda module, args, out: outputs.append(out)
        )
        with over_taken(model, picks[:, e], spec.grid) if statistics else nullcontext():
            functional_call(model, weights_of(state, e), (x,))
        handle.remove()
    maps = gate_maps(picks, gates, spec.grid, outputs[0].shape[2:])
    routed = sum(m * y for m, y in zip(maps, outputs, strict=True))
    handle = model.get_submodule(exit_).register_forward_hook(lambda *_: routed)
    out = model(x)
    handle.remove()
    return out


def isolated(region, x, state, prefix, spec, features, size, statistics=False):
    """The region's output where each expert runs the module `region` on patches cut out.

    prefix: of the region's names in the model. features: at the cut. size: of the output map.
    """
    rows = rows_of(state)
    picks, gates = choose(features, rows, spec)
    g = spec.grid
    B, E, taken = picks.shape
    out = None
    for e in range(E):
        patches = []
        for b in range(B):
            for p in picks[b, e].tolist():
                (top, bottom), (left, right) = (
                    spans(x.shape[2], g)[p // g],
                    spans(x.shape[3], g)[p % g],
                )
                patches.append(x[b, :, top:bottom, left:right])
        weights = {k.removeprefix(prefix): v for k, v in weights_of(state, e).items()}
        with over_patches(region, picks[:, e], g) if statistics else nullcontext():
            y = functional_call(region, weights, (torch.stack(patches),))
        out = torch.zeros(B, y.shape[1], *size) if out is None else out
        for b in range(B):
            for i, p in enumerate(picks[b, e].tolist()):
                (top, bottom), (left, right) = spans(size[0], g)[p // g], spans(size[1], g)[p % g]
                placed = torch.zeros_like(out)
                placed[b, :, top:bottom, left:right] = gates[b, e, i] * y[b * taken + i]
                out = out + placed
    return out

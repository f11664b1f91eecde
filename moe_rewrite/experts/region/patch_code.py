"""A region's code: for the whole map, and for isolated patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ...analysis.conv_region import Region, map_size
from ...errors import ConversionError
from ...ir import patch_grid
from ...ir.aten import value
from ...ir.ops import argument, op, set_argument
from ...ir.patch_grid import Table
from ...ir.program import Code, Program

aten = torch.ops.aten
DRY = 2  # samples in a dry run: batch norm refuses to train on a single value


@dataclass(frozen=True)
class PatchCode:
    """code(x, *outside, *weights): x (N, C, h, w) gathered patches -> (N, C', h', w').

    entry, exit: positions of the patches in the map that is read and in the one that is written.
    outside: masks that the code takes, each (n, 1, h, w) bool, True outside the map.
    macs: multiply-adds of one patch.
    """

    code: Code
    entry: Table
    exit: Table
    outside: tuple[torch.Tensor, ...]
    macs: int


def weights_of(program: Program, region: Region) -> list[fx.Node]:
    """The placeholders that a region's code takes after its map, in graph order."""
    used = {s for n in region.nodes for s in n.all_input_nodes if s.op == "placeholder"}
    order = {n: i for i, n in enumerate(program.graph.nodes)}
    return sorted(used - {region.entry}, key=order.__getitem__)


def whole_code(
    program: Program, region: Region, sizes: dict[fx.Node, int] | None = None, masked: bool = False
) -> Code:
    """code(x, *weights): the region as captured.

    sizes: for nodes with a number of channels as an argument, the expert's number.
    masked: return code(x, outside, *weights), which first sets x to zero outside.
    """
    graph = fx.Graph()
    entry = graph.placeholder("x")
    outside = graph.placeholder("outside") if masked else None
    copies = {n: graph.placeholder(n.name) for n in weights_of(program, region)}
    copies[region.entry] = entry
    if masked:
        copies[region.entry] = graph.call_function(aten.masked_fill.Scalar, (entry, outside, 0.0))
    for node in region.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta = {}
        resize(copies[node], node, sizes or {})
    graph.output(copies[region.exit])
    return Code(fx.GraphModule(torch.nn.Module(), graph))


def isolated_code(
    program: Program, region: Region, grid: int, sizes: dict[fx.Node, int],
    weights: list[torch.Tensor],
) -> PatchCode:  # fmt: skip
    """The code of isolated patches: their borders are padded like the map's (pMoE, arXiv
    2306.04073, section 3)."""
    entry = patch_grid.patches(*map_size(region.entry), grid)
    exit_ = patch_grid.patches(*map_size(region.exit), grid)
    # the positions that pad a smaller patch belong to a neighbour: outside
    outside = () if entry.inside is None else (~entry.inside.unsqueeze(1),)
    code = whole_code(program, region, sizes, masked=bool(outside))
    made, macs = dry_run(code, one_patch(region, entry, outside), weights, device_of(region))
    if made != (exit_.rows, exit_.cols):
        raise ConversionError(
            f"region {region.name!r}: an isolated patch of {entry.rows}x{entry.cols} becomes "
            f"{made[0]}x{made[1]}, and a patch of the region's output is {exit_.rows}x{exit_.cols}: "
            "choose a grid that divides both maps, or halo=True"
        )
    return PatchCode(code, entry, exit_, outside, macs)


def device_of(region: Region) -> torch.device:
    return value(region.entry).device


def one_patch(
    region: Region, entry: Table, outside: tuple[torch.Tensor, ...]
) -> list[torch.Tensor]:
    channels = int(value(region.entry).shape[1])
    dtype = value(region.entry).dtype
    x = torch.empty(DRY, channels, entry.rows, entry.cols, dtype=dtype, device="meta")
    return [x, *(mask[:1].to("meta") for mask in outside)]


def dry_run(
    code: Code, given: list[torch.Tensor], weights: list[torch.Tensor], device: torch.device
) -> tuple[tuple[int, int], int]:
    """((height, width) of the code's output, multiply-adds of one sample), from DRY samples.

    given, weights: inputs of the shapes and dtypes that the code takes.
    device: the model's, on which the code may create tensors.
    """

    class Counting(fx.Interpreter):
        macs = 0

        def run_node(self, n: fx.Node) -> Any:
            out = super().run_node(n)
            if op(n).product in ("filter", "linear"):
                weight = self.env[argument(n, "weight")]
                channels = weight.shape[0]
                self.macs += out.numel() // channels * weight.numel()
            return out

    counting = Counting(code.module)
    try:
        with torch.no_grad(), FakeTensorMode():
            fakes = [torch.empty(t.shape, dtype=t.dtype, device=device) for t in (*given, *weights)]
            out = counting.run(*fakes)
    except RuntimeError as error:
        line = str(error).splitlines()[0]
        raise ConversionError(
            f"a patch of {tuple(given[0].shape[2:])} cannot be run: {line}"
        ) from None
    return (out.shape[2], out.shape[3]), counting.macs // DRY


def resize(copy: fx.Node, node: fx.Node, sizes: dict[fx.Node, int]) -> None:
    """Set the expert's number of channels in an operation that has it as an argument."""
    if node not in sizes:
        return
    normalized = op(node).normalized
    if normalized:
        set_argument(copy, normalized, [sizes[node]])
    else:
        set_argument(copy, "groups", sizes[node])

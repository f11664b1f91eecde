"""A region's code for the whole map, and what codes for patches share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ...analysis.conv_region import Region
from ...errors import ConversionError
from ...ir.any_layout import allow_any_layout
from ...ir.aten import value
from ...ir.ops import argument, op, set_argument
from ...ir.patch_grid import Table
from ...ir.program import Code, Program

DRY = 2  # samples in a dry run: batch norm refuses to train on a single value


@dataclass(frozen=True)
class PatchCode:
    """code(x, *taken, *tables, *weights): x (N, C, h, w) gathered patches -> (N, C', h', w').

    entry, exit: positions of the patches in the map that is read and in the one that is written.
    tables: what the code takes for each patch of the grid: masks (n, 1, h, w) bool, True outside
        the map, and positions (n, h * w) int64 in a map.
    macs: multiply-adds of one patch.
    counts: the code takes the number of patches of each sample, over which it has statistics.
    """

    code: Code
    entry: Table
    exit: Table
    tables: tuple[torch.Tensor, ...]
    macs: int
    counts: bool = False


def weights_of(program: Program, region: Region) -> list[fx.Node]:
    """The placeholders that a region's code takes after its map, in graph order."""
    used = {s for n in region.nodes for s in n.all_input_nodes if s.op == "placeholder"}
    order = {n: i for i, n in enumerate(program.graph.nodes)}
    return sorted(used - {region.entry}, key=order.__getitem__)


def whole_code(program: Program, region: Region) -> Code:
    """code(x, *weights): the region as captured."""
    graph = fx.Graph()
    copies = {region.entry: graph.placeholder("x")}
    copies |= {n: graph.placeholder(n.name) for n in weights_of(program, region)}
    for node in region.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta = {}
    return code_of(graph, copies[region.exit])


def code_of(graph: fx.Graph, made: fx.Node) -> Code:
    graph.output(made)
    allow_any_layout(graph)
    return Code(fx.GraphModule(torch.nn.Module(), graph))


def device_of(region: Region) -> torch.device:
    return value(region.entry).device


def one_patch(
    region: Region, entry: Table, tables: tuple[torch.Tensor, ...], counts: bool = False
) -> list[Any]:
    """What a patch's code takes before weights, for DRY patches."""
    channels = int(value(region.entry).shape[1])
    dtype = value(region.entry).dtype
    x = torch.empty(DRY, channels, entry.rows, entry.cols, dtype=dtype, device="meta")
    return [x, *([DRY] if counts else []), *(table[:1].to("meta") for table in tables)]


def dry_run(
    code: Code, given: list[Any], weights: list[torch.Tensor], device: torch.device
) -> tuple[tuple[int, int], int]:
    """((height, width) of the code's output, multiply-adds of one sample), from DRY samples.

    given, weights: numbers, and inputs of the shapes and dtypes that the code takes.
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
            fakes = [
                torch.empty(t.shape, dtype=t.dtype, device=device) if hasattr(t, "shape") else t
                for t in (*given, *weights)
            ]
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

"""Rows inside windows of a map: compared with running the operations on numbered positions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe_rewrite.analysis.window_rows import WindowRows, Windows
from moe_rewrite.frontend.capture import program_of
from moe_rewrite.ir.aten import value
from moe_rewrite.ir.ops import output_of

SIDES = (4, 6)


def windows(x, w=2):
    batch, tall, wide, channels = x.shape
    x = x.view(batch, tall // w, w, wide // w, w, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, channels)


WORK = {
    "windows": windows,
    "shifted": lambda x: windows(x.roll((-1, -1), (1, 2))),
    "padded": lambda x: windows(F.pad(x, (0, 0, 1, 1, 0, 2))),
    "cut": lambda x: windows(x[:, 1:3, :4]) * 1.0,
    "rows first": lambda x: x.transpose(1, 2).flatten(0, 1),
    "flat": lambda x: windows(x).flatten(0, 1).relu(),
    "every second": lambda x: x[:, ::2, 1::2, :],
    "halves": lambda x: windows(x).chunk(2, -1)[1],
}  # fmt: skip
OTHER = {
    "sorted": lambda x: windows(x).sort(1).values,
    "mean of neighbours": lambda x: windows(F.avg_pool2d(x, (1, 1)) + x.flip(1)),
    "two orders": lambda x: windows(x) + windows(x.roll(1, 1)),
    "joined": lambda x: torch.cat([x, x.roll(1, 2)], -1),
    "channels moved": lambda x: x.permute(0, 3, 1, 2),
    "batch moved": lambda x: x.roll(1, 0),
    "mirrored": lambda x: F.pad(x.permute(0, 3, 1, 2), (1, 1, 1, 1), "reflect").permute(0, 2, 3, 1),
}  # fmt: skip


class Net(nn.Module):
    def __init__(self, work):
        super().__init__()
        self.work = work

    def forward(self, x):
        return self.work(x)


def followed(work):
    program = program_of(Net(work), torch.zeros(2, *SIDES, 4))
    (entry,) = program.leaves()
    (made,) = output_of(program.graph)
    positions = torch.arange(24).view(1, *SIDES)

    def start(node):
        if node is entry:
            return Windows(SIDES, positions)
        of_sample = getattr(value(node), "shape", ())[1:3] == (1, 1)  # a map of one position
        return Windows((1, 1), torch.zeros(1, 1, 1, dtype=torch.int64)) if of_sample else None

    rows = WindowRows(list(program.graph.nodes), start, value(entry).shape[0])
    return rows, made


@pytest.mark.parametrize("case", WORK)
def test_tables_are_what_numbers_say(case):
    """Positions from one on, since padding is zero."""
    rows, made = followed(WORK[case])
    found = rows.known[made]
    for batch in (1, 3):
        numbers = torch.arange(1.0, 25).view(1, *SIDES, 1).expand(batch, *SIDES, 4)
        got = WORK[case](numbers.contiguous())[..., 0]
        want = (found.table + 1).repeat(batch, *(1 for _ in found.table.shape[1:]))
        assert torch.equal(got, want.float().view(got.shape))


@pytest.mark.parametrize("case", OTHER)
def test_rows_that_are_not_followed(case):
    rows, made = followed(OTHER[case])
    assert made not in rows.known


@pytest.mark.parametrize("factor", [lambda x: 0.5, lambda x: x.mean((1, 2, 3), keepdim=True)])
def test_rows_are_told_by_where_they_are_added(factor):
    """Of a value whose own rows are not followed; stochastic depth has a factor for each sample."""

    def work(x):
        y = windows(x.roll(1, 1)).cumsum(1)
        y = (y * 2.0).view(-1, 2, 3, 2, 2, 4).permute(0, 1, 3, 2, 4, 5).reshape(-1, *SIDES, 4)
        return x + y.roll(-1, 1) * factor(x)

    rows, _ = followed(work)
    (made,) = [n for n in rows.nodes if "cumsum" in n.name]
    forward, _ = followed(lambda x: windows(x.roll(1, 1)))
    (same,) = [n for n in forward.nodes if n.name.startswith("reshape")]
    assert made not in rows.known
    assert torch.equal(rows.of(made, made).table, forward.known[same].table)

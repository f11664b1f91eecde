"""Rows along a line, followed through operations: compared with changing a single position."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe_rewrite.analysis.line_rows import Along, has_rows, line_rows
from moe_rewrite.frontend.capture import program_of
from moe_rewrite.ir.ops import output_of

N = 7  # positions, and features


class Net(nn.Module):
    def __init__(self, work):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(N, N, 3)
        self.back = nn.ConvTranspose1d(N, N, 3)
        self.linear, self.norm = nn.Linear(N, N), nn.LayerNorm(N)
        self.work = work

    def forward(self, x):
        return self.work(self, x)


def turned(work):
    """Work on (B, features, positions)."""
    return lambda m, x: work(m, x.transpose(1, 2)).transpose(1, 2)


KEPT = {
    "pointwise": lambda m, x: torch.tanh(m.linear(x)) + x,
    "norm": lambda m, x: m.norm(x) * 2,
    "padded": turned(lambda m, x: m.conv(F.pad(x, (1, 1)))),
    "mirrored": turned(lambda m, x: m.conv(F.pad(x, (1, 1), mode="reflect"))),
    "causal": turned(lambda m, x: m.conv(F.pad(x, (2, 0)))),
    "cut": turned(lambda m, x: F.conv1d(x, m.conv.weight, None, 1, 2)[:, :, : x.shape[2]]),
    "cut before": turned(lambda m, x: F.conv1d(x, m.conv.weight, None, 1, 2)[:, :, 2:]),
    "dilated": turned(lambda m, x: F.conv1d(x, m.conv.weight, None, 1, 3, 3)),
    "transposed": turned(lambda m, x: F.conv_transpose1d(x, m.back.weight, None, 1, 1)),
    "pooled": turned(lambda m, x: F.avg_pool1d(x, 3, 1, 1)),
    "split": lambda m, x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "heads": lambda m, x: (m.linear(x).unflatten(-1, (1, N)) + 1).flatten(2),
    "gated": lambda m, x: F.glu(torch.cat([x, m.linear(x)], -1)),
}  # fmt: skip
OTHER = {
    "shifted": turned(lambda m, x: F.pad(m.conv(x), (4, 0))[:, :, :N]),
    "longer": turned(lambda m, x: F.pad(x, (1, 1))),
    "strided": turned(lambda m, x: F.conv1d(F.pad(x, (1, N)), m.conv.weight, None, 2)),
    "pooled in steps": turned(lambda m, x: F.avg_pool1d(F.pad(x, (N, 0)), 2)),
    "summed over": turned(lambda m, x: m.linear(x).transpose(1, 2)),
    "norm over positions": lambda m, x: m.norm(x.transpose(1, 2)),
    "joined": lambda m, x: torch.cat([x, x], 1)[:, :N],
    "every second": lambda m, x: torch.cat([x[:, ::2], x[:, 1::2]], 1),
    "over features": lambda m, x: m.conv(x),
    "turned": lambda m, x: x + x.transpose(1, 2),
    "flipped": lambda m, x: x.flip(1),
    "last ones": lambda m, x: F.pad(x, (0, 0, 2, 0))[:, -N:],
}  # fmt: skip


def followed(work):
    program = program_of(Net(work).eval(), torch.zeros(2, N, N))
    (cut,) = program.leaves()
    (made,) = output_of(program.graph)
    found = line_rows(program.graph.nodes, cut).get(made)
    laid = isinstance(found, Along) and has_rows(made, found, cut)
    return laid and found.dim == 1


@pytest.mark.parametrize("case", KEPT)
def test_rows_that_are_followed(case):
    """And position p reads position p."""
    assert followed(KEPT[case])
    model = Net(KEPT[case]).eval()
    x = torch.randn(1, N, N)
    for p in range(N):
        changed = x.clone()
        changed[:, p] = torch.randn(N)
        assert (model(x) - model(changed))[:, p].abs().max() > 1e-4


@pytest.mark.parametrize("case", OTHER)
def test_positions_that_are_not_the_rows(case):
    assert not followed(OTHER[case])


def test_attention_has_the_rows_of_its_queries():
    def attend(m, x):
        q, k, v = (m.linear(x).view(2, N, 1, N).transpose(1, 2) for _ in range(3))
        products = (q @ k.transpose(2, 3)).softmax(-1) @ v
        return (products + F.scaled_dot_product_attention(q, k, v)).transpose(1, 2).reshape(2, N, N)

    assert followed(attend)

"""Values that all blocks read beside their features do not hide the blocks."""

import pytest
import torch
from networks import WIDTH, Mlp
from torch import nn

import moe_rewrite


class Beside(nn.Module):
    """Blocks that are scaled by a row of a table chosen by the ids; or by their part of a value that
    is also made of the features at the start."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.embed, self.table = nn.Embedding(20, WIDTH), nn.Embedding(20, 4 * WIDTH)
        self.project = nn.Linear(WIDTH, 4 * WIDTH)
        self.layers = nn.ModuleList(Mlp() for _ in range(4))

    def forward(self, ids):
        x, side = self.embed(ids), self.table(ids)
        if self.kind == "of the features too":
            side = side + self.project(x)
        parts = side.unflatten(-1, (4, WIDTH))
        for i, layer in enumerate(self.layers):
            x = x + layer(x) * parts[:, :, 0 if self.kind == "one for all" else i]
        return x


@pytest.mark.parametrize("kind", ["one for all", "a part for each", "of the features too"])
def test_blocks_are_found_beside_what_all_of_them_read(kind):
    model, ids = Beside(kind).eval(), torch.randint(20, (2, 5))
    depth = moe_rewrite.inspect(model, ids)
    assert [b.name for b in depth.blocks] == [f"layers.{i}" for i in range(4)]
    moe = moe_rewrite.convert(model, split=2, example_inputs=ids)
    assert moe.report.equivalence.equal
    assert moe_rewrite.verify(model, moe, torch.randint(20, (3, 8))).equal


class Jumping(nn.Module):
    """Every block reads the first features, the last a value that the first made; the features are
    written in part."""

    def __init__(self):
        super().__init__()
        self.embed, self.table = nn.Embedding(20, WIDTH), nn.Embedding(20, WIDTH)
        self.layers = nn.ModuleList(Mlp() for _ in range(4))

    def forward(self, ids):
        x = first = self.embed(ids)
        side = self.table(ids)
        for i, layer in enumerate(self.layers):
            x = 0.5 * x + 0.5 * first
            made = layer(x)
            x = x + made + (side if i in (0, 3) else 0.0)
            x[..., : WIDTH // 2] += made[..., : WIDTH // 2].tanh()
        return x


class JumpingLater(Jumping):
    """There is a cut point before the first value that jumps."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, ids):
        x = first = self.embed(ids) + self.table(ids)
        for layer in self.layers:
            x = x + layer(0.5 * x + 0.5 * first)
        return self.head(x)


def test_later_graphs_are_cut_where_the_first_was():
    model, ids = JumpingLater().eval(), torch.randint(20, (2, 5))
    moe = moe_rewrite.convert(model, split=2, example_inputs=ids)
    before = moe.features(ids)
    moe.train()(ids).square().sum().backward()
    moe.activate(0)
    torch.testing.assert_close(moe.features(ids), before)


def test_blocks_are_found_beside_values_that_jump_over_them():
    model, ids = Jumping().eval(), torch.randint(20, (2, 5))
    depth = moe_rewrite.inspect(model, ids)
    assert [b.name for b in depth.blocks] == [f"layers.{i}" for i in range(4)]
    moe = moe_rewrite.convert(model, split=2, example_inputs=ids)
    assert moe.report.equivalence.equal
    assert moe_rewrite.verify(model, moe, torch.randint(20, (3, 8))).equal

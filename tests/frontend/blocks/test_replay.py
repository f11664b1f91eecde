"""Blocks that are alike are traced once: the graph must be the one that tracing each of them gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moe_rewrite
from moe_rewrite.frontend.blocks.block_record import Record
from moe_rewrite.frontend.capture import capture
from moe_rewrite.frontend.host import Host
from moe_rewrite.frontend.weights.structural_copy import structural_copy
from moe_rewrite.ir.aten import module_paths
from moe_rewrite.ir.program import Program

WIDTH, DEPTH = 8, 6


class Block(nn.Module):
    """A pre-norm MLP; subclasses add what a block may depend on."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, kind: type[Block] = Block, depth: int = DEPTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([kind(i) for i in range(depth)])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Scaled(Block):
    def forward(self, x):
        return super().forward(x) * (self.index + 1)


class Branching(Block):
    def forward(self, x):
        return super().forward(x) + (1.0 if self.index % 2 else 0.0)


class Read(Block):  # a number that only C++ reads
    def forward(self, x):
        return super().forward(x) * self.index


class Twice(Block):
    """The first two blocks are equal, the others are not; nothing in Python looks at the number."""

    def __init__(self, index):
        super().__init__(index)
        self.repeats = 1 if index < 2 else 2

    def forward(self, x):
        for _ in range(self.repeats):
            x = super().forward(x)
        return x


class Statistics(Block):
    def __init__(self, index):
        super().__init__(index)
        self.register_buffer("mean", torch.full((WIDTH,), 0.1 * index))
        self.batch_norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)
        return super().forward(x) + self.batch_norm(x.transpose(1, 2)).transpose(1, 2) - self.mean


class InPlace(Block):
    """Writes into what it was given, which the model reads again."""

    def forward(self, x):
        return super().forward(x.mul_(1.5))


class Pairs(Block):
    """Takes and returns more than one value, one of them as it was given."""

    def forward(self, x):
        self_, other = x.chunk(2, -1)
        made = super().forward(torch.cat([other, self_], -1))
        return made


SEEN: list[torch.Tensor] = []


class Leaking(Block):
    def forward(self, x):
        inner = self.up(self.norm(x))
        SEEN.append(inner)
        return x + self.down(F.gelu(inner))


class LeakingStack(Stack):
    def forward(self, x):
        SEEN.clear()
        return super().forward(x) + sum(inner.mean() for inner in SEEN)


class Sharing(Stack):
    """One block, called many times."""

    def forward(self, x):
        x = self.embed(x)
        for _ in range(DEPTH):
            x = self.blocks[0](x)
        return self.head(x)


class Mixed(Stack):
    """Blocks called with other arguments: sizes, dtypes and a value from the first block."""

    def forward(self, x):
        x = first = self.embed(x)
        for i, block in enumerate(self.blocks):
            x = block(x if i % 2 else x[:, :2].mean(1, keepdim=True) + x)
            x = x + first
        return self.head(x)


class Saved(Stack):
    """Reads what it has given to its blocks after they wrote into it."""

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x) + x
        return self.head(x)


MODELS = {
    "plain": (Stack, DEPTH - 2), "scaled by the index": (lambda: Stack(Scaled), 0),
    "branch on the index": (lambda: Stack(Branching), 0), "index in C++": (lambda: Stack(Read), 0),
    "equal at first": (lambda: Stack(Twice), None), "statistics": (lambda: Stack(Statistics), 4),
    "in place": (lambda: Saved(InPlace), 0), "pairs": (lambda: Stack(Pairs), 4),
    "shared": (lambda: Sharing(depth=3), None), "other arguments": (Mixed, None),
    "leaking": (lambda: LeakingStack(Leaking), 0),
}  # fmt: skip


def captured(model: nn.Module, copy_blocks: bool, mode: str = "eval") -> Program:
    host = Host(structural_copy(model).train(mode == "train"))
    arguments = host.arguments(torch.randn(3, 5, WIDTH))
    return capture(host, arguments, mode, copy_blocks=copy_blocks)


def listed(program: Program) -> list[tuple]:
    """Every operation in order, with sizes and modules; names of nodes by number."""
    number = {n: i for i, n in enumerate(program.graph.nodes)}
    rows = []
    for n in program.graph.nodes:
        made = n.meta.get("val")
        shape = tuple(map(str, made.shape)) if isinstance(made, torch.Tensor) else str(made)
        known = program.inputs.get(n.name) if n.op == "placeholder" else None
        reads = [number[s] for s in n.all_input_nodes]
        target = n.target if n.op == "call_function" else n.op
        rows.append((target, known, shape, module_paths(n), reads))
    return rows


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_the_graph_is_the_one_of_a_full_trace(name, mode):
    make, copied = MODELS[name]
    model = make()
    program, full = captured(model, True, mode), captured(model, False, mode)
    assert listed(program) == listed(full)
    assert set(map(str, program.relations)) == set(map(str, full.relations))
    assert full.copied == 0
    assert copied is None or program.copied == copied


@pytest.mark.parametrize("name", MODELS)
def test_converted_without_a_comparison_it_computes_the_same(name):
    model = MODELS[name][0]().eval()
    moe = moe_rewrite.convert(model, example_inputs=torch.randn(3, 5, WIDTH), verify=False)
    for shape in ((2, 7, WIDTH), (4, 3, WIDTH)):
        x = torch.randn(shape)
        torch.testing.assert_close(moe(x), model(x), rtol=0, atol=0)


def test_a_wrong_copy_is_found_and_every_block_traced(monkeypatch):
    def swapped(record, call, at):
        return 2 * copy(record, call, at)

    copy = Record.copy
    monkeypatch.setattr(Record, "copy", swapped)
    model, x = Stack().eval(), torch.randn(2, 7, WIDTH)
    moe = moe_rewrite.convert(model, example_inputs=torch.randn(3, 5, WIDTH))
    torch.testing.assert_close(moe(x), model(x), rtol=0, atol=0)
    assert "every block is traced" in str(moe.report)


def test_more_blocks_are_no_more_traced_operations(monkeypatch):
    traced = []
    forward = Block.forward

    def counted(self, x):
        traced.append(self.index)
        return forward(self, x)

    monkeypatch.setattr(Block, "forward", counted)
    for depth in (4, 12):
        traced.clear()
        assert captured(Stack(depth=depth), True).copied == depth - 2
        assert traced == [0, 1]


def test_an_error_of_copying_itself_means_a_full_trace(monkeypatch):
    def broken(*given, **named):
        raise TypeError("another version's signature")

    model, x = Stack().eval(), torch.randn(2, 7, WIDTH)
    monkeypatch.setattr(Record, "of", broken)
    assert captured(model, True).copied == 0
    moe = moe_rewrite.convert(model, example_inputs=torch.randn(3, 5, WIDTH), verify=False)
    torch.testing.assert_close(moe(x), model(x), rtol=0, atol=0)


def test_a_version_without_what_copying_needs_traces_every_block(monkeypatch):
    monkeypatch.delattr("torch.fx.experimental.proxy_tensor.snapshot_fake")
    from moe_rewrite.frontend.blocks.repeated_blocks import repeated_blocks
    from moe_rewrite.frontend.blocks.replay import redirected

    model = Stack()
    assert len(repeated_blocks(model)) == DEPTH
    redirected(model)
    assert all(type(block) is Block for block in model.blocks)

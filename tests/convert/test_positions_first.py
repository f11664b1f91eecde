"""Positions in the first dimension of features: gates average over positions, never over samples."""

import pytest
import torch
from reference import randomize
from torch import nn

import moe_rewrite
from moe_rewrite import TokenRouter
from moe_rewrite.errors import ConfigError

WIDTH = 8


class Encoder(nn.Module):
    """Layers that take (positions, batch, width), or (batch, positions, width) if batch_first."""

    def __init__(self, batch_first, length=1):
        super().__init__()
        torch.manual_seed(0)
        self.batch_first = batch_first
        self.embed, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.places = nn.Parameter(torch.randn(length, WIDTH))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=batch_first)
            for _ in range(3)
        )

    def forward(self, x):
        """x: (batch, positions, 5)"""
        x = self.embed(x) + self.places
        if not self.batch_first:
            x = x.transpose(0, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x if self.batch_first else x.transpose(0, 1))


class PositionsFirst(Encoder):
    def forward(self, x):
        """x: (positions, batch, 5)"""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Recurrent(nn.Module):
    """nn.LSTM takes (positions, batch, width) unless it is told otherwise; one output a sample."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, WIDTH), nn.Linear(WIDTH, WIDTH)])
        self.rnn, self.head = nn.LSTM(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(self.rnn(x)[0]).mean(0)


def converted(model, granularity, example=(2, 7, 5), split=1):
    router = "auto"
    if granularity is not None:
        router = TokenRouter(granularity=granularity, base=True)
    moe = moe_rewrite.convert(
        model.eval(), split=split, router=router, num_experts=2, example_inputs=torch.zeros(example)
    )
    randomize(moe)
    return moe.eval()


@pytest.mark.parametrize("granularity", ["prefix", "sequence", "token"])
@pytest.mark.parametrize(("length", "batches"), [(1, (3, 6)), (2, (2, 3))])
def test_positions_inside_a_model_get_the_gates_of_its_batch_first_twin(
    granularity, length, batches
):
    """length: of the learnt places; 1 for any. Batches as large as the length are among them."""
    example = (2, 7 if length == 1 else length, 5)
    ours, twin = (
        converted(Encoder(first, length), granularity, example) for first in (False, True)
    )
    twin.load_state_dict(ours.state_dict())
    for batch in batches:
        x = torch.randn(batch, 6 if length == 1 else length, 5)
        want = twin(x)
        torch.testing.assert_close(ours(x), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours(x)[1:2], ours(x[1:2]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("granularity", [None, "prefix", "sequence"])
@pytest.mark.parametrize("model", [PositionsFirst, Recurrent])
def test_inputs_with_positions_first_are_refused_where_gates_average(model, granularity):
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match="positions in their first dimension"):
        converted(model(False) if model is PositionsFirst else model(), granularity)


@pytest.mark.parametrize("model", [PositionsFirst, Recurrent])
def test_gates_of_single_rows_serve_inputs_with_positions_first(model):
    torch.manual_seed(0)
    moe = converted(model(False) if model is PositionsFirst else model(), "token")
    x = torch.randn(4, 3, 5)
    whole, alone = moe(x), moe(x[:, 1:2])
    part = whole[1:2] if whole.ndim == 2 else whole[:, 1:2]
    torch.testing.assert_close(part, alone, rtol=1e-5, atol=1e-5)

"""Which sizes of a file are open, and models whose code makes a constant of the batch."""

import pytest
import torch
from onnx_files import saved_again
from reference import randomize
from torch import nn

import moe_rewrite
from moe_rewrite import MoeRewriteError, TokenRouter

pytest.importorskip("onnx")
SAMPLES = TokenRouter(granularity="sequence")


class Lines(nn.Module):
    """Rows, and what `end` makes of them with the size of the batch."""

    def __init__(self, end):
        super().__init__()
        self.layers, self.end = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), end

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.end(x)


class Maps(nn.Module):
    def __init__(self, end):
        super().__init__()
        self.a, self.b, self.end = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(6, 6, 3, 1, 1), end
        self.last = nn.Linear(6 * 36, 4)

    def forward(self, x):
        return self.last(self.end(torch.relu(self.b(torch.relu(self.a(x))))))


NETS = {
    "lines": (Lines, "layers.1", (2, 5, 6), TokenRouter()),
    "maps": (Maps, "b", (2, 3, 6, 6), SAMPLES),
}
FIXED = {
    "len": lambda x: x.reshape(len(x), -1),
    "int": lambda x: x.flatten(1).reshape(int(x.shape[0]), -1),
    "loop": lambda x: torch.stack([row.flatten() * 2 for row in x]),
}
OPEN = {"shape": lambda x: x.reshape(x.shape[0], -1), "size": lambda x: x.reshape(x.size(0), -1)}


def converted(net, end):
    torch.manual_seed(0)
    build, split, shape, router = NETS[net]
    model = build(end).eval()
    example = {"x": torch.randn(shape)}
    moe = moe_rewrite.convert(
        model, split=split, router=router, num_experts=2, example_inputs=example
    )
    return model, moe, example


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("end", FIXED)
def test_a_batch_that_the_code_makes_a_number_is_refused(end, net, tmp_path):
    """In PyTorch each batch has a graph."""
    model, moe, example = converted(net, FIXED[end])
    for batch in (1, 2, 5):
        x = torch.randn(batch, *example["x"].shape[1:])
        with torch.no_grad():
            assert torch.equal(moe(x), model(x))
    with pytest.raises(MoeRewriteError, match=r"the batch is a constant.*Write x\.shape\[0\]"):
        moe_rewrite.export_onnx(moe, tmp_path / "model.onnx", example_inputs=example)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("end", OPEN)
def test_a_batch_that_stays_a_size_is_open(end, net, tmp_path):
    _, moe, example = converted(net, OPEN[end])
    randomize(moe, size=0.1)
    saved_again(moe, example, tmp_path)

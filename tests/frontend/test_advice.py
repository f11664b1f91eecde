"""A model that cannot be captured is refused with the reason and what to do."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import moe_rewrite
from moe_rewrite import FFNExperts
from moe_rewrite.errors import CaptureError, ConversionError


@dataclass
class Output:
    logits: torch.Tensor


class Net(nn.Module):
    def __init__(self, end):
        super().__init__()
        self.layers, self.end = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), end

    def forward(self, x):
        return self.end(self.layers(x))


@pytest.mark.parametrize(
    "end, words",
    [
        (Output, "Net .* forward returns a Output.*torch.export.register_dataclass.Output."),
        (
            lambda x: x if x.sum() > 0 else -x,
            "depends on tensor values cannot be captured: use torch.where",
        ),
        (lambda x: x @ x, "Check that these inputs run through the model"),
    ],
)
def test_reason_and_advice(end, words):
    with pytest.raises(CaptureError, match=words):
        moe_rewrite.convert(Net(end), split=1, example_inputs=torch.zeros(3, 4))


def test_each_kind_of_experts_says_what_else_to_try():
    with pytest.raises(ConversionError, match="Split earlier, or convert with mode='pmoe'"):
        moe_rewrite.convert(
            Net(lambda x: x), split=1, example_inputs=torch.zeros(3, 4), experts=FFNExperts()
        )

"""Batch norms with momentum=None train as the dense model does: their statistics are means over all
batches."""

import copy

import pytest
import torch
from torch import nn

import moe_rewrite
from moe_rewrite.frontend.tracing.cumulative_norm import count_in_tensors

D = 4


def net():
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(
            nn.Conv2d(3 if i == 0 else D, D, 1), nn.BatchNorm2d(D, momentum=None), nn.ReLU()
        )
        for i in range(3)
    ]
    return nn.Sequential(*blocks, nn.Flatten(2), nn.Linear(36, 2))


def test_training_updates_the_mean_over_all_batches():
    model = net()
    moe = moe_rewrite.convert(
        model, split=1, example_inputs=torch.zeros(2, 3, 6, 6), freeze=False, batch_norm="update"
    )
    dense = copy.deepcopy(model).train()
    moe.train()
    for _ in range(3):
        x = torch.randn(5, 3, 6, 6)
        torch.testing.assert_close(moe(x), dense(x), rtol=1e-4, atol=1e-5)
    state = moe.state_dict()
    for name, buffer in dense.named_buffers():
        torch.testing.assert_close(state[name], buffer, rtol=1e-4, atol=1e-5)
    assert state["1.1.num_batches_tracked"] == 3 and model[1][1].num_batches_tracked == 0
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(moe.eval()(x), dense.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", [nn.BatchNorm2d(3), nn.InstanceNorm2d(3, momentum=None)])
def test_other_norms_are_left_as_they_are(kept):
    kind = type(kept)
    count_in_tensors(kept)
    assert type(kept) is kind

"""Stacks and casts of experts that are kept between calls are those of the experts' values."""

from itertools import product

import pytest
import sharded_training as sharded
import torch

import moe_rewrite


@pytest.mark.sweep  # test_kept_stacks.py changes stacks in every run
@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "trains"), [*product((torch.float32, torch.bfloat16), (True, False))]
)
def test_values_that_an_optimizer_writes_through_data_are_noticed(dtype, trains):
    dense = sharded.build(False).to(dtype)
    moe = moe_rewrite.convert(dense, split=1, num_experts=2, verify=False).eval()
    sharded.move(moe, 4)
    moe.train(trains)
    before = moe(input_ids=sharded.IDS).logits
    for parameter in moe.trainable_parameters():
        parameter.data.add_(0.1)
    moe.train(trains)
    logits = moe(input_ids=sharded.IDS).logits
    fresh = moe_rewrite.convert(dense, split=1, num_experts=2, verify=False)
    fresh.load_state_dict(moe.state_dict())
    assert torch.equal(logits, fresh.train(trains)(input_ids=sharded.IDS).logits)
    assert not torch.equal(logits, before)

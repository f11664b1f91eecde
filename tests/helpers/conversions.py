"""Conversions that several tests start from: made once, since that is slow, and copied; and what
every conversion must do when it grows and is saved."""

import copy
from functools import cache

import torch

import moe_rewrite


def fresh(model, **options):
    """A copy of the one conversion of this model with these options."""
    return copy.deepcopy(_converted(model, tuple(sorted(options.items(), key=lambda o: o[0]))))


@cache
def _converted(model, options):
    return moe_rewrite.convert(model, **dict(options))


@torch.no_grad()
def assert_grows_and_loads(moe, model, x, folder):
    """No bit of the output changes by one more expert, nor by a save that is loaded."""
    before = moe(x)
    moe.expand(1)
    assert torch.equal(moe(x), before)
    moe.save_pretrained(folder)
    again = moe_rewrite.load(folder, model, example_inputs=x)
    assert torch.equal(again(x), before)

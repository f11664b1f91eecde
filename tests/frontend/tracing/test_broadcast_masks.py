"""Masks that broadcasting makes are those that vmap makes."""

import torch
from transformers import masking_utils

from moe_rewrite.frontend.tracing.broadcast_masks import broadcast_masks


def near(batch, head, query, key):
    return (query - key < 3) & (key - query < 2)


def test_masks_are_those_of_vmap():
    indices = [torch.arange(n) for n in (2, 1, 5, 7)]
    original = masking_utils._vmap_expansion_sdpa
    with broadcast_masks():
        made = masking_utils._vmap_expansion_sdpa(near)(*indices)
    assert masking_utils._vmap_expansion_sdpa is original
    assert made.shape == (2, 1, 5, 7) and torch.equal(made, original(near)(*indices))

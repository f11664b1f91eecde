"""Graphs make an attention mask into numbers once, and compute the same bits."""

import pytest
import torch

import moe_rewrite
from moe_rewrite.passes import emit
from moe_rewrite.passes.attend import read_mask
from tests.helpers import architectures
from tests.helpers.reference import randomize
from tests.helpers.sweeps import some


def trained(name, shared, monkeypatch):
    """(loss, gradients, masks of different storages that autograd keeps) of a step."""
    monkeypatch.setattr(emit, "share_masks", emit.share_masks if shared else lambda program: None)
    torch.manual_seed(0)
    moe = moe_rewrite.convert(architectures.build(name, layers=4), split=1, verify=False)
    randomize(moe, size=0.5)
    moe.train()
    ids = torch.randint(3, 97, (2, 21))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    masks = set()

    def keep(tensor):
        if tensor.shape[-2:] == (21, 21):
            masks.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = moe(input_ids=ids, attention_mask=mask, labels=ids.where(mask == 1, -100)).loss
    loss.backward()
    return loss, [p.grad for p in moe.trainable_parameters()], len(masks)


@pytest.mark.parametrize("name", some(["Llama", "Mistral"], {"Llama"}))
def test_layers_share_the_numbers_of_a_mask(name, monkeypatch):
    loss, gradients, kept = trained(name, True, monkeypatch)
    want, wanted, each = trained(name, False, monkeypatch)
    assert kept == 1 and each == 3  # of the deep blocks
    assert torch.equal(loss, want)
    for made, other in zip(gradients, wanted, strict=True):
        assert (made is None and other is None) or torch.equal(made, other)


def test_numbers_add_nothing_or_take_a_position_out():
    made = read_mask(torch.tensor([[True, False]]), torch.bfloat16)
    assert made.dtype == torch.bfloat16 and made.tolist() == [[0.0, float("-inf")]]

"""Conversion is exact on many architectures, in eval and in training, and generation agrees."""

import architectures
import pytest
import torch

import moe_rewrite
from moe_rewrite.examples import example_inputs, random_arguments


@pytest.mark.parametrize("name", architectures.ALL)
def test_converted_equals_dense(name):
    model = architectures.build(name)
    moe = moe_rewrite.convert(model, split=1)
    arguments = example_inputs(model)
    for batch in (1, 4):
        given = random_arguments(arguments, model, batch)
        report = moe_rewrite.verify(model, moe, given)
        assert report.equal and report.max_error < 1e-5, str(report)
    assert moe.report.sites
    if name == "DebertaV2":
        assert any("rows that are not the plan's" in why for _, why in moe.report.rejected)


@pytest.mark.parametrize("name", architectures.CAUSAL)
def test_generation_equals_dense(name):
    """Left-padded, past the window of the sliding-window models (6 positions)."""
    model = architectures.build(name)
    moe = moe_rewrite.convert(model, split=-1)
    ids = torch.randint(3, 97, (2, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    kwargs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(**kwargs), moe.generate(**kwargs))
    with torch.no_grad():
        full = model.generate(**kwargs, use_cache=False)
    assert torch.equal(full, moe.generate(**kwargs))


class Plain(torch.nn.Module):
    """A hand-written transformer: post-norm attention by functional calls, a bare parameter."""

    def __init__(self, width=24, layers=3):
        super().__init__()
        self.embed = torch.nn.Embedding(50, width)
        self.layers = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(width, 4, 32, dropout=0.1, batch_first=True)
            for _ in range(layers)
        )
        self.mix = torch.nn.Parameter(torch.randn(width, width) / 5)
        self.out = torch.nn.Linear(width, 7)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.out(torch.nn.functional.linear(x, self.mix).mean(1))


def test_plain_transformer_in_training_has_the_originals_dropout():
    torch.manual_seed(0)
    model = Plain()
    moe = moe_rewrite.convert(model, split=1, experts=moe_rewrite.LoRAExperts(sites="all"))
    ids = torch.randint(0, 50, (4, 11))
    assert moe_rewrite.verify(model, moe, ids).equal
    assert "mix" in {s for s, _, _ in moe.report.sites}
    model.train()
    model.layers[0].eval()
    moe.train()
    outputs = []
    for module in (model, moe):
        torch.manual_seed(5)
        outputs.append(module(ids))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    model.eval()
    assert (outputs[0] - model(ids)).abs().max() > 1e-3  # dropout was on

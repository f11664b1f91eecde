"""Training a converted model: gradient checkpointing and batch statistics."""

import copy

import architectures
import pytest
import torch
from reference import randomize
from torch import nn

import moe_rewrite


def test_checkpointing_keeps_dropout_seeds_and_gradients():
    """The same losses and gradients, in less memory kept for the backward pass."""
    model = architectures.with_dropout(architectures.build("GPT2"), 0.2)
    moe = moe_rewrite.convert(model, split=1, num_experts=2, verify=False)
    randomize(moe)
    moe.train()
    ids = torch.randint(3, 97, (4, 12), generator=torch.Generator().manual_seed(0))
    grads, losses, kept = [], [], []
    for enable in (False, True):
        if enable:
            moe.gradient_checkpointing_enable()
        moe.zero_grad()
        torch.manual_seed(5)
        sizes = []

        def pack(t, sizes=sizes):
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = moe(input_ids=ids, labels=ids).loss
        kept.append(sum(sizes))
        loss.backward()
        losses.append(loss.detach())
        grads.append([p.grad.clone() for p in moe.trainable_parameters()])
    assert torch.equal(*losses)
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)
    assert kept[1] < 0.7 * kept[0]
    moe.gradient_checkpointing_disable()


class Normed(nn.Module):
    """Batch norm in every layer, before and after the cut."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({
            "norm": nn.BatchNorm1d(8), "up": nn.Linear(8, 16), "down": nn.Linear(16, 8),
        }) for _ in range(3))  # fmt: skip
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for layer in self.layers:
            y = layer["norm"](x.transpose(1, 2)).transpose(1, 2)
            x = x + layer["down"](torch.relu(layer["up"](y)))
        return self.head(x)


@pytest.fixture
def normed():
    torch.manual_seed(0)
    model = Normed()
    with torch.no_grad():
        model(torch.randn(16, 5, 8) * 3 + 1)
    return model.eval()


def convert_normed(model, batch_norm):
    return moe_rewrite.convert(
        model, split="layers.1.norm", example_inputs=torch.randn(4, 5, 8), batch_norm=batch_norm,
        router="token",
    )  # fmt: skip


def test_batch_statistics_stay_frozen_by_default(normed):
    moe = convert_normed(normed, "frozen")
    before = copy.deepcopy(normed.state_dict())
    x = torch.randn(6, 5, 8)
    moe.train()
    torch.testing.assert_close(moe(x), normed(x))  # the statistics are those of evaluation
    moe(x).sum().backward()
    state = moe.state_dict()
    assert all(torch.equal(state[k], v) for k, v in before.items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_batch_norm_update_is_as_in_the_original(normed, checkpointing, tmp_path):
    moe = convert_normed(normed, "update")
    untouched = copy.deepcopy(normed.state_dict())
    plain = copy.deepcopy(normed).train()
    plain.layers[0].eval()
    if checkpointing:
        moe.gradient_checkpointing_enable()
    moe.train()
    for step in range(3):
        x = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(step)) * 2
        want, got = plain(x), moe(x)
        torch.testing.assert_close(got, want)
        got.sum().backward()
    state = moe.state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state[name], value, msg=name)
    assert int(state["layers.1.norm.num_batches_tracked"]) == 4  # each batch once
    assert all(torch.equal(v, untouched[k]) for k, v in normed.state_dict().items())

    moe.save_pretrained(tmp_path)  # what training changed is saved with the experts
    back = moe_rewrite.load(tmp_path, normed, example_inputs=torch.randn(4, 5, 8))
    moe.eval()
    assert torch.equal(back(x), moe(x))
    assert all(torch.equal(v, untouched[k]) for k, v in normed.state_dict().items())

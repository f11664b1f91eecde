"""Adding an expert changes no bit; regions of mixed dtypes and calls under autocast run."""

import networks
import pytest
import torch
import torch.nn.functional as F
from reference import randomize
from torch import nn

import moe_rewrite
from moe_rewrite import FFNExperts, LoRAExperts

WIDTH = networks.WIDTH


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("experts", [LoRAExperts(), FFNExperts()])
@pytest.mark.parametrize("layers", [("Swapped", "Mlp", "Swapped"), ("Mlp", "Attention", "Mlp")])
def test_adding_an_expert_changes_no_bit(layers, experts, backend):
    """Freezing the older ones neither, where rows are not contiguous."""
    model = networks.Network(layers, tokens=False).eval()
    x = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(1))
    options = {"experts": experts, "backend": backend, "example_inputs": x}
    moe = moe_rewrite.convert(model, split=1, num_experts=2, **options)
    randomize(moe)

    def outputs():
        with torch.no_grad():
            return moe(x), moe.router(moe.features(x), None, None)[0].weights

    before, before_with_gradients = outputs(), moe(x).detach()
    moe.expand(1)
    assert all(map(torch.equal, before, outputs()))
    assert torch.equal(before_with_gradients, moe(x))


class Region(nn.Module):
    """A feed-forward, its up projection in another dtype; the last one's output is the model's."""

    def __init__(self, hidden, activation, up=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.activation, self.half = nn.Embedding(20, WIDTH), activation, up
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.ups = nn.ModuleList(nn.Linear(WIDTH, hidden).to(up) for _ in range(3))
        self.downs = nn.ModuleList(nn.Linear(hidden, WIDTH) for _ in range(3))

    def forward(self, ids):
        x = self.embed(ids)
        for i, (norm, up, down) in enumerate(zip(self.norms, self.ups, self.downs, strict=True)):
            inner = self.activation(up(norm(x).to(self.half)))
            y = down(inner.to(down.weight.dtype))
            x = y if i == 2 else x + y
        return x


def region(*given, **options):
    model = Region(*given).eval()
    ids = torch.arange(18).reshape(2, 9)
    return model, ids, moe_rewrite.convert(
        model, split=1, num_experts=2, example_inputs=ids, **options
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference", "dense", "grouped"])
@pytest.mark.parametrize("mode", ["pmoe", "upcycle"])
def test_halves_of_mixed_dtypes(mode, backend):
    experts = FFNExperts() if mode == "pmoe" else None
    model, ids, moe = region(
        16, F.silu, torch.bfloat16, mode=mode, experts=experts, backend=backend
    )
    assert torch.allclose(moe(ids), model(ids), atol=1e-5)
    randomize(moe)
    moe.train()(ids[:1, :4]).sum().backward()
    assert moe(ids).dtype == torch.float32


@pytest.mark.parametrize("hidden", [13, 16])
@pytest.mark.parametrize("activation", [F.relu, F.gelu, torch.tanh])
@pytest.mark.parametrize("options", [
    {"mode": "upcycle"}, {"experts": FFNExperts()}, {"experts": LoRAExperts()},
], ids=["upcycle", "feed-forwards", "lora"])  # fmt: skip
def test_under_autocast_it_computes_as_the_dense_model_does(options, activation, hidden):
    model, ids, moe = region(hidden, activation, **options)
    for given in (ids, ids[:1, :5]):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            ours, dense = moe(given), model(given)
        assert ours.dtype == dense.dtype == torch.bfloat16
        assert torch.allclose(ours, dense, rtol=0.02, atol=0.02)
    assert moe(ids).dtype == torch.float32
    randomize(moe)
    moe.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = moe(ids).float().square().mean()
    loss.backward()
    grads = [p.grad for p in moe.trainable_parameters() if p.grad is not None]
    assert grads and all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("inside, out", [(torch.float32, "double"), (torch.bfloat16, "float")])
def test_outputs_of_another_dtype_than_the_work_convert(inside, out):
    """An output cast up is no more exact than what it was made of."""

    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = networks.Network(["Mlp"] * 3, tokens=False).to(inside)

        def forward(self, x):
            return getattr(self.net(x.to(inside)), out)()

    x = torch.randn(3, 7, 5)
    moe = moe_rewrite.convert(Cast(), "upcycle", split=1, num_experts=3, example_inputs=x)
    assert moe(x).dtype == getattr(torch, out) and moe.report.equivalence.equal

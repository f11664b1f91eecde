"""Products whose weight is computed from other tensors hold LoRA experts beside them."""

import pytest
import torch
import torch.nn.functional as F
from reference import copied, hooked, randomize
from torch import nn
from torch.nn.utils import parametrizations

import moe_rewrite
from moe_rewrite import LoRAExperts, TokenRouter
from moe_rewrite.errors import ConversionError

WIDTH = 8
SCALE = LoRAExperts().scale


class Int8Linear(nn.Module):
    """Weight-only int8, with a scale for each output."""

    def __init__(self, dense):
        super().__init__()
        scale = dense.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("rounded", (dense.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("bias", dense.bias.detach().clone())

    def forward(self, x):
        return F.linear(x, self.rounded.to(x.dtype) * self.scale, self.bias)


class StandardConv(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, padding=1)


class Merged(nn.Linear):
    """A product with a transposed sum of two parameters, as a matmul."""

    def __init__(self):
        super().__init__(WIDTH, WIDTH)
        self.other = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)

    def forward(self, x):
        return x @ (self.weight + self.other).t() + self.bias


MAKES = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH)),
    "int8": lambda: Int8Linear(nn.Linear(WIDTH, WIDTH)),
    "sum": Merged,
}


class Block(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + torch.tanh(self.inner(x))


class Chain(nn.Module):
    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(Block(make()) for _ in range(4))
        self.head = make() if make is MAKES["int8"] else nn.Linear(WIDTH, 5)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


IDS = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", MAKES)
def test_linear_maps(name, backend):
    """Split by blocks, however the weights are kept; the head stays without experts."""
    model = Chain(MAKES[name]).eval()
    moe = moe_rewrite.convert(
        model, split=2, num_experts=2, example_inputs=IDS, backend=backend,
        router=TokenRouter(granularity="token"),
    )  # fmt: skip
    assert sorted(moe.sites) == ["layers.2.inner", "layers.3.inner"]
    assert torch.equal(moe(IDS[:1]), model(IDS[:1]))
    randomize(moe)
    state = copied(moe)
    with hooked(model, "layers.1", state, SCALE, "token"):
        torch.testing.assert_close(moe.eval()(IDS), model(IDS), rtol=1e-4, atol=1e-5)
    moe.train()(IDS).square().sum().backward()
    assert all(p.grad is not None for site in moe.expert_sites() for p in site.parameters())


def test_a_save_is_loaded(tmp_path):
    model = Chain(MAKES["int8"]).eval()
    moe = moe_rewrite.convert(model, split=2, num_experts=2, example_inputs=IDS)
    randomize(moe)
    moe.save_pretrained(tmp_path)
    assert torch.equal(moe_rewrite.load(tmp_path, model, IDS)(IDS), moe(IDS))


def test_standardised_convolutions():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.convs = nn.ModuleList(StandardConv(3 if not i else 6, 6, 3) for i in range(4))
            self.head = nn.Linear(6, 5)

        def forward(self, x):
            for conv in self.convs:
                x = torch.relu(conv(x))
            return self.head(x.mean((2, 3)))

    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    model = Net().eval()
    moe = moe_rewrite.convert(model, split=2, num_experts=2, router="patch")
    assert {"convs.2", "convs.3"} <= set(moe.sites)
    moe = moe_rewrite.convert(
        model, split="convs.2", num_experts=2, example_inputs=x,
        router=TokenRouter(granularity="sequence"), experts=LoRAExperts(),
    )  # fmt: skip
    assert torch.allclose(moe(x[:1]), model(x[:1]), atol=1e-6)
    moe.train()(x).sum().backward()


def test_copies_of_computed_weights_are_refused_with_the_reason():
    class FeedForward(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = MAKES["weight norm"](), MAKES["weight norm"]()

        def forward(self, x):
            return self.down(F.gelu(self.up(x)))

    with pytest.raises(
        ConversionError, match=r"layers\.2\.inner\.down: its weight is no parameter"
    ):
        moe_rewrite.convert(Chain(FeedForward), mode="upcycle", split=2, example_inputs=IDS)


# -- a base with PEFT's adapters ---------------------------------------------------------------------


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        vocab_size=97,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def with_adapter(kind="LORA"):
    peft = pytest.importorskip("peft")
    if kind == "PROMPT":
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    else:
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama(), config).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.filterwarnings("ignore:.*checkpointing.*:FutureWarning")
def test_a_peft_model_is_its_base_with_the_adapter():
    wrapped = with_adapter()
    moe = moe_rewrite.convert(wrapped, split=1)
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(moe(ids, use_cache=False).logits, wrapped(ids, use_cache=False).logits)
    assert moe_rewrite.verify(wrapped, moe, ids).exact
    assert {"model.layers.1.self_attn.q_proj", "model.layers.2.mlp.up_proj"} <= set(moe.sites)
    assert not any("lora" in site or "base_layer" in site for site in moe.sites)
    assert any("own LoRA adapter" in reason for _, reason in moe.report.rejected)
    some = moe_rewrite.convert(wrapped, split=1, experts=LoRAExperts(sites=["q_proj"]))
    assert len(some.sites) == 2


@pytest.mark.filterwarnings("ignore:.*checkpointing.*:FutureWarning")
def test_prompts_that_only_the_wrapper_puts_in_are_refused():
    with pytest.raises(ConversionError, match="prompts are put in by PEFT's wrapper"):
        moe_rewrite.convert(with_adapter("PROMPT"), split=1)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_the_older_weight_norm():
    """Its weight is an attribute that is no leaf."""
    model = Chain(lambda: nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH)))
    moe = moe_rewrite.convert(model, split=2, example_inputs=IDS)
    assert torch.equal(moe.eval()(IDS[:2]), model.eval()(IDS[:2]))
    assert set(moe.sites) == {"layers.2.inner", "layers.3.inner"}

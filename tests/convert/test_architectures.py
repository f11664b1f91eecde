"""Every architecture: converted, it equals the dense model; with experts, the model with hooks."""

import architectures
import pytest
import torch
from reference import assert_gradients_equal, copied, hooked, randomize, site_names
from sweeps import some

import moe_rewrite
from moe_rewrite import LoRAExperts, TokenRouter
from moe_rewrite.frontend.choose_host import host_of

SCALE = LoRAExperts().scale
FEW = ("Llama", "GPT2", "DebertaV2", "ViT", "ConvNext")
IDS = torch.randint(3, 97, (2, 8), generator=torch.Generator().manual_seed(1))
PROMPT = {  # left-padded
    "input_ids": IDS, "attention_mask": torch.ones_like(IDS).index_put_(
        (torch.tensor([0, 0, 0]), torch.arange(3)), torch.tensor(0)),
    "max_new_tokens": 12, "do_sample": False,
}  # fmt: skip


def with_padding(arguments):
    """Left padding in the first row, where there is a mask."""
    for name in arguments.keys() & {"attention_mask", "decoder_attention_mask"}:
        arguments[name] = arguments[name].clone()
        arguments[name][0, :3] = 0
    return arguments


def call(model, arguments):
    """The first output: logits, or the last hidden state; of positions that count."""
    extra = {"use_cache": False} if host_of(model).keeps_cache else {}
    output = model(**arguments, **extra)
    return getattr(output, "logits", output[0])


@pytest.mark.parametrize("name", some(architectures.ALL, FEW))
def test_converted_is_the_dense_model_and_with_experts_what_hooks_do(name):
    """One conversion, which is what takes the time: in evaluation, in generation, in training, and
    with experts that do something."""
    model = architectures.with_dropout(architectures.build(name), 0.2)
    router = TokenRouter(granularity="sequence") if name == "ConvNext" else "auto"
    moe = moe_rewrite.convert(model, split=1, num_experts=2, router=router)
    for batch in (1, 4):
        given = with_padding(architectures.random_call(model, batch))
        report = moe_rewrite.verify(model, moe, given)
        assert report.equal, str(report)
    assert not moe.training
    if name == "DebertaV2":
        assert any("does not depend on the call" in why for _, why in moe.report.rejected)
    if name in architectures.CAUSAL:
        generation_equals_dense(model, moe)
    training_is_the_originals_with_its_shallow_blocks_in_eval(name, model, moe)
    randomize(moe)
    experts_equal_hooks(name, model, moe, given)


def experts_equal_hooks(name, model, moe, given):
    """Forward and backward."""
    state = copied(moe)
    cut = moe_rewrite.inspect(model).blocks[0].name
    mask = given.get("attention_mask")
    granularity = moe.router.spec.granularity
    assert granularity == ("prefix" if name in architectures.CAUSAL else "sequence")
    dense = call(model, given)
    with hooked(model, cut, state, SCALE, granularity):
        want = call(model, given)
    got = call(moe, given)
    if mask is not None:
        dense, want, got = dense[mask == 1], want[mask == 1], got[mask == 1]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert (got - dense).abs().max() > 0.01  # the experts do something
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(3))
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    assert_gradients_equal(moe, state)
    assert all(p.grad is None for p in moe.shallow.parameters())
    if name in ("Gemma3", "Mistral"):  # cached is uncached, past the window
        cached = moe.generate(**PROMPT)
        assert not torch.equal(cached, model.generate(**PROMPT))
        assert torch.equal(cached, moe.generate(**PROMPT, use_cache=False))


def training_is_the_originals_with_its_shallow_blocks_in_eval(name, model, moe):
    """The same dropout under the same seed; and it is on."""
    given = architectures.random_call(model, 3)
    shallow = modules_before(model, moe_rewrite.inspect(model).blocks[1].name, given)
    model.train()
    for module in shallow:
        module.training = False
    moe.train()
    outputs = []
    for module in (model, moe):
        torch.manual_seed(5)
        with torch.no_grad():
            outputs.append(call(module, given))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    model.eval()
    moe.eval()
    with torch.no_grad():
        changed = (outputs[0] - call(model, given)).abs().max() > 1e-4
    assert changed == (name != "ConvNext")  # which has none to turn on


def modules_before(model, block, given):
    """The modules whose calls all end before the named block begins, by watching a run."""
    ended, begun = set(), []
    hooks = [model.get_submodule(block).register_forward_pre_hook(lambda *_: begun.append(block))]
    for module in model.modules():
        hooks.append(module.register_forward_hook(
            lambda m, *_: ended.discard(m) if begun else ended.add(m)
        ))  # fmt: skip
    with torch.no_grad():
        call(model, given)
    for hook in hooks:
        hook.remove()
    return ended


def generation_equals_dense(model, moe):
    """Left-padded, past the window of the sliding-window models (6 positions)."""
    want = model.generate(**PROMPT)
    assert torch.equal(want, moe.generate(**PROMPT))
    assert torch.equal(want, model.generate(**PROMPT, use_cache=False))


@pytest.mark.parametrize(
    ("name", "split", "mask"),
    [
        ("T5", "decoder.block.1", "decoder_attention_mask"),
        pytest.param("T5", "encoder.block.1", "attention_mask", marks=pytest.mark.sweep),
        pytest.param(
            "Bart", "model.decoder.layers.1", "decoder_attention_mask", marks=pytest.mark.sweep
        ),
    ],
)
def test_encoder_decoders_split_in_the_named_stack(name, split, mask):
    model = architectures.build_other(name)
    ids = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(1))
    example = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids),
        "decoder_input_ids": ids[:, :6], "decoder_attention_mask": torch.ones_like(ids[:, :6]),
    }  # fmt: skip
    moe = moe_rewrite.convert(model, split=split, example_inputs=example, num_experts=2)
    in_decoder = "decoder" in split
    granularity = moe.router.spec.granularity
    assert granularity == ("prefix" if in_decoder else "sequence")  # the decoder is causal
    given = {k: v[:2, :5] for k, v in example.items()}
    given["attention_mask"] = given["attention_mask"].clone()
    given["attention_mask"][0, 3:] = 0
    assert moe_rewrite.verify(model, moe, given).equal
    randomize(moe)
    state = copied(moe)
    with torch.no_grad():
        got = call(moe, given)
        with hooked(model, split[:-1] + "0", state, SCALE, granularity, mask=mask):
            want = call(model, given)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert (got - call(model, given)).abs().max() > 0.01
    if in_decoder:  # keys and values of the encoder's positions cannot be routed by the decoder's
        assert all("rows that are not the plan's" in why for n, why in moe.report.rejected
                   if n.endswith(("_attn.k_proj", "Attention.k")))  # fmt: skip
        index = int(split.rpartition(".")[2])  # counts the decoder's blocks
        report = moe_rewrite.convert(model, split=index, example_inputs=example, dry_run=True)
        assert report.split == f"block {index} ({split})"
    if not in_decoder:
        with pytest.raises(moe_rewrite.MoeRewriteError, match="decoder-only"):
            moe.generate(input_ids=ids)


def test_layers_that_share_their_weights_are_blocks_of_their_own():
    model = architectures.build_other("Albert")
    assert len(moe_rewrite.inspect(model)) == 4
    moe = moe_rewrite.convert(model, split=2)
    assert moe.report.equivalence.equal and len(moe.deep) == 3
    assert len(site_names(copied(moe))) == len(moe.report.sites) == 7


@pytest.mark.parametrize("name", ["LlamaClassifier", "Qwen3Moe"])
def test_pooled_heads_and_models_that_route_already(name):
    model = architectures.build_other(name)
    moe = moe_rewrite.convert(model, split=1)
    assert moe.report.equivalence.equal
    given = architectures.random_call(model, 4)
    assert moe_rewrite.verify(model, moe, given).equal
    if name == "LlamaClassifier":
        with pytest.raises(moe_rewrite.MoeRewriteError, match="keeps no cache"):
            moe(**given, use_cache=True)
    else:
        assert "model.layers.1.mlp.gate" in {s for s, _, _ in moe.report.sites}


def test_pooled_head_under_a_token_gate_is_rejected():
    import transformers as tf

    config = tf.BertConfig(**architectures.PLAIN)
    model = tf.BertForSequenceClassification(config).eval()
    router = moe_rewrite.TokenRouter(granularity="token")
    moe = moe_rewrite.convert(model, split=1, router=router)
    rejected = dict(moe.report.rejected)
    assert "rows that are not the plan's" in rejected["bert.pooler.dense"]


class Encoder(torch.nn.Module):
    """A hand-written transformer of PyTorch's own layers, a bare parameter and a pooled head."""

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


def test_a_transformer_of_torchs_own_layers():
    torch.manual_seed(0)
    model = Encoder().eval()
    moe = moe_rewrite.convert(model, split=1)
    ids = torch.randint(0, 50, (4, 11))
    assert moe_rewrite.verify(model, moe, ids).equal
    sites = {s for s, _, _ in moe.report.sites}
    assert {"mix", "layers.1.linear1", "layers.2.linear2"} <= sites
    assert {"layers.1.self_attn.in_proj_weight", "layers.2.self_attn.out_proj"} <= sites
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

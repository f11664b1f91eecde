"""Kinds of experts: one that is defined in the tests is registered and does all that others do."""

from dataclasses import dataclass

import architectures
import conversions
import pytest
import torch
from bias_experts import BiasExperts, BiasKind
from reference import randomize

import moe_rewrite
from moe_rewrite import MoeRewriteError, TokenRouter
from moe_rewrite.passes.kinds import kind_of, register

register(BiasKind())
ROUTER = TokenRouter(granularity="prefix", top_k=2)


@pytest.fixture(scope="module")
def llama():
    return architectures.build("Llama", layers=2)


def converted(model):
    experts = BiasExperts(("up_proj", "o_proj"))
    return conversions.fresh(model, split=1, experts=experts, router=ROUTER, num_experts=3)


def hooked(model, moe, given):
    """The definition, by plain hooks on the dense model."""
    gates = moe.route(**given).gates[..., 1:]
    biases = {s.site.name: torch.stack(list(s.bias)) for s in moe.expert_sites()}

    def adding(name):
        return lambda module, args, out: out + gates @ biases[name]

    hooks = [model.get_submodule(n).register_forward_hook(adding(n)) for n in biases]
    try:
        return model(**given, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()


def test_it_converts_routes_and_is_reported(llama):
    moe = converted(llama)
    assert moe.report.equivalence.equal and moe.report.experts == "a bias an expert"
    assert {name for name, _, _ in moe.report.sites} == {
        f"model.layers.{i}.{n}" for i in (1,) for n in ("mlp.up_proj", "self_attn.o_proj")
    }
    assert "a bias an expert" in str(moe.report)
    randomize(moe)
    for batch in (1, 4):
        given = architectures.random_call(llama, batch)
        torch.testing.assert_close(
            moe(**given, use_cache=False).logits, hooked(llama, moe, given), rtol=1e-4, atol=1e-5
        )


def test_it_trains_and_grows(llama):
    moe = converted(llama)
    randomize(moe)
    given = architectures.random_call(llama, 2)
    before = moe.eval()(**given).logits
    new = moe.expand(1)
    assert {tuple(p.shape) for p in new} >= {(b.bias[0].shape[0],) for b in moe.expert_sites()}
    assert torch.equal(moe(**given).logits, before)
    moe.train()(**given, labels=given["input_ids"]).loss.backward()
    trained = [site.bias[-1].grad for site in moe.expert_sites()]
    assert all(g is not None for g in trained) and any(g.abs().sum() > 0 for g in trained)
    assert all(site.bias[0].grad is None for site in moe.expert_sites())
    moe.remove_last()
    assert torch.equal(moe.eval()(**given).logits, before)


def test_it_comes_back_from_disk(llama, tmp_path):
    moe = converted(llama)
    randomize(moe)
    moe.save_pretrained(tmp_path / "saved")
    again = moe_rewrite.load(tmp_path / "saved", llama)
    given = architectures.random_call(llama, 3)
    assert torch.equal(again(**given).logits, moe(**given).logits)
    assert again.recipe.experts == BiasExperts(("up_proj", "o_proj"))


def test_it_is_exported(llama, tmp_path):
    pytest.importorskip("onnxruntime")
    moe = converted(llama)
    randomize(moe)
    report = moe_rewrite.export_onnx(moe, tmp_path / "m.onnx")
    assert report.max_error < 1e-4 and "one product with the gates" in report.lowering


def test_what_is_not_registered_is_refused():
    @dataclass(frozen=True)
    class Unknown:
        pass

    with pytest.raises(MoeRewriteError, match="LoRAExperts"):
        moe_rewrite.convert(torch.nn.Linear(2, 2), experts=Unknown())
    with pytest.raises(MoeRewriteError, match="expected one of"):
        kind_of(Unknown())


def test_a_kind_whose_settings_cannot_be_saved_is_refused():
    class NoDataclass:
        pass

    kind = BiasKind()
    kind.spec = NoDataclass
    with pytest.raises(MoeRewriteError, match="dataclass"):
        register(kind)

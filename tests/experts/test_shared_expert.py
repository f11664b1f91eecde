"""A shared expert beside routed ones: what it computes, how it begins, and where it goes along."""

import pytest
import torch
from feedforwards import (
    D,
    Fused,
    Gated,
    H,
    Net,
    Plain,
    computes_its_definition,
    convert,
    gated_sum,
    inputs,
    steps,
    with_layers,
)  # fmt: skip
from reference import added, randomize
from safetensors.torch import load_file
from standard import dense, logits
from sweeps import some
from torch.func import functional_call

import moe_rewrite
from moe_rewrite import FFNExperts, TokenRouter
from moe_rewrite.errors import CheckpointError, ConfigError, ConversionError

SIZES = ((3, 7), (1, 1), (2, 40))
KINDS = ["plain", "sigmoid"]


def shared(model, kind, num=3, top_k=2, **options):
    gate = options.pop("gate", "selected")
    router = TokenRouter(top_k=top_k, base=False, normalize=False, init=0.5, gate=gate)
    experts = FFNExperts(num=num, router="layer", shared=kind, **options)
    return convert(model, experts=experts, router=router, freeze=True)


def largest_difference(a, b):
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize(("kind", "options"), [
    ("plain", {}), ("sigmoid", {"score": "sigmoid", "granularity": 2, "top_k": 4}),
    pytest.param("sigmoid", {}, marks=pytest.mark.sweep),
    pytest.param("plain", {"granularity": 4, "top_k": 4, "num": 1}, marks=pytest.mark.sweep),
])  # fmt: skip
def test_it_and_the_routed_experts_begin_with_half_of_the_dense_output_each(kind, options):
    model = Net(Plain, Gated).eval()
    moe = shared(model, kind, **options)
    assert moe.report.equivalence.equal and ("insert experts", "reordered") in moe.report.numerics
    for size in SIZES:
        x = inputs(*size)
        torch.testing.assert_close(moe(x), model(x), rtol=1e-4, atol=1e-5)
    for site in moe.expert_sites():
        names = {n.partition("copies.")[2] for n, _ in site.shared.named_parameters()}
        assert names >= {f"{w}.0" for w in site.site.weights}
        with torch.no_grad():
            for p in site.shared.parameters():
                p.zero_()
    assert largest_difference(moe(x), model(x)) > 0.01


def definition(model, x, state, experts, top_k):
    """The routed experts as transformers' classes have them, and the shared one."""

    def own(layer, prefix, number):
        return {k: state[f"{prefix}.{k}.{number}"] for k, _ in layer.named_parameters()}

    def mixed(i, layer, x):
        site = f"moe_rewrite.experts.layers.{i}."
        rows = torch.stack([state[f"{site}rows.{e}"] for e in range(experts)])
        low = (x @ rows.T).topk(top_k).values[..., -1:]
        gates = (x @ rows.T).masked_fill(x @ rows.T < low, float("-inf")).softmax(-1)
        copies = [own(layer, f"{site}copies.layers.{i}", e) for e in range(experts)]
        routed = gated_sum(gates, [functional_call(layer, of, (x,)) for of in copies])
        beside = own(layer, f"{site}shared.copies.layers.{i}", 0)
        y = functional_call(layer, beside, (x,))
        gate = state.get(f"{site}shared.gate")
        return routed + (y if gate is None else torch.sigmoid(x @ gate).unsqueeze(-1) * y)

    return with_layers(model, x, mixed)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_the_definitions(kind):
    model = Net(Plain, Gated, Fused).eval()
    moe = shared(model, kind)
    randomize(moe, size=0.5)
    for size in SIZES:
        computes_its_definition(
            moe, lambda x, state: definition(model, x, state, 3, 2), inputs(*size)
        )
    beside = [p for n, p in added(moe).items() if ".shared." in n]
    assert beside and all(p.requires_grad and p.grad.any() for p in beside)


@pytest.mark.parametrize("kind", some(KINDS, ["sigmoid"]))
def test_it_is_trained_saved_and_frozen_once_experts_are_added(kind, tmp_path):
    model, x = Net(Gated, Plain).eval(), inputs(4, 5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    moe = shared(model, kind)
    steps(moe)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert largest_difference(moe(x), model(x)) > 1e-3
    moe.save_pretrained(tmp_path)
    back = moe_rewrite.load(tmp_path, model, inputs(2, 6))
    assert torch.equal(back(x), moe(x)) and back.recipe == moe.recipe
    again = shared(model, kind)
    again.load_state_dict(moe.state_dict())
    assert torch.equal(again(x), moe(x))

    kept = {n: p.detach().clone() for n, p in added(moe).items() if ".shared." in n}
    first = moe(x).detach()
    moe.expand(1)
    assert torch.equal(moe(x), first)  # the new one is off until it is trained
    steps(moe)
    assert all(torch.equal(p, added(moe)[n]) for n, p in kept.items())
    moe.remove_last()
    assert all(added(moe)[n].requires_grad for n in kept)
    moe.remove(0)
    assert moe.num_experts == 2 and all(torch.equal(p, added(moe)[n]) for n, p in kept.items())
    with moe.disable_experts():
        torch.testing.assert_close(moe(x), model(x))
    with pytest.raises(ConfigError, match="a shared expert beside this one"):
        moe.merge_expert(0, inputs(2, 6))
    want = moe(x).double()
    torch.testing.assert_close(moe.double()(x.double()), want, rtol=1e-4, atol=1e-5)


def test_the_report_counts_it():
    moe = shared(Net(Gated).eval(), "sigmoid", num=4)
    of = moe.report.macs_of["layers.2"]
    dense_of = 3 * D * H
    assert (of.dense, of.experts, of.router) == (dense_of, 3 * dense_of, 5 * D)
    assert "4 copies of the feed-forward, a shared one times a sigmoid gate and a router" in str(moe.report)  # fmt: skip
    fine = shared(Net(Gated).eval(), "plain", num=2, granularity=2, top_k=2)
    assert fine.report.macs.experts == 2 * dense_of


@pytest.mark.parametrize("kind", some(KINDS, ["plain"]))
def test_scaled_experts_with_one_give_the_dense_output_at_equal_logits(kind):
    model, x = Net(Gated, Plain).eval(), inputs(3, 4)
    router = TokenRouter(top_k=2, base=False, normalize=False, init=0.0, gate="all")
    experts = FFNExperts(num=5, router="layer", shared=kind, scaled=True)
    moe = convert(model, experts=experts, router=router)
    torch.testing.assert_close(moe(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "options"), [
    ("sigmoid", {"open_experts": True}),
    pytest.param("sigmoid", {"lowering": "contrib"}, marks=pytest.mark.sweep),
    pytest.param("sigmoid", {"lowering": "sparse"}, marks=pytest.mark.sweep),
    pytest.param("plain", {"lowering": "dense"}, marks=pytest.mark.sweep),
    pytest.param("plain", {"open_experts": True}, marks=pytest.mark.sweep),
])  # fmt: skip
def test_an_exported_file_has_it(kind, options, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    moe = shared(Net(Gated).eval(), kind)
    randomize(moe, size=0.4)
    file = tmp_path / "moe.onnx"
    moe_rewrite.export_onnx(moe, file, example_inputs=inputs(2, 6), **options)
    session = ort.InferenceSession(file)
    (given,), (out,) = session.get_inputs(), session.get_outputs()
    for size in SIZES:
        x = inputs(*size)
        got = torch.from_numpy(session.run([out.name], {given.name: x.numpy()})[0])
        torch.testing.assert_close(got, moe(x).detach(), rtol=1e-4, atol=1e-5)


def small(base):
    return dense(base, num_hidden_layers=1)


def upcycled(base, kind, **options):
    """With parameters as training leaves them, unlike each other."""
    experts = FFNExperts(num=3, shared=kind, **options)
    moe = moe_rewrite.convert(small(base), mode="upcycle", split=0, experts=experts)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in moe.trainable_parameters():
            p.add_(0.3 * p.std() * torch.randn_like(p) + 0.02 * torch.randn_like(p))
    return moe


CASES = [
    pytest.param("Llama", "sigmoid", {}, "qwen2_moe", marks=pytest.mark.sweep),
    ("Qwen2", "plain", {"score": "sigmoid", "granularity": 3}, "glm4_moe"),
    pytest.param("GLM", "plain", {"score": "sigmoid"}, "glm4_moe", marks=pytest.mark.sweep),
    pytest.param("Qwen2.5", "sigmoid", {"granularity": 2}, "qwen2_moe", marks=pytest.mark.sweep),
]  # fmt: skip


@pytest.mark.parametrize(("base", "kind", "options", "format"), CASES)
def test_standard_classes_with_a_shared_expert_hold_it(base, kind, options, format, tmp_path):
    """`save_standard` compares logits with those of transformers' class."""
    moe = upcycled(base, kind, **options)
    assert moe.save_standard(tmp_path / "it") == format
    assert largest_difference(logits(moe, 40), logits(small(base), 40)) > 0.01
    back = moe_rewrite.from_standard(tmp_path / "it", small(base))
    assert torch.equal(logits(back, 40), logits(moe, 40))
    mine, theirs = added(moe), added(back)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(p, theirs[n]) for n, p in mine.items() if ".before." not in n)
    assert any(".shared." in n for n in mine)


def test_of_qwen2_moe_it_has_a_gate_and_may_have_been_trained_elsewhere(tmp_path):
    from transformers import AutoModelForCausalLM

    moe = upcycled("Llama", "plain")
    assert moe.save_standard(tmp_path / "it") == "qwen2_moe"
    elsewhere = AutoModelForCausalLM.from_pretrained(tmp_path / "it")
    torch.testing.assert_close(logits(elsewhere, 40), logits(moe, 40), rtol=0, atol=1e-5)
    block = elsewhere.model.layers[0].mlp
    with torch.no_grad():
        block.shared_expert_gate.weight.normal_()
        block.shared_expert.up_proj.weight.mul_(2)
    elsewhere.save_pretrained(tmp_path / "trained")
    again = moe_rewrite.from_standard(tmp_path / "trained", small("Llama"))
    assert again.recipe.experts.shared == "sigmoid"
    torch.testing.assert_close(logits(again, 40), logits(elsewhere, 40), rtol=0, atol=1e-5)
    again.save_standard(tmp_path / "again", verify=False)
    old, new = (load_file(tmp_path / n / "model.safetensors") for n in ("trained", "again"))
    assert old.keys() == new.keys() and all(torch.equal(t, new[n]) for n, t in old.items())
    with pytest.raises(CheckpointError, match="a shared expert of width 48, expected 96"):
        moe_rewrite.from_standard(tmp_path / "it", dense("Llama", intermediate_size=96))


def test_classes_that_cannot_hold_it_are_refused_with_the_nearest_that_can(tmp_path):
    moe = upcycled("Llama", "sigmoid")
    nearest = "Nearest: format='qwen2_moe', which holds this model"
    for format, said in (("mixtral", "it has no shared expert"), ("glm4_moe", "has no gate")):
        with pytest.raises(ConversionError, match=said) as error:
            moe.save_standard(tmp_path / "it", format)
        assert nearest in str(error.value)
    with pytest.raises(ConversionError, match="save_standard"):
        moe.save_pretrained(tmp_path / "it", standalone=True)
    assert not list(tmp_path.iterdir())


def test_in_low_precision_it_is_nearly_the_same(tmp_path):
    model, x = Net(Gated).eval(), inputs(3, 7)
    moe = shared(model, "sigmoid")
    randomize(moe, size=0.5)
    want = moe(x)
    moe.quantize_experts()
    kept = {t.dtype for n, t in moe.state_dict().items() if ".shared.copies." in n}
    assert torch.int8 in kept
    assert (moe(x) - want).norm() < 0.05 * want.norm()
    moe.save_pretrained(tmp_path)
    assert torch.equal(moe_rewrite.load(tmp_path, model, inputs(2, 6))(x), moe(x))


def test_wrong_options_are_named():
    with pytest.raises(ConfigError, match="FFNExperts shared='both'"):
        FFNExperts(shared="both")
    with pytest.raises(ConfigError, match="shared='plain'.*with a router at the cut"):
        convert(Net(Gated).eval(), experts=FFNExperts(router="cut", shared="plain"))

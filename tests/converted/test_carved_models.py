"""Models of mode "carve": trained, saved, exported, written as standard checkpoints, and refused."""

import json

import architectures
import pytest
import torch
from carvings import IDS, Net, X, carved, llama
from feedforwards import Fused, Gated, Plain, Tanh
from torch import nn

import moe_rewrite
from moe_rewrite import CarvedExperts, FFNExperts, TokenRouter
from moe_rewrite.errors import CheckpointError, ConfigError, ConversionError, InputError

pytest.importorskip("scipy")


@pytest.mark.parametrize("freeze", [True, pytest.param(False, marks=pytest.mark.sweep)])
def test_training_lowers_the_loss_and_saves_load_bitwise(freeze, tmp_path):
    model = Net(Plain, Gated)
    moe = carved(model, freeze=freeze)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    order = [s.order.clone() for s in moe.expert_sites()]
    x, goal = X[2], torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.Adam(moe.train().trainable_parameters(), 0.02)
    losses = []
    for _ in range(20):
        out, plan = moe.with_plan(x)
        loss = (out - goal).square().mean()
        (loss + 0.01 * plan.load_balance_loss() + 1e-4 * plan.z_loss()).backward()
        assert all(s.rows[1].grad.any() for s in moe.expert_sites())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.97 * losses[0]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    moe.eval().set_active(0.5)
    moe.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "moe_rewrite.json").read_text())["recipe"]["experts"]
    assert said["active"] == 0.5 and "calibration" not in said
    again = moe_rewrite.load(tmp_path, model.eval(), example_inputs=X[0])
    with torch.no_grad():
        assert all(torch.equal(again(x), moe(x)) for x in X)
    assert all(torch.equal(a.order, b) for a, b in zip(again.expert_sites(), order, strict=True))
    (tmp_path / "moe_rewrite.json").write_text("{}")
    with pytest.raises(CheckpointError):
        moe_rewrite.load(tmp_path, model, example_inputs=X[0])


@pytest.mark.parametrize(
    "lowering",
    ["sparse", *(pytest.param(n, marks=pytest.mark.sweep) for n in ("dense", "contrib"))],
)
def test_an_exported_file_takes_the_same_experts(lowering, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    moe = carved(Net(Tanh, Gated).eval())
    file = tmp_path / "carved.onnx"
    moe_rewrite.export_onnx(moe, file, lowering=lowering, example_inputs=X[0])
    session = ort.InferenceSession(file)
    (given,), (out,) = session.get_inputs(), session.get_outputs()
    for x in X:
        with torch.no_grad():
            want = moe(x)
        got = torch.from_numpy(session.run([out.name], {given.name: x.numpy()})[0])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="fixed"):
        moe_rewrite.export_onnx(moe, tmp_path / "x.onnx", open_experts=True, example_inputs=X[0])


@pytest.mark.parametrize(("options", "words"), [
    ({"experts": 1}, "experts=1"), ({"shared": 8}, "shared=8: expected an int from 0 to 7"),
    ({"active": 0.7}, "0.625 or 0.75"), ({"active": 0.125}, "0.25 at least"), ({"active": 0.0}, "active=0.0"),
    ({"grouping": "best"}, "grouping='best'"), ({"seed": -1}, "seed=-1"), ({"ridge": 0}, "ridge=0"),
    ({"sites": []}, "sites"),
])  # fmt: skip
def test_wrong_options_are_refused_before_any_work(options, words):
    with pytest.raises(ConfigError, match=words):
        CarvedExperts(**options)


def test_what_cannot_be_carved_is_refused_with_the_reason():
    model = architectures.build("Llama", layers=1)

    def refused(error, words, model=model, experts=None, **options):
        with pytest.raises(error, match=words):
            moe_rewrite.convert(model, **({"mode": "carve"} | options), experts=experts)

    refused(
        ConversionError,
        "hidden width 48 has no 5 parts.*are 4 and 6",
        experts=CarvedExperts(5, active=0.8),
    )
    small = {"example_inputs": X[0]}
    refused(
        ConversionError, "gate and up in one tensor", Net(Fused).eval(), CarvedExperts(4), **small
    )
    refused(ConversionError, "not named in sites", experts=CarvedExperts(4, sites=("mlp.x",)))
    refused(ConfigError, "writes texts itself", Net(Plain).eval(), CarvedExperts(4), **small)
    refused(ConfigError, "'auto' with CarvedExperts", router=TokenRouter())
    refused(ConfigError, "the 8 of CarvedExperts", num_experts=4)
    refused(ConfigError, "'carve' with CarvedExperts", experts=CarvedExperts(), mode="pmoe")
    refused(ConfigError, "CarvedExperts.* with mode='carve'", experts=FFNExperts())
    ids = torch.ones(2, 9, dtype=torch.int64)
    refused(InputError, "this is one batch", experts=CarvedExperts(4, calibration=ids))
    refused(InputError, "read no row", experts=CarvedExperts(4, calibration=[]))
    odd = Net(Plain).eval()
    with pytest.raises(InputError, match="infinities or NaN"):
        carved(odd, [torch.full((2, 3, 5), float("nan"))])
    conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    refused(
        ConversionError, "no site", conv, CarvedExperts(4), example_inputs=torch.randn(2, 3, 9, 9)
    )


def test_what_a_carved_model_cannot_do_is_refused(tmp_path):
    moe, _ = llama()
    for call in (moe.expand, moe.remove_last, lambda: moe.remove(1)):
        with pytest.raises(ConfigError, match="own hidden units"):
            call()
    with pytest.raises(ConfigError, match="0.5 or 0.75"):
        moe.set_active(0.6)
    with pytest.raises(ConfigError, match="mode='carve'"):
        moe_rewrite.convert(Net(Plain).eval(), example_inputs=X[0]).set_active(0.5)
    with pytest.raises(ConversionError, match="2 chosen experts sum to one.*shared=2.*bias=False"):
        moe.save_standard(tmp_path)
    moe.set_active(0.5)
    with pytest.raises(ConversionError, match="adds a bias.*shared=1, active=0.5, bias=False"):
        moe.save_standard(tmp_path)
    with pytest.raises(ConversionError, match="CarvedExperts"):
        moe.save_pretrained(tmp_path, standalone=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("base", "format", "shared"), [
    ("Llama", "qwen2_moe", 2), pytest.param("Qwen2", "glm4_moe", 1, marks=pytest.mark.sweep),
    pytest.param("SmolLM", "glm4_moe", 2, marks=pytest.mark.sweep),
    pytest.param("Llama", "mixtral", 0, marks=pytest.mark.sweep),
    pytest.param("Qwen3", "qwen3_moe", 0, marks=pytest.mark.sweep),
])  # fmt: skip
def test_one_chosen_expert_beside_shared_ones_is_a_standard_checkpoint(
    base, format, shared, tmp_path
):
    from standard import IDS as BATCH
    from standard import dense, logits, train
    from transformers import AutoModelForCausalLM

    options = {"experts": 4, "shared": shared, "active": (shared + 1) / 4, "bias": False}
    spec = CarvedExperts(calibration=[{"input_ids": BATCH}], **options)
    moe = moe_rewrite.convert(dense(base), "carve", experts=spec)
    train(moe)
    assert moe.save_standard(tmp_path / "out", format) == format
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for length in (1, 17, 40):
        torch.testing.assert_close(logits(again, length), logits(moe, length), rtol=1e-5, atol=1e-5)
    if shared:
        with pytest.raises(ConversionError, match="no shared expert"):
            moe.save_standard(tmp_path / "no", "mixtral")
    assert not (tmp_path / "no").exists()


def test_widths_that_transformers_cannot_multiply_in_groups_are_named(tmp_path):
    spec = CarvedExperts(8, 5, 0.75, calibration=[{"input_ids": IDS}], bias=False)
    moe = moe_rewrite.convert(architectures.build("Llama"), "carve", experts=spec)
    with pytest.raises(ConversionError, match="hidden width of 6 in torch.float32 is 24 bytes"):
        moe.save_standard(tmp_path / "no", "qwen2_moe")
    assert not (tmp_path / "no").exists()

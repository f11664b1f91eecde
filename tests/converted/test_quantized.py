"""Models whose weights torchao has quantised: experts are added to the products that it computes."""

import copy

import pytest
import torch

pytest.importorskip("torchao")
from quantized import Mixer, rows, with_torchao
from torch import nn

import moe_rewrite
from moe_rewrite import FFNExperts, LoRAExperts
from moe_rewrite.errors import CheckpointError, ConfigError, ConversionError, EquivalenceError
from moe_rewrite.utils.quantized import dequantized, is_quantized, stored_bytes

MORE = ("int4", "int8 in groups", "int8 rows too")
SCHEMES = ("int8", *(pytest.param(name, marks=pytest.mark.sweep) for name in MORE))
LORA = LoRAExperts(rank=4, sites="all+head")


def converted(model, **options):
    given = {"split": 1, "example_inputs": rows(), "experts": LORA, "num_experts": 2}
    return moe_rewrite.convert(model, **given | options)


def randomised(moe, seed=3):
    """Experts and router with other values than those of the start."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in moe.trainable_parameters():
            p.copy_(torch.randn_like(p) / 9)
    return moe


def dequantised(model):
    """A plain model with the matrices that the quantised weights stand for."""
    plain = Mixer()
    state = dequantized(state := model.state_dict(), state.values())
    plain.load_state_dict(state)
    return plain


@pytest.fixture(scope="module", params=SCHEMES)
def case(request):
    model = with_torchao(request.param)
    return model, converted(model), request.param


def test_untrained_it_is_bitwise_the_quantised_model(case):
    model, moe, _ = case
    assert set(moe.sites) == {"layers.1.1", "layers.1.3", "layers.2.1", "layers.2.3", "head"}
    assert "quantised weights (6 " in str(moe.report) and moe.report.equivalence.exact
    how = dict(moe.report.lowered)
    assert "quantised" in how["layers.1.1"] and "quantised" not in how["head"]
    for x in (rows(), rows(1, 3), rows(4, 7, seed=2)):
        assert torch.equal(moe(x), model(x))
    assert {p.dtype for p in moe.trainable_parameters()} == {torch.float32}
    assert sum(is_quantized(p) for p in moe.parameters()) == 6


def test_experts_compute_and_learn_as_beside_the_dequantised_weights(case):
    """Against the plain model with these weights: outputs, and gradients of experts and router."""
    model, moe, scheme = case
    theirs = randomised(converted(dequantised(model), verify=False)).train()
    ours = randomised(copy.deepcopy(moe)).train()
    before = [p.dequantize() for p in ours.parameters() if is_quantized(p)]
    made = []
    for each in (ours, theirs):
        out = each(rows())
        out.square().mean().backward()
        made.append([out, *(p.grad for p in each.trainable_parameters())])
    rounding = 0.1 if scheme == "int8 rows too" else 1e-5  # its rows are quantised
    assert len(made[0]) > 10
    for mine, other in zip(*made, strict=True):
        torch.testing.assert_close(mine, other, rtol=rounding, atol=rounding)
    after = [p.dequantize() for p in ours.parameters() if is_quantized(p)]
    assert all(map(torch.equal, before, after))
    assert not torch.equal(ours(rows()), model(rows()))


def test_one_expert_is_merged_into_dequantised_weights(case):
    model, moe, scheme = case
    if scheme == "int8 rows too":
        with pytest.raises(EquivalenceError, match="merged in"):
            randomised(copy.deepcopy(moe)).merge_expert(1, rows())
        return
    moe = randomised(copy.deepcopy(moe))
    merged = moe.merge_expert(1, rows())
    with moe.use_expert(1):
        torch.testing.assert_close(merged(rows()), moe(rows()), rtol=1e-4, atol=1e-5)
    assert type(merged) is Mixer and isinstance(merged.layers[1][1].weight, nn.Parameter)
    quantised = [name for name, p in merged.named_parameters() if is_quantized(p)]
    assert quantised == ["layers.0.1.weight", "layers.0.3.weight"]  # without experts
    assert all(is_quantized(layer[1].weight) for layer in model.layers)


def test_a_save_belongs_to_the_base_with_its_scheme(tmp_path):
    model = with_torchao("int4", group=32)
    moe = converted(model)
    assert moe.report.equivalence.exact and torch.equal(moe(rows(4, 7)), model(rows(4, 7)))
    randomised(moe).save_pretrained(tmp_path)
    back = moe_rewrite.load(tmp_path, with_torchao("int4", group=32), rows())
    assert torch.equal(back(rows()), moe(rows()))
    assert sum(f.stat().st_size for f in tmp_path.glob("*.safetensors")) < 40_000
    for other in (with_torchao("int4", group=64), with_torchao("int8"), Mixer()):
        with pytest.raises(CheckpointError, match=r"layers.0.1.weight \(.*block_size=\(1, 32\)"):
            moe_rewrite.load(tmp_path, other, rows())
    with pytest.raises(ConfigError, match="layers.0.1.weight and 5 more weights are quantised"):
        moe.save_pretrained(tmp_path, save_only_added=False)


def test_state_dicts_copies_and_casts_keep_the_weights_quantised():
    model = with_torchao("int8")
    moe = randomised(converted(model))
    other = converted(with_torchao("int8"))
    other.load_state_dict(moe.state_dict())
    assert torch.equal(other(rows()), moe(rows()))
    half = copy.deepcopy(moe).to(torch.bfloat16)
    assert half.dtype == torch.bfloat16 and sum(map(is_quantized, half.parameters())) == 6
    torch.testing.assert_close(half(rows().bfloat16()).float(), moe(rows()), rtol=0.1, atol=0.1)
    assert (
        torch.equal(moe(rows()), other(rows())) and model.layers[0][1].weight.dtype == torch.float32
    )
    weight = moe.state_dict()["layers.1.1.weight"]
    assert stored_bytes(weight) < weight.numel() * 1.5


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"experts": FFNExperts(), "mode": "upcycle"}, ConversionError, "layers.1: its weights are quantised"),
        ({"freeze": False}, ConfigError, "layers.0.1.weight and 5 more weights are quantised"),
    ],
)  # fmt: skip
def test_what_would_train_quantised_weights_is_refused(options, error, reason):
    with pytest.raises(error, match=reason):
        converted(with_torchao("int8"), **options)


@pytest.mark.sweep
def test_a_file_holds_the_dequantised_weights(tmp_path):
    pytest.importorskip("onnxruntime")
    moe = randomised(converted(with_torchao("int8")))
    report = moe_rewrite.export_onnx(moe, tmp_path / "m.onnx", example_inputs=rows())
    assert report.checks and "base dequantised" in report.dtype


class Pictures(nn.Module):
    """A table, then convolutions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(8, 32 * 64)
        self.layers = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1) for _ in range(3))
        self.eval()

    def forward(self, index):
        x = self.table(index).view(-1, 32, 8, 8)
        for layer in self.layers:
            x = x + layer(x).relu()
        return x.mean((2, 3))


@pytest.mark.sweep
def test_quantised_tables_and_convolutions_compute_as_their_library_does():
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis
    from torchao.quantization.quantize_.workflows import IntxUnpackedToInt8Tensor

    model = Pictures()
    quantize_(
        model,
        IntxWeightOnlyConfig(torch.int8, PerAxis(0)),
        lambda m, _: isinstance(m, nn.Embedding),
    )
    for layer in model.layers:
        weight = layer.weight.detach()
        made = IntxUnpackedToInt8Tensor.from_hp(weight, (1, *weight.shape[1:]), torch.int8)
        layer.weight = nn.Parameter(made, requires_grad=False)
    index = torch.tensor([3, 1, 2])
    moe = moe_rewrite.convert(
        model, split=2, example_inputs=index, router="patch", experts=LoRAExperts(4)
    )
    assert torch.equal(moe(index), model(index)) and sum(map(is_quantized, moe.parameters())) == 4
    randomised(moe)(index).sum().backward()
    assert all(p.grad is not None for p in moe.trainable_parameters())

"""Models whose linear maps are bitsandbytes' 4 and 8 bit ones, on the CPU."""

import copy

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes: no part of the dev extra")
from quantized import Mixer, rows, with_bitsandbytes

import moe_rewrite
from moe_rewrite import LoRAExperts
from moe_rewrite.errors import CheckpointError, ConfigError, ConversionError
from moe_rewrite.utils.quantized import is_quantized, stored_bytes

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:bitsandbytes")
CASES = {
    "nf4": (4, {}),
    "nf4, scales quantised, in bfloat16": (4, {"compress_statistics": True, "compute_dtype": torch.bfloat16}),
    "8 bit": (8, {}),
}  # fmt: skip


def converted(model, **options):
    given = {"split": 1, "example_inputs": rows(), "experts": LoRAExperts(rank=4)}
    return moe_rewrite.convert(model, **given | options)


@pytest.mark.parametrize("case", CASES)
def test_they_convert_train_and_load_beside_the_quantised_weights(case, tmp_path):
    bits, options = CASES[case]
    model = with_bitsandbytes(bits, **options)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    moe = converted(model)
    assert moe.report.equivalence.exact and len(moe.sites) == 4
    assert sum(is_quantized(p) for p in moe.parameters()) == 6
    assert all(torch.equal(before[k], t) for k, t in model.state_dict().items())
    for x in (rows(), rows(1, 3)):
        assert torch.equal(moe(x), copy.deepcopy(model)(x))
    moe.train()
    optimizer = torch.optim.AdamW(moe.trainable_parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = (moe(rows()) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    moe.eval().save_pretrained(tmp_path)
    back = moe_rewrite.load(tmp_path, with_bitsandbytes(bits, **options), rows())
    assert torch.equal(back(rows()), moe(rows()))
    assert moe_rewrite.verify(model, converted(model, verify=False), rows()).exact
    other = with_bitsandbytes(bits, **options | {"quant_type": "fp4"}) if bits == 4 else Mixer()
    with pytest.raises(CheckpointError, match="belong to another base"):
        moe_rewrite.load(tmp_path, other, rows())


@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_and_merged_experts_are_those_of_the_dequantised_weights(bits):
    model = with_bitsandbytes(bits)
    moe = converted(model)
    plain = Mixer()
    values = {n: t.dequantize() for n, t in moe.state_dict().items() if is_quantized(t)}
    plain.load_state_dict(values, strict=False)
    made = []
    for each in (moe, converted(plain)):
        torch.manual_seed(3)
        with torch.no_grad():
            for p in each.trainable_parameters():
                p.copy_(torch.randn_like(p) / 9)
        each(rows()).square().mean().backward()
        made.append([p.grad for p in each.trainable_parameters()])
    rounding = 1e-5 if bits == 4 else 0.1  # rows are quantised too
    for mine, other in zip(*made, strict=True):
        torch.testing.assert_close(mine, other, rtol=rounding, atol=rounding)
    half = copy.deepcopy(moe).to(torch.bfloat16)
    torch.testing.assert_close(half(rows().bfloat16()).float(), moe(rows()), rtol=0.1, atol=0.1)
    again = converted(with_bitsandbytes(bits), verify=False)
    again.load_state_dict(moe.state_dict())
    assert torch.equal(again(rows()), moe(rows()))
    with pytest.raises(RuntimeError, match="cannot be copied into one stored as"):
        again.load_state_dict(converted(Mixer(), verify=False).state_dict())
    with pytest.raises(ConfigError, match="frozen"):
        moe.state_dict()["layers.1.1.weight"].mul_(2)
    weight = moe.state_dict()["layers.1.1.weight"]
    assert stored_bytes(weight) < weight.numel() * {4: 0.7, 8: 1.1}[bits]
    if bits == 4:
        with moe.use_expert(0):
            torch.testing.assert_close(moe.merge_expert(0, rows())(rows()), moe(rows()), rtol=1e-4, atol=1e-5)  # fmt: skip


def test_weights_that_are_not_quantised_yet_or_packed_for_inference_are_refused():
    import bitsandbytes as bnb

    model = Mixer()
    model.layers[1][1] = bnb.nn.Linear4bit(64, 128)
    with pytest.raises(
        ConversionError, match=r"layers.1.1: its weight is torch.float32, not quant"
    ):
        converted(model)
    model = with_bitsandbytes(4)
    model.layers[2][3].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ConversionError, match="layers.2.3: the model was run"):
        converted(model)
    model = Mixer()
    model.layers[0] = bnb.nn.Embedding8bit(8, 8)
    with pytest.raises(ConversionError, match="layers.0: a Embedding8bit of bitsandbytes"):
        converted(model)

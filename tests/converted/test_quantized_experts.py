"""Feed-forward experts in int8 and bfloat16: outputs, saves, and what is refused."""

import copy

import pytest
import torch

import moe_rewrite
from moe_rewrite import FFNExperts, LoRAExperts, TokenRouter
from moe_rewrite.errors import CheckpointError, ConfigError
from tests.helpers import architectures
from tests.helpers.sweeps import some

DTYPES = ("int8", "bfloat16")
KINDS = {
    "Llama": {},
    "GPT2": {},  # its weights are stored as (in, out), with biases
    "Llama, router at the cut": {"router": TokenRouter(granularity="token", top_k=2, base=True)},
}


def changed(kind):
    """Upcycled, its experts no longer alike."""
    torch.manual_seed(0)
    dense = architectures.build(kind.partition(",")[0], layers=3)
    moe = moe_rewrite.convert(dense, mode="upcycle", split=1, num_experts=4, **KINDS[kind])
    with torch.no_grad():
        for site in moe.expert_sites():
            for of_part in site.parameter_lists():
                for p in of_part:
                    p.add_(torch.randn_like(p) * 0.02)
        for row in moe.router.rows:
            row.normal_()
    logits(moe.eval(), ids_of(2, 7))  # copies of it share the graph
    return dense, moe


@pytest.fixture(scope="module", params=some(KINDS, {"GPT2", "Llama, router at the cut"}))
def models(request):
    return changed(request.param)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def ids_of(batch, length):
    torch.manual_seed(batch * length)
    return torch.randint(3, 97, (batch, length))


@pytest.mark.parametrize("dtype", some(DTYPES, {"int8"}))
def test_outputs_are_near_and_a_save_gives_them_bitwise(models, dtype, tmp_path):
    dense, moe = models
    low = copy.deepcopy(moe)
    before = sum(p.numel() * p.element_size() for s in low.expert_sites() for p in s.parameters())
    low.quantize_experts(dtype)
    after = sum(p.numel() * p.element_size() for s in low.expert_sites() for p in s.parameters())
    assert after < (0.4 if dtype == "int8" else 0.6) * before
    assert low.experts_quantized == dtype and moe.experts_quantized is None
    assert f"in {dtype}" in str(low.report) and "in int8" not in str(moe.report)
    low.save_pretrained(tmp_path)
    loaded = moe_rewrite.load(tmp_path, dense).eval()
    filled = copy.deepcopy(moe)
    filled.load_state_dict(low.state_dict())
    for ids in (ids_of(2, 7), ids_of(3, 40)):
        want, made = logits(moe, ids), logits(low, ids)
        # a router at a tie may choose another expert
        assert (made - want).norm() < 0.05 * want.norm()
        assert torch.equal(logits(loaded, ids), made)
        assert torch.equal(logits(filled, ids), made)
        assert torch.equal(logits(copy.deepcopy(low), ids), made)


def test_experts_come_off_and_go(models):
    _, moe = models
    ids, low = ids_of(2, 9), copy.deepcopy(moe)
    low.quantize_experts()
    fewer = copy.deepcopy(low)
    low.deactivate(1)
    fewer.remove(1)
    assert torch.equal(logits(low, ids), logits(fewer, ids))
    low.activate(1)
    low.remove_last()
    assert torch.isfinite(logits(low, ids)).all() and low.num_experts == 3


def test_a_cast_of_the_model_keeps_int8_and_its_scales(models):
    low = copy.deepcopy(models[1])
    low.quantize_experts()
    kept = {n: t for n, t in low.state_dict().items() if t.dtype == torch.int8 or "scales" in n}
    low.to(torch.bfloat16)
    assert len(kept) > 0
    assert all(torch.equal(t, low.state_dict()[n]) for n, t in kept.items())
    assert torch.isfinite(logits(low, ids_of(2, 7))).all()


def test_what_needs_full_precision_is_refused(models, tmp_path):
    _, moe = models
    low = copy.deepcopy(moe)
    low.quantize_experts()
    ids = ids_of(2, 5)
    out = low(input_ids=ids, labels=ids)
    refused = {
        "a gradient": lambda: out.loss.backward(),
        "a call in training mode": lambda: low.train()(input_ids=ids),
        "expand": low.expand,
        "merge_expert": lambda: low.merge_expert(0),
        "save_standard": lambda: low.save_standard(tmp_path / "standard"),
        "quantize_experts": low.quantize_experts,
    }
    for what, run in refused.items():
        if out.loss.requires_grad or what != "a gradient":
            with pytest.raises(ConfigError, match=rf"{what}.*save from before"):
                run()
    with pytest.raises(ConfigError, match="export_onnx.*int8.*before"):
        moe_rewrite.export_onnx(low, tmp_path / "x.onnx")
    with pytest.raises(CheckpointError, match="full precision.*not quantised"):
        low.load_state_dict(moe.state_dict())
    assert not (tmp_path / "standard").exists()
    assert low.num_experts == 4 and torch.isfinite(logits(low.eval(), ids)).all()


def test_other_dtypes_and_kinds_of_experts_are_refused():
    dense = architectures.build("Llama", layers=2)
    moe = moe_rewrite.convert(dense, split=1, experts=LoRAExperts(rank=2))
    with pytest.raises(ConfigError, match="only feed-forward experts"):
        moe.quantize_experts()
    moe = moe_rewrite.convert(dense, split=1, experts=FFNExperts(num=1), mode="upcycle")
    with pytest.raises(ConfigError, match="'int4'.*'int8' or 'bfloat16'"):
        moe.quantize_experts("int4")
    moe.quantize_experts(torch.bfloat16)
    assert moe.experts_quantized == "bfloat16"


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_blocks_compute_the_same(models, dtype):
    _, moe = models
    low = copy.deepcopy(moe)
    low.quantize_experts(dtype)
    want = logits(low, ids_of(2, 9))
    low.compile(backend="aot_eager")
    assert (logits(low, ids_of(2, 9)) - want).norm() < 0.05 * want.norm()

"""16-bit models: experts and routers are kept and trained in float32, and compute in the model's
dtype."""

import pytest
import torch
from networks import Residual
from torch import nn

import moe_rewrite
from moe_rewrite import FFNExperts, LoRAExperts, MoeRewriteError, RegionExperts, TokenRouter
from moe_rewrite.converted.saving import checkpoint

KINDS = {"lora": LoRAExperts(4), "ffn": FFNExperts(), "region": RegionExperts(halo=False)}
pytestmark = pytest.mark.filterwarnings("ignore:the experts take")


class Maps(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
            for _ in range(3)
        )

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.flatten(2).mean(-1)


def converted(kind, dtype=torch.float32, experts=None, **options):
    """(converted model of this dtype with two experts, an input)."""
    model, shape = (Maps(), (4, 4, 8, 8)) if kind == "region" else (Residual(), (2, 5, 8))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    given = {"example_inputs": x, "experts": experts or KINDS[kind], "num_experts": 2}
    return moe_rewrite.convert(model.to(dtype).eval(), split=1, **given, **options), x


def expert_dtypes(moe):
    return {p.dtype for s in moe.expert_sites() for p in s.parameters()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.sweep)]
)
def test_experts_of_a_16_bit_model_learn_in_small_steps(kind, dtype):
    moe, x = converted(kind, dtype)
    assert expert_dtypes(moe) == {torch.float32} and moe.dtype == dtype
    trained = [p for s in moe.expert_sites() for p in s.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:  # nothing is zero, and all of it is far above the step
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) / 9 + 1)
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    moe.train()
    for _ in range(3):
        loss = moe(x).float().square().mean() * 1e-3
        optimizer.zero_grad()
        loss.backward()
        assert moe(x).dtype == dtype and {p.grad.dtype for p in trained} == {torch.float32}
        optimizer.step()
    for p, old in zip(trained, before, strict=True):
        assert p.isfinite().all() and (p != old)[p.grad != 0].all()
        if dtype == torch.bfloat16:  # as a parameter of this dtype most of it would not move
            assert (p.detach().to(dtype) == old.to(dtype)).float().mean() > 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "base", [pytest.param(torch.float32, marks=pytest.mark.sweep), torch.float16]
)
def test_autocast_and_a_gradient_scaler(kind, base):
    moe, x = converted(kind, base)
    moe.train()
    with torch.no_grad():
        for s in moe.expert_sites():
            for p in s.parameters():
                p.add_(0.1)
    optimizer, scaler = (
        torch.optim.SGD(moe.trainable_parameters(), 0.1),
        torch.amp.GradScaler("cpu"),
    )
    plain = moe(x).float().square().mean()
    with torch.autocast("cpu", torch.float16):
        loss = moe(x).float().square().mean()
    assert loss.item() == pytest.approx(plain.item(), rel=2e-2)
    before = [p.detach().clone() for p in moe.trainable_parameters()]
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with_gradient = [p.grad is not None and bool(p.grad.any()) for p in moe.trainable_parameters()]
    after = zip(before, moe.trainable_parameters(), strict=True)
    assert any(with_gradient) and [not torch.equal(b, p) for b, p in after] == with_gradient


def test_gates_are_made_in_float32_under_autocast():
    moe, x = converted("lora", router=TokenRouter(init=1.0))
    with torch.autocast("cpu", torch.bfloat16):
        features, plan = moe.features(x), moe.route(x)
    alone = moe.router(features, None, None)[0]
    assert plan.logits.dtype == torch.float32 and torch.equal(plan.logits, alone.logits)
    analytic, x = converted(
        "lora", torch.bfloat16, router=TokenRouter(fit="analytic", projection=8)
    )
    analytic.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        analytic.fit_router(0, [x])
    with torch.autocast("cpu", torch.bfloat16):
        features = analytic.features(x)
    assert {m.dtype for m in analytic.router.moments} == {torch.float64}
    assert torch.equal(analytic.router.products(features, None), analytic.router.moments[1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_dtype_can_be_chosen_and_is_saved(kind, tmp_path):
    spec = type(KINDS[kind])(**{**vars(KINDS[kind]), "dtype": torch.bfloat16})
    moe, x = converted(kind, torch.bfloat16, experts=spec)
    assert expert_dtypes(moe) == {torch.bfloat16}
    moe.train()
    moe(x).sum().backward()
    moe.eval().save_pretrained(tmp_path)
    back = moe_rewrite.load(tmp_path, moe.to_dense(), x)
    assert back.recipe.experts.dtype == "bfloat16" and expert_dtypes(back) == {torch.bfloat16}
    assert torch.equal(back(x), moe(x))
    with pytest.raises(MoeRewriteError, match="dtype='int8': expected None or one of float32"):
        type(spec)(dtype="int8")


def test_a_model_that_is_cast_later_keeps_its_experts():
    moe, x = converted("lora")
    for s in moe.expert_sites():
        torch.nn.init.normal_(s.b[0], 0.0, 1e-3)
    before = {k: v.clone() for k, v in moe.state_dict().items() if ".experts." in k}
    moe.to(torch.bfloat16)
    assert all(torch.equal(moe.state_dict()[k], v) for k, v in before.items())
    assert moe(x.bfloat16()).dtype == torch.bfloat16 and moe.dtype == torch.bfloat16
    for s in moe.expert_sites():
        s.float()  # alone, which changes nothing
    assert moe(x.bfloat16()).dtype == torch.bfloat16
    moe.to(torch.float64)
    assert expert_dtypes(moe) == {torch.float64} and moe(x.double()).dtype == torch.float64


def test_saves_of_versions_with_experts_in_the_models_dtype_are_read(tmp_path, monkeypatch):
    moe, x = converted("lora", torch.bfloat16)
    with torch.no_grad():
        for s in moe.expert_sites():
            for b in s.b:
                b.normal_(0, 0.1)
    old = {k: t.bfloat16() if ".experts." in k else t for k, t in moe.saved_tensors().items()}
    facts = moe._facts()
    del facts["recipe"]["experts"]["dtype"]
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    checkpoint.write(tmp_path, old, facts, moe.reference.state)
    back = moe_rewrite.load(tmp_path, moe.to_dense(), x)
    assert expert_dtypes(back) == {torch.float32} and torch.equal(back(x), moe(x))
    monkeypatch.setattr(checkpoint, "FORMAT", 4)
    moe.save_pretrained(tmp_path)
    with pytest.raises(MoeRewriteError, match="format 4, this version reads 1, 2, 3: upgrade"):
        moe_rewrite.load(tmp_path, moe.to_dense(), x)

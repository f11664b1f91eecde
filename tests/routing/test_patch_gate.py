"""Expert choice over patches: the plan, LoRA experts gated by it, vision transformers."""

import architectures
import cifar
import cnns
import pytest
import reference_patches as plain
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import added, assert_gradients_equal, copied, randomize, routed, routed_map

import moe_rewrite
from moe_rewrite import LoRAExperts, MoeRewriteError, PatchRouter
from moe_rewrite.ir.patch_grid import bounds, shares
from moe_rewrite.models.resnet import ResNet
from moe_rewrite.routing.select import make_router

SCALE = LoRAExperts().scale


def gate_of(spec, size, rows, seed=0):
    """A router of this size with so many experts that score at random."""
    torch.manual_seed(seed)
    router = make_router(spec, (1, *size), torch.device("cpu"))
    router.add(rows, active=True)
    return router


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    height=st.integers(1, 9), width=st.integers(1, 9), channels=st.integers(1, 3),
    experts=st.integers(1, 3), gate=st.sampled_from(["selected", "all", "hard"]),
    scale=st.sampled_from(["mean-one", "paper"]), features=st.sampled_from(["flat", "pooled"]),
    normalize=st.booleans(), flat=st.booleans(), data=st.data(),
)  # fmt: skip
def test_the_plan_is_the_definitions(
    height, width, channels, experts, gate, scale, features, normalize, flat, data
):
    """Top patches per sample and expert, ties to the first, gates by the formula; any size."""
    grid = data.draw(st.integers(1, min(height, width)))
    taken = data.draw(st.integers(1, grid**2))
    spec = PatchRouter(
        grid, taken, gate, scale, features, normalize, init=0.0 if flat else 1.0, prefix_tokens=0
    )
    router = gate_of(spec, (channels, height, width), experts)
    x = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))
    plan = router(x, None, None)[0]
    patch_ids, gates = plain.choose(x, torch.stack(list(router.rows)), spec)
    assert torch.equal(plan.patch_ids, patch_ids)
    torch.testing.assert_close(plan.patch_gates, gates, rtol=1e-4, atol=1e-5)
    assert plan.gates.shape == (2, grid**2, experts)
    torch.testing.assert_close(plan.gates.sum(1), gates.sum(2), rtol=1e-4, atol=1e-5)
    assert ((plan.gates > 0).sum(1) <= taken).all()
    if gate == "selected":
        total = float(taken) if scale == "mean-one" else 1.0
        torch.testing.assert_close(gates.sum(2), torch.full((2, experts), total))


@given(length=st.integers(1, 40), grid=st.integers(1, 12))
@settings(max_examples=80, deadline=None)
def test_patches_cover_every_axis_once(length, grid):
    """And on an axis shorter than the grid every position shares what falls on it."""
    weights = shares(length, grid)
    torch.testing.assert_close(weights.sum(1), torch.ones(length))
    if length >= grid:
        covered = [p for first, stop in bounds(length, grid) for p in range(first, stop)]
        assert covered == list(range(length))
        assert (weights.sum(0) >= 1).all()
        sizes = weights.sum(0)
        assert sizes.max() - sizes.min() <= 1


def test_scores_have_the_gradient_of_the_definition():
    for gate in ("selected", "all"):
        for size in ((3, 8, 8), (2, 7, 5)):
            spec = PatchRouter(3 if size[1] == 7 else 4, 4, gate, init=1.0, prefix_tokens=0)
            router = gate_of(spec, size, 2)
            x = torch.randn(3, *size)
            rows = torch.stack([r.detach() for r in router.rows]).requires_grad_()
            weights = torch.randn(3, 2, 4)
            (plain.choose(x, rows, spec)[1] * weights).sum().backward()
            (router(x, None, None)[0].patch_gates * weights).sum().backward()
            grads = torch.stack([r.grad for r in router.rows])
            torch.testing.assert_close(grads, rows.grad, rtol=1e-3, atol=1e-5)


def hooked_maps(model, moe, state, x, cut):
    """The model with LoRA experts at the convolutions, gated per patch by plain hooks."""
    spec, seen = moe.router.spec, {}
    names = [n for n, _, _ in moe.report.sites]
    handles = []

    def gate(module, args):
        seen["plan"] = plain.choose(args[0], plain.rows_of(state), spec)

    def delta(name):
        def hook(module, args, output):
            conv = isinstance(module, torch.nn.Conv2d)
            size = output.shape[2:] if conv else output.shape[1:3]
            maps = plain.averaged(*seen["plan"], spec.grid, size)
            if conv:
                return routed_map(args[0], output, name, maps, state, SCALE, module)
            return routed(args[0], output, name, maps.squeeze(2).permute(1, 2, 3, 0), state, SCALE)

        return hook

    handles.append(model.get_submodule(cut).register_forward_pre_hook(gate))
    handles += [model.get_submodule(n).register_forward_hook(delta(n)) for n in names]
    out = model(x)
    for handle in handles:
        handle.remove()
    return out


@pytest.mark.parametrize("name", cnns.CNNS)
def test_lora_experts_on_convolutions_follow_the_patches(name):
    """At every resolution after the cut, strides, groups and channels-last maps included; in
    float64, where rounding moves no value over the kink of a ReLU."""
    model = cnns.build(name).double()
    split = {"ResNet": "layer2", "WideResNet": "layer2", "VGG": "features.14",
             "DenseNet": "layers.2", "MobileNetV2": "layers.3", "ConvNeXt": "stages.1"}[name]  # fmt: skip
    moe = moe_rewrite.convert(model, split=split, router=PatchRouter(4, 3, init=1.0), num_experts=2)
    assert any(len(site.site.kernel) == 2 for site in moe.expert_sites())
    assert moe.report.equivalence.exact
    randomize(moe, size=0.1)
    state = copied(moe)
    for batch in (1, 3):
        x = torch.randn(batch, 3, 32, 32, dtype=torch.float64)
        want, got = hooked_maps(model, moe, state, x, split), moe(x)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert (got - model(x)).abs().max() > 0.01
    got.square().sum().backward()
    want.square().sum().backward()
    assert_gradients_equal(moe, state)


def test_the_same_per_sample_with_a_token_router():
    model = cnns.build("ResNet")
    router = moe_rewrite.TokenRouter(granularity="sequence")
    moe = moe_rewrite.convert(model, split="layer3", router=router, num_experts=2)
    randomize(moe)
    x = torch.randn(3, 3, 32, 32)
    gates = moe.route(x).gates[:, 1:].T.reshape(2, 3, 1, 1, 1)
    state = added(moe)
    handles = [
        model.get_submodule(n).register_forward_hook(
            lambda m, args, out, n=n: routed_map(args[0], out, n, gates, state, SCALE, m)
        )
        for n, _, _ in moe.report.sites
    ]
    want = model(x)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(moe(x), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["ViT", "Dinov2"])
@pytest.mark.parametrize("grid", [None, 2])
def test_vision_transformers_route_their_patch_tokens(name, grid):
    """16 patch tokens and the class token, which every expert gets with the mean of its gates."""
    model = architectures.build(name)
    spec = PatchRouter(grid, 3, init=1.0)
    moe = moe_rewrite.convert(model, split=1, router=spec, num_experts=2)
    g = moe.router.spec.grid
    assert g == (grid or 4) and moe.router.spec.prefix_tokens == 1
    assert moe.report.equivalence.equal
    randomize(moe)
    x = torch.randn(2, 3, 16, 16)
    cut = moe_rewrite.inspect(model).blocks[0].name
    state = copied(moe)
    seen = {}

    def choose(module, args, output):
        tokens = output[0] if isinstance(output, tuple) else output
        cells = tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4)).detach()
        patch_ids, gates = plain.choose(cells, plain.rows_of(state), moe.router.spec)
        # features are scaled by the patch tokens alone, as the map is
        maps = plain.gate_maps(patch_ids, gates, g, (4, 4)).squeeze(2).flatten(2)
        before = gates.mean(-1).T.unsqueeze(-1)
        seen["gates"] = torch.cat([before, maps], 2).permute(1, 2, 0)

    handles = [model.get_submodule(cut).register_forward_hook(choose)]
    for site, _, _ in moe.report.sites:
        handles.append(model.get_submodule(site).register_forward_hook(
            lambda m, args, out, n=site: routed(args[0], out, n, seen["gates"], state, SCALE)
        ))  # fmt: skip
    want = model(pixel_values=x).last_hidden_state
    for handle in handles:
        handle.remove()
    got = moe(pixel_values=x).last_hidden_state
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    weights = torch.randn(got.shape)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    assert_gradients_equal(moe, state)


def test_a_frozen_cnn_grows_task_after_task(data):
    """The pretrained network learns digits by experts on its convolutions; turned off, it is what
    it was, and the first expert is bitwise what it was after the second has learnt."""
    model = cifar.pretrained(data)
    images, labels = cifar.images_and_labels(data, "test_batch")
    images, labels = images[:64], labels[:64]
    moe = moe_rewrite.convert(model, split="layer3", router=PatchRouter(4, 4))
    with torch.no_grad():
        before = model(images)
    losses = [learn(moe, images, (labels + 1) % 10)]
    first = {k: v.clone() for k, v in added(moe).items() if ".experts." in k}
    moe.eval()
    with torch.no_grad():
        after = moe(images)
        moe.expand(1)
        assert torch.equal(moe(images), after)
    losses.append(learn(moe, images, (labels + 2) % 10))
    assert all(last < 0.8 * start for start, last in losses)
    now = added(moe)
    assert all(torch.equal(now[k], v) for k, v in first.items())
    moe.remove_last()
    moe.eval()
    with torch.no_grad():
        assert torch.equal(moe(images), after)
        with moe.disable_experts():
            assert torch.equal(moe(images), before)


def learn(moe, images, labels):
    optimizer = torch.optim.AdamW(moe.trainable_parameters(), lr=1e-2)
    moe.train()
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(moe(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def test_a_plan_can_be_given_and_looked_at():
    model = cnns.build("ResNet")
    moe = moe_rewrite.convert(model, split="layer3", router=PatchRouter(4, 2, init=1.0))
    randomize(moe)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plan = moe.route(x)
        assert plan.patch_ids.shape == (2, 1, 2) and plan.grid == 4
        assert plan.selected.shape == (2, 16)
        assert torch.equal(plan.selected >= 0, (plan.gates > 0).any(-1))
        want = moe(x)
        with moe.use_plan(plan):
            assert torch.equal(moe(x), want)
        with moe.use_plan(moe.route(x.flip(3))):
            assert not torch.equal(moe(x), want)


def test_no_patches_without_a_map():
    llama = architectures.build("Llama")
    with pytest.raises(MoeRewriteError, match="neither a feature map nor"):
        moe_rewrite.convert(llama, router="patch")
    with pytest.raises(MoeRewriteError, match="not a feature map"):
        moe_rewrite.convert(
            architectures.build("ViT"), split=1, experts=moe_rewrite.RegionExperts()
        )
    with pytest.raises(MoeRewriteError, match="prefix_tokens=2.*4x4 patches; expected None or 1"):
        moe_rewrite.convert(
            architectures.build("ViT"), split=1, router=PatchRouter(prefix_tokens=2)
        )
    with pytest.raises(MoeRewriteError, match="grid=17.*16x16"):
        moe_rewrite.convert(ResNet(8), split="layer3", router=PatchRouter(17))


@pytest.mark.parametrize(
    "wrong",
    [
        {"grid": 0}, {"grid": True}, {"per_expert": 0}, {"grid": 2, "per_expert": 5},
        {"gate": "soft"}, {"scale": "none"}, {"features": "raw"}, {"normalize": 1}, {"init": -1.0},
        {"prefix_tokens": -1},
    ],
)  # fmt: skip
def test_wrong_options_are_refused(wrong):
    with pytest.raises(MoeRewriteError, match="PatchRouter"):
        PatchRouter(**wrong)

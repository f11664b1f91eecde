"""Regions run by experts on patches, compared with the dense network and with masked dense runs."""

import copy

import cnns
import pytest
import reference_patches as plain
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from reference import added, assert_gradients_equal, copied
from stages import STAGES, Stage, image, isolated_stage, randomize_copies
from sweeps import some
from torch import nn

import moe_rewrite
from moe_rewrite import MoeRewriteError, PatchRouter, RegionExperts

# A halo costs more than it saves on maps this small, and convert() warns.
pytestmark = pytest.mark.filterwarnings("ignore:the experts take")

SPLITS = {  # where regions start, early and late
    "ResNet": ("layer3", "layer2", -1), "WideResNet": ("layer3", "layer2"),
    "VGG": ("features.14", "features.7"), "DenseNet": (-1, 4), "MobileNetV2": ("layers.5", 1),
    "ConvNeXt": ("stages.2", "stages.1", -1),
}  # fmt: skip


@pytest.mark.parametrize("name", some(cnns.CNNS, {"ResNet", "DenseNet", "ConvNeXt"}))
def test_one_expert_that_takes_every_patch_is_the_dense_network(name):
    model = cnns.build(name)
    for split in SPLITS[name]:
        for grid in (2, 1):
            router = PatchRouter(grid, grid**2, gate="hard")
            moe = moe_rewrite.convert(model, split=split, router=router, experts=RegionExperts())
            assert moe.report.equivalence.equal
            for batch in (1, 4):
                x = image(batch)
                with torch.no_grad():
                    assert torch.allclose(moe(x), model(x), rtol=1e-5, atol=1e-5)
                    with moe.disable_experts():
                        assert torch.equal(moe(x), model(x))


def test_zero_rows_with_mean_one_gates_are_the_dense_network_too():
    model = cnns.build("ResNet")
    for gate in ("selected", "hard"):
        router = PatchRouter(4, 16, gate=gate, init=0.0)
        moe = moe_rewrite.convert(model, split="layer3", router=router, experts=RegionExperts())
        with torch.no_grad():
            assert torch.allclose(moe(image()), model(image()), atol=1e-5)


MASKED = {  # split, module whose output is the region's, region
    # the router reads before layer2, at twice the resolution of the region's input
    "ResNet": ("layer2", "layer3", "layer3"), "WideResNet": ("layer2", "layer2", "layer2"),
    "VGG": ("features.14", "features", None), "DenseNet": ("layers.3", "layers", ("layers.3", "layers.7")),
    "MobileNetV2": ("layers.5", "layers", None), "ConvNeXt": ("stages.2", "stages", None),
}  # fmt: skip


@pytest.mark.parametrize("name, gate", [
    pytest.param(name, gate, marks=[] if name in few else [pytest.mark.sweep])
    for gate, few in {"selected": MASKED, "all": ("ResNet",), "hard": ("ConvNeXt",)}.items()
    for name in MASKED
])  # fmt: skip
def test_experts_equal_masked_dense_runs_forward_and_backward(name, gate):
    model = cnns.build(name)
    split, exit_, region = MASKED[name]
    last = moe_rewrite.inspect(model).blocks[-1].shape[-1]
    grid = 2 if name == "VGG" else 3 if last == "8" else 2  # 3 does not divide a side of 8
    spec = PatchRouter(grid, 2, gate=gate, scale="paper" if gate == "all" else "mean-one", init=1.0)
    moe = moe_rewrite.convert(
        model, split=split, router=spec, experts=RegionExperts(region), num_experts=3
    )
    randomize_copies(moe)
    state = copied(moe)
    for training in (False, True):
        moe.train(training)
        x = image(2, seed=5)
        want = plain.masked_dense(model, x, state, moe.router.spec, split, exit_)
        got = moe(x)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(got, model(x), atol=1e-2)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(3))
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    assert_gradients_equal(moe, state)
    assert all(p.grad is None for p in moe.shallow.parameters())
    rows = [p.grad for p in moe.router.rows]
    assert all((g is None) == (gate == "hard") for g in rows)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("size", [16, 13])
@pytest.mark.parametrize("kind", STAGES)
def test_every_operation_of_a_region_keeps_its_borders(kind, size):
    """Patches of unlike sizes included: 13 and what a stride makes of it do not divide."""
    torch.manual_seed(0)
    model = cnns.settled(STAGES[kind](), size=size)
    for grid in (1, 2, 3):
        spec = PatchRouter(grid, max(1, grid**2 - 2), init=1.0)
        moe = moe_rewrite.convert(
            model, split="stage", router=spec, experts=RegionExperts("stage"), num_experts=2,
            example_inputs=image(2, size),
        )  # fmt: skip
        assert moe.report.equivalence.equal
        randomize_copies(moe)
        state = copied(moe)
        x = image(2, size, seed=9)
        want = plain.masked_dense(model, x, state, moe.router.spec, "stage", "stage")
        got = moe(x)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    weights = torch.randn(got.shape)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    assert_gradients_equal(moe, state)


@st.composite
def stages(draw):
    """Two to four operations of any window, on six channels."""

    def layer():
        kind = draw(st.sampled_from(["conv", "conv", "max", "mean", "norm", "act"]))
        kernel, stride = draw(st.integers(1, 4)), draw(st.integers(1, 2))
        padding = draw(st.integers(0, kernel // 2))
        if kind == "conv":
            dilation, groups = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 6]))
            return nn.Conv2d(6, 6, kernel, stride, padding, dilation, groups)
        if kind == "max":
            return nn.MaxPool2d(kernel, stride, padding)
        if kind == "mean":
            return nn.AvgPool2d(kernel, stride, padding)
        return nn.BatchNorm2d(6) if kind == "norm" else nn.LeakyReLU(inplace=draw(st.booleans()))

    layers = [nn.Conv2d(6, 6, 3, 1, 1), *(layer() for _ in range(draw(st.integers(1, 3))))]
    for first, second in zip(layers, layers[1:], strict=False):
        if isinstance(first, nn.LeakyReLU) and isinstance(second, nn.LeakyReLU):
            second.inplace = False  # PyTorch itself cannot go back through two in a row
    return layers


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(stage=stages(), size=st.integers(9, 17), grid=st.integers(1, 3), seed=st.integers(0, 99))
def test_random_regions_equal_masked_dense_runs(stage, size, grid, seed):
    torch.manual_seed(seed)
    model = Stage(*stage)
    x = image(2, size, seed)
    try:
        model = cnns.settled(model, size=size)
        assume(min(model.stage(model.trunk(x)).shape[2:]) >= grid)
    except RuntimeError:  # nothing is left of the map
        assume(False)
    spec = PatchRouter(grid, max(1, grid**2 // 2), init=1.0)
    moe = moe_rewrite.convert(
        model, split="stage", router=spec, experts=RegionExperts("stage"), num_experts=2,
        example_inputs=x,
    )  # fmt: skip
    randomize_copies(moe)
    state = copied(moe)
    want = plain.masked_dense(model, x, state, moe.router.spec, "stage", "stage")
    got = moe(x)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    weights = torch.randn(got.shape)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    for name, p in state.items():
        if p.grad is not None:
            grad = added(moe)[name].grad
            torch.testing.assert_close(grad, p.grad, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", ["stride", "dilation", "groups", "pooling", "in place"])
def test_isolated_patches_are_images_of_their_own(kind):
    torch.manual_seed(0)
    model = cnns.settled(STAGES[kind](), size=16)
    spec = PatchRouter(2, 2, init=1.0)
    moe = moe_rewrite.convert(
        model, split="stage", router=spec, experts=RegionExperts("stage", halo=False),
        num_experts=2, example_inputs=image(2, 16),
    )  # fmt: skip
    randomize_copies(moe)
    state, x = copied(moe), image(3, 16, seed=4)
    want, got = isolated_stage(model, moe, state, x), moe(x)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    got.square().sum().backward()
    want.square().sum().backward()
    assert_gradients_equal(moe, state)
    with torch.no_grad(), moe.disable_experts():
        assert torch.equal(moe(x), model(x))


def test_isolated_patches_of_unlike_sizes_are_padded_with_zeros():
    torch.manual_seed(0)
    model = cnns.settled(Stage(nn.Conv2d(6, 6, 3, 1, 1), nn.ReLU()), size=7)
    moe = moe_rewrite.convert(
        model, split="stage", router=PatchRouter(2, 3), example_inputs=image(2, 7),
        experts=RegionExperts("stage", halo=False),
    )  # fmt: skip
    state = copied(moe)
    x = image(2, 7, seed=4)
    with torch.no_grad():
        features = torch.relu(model.trunk(x))
        # a convolution pads with zeros too: patches of their real sizes give the same
        patch_ids, gates = plain.choose(features, plain.rows_of(state), moe.router.spec)
        out = torch.zeros(2, 6, 7, 7)
        for b in range(2):
            for p, gate in zip(patch_ids[b, 0].tolist(), gates[b, 0], strict=True):
                (t, u), (v, w) = plain.spans(7, 2)[p // 2], plain.spans(7, 2)[p % 2]
                out[b, :, t:u, v:w] = gate * model.stage(features[b : b + 1, :, t:u, v:w])[0]
        torch.testing.assert_close(moe(x), model.head(out.mean((2, 3))), rtol=1e-4, atol=1e-6)


def test_batch_norm_takes_its_statistics_over_the_gathered_patches():
    torch.manual_seed(0)
    model = cnns.settled(Stage(nn.Conv2d(6, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU()), size=16)
    moe = moe_rewrite.convert(
        model, split="stage", router=PatchRouter(2, 1, init=1.0), num_experts=2,
        experts=RegionExperts("stage", halo=False), example_inputs=image(2, 16),
        batch_norm="update",
    )  # fmt: skip
    state = copied(moe)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    moe.train()
    x = image(4, 16, seed=4)
    features = torch.relu(model.trunk(x)).detach()
    region = copy.deepcopy(model.stage).train()
    y = plain.isolated(region, features, state, "stage.", moe.router.spec, features, (16, 16))
    moe.gradient_checkpointing_enable()  # a second run must not count the batch twice
    got = moe(x)
    torch.testing.assert_close(got, model.head(y.mean((2, 3))), rtol=1e-3, atol=1e-5)
    got.sum().backward()
    for name, tensor in added(moe).items():
        if "running" in name:
            torch.testing.assert_close(tensor, state[name], rtol=1e-4, atol=1e-6)
            assert not torch.equal(tensor, before[name.split(".copies.")[1][:-2]])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_expert_that_no_patch_prefers_and_ties_everywhere():
    """Equal scores: the first patches in row-major order, by every expert; gradients as masked."""
    model = cnns.build("ResNet")
    spec = PatchRouter(4, 3, init=0.0)
    moe = moe_rewrite.convert(
        model, split="layer3", router=spec, experts=RegionExperts(), num_experts=2
    )
    randomize_copies(moe)
    x = image(2)
    assert torch.equal(moe.route(x).patch_ids, torch.arange(3).expand(2, 2, 3))
    with torch.no_grad():
        moe.router.rows[1].copy_(torch.randn(moe.router.size))
        moe.router.rows[0].copy_(-moe.router.rows[1])  # expert 0 is left what 1 likes least
    state = copied(moe)
    want = plain.masked_dense(model, x, state, moe.router.spec, "layer3", "layer3")
    got = moe(x)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(3))
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    assert_gradients_equal(moe, state)


def test_patches_that_no_expert_takes_give_zero_and_the_skip_remains():
    model = cnns.build("MobileNetV2")
    spec = PatchRouter(4, 3, gate="hard", init=1.0)
    moe = moe_rewrite.convert(
        model, split="layers.6", router=spec, experts=RegionExperts("layers.6.block")
    )
    x = image(2)
    with torch.no_grad():
        seen = {}
        layer = model.layers[6]
        handle = layer.register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out))
        model(x)
        handle.remove()
        taken = plain.gate_maps(
            *plain.choose(seen["x"], plain.rows_of(added(moe)), moe.router.spec), 4, (8, 8)
        )[0]
        mixed = torch.where(taken > 0, seen["y"], seen["x"])
        want = model.head(mixed.mean((2, 3)))
        torch.testing.assert_close(moe(x), want, rtol=1e-4, atol=1e-5)


def test_experts_of_reduced_width_run_slices_of_the_hidden_channels():
    """With a share of 1/4 and no bias after it, four experts on all patches equal the dense."""
    torch.manual_seed(0)
    stage = [
        nn.Conv2d(6, 8, 3, 1, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, 1, 1, bias=False),
    ]
    model = cnns.settled(Stage(*stage), size=16)
    moe = moe_rewrite.convert(
        model, split="stage", router=PatchRouter(2, 4, gate="hard"), num_experts=4,
        experts=RegionExperts("stage", width=0.25), example_inputs=image(2, 16),
    )  # fmt: skip
    x = image(3, 16, seed=2)
    with torch.no_grad():
        torch.testing.assert_close(moe(x), model(x), rtol=1e-4, atol=1e-5)
    assert moe.state_dict()["moe_rewrite.experts.stage.copies.stage.0.weight.1"].shape == (
        2,
        6,
        3,
        3,
    )
    wide = cnns.build("MobileNetV2")
    narrow = moe_rewrite.convert(
        wide, split="layers.6", router=PatchRouter(2, 4, gate="hard"),
        experts=RegionExperts("layers.6.block", width=0.5),
    )  # fmt: skip
    assert narrow(image()).isfinite().all()  # depthwise: groups shrink with the channels
    assert narrow.report.macs.experts < narrow.report.macs.dense


def test_concatenated_experts_each_compute_their_slice_of_the_output():
    torch.manual_seed(0)
    model = cnns.settled(Stage(nn.Conv2d(6, 6, 4, 4), nn.ReLU()), size=16)
    options = {
        "split": "stage", "num_experts": 3, "experts": RegionExperts("stage", combine="concat", halo=False),
        "example_inputs": image(2, 16),
    }  # fmt: skip
    moe = moe_rewrite.convert(model, router=PatchRouter(4, 16, gate="hard"), **options)
    with torch.no_grad():
        torch.testing.assert_close(moe(image(2, 16)), model(image(2, 16)), rtol=1e-5, atol=1e-6)
        moe.deactivate(1)
        moe(image(2, 16))
    with pytest.raises(MoeRewriteError, match="concat"):
        moe.expand(1)
    with pytest.raises(MoeRewriteError, match="divide among 4"):
        moe_rewrite.convert(model, router=PatchRouter(4, 4), **options | {"num_experts": 4})

"""Regions with norms over positions and squeezes, whose statistics are over an expert's patches."""

import cnns
import pytest
import reference_patches as plain
import torch
from conversions import assert_grows_and_loads
from reference import added, assert_gradients_equal, copied
from reference_patches import Squeeze
from stages import Stage, image, isolated_stage, randomize_copies
from torch import nn

import moe_rewrite
from moe_rewrite import MoeRewriteError, PatchRouter, RegionExperts

# A halo costs more than it saves on maps this small, and convert() warns.
pytestmark = pytest.mark.filterwarnings("ignore:the experts take")


class Excite(nn.Module):
    """A gate for each channel, as convolutions or linear maps, with views or indices."""

    def __init__(self, form, channels=6):
        super().__init__()
        self.form, self.squeeze = form, Squeeze(form)
        layer = nn.Linear if form in ("flat", "pool") else lambda i, o: nn.Conv2d(i, o, 1)
        self.down, self.up = layer(channels, 4), layer(4, channels)

    def forward(self, x):
        y = self.squeeze(x)
        if self.form == "pool":  # as SENet writes it
            batch, channels, _, _ = x.size()
            y = y.view(batch, channels)
            gate = torch.sigmoid(self.up(torch.relu_(self.down(y)))).view(batch, channels, 1, 1)
            return x * gate.expand_as(x)
        gate = torch.sigmoid(self.up(nn.functional.silu(self.down(y))))
        return x * (gate[:, :, None, None] if self.form == "flat" else gate)


class Along(nn.Module):
    """A gate for each channel from its neighbours among the channels (ECA, arXiv 1910.03151)."""

    def __init__(self):
        super().__init__()
        self.squeeze, self.conv = Squeeze(), nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.squeeze(x).squeeze(-1).transpose(-1, -2)
        return x * self.conv(y).transpose(-1, -2).unsqueeze(-1).sigmoid()


class Reversed(nn.Module):
    """A map whose channels come last, with a gate of them."""

    def __init__(self):
        super().__init__()
        self.linear, self.gate = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = self.linear(x.permute(0, 2, 3, 1))
        return (x * self.gate(x.mean((1, 2), keepdim=True)).sigmoid()).permute(0, 3, 1, 2)


def conv(stride=1, out=6, bias=True):
    return nn.Conv2d(6, out, 3, stride, 1, bias=bias)


STAGES = {
    "group": lambda size: [conv(), nn.GroupNorm(2, 6), nn.ReLU(), conv()],
    "group, stride": lambda size: [nn.GroupNorm(3, 6, affine=False), conv(2), nn.GroupNorm(1, 6), conv()],
    "instance": lambda size: [conv(bias=False), nn.InstanceNorm2d(6, affine=True), nn.GELU(), nn.MaxPool2d(3, 2, 1)],
    "layer": lambda size: [conv(), nn.LayerNorm([6, size, size]), conv(2), nn.LayerNorm([6, size // 2, size // 2], elementwise_affine=False)],
    "excite": lambda size: [conv(), Excite("pool"), conv(2), Excite("kept")],
    "excite, flat": lambda size: [Excite("flat"), conv(), nn.BatchNorm2d(6)],
    "excite, along": lambda size: [conv(), Along(), conv()],
}  # fmt: skip


def built(kind, size):
    torch.manual_seed(0)
    model = cnns.settled(Stage(*STAGES[kind](size)), size=size)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("stage") and p.ndim in (1, 3):  # norms that scale and shift
                p += torch.randn(p.shape) * 0.3
    return model


def converted(model, size, router, halo=True, **options):
    experts = RegionExperts("stage", halo=halo, statistics="patches")
    return moe_rewrite.convert(
        model, split="stage", router=router, experts=experts, example_inputs=image(2, size), **options,
    )  # fmt: skip


def assert_as(moe, want, got, state):
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(3))
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    assert_gradients_equal(moe, state)


@pytest.mark.parametrize("kind", STAGES)
def test_an_expert_that_takes_every_patch_is_the_dense_network(kind):
    model = built(kind, 16)
    for grid in (4, 2, 1):
        moe = converted(model, 16, PatchRouter(grid, grid**2, gate="hard"))
        assert moe.report.equivalence.exact
        assert dict(moe.report.numerics)["insert experts"] == "approximate"
        assert "approximate: statistics of" in str(moe.report.lowered)
        with torch.no_grad():
            for batch in (1, 3):
                x = image(batch, 16, seed=batch)
                torch.testing.assert_close(moe(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [16, 12])
@pytest.mark.parametrize("kind", STAGES)
def test_statistics_are_over_an_experts_patches(kind, size):
    model = built(kind, size)
    moe = converted(model, size, PatchRouter(2, 3, init=1.0), num_experts=2)
    randomize_copies(moe)
    state = copied(moe)
    for training in (False, True):
        moe.train(training)
        x = image(3, size, seed=5)
        want = plain.masked_dense(
            model, x, state, moe.router.spec, "stage", "stage", statistics=True
        )
        got = moe(x)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(got, model(x), atol=1e-2)
    assert_as(moe, want, got, state)


@pytest.mark.parametrize("kind", STAGES)
def test_statistics_over_isolated_patches(kind):
    model = built(kind, 16)
    moe = converted(model, 16, PatchRouter(4, 5, init=1.0), halo=False, num_experts=2)
    randomize_copies(moe)
    state, x = copied(moe), image(3, 16, seed=4)
    assert_as(moe, isolated_stage(model, moe, state, x, statistics=True), moe(x), state)
    with torch.no_grad(), moe.disable_experts():
        assert torch.equal(moe(x), model(x))


def test_maps_whose_channels_come_last():
    model = cnns.settled(Stage(conv(), Reversed(), conv()), size=16)
    for halo, taken in ((True, 16), (False, 4)):
        moe = converted(model, 16, PatchRouter(4, taken, gate="hard"), halo=halo)
        x = image(2, 16)
        assert torch.allclose(moe(x), model(x), atol=1e-5) == halo


def test_experts_grow_and_are_saved(tmp_path):
    model = built("excite", 16)
    moe = converted(model, 16, PatchRouter(2, 2, init=1.0), num_experts=2)
    randomize_copies(moe)
    x = image(3, 16)
    assert_grows_and_loads(moe, model, x, tmp_path)
    moe.train()
    optimizer = torch.optim.Adam(moe.trainable_parameters(), lr=0.01)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(moe(x), torch.arange(3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_gates_keep_a_share_of_hidden_channels():
    """Channels of a gate shrink with those of the map; those of a group norm cannot."""
    model = cnns.settled(Stage(conv(out=8), Excite("kept", 8), nn.Conv2d(8, 6, 1)), size=16)
    experts = RegionExperts("stage", width=0.5, statistics="patches")
    options = {"split": "stage", "router": PatchRouter(2, 2), "example_inputs": image(2, 16)}
    moe = moe_rewrite.convert(model, experts=experts, **options)
    shapes = {k.rpartition("copies.stage.")[2]: tuple(p.shape) for k, p in added(moe).items()}
    assert shapes["0.weight.0"] == (4, 6, 3, 3) and shapes["1.down.weight.0"] == (2, 4, 1, 1)
    assert shapes["1.up.weight.0"] == (4, 2, 1, 1) and moe(image(1, 16)).isfinite().all()
    model = cnns.settled(Stage(conv(out=8), nn.GroupNorm(2, 8), nn.Conv2d(8, 6, 1)), size=16)
    with pytest.raises(MoeRewriteError, match="no hidden channels"):
        moe_rewrite.convert(model, experts=experts, **options)


@pytest.mark.parametrize("kind", ["group", "layer", "excite", "excite, flat"])
def test_without_the_option_the_refusal_names_it(kind):
    with pytest.raises(MoeRewriteError, match=r"mixes all|statistics='patches'") as raised:
        moe_rewrite.convert(
            built(kind, 16), split="stage", router=PatchRouter(2, 2),
            experts=RegionExperts("stage"), example_inputs=image(2, 16),
        )  # fmt: skip
    assert "RegionExperts(statistics='patches')" in str(raised.value)
    with pytest.raises(MoeRewriteError, match="statistics='batch': expected None or 'patches'"):
        RegionExperts(statistics="batch")


@pytest.mark.parametrize("halo", [True, False])
def test_grids_that_do_not_divide_are_refused(halo):
    with pytest.raises(MoeRewriteError, match="(?s)statistics are taken over patches.*grid=3"):
        converted(built("group", 16), 16, PatchRouter(3, 2), halo=halo)
    cropped = cnns.settled(Stage(nn.GroupNorm(2, 6), nn.Conv2d(6, 6, 3)), size=16)
    with pytest.raises(MoeRewriteError, match="16x16.*14x14"):
        converted(cropped, 16, PatchRouter(2, 2))


class Counted(nn.Module):
    def forward(self, x):
        return x / x.shape[0]


def test_sizes_of_the_batch_and_running_statistics_are_refused():
    model = cnns.settled(Stage(conv(), nn.GroupNorm(2, 6), Counted()), size=16)
    with pytest.raises(MoeRewriteError, match="size of a map|besides"):
        converted(model, 16, PatchRouter(2, 2))
    tracked = nn.InstanceNorm2d(6, track_running_stats=True)
    model = Stage(conv(), tracked).eval()
    with pytest.raises(MoeRewriteError, match="running statistics"):
        converted(model, 16, PatchRouter(2, 2))
    model = Stage(conv(), nn.BatchNorm2d(6, track_running_stats=False)).eval()
    with pytest.raises(MoeRewriteError, match="statistics of the whole batch"):
        converted(model, 16, PatchRouter(2, 2))

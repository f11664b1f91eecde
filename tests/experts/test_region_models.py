"""Converted CNNs: which regions are found and refused, cost, growth, training, copies."""

import copy

import cnns
import pytest
import torch
from reference import added
from stages import STAGES, Stage, image, randomize_copies
from torch import nn

import moe_rewrite
from moe_rewrite import MoeRewriteError, PatchRouter, RegionExperts, TokenRouter

# A halo costs more than it saves on maps this small, and convert() warns.
pytestmark = pytest.mark.filterwarnings("ignore:the experts take")


def test_macs_fall_with_the_share_of_patches():
    model = cnns.settled(STAGES["groups"](), size=16)
    shares = []
    for taken in (16, 4, 1):
        moe = moe_rewrite.convert(
            model, split="stage", router=PatchRouter(4, taken), example_inputs=image(2, 16),
            experts=RegionExperts("stage", halo=False), dry_run=True,
        )  # fmt: skip
        shares.append(moe.macs.experts / moe.macs.dense)
    assert shares == [1.0, 1 / 4, 1 / 16]
    # by hand: 12 outputs of 2 inputs and 9 taps, then 6 of 12, over 256 positions
    assert moe.macs.dense == 256 * (12 * 2 * 9 + 6 * 12)
    assert moe.macs.router == 6 * 256


def test_a_halo_that_outgrows_the_dense_region_is_warned_of():
    model = cnns.build("ResNet")
    with pytest.warns(UserWarning, match="halo=False") as warned:
        moe = moe_rewrite.convert(
            model, split="layer3", router=PatchRouter(4, 16), experts=RegionExperts()
        )
    assert "multiply-adds" in str(moe.report) and moe.report.notes
    assert [w.filename for w in warned] == [__file__]  # where the user called, dry runs too
    with pytest.warns(UserWarning, match="halo=False") as warned:
        moe_rewrite.convert(
            model, split="layer3", router=PatchRouter(4, 16), experts=RegionExperts(), dry_run=True
        )
    assert [w.filename for w in warned] == [__file__]


def test_regions_grow_train_save_and_load(tmp_path):
    model = cnns.build("ResNet")
    spec = PatchRouter(4, 4)
    moe = moe_rewrite.convert(
        model, split="layer3", router=spec, experts=RegionExperts(), num_experts=2
    )
    x, y = image(8), torch.arange(8) % 10
    before = {k: v.clone() for k, v in model.state_dict().items()}
    moe.train()
    optimizer = torch.optim.Adam(moe.trainable_parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(moe(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    moe.eval()
    with torch.no_grad():
        trained = moe(x)
        with moe.disable_experts():
            assert torch.equal(moe(x), model(x))
        moe.expand(1)
        assert torch.equal(moe(x), trained)
        moe.activate("expert2")
        assert not torch.equal(moe(x), trained)
    moe.save_pretrained(tmp_path)
    again = moe_rewrite.load(tmp_path, model, verify=False)
    with torch.no_grad():
        assert torch.equal(again(x), moe(x))
    moe.remove_last()
    with torch.no_grad():
        assert torch.equal(moe(x), trained)


def test_unfrozen_networks_train_as_a_whole(tmp_path):
    """freeze=False: the trunk and head learn too, on copies; batch statistics are updated."""
    model = cnns.build("ResNet")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    moe = moe_rewrite.convert(
        model, split="layer3", router=PatchRouter(4, 4), experts=RegionExperts(), num_experts=2,
        batch_norm="update", freeze=False,
    )  # fmt: skip
    moe.train()
    names = {n for n, p in moe.named_parameters() if p.requires_grad}
    assert {"conv1.weight", "linear.weight"} <= names
    assert "layer3.0.conv1.weight" not in names
    assert "moe_rewrite.experts.layer3.copies.layer3.0.conv1.weight.0" in names
    optimizer = torch.optim.SGD(moe.trainable_parameters(), lr=0.05)
    x, y = image(8), torch.arange(8) % 10
    nn.functional.cross_entropy(moe(x), y).backward()
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    state = moe.state_dict()
    for name in ("conv1.weight", "linear.weight", "bn1.running_mean"):
        assert not torch.equal(state[name], before[name])
    moe.save_pretrained(tmp_path)
    again = moe_rewrite.load(tmp_path, model, verify=False)
    moe.eval(), again.eval()
    with torch.no_grad():
        assert torch.equal(again(x), moe(x))


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(6, 6, 3, 1, 1), nn.Conv2d(6, 6, 1)

    def forward(self, x):
        x = self.conv(x)
        return x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.a = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(6, 6, 3, 1, 1)
        self.join = Join()
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.trunk(x))
        return self.head(self.join(self.a(x), x.sin()).mean((2, 3)))


class Join(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, 1, 1)

    def forward(self, a, b):
        return self.conv(a) + b


def test_the_default_region_ends_before_what_mixes_all_positions():
    stage = [nn.Conv2d(6, 6, 3, 1, 1), nn.ReLU(), SqueezeExcite()]
    model = cnns.settled(Stage(*stage), size=16)
    moe = moe_rewrite.convert(
        model, split="stage", router=PatchRouter(2, 2), experts=RegionExperts(),
        example_inputs=image(2, 16),
    )  # fmt: skip
    state = added(moe)
    assert "moe_rewrite.experts.stage.copies.stage.0.weight.0" in state
    assert not any("gate" in k for k in state)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"router": PatchRouter(9, 4)}, "grid=9.*8x8"),
        ({"router": PatchRouter(8, 4)}, "grid=8.*at most 4"),
        ({"router": PatchRouter(None, 65)}, "per_expert=65.*patches"),
        ({"experts": RegionExperts("nowhere")}, "nowhere.*no module"),
        ({"experts": RegionExperts("trunk")}, "trunk.*after the cut"),
        ({"experts": RegionExperts(("stage.0", "head"))}, "mixes all positions"),
        ({"experts": RegionExperts("head")}, "feature map"),
        ({"router": TokenRouter()}, "patch"),
        ({"experts": RegionExperts(width=0.5)}, "no hidden channels"),
    ],
)
def test_what_cannot_be_is_said(options, words):
    model = cnns.settled(Stage(nn.Conv2d(6, 6, 3, 2, 1), nn.ReLU()), size=8)
    before = model.state_dict()
    with pytest.raises(MoeRewriteError, match=f"(?s){words}"):
        given = {"router": PatchRouter(2, 2), "experts": RegionExperts("stage")} | options
        moe_rewrite.convert(model, split="stage", example_inputs=image(2, 8), **given)
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )


def test_regions_with_several_entries_or_mixing_operations_are_refused():
    model = cnns.settled(TwoInputs(), size=8)
    options = {"router": PatchRouter(2, 2), "example_inputs": image(2, 8)}
    with pytest.raises(MoeRewriteError, match="one entry, found 2"):
        moe_rewrite.convert(model, split="a", experts=RegionExperts("join"), **options)
    model = cnns.settled(Stage(SqueezeExcite()), size=8)
    with pytest.raises(MoeRewriteError, match="mixes all positions"):
        moe_rewrite.convert(model, split="stage", experts=RegionExperts("stage"), **options)
    with pytest.raises(MoeRewriteError, match="(?s)divides both maps"):
        moe_rewrite.convert(
            cnns.settled(STAGES["no padding"](), size=10), split="stage", router=PatchRouter(2, 2),
            experts=RegionExperts("stage", halo=False), example_inputs=image(2, 10),
        )  # fmt: skip


@pytest.mark.sweep
def test_pretrained_resnet_keeps_its_accuracy(data):
    from cifar import images_and_labels, pretrained

    model = pretrained(data)
    images, labels = images_and_labels(data, "test_batch")
    moe = moe_rewrite.convert(
        model, split="layer3.2", router=PatchRouter(4, 16, gate="hard"), experts=RegionExperts()
    )
    with torch.no_grad():
        want, got = ([m(x) for x in images.split(250)] for m in (model, moe))
    want, got = torch.cat(want), torch.cat(got)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(got.argmax(1), want.argmax(1))
    assert (got.argmax(1) == labels).float().mean() > 0.79


def test_regions_are_copied_cast_and_loaded_like_any_module():
    model = cnns.build("ResNet")
    options = {"split": "layer3", "experts": RegionExperts(), "num_experts": 2}
    moe = moe_rewrite.convert(model, router=PatchRouter(2, 3), **options)
    randomize_copies(moe)
    x = image(3)
    with torch.no_grad():
        want = moe(x)
        twin = copy.deepcopy(moe)
        assert torch.equal(twin(x), want)
        for p in twin.parameters():
            p.zero_()
        assert torch.equal(moe(x), want)
        other = moe_rewrite.convert(model, router=PatchRouter(2, 3), **options)
        other.load_state_dict(moe.state_dict())
        assert torch.equal(other(x), want)
        half = moe.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert (half - want).abs().max() < 0.1 * want.abs().max()


def test_a_model_on_the_meta_device_converts():
    with torch.device("meta"):
        model = cnns.CNNS["ResNet"]().eval()
    x = torch.zeros(2, 3, 32, 32, device="meta")
    moe = moe_rewrite.convert(
        model, split="layer3", router=PatchRouter(4, 4), experts=RegionExperts(),
        num_experts=2, example_inputs=x,
    )  # fmt: skip
    assert moe(x).shape == (2, 10) and all(p.is_meta for p in moe.parameters())

"""Depth: blocks, cut points, what a split means; CNNs are cut with identical outputs."""

import architectures
import cifar
import cnns
import networks
import pytest
import torch
from sweeps import some

import moe_rewrite
from moe_rewrite import MoeRewriteError
from moe_rewrite.analysis.depth import depth_map
from moe_rewrite.frontend.capture import program_of
from moe_rewrite.passes.base import Decisions
from moe_rewrite.passes.clean import Clean
from moe_rewrite.passes.inline_regions import InlineRegions
from moe_rewrite.passes.pipeline import run


@pytest.fixture(scope="module")
def depth():
    return moe_rewrite.inspect(architectures.build("Llama"))


def test_the_map_of_a_llama(depth):
    assert [b.name for b in depth.blocks] == [f"model.layers.{i}" for i in range(3)]
    layer = sum(p.numel() for p in architectures.build("Llama").model.layers[0].parameters())
    assert [b.params for b in depth.blocks] == [layer] * 3
    printed = str(depth)
    for word in ("block", "name", "output", "parameters", "FLOPs", "share", "model.layers.2"):
        assert word in printed
    shares = [float(line.split("%")[0].split()[-1]) for line in printed.splitlines() if "%" in line]
    assert sum(shares) == pytest.approx(100, abs=0.5)


def test_flops_are_two_a_multiply_add():
    """A layer of Llama on sequences of nine, counted by hand."""
    block = moe_rewrite.inspect(architectures.build("Llama")).blocks[0]
    length, width, kv, hidden = 9, 32, 16, 48
    products = 2 * width * width + 2 * width * kv + 3 * width * hidden
    attention = 2 * length * width  # scores, and the sum of values, for one query
    assert block.flops == 2 * length * (products + attention)


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_flops_are_of_one_sample_whatever_the_example(batch):
    """At the lengths of the example; dynamic sizes have names."""
    model = networks.Network(["Mlp", "Mlp"], tokens=False).eval()
    for length in (6, 12):
        depth = moe_rewrite.inspect(model, torch.randn(batch, length, 5))
        assert [b.flops for b in depth.blocks] == [2 * length * 2 * 8 * 16] * 2
        assert depth.blocks[0].shape == ("batch", "sequence", "8")
        assert f"one sample of sequence {length}" in str(depth)
        assert "batch x sequence x 8" in str(depth)


def test_flops_of_an_image_are_of_one_sample():
    model = cnns.build("ResNet")
    maps = [moe_rewrite.inspect(model, torch.randn(n, 3, 32, 32)) for n in (1, 5)]
    assert maps[0].blocks == maps[1].blocks and maps[0].blocks[0].shape[0] == "batch"
    stem = torch.nn.Conv2d(3, 16, 3)
    assert maps[0].parts[0].flops >= 2 * 32 * 32 * stem.weight.numel()


@pytest.mark.parametrize(
    ("split", "first"),
    [
        (0, 0), (2, 2), (-1, 2), (-3, 0), (0.01, 1), (1 / 3, 1), (2 / 3, 2), (0.99, 2),
        ("auto", 1), ("model.layers.2", 2), ("model.layers.1.mlp", 1),
    ],
)  # fmt: skip
def test_every_form_of_split(depth, split, first):
    index, cut = depth.resolve(split)
    assert index == first
    assert cut in {name for _, name in depth.points}
    if split == "model.layers.1.mlp":  # inside the block: the cut is the join before the MLP
        assert cut not in {b.exit for b in depth.blocks}


@pytest.mark.parametrize(
    "split", [3, -4, 0.0, 1.0, -0.5, 1.5, True, None, "model.layers.9", "lm_head", "", [1]]
)
def test_any_other_split_raises_and_shows_the_map(depth, split):
    with pytest.raises(MoeRewriteError) as raised:
        depth.resolve(split)
    assert repr(split) in str(raised.value) and "model.layers.2" in str(raised.value)


def test_a_split_inside_a_block_is_equal_too():
    model = architectures.build("Llama")
    moe = moe_rewrite.convert(model, split="model.layers.1.mlp")
    assert moe.report.equivalence.exact
    sites = {s for s, _, _ in moe.report.sites}
    assert "model.layers.1.mlp.up_proj" in sites
    assert not any(s.startswith("model.layers.1.self_attn") for s in sites)


BLOCKS = {
    "ResNet": 6, "WideResNet": 3, "VGG": 8, "DenseNet": 8, "MobileNetV2": 7, "ConvNeXt": 4,
}  # fmt: skip


@pytest.mark.parametrize("name", some(cnns.CNNS, {"VGG", "DenseNet"}))
def test_cnns_are_captured_and_cut_with_identical_outputs(name):
    model = cnns.build(name)
    depth = moe_rewrite.inspect(model)
    assert len(depth) == BLOCKS[name], str(depth)
    for split in (1, 0.5, -1):
        moe = moe_rewrite.convert(model, split=split)
        assert isinstance(moe.router.spec, moe_rewrite.PatchRouter)
        assert len(moe.report.sites) >= 1
        for shape in ((1, 3, 32, 32), (5, 3, 32, 32)):
            x = torch.randn(shape)
            with torch.no_grad():
                assert torch.equal(moe(x), model(x))


def test_the_input_itself_can_be_the_cut():
    """split=0 of a network whose first block reads the image."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))
    model = model.eval()
    x = torch.randn(2, 3, 8, 8)
    moe = moe_rewrite.convert(model, split=0, example_inputs=x)
    with torch.no_grad():
        assert torch.equal(moe(x), model(x))
    assert not list(moe.shallow.parameters()) and len(moe.report.sites) == 2


def test_pretrained_resnet_keeps_its_predictions(data):
    model = cifar.pretrained(data)
    moe = moe_rewrite.convert(model, split="layer3")
    x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(moe(x), model(x))
    assert moe.report.split == "block 6 (layer3)"


def test_repeated_stretches_are_blocks_without_numbered_names():
    class Unnumbered(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name in "abcd":
                setattr(self, name, networks.Mlp())

        def forward(self, x):
            return self.d(self.c(self.b(self.a(x))))

    model = Unnumbered().eval()
    assert len(moe_rewrite.inspect(model, torch.zeros(2, 5, networks.WIDTH))) >= 3
    moe = moe_rewrite.convert(model, split=-1, example_inputs=torch.zeros(2, 5, networks.WIDTH))
    assert moe.report.equivalence.equal


def test_nothing_to_cut_is_said():
    with pytest.raises(MoeRewriteError, match=r"(?s)expected.*blocks"):
        moe_rewrite.convert(torch.nn.Linear(4, 4), split=1)


@pytest.mark.parametrize(
    "build, name, only",
    [
        (architectures.build, "Llama", True),
        (architectures.build, "ConvNext", True),
        (architectures.build_other, "T5", False),
    ],
)
def test_a_name_finds_the_same_blocks_where_there_is_one_mainline(build, name, only):
    program = run((InlineRegions(), Clean()), program_of(build(name)), Decisions("auto"))
    found = depth_map(program)
    assert found.only == only
    same = [depth_map(program, block.name) == found for block in found.blocks]
    assert all(same) or not only

"""Maps whose channels come last, and rows inside (shifted) windows of them, against hooks."""

import pytest
import reference_patches as patches
import torch
import torch.nn.functional as F
from onnx_files import saved_again
from reference import gates, randomize
from reference_convolutions import assert_equal_forward_and_backward
from swin import Swin, WindowAttention
from torch import nn

import moe_rewrite
from moe_rewrite import LoRAExperts, PatchRouter, TokenRouter
from moe_rewrite.errors import ConfigError

EXPERTS = LoRAExperts(rank=3, alpha=6.0, sites="all+head")
SHAPES = [(16, 16), (12, 20), (14, 22)]  # of which the last are padded to windows


def image(shape, batch=2, seed=0):
    return torch.randn(batch, 3, *shape, generator=torch.Generator().manual_seed(seed))


def swin(**options):
    torch.manual_seed(0)
    return Swin(**options).eval()


def converted(model, example, router, split, experts=EXPERTS):
    moe = moe_rewrite.convert(
        model, split=split, router=router, experts=experts, num_experts=2, example_inputs=example
    )
    assert moe.report.equivalence.exact
    randomize(moe)
    return moe


def at_the_cut(model, x, split):
    """The map that the router reads, with its channels second."""
    seen = []
    module = model.get_submodule(split)
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    model(x)
    handle.remove()
    return seen[0].permute(0, 3, 1, 2)


def in_windows(maps, attention):
    """Gates (E, B, H, W) as the windows of an attention have them: (E, B * windows, rows, 1)."""
    w, s = attention.window, attention.shift
    maps = F.pad(maps, (0, -maps.shape[3] % w, 0, -maps.shape[2] % w))
    maps = maps.roll((-s, -s), (2, 3)) if s else maps
    cells = maps.unfold(2, w, w).unfold(3, w, w)  # (E, B, rows, columns, w, w)
    return cells.reshape(len(maps), -1, w * w, 1)


def of_patches(model, moe, split):
    sizes = {}

    def watch(name):
        return lambda m, args: sizes.update({name: args[0].shape[1:3]})

    def gates_of(x, state):
        handles = [
            module.register_forward_pre_hook(watch(name))
            for name, module in model.named_modules()
            if isinstance(module, WindowAttention)
        ]
        model(x)
        for handle in handles:
            handle.remove()
        spec = moe.router.spec
        found = patches.choose(at_the_cut(model, x, split), patches.rows_of(state), spec)

        def of(name, out):
            parent = name.rpartition(".")[0]
            attention = model.get_submodule(parent)
            if not isinstance(attention, WindowAttention):
                return patches.averaged(*found, spec.grid, out.shape[1:3])[:, :, 0, ..., None]
            maps = patches.averaged(*found, spec.grid, sizes[parent])[:, :, 0]
            return in_windows(maps, attention)

        return of

    return gates_of


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("split", "sites"), [("layers.1", 9), ("layers.2", 5), ("layers.3", 4)])
def test_patches_of_a_swin_transformer(shape, split, sites):
    """Inside windows, shifted ones, behind padding, and after patches were merged."""
    model = swin()
    experts = LoRAExperts(rank=3, alpha=6.0)
    moe = converted(model, image(shape), PatchRouter(2, 2, init=1.0), split, experts)
    assert len(moe.report.sites) == sites
    assert [name for name, _ in moe.report.rejected] == ["head"]
    inputs = [image(shape, 3, 1), image(shape, 1, 2)]
    assert_equal_forward_and_backward(model, moe, inputs, of_patches(model, moe, split), 2.0)


def test_a_channels_last_map_whose_sizes_all_coincide():
    """Eight rows, columns and channels: the layout is read from the graph."""
    model = swin(width=8, window=2)
    moe = converted(model, image((16, 16)), PatchRouter(4, 5, init=1.0), "layers.1", LoRAExperts(rank=3, alpha=6.0))  # fmt: skip
    of = of_patches(model, moe, "layers.1")
    assert_equal_forward_and_backward(model, moe, [image((16, 16), 3, 1)], of, 2.0)


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_one_gate_a_sample_in_windows(shape):
    model = swin()
    moe = converted(model, image(shape), TokenRouter(granularity="sequence"), "layers.1")
    assert len(moe.report.sites) == 10 and not moe.report.rejected

    def gates_of(x, state):
        z = F.adaptive_avg_pool2d(at_the_cut(model, x, "layers.1"), 4).flatten(1)
        found = gates(z, None, state, "token", None).T

        def of(name, out):
            each = found.repeat_interleave(len(out) // len(x), 1)
            return each.reshape(*each.shape, *(1 for _ in out.shape[1:]))

        return of

    inputs = [image(shape, 3, 1), image((16, 12), 1, 2)]
    assert_equal_forward_and_backward(model, moe, inputs, gates_of, EXPERTS.scale)


class Sequence(nn.Module):
    """Windows over a sequence of fixed length, whose features may be as many."""

    def __init__(self, length, window=3):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, 6)
        self.place = nn.Parameter(torch.randn(length, 6))
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.window = window

    def forward(self, x):
        x = self.embed(x) + self.place
        y = x.roll(1, 1).unflatten(1, (-1, self.window)).flatten(0, 1)
        y = torch.tanh(self.layers[0](y)).softmax(1)
        y = self.layers[1](y).reshape(x.shape[0], -1, 6).roll(-1, 1)
        return x + y


@pytest.mark.parametrize("length", [6, 12])
def test_positions_in_windows_of_a_sequence(length):
    model = Sequence(length).eval()
    example = torch.zeros(2, length, 4)
    moe = moe_rewrite.convert(
        model, split="layers.0", router=TokenRouter(), experts=EXPERTS, num_experts=2,
        example_inputs=example,
    )  # fmt: skip
    assert {n for n, _, _ in moe.report.sites} == {"layers.0", "layers.1"}
    randomize(moe)

    def gates_of(x, state):
        z = (model.embed(x) + model.place).detach()
        found = gates(z, None, state, "token", None).permute(2, 0, 1)
        found = found.roll(1, 2).unflatten(2, (-1, 3)).flatten(1, 2)
        return lambda name, out: found.unsqueeze(-1)

    x = torch.randn(3, length, 4)
    assert_equal_forward_and_backward(model, moe, [x], gates_of, EXPERTS.scale)


@pytest.mark.sweep
def test_experts_are_added_saved_and_exported(tmp_path):
    model, example = swin(), image((14, 12))
    moe = converted(model, example, PatchRouter(2, 2, init=1.0), "layers.1")
    x = image((14, 12), 3, 5)
    before = moe(x)
    moe.expand(1, name="third")
    assert torch.equal(moe(x), before)
    moe.activate("third")
    randomize(moe, seed=4, size=0.05)
    moe.save_pretrained(tmp_path / "save")
    again = moe_rewrite.load(tmp_path / "save", model, example_inputs=example)
    assert torch.equal(again(x), moe(x)) and not torch.equal(moe(x), before)
    pytest.importorskip("onnx")
    saved_again(moe, {"x": example}, tmp_path)


def test_images_of_another_size_are_refused_or_get_tables_of_their_own():
    model = swin()
    moe = converted(model, image((16, 16)), PatchRouter(2, 2), "layers.1")
    with pytest.raises(
        moe_rewrite.MoeRewriteError, match="the map at the cut is 6x10: PatchRouter"
    ):
        moe(image((12, 20)))
    spec = PatchRouter(2, 2, features="pooled", init=1.0)
    moe = converted(model, image((16, 16)), spec, "layers.1", LoRAExperts(rank=3, alpha=6.0))
    inputs = [image((12, 20), 2, 1), image((16, 16), 2, 2)]
    of = of_patches(model, moe, "layers.1")
    assert_equal_forward_and_backward(model, moe, inputs, of, 2.0)


def test_positions_of_a_channels_last_map_have_no_gates_of_their_own():
    with pytest.raises(ConfigError, match="the cut carries a feature map, .*use a PatchRouter"):
        moe_rewrite.convert(
            swin(), split="layers.1", router=TokenRouter(), example_inputs=image((16, 16))
        )


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(pixel_values=x).logits


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_transformers_swin_whose_map_is_a_sequence_between_blocks(granularity):
    """Windows of a sequence of positions, up to where patches are merged; of samples, all."""
    from transformers import SwinConfig, SwinForImageClassification

    torch.manual_seed(0)
    config = SwinConfig(
        image_size=24, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4,
        hidden_dropout_prob=0.0, drop_path_rate=0.0,
    )  # fmt: skip
    model = Logits(SwinForImageClassification(config)).eval()
    router = TokenRouter(granularity=granularity)
    split = "model.swin.encoder.layers.0.blocks.1"
    moe = converted(model, image((24, 24)), router, split, LoRAExperts(rank=3, alpha=30.0))
    assert len(moe.report.sites) == (6 if granularity == "token" else 19)

    def gates_of(x, state):
        seen = []
        block = model.get_submodule(split)
        handle = block.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
        model(x)
        handle.remove()
        found = gates(seen[0], None, state, granularity, None)

        def of(name, out):
            if granularity == "sequence":
                return found.repeat_interleave(len(out) // len(x), 0).permute(2, 0, 1)[..., None]
            maps = found.permute(2, 0, 1)
            if out.shape[1] == 16:  # a window
                shifted = maps.unflatten(2, (12, 12)).roll((-2, -2), (2, 3))
                cells = shifted.unfold(2, 4, 4).unfold(3, 4, 4)
                return cells.reshape(len(maps), -1, 16, 1)
            return maps.unsqueeze(-1)

        return of

    inputs = [image((24, 24), 3, 1), image((24, 24), 1, 2)]
    assert_equal_forward_and_backward(model, moe, inputs, gates_of, 10.0)

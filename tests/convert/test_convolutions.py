"""LoRA experts on convolutions over lines, maps and volumes, transposed ones too, against hooks."""

import pytest
import reference_patches as patches
import torch
from reference import gates, randomize
from reference_convolutions import assert_equal_forward_and_backward
from torch import nn

import moe_rewrite
from moe_rewrite import LoRAExperts, PatchRouter, TokenRouter
from moe_rewrite.errors import ConversionError

C = 4
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
EXPERTS = LoRAExperts(rank=3, alpha=6.0, sites="all+head")
LENGTHS = {1: [(C,), (9,), (14,)], 2: [(6, 7), (9, 5)], 3: [(4, 5, 6), (5, 4, 4)]}


class Net(nn.Module):
    """A frozen convolution, then the layers, then a last one over samples of any size."""

    def __init__(self, axes, *layers):
        super().__init__()
        torch.manual_seed(0)
        self.stem = CONV[axes](3, C, 3, padding=1)
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


LAYERS = {
    "plain": lambda n: [CONV[n](C, C, 3, padding=1)],
    "strided": lambda n: [CONV[n](C, 6, 3, 2, 1, bias=False)],
    "dilated, groups": lambda n: [CONV[n](C, 6, 2, 1, 2, 2, groups=2)],
    "depthwise": lambda n: [CONV[n](C, C, 3, padding="same", groups=C)],
    "transposed": lambda n: [TRANSPOSED[n](C, 5, 2, 2)],
    "transposed, groups": lambda n: [TRANSPOSED[n](C, 6, 3, 2, 1, 1, groups=2)],
    "transposed, dilated": lambda n: [TRANSPOSED[n](C, C, 3, 1, 1, 0, dilation=2)],
    "mirrored": lambda n: [CONV[n](C, C, 3, padding=1, padding_mode="reflect")],
    "circular": lambda n: [CONV[n](C, C, 3, padding=1, padding_mode="circular")],
    "replicated": lambda n: [CONV[n](C, C, 3, padding=1, padding_mode="replicate")],
}


def image(shape, batch=2, seed=0):
    return torch.randn(batch, 3, *shape, generator=torch.Generator().manual_seed(seed))


def converted(model, example, router, experts=EXPERTS, **options):
    moe = moe_rewrite.convert(
        model.eval(), split="layers.0", router=router, experts=experts, num_experts=2,
        example_inputs=example, **options,
    )  # fmt: skip
    assert moe.report.equivalence.exact
    randomize(moe)
    return moe


def features(model, x):
    return torch.relu(model.stem(x))


def of_samples(model):
    """One gate a sample, from the pooled map, or from the mean over the line."""

    def gates_of(x, state):
        z = features(model, x).detach()
        if z.ndim == 3:
            found = gates(z.transpose(1, 2), None, state, "sequence", None)[:, 0]
        else:
            pool = {4: nn.functional.adaptive_avg_pool2d, 5: nn.functional.adaptive_avg_pool3d}
            found = gates(pool[z.ndim](z, 4).flatten(1), None, state, "token", None)
        return lambda name, out: found.T.reshape(-1, len(x), *(1 for _ in out.shape[1:]))

    return gates_of


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_one_gate_a_sample(name, axes):
    model = Net(axes, *LAYERS[name](axes), CONV[axes](LAYERS[name](axes)[-1].out_channels, 3, 1))
    shapes = LENGTHS[axes]
    router = TokenRouter(granularity="sequence")
    moe = converted(model, image(shapes[0]), router)
    assert {n for n, _, _ in moe.report.sites} == {"layers.0", "layers.1"}
    inputs = [image(shape, batch, seed) for seed, (shape, batch) in enumerate(zip(shapes, (3, 1, 2), strict=False))]  # fmt: skip
    assert_equal_forward_and_backward(model, moe, inputs, of_samples(model), EXPERTS.scale)


def of_positions(model, granularity="token"):
    def gates_of(x, state):
        found = gates(features(model, x).transpose(1, 2).detach(), None, state, granularity, None)
        return lambda name, out: found.permute(2, 0, 1).unsqueeze(2)

    return gates_of


@pytest.mark.parametrize("granularity", ["token", "prefix"])
@pytest.mark.parametrize(
    "name", ["plain", "depthwise", "transposed, dilated", "mirrored", "circular", "replicated"]
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_gates_along_a_line(name, granularity):
    """Wherever length and number of channels are equal, too."""
    layer = LAYERS[name](1)
    if name == "transposed, dilated":
        layer = [nn.ConvTranspose1d(C, C, 3, 1, 2, 0, dilation=2)]
    model = Net(1, *layer, nn.Conv1d(C, 3, 1))
    for length in (C, 9):
        moe = converted(model, image((length,)), TokenRouter(granularity=granularity))
        assert moe.route(image((length,))).gates.shape == (2, length, 3)
        inputs = [image((length,), 3, 1), image((length + 4,), 1, 2)]
        of = of_positions(model, granularity)
        assert_equal_forward_and_backward(model, moe, inputs, of, EXPERTS.scale)


class Causal(nn.Module):
    """A convolution that is padded before its first position, or cut after its last."""

    def __init__(self, cut):
        super().__init__()
        self.conv = nn.Conv1d(C, C, 3, padding=4 if cut else 0, dilation=2)
        self.cut = cut

    def forward(self, x):
        if self.cut:
            return self.conv(x)[:, :, :-4]
        return self.conv(nn.functional.pad(x, (4, 0)))


def test_causal_convolutions_keep_positions():
    model = Net(1, Causal(False), nn.Conv1d(C, 3, 1))
    moe = converted(model, image((9,)), "auto")
    assert moe.router.spec.granularity == "prefix"
    of = of_positions(model, "prefix")
    assert_equal_forward_and_backward(model, moe, [image((9,), 3, 1), image((12,), 1, 2)], of, EXPERTS.scale)  # fmt: skip
    # before it is cut, the output is longer than the line
    model = Net(1, Causal(True), nn.Conv1d(C, 3, 1))
    report = moe_rewrite.convert(
        model.eval(), split="layers.0", router="token", experts=EXPERTS, dry_run=True,
        example_inputs=image((9,)),
    )  # fmt: skip
    assert [n for n, _, _ in report.sites] == ["layers.1"]


MAPS = {
    "mirrored": lambda: LAYERS["mirrored"](2),
    "circular": lambda: LAYERS["circular"](2),
    "replicated": lambda: LAYERS["replicated"](2),
    "pooled": lambda: [nn.MaxPool2d(3, 2, ceil_mode=True), nn.Conv2d(C, C, 3, padding=1)],
    "pooled in steps": lambda: [nn.MaxPool2d(2), nn.Conv2d(C, C, 3, padding=1)],
    "averaged": lambda: [
        nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.Conv2d(C, C, 3, 1, 1),
    ],
    "transposed": lambda: LAYERS["transposed"](2),
    "transposed, groups": lambda: LAYERS["transposed, groups"](2),
    "down and up": lambda: [
        nn.Conv2d(C, 6, 3, 2, 1), nn.ConvTranspose2d(6, C, 4, 2, 1), nn.Conv2d(C, C, 1),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", MAPS)
def test_patches_of_a_map(name):
    """The gates lie on the convolution's output, whatever its input was padded with."""
    layers = MAPS[name]()
    last = next(x for x in reversed(layers) if hasattr(x, "out_channels")).out_channels
    model = Net(2, *layers, nn.Conv2d(last, 3, 1))
    spec = PatchRouter(3, 4, init=1.0)
    for shape in ((9, 13), (8, 8)):
        moe = converted(model, image(shape), spec)
        names = {n for n, _, _ in moe.report.sites}
        assert names == {n for n, m in model.named_modules() if "layers." in n and hasattr(m, "weight")}  # fmt: skip

        def gates_of(x, state, spec=moe.router.spec):
            found = patches.choose(features(model, x).detach(), patches.rows_of(state), spec)
            return lambda name, out: patches.averaged(*found, spec.grid, out.shape[2:])

        inputs = [image(shape, 3, 1), image(shape, 1, 2)]
        assert_equal_forward_and_backward(model, moe, inputs, gates_of, EXPERTS.scale)


def test_a_transposed_convolution_whose_patches_cannot_be_told():
    model = Net(2, nn.ConvTranspose2d(C, C, 3, 2), nn.Conv2d(C, 3, 1))
    words = r"makes 17x19 positions of 8x9 with stride \[2, 2\]: .*choose its padding"
    with pytest.raises(ConversionError, match=words):
        converted(model, image((8, 9)), PatchRouter(2, 2))


def test_maps_of_a_sequence_of_patches():
    """Gates of positions for convolutions between linear maps."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up = nn.LayerNorm(C), nn.Linear(C, C)
            self.conv = nn.Conv1d(C, C, 5, padding=2, groups=C)

        def forward(self, x):
            y = self.up(self.norm(x)).transpose(1, 2)
            return x + self.conv(y).transpose(1, 2)

    class Tokens(Net):
        def forward(self, x):
            x = self.stem(x).transpose(1, 2)
            for layer in self.layers:
                x = layer(x)
            return x

    model = Tokens(1, Mixed(), Mixed())
    moe = converted(model, image((C,)), TokenRouter())
    assert len(moe.report.sites) == 4

    def gates_of(x, state):
        z = model.stem(x).transpose(1, 2).detach()
        found = gates(z, None, state, "token", None).permute(2, 0, 1)

        def of(name, out):
            return found.unsqueeze(2 if name.endswith("conv") else 3)

        return of

    assert_equal_forward_and_backward(model, moe, [image((C,), 3), image((7,), 1)], gates_of, EXPERTS.scale)  # fmt: skip


def grown_and_loaded(model, example, router, folder):
    """A second expert changes no bit; a save gives the same again."""
    moe = converted(model, example, router)
    x = image(example.shape[2:], 3, 5)
    before = moe(x)
    moe.expand(1, name="third")
    assert torch.equal(moe(x), before)
    moe.activate("third")
    randomize(moe, seed=4)
    moe.save_pretrained(folder)
    again = moe_rewrite.load(folder, model, example_inputs=example)
    assert torch.equal(again(x), moe(x)) and not torch.equal(moe(x), before)
    moe.remove_last()
    assert moe.num_experts == 2


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_experts_are_added_and_saved(axes, tmp_path):
    model = Net(axes, *LAYERS["transposed"](axes), CONV[axes](5, 3, 1))
    router = TokenRouter(granularity="sequence")
    grown_and_loaded(model, image(LENGTHS[axes][0]), router, tmp_path)


@pytest.mark.parametrize("router", [TokenRouter(), TokenRouter(granularity="prefix")])
def test_experts_along_a_line_are_added_and_saved(router, tmp_path):
    grown_and_loaded(Net(1, *LAYERS["mirrored"](1)), image((C,)), router, tmp_path)


REFUSED = {
    "strided": (
        lambda: [nn.Conv1d(C, C, 3, 2, 1)],
        "is a convolution with stride 2: its positions are not the rows at the cut; TokenRouter(granularity='sequence') gives one gate a sample",
    ),
    "pooled": (
        lambda: [nn.AvgPool1d(2), nn.Conv1d(C, C, 1)],
        "pools positions with stride 2: they are not the rows at the cut",
    ),
    "transposed, strided": (lambda: [nn.ConvTranspose1d(C, C, 2, 2)], "convolution with stride 2"),
    "over positions": (lambda: [nn.Linear(C, C)], "is not known|works along positions|second"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_cannot_be_told_along_a_line_are_refused(name):
    """Length and channels coincide."""
    layers, words = REFUSED[name]
    model = Net(1, *layers())
    with pytest.raises(ConversionError, match="no site to convert") as caught:
        converted(model, image((C,)), TokenRouter())
    assert any(word in str(caught.value) for word in words.split("|"))

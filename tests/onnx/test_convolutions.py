"""Files of models with experts on convolutions over lines and volumes, and on transposed ones."""

import cnns
import pytest
import torch
from onnx_files import saved_again
from reference import randomize
from stages import STAGES, Stage, image
from torch import nn

import moe_rewrite
from moe_rewrite import LoRAExperts, PatchRouter, RegionExperts, TokenRouter

pytest.importorskip("onnx")

C = 4
SAMPLES, TOKENS = TokenRouter(granularity="sequence"), TokenRouter()
NETS = {
    "line": ([nn.Conv1d(C, C, 3, 2, 1), nn.ConvTranspose1d(C, 3, 3, 2, 1, 1)], (C, 8), SAMPLES),
    "along a line": ([nn.Conv1d(C, C, 3, padding="same"), nn.Conv1d(C, 3, 1)], (C, 8), TOKENS),
    "prefixes": (
        [nn.Conv1d(C, C, 3, padding=1, padding_mode="replicate"), nn.Conv1d(C, 3, 1)], (C, 8),
        TokenRouter(granularity="prefix", top_k=2),
    ),
    "map": (
        [nn.Conv2d(C, C, 3, 2, 1), nn.ConvTranspose2d(C, 3, 2, 2)], (C, 8, 6), PatchRouter(2, 2),
    ),
    "mirrored": (
        [nn.Conv2d(C, C, 3, 1, 1, padding_mode="reflect"), nn.Conv2d(C, 3, 1)], (C, 8, 6),
        PatchRouter(2, 2),
    ),
    "volume": ([nn.Conv3d(C, C, 3, padding=1), nn.ConvTranspose3d(C, 3, 2, 2)], (C, 4, 5, 4), SAMPLES),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_convolutions(name, tmp_path):
    torch.manual_seed(0)
    layers, shape, router = NETS[name]
    stem = {2: nn.Conv1d, 3: nn.Conv2d, 4: nn.Conv3d}[len(shape)](C, C, 3, padding=1)
    model = nn.Sequential(stem, nn.Tanh(), *layers).eval()
    example = {"input": torch.randn(3, *shape)}
    moe = moe_rewrite.convert(
        model, split=1, router=router, num_experts=2, example_inputs=example,
        experts=LoRAExperts(sites="all+head"),
    )  # fmt: skip
    assert len(moe.report.sites) == 2
    randomize(moe)
    saved_again(moe, example, tmp_path)


@pytest.mark.filterwarnings("ignore:the experts take")
@pytest.mark.parametrize("kind", ["gated", "shuffle"])
@pytest.mark.parametrize("experts", [RegionExperts("stage"), LoRAExperts()])
def test_gated_and_shuffled_channels(kind, experts, tmp_path):
    torch.manual_seed(0)
    model = cnns.settled(STAGES[kind](), size=16)
    example = {"x": image(3, 16)}
    moe = moe_rewrite.convert(
        model, split="stage", router=PatchRouter(2, 2), num_experts=2, example_inputs=example,
        experts=experts,
    )  # fmt: skip
    randomize(moe, size=0.1)
    saved_again(moe, example, tmp_path)


@pytest.mark.filterwarnings("ignore:the experts take")
@pytest.mark.parametrize("halo", [True, False])
def test_regions_with_statistics_over_patches(halo, tmp_path):
    torch.manual_seed(0)
    norms = [nn.GroupNorm(2, 6), nn.InstanceNorm2d(6, affine=True), nn.LayerNorm([6, 16, 16])]
    model = cnns.settled(Stage(nn.Conv2d(6, 6, 3, 1, 1), *norms, Gate()), size=16)
    example = {"x": image(3, 16)}
    moe = moe_rewrite.convert(
        model, split="stage", router=PatchRouter(2, 3, init=1.0), num_experts=2,
        example_inputs=example, experts=RegionExperts("stage", halo=halo, statistics="patches"),
    )  # fmt: skip
    randomize(moe, size=0.1)
    saved_again(moe, example, tmp_path)


class Gate(nn.Module):
    """Squeeze-and-excite as SENet writes it."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(6, 2), nn.Linear(2, 6)

    def forward(self, x):
        batch, channels, _, _ = x.size()
        y = nn.functional.adaptive_avg_pool2d(x, 1).view(batch, channels)
        y = self.up(torch.relu(self.down(y))).view(batch, channels, 1, 1)
        return x * torch.sigmoid(y).expand_as(x)

"""Models to carve, and carved ones."""

import architectures
import feedforwards
import torch
from feedforwards import D
from torch import nn
from torch.utils import _pytree as pytree

import moe_rewrite
from moe_rewrite import CarvedExperts

X = [
    torch.randn(b, n, 5, generator=torch.Generator().manual_seed(n))
    for b, n in ((3, 7), (1, 1), (2, 40))
]


class Relu(nn.Module):
    """Without biases, stored (in, out), of which most hidden units are off."""

    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Parameter(torch.randn(D, 24) / 3), nn.Parameter(torch.randn(24, D) / 3)

    def forward(self, x):
        return torch.relu(x @ self.a - 0.5) @ self.c


class Net(feedforwards.Net):
    """Without the layer before the first pair."""

    def __init__(self, *bodies, seed=0):
        super().__init__(*bodies, seed=seed)
        self.layers = self.layers[1:]


def carved(model, calibration=None, **options):
    experts = {"experts": 4, "active": 0.75} | options.pop("of", {})
    calibration = calibration or [torch.randn(4, 30, 5, generator=torch.Generator().manual_seed(9))]
    return moe_rewrite.convert(
        model, "carve", experts=CarvedExperts(calibration=calibration, **experts),
        example_inputs=X[0], **options,
    )  # fmt: skip


def shaken(model):
    """Biases and norms that are not those of a fresh model."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
    return model


IDS = torch.randint(3, 97, (4, 12), generator=torch.Generator().manual_seed(0))


def llama(share=0.75, experts=4, **options):
    """A carved Llama and the dense one."""
    model = architectures.build("Llama", layers=1)
    spec = CarvedExperts(experts, active=share, calibration=[{"input_ids": IDS}])
    return moe_rewrite.convert(model, "carve", experts=spec, **options), model


def first(outputs):
    return next(t for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor))

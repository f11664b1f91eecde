"""Networks with one convolutional stage of every kind of operation."""

import reference_patches as plain
import torch
from reference import added
from torch import nn


def image(batch=3, size=32, seed=1, channels=3):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def randomize_copies(moe, seed=0, size=0.3):
    """Experts unlike one another and unlike the dense region."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in added(moe).items():
            if ".copies." in name and p.is_floating_point() and "running" not in name:
                scale = size * (p.std().item() if p.numel() > 1 and p.std() > 0 else 1.0)
                p += torch.randn(p.shape, generator=generator) * scale


class Stage(nn.Module):
    """A trunk, a convolutional stage of some kind, and a head."""

    def __init__(self, *stage, width=6, out=6):
        super().__init__()
        self.trunk = nn.Conv2d(3, width, 3, 1, 1)
        self.stage = nn.Sequential(*stage)
        self.head = nn.Linear(out, 4)

    def forward(self, x):
        return self.head(self.stage(torch.relu(self.trunk(x))).mean((2, 3)))


class Work(nn.Module):
    """Layers by name, and what a test makes of them."""

    def __init__(self, work, **layers):
        super().__init__()
        self.work = work
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.work(self, x)


def convolutions(work, width=6):
    """A network whose stage is what `work` makes of convolutions a, b, c and other layers."""
    torch.manual_seed(0)
    layers = {n: nn.Conv2d(width, width, 3, padding=1) for n in "abc"}
    others = {"norm": nn.BatchNorm2d(width), "group": nn.GroupNorm(2, width)}
    linear = nn.Linear(width, width)
    return Stage(Work(work, **layers, **others, linear=linear)).eval()


class Constant(nn.Module):
    """Reads values that are neither weight nor input."""

    def forward(self, x):
        return x * torch.linspace(0.5, 2.0, 6).view(-1, 1, 1) + torch.tensor(0.5)


class Shuffle(nn.Module):
    """Channels in another order, as ShuffleNet writes it."""

    def __init__(self, groups):
        super().__init__()
        self.groups = groups

    def forward(self, x):
        batch, channels, rows, cols = x.shape
        x = x.view(batch, self.groups, channels // self.groups, rows, cols)
        return x.transpose(1, 2).contiguous().view(batch, channels, rows, cols)


STAGES = {
    "gated": lambda: Stage(nn.Conv2d(6, 12, 3, 1, 1), nn.GLU(1), nn.Conv2d(6, 6, 3, 2, 1)),
    "shuffle": lambda: Stage(nn.Conv2d(6, 12, 3, 1, 1, groups=2), Shuffle(3), nn.Conv2d(12, 6, 3, 1, 1, groups=2), nn.ChannelShuffle(2)),
    "constant": lambda: Stage(Constant(), nn.Conv2d(6, 6, 3, 1, 1), Constant()),
    "stride": lambda: Stage(nn.Conv2d(6, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, 2, 1)),
    "dilation": lambda: Stage(nn.Conv2d(6, 6, 3, 1, 2, dilation=2), nn.ReLU(), nn.Conv2d(6, 6, 3, 1, 1)),
    "groups": lambda: Stage(nn.Conv2d(6, 12, 3, 1, 1, groups=3), nn.GELU(), nn.Conv2d(12, 6, 1)),
    "asymmetric": lambda: Stage(nn.Conv2d(6, 6, (1, 5), padding=(0, 2)), nn.Conv2d(6, 6, (3, 1), (2, 1), (1, 0))),
    "same": lambda: Stage(nn.Conv2d(6, 6, 4, padding="same"), nn.Tanh(), nn.Conv2d(6, 6, 3, padding="same")),
    "no padding": lambda: Stage(nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3)),
    "pooling": lambda: Stage(nn.MaxPool2d(3, 2, 1), nn.Conv2d(6, 6, 3, 1, 1), nn.AvgPool2d(3, 1, 1)),
    "zero pad": lambda: Stage(nn.ZeroPad2d((0, 1, 1, 0)), nn.Conv2d(6, 6, 2), nn.ReLU(), nn.Conv2d(6, 6, 3, 1, 1)),
    "max after negative": lambda: Stage(nn.Conv2d(6, 6, 3, 1, 1), nn.MaxPool2d(3, 1, 1), nn.Conv2d(6, 6, 3, 1, 1)),
    "in place": lambda: Stage(nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3, 1, 1), nn.Hardswish(inplace=True)),
    "dropout": lambda: Stage(nn.Dropout2d(0.2), nn.Conv2d(6, 6, 3, 1, 1), nn.Softmax(1)),
}  # fmt: skip


def isolated_stage(model, moe, state, x, **options):
    """The definition: the network's output with its stage run on isolated patches."""
    with torch.no_grad():
        features = torch.relu(model.trunk(x))
    size, spec = model.stage(features).shape[2:], moe.router.spec
    y = plain.isolated(model.stage, features, state, "stage.", spec, features, size, **options)
    return model.head(y.mean((2, 3)))

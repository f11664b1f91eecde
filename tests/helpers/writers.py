"""Networks whose forward pass writes: statistics, moving averages, counters, attributes."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

WIDTH = 8


class Chain(nn.Module):
    """Four residual linear maps and a head; `write` runs on the value after `at` of them."""

    def __init__(self, write, at=2, inputs=None, **layers):
        super().__init__()
        torch.manual_seed(0)
        self.embed = inputs or nn.Identity()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head, self.write, self.at, self.calls = nn.Linear(WIDTH, 3), write, at, 0
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("average", torch.zeros(WIDTH))
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        x = self.embed(x)
        for i, layer in enumerate(self.layers):
            x = x + F.relu(layer(x))
            if i == self.at:
                x = self.write(self, x)
        return self.head(x)


def counted(m, x):
    m.count += 1
    return x * (1 + m.count)


def averaged(m, x):
    m.average.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
    return x + m.average


def averaged_without_gradients(m, x):
    with torch.no_grad():
        m.average.mul_(0.9).add_(x.mean(0), alpha=0.1)
        m.count += 1
    return x + m.average


def recorded(m, x):
    """Nothing reads what is written, of features, in a no_grad region."""
    with torch.no_grad():
        m.average[0] = x.max()
        m.count.copy_(x.abs().mean())
    return x


def instance_norm(m, x):
    return m.norm(x[:, :, None].expand(-1, -1, 4) + torch.arange(4.0)).mean(2)


def functional_batch_norm(m, x):
    training = m.norm.training
    return F.batch_norm(x, m.norm.mean, m.norm.var, training=training)


class Statistics(nn.Module):
    """A norm of one's own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("var", torch.ones(WIDTH))


class EvoNorm(Statistics):
    """As EvoNorm-B0: a moving variance, written by copy_."""

    def forward(self, x):
        var = self.var
        if self.training:
            var = x.var(0, unbiased=False)
            self.var.copy_(0.9 * self.var + 0.1 * var.detach())
        return x / (var + 1e-5).sqrt().max(torch.full_like(x, 0.5))


def attribute(m, x):
    m.calls = m.calls + 1
    m.last = x
    return x


def state_in_an_attribute(m, x):
    m.last = m.last + 1
    return x * m.last


def _spectral():
    chain = Chain(lambda m, x: x)
    parametrizations.spectral_norm(chain.layers[3])
    return chain


def norm(layer):
    return Chain(lambda m, x: m.norm(x), norm=layer)


# (network, whether it writes in evaluation, names of what training writes by default)
WRITERS = {
    "counter": (lambda: Chain(counted), True, {"count"}),
    "counter before the cut": (lambda: Chain(counted, at=0), True, {"count"}),
    "average": (lambda: Chain(averaged), True, {"average"}),
    "no_grad": (lambda: Chain(averaged_without_gradients), True, {"average", "count"}),
    "recorded": (lambda: Chain(recorded), True, {"average", "count"}),
    "recorded before the cut": (lambda: Chain(recorded, at=0), True, {"average", "count"}),
    "attribute": (lambda: Chain(attribute), False, set()),
    "instance norm": (
        lambda: Chain(instance_norm, norm=nn.InstanceNorm1d(WIDTH, track_running_stats=True)),
        False, set(),
    ),
    "functional batch norm": (
        lambda: Chain(functional_batch_norm, norm=Statistics()), False, set(),
    ),
    "batch norm": (lambda: norm(nn.BatchNorm1d(WIDTH)), False, set()),
    "EvoNorm": (lambda: norm(EvoNorm()), False, set()),
    "spectral norm": (_spectral, False, set()),
    "embedding": (
        lambda: Chain(lambda m, x: x, inputs=nn.Embedding(20, WIDTH, max_norm=1.0)),
        True, {"embed.weight"},
    ),
}  # fmt: skip


def given(name, batch=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    if name == "embedding":
        return torch.randint(0, 20, (batch, 5), generator=generator)
    return torch.randn(batch, WIDTH, generator=generator)

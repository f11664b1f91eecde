"""Small networks in plain PyTorch, some random: branches, shared weights, functional calls."""

import torch
import torch.nn.functional as F
from torch import nn

WIDTH = 8


class Mlp(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width),
        )  # fmt: skip

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Residual(nn.Module):
    """Feed-forwards of plain modules, each beside a shortcut."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
            for _ in range(3)
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


class Attention(nn.Module):
    """Fused qkv, heads by unflatten, dropout inside the functional call."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v))
        p = 0.2 if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class Bare(nn.Module):
    """Bare parameters: F.linear, a matmul and a transposed matmul."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(width, width) / 4) for _ in range(3))

    def forward(self, x):
        return x + torch.tanh(F.linear(x, self.a) + x @ self.b + torch.matmul(x, self.c.t()))


class Branches(nn.Module):
    """Two branches that gate one another, one of them normalised, with dropout."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        left, right = self.left(x), torch.sigmoid(self.right(self.norm(x)))
        return x + F.dropout(left * right, 0.1, self.training)


class Pooled(nn.Module):
    """A branch over the mean of the sequence, whose rows are not the plan's."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.inside, self.over = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + torch.relu(self.inside(x)) + self.over(x.mean(1, keepdim=True))


class Swapped(nn.Module):
    """Length first, and rows merged to one dimension."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        length_first = x.transpose(0, 1)
        y = torch.relu(self.first(length_first)).transpose(0, 1)
        flat = self.second(y.reshape(-1, y.shape[-1]))
        return x + flat.view(x.shape)


class InPlace(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        y = self.linear(x)
        y.mul_(0.5)
        y[:, :1] += 1.0
        return y.relu_() + x


class Convolved(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.conv, self.mix = nn.Conv1d(width, width, 3, padding=1), nn.Linear(width, width)

    def forward(self, x):
        return self.mix(self.conv(x.transpose(1, 2)).transpose(1, 2)) + x


class Stacked(nn.Module):
    """A product that reads another one with nothing between."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.second(self.first(x))


KINDS = {
    k.__name__: k
    for k in (Mlp, Attention, Bare, Branches, Pooled, Swapped, InPlace, Convolved, Stacked)
}


class Network(nn.Module):
    """Layers by name; a number instead of a name runs that earlier layer again."""

    def __init__(self, layers, tokens=True, seed=0, head="each"):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(20, WIDTH) if tokens else nn.Linear(5, WIDTH)
        self.layers = nn.ModuleList()
        self.order = []
        for layer in layers:
            if isinstance(layer, str):
                self.order.append(len(self.layers))
                self.layers.append(KINDS[layer]())
            else:
                self.order.append(layer % max(len(self.layers), 1))
        if not len(self.layers):
            self.layers.append(Mlp())
            self.order = [0]
        self.head, self.how = nn.Linear(WIDTH, 4), head

    def forward(self, x):
        x = self.embed(x)
        for index in self.order:
            x = self.layers[index](x)
        if self.how == "pooled":
            return {"logits": self.head(x.mean(1)), "hidden": x}
        return self.head(x)

    def input(self, batch, length, seed=0):
        generator = torch.Generator().manual_seed(seed)
        if isinstance(self.embed, nn.Embedding):
            return torch.randint(0, 20, (batch, length), generator=generator)
        return torch.randn(batch, length, 5, generator=generator)

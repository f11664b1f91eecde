"""Heads of random modules, and the forms of their outputs."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn


class Head(nn.Module):
    """From the last value to scores. how: which positions are read."""

    def __init__(self, how, layer):
        super().__init__()
        self.how, self.layer = how, layer

    def forward(self, x, net):
        if self.how == "mean":
            x = x.mean(1)
        elif self.how == "last":
            x = x[:, -1]
        elif self.how == "over map":
            x = x.flatten(2).mean(2)
        elif self.how == "tied":
            return x @ net.stem.embed.weight.t()
        return self.layer(x)


def head(draw, value, d, start):
    if draw.random() < 0.1:
        return Head("each", nn.Identity())
    if value == "vector":
        return Head("each", nn.Linear(d, 3))
    if value == "tokens":
        hows = ("each", "each", "mean", "last") + (("tied", "tied") if start == "ids" else ())
        how = draw.choice(hows)
        return Head(how, nn.Identity() if how == "tied" else nn.Linear(d, 3))
    if value == "map" and draw.random() < 0.3:
        return Head("each", nn.Conv2d(d, 3, 1))
    return Head("over map", nn.Linear(d, 3))


class Pair(NamedTuple):
    logits: torch.Tensor
    hidden: torch.Tensor


@dataclass
class Registered:
    logits: torch.Tensor
    hidden: torch.Tensor


@dataclass
class Unregistered:
    logits: torch.Tensor


torch.export.register_dataclass(Registered)

FORMS = {  # form of the output -> made of the scores and every block's value
    "plain": lambda y, hidden: y,
    "tuple": lambda y, hidden: (y, hidden[0]),
    "dict": lambda y, hidden: {"logits": y, "hidden": hidden[-1]},
    "nested": lambda y, hidden: {"a": [y, (hidden[0],)], "b": {"c": y.mean()}},
    "every value": lambda y, hidden: [*hidden, y],
    "classes": lambda y, hidden: (y, y.argmax(-1)),
    "bool": lambda y, hidden: {"logits": y, "on": y > 0},
    "scalar": lambda y, hidden: y.square().mean(),
    "half": lambda y, hidden: y.half(),
    "double": lambda y, hidden: (y.double(), y),
    "complex": lambda y, hidden: torch.complex(y.float(), -y.float()),
    "none": lambda y, hidden: (y, None),
    "constant": lambda y, hidden: (y, 3),
    "named tuple": lambda y, hidden: Pair(y, hidden[-1]),
    "dataclass": lambda y, hidden: Registered(y, hidden[-1]),
    "unregistered": lambda y, hidden: Unregistered(y),
    "twice": lambda y, hidden: (y, y),
    "view": lambda y, hidden: (y, y[..., :2]),
}

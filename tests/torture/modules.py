"""A random module from a seed, and inputs of any size for it."""

import random
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from . import map_blocks, sequence_blocks, token_blocks  # noqa: F401 (they register their kinds)
from .blocks import KINDS, Residual
from .heads import FORMS, head

VOCABULARY = 20
STARTS = {  # kind of input -> (kind of value after the stem, how often)
    "ids": ("tokens", 5), "floats": ("tokens", 3), "image": ("map", 5), "patches": ("tokens", 2),
    "vector": ("vector", 2), "line": ("line", 2), "volume": ("volume", 1),
}  # fmt: skip
BRIDGES = {"map": ("tokens", "vector"), "tokens": ("vector",), "line": ("tokens", "vector")}
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 12, 13)
NONE = 0.08  # how often a call has no samples, or no positions


class Stem(nn.Module):
    """From the input to a value of width d."""

    def __init__(self, draw, start, d):
        super().__init__()
        self.start = start
        if start == "ids":
            self.embed = nn.Embedding(VOCABULARY, d, padding_idx=draw.choice((None, 0)))
        elif start == "image":
            stride = draw.choice((1, 2))
            self.embed = nn.Conv2d(3, d, 3, padding=1, stride=stride)
        elif start == "patches":
            self.embed = nn.Conv2d(3, d, 4, stride=4)
            self.first = nn.Parameter(torch.randn(1, draw.choice((0, 1)), d))
            self.places = nn.Parameter(torch.randn(1, 6, d) * 0.1)
        elif start == "line":
            self.embed = nn.Conv1d(2, d, 3, padding=1)
        elif start == "volume":
            self.embed = nn.Conv3d(2, d, 3, padding=1)
        else:
            self.embed = nn.Linear(5, d)

    def forward(self, x):
        x = self.embed(x)
        if self.start != "patches":
            return x
        x = x.flatten(2).transpose(1, 2) + self.places
        return torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1)


class Bridge(nn.Module):
    """From one kind of value to another."""

    def __init__(self, draw, before, after):
        super().__init__()
        self.before, self.after, self.how = before, after, draw.choice(("mean", "max", "first"))

    def forward(self, x):
        if self.after == "tokens":
            return x.flatten(2).transpose(1, 2)
        if self.before == "tokens":
            return {"mean": x.mean(1), "max": x.amax(1), "first": x[:, 0]}[self.how]
        return x.flatten(2).mean(2)


class Net(nn.Module):
    """Stem, blocks in an order that may repeat some, perhaps a bridge and a long skip, and a head."""

    def __init__(self, stem, blocks, order, bridges, skip, head, form):
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.ModuleList(blocks), head
        self.bridges = nn.ModuleDict({str(at): bridge for at, bridge in bridges.items()})
        self.order, self.skip, self.form = order, skip, form

    def forward(self, x, attention_mask=None, extra=None, scale=1.0, flag=False):
        x = self.stem(x)
        if attention_mask is not None:
            x = x * attention_mask[..., None].to(x.dtype)
        hidden = []
        for step, index in enumerate(self.order):
            if str(step) in self.bridges:
                x = self.bridges[str(step)](x)
            if step == 1 and extra is not None:
                x = x + extra.reshape(extra.shape[:1] + (1,) * (x.ndim - 1)).to(x.dtype)
            x = self.blocks[index](x) * scale if flag else self.blocks[index](x)
            hidden.append(x)
            if self.skip is not None and step == self.skip[1]:
                x = x + hidden[self.skip[0]]
        return FORMS[self.form](self.head(x, self), hidden)


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@dataclass
class Made:
    """A module, its kind of input, and what the checks need to know of it."""

    model: nn.Module
    start: str
    names: list[str]
    form: str
    call: str
    draw: random.Random
    image: tuple[int, int]
    example: dict = field(default_factory=dict)

    def inputs(self, other: bool = True) -> dict:
        """Arguments by name; other: of other sizes than the example's, which may be odd."""
        draw = self.draw
        batch = draw.choice((1, 1, 2, 3, 4, 5)) if other else draw.choice((2, 3, 4))
        length = draw.choice(SIZES) if other else draw.choice((4, 6, 7))
        if other and draw.random() < NONE:
            batch, length = draw.choice(((0, length), (0, length), (batch, 0)))
        height, width = self.image
        if other and self.start == "image" and draw.random() < 0.3:
            height, width = height + draw.choice((0, 2, 4)), width + draw.choice((0, 4))
        given = {
            "ids": lambda: torch.randint(0, VOCABULARY, (batch, length)),
            "floats": lambda: torch.randn(batch, length, 5),
            "image": lambda: torch.randn(batch, 3, height, width),
            "patches": lambda: torch.randn(batch, 3, height, width),
            "vector": lambda: torch.randn(batch, 5),
            "line": lambda: torch.randn(batch, 2, length + 3),
            "volume": lambda: torch.randn(batch, 2, 4, 4, 4),
        }
        x = given[self.start]()
        dtype = next(iter(self.model.stem.parameters())).dtype
        arguments = {"x": x.to(dtype) if x.is_floating_point() else x}
        if self.call == "mask":
            mask = torch.ones(batch, length, dtype=torch.long)
            mask[:1, length - length // 3 :] = 0
            arguments["attention_mask"] = mask
        elif self.call == "extra":
            arguments["extra"] = torch.randn(batch)
        elif self.call == "scale":
            arguments |= {"scale": draw.choice((0.5, 2.0)) if other else 0.5, "flag": True}
        return arguments


def pick(draw, weighted):
    names = sorted(weighted)
    return draw.choices(names, [weighted[n] for n in names])[0]


def build(seed: int) -> Made:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    start = pick(draw, {name: often for name, (_, often) in STARTS.items()})
    d, value = draw.choice((4, 6, 8, 12)), STARTS[start][0]
    count = draw.choice((2, 3, 3, 4, 5))
    bridge_at = draw.randrange(1, count + 1) if draw.random() < 0.25 else None
    blocks, names, order, bridges, kinds = [], [], [], {}, []
    for step in range(count):
        if step == bridge_at and value in BRIDGES:
            after = draw.choice(BRIDGES[value])
            bridges[step], value = Bridge(draw, value, after), after
        again = [i for i, k in zip(order, kinds, strict=True) if k == value]
        if again and draw.random() < 0.1:
            order.append(draw.choice(again))
        else:
            name = draw.choice(sorted(KINDS[value]))
            names.append(f"{value}:{name}")
            blocks.append(wrapped(draw, KINDS[value][name](draw, d), value, d))
            order.append(len(blocks) - 1)
        kinds.append(value)
    skip = None
    if count > 2 and draw.random() < 0.2 and kinds[0] == kinds[-1]:
        skip = (0, count - 1)
    form = draw.choice(sorted(FORMS)) if draw.random() < 0.5 else "plain"
    image = draw.choice(((8, 8), (12, 8), (8, 8)))
    model = Net(
        Stem(draw, start, d), blocks, order, bridges, skip, head(draw, value, d, start), form
    )
    if start == "patches":
        image = (12, 8)
    call = draw.choice(("plain", "plain", "plain", "mask", "extra", "scale"))
    if call == "mask" and start != "ids":
        call = "plain"
    model = finished(draw, model)
    made = Made(model, start, names, form, call, draw, image)
    made.example = made.inputs(other=False)
    return made


def wrapped(draw, block, value, d):
    how = draw.choice(("pre", "pre", "post", "bare", "scaled", "none", "alone", "alone"))
    if how == "alone":
        return block
    if value in ("tokens", "vector"):
        norm = draw.choice((nn.LayerNorm(d), nn.RMSNorm(d), nn.Identity()))
    else:
        dims = {"line": 1, "map": 2, "volume": 3}[value]
        norm = map_blocks.norm(draw, d, dims)
    return Residual(block, norm, how)


def finished(draw, model):
    """Another dtype, frozen weights, a mode: what users do to a model before they convert it."""
    lot = draw.random()
    lazy = any(nn.parameter.is_lazy(p) for p in model.parameters())
    if lot < 0.04:
        model = model.double()
    elif lot < 0.1 and not lazy:
        model = model.bfloat16()
    elif lot < 0.15:
        model.stem.requires_grad_(False)
    return model.train(draw.random() < 0.3)

"""What random modules are made of: a block is a function of itself and a value, with named layers."""

from torch import nn

KINDS = {}  # kind of value -> name -> maker(draw, width) of a Block that keeps the kind and width


class Block(nn.Module):
    """work(self, x), over layers that are attributes by name.

    layouts: name of a layer -> how its rows relate to the plan's, if not (batch, positions, ...):
        "swapped", "flat", "flat swapped", "sample", "one before", "every second", or "other" where the reference does not follow.
    """

    def __init__(self, work, layouts=(), **layers):
        super().__init__()
        self.work, self.layouts = work, dict(layouts)
        for name, layer in layers.items():
            if isinstance(layer, nn.Parameter) or not hasattr(layer, "is_leaf"):
                setattr(self, name, layer)
            else:
                self.register_buffer(name, layer)

    def forward(self, x):
        return self.work(self, x)


class Residual(nn.Module):
    """A shortcut around a block, with the norm before it, after the sum, or nowhere."""

    def __init__(self, inner, norm, how):
        super().__init__()
        self.inner, self.norm, self.how = inner, norm, how

    def forward(self, x):
        if self.how == "pre":
            return x + self.inner(self.norm(x))
        if self.how == "post":
            return self.norm(x + self.inner(x))
        if self.how == "bare":
            return x + self.inner(x)
        if self.how == "scaled":
            return 0.5 * x + 0.5 * self.inner(x).tanh()
        return self.norm(self.inner(x))


def kind(*values):
    """Register a maker for these kinds of values, under its own name."""

    def register(make):
        for value in values:
            KINDS.setdefault(value, {})[make.__name__.strip("_")] = make
        return make

    return register


def activation(draw):
    kinds = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.ELU, nn.Hardswish, nn.Mish, nn.Softplus)
    return draw.choice(kinds)()


class Ffn(nn.Module):
    """A feed-forward and nothing else, so that its experts are whole modules for the reference."""

    def __init__(self, draw, width):
        super().__init__()
        hidden = draw.choice((width, 2 * width, 12, 5))
        bias = draw.random() < 0.7
        self.gated = draw.choice(("no", "no", "two", "glu"))
        self.up = nn.Linear(width, 2 * hidden if self.gated == "glu" else hidden, bias)
        self.gate = nn.Linear(width, hidden, bias) if self.gated == "two" else nn.Identity()
        self.down = nn.Linear(hidden, width, bias)
        self.act = activation(draw)
        self.drop = nn.Dropout(0.1) if draw.random() < 0.2 else nn.Identity()

    def forward(self, x):
        hidden = self.up(x)
        if self.gated == "two":
            hidden = self.act(self.gate(x)) * hidden
        elif self.gated == "glu":
            gate, hidden = hidden.chunk(2, -1)
            hidden = self.act(gate) * hidden
        else:
            hidden = self.act(hidden)
        return self.down(self.drop(hidden))

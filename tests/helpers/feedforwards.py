"""Small networks with feed-forwards of every form, and how they are upcycled."""

import torch
import torch.nn.functional as F
from reference import added, randomize
from torch import nn

import moe_rewrite
from moe_rewrite import FFNExperts, TokenRouter

D, H = 8, 12


class Plain(nn.Module):
    """Biases, and a dropout between."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(D, H), nn.Linear(H, D), nn.Dropout(0.3)

    def forward(self, x):
        return self.down(self.drop(F.gelu(self.up(x))))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(D, H, bias=False), nn.Linear(D, H)
        self.down = nn.Linear(H, D, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Fused(nn.Module):
    """Gate and up in one product, with a norm before the last one."""

    def __init__(self):
        super().__init__()
        self.both, self.norm, self.down = nn.Linear(D, 2 * H), nn.LayerNorm(H), nn.Linear(H, D)

    def forward(self, x):
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(self.norm(torch.relu(gate).square() * up))


class Functional(nn.Module):
    """Bare parameters stored (in, out), an activation in place, a hand-written one, merged rows."""

    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Parameter(torch.randn(D, H) / 3), nn.Parameter(torch.randn(H, D) / 3)
        self.b = nn.Parameter(torch.randn(H))

    def forward(self, x):
        h = torch.addmm(self.b, x.reshape(-1, D), self.a).relu_()
        return (0.5 * h * (1 + torch.tanh(h)) @ self.c).view(x.shape)


class Swapped(nn.Module):
    """Length first."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x):
        return self.down(F.hardswish(self.up(x.transpose(0, 1)))).transpose(0, 1)


class Mixed(nn.Module):
    """Mixes positions, so that a wrong row shows; contains no feed-forward."""

    def __init__(self):
        super().__init__()
        self.v, self.out = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        return self.out(torch.cumsum(self.v(x).flip(1), 1) / x.shape[1])


BODIES = (Plain, Gated, Fused, Functional, Swapped)


class Net(nn.Module):
    def __init__(self, *bodies, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        kinds = [Mixed] + [kind for body in bodies for kind in (Mixed, body)]
        self.embed, self.layers = nn.Linear(5, D), nn.ModuleList(kind() for kind in kinds)
        self.head = nn.Linear(D, 3)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def with_layers(model, x, mixed):
    """A Net's output. mixed: what experts make of (index, layer, input), in place of each layer that
    can hold some."""
    x = model.embed(x)
    for i, layer in enumerate(model.layers):
        x = x + (layer(x) if isinstance(layer, Mixed) else mixed(i, layer, x))
    return model.head(x)


def gated_sum(gates, outs):
    return sum(g.unsqueeze(-1) * y for g, y in zip(gates.unbind(-1), outs, strict=True))


def inputs(batch, length, seed=1):
    return torch.randn(batch, length, 5, generator=torch.Generator().manual_seed(seed))


def convert(model, **given):
    given = {"split": "layers.1", "example_inputs": inputs(2, 6), "mode": "upcycle"} | given
    return moe_rewrite.convert(model, **given)


class Tanh(nn.Module):
    """The GELU that ONNX Runtime's operator has, with biases."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(x), approximate="tanh"))


TOP2 = {"router": TokenRouter(top_k=2, base=False, init=1.0), "num_experts": 4}
RAW = {"router": TokenRouter(top_k=1, base=False, gate="all", init=1.0), "num_experts": 3}
BASE = {
    "router": TokenRouter(granularity="prefix", top_k=2), "mode": "pmoe", "num_experts": 3,
    "experts": FFNExperts(),
}  # fmt: skip
CHOICE = {"router": TokenRouter(policy="expert", base=False, init=1.0), "num_experts": 3}


LAYERS = {"experts": FFNExperts(router="layer"), "num_experts": 4}
SIGMOID = {"experts": FFNExperts(router="layer", score="sigmoid"), "num_experts": 4}


def made(given, *bodies):
    """A converted model whose expert 1 gets no row, unless experts choose or layers route."""
    moe = convert(Net(*bodies).eval(), verify=False, **given)
    randomize(moe)
    if given is LAYERS or given is SIGMOID:
        return moe
    if given is not CHOICE:
        with torch.no_grad():
            moe.router.rows[1][-1] = -50.0
    return moe


def steps(moe):
    """Three steps of training on its own outputs."""
    moe.train()
    optimizer = torch.optim.SGD(moe.trainable_parameters(), 0.1)
    for _ in range(3):
        moe(inputs(4, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moe.eval()


def computes_its_definition(moe, definition, x):
    """The output, after it and its gradients were compared with those of definition(x, added tensors)."""
    state = {k: v.detach().clone().requires_grad_(v.requires_grad) for k, v in added(moe).items()}
    moe.zero_grad()
    got, want = moe(x), definition(x, state)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    for name, p in added(moe).items():
        if p.requires_grad:
            no = torch.zeros_like(p)
            mine, of = no if p.grad is None else p.grad, state[name].grad
            torch.testing.assert_close(mine, no if of is None else of, rtol=1e-3, atol=1e-4)
    return got

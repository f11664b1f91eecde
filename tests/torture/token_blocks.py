"""Blocks over rows: sequences (B, S, D), most of them also over vectors (B, D)."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from .blocks import Block, Ffn, activation, kind


def linear(d, out=None):
    return nn.Linear(d, out or d)


def bare(*shape):
    return nn.Parameter(torch.randn(*shape) / shape[-1] ** 0.5)


@kind("tokens", "vector")
def feed_forward(draw, d):
    return Block(lambda m, x: m.ffn(x), ffn=Ffn(draw, d))


@kind("tokens", "vector")
def one_linear(draw, d):
    act = activation(draw)
    return Block(lambda m, x: act(m.first(x)), first=linear(d))


@kind("tokens", "vector")
def functional(draw, d):
    if draw.random() < 0.5:
        return Block(
            lambda m, x: F.linear(x, m.a) + torch.tanh(x @ m.b), a=bare(d, d), b=bare(d, d)
        )
    return Block(lambda m, x: torch.einsum("...d,de->...e", x, m.a), a=bare(d, d))


@kind("tokens", "vector")
def tied(draw, d):
    first, second = linear(d), linear(d)
    second.weight = first.weight
    return Block(lambda m, x: m.second(torch.relu(m.first(x))), first=first, second=second)


@kind("tokens", "vector")
def twice(draw, d):
    return Block(lambda m, x: m.first(torch.tanh(m.first(x))), first=linear(d))


@kind("tokens", "vector")
def in_place(draw, d):
    def work(m, x):
        y = m.first(x)
        y.mul_(0.5)
        y[:, :1] += 1.0
        y[..., 0] = 0.25
        return y.relu_() + x

    return Block(work, first=linear(d))


@kind("tokens", "vector")
def branches(draw, d):
    return Block(
        lambda m, x: m.left(x) * torch.sigmoid(m.right(m.norm(x))),
        left=linear(d), right=nn.Linear(d, d, bias=False), norm=nn.LayerNorm(d),
    )  # fmt: skip


@kind("tokens", "vector")
def dropped(draw, d):
    p = draw.choice((0.1, 0.5))
    if draw.random() < 0.5:
        return Block(lambda m, x: F.dropout(m.first(x), p, m.training), first=linear(d))
    return Block(lambda m, x: m.drop(m.first(x)), first=linear(d), drop=nn.Dropout(p))


@kind("tokens", "vector")
def normed_weights(draw, d):
    norm = draw.choice((
        parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.spectral_norm,
        parametrizations.orthogonal,
    ))  # fmt: skip
    return Block(lambda m, x: torch.relu(m.first(x)), first=norm(linear(d)))


@kind("tokens", "vector")
def half_part(draw, d):
    dtype = draw.choice((torch.float16, torch.bfloat16, torch.bfloat16, torch.float64))
    return Block(
        lambda m, x: m.second(torch.tanh(m.first(x.to(dtype))).to(x.dtype)),
        first=linear(d).to(dtype), second=linear(d),
    )  # fmt: skip


@kind("tokens", "vector")
def autocast(draw, d):
    def work(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = m.first(x)
        return y.to(x.dtype)

    return Block(work, {"first": "other"}, first=linear(d))


@kind("tokens", "vector")
def written_buffer(draw, d):
    def counted(m, x):
        m.count += 1
        return m.first(x) / m.count

    def averaged(m, x):
        with torch.no_grad():
            m.count.mul_(0.9).add_(0.1 * x.abs().mean())
        return m.first(x) + m.count

    def recorded(m, x):
        m.count.copy_(x.detach().float().mean())
        return m.first(x)

    return Block(draw.choice((counted, averaged, recorded)), first=linear(d), count=torch.ones(()))


@kind("tokens", "vector")
def python_state(draw, d):
    def work(m, x):
        m.calls = m.calls + 1
        m.last = x
        return m.first(x)

    return Block(work, first=linear(d), calls=0)


@kind("tokens", "vector")
def depends_on_data(draw, d):
    def branch(m, x):
        return m.first(x) if x.sum() > 0 else x

    def item(m, x):
        return m.first(x) * x.abs().mean().item()

    def masked(m, x):
        y, kept = torch.zeros_like(x), x[..., 0] > 0
        y[kept] = m.first(x[kept])
        return y

    def where(m, x):
        return torch.where(x > 0, m.first(x), x)

    def nonzero(m, x):
        return m.first(x) + (x > 0).nonzero().shape[0]

    return Block(draw.choice((branch, item, masked, where, where, nonzero)), first=linear(d))


@kind("tokens", "vector")
def dense_mixture(draw, d):
    def work(m, x):
        gates = m.gate(x).softmax(-1)
        return gates[..., :1] * m.one(x) + gates[..., 1:] * m.two(x)

    return Block(work, gate=linear(d, 2), one=Ffn(draw, d), two=Ffn(draw, d))


@kind("tokens", "vector")
def weights_of_three_dims(draw, d):
    return Block(
        lambda m, x: torch.einsum("...d,kde->...ke", x, m.a).mean(-2), a=bare(2, d, d),
    )  # fmt: skip


@kind("tokens", "vector")
def looked_up(draw, d):
    return Block(
        lambda m, x: m.first(x) + m.table((x[..., 0] > 0).long()),
        first=linear(d), table=nn.Embedding(2, d),
    )  # fmt: skip


@kind("tokens", "vector")
def complex_parts(draw, d):
    def rotated(m, x):
        z = torch.view_as_complex(m.first(x).unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(z * torch.polar(m.one, m.angle)).flatten(-2)

    def spectrum(m, x):
        z = torch.fft.rfft(m.first(x), dim=-1)
        return torch.fft.irfft(z * (1 + 0.5j), n=x.shape[-1], dim=-1)

    def weighed(m, x):
        z = torch.complex(x, x.flip(-1)) @ torch.complex(m.re, m.im)
        return m.first(z.real) + z.imag

    return Block(
        draw.choice((rotated, spectrum, weighed)), {"re": "other", "im": "other"},
        first=linear(d), one=torch.ones(d // 2), angle=torch.linspace(0, 3, d // 2),
        re=bare(d, d), im=bare(d, d),
    )  # fmt: skip


@kind("tokens", "vector")
def recomputed(draw, d):
    """plain: as the reference runs it, which has to see every operation once."""

    def work(m, x):
        return m.ffn(x) if m.plain else checkpoint(m.ffn, x, use_reentrant=False)

    return Block(work, ffn=Ffn(draw, d), plain=False)


@kind("tokens", "vector")
def without_gradient(draw, d):
    def work(m, x):
        with torch.no_grad():
            ahead = m.second(x)
        return m.first(x) * ahead

    return Block(work, first=linear(d), second=linear(d))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad


@kind("tokens", "vector")
def own_gradient(draw, d):
    return Block(lambda m, x: Doubled.apply(m.first(x)), first=linear(d))


@kind("tokens", "vector")
def odd_products(draw, d):
    if draw.random() < 0.5:
        return Block(lambda m, x: m.pair(x, x.tanh()), {"pair": "other"}, pair=nn.Bilinear(d, d, d))
    return Block(
        lambda m, x: m.down(F.relu(m.up(x)).square()), up=linear(d, 3 * d), down=linear(3 * d, d)
    )


@kind("tokens", "vector")
def lazy(draw, d):
    block = Block(lambda m, x: torch.tanh(m.first(x)), first=nn.LazyLinear(d))
    if draw.random() < 0.8:
        block(torch.zeros(2, 3, d))
    return block


@kind("tokens", "vector")
def lists_of_layers(draw, d):
    def work(m, x):
        for layer in m.layers:
            x = x + 0.5 * torch.tanh(layer(x))
        return x * m.scales[0] + m.named["shift"](x)

    return Block(
        work, layers=nn.ModuleList(linear(d) for _ in range(draw.randint(1, 3))),
        scales=nn.ParameterList([nn.Parameter(torch.ones(d))]),
        named=nn.ModuleDict({"shift": linear(d)}),
    )  # fmt: skip


@kind("tokens", "vector")
def hooked_layer(draw, d):
    block = Block(lambda m, x: m.first(x), first=linear(d))
    if draw.random() < 0.3:
        block.first.register_forward_hook(lambda module, args, out: out * 2)
    return block


@kind("tokens", "vector")
def merged(draw, d):
    parts = draw.choice((1, 2, 3))
    return Block(
        lambda m, x: sum(torch.tensor_split(m.first(x), parts, dim=-1)[0].mean(-1, keepdim=True) * y
                         for y in (x, m.second(x).flip(-1).roll(1, -1))),
        first=linear(d), second=linear(d),
    )  # fmt: skip


@kind("tokens", "vector")
def constants(draw, d):
    table = torch.randn(d, d) / d
    return Block(
        lambda m, x: m.first(x) + x @ table.to(x.dtype) + x.new_tensor(0.5), first=linear(d)
    )

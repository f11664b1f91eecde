"""Blocks over sequences (B, S, D) that mix or move positions."""

import torch
import torch.nn.functional as F
from torch import nn

from .blocks import Block, Ffn, kind
from .token_blocks import bare, linear


@kind("tokens")
def attention(draw, d):
    causal, manual = draw.random() < 0.5, draw.random() < 0.4

    def work(m, x):
        q, k, v = m.qkv(x).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v))
        if manual:
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
            if causal:
                ahead = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
                scores = scores.masked_fill(ahead, float("-inf"))
            mixed = scores.softmax(-1) @ v
        else:
            p = 0.2 if m.training else 0.0
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=causal)
        return m.out(mixed.transpose(1, 2).flatten(2))

    return Block(work, qkv=linear(d, 3 * d), out=linear(d))


@kind("tokens")
def torch_attention(draw, d):
    if draw.random() < 0.5:
        first = draw.random() < 0.5
        layer = nn.TransformerEncoderLayer(d, 2, 12, batch_first=True, norm_first=first)
        return Block(lambda m, x: m.layer(x), {"layer": "other"}, layer=layer)
    layer = nn.MultiheadAttention(d, 2, batch_first=True)
    return Block(lambda m, x: m.layer(x, x, x)[0], {"layer": "other"}, layer=layer)


@kind("tokens")
def recurrent(draw, d):
    layer = draw.choice((nn.GRU, nn.LSTM, nn.RNN))(
        d, d, batch_first=True, num_layers=draw.randint(1, 2)
    )
    return Block(lambda m, x: m.mix(m.layer(x)[0]), {"layer": "other"}, layer=layer, mix=linear(d))


@kind("tokens")
def cell_in_a_loop(draw, d):
    def work(m, x):
        state, states = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = m.cell(x[:, t], state)
            states.append(state)
        return m.first(torch.stack(states, 1))

    return Block(work, {"cell": "other"}, cell=nn.GRUCell(d, d), first=linear(d))


@kind("tokens")
def swapped(draw, d):
    def work(m, x):
        y = torch.relu(m.first(x.transpose(0, 1))).transpose(0, 1)
        return m.second(y.reshape(-1, y.shape[-1])).view(x.shape)

    return Block(work, {"first": "swapped", "second": "flat"}, first=linear(d), second=linear(d))


@kind("tokens")
def heads_apart(draw, d):
    return Block(
        lambda m, x: m.first(x.unflatten(-1, (2, -1))).permute(0, 1, 3, 2).flatten(2),
        first=linear(d // 2),
    )  # fmt: skip


@kind("tokens")
def over_the_mean(draw, d):
    return Block(
        lambda m, x: torch.relu(m.inside(x)) * torch.sigmoid(m.over(x.mean(1, keepdim=True))),
        {"over": "sample"}, inside=linear(d), over=linear(d),
    )  # fmt: skip


@kind("tokens")
def branch_on_length(draw, d):
    limit, rest = draw.randint(1, 12), draw.randrange(2)

    def work(m, x):
        if x.shape[1] > limit:
            x = m.first(x)
        return m.second(x) if x.shape[0] % 2 == rest else torch.tanh(m.second(x))

    return Block(work, first=linear(d), second=linear(d))


@kind("tokens")
def convolved(draw, d):
    k, groups = draw.choice((1, 3, 5)), draw.choice((1, 2, d))
    causal = draw.random() < 0.5

    def work(m, x):
        y = F.pad(x.transpose(1, 2), (k - 1, 0) if causal else (k // 2, k // 2))
        return m.mix(F.silu(m.conv(y)).transpose(1, 2))

    return Block(work, {"conv": "other"}, conv=nn.Conv1d(d, d, k, groups=groups), mix=linear(d))


@kind("tokens")
def windows(draw, d):
    def work(m, x):
        return m.first(F.pad(x, (0, 0, 1, 1)).unfold(1, 3, 1).flatten(2))

    return Block(work, first=linear(3 * d, d))


@kind("tokens")
def spectrum(draw, d):
    return Block(lambda m, x: m.first(torch.fft.fft2(x.float()).real.to(x.dtype)), first=linear(d))


@kind("tokens")
def norm_over_positions(draw, d):
    norm = draw.choice((
        nn.BatchNorm1d(d), nn.InstanceNorm1d(d, affine=True), nn.GroupNorm(2, d),
        nn.BatchNorm1d(d, track_running_stats=False), nn.BatchNorm1d(d, momentum=None),
        nn.InstanceNorm1d(d, track_running_stats=True),
    ))  # fmt: skip
    return Block(
        lambda m, x: m.first(m.norm(x.transpose(1, 2)).transpose(1, 2)), norm=norm, first=linear(d)
    )


@kind("tokens")
def mixed_positions(draw, d):
    choices = {
        "cumsum": lambda x: x.cumsum(1) / (1 + torch.arange(x.shape[1])[:, None]),
        "roll": lambda x: x.roll(1, 1),
        "flip": lambda x: x.flip(1),
        "sort": lambda x: x.sort(1).values,
        "shift": lambda x: F.pad(x, (0, 0, 1, -1)),
        "gather": lambda x: x.gather(1, x.argsort(1)),
        "sum": lambda x: x - x.sum(1, keepdim=True),
        "distance": lambda x: torch.cdist(x, x).softmax(-1) @ x,
        "tril": lambda x: torch.ones(x.shape[1], x.shape[1]).tril() @ x / x.shape[1],
        "top": lambda x: x * (x >= x.topk(1, dim=1).values),
    }
    mix = choices[draw.choice(sorted(choices))]
    return Block(lambda m, x: m.first(mix(x)) + m.second(x), first=linear(d), second=linear(d))


@kind("tokens")
def position_table(draw, d):
    length = draw.choice((8, 64))

    def work(m, x):
        return m.first(x + m.places[: x.shape[1]])

    return Block(work, first=linear(d), places=bare(length, d))


@kind("tokens")
def every_second(draw, d):
    """Fewer positions, and as many again."""

    def work(m, x):
        y = m.first(x[:, ::2])
        return y.repeat_interleave(2, 1)[:, : x.shape[1]]

    return Block(work, {"first": "every second"}, first=linear(d))


@kind("tokens")
def with_a_token(draw, d):
    def work(m, x):
        y = torch.cat([m.extra.to(x.dtype).expand(x.shape[0], -1, -1), x], 1)
        return m.first(y)[:, 1:]

    return Block(work, {"first": "one before"}, first=linear(d), extra=bare(1, 1, d))


@kind("tokens")
def two_streams(draw, d):
    def work(m, x):
        a, b = x.chunk(2, -1)
        b = b + m.first(a)
        return torch.cat([a + m.second(b), b], -1)

    return Block(work, first=linear(d // 2), second=linear(d // 2))


@kind("tokens")
def scattered(draw, d):
    """A top-1 mixture of experts by dense products and a one-hot."""

    def work(m, x):
        chosen = F.one_hot(m.gate(x).argmax(-1), 2).to(x.dtype)
        return chosen[..., :1] * m.one(x) + chosen[..., 1:] * m.two(x)

    return Block(work, gate=linear(d, 2), one=Ffn(draw, d), two=linear(d))


@kind("tokens")
def returns_a_pair(draw, d):
    inner = Block(lambda m, x: (m.first(x), x.mean(1)), first=linear(d))
    return Block(lambda m, x: m.inner(x)[0] + m.inner(x)[1][:, None], inner=inner)

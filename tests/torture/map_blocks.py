"""Blocks over feature maps (B, D, H, W), lines (B, D, L) and volumes (B, D, T, H, W)."""

import torch
import torch.nn.functional as F
from torch import nn

from .blocks import Block, Ffn, activation, kind
from .token_blocks import linear


def norm(draw, d, dims=2):
    batch = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    instance = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 1]
    return draw.choice((
        batch(d), batch(d), nn.GroupNorm(2, d), instance(d, affine=True), nn.Identity(),
        batch(d, track_running_stats=False), batch(d, momentum=None, affine=False),
    ))  # fmt: skip


@kind("map", "map", "map")
def convolution(draw, d):
    size = draw.choice((1, 3, 3, 5, (1, 3), (3, 1)))
    dilation = draw.choice((1, 1, 2))
    conv = nn.Conv2d(
        d, d, size, padding="same", dilation=dilation, groups=draw.choice((1, 1, 2, d)),
        bias=draw.random() < 0.6, padding_mode=draw.choice(("zeros", "zeros", "reflect", "circular", "replicate")),
    )  # fmt: skip
    act = activation(draw)
    return Block(lambda m, x: act(m.norm(m.conv(x))), conv=conv, norm=norm(draw, d))


@kind("map")
def basic(draw, d):
    return Block(
        lambda m, x: F.relu_(m.n2(m.c2(F.relu(m.n1(m.c1(x))))) + x),
        c1=nn.Conv2d(d, d, 3, padding=1, bias=False), n1=nn.BatchNorm2d(d),
        c2=nn.Conv2d(d, d, 3, padding=1, bias=False), n2=nn.BatchNorm2d(d),
    )  # fmt: skip


@kind("map")
def inverted(draw, d):
    return Block(
        lambda m, x: m.down(F.relu6(m.norm(m.deep(F.relu6(m.up(x)))))),
        up=nn.Conv2d(d, 2 * d, 1), deep=nn.Conv2d(2 * d, 2 * d, 3, padding=1, groups=2 * d),
        norm=nn.BatchNorm2d(2 * d), down=nn.Conv2d(2 * d, d, 1),
    )  # fmt: skip


@kind("map")
def convnext(draw, d):
    def work(m, x):
        y = m.norm(m.deep(x).permute(0, 2, 3, 1))
        return m.ffn(y).permute(0, 3, 1, 2)

    return Block(
        work, deep=nn.Conv2d(d, d, 3, padding=1, groups=d), norm=nn.LayerNorm(d), ffn=Ffn(draw, d)
    )


@kind("map")
def down_and_up(draw, d):
    ways = {
        "stride": lambda m, x: F.interpolate(m.conv(x), size=x.shape[2:]),
        "transposed": lambda m, x: m.back(m.conv(x))[:, :, : x.shape[2], : x.shape[3]],
        "average": lambda m, x: m.same(F.interpolate(F.avg_pool2d(x, 2), size=x.shape[2:], mode="bilinear")),
        "shuffle": lambda m, x: F.pixel_shuffle(m.wide(x), 2)[:, :, ::2, ::2],
        "unshuffle": lambda m, x: m.same(F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2)),
        "adaptive": lambda m, x: m.same(x) * F.adaptive_avg_pool2d(x, 1),
        "max": lambda m, x: m.same(F.max_pool2d(x, 3, stride=1, padding=1)),
    }  # fmt: skip
    way = ways[draw.choice(sorted(ways))]
    return Block(
        way, conv=nn.Conv2d(d, d, 3, stride=2, padding=1), back=nn.ConvTranspose2d(d, d, 2, stride=2),
        wide=nn.Conv2d(d, 4 * d, 1), same=nn.Conv2d(d, d, 3, padding=1),
    )  # fmt: skip


@kind("map")
def squeeze_excite(draw, d):
    def work(m, x):
        y = m.conv(x)
        scale = torch.sigmoid(m.up(F.relu(m.down(y.mean((2, 3))))))
        return y * scale[:, :, None, None]

    return Block(
        work, {"down": "sample", "up": "sample"}, conv=nn.Conv2d(d, d, 3, padding=1),
        down=linear(d, d // 2), up=linear(d // 2, d),
    )  # fmt: skip


@kind("map")
def shuffled_channels(draw, d):
    def work(m, x):
        a, b = m.conv(x).chunk(2, 1)
        return (
            torch.cat([a, F.relu(m.side(b))], 1).unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        )

    return Block(work, conv=nn.Conv2d(d, d, 1), side=nn.Conv2d(d // 2, d // 2, 3, padding=1))


@kind("map")
def dense_join(draw, d):
    return Block(
        lambda m, x: m.join(torch.cat([x, F.relu(m.first(x))], 1)),
        first=nn.Conv2d(d, 4, 3, padding=1), join=nn.Conv2d(d + 4, d, 1),
    )  # fmt: skip


@kind("map")
def map_attention(draw, d):
    def work(m, x):
        q, k, v = m.qkv(x).flatten(2).chunk(3, 1)
        mixed = v @ (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(-1).transpose(1, 2)
        return m.out(mixed.unflatten(2, x.shape[2:]))

    return Block(work, qkv=nn.Conv2d(d, 3 * d, 1), out=nn.Conv2d(d, d, 1))


@kind("map")
def map_windows(draw, d):
    """Linear maps over windows of 2 x 2, cut out and put back."""

    def work(m, x):
        y = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 3, 5, 1)
        y = m.first(y.flatten(3, 4).flatten(0, 2))
        y = y.unflatten(0, (x.shape[0], x.shape[2] // 2, x.shape[3] // 2)).unflatten(3, (2, 2))
        return y.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    return Block(work, {"first": "other"}, first=linear(d))


@kind("map")
def last_channels(draw, d):
    return Block(
        lambda m, x: m.first(F.layer_norm(x.movedim(1, -1), (d,))).movedim(-1, 1), first=linear(d)
    )


@kind("map")
def odd_map(draw, d):
    ways = {
        "spectrum": lambda m, x: m.conv(torch.fft.rfft2(x.float()).real.new_zeros(()) + x),
        "filtered": lambda m, x: torch.fft.irfft2(torch.fft.rfft2(m.conv(x).float()) * 0.5, s=x.shape[2:]).to(x.dtype),
        "unfold": lambda m, x: F.fold(F.unfold(m.conv(x), 3, padding=1), x.shape[2:], 3, padding=1) / 9,
        "rows": lambda m, x: m.conv(x) + torch.linspace(0, 1, x.shape[2])[:, None],
        "half": lambda m, x: m.side(x.bfloat16()).to(x.dtype) + m.conv(x),
        "in place": lambda m, x: m.conv(x).mul_(0.5).add_(x).relu_(),
        "dropped": lambda m, x: F.dropout2d(m.conv(x), 0.2, m.training),
        "response": lambda m, x: F.local_response_norm(m.conv(x), 2),
        "prelu": lambda m, x: m.prelu(m.conv(x)),
        "branch": lambda m, x: m.conv(x) if x.shape[2] > 6 else torch.tanh(m.conv(x)),
        "no gradient": lambda m, x: m.conv(x) * x.detach().abs().mean((2, 3), keepdim=True),
        "twice": lambda m, x: m.conv(torch.tanh(m.conv(x))),
        "global": lambda m, x: m.conv(x) - x.mean(),
        "data": lambda m, x: m.conv(x) if x.abs().mean() > 0.5 else x,
        "flipped": lambda m, x: m.conv(x.flip(3)).transpose(2, 3).transpose(2, 3),
    }  # fmt: skip
    name = draw.choice(sorted(ways))
    side = {"side": nn.Conv2d(d, d, 1).bfloat16()} if name == "half" else {}
    return Block(ways[name], conv=nn.Conv2d(d, d, 3, padding=1), prelu=nn.PReLU(d), **side)


@kind("map")
def normed_map_weights(draw, d):
    wrap = draw.choice(
        (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm)
    )
    return Block(lambda m, x: F.silu(m.conv(x)), conv=wrap(nn.Conv2d(d, d, 3, padding=1)))


@kind("line", "line")
def line_convolution(draw, d):
    k, dilation = draw.choice((1, 3)), draw.choice((1, 2))
    conv = nn.Conv1d(
        d, d, k, padding="same", dilation=dilation, groups=draw.choice((1, 1, 2)),
        padding_mode=draw.choice(("zeros", "zeros", "reflect", "circular")),
    )  # fmt: skip
    act = activation(draw)
    return Block(lambda m, x: act(m.norm(m.conv(x))), conv=conv, norm=norm(draw, d, 1))


@kind("line")
def gated_line(draw, d):
    def work(m, x):
        a, b = m.conv(F.pad(x, (2, 0))).chunk(2, 1)
        return m.out(torch.tanh(a) * torch.sigmoid(b))

    return Block(work, conv=nn.Conv1d(d, 2 * d, 3), out=nn.Conv1d(d, d, 1))


@kind("line")
def line_rows(draw, d):
    return Block(lambda m, x: m.ffn(x.transpose(1, 2)).transpose(1, 2), ffn=Ffn(draw, d))


@kind("line")
def line_down_and_up(draw, d):
    return Block(
        lambda m, x: m.back(F.relu(m.conv(x)))[..., : x.shape[2]],
        conv=nn.Conv1d(d, d, 3, stride=2, padding=1),
        back=nn.ConvTranspose1d(d, d, 2, stride=2),
    )


@kind("volume")
def volume_convolution(draw, d):
    conv = nn.Conv3d(d, d, draw.choice((1, 3)), padding="same", groups=draw.choice((1, 2)))
    act = activation(draw)
    return Block(lambda m, x: act(m.norm(m.conv(x))), conv=conv, norm=norm(draw, d, 3))


@kind("volume")
def volume_rows(draw, d):
    return Block(lambda m, x: m.ffn(x.movedim(1, -1)).movedim(-1, 1), ffn=Ffn(draw, d))

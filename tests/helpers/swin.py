"""A small Swin transformer (arXiv 2103.14030) over channels-last maps, written plainly.

Sides, channels and windows may coincide; sides need not divide by the window.
"""

import torch
import torch.nn.functional as F
from torch import nn


class WindowAttention(nn.Module):
    def __init__(self, width, heads, window, shift):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.window, self.shift = heads, window, shift

    def forward(self, x):
        batch, height, width, channels = x.shape
        w, s = self.window, self.shift
        x = F.pad(x, (0, 0, 0, -width % w, 0, -height % w))
        tall, wide = x.shape[1:3]
        if s:
            x = torch.roll(x, (-s, -s), (1, 2))
        x = x.view(batch, tall // w, w, wide // w, w, channels)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, channels)
        qkv = (
            self.qkv(x)
            .reshape(-1, w * w, 3, self.heads, channels // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        x = F.scaled_dot_product_attention(*qkv.unbind(0))
        x = self.proj(x.transpose(1, 2).reshape(-1, w * w, channels))
        x = x.view(batch, tall // w, wide // w, w, w, channels).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, tall, wide, channels)
        if s:
            x = torch.roll(x, (s, s), (1, 2))
        return x[:, :height, :width, :]


class Block(nn.Module):
    def __init__(self, width, heads, window, shift):
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = WindowAttention(width, heads, window, shift)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        x = x + self.attention(self.first(x))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Merge(nn.Module):
    """Four neighbours become one position of twice the width."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.reduce = (
            nn.LayerNorm(4 * width),
            nn.Linear(4 * width, 2 * width, bias=False),
        )

    def forward(self, x):
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        parts = [x[:, i::2, j::2, :] for j in (0, 1) for i in (0, 1)]
        return self.reduce(self.norm(torch.cat(parts, -1)))


class Swin(nn.Module):
    def __init__(self, width=8, window=4, classes=5):
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, width, 2, 2), nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            [
                Block(width, 2, window, 0),
                Block(width, 2, window, window // 2),
                Merge(width),
                Block(2 * width, 2, window // 2, 1),
            ]
        )
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x):
        x = self.norm(self.embed(x).permute(0, 2, 3, 1))
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean((1, 2)))

"""A small U-Net F(x, c_noise, label) for images of 8x8 to 32x32.

Level i works at size / 2^i with width * multipliers[i] channels: `blocks` residual blocks on the way down, one more
on the way up, where each also reads what its counterpart left on the way down. One block (attention follows if chosen):

    h + V SiLU((1 + s(e)) GroupNorm(U SiLU(GroupNorm(h))) + b(e)),    V and the output layer start at 0

Ho et al. 2020 (https://arxiv.org/abs/2006.11239, appendix B), with the scale-shift norm of Dhariwal & Nichol 2021.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention

from score_sde.networks.embedding import Embedding, check_shape, image_shape, positive, zeroed

__all__ = ["UNet"]


class UNet(nn.Module):
    """U-Net: x (batch, channels, height, width), c_noise (batch,), label (batch,) or None -> the shape of x.

    `attention` lists the image heights at which the blocks attend. Raises ValueError where the image cannot be halved
    often enough or an attention size does not occur.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        width: int = 32,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 2,
        attention: Sequence[int] = (),
        dropout: float = 0.0,
        frequencies: int = 32,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        positive(width=width, blocks=blocks, levels=len(multipliers))
        channels, height, _ = image_shape(tuple(event_shape), multiple=2 ** (len(multipliers) - 1))
        sizes = [height >> level for level in range(len(multipliers))]
        if not set(attention) <= set(sizes):
            raise ValueError(f"attention={list(attention)} must name image heights of this U-Net: {sizes}")
        self.event_shape, self.num_classes = tuple(event_shape), num_classes
        self.embedding = Embedding(4 * width, frequencies, num_classes)

        def block(inward: int, outward: int, size: int) -> Block:
            return Block(inward, outward, 4 * width, attend=size in attention, dropout=dropout)

        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        h, skips = width, [width]
        for level, size in enumerate(sizes):
            if level > 0:
                self.down.append(Resample(h, 0.5))
                skips.append(h)
            for _ in range(blocks):
                self.down.append(block(h, width * multipliers[level], size))
                h = width * multipliers[level]
                skips.append(h)
        self.middle = nn.ModuleList([block(h, h, sizes[-1]), block(h, h, sizes[-1])])
        for level, size in reversed(list(enumerate(sizes))):
            for _ in range(blocks + 1):
                self.up.append(block(h + skips.pop(), width * multipliers[level], size))
                h = width * multipliers[level]
            if level > 0:
                self.up.append(Resample(h, 2.0))
        self.last = nn.Sequential(group_norm(h), nn.SiLU(), zeroed(nn.Conv2d(h, channels, 3, padding=1)))

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        check_shape(x, self.event_shape)
        embedded = self.embedding(c_noise, label)
        h = self.first(x)
        skips = [h]
        for layer in self.down:
            h = layer(h, embedded)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, embedded)
        for layer in self.up:
            h = layer(h if isinstance(layer, Resample) else torch.cat([h, skips.pop()], dim=1), embedded)
        return self.last(h)


class Block(nn.Module):
    """A residual block, with self-attention behind it where `attend`."""

    def __init__(self, inward: int, outward: int, embedding: int, attend: bool, dropout: float) -> None:
        super().__init__()
        self.begin = nn.Sequential(group_norm(inward), nn.SiLU(), nn.Conv2d(inward, outward, 3, padding=1))
        self.norm = nn.GroupNorm(groups(outward), outward, affine=False)
        self.modulation = nn.Linear(embedding, 2 * outward)
        self.end = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), zeroed(nn.Conv2d(outward, outward, 3, padding=1)))
        self.skip = nn.Identity() if inward == outward else nn.Conv2d(inward, outward, 1)
        self.attention = Attention(outward) if attend else nn.Identity()

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        scale, shift = self.modulation(embedded)[:, :, None, None].chunk(2, dim=1)
        h = self.norm(self.begin(x)) * (1 + scale) + shift
        return self.attention(self.skip(x) + self.end(h))


class Attention(nn.Module):
    """x + P softmax(Q K^T / sqrt(d)) V over the pixels, in heads of up to 32 channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = groups(channels, size=32)
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.project = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).flatten(2)  # (batch, 3 * heads * d, pixels)
        q, k, v = qkv.unflatten(1, (3, self.heads, -1)).transpose(-1, -2).unbind(1)
        attended = scaled_dot_product_attention(q, k, v)  # (batch, heads, pixels, d)
        return x + self.project(attended.transpose(-1, -2).reshape(x.shape))


class Resample(nn.Module):
    """Halves (area average) or doubles (nearest) the image, then a 3x3 convolution."""

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.scale, self.mode = scale, "area" if scale < 1 else "nearest"
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        return self.conv(interpolate(x, scale_factor=self.scale, mode=self.mode))


def groups(channels: int, size: int = 8) -> int:
    """How many groups of about `size` channels divide them evenly."""
    return next(count for count in range(max(channels // size, 1), 0, -1) if channels % count == 0)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups(channels), channels)

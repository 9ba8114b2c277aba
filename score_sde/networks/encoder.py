"""The downward half of the U-Net with a linear read-out: logits of a class from a noisy image.

Level i has `blocks` residual blocks at size / 2^i, with width * multipliers[i] channels; the features of the last level
are averaged over the image. After Dhariwal & Nichol 2021, https://arxiv.org/abs/2105.05233, section 4.1, who pool by
attention instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from score_sde.networks.blocks import Block, Resample, Style
from score_sde.networks.embedding import Embedding, check_attention, check_shape, image_shape, positive, zeroed

__all__ = ["Encoder"]


class Encoder(nn.Module):
    """x (batch, channels, height, width), c_noise (batch,) -> logits (batch, num_classes), all 0 before training.

    `attention` lists the heights of the image at which blocks have attention. Raises ValueError if the image cannot be
    halved often enough, or never has a height of `attention`.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        num_classes: int,
        width: int = 32,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        attention: Sequence[int] = (),
        dropout: float = 0.0,
        frequencies: int = 32,
    ) -> None:
        super().__init__()
        positive(width=width, blocks=blocks, levels=len(multipliers), num_classes=num_classes)
        channels, height, _ = image_shape(tuple(event_shape), multiple=2 ** (len(multipliers) - 1))
        sizes = [height >> level for level in range(len(multipliers))]
        check_attention(attention, sizes)
        self.event_shape, self.num_classes = tuple(event_shape), num_classes
        style = Style(dims=2, embedding=4 * width, dropout=dropout)
        self.embedding = Embedding(4 * width, frequencies)
        self.first = style.conv(channels, width)
        self.down, h = nn.ModuleList(), width
        for level, size in enumerate(sizes):
            if level > 0:
                self.down.append(Resample(h, style, 0.5))
            for _ in range(blocks):
                outward = width * multipliers[level]
                self.down.append(Block(h, outward, style, size in attention))
                h = outward
        self.norm, self.last = style.norm(h), zeroed(nn.Linear(h, num_classes))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        check_shape(x, self.event_shape)
        embedded, h = self.embedding(c_noise), self.first(x)
        for layer in self.down:
            h = layer(h, embedded)
        return self.last(torch.nn.functional.silu(self.norm(h)).flatten(2).mean(2))

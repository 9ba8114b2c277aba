"""The noise-conditional score network of Song & Ermon for images, small: a RefineNet with conditional InstanceNorm++.

Four encoder stages (full size, half size, and two more with dilations 2 and 4) feed four RefineNet blocks:

    refine(a, b) = RCU(CRP(conv(RCU(a)) + up(conv(RCU(b)))))

RCU is a residual convolution unit, CRP chained residual pooling. Each norm is InstanceNorm++, given the noise level:

    norm(h) = gamma(e) [(h - mu_c) / s_c + alpha(e) (mu_c - m) / v] + beta(e)

mu_c, s_c: mean and std of channel c over its pixels; m, v: mean and std of the mu_c.
Song & Ermon 2019, https://arxiv.org/abs/1907.05600, appendix A; 2020, https://arxiv.org/abs/2006.09011.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, elu, interpolate

from score_sde.networks.embedding import Embedding, check_shape, image_shape, positive, zeroed

__all__ = ["NCSN"]


class NCSN(nn.Module):
    """NCSN: x (batch, channels, height, width), c_noise (batch,), label (batch,) or None -> the shape of x.

    The published network has one (gamma, alpha, beta) a noise level; here they are functions of c_noise, so that one
    network serves any ladder and any continuous SDE. Raises ValueError where the sides are no multiples of 4.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        width: int = 32,
        frequencies: int = 32,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        positive(width=width)
        channels, _, _ = image_shape(tuple(event_shape), multiple=4)
        self.event_shape, self.num_classes = tuple(event_shape), num_classes
        e = 2 * width
        self.embedding = Embedding(e, frequencies, num_classes)
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.encoder = nn.ModuleList(
            [
                Stage(width, width, e),
                Stage(width, 2 * width, e, halve=True),
                Stage(2 * width, 2 * width, e, dilation=2),
                Stage(2 * width, 2 * width, e, dilation=4),
            ]
        )
        self.decoder = nn.ModuleList(
            [
                Refine([2 * width], 2 * width, e),
                Refine([2 * width, 2 * width], 2 * width, e),
                Refine([2 * width, 2 * width], width, e),
                Refine([width, width], width, e),
            ]
        )
        self.norm = InstanceNormPlus(width, e)
        self.last = zeroed(nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        check_shape(x, self.event_shape)
        embedded = self.embedding(c_noise, label)
        h = self.first(x)
        levels = []
        for stage in self.encoder:
            h = stage(h, embedded)
            levels.append(h)
        coarser: list[Tensor] = []
        for refine in self.decoder:
            coarser = [refine([levels.pop(), *coarser], embedded)]
        return self.last(elu(self.norm(coarser[0], embedded)))


class InstanceNormPlus(nn.Module):
    """InstanceNorm++ of the module's docstring; (gamma, alpha, beta) start at (1, 1, 0).

    They are linear in an embedding of that width, or learned numbers where `embedding` is None (NCSNv2).
    """

    def __init__(self, channels: int, embedding: int | None) -> None:
        super().__init__()
        self.modulation: nn.Module | nn.Parameter = (
            nn.Parameter(torch.zeros(3 * channels)) if embedding is None else zeroed(nn.Linear(embedding, 3 * channels))
        )

    def forward(self, h: Tensor, embedded: Tensor | None) -> Tensor:
        modulation = self.modulation(embedded) if isinstance(self.modulation, nn.Module) else self.modulation[None]
        gamma, alpha, beta = modulation[(..., *[None] * (h.ndim - 2))].chunk(3, dim=1)
        variance, mean = torch.var_mean(h, dim=tuple(range(2, h.ndim)), correction=0, keepdim=True)
        mean_variance, grand_mean = torch.var_mean(mean, dim=1, correction=0, keepdim=True)
        instance = (h - mean) * (variance + 1e-5).rsqrt()
        channel = (mean - grand_mean) * (mean_variance + 1e-5).rsqrt()
        return (1 + gamma) * (instance + (1 + alpha) * channel) + beta


class NormActConv(nn.Module):
    """conv(ELU(norm(h)))."""

    def __init__(self, inward: int, outward: int, embedding: int, dilation: int = 1) -> None:
        super().__init__()
        self.norm = InstanceNormPlus(inward, embedding)
        self.conv = nn.Conv2d(inward, outward, 3, padding=dilation, dilation=dilation)

    def forward(self, h: Tensor, embedded: Tensor) -> Tensor:
        return self.conv(elu(self.norm(h, embedded)))


class Residual(nn.Module):
    """h + conv(ELU(norm(conv(ELU(norm(h)))))), with a 1x1 convolution on the short way where the width changes."""

    def __init__(self, inward: int, outward: int, embedding: int, dilation: int = 1) -> None:
        super().__init__()
        self.begin = NormActConv(inward, outward, embedding, dilation)
        self.end = NormActConv(outward, outward, embedding, dilation)
        self.skip = nn.Identity() if inward == outward else nn.Conv2d(inward, outward, 1)

    def forward(self, h: Tensor, embedded: Tensor) -> Tensor:
        return self.skip(h) + self.end(self.begin(h, embedded), embedded)


class Stage(nn.Module):
    """Two residual blocks of the encoder; `halve` averages 2x2 pixels between them."""

    def __init__(self, inward: int, outward: int, embedding: int, halve: bool = False, dilation: int = 1) -> None:
        super().__init__()
        self.halve = halve
        self.begin = Residual(inward, outward, embedding, dilation)
        self.end = Residual(outward, outward, embedding, dilation)

    def forward(self, h: Tensor, embedded: Tensor) -> Tensor:
        h = self.begin(h, embedded)
        return self.end(avg_pool2d(h, 2) if self.halve else h, embedded)


class Refine(nn.Module):
    """RefineNet block (Lin et al. 2017): adapt each input, fuse at the size of the first, pool in a residual chain."""

    def __init__(self, inward: Sequence[int], outward: int, embedding: int) -> None:
        super().__init__()
        self.adapt = nn.ModuleList(Residual(width, width, embedding) for width in inward)
        self.fuse = nn.ModuleList(NormActConv(width, outward, embedding) for width in inward)
        self.pool = nn.ModuleList(NormActConv(outward, outward, embedding) for _ in range(2))
        self.end = Residual(outward, outward, embedding)

    def forward(self, inputs: list[Tensor], embedded: Tensor) -> Tensor:
        size = inputs[0].shape[2:]
        parts = [
            interpolate(fuse(adapt(part, embedded), embedded), size, mode="bilinear")
            for part, adapt, fuse in zip(inputs, self.adapt, self.fuse, strict=True)
        ]
        fused = pooled = sum(parts[1:], parts[0])
        for conv in self.pool:
            pooled = avg_pool2d(conv(pooled, embedded), kernel_size=5, stride=1, padding=2)
            fused = fused + pooled
        return self.end(fused, embedded)

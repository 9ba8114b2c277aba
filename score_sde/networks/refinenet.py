"""NCSNv2, the RefineNet of Song & Ermon 2020, for signals, images and video, with NCSN's conditional one as an option.

Encoder stages have two residual blocks each and halve the grid or else dilate; then, from the coarsest stage on,

    refine(a, b) = RCU(CRP(MSF(RCU RCU a, RCU RCU b)))
    RCU(h) = h + conv ELU conv ELU h,    MSF = sum of up(conv h),    CRP(h) = f_0 + f_1 + f_2
    f_0 = ELU h,    f_k = conv pool f_{k-1}

The unconditional network does not read the noise level, and F = sigma score (technique 3): it needs x unscaled, as
`parameterization.PublishedNoise(level="log_sigma", scale=1, sign=-1)` gives it. In the conditional one, a norm that
depends on the noise level stands before each convolution.
https://arxiv.org/abs/2006.09011, appendix B; https://arxiv.org/abs/1907.05600, appendix A.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    elu,
    interpolate,
    max_pool1d,
    max_pool2d,
    max_pool3d,
    pad,
)

from score_sde.networks.blocks import caller
from score_sde.networks.embedding import Embedding, check_shape, grid_shape, positive, zeroed
from score_sde.networks.resample import Halve, conv

__all__ = ["NCSNv2"]


class NCSNv2(nn.Module):
    """NCSNv2: x (batch, channels, *sides), c_noise (batch,), label (batch,) or None -> the shape of x, 0 at first.

    Args:
        event_shape: (channels, length), (channels, height, width) or (channels, frames, height, width).
        width: channels of the first stage.
        multipliers: of the stages; (1, 2, 2, 2) up to 64 pixels, (1, 2, 2, 4, 4) for 96 to 128.
        dilations: of the stages; after the first, a stage of dilation 1 halves the grid, any other keeps it.
        conditional: whether norms depend on the noise level and the label (CondInstanceNorm++).
        frequencies, num_classes: of the embedding, if conditional.
        checkpointing: in training, keep only each block's input and compute the block again in the backward pass.

    Raises:
        ValueError: the lists differ in length, the sides cannot be halved, or an unconditional network has classes.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 2, 4),
        conditional: bool = False,
        frequencies: int = 32,
        num_classes: int | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        positive(width=width, stages=len(multipliers))
        if len(multipliers) != len(dilations) or dilations[0] != 1:
            raise ValueError(f"multipliers={list(multipliers)} and dilations={list(dilations)} must be equally long, "
                             "and the first dilation 1")  # fmt: skip
        if num_classes is not None and not conditional:
            raise ValueError(f"num_classes={num_classes}: labels need conditional=True")
        halvings = sum(dilation == 1 for dilation in dilations[1:])
        channels, *sides = grid_shape(tuple(event_shape), multiple=2**halvings)
        self.event_shape, self.num_classes, self.checkpointing = tuple(event_shape), num_classes, checkpointing
        dims, embedding = len(sides), 2 * width if conditional else None
        self.embedding = Embedding(2 * width, frequencies, num_classes) if conditional else None
        widths = [width * multiplier for multiplier in multipliers]
        self.first = conv(dims, channels, width)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        for i, (w, dilation) in enumerate(zip(widths, dilations, strict=True)):
            before = widths[max(i - 1, 0)]
            self.encoder.append(ResidualBlock(dims, before, w, embedding, dilation, changes=i > 0))
            self.encoder.append(ResidualBlock(dims, w, w, embedding, dilation))
        for i, w in reversed(list(enumerate(widths))):
            inward = [w] if i == len(widths) - 1 else [w, w]
            self.decoder.append(Refine(dims, inward, widths[max(i - 1, 0)], embedding, last=i == 0))
        self.norm = InstanceNormPlus(width, embedding)
        self.last = zeroed(conv(dims, width, channels))

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        check_shape(x, self.event_shape)
        embedded = None if self.embedding is None else self.embedding(c_noise, label)
        if embedded is None and label is not None:
            raise ValueError("a label was given to a network without classes: set num_classes, or drop the label")
        run, h, stages = caller(self), self.first(x), []
        for i, block in enumerate(self.encoder):
            h = run(block, h, embedded)
            if i % 2:
                stages.append(h)
        coarser: list[Tensor] = []
        for refine in self.decoder:
            coarser = [run(refine, [stages.pop(), *coarser], embedded)]
        return self.last(elu(self.norm(coarser[0], embedded)))


class InstanceNormPlus(nn.Module):
    """InstanceNorm++, gamma [(h - mu_c) / s_c + alpha (mu_c - m) / v] + beta; (gamma, alpha, beta) start at (1, 1, 0).

    mu_c, s_c: mean and std of channel c over its points; m, v: mean and std of the mu_c. (gamma, alpha, beta) are linear
    in an embedding of width `embedding`, or learnt numbers if it is None (NCSNv2).
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


class ResidualBlock(nn.Module):
    """skip(h) + conv(ELU(norm(conv(ELU(norm(h)))))); the first of a stage (`changes`) halves the grid unless it dilates."""

    def __init__(
        self, dims: int, inward: int, outward: int, embedding: int | None, dilation: int = 1, changes: bool = False
    ) -> None:
        super().__init__()
        between = inward if changes else outward
        options = {"dilation": dilation, "padding": dilation}
        self.norms = nn.ModuleList([InstanceNormPlus(inward, embedding), InstanceNormPlus(between, embedding)])
        self.convs = nn.ModuleList([conv(dims, inward, between, **options), conv(dims, between, outward, **options)])
        self.halve = Halve(dims) if changes and dilation == 1 else nn.Identity()
        self.skip: nn.Module = nn.Identity()
        if changes:
            self.skip = conv(dims, inward, outward, 1) if dilation == 1 else conv(dims, inward, outward, **options)

    def forward(self, h: Tensor, embedded: Tensor | None) -> Tensor:
        x = h
        for norm, convolution in zip(self.norms, self.convs, strict=True):
            h = convolution(elu(norm(h, embedded)))
        return self.halve(self.skip(x)) + self.halve(h)


class Refine(nn.Module):
    """`refine` of the module's docstring (Lin et al. 2017); the `last` one ends in three RCUs instead of one."""

    def __init__(self, dims: int, inward: Sequence[int], outward: int, embedding: int | None, last: bool) -> None:
        super().__init__()
        self.adapt = nn.ModuleList(nn.ModuleList(RCU(dims, w, embedding) for _ in range(2)) for w in inward)
        # The coarsest block has a single input, usually of its output's width: then there is nothing to fuse.
        self.fuse = Fuse(dims, inward, outward, embedding) if len(inward) > 1 or inward[0] != outward else None
        self.pool = CRP(dims, outward, embedding)
        self.end = nn.ModuleList(RCU(dims, outward, embedding) for _ in range(3 if last else 1))

    def forward(self, inputs: list[Tensor], embedded: Tensor | None) -> Tensor:
        parts = []
        for part, units in zip(inputs, self.adapt, strict=True):
            adapted = part
            for unit in units.children():
                adapted = unit(adapted, embedded)
            parts.append(adapted)
        h = self.pool(parts[0] if self.fuse is None else self.fuse(parts, embedded), embedded)
        for unit in self.end:
            h = unit(h, embedded)
        return h


class RCU(nn.Module):
    """A residual convolution unit, h + conv(ELU(conv(ELU(h)))); if conditional, with a norm before each ELU."""

    def __init__(self, dims: int, channels: int, embedding: int | None) -> None:
        super().__init__()
        self.norms = norms(2, channels, embedding)
        self.convs = nn.ModuleList(conv(dims, channels, channels, bias=False) for _ in range(2))

    def forward(self, h: Tensor, embedded: Tensor | None) -> Tensor:
        x = h
        for i, convolution in enumerate(self.convs):
            h = convolution(elu(self.norms[i](h, embedded) if self.norms else h))
        return x + h


class Fuse(nn.Module):
    """Multi-resolution fusion: each input is convolved and interpolated linearly to the size of the first; their sum."""

    def __init__(self, dims: int, inward: Sequence[int], outward: int, embedding: int | None) -> None:
        super().__init__()
        self.mode = ("linear", "bilinear", "trilinear")[dims - 1]
        self.norms = norms(len(inward), inward[0], embedding)
        self.convs = nn.ModuleList(conv(dims, w, outward) for w in inward)

    def forward(self, inputs: list[Tensor], embedded: Tensor | None) -> Tensor:
        size = inputs[0].shape[2:]
        sides = [self.norms[i](h, embedded) if self.norms else h for i, h in enumerate(inputs)]
        parts = [convolution(h) for h, convolution in zip(sides, self.convs, strict=True)]
        return torch.stack([interpolate(h, size, mode=self.mode, align_corners=True) for h in parts]).sum(0)


class CRP(nn.Module):
    """Chained residual pooling, over 5 points per axis: their maximum (NCSNv2), or their mean if conditional (NCSN)."""

    def __init__(self, dims: int, channels: int, embedding: int | None) -> None:
        super().__init__()
        kinds = (max_pool1d, max_pool2d, max_pool3d) if embedding is None else (avg_pool1d, avg_pool2d, avg_pool3d)
        self.pool = kinds[dims - 1]
        self.rim = [2, 2] * dims, float("-inf") if embedding is None else 0.0
        self.norms = norms(2, channels, embedding)
        self.convs = nn.ModuleList(conv(dims, channels, channels, bias=False) for _ in range(2))

    def forward(self, h: Tensor, embedded: Tensor | None) -> Tensor:
        total = path = elu(h)
        for i, convolution in enumerate(self.convs):
            path = self.norms[i](path, embedded) if self.norms else path
            # Padded here, as pooling itself raises an error for volumes thinner than its window.
            path = convolution(self.pool(pad(path, self.rim[0], value=self.rim[1]), 5, stride=1))
            total = total + path
        return total


def norms(count: int, channels: int, embedding: int | None) -> nn.ModuleList:
    """`count` norms for the convolutions of a conditional block; none for an unconditional one."""
    return nn.ModuleList([] if embedding is None else [InstanceNormPlus(channels, embedding) for _ in range(count)])

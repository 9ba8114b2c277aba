"""Halving and doubling grids of one, two or three dimensions, with a finite impulse response k against aliasing.

    halve:  y_i = sum_j k_j x_{2i + j - p},    double:  y_i = 2 sum_j k_{i + p - 2j} x_j (each axis),    p = L/2 - 1

k sums to one and has even length L; x is 0 outside the grid. k = (1, 1)/2 halves by the mean of two neighbours and doubles
by the nearest neighbour; (1, 3, 3, 1)/8 is NCSN++'s. All are plain convolutions with one filter per channel.
Zhang 2019, https://arxiv.org/abs/1904.11486; Song et al. 2021, https://arxiv.org/abs/2011.13456, appendix H.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, conv2d, conv3d, interpolate
from torch.nn.functional import conv_transpose1d as transpose1d
from torch.nn.functional import conv_transpose2d as transpose2d
from torch.nn.functional import conv_transpose3d as transpose3d

__all__ = ["BlurredConv", "Double", "Halve", "conv"]


def conv(dims: int, inward: int, outward: int, size: int = 3, **options: int | bool) -> nn.Module:
    """A convolution over `dims` dimensions, padded to keep the size of the grid."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return kind(inward, outward, size, **{"padding": size // 2, **options})  # type: ignore[arg-type]


class _Filter(nn.Module):
    """The kernel k over `dims` dimensions; `box` says whether it is (1, 1)/2."""

    kernel: Tensor

    def __init__(self, dims: int, filter: Sequence[int] = (1, 1)) -> None:
        super().__init__()
        taps = tuple(filter)
        if len(taps) % 2 or len(taps) < 2 or taps != taps[::-1] or sum(taps) <= 0:
            raise ValueError(f"filter={list(taps)} must be symmetric, of even length and positive sum: e.g. "
                             "[1, 1] or [1, 3, 3, 1]")  # fmt: skip
        self.dims, self.box, self.padding = dims, len(taps) == 2, len(taps) // 2 - 1
        line = torch.tensor(taps, dtype=torch.float32) / sum(taps)
        kernel = functools.reduce(lambda k, _: k[..., None] * line, range(dims - 1), line)
        self.register_buffer("kernel", kernel[None, None], persistent=False)

    def taps(self, x: Tensor) -> Tensor:
        """The kernel, once for each channel of x."""
        return self.kernel.to(x).expand(x.shape[1], *[-1] * (self.dims + 1))


class Halve(_Filter):
    """(batch, channels, *sides) -> (batch, channels, *sides / 2)."""

    def forward(self, x: Tensor) -> Tensor:
        if self.box:
            return interpolate(x, scale_factor=0.5, mode="area")
        convolve = (conv1d, conv2d, conv3d)[self.dims - 1]
        return convolve(x, self.taps(x), stride=2, padding=self.padding, groups=x.shape[1])


class Double(_Filter):
    """(batch, channels, *sides) -> (batch, channels, *2 sides)."""

    def forward(self, x: Tensor) -> Tensor:
        if self.box:
            return interpolate(x, scale_factor=2.0, mode="nearest")
        spread = (transpose1d, transpose2d, transpose3d)[self.dims - 1]
        return spread(x, 2**self.dims * self.taps(x), stride=2, padding=self.padding, groups=x.shape[1])


class BlurredConv(_Filter):
    """Filters by k, then a 3-wide convolution of stride 2, padded once for both (NCSN++'s input pyramid)."""

    def __init__(self, dims: int, inward: int, outward: int, filter: Sequence[int]) -> None:
        super().__init__(dims, filter)
        self.conv = conv(dims, inward, outward, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        blur = (conv1d, conv2d, conv3d)[self.dims - 1]
        return self.conv(blur(x, self.taps(x), padding=self.padding + 1, groups=x.shape[1]))

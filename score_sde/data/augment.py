"""Augmentation that does not leak into the samples: the network is given each example's transformation as a condition.

An image is mirrored in x with probability 1/2. Each of the following is done with probability p:

    mirrored in y (with probability 1/2)            scaled by 2^(0.2 a)
    rotated by b ~ U(-pi, pi)                       stretched by 2^(0.2 c) along one axis and 2^(-0.2 c) across it
    shifted by (d W / 8, e H / 8) pixels            a, c, d, e ~ N(0, 1)

The network is given (x flip, y flip, a, cos b - 1, sin b, c cos r, c sin r, d, e), r the angle of the axis, and zeros when
it samples. Karras et al. 2022, https://arxiv.org/abs/2206.00364, appendix F.2, table 6.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from score_sde.keyed import Draws

__all__ = ["Augment"]


class Augment:
    """Images (rows, C, H, W), any H and W -> transformed images and their labels (rows, 9).

    All but the flips are one affine map about the centre, evaluated by bicubic interpolation with mirrored borders (EDM
    filters with a wavelet instead). Rows that it leaves in place stay the same, bit for bit.

    Args:
        probability: p; the paper's is 0.12 for CIFAR-10 and 0.15 for FFHQ and AFHQv2.

    Raises:
        ValueError: the probability is outside [0, 1].
    """

    width = 9
    scale_std = stretch_std = 0.2
    shift_std = 0.125

    def __init__(self, probability: float = 0.12) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"augment probability={probability} must be in [0, 1]; the paper's is 0.12 for CIFAR-10")
        self.probability = probability

    def __call__(self, x: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        flip_x, flip_y, scale, turn, stretch, axis, *shift = self._parameters(draws)
        x = mirrored(x, flip_x, -1)
        x = mirrored(x, flip_y, -2)
        moved = torch.stack([scale, turn, stretch, *shift]).ne(0).any(0)
        inverse = _inverse(scale * self.scale_std, turn, stretch * self.stretch_std, axis)
        height, width = x.shape[-2:]
        warped = _sampled(x, inverse, shift[0] * width * self.shift_std, shift[1] * height * self.shift_std)
        labels = [flip_x, flip_y, scale, turn.cos() - 1, turn.sin(), stretch * axis.cos(), stretch * axis.sin(), *shift]
        return torch.where(_column(moved), warped, x), torch.stack(labels, dim=1)

    def _parameters(self, draws: Draws) -> list[Tensor]:
        """x flip, y flip, scale, turn, stretch, its axis and two shifts, each (rows,), 0 for a row left as it is."""

        def sometimes(values: Tensor) -> Tensor:
            return values * (draws.uniform() < self.probability)

        def angle() -> Tensor:
            return (draws.uniform() * 2 - 1) * math.pi

        def coin() -> Tensor:
            return (draws.uniform() < 0.5).float()

        both = (draws.uniform() < self.probability).float()
        return [coin(), sometimes(coin()), sometimes(draws.normal()), sometimes(angle()), sometimes(draws.normal()),
                angle() * coin(), draws.normal() * both, draws.normal() * both]  # fmt: skip


def mirrored(x: Tensor, where: Tensor, dim: int) -> Tensor:
    """x, with the rows for which `where` is not 0 reversed along `dim`."""
    return torch.where(_column(where != 0), x.flip(dim), x)


def _column(rows: Tensor) -> Tensor:
    return rows[:, None, None, None]


def _inverse(scale: Tensor, turn: Tensor, stretch: Tensor, axis: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The 2x2 matrices (a, b; c, d) that map positions in the new image to those in the old one, about the centre.

    S(2^-scale) R(turn) R(-axis) diag(2^-stretch, 2^stretch) R(axis), in elementwise operations, so that a row's result
    does not depend on the others.
    """
    # R(-axis) diag(u, 1/u) R(axis) is symmetric: mean +- half difference of the two factors along the axis.
    narrow, wide = torch.exp2(-stretch), torch.exp2(stretch)
    mean, half = (narrow + wide) / 2, (narrow - wide) / 2
    p, q, r = mean + half * (2 * axis).cos(), -half * (2 * axis).sin(), mean - half * (2 * axis).cos()
    cos, sin = turn.cos() * torch.exp2(-scale), turn.sin() * torch.exp2(-scale)
    return cos * p - sin * q, cos * q - sin * r, sin * p + cos * q, sin * q + cos * r


def _sampled(x: Tensor, inverse: tuple[Tensor, Tensor, Tensor, Tensor], right: Tensor, down: Tensor) -> Tensor:
    """x interpolated at inverse (position - shift), in pixels from the centre."""
    height, width = x.shape[-2:]
    a, b, c, d = (entry[:, None, None] for entry in inverse)
    v = (torch.arange(height, device=x.device) - (height - 1) / 2)[:, None] - down[:, None, None]
    u = (torch.arange(width, device=x.device) - (width - 1) / 2) - right[:, None, None]
    grid = torch.stack([(a * u + b * v) * (2 / width), (c * u + d * v) * (2 / height)], dim=-1)
    return F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False)

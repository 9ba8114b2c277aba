"""What tells a network at which noise level, and for which class, it is asked.

    e(c, y) = SiLU(W_2 SiLU(W_1 [cos(w_k c), sin(w_k c)]) + E_y),    w_k geometric from 1/2 to 64

c = c_noise = ln(sigma / alpha) / 4 runs over roughly [-2.5, 1.5]: the slowest wave (period 12.6) spans that range,
the fastest (period 0.1) tells noise levels apart that differ by a tenth. Row `num_classes` of E is the null class.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Embedding", "check_shape", "image_shape", "positive", "zeroed"]

M = TypeVar("M", bound=nn.Module)


class Embedding(nn.Module):
    """Embeds the noise level c_noise (batch,) and, with `num_classes`, a label (batch,) into (batch, width).

    Labels are integers 0..num_classes-1; a negative label, or none at all, is the null class (Ho & Salimans 2022,
    https://arxiv.org/abs/2207.12598). Raises ValueError for labels a network without classes cannot use.
    """

    frequencies: Tensor

    def __init__(self, width: int, frequencies: int = 32, num_classes: int | None = None) -> None:
        super().__init__()
        positive(width=width, frequencies=frequencies, num_classes=1 if num_classes is None else num_classes)
        self.num_classes = num_classes
        self.register_buffer("frequencies", torch.logspace(-1, 6, frequencies, base=2.0), persistent=False)
        self.noise = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.label = None if num_classes is None else nn.Embedding(num_classes + 1, width)

    def forward(self, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        phase = c_noise.to(self.frequencies.dtype)[:, None] * self.frequencies
        embedded = self.noise(torch.cat([phase.cos(), phase.sin()], dim=1))
        if self.label is not None:
            embedded = embedded + self.label(self._row(label, c_noise))
        elif label is not None:
            raise ValueError("a label was given to a network without classes: set num_classes, or drop the label")
        return nn.functional.silu(embedded)

    def _row(self, label: Tensor | None, c_noise: Tensor) -> Tensor:
        """The row of the table for each label, the last one for the null class."""
        null = torch.full_like(c_noise, self.num_classes or 0, dtype=torch.long)
        if label is None:
            return null
        if label.shape != c_noise.shape or label.is_floating_point():
            given = f"{label.dtype} of shape {tuple(label.shape)}"
            raise ValueError(f"label must be integers of shape {tuple(c_noise.shape)}, one a sample; got {given}")
        return torch.where(label < 0, null, label)


def zeroed(module: M) -> M:
    """The module with every parameter zero: a residual branch or an output layer that starts silent."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def positive(**sizes: int) -> None:
    """Refuses sizes that are no positive integers, by name."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}={size!r} must be a positive integer")


def check_shape(x: Tensor, event_shape: tuple[int, ...]) -> None:
    """Refuses a batch of events of another shape than the network was built for."""
    if x.shape[1:] != event_shape:
        raise ValueError(f"x has event shape {tuple(x.shape[1:])}, the network was built with {event_shape=}")


def image_shape(event_shape: tuple[int, ...], multiple: int) -> tuple[int, int, int]:
    """(channels, height, width) of an image whose sides are multiples of `multiple`; ValueError for anything else."""
    shape = tuple(event_shape)
    if len(shape) != 3:
        raise ValueError(
            f"event_shape={shape} is no image: give (channels, height, width), or use networks.MLP for vectors"
        )
    channels, height, width = shape
    if height % multiple or width % multiple:
        raise ValueError(f"a {height}x{width} image: both sides must be multiples of {multiple} here; crop or pad it")
    positive(channels=channels, height=height, width=width)
    return channels, height, width

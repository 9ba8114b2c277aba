"""Embeddings of noise level c, class y and augmentation a, which condition a network.

    e(c, y, a) = SiLU(W_2 SiLU(W_1 [cos(w_k c), sin(w_k c)]) + E_y + A a)

The frequencies w_k of the noise level c:

    waves       geometric from 1/2 to 64; c = ln(sigma / alpha) / 4 runs over roughly [-2.5, 1.5]: the slowest wave
                (period 12.6) spans that range, the fastest (period 0.1) resolves levels that differ by a tenth
    positional  10000^(-k / (n - 1)), k < n (Vaswani et al. 2017), DDPM's, for c in steps of 0..999
    fourier     2 pi 16 N(0, 1), drawn once (Tancik et al. 2020), NCSN++'s, for c = ln sigma
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from score_sde.checks import one_of, tensor

__all__ = ["Embedding", "check_shape", "context_of", "grid_shape", "image_shape", "positive", "rows", "zeroed"]

M = TypeVar("M", bound=nn.Module)


FREQUENCIES: dict[str, Callable[[int], Tensor]] = {
    "waves": lambda n: torch.logspace(-1, 6, n, base=2.0),
    "positional": lambda n: torch.exp(torch.arange(n) * (-math.log(10_000) / max(n - 1, 1))),
    "fourier": lambda n: torch.randn(n) * (2 * math.pi * 16),
}


class Embedding(nn.Module):
    """Embeds the noise level c_noise (batch,), a label (batch,) and augmentation labels into (batch, width).

    Labels are integers 0..num_classes-1; a negative label, or none at all, is the null class, row `num_classes` of E
    (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598). Augmentation labels are (batch, augment_width), zero for a
    sample that was not augmented; none is the same as zeros (Karras et al. 2022, arXiv:2206.00364, appendix F.2).

    Args:
        width: of the embedding.
        frequencies: their number; the first linear layer has twice as many inputs.
        num_classes: of the labels, None for none.
        kind: of the frequencies: "waves", "positional" or "fourier".
        augment_width: of the augmentation labels, None for none.

    Raises:
        ValueError: a size is not positive, a kind unknown, or a call names a condition the embedding does not have.
    """

    frequencies: Tensor

    def __init__(
        self,
        width: int,
        frequencies: int = 32,
        num_classes: int | None = None,
        kind: str = "waves",
        augment_width: int | None = None,
    ) -> None:
        super().__init__()
        given = {"num_classes": num_classes, "augment_width": augment_width}
        positive(width=width, frequencies=frequencies, **{k: v for k, v in given.items() if v is not None})
        self.num_classes, self.kind = num_classes, kind
        # Random frequencies are saved with the weights; the others follow from their number.
        made = FREQUENCIES[one_of("embedding", kind, FREQUENCIES)](frequencies)
        self.register_buffer("frequencies", made, persistent=kind == "fourier")
        self.noise = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.label = None if num_classes is None else nn.Embedding(num_classes + 1, width)
        self.augment = None if augment_width is None else nn.Linear(augment_width, width, bias=False)

    def forward(self, c_noise: Tensor, label: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        dtype = self.frequencies.dtype
        phase = c_noise.to(torch.promote_types(dtype, torch.float32))[:, None] * self.frequencies
        embedded = self.noise(torch.cat([phase.cos(), phase.sin()], dim=1).to(dtype))
        row = rows(label, c_noise, self.num_classes)
        if self.label is not None and row is not None:
            embedded = embedded + self.label(row)
        if augment is not None:
            embedded = embedded + check_augment(self.augment, augment)(augment)
        return nn.functional.silu(embedded)


def rows(label: Tensor | None, c_noise: Tensor, num_classes: int | None) -> Tensor | None:
    """The embedding table's row for each label, `num_classes` for the null class; None for a network without classes."""
    if num_classes is None:
        if label is not None:
            raise ValueError("a label was given to a network without classes: set num_classes, or drop the label")
        return None
    null = torch.full_like(c_noise, num_classes, dtype=torch.long)
    if label is None:
        return null
    check_labels(label, c_noise.shape)
    # Labels >= num_classes are moved past the null class's row, so that looking them up fails.
    return torch.where(label < 0, null, label + (label >= num_classes))


def check_labels(label: Tensor, shape: Sequence[int]) -> None:
    """Raises ValueError unless labels are integers of that shape, (batch,)."""
    if tensor("label", label).shape != shape or label.is_floating_point():
        given = f"{label.dtype} of shape {tuple(label.shape)}"
        raise ValueError(f"label must be integers of shape {tuple(shape)}, one a sample; got {given}")


def check_augment(layer: M | None, augment: Tensor) -> M:
    """The layer that embeds augmentation labels. Raises ValueError if the network has none."""
    if layer is None:
        raise ValueError(f"augmentation labels of shape {tuple(augment.shape)} were given to a network that takes none: "
                         "set augment_width, or drop them")  # fmt: skip
    return layer


def context_of(context: Tensor | None, null: Tensor | None, batch: int) -> Tensor | None:
    """The context as tokens (batch, tokens, width), or None for a network without contexts (`null` is None).

    A context (batch, width) is one token. A sample without a context gets the learnt token `null` (1, width): if `context`
    is None, or if any of the sample's entries is NaN. Raises ValueError for a context of another shape, or one given to a
    network without.
    """
    if null is None:
        if context is not None:
            raise ValueError("a context was given to a network that takes none: set context_width="
                             f"{context.shape[-1]}, or drop the context")  # fmt: skip
        return None
    if context is None:
        return null.expand(batch, *null.shape)
    if context.ndim not in (2, 3) or context.shape[0] != batch or context.shape[-1] != null.shape[1]:
        expected = f"({batch}, {null.shape[1]}) or tokens ({batch}, tokens, {null.shape[1]})"
        raise ValueError(f"context must be of shape {expected}; got {tuple(context.shape)}: give contexts of that width, or "
                         "train with another context_width")  # fmt: skip
    context = context.unsqueeze(1) if context.ndim == 2 else context
    return torch.where(context.isnan().any(2, keepdim=True).any(1, keepdim=True), null.to(context), context)


def zeroed(module: M) -> M:
    """The module with all parameters set to zero, for residual branches and output layers that start at zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def positive(**sizes: int) -> None:
    """Raises ValueError, with its name, for a size that is not a positive integer."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}={size!r} must be a positive integer")


def check_shape(x: Tensor, event_shape: tuple[int, ...]) -> None:
    """Raises ValueError if a batch has another event shape than the network was built for."""
    if x.shape[1:] != event_shape:
        raise ValueError(f"x has event shape {tuple(x.shape[1:])}, the network was built with {event_shape=}")


def check_attention(attention: Sequence[int], sizes: Sequence[int]) -> None:
    """Raises ValueError, with the nearest choice, if `attention` has a size that no grid has as its height (or length)."""
    if not set(attention) <= set(sizes):
        nearest = sorted({min(sizes, key=lambda size: abs(size - asked)) for asked in attention}, reverse=True)
        raise ValueError(f"attention={list(attention)} must be among the heights of this network's grids, {list(sizes)}: "
                         f"give attention={nearest}, or [] for none")  # fmt: skip


def grid_shape(event_shape: tuple[int, ...], multiple: int | tuple[int, ...]) -> tuple[int, ...]:
    """(channels, *sides) of a signal, image or video. Raises ValueError unless the sides are multiples of `multiple`."""
    shape = tuple(event_shape)
    if len(shape) not in (2, 3, 4):
        raise ValueError(f"event_shape={shape} is not a signal (channels, length), image (channels, height, width) or "
                         "video (channels, frames, height, width): use networks.MLP for vectors")  # fmt: skip
    sides = shape[1:]
    multiples = (multiple,) * len(sides) if isinstance(multiple, int) else tuple(multiple)
    positive(**{f"event_shape[{i}]": size for i, size in enumerate(shape)})
    if any(side % m for side, m in zip(sides, multiples, strict=True)):
        size, wanted = "x".join(map(str, sides)), "x".join(map(str, dict.fromkeys(multiples)))
        raise ValueError(f"a {size} grid: its sides must be multiples of {wanted} here; crop or pad it")
    return shape


def image_shape(event_shape: tuple[int, ...], multiple: int) -> tuple[int, int, int]:
    """(channels, height, width) of an image. Raises ValueError unless its sides are multiples of `multiple`."""
    shape = grid_shape(event_shape, multiple)
    if len(shape) != 3:
        raise ValueError(f"event_shape={shape} is not an image (channels, height, width): use networks.UNet or MLP")
    return shape

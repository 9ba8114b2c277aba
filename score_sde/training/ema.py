r"""Exponential moving averages of weights, theta_ema <- beta theta_ema + (1 - beta) theta after each batch of B images.

With a half-life in images, beta = 0.5^(B / min(half_life, ramp n)) once n images have been seen (Karras et al. 2022,
https://arxiv.org/abs/2206.00364, code `training_loop.py`). With a power function of relative width std, over n images

    theta_ema(n) = (gamma + 1) / n^(gamma + 1) int_0^n tau^gamma theta(tau) dtau,    beta = (1 - B / (n + B))^(gamma + 1),
    std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)),

whose width is a fixed share of the run, however long (Karras et al. 2024, https://arxiv.org/abs/2312.02696, eq. 122-127).
After training, `posthoc` reconstructs averages of any width from stored ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["EMA", "Decay", "HalfLife", "PowerFunction", "decays", "ema_decay", "power_exponent"]


class Decay(Protocol):
    """beta for a batch of `batch_size` images, after `images` have been seen."""

    def __call__(self, batch_size: int, images: int) -> float: ...


def ema_decay(batch_size: int, images: int, half_life: float = 500_000, ramp: float = 0.05) -> float:
    """beta for a batch of `batch_size` images, after `images` have been seen; 0 for the first batch."""
    horizon = min(half_life, ramp * images)
    return 0.5 ** (batch_size / horizon) if horizon > 0 else 0.0


class HalfLife:
    """Decay with a half-life in images, capped at the fraction `ramp` of the images seen."""

    def __init__(self, half_life: float = 500_000, ramp: float = 0.05) -> None:
        self.half_life, self.ramp = half_life, ramp

    def __call__(self, batch_size: int, images: int) -> float:
        return ema_decay(batch_size, images, self.half_life, self.ramp)


def power_exponent(std: float) -> float:
    """gamma of the profile tau^gamma whose standard deviation is `std` times the run's length.

    Raises ValueError outside 0 < std < 12^(-1/2), where gamma is positive.
    """
    if not 0 < std < 12**-0.5:
        raise ValueError(f"the relative width of a power-function average lies in (0, 0.288), got {std}")
    from scipy.optimize import brentq  # half a second to import

    def excess(gamma: float) -> float:
        return (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) - std**2

    return brentq(excess, 0.0, 1 / std, xtol=1e-12)  # the width decreases in gamma and is below 1 / (gamma + 2)


class PowerFunction:
    """Decay of a power-function average of relative width `std`. Raises ValueError outside (0, 0.288)."""

    def __init__(self, std: float) -> None:
        self.std, self.exponent = std, power_exponent(std)

    def __call__(self, batch_size: int, images: int) -> float:
        return (1 - batch_size / (images + batch_size)) ** (self.exponent + 1)


def decays(half_lives: Sequence[float], ramp: float, widths: Sequence[float]) -> dict[str, Decay]:
    """The averages that a run tracks, by file name. Samples are drawn from the first, "ema".

    Raises ValueError for a width that no power function has, and for two averages with one name.
    """
    first, *others = half_lives
    kept: dict[str, Decay] = {"ema": HalfLife(first, ramp)}
    further: list[tuple[float, Decay]] = [(width, HalfLife(width, ramp)) for width in others]
    further += [(width, PowerFunction(width)) for width in widths]
    for width, decay in further:
        if f"ema-{width:g}" in kept:
            raise ValueError(
                f"two averages have the name ema-{width:g}, which keeps six digits of the width: leave one out"
            )
        kept[f"ema-{width:g}"] = decay
    return kept


class EMA:
    """The average `tensors` of a list of weights, updated in place and without gradients.

    Averages are kept in float32 or wider: bfloat16 would round away an update of 1e-4 of a weight.
    """

    def __init__(self, weights: Sequence[Tensor], decay: Decay) -> None:
        self.decay = decay
        self.tensors = [w.detach().to(torch.promote_types(w.dtype, torch.float32), copy=True) for w in weights]
        self.converts = any(w.dtype != average.dtype for w, average in zip(weights, self.tensors, strict=True))

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor], batch_size: int, images: int) -> None:
        """Averages in the weights after a step on `batch_size` images; `images` were seen before that step."""
        if self.converts:
            weights = [w.to(average.dtype) for w, average in zip(weights, self.tensors, strict=True)]
        torch._foreach_lerp_(self.tensors, list(weights), 1 - self.decay(batch_size, images))

"""An exponential moving average of a model's weights, its half-life given in images:

    theta_ema <- beta theta_ema + (1 - beta) theta,    beta = 0.5^(B / min(half_life, ramp n))

for batches of B images after n images seen, so that early on it averages the last few percent of the run.
Karras et al. 2022, https://arxiv.org/abs/2206.00364, code (`training_loop.py`).
"""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["EMA", "ema_decay"]

Model = TypeVar("Model", bound=nn.Module)


def ema_decay(batch_size: int, images: int, half_life: float = 500_000, ramp: float = 0.05) -> float:
    """beta for a batch that comes after `images` images; 0 for the first."""
    horizon = min(half_life, ramp * images)
    return 0.5 ** (batch_size / horizon) if horizon > 0 else 0.0


class EMA(Generic[Model]):
    """Keeps `module`, an averaged copy of a model, ready for evaluation and without gradients; buffers are copied."""

    def __init__(self, model: Model, half_life: float = 500_000, ramp: float = 0.05) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.half_life, self.ramp = half_life, ramp
        self._averages: list[Tensor] = list(self.module.parameters())
        self._parameters: list[Tensor] = list(model.parameters())
        self._buffers = list(zip(self.module.buffers(), model.buffers(), strict=True))

    @torch.no_grad()
    def update(self, batch_size: int, images: int) -> None:
        """Takes in the model's weights after a step on `batch_size` images, `images` having come before."""
        beta = ema_decay(batch_size, images, self.half_life, self.ramp)
        torch._foreach_lerp_(self._averages, self._parameters, 1 - beta)
        for average, current in self._buffers:
            average.copy_(current)

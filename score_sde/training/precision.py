"""Precisions of a training step (the dtype of its autocast, None for none); weights stay in float32."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["PRECISIONS", "LossScale"]

PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class LossScale:
    """Dynamic loss scaling: halved after a step whose gradient overflows, doubled after `interval` good steps in a row.

    The scale stays on the device, so that no step waits for it.
    Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740, section 3.2.
    """

    def __init__(self, device: torch.device, start: float = 2.0**16, interval: int = 2000) -> None:
        self.interval = interval
        self.scale = torch.tensor(start, device=device)
        self.good_steps = torch.zeros((), device=device)

    def update(self, good: Tensor) -> None:
        self.good_steps = torch.where(good, self.good_steps + 1, 0.0)
        grows = self.good_steps == self.interval
        self.scale = torch.where(good, torch.where(grows, 2 * self.scale, self.scale), (self.scale / 2).clamp(min=1.0))
        self.good_steps = torch.where(grows, 0.0, self.good_steps)

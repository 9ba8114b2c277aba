"""The precisions that a step computes in; weights stay in float32."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["PRECISIONS", "LossScale"]

PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class LossScale:
    """Dynamic loss scaling: halved at a step whose gradient overflows, doubled after `interval` good ones in a row.

    Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740, section 3.2. Lives on the device: nothing waits.
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

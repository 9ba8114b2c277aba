"""One small interface for endless streams and finite sets: the batch of step n is a pure function of (seed, n).

A killed run resumes without iterator state, and two runs with one seed see the same examples at the same steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from score_sde.data.keyed import generator

__all__ = ["Batch", "Data", "TargetStream"]


@dataclass(frozen=True)
class Batch:
    """Clean examples x, float32 of shape (batch, *event), and their conditions by name, each of shape (batch, ...)."""

    x: Tensor
    condition: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.x.to(device), {name: value.to(device) for name, value in self.condition.items()})


class Data(ABC):
    """Where clean examples come from.

    Attributes:
        event_shape: shape of one example.
        size: number of training examples, None for an endless stream.
        num_classes: number of classes where examples carry a `label`, else None.
        target: the closed-form law of the examples where it is known (see `score_sde.targets`), else None.
    """

    event_shape: tuple[int, ...]
    size: int | None = None
    num_classes: int | None = None
    target: Any = None

    @abstractmethod
    def batch(self, step: int, batch_size: int) -> Batch:
        """The training batch of step 0, 1, 2, ..."""

    @abstractmethod
    def reference(self, count: int) -> Batch:
        """Up to `count` real examples to compare samples with, the same ones at every call; see the subclass."""


class TargetStream(Data):
    """An endless stream of draws from a closed-form target; references are further draws, independent of training."""

    def __init__(self, target: Any, seed: int = 0) -> None:
        self.target, self.seed, self.event_shape = target, seed, tuple(target.event_shape)

    def batch(self, step: int, batch_size: int) -> Batch:
        return self._draw(batch_size, generator(self.seed, "batch", step))

    def reference(self, count: int) -> Batch:
        return self._draw(count, generator(self.seed, "reference"))

    def _draw(self, count: int, source: torch.Generator) -> Batch:
        return Batch(self.target.sample((count,), generator=source).float())

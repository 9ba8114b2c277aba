"""A finite set in memory, or mapped from a file.

Epoch e visits the N examples in the order of a permutation keyed by (seed, e); step n takes the places
n B .. (n + 1) B - 1 of the endless sequence of epochs, so each example comes exactly once an epoch, also where a batch
spans two. Integers 0..L-1 become [-1, 1] by 2 k / (L - 1) - 1, or with uniform dequantisation by 2 (k + u) / L - 1,
u ~ U[0, 1), which has a density (Theis et al. 2016, https://arxiv.org/abs/1511.01844, section 3.1).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from score_sde.data.base import Batch, Data
from score_sde.data.keyed import ALL, Draws, generator

__all__ = ["TensorData"]


class Rows(NamedTuple):
    """Examples as they were given, their labels, and the places of those that are meant, in order."""

    x: Tensor
    labels: Tensor | None
    order: Tensor

    def read(self, places: Tensor | slice) -> Batch:
        index = self.order[places]
        return Batch(self.x[index], {} if self.labels is None else {"label": self.labels[index]})


class TensorData(Data):
    """Examples x (N, *event) with optional integer labels (N,).

    Floats are taken as they are, in the scale the model shall work in. Integers need `dequantize` stated. A fraction
    `held_out` is set aside by a permutation that depends on N alone; `reference` reads the held-out examples, or, where
    none are held out, the training examples.

    Raises:
        ValueError: no examples, values that are not finite or not in 0..levels-1, integers without `dequantize`, labels
            that do not match, `held_out` outside [0, 1).
    """

    def __init__(
        self,
        x: Tensor | np.ndarray[Any, Any],
        labels: Tensor | np.ndarray[Any, Any] | None = None,
        *,
        seed: int = 0,
        dequantize: bool | None = None,
        levels: int = 256,
        held_out: float = 0.0,
    ) -> None:
        x = torch.as_tensor(x)
        self.dequantize = _checked_scale(x, dequantize, levels)
        self.levels, self.seed, self.event_shape = levels, seed, tuple(x.shape[1:])
        if not 0 <= held_out < 1:
            raise ValueError(f"held_out={held_out} is the fraction of the examples set aside: 0 <= held_out < 1")
        order = torch.randperm(len(x), generator=generator(0, "held out"))
        reserved, used = order.tensor_split([int(held_out * len(x))])
        self.size: int = len(used)
        labels = None if labels is None else _checked_labels(torch.as_tensor(labels), len(x))
        self.num_classes = None if labels is None else int(labels.max()) + 1
        x = x if self.dequantize is not None else x.float()
        self._used = Rows(x, labels, used)
        self._reserved = Rows(x, labels, reserved) if len(reserved) else self._used
        self._orders: dict[int, Tensor] = {}

    def batch(self, step: int, batch_size: int, rows: slice = ALL) -> Batch:
        first, size = step * batch_size, self.size
        epochs = range(first // size, (first + batch_size - 1) // size + 1)
        sequence = torch.cat([self._order(epoch) for epoch in epochs])
        start = first - epochs[0] * size
        return self._used.read(sequence[start : start + batch_size][rows])

    def prepare(self, batch: Batch, draws: Draws) -> Batch:
        x = batch.x
        if self.dequantize:
            x = (x + draws.uniform(*self.event_shape)) * (2 / self.levels) - 1
        elif self.dequantize is not None:
            x = x * (2 / (self.levels - 1)) - 1
        return Batch(x, batch.condition)

    def examples(self) -> Batch:
        """Every training example once, scaled as for training."""
        return self._scaled(self._used.read(ALL), generator(self.seed, "examples"))

    def reference(self, count: int) -> Batch:
        """The first `count` held-out examples, or all where there are fewer, scaled as for training."""
        return self._scaled(self._reserved.read(slice(count)), generator(self.seed, "reference"))

    def _scaled(self, batch: Batch, source: torch.Generator) -> Batch:
        return self.prepare(batch, Draws(source, len(batch.x)))

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            # Two epochs at most are needed at once: the cache only saves work, the order is a function of the key.
            self._orders = {known: order for known, order in self._orders.items() if known == epoch - 1}
            self._orders[epoch] = torch.randperm(self.size, generator=generator(self.seed, "epoch", epoch))
        return self._orders[epoch]


def _checked_scale(x: Tensor, dequantize: bool | None, levels: int) -> bool | None:
    """`dequantize`, None for floats, once it fits the examples."""
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"x of shape {tuple(x.shape)}: give (N, *event) with at least one example")
    if x.is_floating_point():
        if dequantize is not None:
            raise ValueError(f"dequantize={dequantize} is for integers, x is {x.dtype}: leave it out, or give integers")
        if not torch.isfinite(x).all():
            raise ValueError("x holds values that are not finite: remove or replace them")
        return None
    if dequantize is None:
        raise ValueError(
            f"x is {x.dtype}, which has no density: say dequantize=True (adds uniform noise, scales to [-1, 1]) or "
            "dequantize=False (only scales), or give floats in the scale of the model"
        )
    low, high = int(x.min()), int(x.max())
    if low < 0 or high >= levels:
        raise ValueError(f"x holds integers {low}..{high}, levels={levels} allows 0..{levels - 1}: set levels")
    return dequantize


def _checked_labels(labels: Tensor, count: int) -> Tensor:
    if labels.shape != (count,) or labels.is_floating_point() or labels.min() < 0:
        given = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise ValueError(f"labels must be {count} integers from 0, one an example; got {given}")
    return labels.long()

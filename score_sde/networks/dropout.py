"""Dropout whose mask depends on the example alone.

Element i of an example with key k is kept where h(h(i) ^ k) >= p, a counter-based random number (Salmon et al. 2011,
https://doi.org/10.1145/2063384.2063405) of 32 bits, with h a multiplication, an xor-shift and a multiplication. The mask
depends neither on the other examples of the batch nor on the device, the process or the order of layers, and a
checkpointed block recomputes it without stored generators.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["Dropout", "keyed"]

ODD = (0x7FEB352D, 0x846CA68B - 2**32)  # Wellons 2018, https://nullprogram.com/blog/2018/07/31/ (lowbias32)


class Dropout(nn.Dropout):
    """x / (1 - p) where kept, else 0; the mask follows from `keys` if they are set, else it is `torch.nn.Dropout`'s.

    Attributes:
        keys: one for each example, int32 (batch,), or None; set by `keyed`.
    """

    keys: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.keys is None or self.p in (0, 1):
            return super().forward(x)
        return torch.where(kept(self.keys, x.shape[1:], self.p), x / (1 - self.p), 0.0)


def kept(keys: Tensor, event_shape: Sequence[int], p: float) -> Tensor:
    """Boolean mask of shape (len(keys), *event_shape), each element True with probability 1 - p."""
    i = torch.arange(math.prod(event_shape), dtype=torch.int32, device=keys.device)
    number = _mixed(_mixed(i + 1) ^ keys.unsqueeze(1))  # uniform over all int32
    return (number >= round(p * 2**32) - 2**31).view(-1, *event_shape)


def _mixed(x: Tensor) -> Tensor:
    """The hash h of int32 numbers."""
    x = x * ODD[0]
    x ^= (x >> 15) & 0x1FFFF
    return x.mul_(ODD[1])


@contextmanager
def keyed(layers: Sequence[Dropout], keys: Tensor) -> Iterator[None]:
    """Sets the layers' keys, int32 (layers, batch), within the context."""
    for layer, own in zip(layers, keys, strict=True):
        layer.keys = own
    try:
        yield
    finally:
        for layer in layers:
            layer.keys = None

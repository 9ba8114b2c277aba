"""Dropout whose mask belongs to the example.

Element i of an example with key k is kept where h(h(i) ^ k) >= p, a counter-based random number (Salmon et al. 2011,
https://doi.org/10.1145/2063384.2063405) of 32 bits by two rounds of multiplication and shift. So the mask depends neither
on the example's companions nor on the device, the process or the order of layers, and a checkpointed block computes it
again without stored generators.
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
    """x / (1 - p) where kept, else 0; of a mask by the rows' `keys` where they are given, else torch's own.

    Attributes:
        keys: int32 of shape (batch,); see `keyed`.
    """

    keys: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.keys is None or self.p in (0, 1):
            return super().forward(x)
        return torch.where(kept(self.keys, x.shape[1:], self.p), x / (1 - self.p), 0.0)


def kept(keys: Tensor, event_shape: Sequence[int], p: float) -> Tensor:
    """Boolean mask of shape (len(keys), *event_shape), each element True with probability 1 - p."""
    i = torch.arange(math.prod(event_shape), dtype=torch.int32, device=keys.device)
    number = _mixed(_mixed(i + 1) ^ keys.unsqueeze(1))  # uniform on the int32
    return (number >= round(p * 2**32) - 2**31).view(-1, *event_shape)


def _mixed(x: Tensor) -> Tensor:
    x = x * ODD[0]
    x ^= (x >> 15) & 0x1FFFF
    return x.mul_(ODD[1])


@contextmanager
def keyed(layers: Sequence[Dropout], keys: Tensor) -> Iterator[None]:
    """Gives the layers the keys of a batch's rows, int32 of shape (layers, batch), and takes them away again."""
    for layer, own in zip(layers, keys, strict=True):
        layer.keys = own
    try:
        yield
    finally:
        for layer in layers:
            layer.keys = None

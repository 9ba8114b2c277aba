"""Random numbers that depend only on names: generator(seed, "noise", 17) is the same wherever and whenever it is made.

What step n draws is therefore a function of (seed, n), and no iterator or generator state has to be saved.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from score_sde.checks import whole

__all__ = ["Draws", "generator", "key", "seeded"]

ALL = slice(None)


def key(seed: int, *words: int | str) -> int:
    """A 63-bit seed, the BLAKE2 hash of (seed, *words); ValueError unless `seed` is a whole number."""
    digest = hashlib.blake2b(repr((whole("seed", seed, -math.inf), *words)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, *words: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on `device`, seeded with `key(seed, *words)`."""
    return torch.Generator(device).manual_seed(key(seed, *words))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch's global CPU generator, for code that takes no other, and restores it; device generators are untouched."""
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Draws:
    """Random numbers, one row per example, for the rows of a global batch that one process holds.

    Every process draws for all `batch_size` examples and keeps its own `rows`, so that an example's numbers are bitwise
    the same for any number of processes on one kind of device.

    Args:
        source: a generator in the same state in every process, on the device that the numbers are for.
        batch_size: of the global batch.
        rows: those of this process; all by default.
    """

    source: torch.Generator
    batch_size: int
    rows: slice = field(default_factory=lambda: ALL)

    def uniform(self, *event_shape: int) -> Tensor:
        """U[0, 1), float32, of shape (rows, *event_shape)."""
        return torch.rand((self.batch_size, *event_shape), generator=self.source, device=self.source.device)[self.rows]

    def normal(self, *event_shape: int) -> Tensor:
        """N(0, 1), float32, of shape (rows, *event_shape)."""
        return torch.randn((self.batch_size, *event_shape), generator=self.source, device=self.source.device)[self.rows]

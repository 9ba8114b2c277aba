"""Random numbers of a loss are drawn for the whole batch, and each process keeps those of its own rows.

An example therefore gets the same time, noise, label dropout and `networks.Dropout` masks (keyed by layer and example)
however the batch is split over processes and micro-batches. Only random numbers that a custom network draws itself
depend on the split: `torch.nn.Dropout` draws from generators seeded by (seed, step, process), micro-batch by micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["RowsGenerator", "draw", "rows_of"]


class RowsGenerator(torch.Generator):
    """A generator that knows which `rows` of a batch of `batch_size` its draws are for; see `draw`."""

    batch_size: int
    rows: slice


def rows_of(source: torch.Generator, batch_size: int, rows: slice) -> RowsGenerator:
    """A generator for some rows of a batch, in the same state as `source`."""
    part = RowsGenerator(source.device)
    part.set_state(source.get_state())
    part.batch_size, part.rows = batch_size, rows
    return part


def draw(
    make: Callable[..., Tensor], shape: Sequence[int], generator: torch.Generator, dim: int = 0, **options: Any
) -> Tensor:
    """`make(shape, generator=generator, **options)`, e.g. `draw(torch.randn, x.shape, generator, device=x.device)`.

    Given a `RowsGenerator`, draws the whole batch along `dim` and returns its rows: an objective that draws all its
    random numbers this way gives the same losses however a batch is split.
    """
    if not isinstance(generator, RowsGenerator):
        return make(tuple(shape), generator=generator, **options)
    whole = (*shape[:dim], generator.batch_size, *shape[dim + 1 :])
    rows = range(generator.batch_size)[generator.rows]
    return make(whole, generator=generator, **options).narrow(dim, rows.start, len(rows))

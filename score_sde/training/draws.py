"""Global draws, then rows: what is random in a loss is drawn for the whole batch, of which a process keeps its rows.

So any number of processes, and any cut of a batch into micro-batches, gives an example the same time, noise, label
dropout and, by a key for each layer and example, the same masks of `networks.Dropout`. The exception is what a network of
one's own draws otherwise: masks of `torch.nn.Dropout` come from (seed, step, process), one micro-batch after the other.
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
    """A generator for some rows of a batch, in the state in which `source` is."""
    part = RowsGenerator(source.device)
    part.set_state(source.get_state())
    part.batch_size, part.rows = batch_size, rows
    return part


def draw(
    make: Callable[..., Tensor], shape: Sequence[int], generator: torch.Generator, dim: int = 0, **options: Any
) -> Tensor:
    """`make(shape, generator=generator, **options)`, e.g. `draw(torch.randn, x.shape, generator, device=x.device)`.

    Where the generator is one for rows, the whole batch is drawn along `dim` and the rows are returned. An objective
    that draws in this way gives the same loss however a batch is split.
    """
    if not isinstance(generator, RowsGenerator):
        return make(tuple(shape), generator=generator, **options)
    whole = (*shape[:dim], generator.batch_size, *shape[dim + 1 :])
    rows = range(generator.batch_size)[generator.rows]
    return make(whole, generator=generator, **options).narrow(dim, rows.start, len(rows))

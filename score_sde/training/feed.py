"""Micro-batches on the device, read one step ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from score_sde.data import Batch, Data
from score_sde.keyed import Draws, generator

__all__ = ["feed"]


@contextmanager
def feed(
    data: Data, rows: Sequence[slice], batch_size: int, seed: int, device: torch.device
) -> Iterator[Callable[[int], list[Batch]]]:
    """A function from a step to its micro-batches: these rows of its global batch, on the device and prepared.

    For a CUDA device, a thread reads and copies the next step's meanwhile.
    """
    whole = list(rows) == [slice(0, batch_size)]

    def read(step: int) -> list[Batch]:
        parts = [data.batch(step, batch_size)] if whole else [data.batch(step, batch_size, part) for part in rows]
        for part, asked in zip(parts, rows, strict=True):
            _check_batch(data, part, asked.stop - asked.start)
        return [part.to(device) for part in parts]

    def prepared(step: int, parts: Sequence[Batch]) -> list[Batch]:
        sources = [generator(seed, "prepare", step, device=device) for _ in parts]
        draws = [Draws(source, batch_size, part) for source, part in zip(sources, rows, strict=True)]
        found = [data.prepare(part, drawn) for part, drawn in zip(parts, draws, strict=True)]
        for part in found:
            if not part.x.is_floating_point():
                raise TypeError(f"{type(data).__name__} gives {part.x.dtype}, and noise is added to floats: return them from "
                                "prepare(batch, draws) in the model's scale, as batch.x.float() / 127.5 - 1")  # fmt: skip
        return found

    if device.type != "cuda":
        yield lambda step: prepared(step, read(step))
        return
    with ThreadPoolExecutor(1) as thread:
        ahead: dict[int, Future[list[Batch]]] = {}

        def prefetched(step: int) -> list[Batch]:
            parts = (ahead.pop(step, None) or thread.submit(read, step)).result()
            ahead[step + 1] = thread.submit(read, step + 1)
            return prepared(step, parts)

        yield prefetched


def _check_batch(data: Data, batch: Batch, size: int) -> None:
    """Raises TypeError unless it is a Batch of `size` examples."""
    x = batch.x if isinstance(batch, Batch) else None
    if not isinstance(x, Tensor) or len(x) != size:
        given = f"{len(x)} examples" if isinstance(x, Tensor) else type(batch if x is None else x).__name__
        raise TypeError(
            f"{type(data).__name__}.batch returns Batch(x), x a tensor of {size} examples here, got {given}"
        )

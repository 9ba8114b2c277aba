"""One small interface for endless streams and finite sets: the batch of step n is a pure function of (seed, n).

So a killed run resumes without iterator state, two runs with one seed see the same examples at the same steps, and each
of several processes reads its own rows of one global batch: batch(n, B, rows) -> to(device) -> prepare(batch, draws).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from score_sde.keyed import ALL, Draws, generator

__all__ = ["Batch", "Data", "TargetStream"]


@dataclass(frozen=True)
class Batch:
    """Examples x of shape (batch, *event), and their conditions by name, each of shape (batch, ...).

    x is as `Data.batch` reads it, possibly integers, or as `Data.prepare` returns it, float32.
    """

    x: Tensor
    condition: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device. The copy to CUDA is from pinned memory and asynchronous."""
        on_cuda = torch.device(device).type == "cuda"

        def moved(value: Tensor) -> Tensor:
            pinned = value.pin_memory() if on_cuda and value.device.type == "cpu" else value
            return pinned.to(device, non_blocking=on_cuda)

        return Batch(moved(self.x), {name: moved(value) for name, value in self.condition.items()})

    def rows(self, rows: slice | Tensor) -> Batch:
        """Some of the examples, with their conditions."""
        return Batch(self.x[rows], {name: value[rows] for name, value in self.condition.items()})


class Data(ABC):
    """A source of clean examples.

    Attributes:
        event_shape: shape of one example.
        size: number of training examples, None for an endless stream.
        num_classes: number of classes, if examples have a `label`, else None.
        class_names: names of the classes, or None.
        target: the closed-form law of the examples, if known (see `score_sde.targets`), else None.
        has_test: whether `reference` returns examples that training does not see, with the same conditions as batches.
    """

    event_shape: tuple[int, ...]
    size: int | None = None
    num_classes: int | None = None
    class_names: Sequence[str] | None = None
    target: Any = None
    has_test: bool = False

    def __repr__(self) -> str:
        facts = {"target": self.target, "size": self.size, "classes": self.num_classes}
        known = "".join(f", {name}={value}" for name, value in facts.items() if value is not None)
        return f"{type(self).__name__}(event_shape={tuple(self.event_shape)}{known})"

    @abstractmethod
    def batch(self, step: int, batch_size: int, rows: slice = ALL) -> Batch:
        """The given rows of the training batch of a step (0, 1, 2, ...), on the CPU, as they are stored."""

    def prepare(self, batch: Batch, draws: Draws) -> Batch:
        """The batch as the model takes it: float32 in the model's scale, dequantised and augmented, on the same device.

        All random numbers come from `draws`, which are for the batch's rows and on its device. By default, the batch itself.
        """
        return batch

    @abstractmethod
    def reference(self, count: int) -> Batch:
        """Up to `count` prepared real examples to compare samples with, the same at every call; see the subclass."""

    def of_classes(self, classes: Collection[int]) -> Data:
        """The training and held-out examples of these classes. Raises ValueError if examples have no labels."""
        if self.num_classes is None:
            raise ValueError("these data have no labels: give num_classes and the condition `label`")
        return OfClasses(self, classes)


class OfClasses(Data):
    """The examples of some classes of other data: the first that have these labels, out of as many as that takes."""

    def __init__(self, data: Data, classes: Collection[int]) -> None:
        self.data, self.classes = data, torch.tensor(sorted({int(label) for label in classes}))
        self.event_shape, self.has_test = data.event_shape, data.has_test
        self.num_classes, self.class_names = data.num_classes, data.class_names

    def batch(self, step: int, batch_size: int, rows: slice = ALL) -> Batch:
        found = self._first(partial(self.data.batch, step), batch_size)
        if len(found.x) < batch_size:
            raise ValueError(f"too few training examples have label {' or '.join(map(str, self.classes.tolist()))}")
        return found.rows(rows)

    def prepare(self, batch: Batch, draws: Draws) -> Batch:
        return self.data.prepare(batch, draws)

    def reference(self, count: int) -> Batch:
        return self._first(self.data.reference, count)

    def _first(self, examples: Callable[[int], Batch], count: int) -> Batch:
        """The first `count` of these classes among examples(n), doubling n from `count` to 1024 `count`."""
        for doublings in range(11):
            among = examples(count << doublings)
            if "label" not in among.condition:
                raise ValueError(
                    f"{type(self.data).__name__} has examples without label: give Batch(x, {{'label': ...}})"
                )
            found = torch.isin(among.condition["label"], self.classes).nonzero()[:, 0][:count]
            if len(found) == count or len(among.x) < count << doublings:
                break
        return among.rows(found)


class TargetStream(Data):
    """An endless stream of draws from a closed-form target; `reference` returns further, independent draws."""

    has_test = True

    def __init__(self, target: Any, seed: int = 0) -> None:
        self.target, self.seed, self.event_shape = target, seed, tuple(target.event_shape)

    def batch(self, step: int, batch_size: int, rows: slice = ALL) -> Batch:
        return Batch(self._draw(batch_size, generator(self.seed, "batch", step)).x[rows])

    def reference(self, count: int) -> Batch:
        return self._draw(count, generator(self.seed, "reference"))

    def _draw(self, count: int, source: torch.Generator) -> Batch:
        return Batch(self.target.sample((count,), generator=source).float())

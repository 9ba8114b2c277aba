"""Metrics of a run: sums kept on the device between two lines of metrics.jsonl, and the file itself."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from score_sde import distributed
from score_sde.training.checkpoint import write_atomically

__all__ = ["MetricsLog", "Window"]


class Window:
    """Means since the last `read`. Only `read` waits for the device, `add` does not."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._names = device, ["loss"]
        self._sums = self._zeros()
        self._started = time.perf_counter()

    def _zeros(self) -> Tensor:
        return torch.zeros(7 + 5 * len(self._names), dtype=torch.float64, device=self._device)

    def add(
        self,
        losses: Tensor,
        u: Tensor,
        grad_norm: Tensor,
        good: Tensor,
        nonfinite: Tensor,
        diagnostics: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Adds a step: this process's losses (batch,) at the noise quantiles u (batch,).

        Args:
            good: whether the step enters the means, a scalar.
            nonfinite: whether it is counted as non-finite, a scalar.
            diagnostics: further values (batch,) by name, with the same names at every step.
        """
        values = {"loss": losses, **(diagnostics or {})}
        if list(values) != self._names:
            self._names = list(values)
            self._sums = self._zeros()
        rows = torch.stack([value.double() for value in values.values()])
        quartile = ((4 * u).long()[:, None] == torch.arange(4, device=u.device)).double()
        once = torch.stack([grad_norm.double(), torch.ones_like(rows[0, 0])])
        sums = torch.cat([once, quartile.sum(0), rows.mean(1), (rows @ quartile).flatten()])
        self._sums[0] += nonfinite
        self._sums[1:] += torch.where(good, sums, 0.0)

    def read(self, examples: int) -> dict[str, Any]:
        """Means over all processes (NaN if over nothing), non-finite steps and `examples` per second; then resets."""
        nonfinite, grad_norm, steps, *rest = distributed.mean(self._sums).tolist()
        counts, totals, quartiles = rest[:4], rest[4 : 4 + len(self._names)], rest[4 + len(self._names) :]
        seconds = time.perf_counter() - self._started
        self._sums.zero_()
        self._started += seconds
        means = {}
        for row, name in enumerate(self._names):
            means[name] = _ratio(totals[row], steps)
            means |= {f"{name}_q{i + 1}": _ratio(quartiles[4 * row + i], counts[i]) for i in range(4)}
        return {
            **means,
            "grad_norm": _ratio(grad_norm, steps),
            "nonfinite": int(nonfinite),
            "examples_per_second": examples / seconds,
        }

    def state_dict(self) -> dict[str, Any]:
        """The sums since the last `read`, as means over all processes, which all call it."""
        return {"names": self._names, "sums": distributed.mean(self._sums.clone()).cpu()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from the sums of a `state_dict`; its non-finite steps are counted already."""
        self._names, self._sums = state["names"], state["sums"].to(self._device)
        self._sums[0] = 0

    @property
    def nonfinite(self) -> int:
        """Non-finite steps since the last `read`."""
        return int(self._sums[0])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent inside from the rate."""
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began


class MetricsLog:
    """Rows of numbers, kept in `rows` and, given a directory, written to its metrics.jsonl, one JSON object a line.

    With `tensorboard`, rows and the pictures given to `show` also go to event files in the directory's `tensorboard`.
    Opening an existing file reads its rows up to `step` and removes later lines and any that was cut short, so that a
    resumed run has each step once.
    """

    def __init__(self, directory: Path | None, step: int, tensorboard: bool = False) -> None:
        self.rows: list[dict[str, Any]] = []
        self._file: TextIO | None = None
        self._board: Any = None
        if directory is None:
            return
        path = directory / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            write_atomically(path, "".join(f"{line}\n" for line in kept))
            self.rows += map(json.loads, kept)
        self._file = path.open("a")
        self._board = _board(directory / "tensorboard", step) if tensorboard else None

    def write(self, row: dict[str, Any]) -> None:
        finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
        self.rows.append(row)
        if self._file is not None:
            self._file.write(json.dumps(finite) + "\n")
            self._file.flush()
        if self._board is not None:
            for name in row.keys() - {"step"}:
                self._board.add_scalar(name, row[name], row["step"])

    def show(self, step: int, pictures: Mapping[str, Path]) -> None:
        """Sends picture files, by name, to TensorBoard if it is on."""
        from PIL import Image

        if self._board is not None:
            for name, file in pictures.items():
                with Image.open(file) as picture:
                    self._board.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan


def _step_of(line: str) -> float:
    """The step of a line; infinity if the line is not a complete object."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf


def _board(folder: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)

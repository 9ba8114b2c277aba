r"""Starting points paired with their converged endpoints, and the error of a table's endpoints.

A table's N + 1 moves are functions of its numbers, and each number changes only the moves from a certain one on. Derivatives
of the endpoints are taken as differences between two runs, of which the changed one is carried on from that move: no
derivative of the model is needed, and the Jacobian of a table of six calls costs 77 calls, not 192.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from score_sde import grid as grids
from score_sde.adaptive import AdaptiveODE
from score_sde.checks import number, whole
from score_sde.keyed import generator
from score_sde.progress import tqdm
from score_sde.score import ScoreModel
from score_sde.sde import SDE
from score_sde.solver import SampleResult
from score_sde.steps.linear import LinearRow, combine
from score_sde.tuning.span import Span
from score_sde.tuning.table import TunedSampler, TunedTable

CONVERGED = AdaptiveODE("dopri5", rtol=1e-5, atol=1e-5, final="denoise")
"""The solver that tables are fitted to and compared with: the probability-flow ODE, with each sample's error controlled."""


STEEP = 10.0
"""A sample whose Jacobian exceeds this many data standard deviations is given less weight, as if it had this size."""


class Teacher(Protocol):
    """A solver whose endpoints are fitted: `ProbabilityFlowODE`, or a `Sampler` of many steps."""

    def sample(self, model: ScoreModel, shape: Sequence[int], *, x_init: Tensor) -> SampleResult: ...


@dataclass(frozen=True)
class Passage:
    """A run of a table: its states, one more than moves, and each move's denoiser output, None if it makes no call."""

    states: list[Tensor]
    outputs: list[Tensor | None]

    def carried_on(self, model: ScoreModel, rows: Sequence[LinearRow], move: int) -> Passage:
        """The run with these rows from `move` on; the rows before must be those of this run."""
        states, outputs = self.states[: move + 1], self.outputs[: move + 1]
        for i, row in enumerate(rows[move:], move):
            if i == len(outputs):
                outputs.append(model(states[-1], row.t).denoised if row.b else None)
            newest_first = [output for output in reversed(outputs) if output is not None]
            states.append(combine(states[-1], row.a, row.b, newest_first))
        return Passage(states, outputs)


def rows_of(table: TunedTable, sde: SDE) -> list[LinearRow]:
    """The moves that the table's sampler makes."""
    sampler = TunedSampler(table)
    return [move.row for move in sampler.plan(sde, grids.check(sampler.grid(sde), sde))]


@dataclass(frozen=True)
class Pairs:
    """Starting points x, their converged endpoints y, and a robust loss for the endpoints x_N of a table.

    loss = mean (|x_N - y|^2 / d + c^2)^(1/4) - c^(1/2), with lengths in `unit`, the data's standard deviation: quadratic in
    errors below c = `robust`, and their square root above. With few calls, starts close to a boundary between modes end in
    the wrong mode whatever the table. A squared loss would make these few errors smaller by drawing all endpoints near the
    boundary towards the middle, where there are no data; the square root does not.
    """

    model: ScoreModel
    x: Tensor
    y: Tensor
    unit: float
    robust: float
    batch_size: int

    def penalty(self, square: Tensor) -> Tensor:
        """The loss of each sample, from its mean square error; shape (batch,)."""
        return (square + self.robust**2).pow(0.25) - self.robust**0.5

    def first(self, count: int) -> Pairs:
        return replace(self, x=self.x[:count], y=self.y[:count])

    def batches(self) -> Iterator[tuple[float, Pairs]]:
        for x, y in zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True):
            yield len(x) / len(self.x), replace(self, x=x, y=y)

    @torch.no_grad()
    def loss(self, table: TunedTable) -> float:
        rows, value = rows_of(table, self.model.sde), 0.0
        for share, part in self.batches():
            end = Passage([part.x], []).carried_on(self.model, rows, 0).states[-1]
            value += share * self.penalty(part.miss(end).square().mean(1)).mean().item()
        return value if math.isfinite(value) else math.inf

    def miss(self, end: Tensor) -> Tensor:
        """(end - y) / unit, shape (batch, d), float64."""
        return (end - self.y).flatten(1).double() / self.unit

    @torch.no_grad()
    def normal_equations(self, span: Span, z: Tensor, calls: int) -> tuple[Tensor, Tensor]:
        """J^T W J and J^T W m at z, for Gauss-Newton on the loss: m the misses, J their Jacobian, W the penalty's slope.

        Samples that diverged are left out, and those at the very boundary between modes, whose difference is a jump, have
        little weight (`STEEP`).
        """
        sde, moves, step = self.model.sde, span.first_moves(calls), 1e-6 if self.x.dtype == torch.float64 else 1e-3
        rows = rows_of(span.table(z, calls), sde)
        others = [rows_of(span.table(z + step * unit, calls), sde) for unit in torch.eye(len(z), dtype=z.dtype)]
        matrix, slope = z.new_zeros(len(z), len(z)), torch.zeros_like(z)
        for share, part in self.batches():
            passage = Passage([part.x], []).carried_on(self.model, rows, 0)
            end, miss = passage.states[-1], part.miss(passage.states[-1])
            columns = [passage.carried_on(self.model, changed, move).states[-1] - end
                       for changed, move in zip(others, moves, strict=True)]  # fmt: skip
            J = torch.stack([column.flatten(1).double() for column in columns], 2) / (step * self.unit)
            size = J.square().mean(1).sum(1).sqrt()
            sound = size.isfinite() & miss.isfinite().all(1)
            J, miss, size = J[sound], miss[sound], size[sound]
            weight = torch.func.grad(lambda square: self.penalty(square).sum())(miss.square().mean(1))
            weight = weight * (STEEP / size).clamp(max=1) ** 2
            weighted = J * (share / len(part.x) * weight)[:, None, None]
            matrix += (weighted.flatten(0, 1).T @ J.flatten(0, 1)).to(matrix)
            slope += (weighted.flatten(0, 1).T @ miss.flatten()).to(slope)
        return matrix, slope


def converged_pairs(
    model: ScoreModel, *, samples: int | None = None, seed: int = 0, teacher: Teacher | None = None,
    robust: float = 0.07, batch_size: int | None = None, progress: bool = True,
) -> tuple[Pairs, Pairs]:  # fmt: skip
    """Pairs of starting points and the teacher's endpoints, to fit on and to validate on; arguments as in `tune`.

    Raises:
        ValueError: an option is not positive.
    """
    dimension = math.prod(model.event_shape)
    samples = min(max(2**16 // dimension, 1024), 2**14) if samples is None else samples
    batch_size = min(max(2**14 // dimension, 64), 2048) if batch_size is None else batch_size
    samples, batch_size = whole("samples", samples), whole("batch_size", batch_size)
    robust = number("robust", robust, above=0)
    source = generator(seed, "tune")
    noise = torch.randn(samples + (samples + 1) // 2, *model.event_shape, generator=source)
    x = model.start(noise.to(model.device))
    teacher, parts = teacher or CONVERGED, x.split(1024)
    bar = tqdm(parts, desc="converged solution", disable=not progress, delay=2)
    y = torch.cat([teacher.sample(model, part.shape, x_init=part).x for part in bar])
    unit = (y - y.mean(0)).square().mean().sqrt().item() or 1.0
    fit, validation = (Pairs(model, x[part], y[part], unit, robust, batch_size)
                       for part in (slice(samples), slice(samples, None)))  # fmt: skip
    return fit, validation

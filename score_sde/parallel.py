r"""Sampling in parallel over time: Picard iteration on the rows of a linear step.

A run x_{i+1} = a_i x_i + sum_k b_ik D_{i-k} + c_i z_i is known once all D_i = D(x_i, t_i) are. Over a window of times,
guess the D_i, unroll the recursion, evaluate the network at all its points in one call, and repeat: after k rounds the
first k points are those of the sequential run, and in practice many more are, to within a tolerance. The window then
slides on by the number of points that have settled. The samples are the same, with more network calls in total but fewer
one after another. Source: Shih et al. 2023 (ParaDiGMS), https://arxiv.org/abs/2305.16317, algorithm 1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from score_sde import grid as grids
from score_sde.checks import number, one_of, whole
from score_sde.embedded import rms
from score_sde.grid import Grid
from score_sde.noise import NoiseSource
from score_sde.progress import tqdm
from score_sde.score import ScoreModel
from score_sde.sde import SDE, expand
from score_sde.solver import FINALS, AsWritten, PerSample, SampleResult, Start, begin, ending, mean_calls, warn_of_lost
from score_sde.steps.linear import LinearRow, LinearStep


@dataclass(frozen=True, repr=False)
class ParallelResult(SampleResult):
    """What a parallel sampler returns; `nfe` is the mean number of network evaluations per sample, rounded up.

    Attributes:
        rounds: network calls one after another, which a sequential run has `nfe` of.
    """

    rounds: int


class ParallelSampler(AsWritten):
    """Picard iteration with a sliding window, for a predictor that is a `LinearStep`, with or without noise.

    Every sample has its own window, so that samples do not affect each other. The noise is that of the sequential
    `Sampler(predictor, grid)` with the same seed, and so is the result, to the tolerance.

    Args:
        predictor: the step; any order, any noise.
        grid: function SDE -> times, decreasing.
        window: number of grid times that are iterated at once; None takes the whole grid.
        tolerance: a point has settled when a round moves it by no more than this, in root mean square over the sample,
            in units of the marginal spread sqrt(alpha^2 S^2 + sigma^2), S the data's standard deviation. The remaining
            error grows where the flow separates modes; 0 iterates to the sequential run's rounding.
        final: "denoise" ends with Tweedie's formula at the last grid time (one more call), "none" keeps the sample.

    Raises:
        ValueError: the predictor is not a `LinearStep`, or an option is outside its range.
    """

    def __init__(
        self, predictor: LinearStep, grid: Grid, window: int | None = None, tolerance: float = 1e-5,
        final: str = "denoise",
    ) -> None:  # fmt: skip
        if not isinstance(predictor, LinearStep) or predictor.role != "predictor" or predictor.repeats != 1:
            raise ValueError(f"parallel sampling needs a linear predictor, e.g. DDIM(), got {predictor!r}")
        grids.check_callable(grid)
        if not 0 <= number("tolerance", tolerance) < math.inf:
            raise ValueError(f"tolerance is a number >= 0, got {tolerance}")
        self.predictor, self.grid, self.tolerance = predictor, grid, tolerance
        self.window = None if window is None else whole("window", window)
        self.final = one_of("final", final, FINALS)

    def check(self, sde: SDE) -> None:
        """Refuses, with ValueError, an SDE on which the grid or the step does not work."""
        self._rows(sde, grids.check(self.grid(sde), sde))

    @torch.no_grad()
    def sample(
        self, model: ScoreModel, shape: Sequence[int], *, seed: int | None = None, noise: NoiseSource | None = None,
        x_init: Tensor | None = None, condition: Mapping[str, Any] | None = None, trajectory: bool = False,
        progress: bool = False, dtype: torch.dtype | None = None,
    ) -> ParallelResult:  # fmt: skip
        """Draws samples; arguments as in `Sampler.sample`, and so the trajectory, over the grid's times."""
        start = begin(model, shape, seed, noise, x_init, condition, dtype, self.grid, self.predictor)
        times, rows = start.times, self._rows(model.sde, start.times)
        clock = time.perf_counter()
        per_sample = PerSample(model, start.model.condition, len(start.x))
        per_sample.check_apart()
        run = _Windows(per_sample, rows, times, start, self.window or len(rows), self.tolerance, trajectory)
        with tqdm(total=len(start.x), desc="samples", disable=not progress, delay=1.0, leave=False) as bar:
            while len(run.ids):
                bar.update(run.round())
        x, last = ending(self.final, per_sample, run.result, times[-1].item())
        nfe, seconds = mean_calls(run.evaluations + last), time.perf_counter() - clock
        warn_of_lost(x, model, times[-1].item())
        return ParallelResult(x, nfe, seconds, run.path if trajectory else None, times, run.rounds + bool(last))

    def _rows(self, sde: SDE, times: Tensor) -> list[LinearRow]:
        if (times.diff() > 0).any():
            raise ValueError("parallel sampling needs a grid that only decreases: use Sampler for grids with churn")
        rows = list(self.predictor.plan(sde, times[:-1], times[1:]))
        if not all(row.b for row in rows[1:]):
            raise ValueError(
                "parallel sampling needs a network call in every row after the first: use Sampler for this table"
            )
        return rows


class _Windows:
    """The unfinished samples, each with the settled state at its window's first time and guesses of D in the window.

    Rows past the grid's end keep the state unchanged (a = 1), so that all windows have the same length.
    """

    def __init__(
        self, model: PerSample, rows: Sequence[LinearRow], times: Tensor, start: Start, window: int, tolerance: float,
        trajectory: bool,
    ) -> None:  # fmt: skip
        x = start.x
        self.model, self.stream, self.tolerance = model, start.noise, tolerance
        self.path = x.expand(len(times), *x.shape).clone() if trajectory else None
        self.count, self.window = len(rows), min(window, len(rows))
        self.memory = max((len(row.b) for row in rows), default=1)
        self._tabulate(rows, times, x)
        self.result, self.rounds = x.clone(), 1
        self.evaluations = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.ids = torch.arange(len(x), device=x.device)
        self.base = torch.zeros_like(self.ids)
        self.low = self.high = 0  # the least and the greatest base
        self.x = x
        first = self._call(x, self.base, self.ids)
        self.evaluations += model.calls
        self.guess = first.expand(self.window, *x.shape)
        self.past = first.expand(self.memory - 1, *x.shape)  # D before the window, oldest first; unused at the start
        self.noise = x.new_empty((0, *x.shape))
        self.noise_from = 0

    def _tabulate(self, rows: Sequence[LinearRow], times: Tensor, x: Tensor) -> None:
        pad = [(1.0, [0.0] * self.memory, 0.0)] * self.window
        table = [(row.a, [*row.b, *[0.0] * (self.memory - len(row.b))], row.c) for row in rows] + pad
        a, b, c = zip(*table, strict=True)
        self.a, self.c = (torch.tensor(v, dtype=torch.float64).to(x) for v in (a, c))
        self.b = torch.tensor(b, dtype=torch.float64).to(x).T
        self.noisy = [row.c != 0.0 for row in rows]
        # The outputs are u D + w eps; most steps have u = 1 and w = 0 in every row.
        mixed = any(row.output != (1.0, 0.0) for row in rows)
        self.output = torch.tensor([row.output for row in rows], dtype=torch.float64).to(x.device).T if mixed else None
        t = torch.tensor([row.t for row in rows], dtype=torch.float64)
        sde = self.model.model.sde
        spread = torch.hypot(sde.alpha(times) * self.model.model.data_std, sde.sigma(times))
        self.t = torch.cat([t, t[-1:].expand(self.window)]).to(x.device)
        self.spread = torch.cat([spread, spread[-1:].expand(self.window)]).to(x)

    def round(self) -> int:
        """One network call over all windows; returns how many samples arrived."""
        self._draw()
        before = self._unroll(self.guess)
        self.guess = self._evaluate(before)
        after = self._unroll(self.guess)
        stride = self._settled(before, after)
        if self.path is not None:
            self._keep(after[1:], stride)
        at = torch.arange(len(self.ids), device=self.x.device)
        self.x = after[stride, at]
        outputs = torch.cat([self.past, self.guess])
        if self.memory > 1:
            self.past = torch.stack([outputs[stride + k, at] for k in range(self.memory - 1)])
        index = torch.arange(self.window, device=self.x.device)[:, None]
        self.guess = self.guess[(index + stride).clamp(max=self.window - 1), at]
        self.base = self.base + stride
        done = self.base == self.count
        self.rounds += 1
        unfinished = torch.where(done, self.count, self.base).amin(), torch.where(done, 0, self.base).amax()
        # The only wait for the device in a round, besides the choice of points in `_evaluate`.
        arrived, self.low, self.high = torch.stack([done.sum(), *unfinished]).tolist()
        if arrived:
            self._put_away(done)
        return arrived

    def _unroll(self, outputs: Tensor) -> Tensor:
        """The states at the window's times and after it, (window + 1, samples, *event), for given outputs D."""
        known = torch.cat([self.past, outputs])
        states, at = [self.x], torch.arange(len(self.ids), device=self.x.device)
        for j in range(self.window):
            place = self.base + j
            x = expand(self.a[place], self.x) * states[-1]
            for k in range(self.memory):
                x = x + expand(self.b[k, place], x) * known[self.memory - 1 + j - k]
            if len(self.noise):
                row = (place - self.noise_from).clamp(max=len(self.noise) - 1)
                x = x + expand(self.c[place], x) * self.noise[row, at]
            states.append(x)
        return torch.stack(states)

    def _evaluate(self, states: Tensor) -> Tensor:
        """D at the window's points, in one call; points past the grid's end keep their guess and cost nothing."""
        place = self.base + torch.arange(self.window, device=self.base.device)[:, None]
        inside = place < self.count
        row, column = inside.nonzero(as_tuple=True)
        outputs, before = self.guess.clone(), self.model.calls
        outputs[row, column] = self._call(states[row, column], place[row, column], self.ids[column])
        self.evaluations[self.ids] += inside.sum(0) * (self.model.calls - before)
        return outputs

    def _call(self, x: Tensor, place: Tensor, ids: Tensor) -> Tensor:
        """The network outputs N = u D + w eps at these grid places."""
        prediction = self.model.predict(x, self.t[place], ids)
        return prediction.denoised if self.output is None else prediction.mix(*self.output[:, place])

    def _settled(self, before: Tensor, after: Tensor) -> Tensor:
        """The number of points by which each window may slide: its first, and all those after it that have settled."""
        place = self.base + torch.arange(1, self.window, device=self.base.device)[:, None]
        moved = [rms(after[j] - before[j]) for j in range(1, self.window)]
        still = torch.stack(moved) <= self.tolerance * self.spread[place] if moved else place < 0
        stride = 1 + still.long().cumprod(0).sum(0)
        return torch.minimum(stride, self.count - self.base)

    def _keep(self, after: Tensor, stride: Tensor) -> None:
        """Stores the states at the times that each window slides past."""
        step = torch.arange(self.window, device=self.x.device)[:, None]
        row, column = (step < stride).nonzero(as_tuple=True)
        self.path[self.base[column] + row + 1, self.ids[column]] = after[row, column]  # type: ignore[index]

    def _draw(self) -> None:
        """Keeps the noise of all moves that some window needs, drawn in the order and by the keys of `Sampler`."""
        if not any(self.noisy):
            return
        low, high = self.low, min(self.high + self.window, self.count)
        kept = self.noise[low - self.noise_from :]
        fresh = range(self.noise_from + len(self.noise), high)
        drawn = [self.stream(2 * i + 1, 0)[self.ids] if self.noisy[i] else torch.zeros_like(self.x) for i in fresh]
        self.noise, self.noise_from = torch.cat([kept, torch.stack(drawn)]) if drawn else kept, low

    def _put_away(self, done: Tensor) -> None:
        self.result[self.ids[done]] = self.x[done]
        stay = (~done).nonzero().squeeze(-1)
        self.ids, self.base, self.x = self.ids[stay], self.base[stay], self.x[stay]
        self.guess, self.past, self.noise = self.guess[:, stay], self.past[:, stay], self.noise[:, stay]

r"""The reverse SDE with adaptive steps, each sample at its own time with its own step size.

    dx = (f(t) x - g(t)^2 score(x, t)) dt + g(t) dw,   backwards from t_max to t_min.

One attempt over h is the stochastic improved Euler method on one Brownian increment w of variance h,

    K_1 = -h (f x - g^2 score)(x, t) + g(t) w,   K_2 = -h (f x - g^2 score)(x + K_1, t - h) + g(t - h) w,

accepted as x + (K_1 + K_2) / 2 if the difference to Euler-Maruyama, (K_2 - K_1) / 2, is within the tolerance.
Source: Jolicoeur-Martineau et al. 2021, https://arxiv.org/abs/2105.14080, algorithm 1 and section 3.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from score_sde.adaptive import AdaptiveResult
from score_sde.checks import number
from score_sde.embedded import SolverError, power, rms
from score_sde.noise import NoiseSource
from score_sde.progress import tqdm
from score_sde.score import ScoreModel
from score_sde.sde import expand
from score_sde.solver import ErrorControlled, PerSample, begin, chosen_times, ending, mean_calls

MAX_ROUNDS = 100_000
MAX_GROWTH = 2.0  # after an accepted step: over few elements an error may be small by chance


class AdaptiveSDE(ErrorControlled):
    """The reverse SDE by the adaptive method of Jolicoeur-Martineau et al., with retained Brownian increments.

    The published method draws fresh noise after a rejection. Whether an increment is rejected depends on its value, so
    the accepted ones are no longer normal: on a Gaussian target at tolerance 0.05 their sum has 1.19 times the right
    variance. Here the rejected increment is retained, and the shorter step takes its part of it by a Brownian bridge,
    w(h') | w(h) ~ N(h' / h w(h), h' (h - h') / h I); the rest is used by the following steps, none of which goes past its
    end. All increments are disjoint pieces of one path (Rackauckas & Nie 2017, https://doi.org/10.3934/dcdsb.2017133,
    "rejection sampling with memory"). A step at most doubles; the published rule has no such bound. On events of one
    element, whose error is small by chance more often than a mean over many, loose tolerances can still leave outliers (on
    `KarrasSDE` at rtol 0.1 they double the spread).

    Args:
        rtol, atol: the tolerance of an element is max(atol, rtol max(|x'|, |x'_before|)), x' the Euler-Maruyama proposal;
            a sample's error is the root mean square over its elements. The defaults are the paper's for 8-bit data in
            [-1, 1]: atol = 2 / 256.
        safety, exponent: theta and r of the step-size rule h <- theta h error^(-r).
        final: "denoise" ends with Tweedie's formula at t_min; "none" keeps the sample.

    Raises:
        ValueError: an option is outside its range.
    """

    def __init__(
        self, rtol: float = 0.02, atol: float = 2 / 256, safety: float = 0.9, exponent: float = 0.9,
        final: str = "denoise",
    ) -> None:  # fmt: skip
        super().__init__(rtol, atol, final)
        if not (0 < number("safety", safety) < 1 and 0.5 <= number("exponent", exponent) <= 1):
            raise ValueError(f"AdaptiveSDE needs 0 < safety < 1 and 0.5 <= exponent <= 1, got {safety=}, {exponent=}")
        self.safety, self.exponent = safety, exponent

    @torch.no_grad()
    def sample(
        self, model: ScoreModel, shape: Sequence[int], *, seed: int | None = None, noise: NoiseSource | None = None,
        x_init: Tensor | None = None, condition: Mapping[str, Any] | None = None, trajectory: bool = False,
        progress: bool = False, dtype: torch.dtype | None = None, points: int = 101, times: Tensor | None = None,
    ) -> AdaptiveResult:  # fmt: skip
        """Integrates from prior noise (or `x_init`) at t_max to t_min; arguments as in `Sampler.sample`.

        With `trajectory` the state is also kept at `points` equally spaced times; with `times`, at these, decreasing and
        in [t_min, t_max]. Steps end at these times, which changes the run.

        Noise is keyed by a sample's number of attempts: with `SampleNoise` a sample does not depend on its batch.

        Raises:
            ValueError: the times leave [t_min, t_max] or are not ordered.
            SolverError: a step size vanished because the model's output is not finite, or `MAX_ROUNDS` is reached.
        """
        start = begin(model, shape, seed, noise, x_init, condition, dtype)
        clock = time.perf_counter()
        chosen = chosen_times(trajectory, points, times, *start.times.tolist())
        per_sample = PerSample(model, start.model.condition, len(start.x))
        per_sample.check_apart()
        run = _Paths(self, per_sample, start.x, chosen)
        with tqdm(total=len(start.x), desc="samples", disable=not progress, delay=1.0, leave=False) as bar:
            for attempt in range(1, MAX_ROUNDS + 1):
                if not len(run.ids):
                    break
                bar.update(run.round(start.noise(attempt, 0)[run.ids]))
            else:
                raise SolverError(f"a sample has not reached t_min after {MAX_ROUNDS} steps: loosen rtol and atol")
        x, last = ending(self.final, per_sample, run.result, model.sde.t_min)
        calls, seconds = run.calls + last, time.perf_counter() - clock
        grid = start.times if chosen is None else chosen
        return AdaptiveResult(x, mean_calls(calls), seconds, run.path, grid, calls, run.total_rejected)


class _Paths:
    """The unfinished samples, each with the Brownian increments that it has drawn but not used.

    `lengths` (depth, samples) and `pieces` (depth, samples, *event) hold these as stacks, with the increment of the next
    stretch of time on top, at index level - 1. Steps end at the `stops`, decreasing times of which the last is t_min.
    """

    def __init__(self, method: AdaptiveSDE, model: PerSample, x: Tensor, times: Tensor | None = None) -> None:
        self.method, self.model, self.sde = method, model, model.model.sde
        self.shortest = 1e-12 * self.sde.t_max
        end = torch.tensor([self.sde.t_min], dtype=torch.float64)
        inner = end[:0] if times is None else times[(times > self.sde.t_min) & (times < self.sde.t_max)]
        self.stops = torch.cat([inner, end]).to(x.device)
        self.times = None if times is None else times.to(x.device)
        self.path = None if times is None else x.expand(len(times), *x.shape).clone()  # already right at t_max
        self.result = x.clone()
        self.calls = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.total_rejected = torch.zeros_like(self.calls)
        self.ids = torch.arange(len(x), device=x.device)
        self.x = self.before = x
        self.t = torch.full((len(x),), self.sde.t_max, dtype=torch.float64, device=x.device)
        self.h = torch.full_like(self.t, 0.01 * (self.sde.t_max - self.sde.t_min))  # the paper's first step
        self.rejected, self.level = torch.zeros_like(self.ids), torch.zeros_like(self.ids)
        self.lengths = self.t.new_zeros((2, len(x)))
        self.pieces = x.new_zeros((2, *x.shape))

    def round(self, z: Tensor) -> int:
        """One attempt of every unfinished sample, with fresh noise z; returns how many arrived."""
        h, s, lands = self._length()
        w, here = self._increment(h, z), self.t
        k1 = self._slope(self.x, here, h, w)
        proposal = self.x + k1
        k2 = self._slope(proposal, s, h, w)
        size = self._size(k2 - k1, proposal)
        good = size <= 1  # False for NaN
        keep = good.view(-1, *[1] * (self.x.ndim - 1))
        self.x = torch.where(keep, self.x + (k1 + k2) / 2, self.x)
        self.before = torch.where(keep, proposal, self.before)
        self.t = torch.where(good, s, here)
        growth = power(size.clamp_min(1e-3), -self.method.exponent).mul_(self.method.safety)
        growth = growth.nan_to_num_(0.1).clamp_(0.1, MAX_GROWTH)
        # A step that a stop or the end of a retained piece cut short is no reason for shorter steps afterwards.
        wished = torch.where(good & (h < self.h), self.h, 0.0)
        self.h = torch.maximum(h * torch.where(good, growth, growth.clamp(max=self.method.safety)), wished)
        self._push(~good, h, w)
        self.rejected = self.rejected + ~good
        if self.times is not None and self.path is not None:
            self._keep(good & lands)
        done = good & (s <= self.sde.t_min)
        stuck = self.h < self.shortest
        arrived, lost, depth = torch.stack([done.sum(), (stuck & ~done).sum(), self.level.amax()]).tolist()
        if lost:
            raise SolverError("the step size of a sample vanished: model output not finite, or atol too small")
        if depth == len(self.lengths):
            self.lengths = torch.cat([self.lengths, torch.zeros_like(self.lengths)])
            self.pieces = torch.cat([self.pieces, torch.zeros_like(self.pieces)])
        if arrived:
            self._put_away(done)
        return int(arrived)

    def _length(self) -> tuple[Tensor, Tensor, Tensor]:
        """The step to try, up to the end of the retained piece or the next stop; its end; whether it lands on that stop."""
        stop = self.stops[torch.searchsorted(-self.stops, -self.t, right=True)]
        left, piece = self.t - stop, self._top(self.lengths)
        h = torch.where(self.level > 0, torch.minimum(self.h, piece), self.h)
        lands = h >= left * (1 - 1e-9)
        return torch.where(lands, left, h), torch.where(lands, stop, self.t - h), lands

    def _keep(self, landed: Tensor) -> None:
        """Stores the states of the samples that have landed on one of the chosen times."""
        at = (self.t == self.times[:, None]) & landed  # type: ignore[index]
        row, column = at.nonzero(as_tuple=True)
        self.path[row, self.ids[column]] = self.x[column]  # type: ignore[index]

    def _increment(self, h: Tensor, z: Tensor) -> Tensor:
        """The Brownian increment over h: a retained one, a part of it by the bridge, or a fresh one."""
        piece, length = self._top(self.pieces), self._top(self.lengths)
        held = self.level > 0
        whole = held & (h >= length * (1 - 1e-9) - self.shortest)  # leave no piece as short as a rounding error
        part = torch.where(held, (h / length).clamp(max=1), 0.0)
        spread = torch.where(whole, 0.0, (h * (1 - part)).sqrt())
        w = expand(torch.where(whole, 1.0, part), z).nan_to_num() * piece + expand(spread, z) * z
        self.level = self.level - whole.long()
        rest = held & ~whole
        self._write(rest, self.level - 1, length - h, piece - w)
        return w

    def _push(self, mask: Tensor, h: Tensor, w: Tensor) -> None:
        self._write(mask, self.level, h, w)
        self.level = self.level + mask.long()

    def _write(self, mask: Tensor, level: Tensor, length: Tensor, piece: Tensor) -> None:
        """Sets the stack entry at `level` for the samples of the mask."""
        level, column = level.clamp_min(0), torch.arange(len(mask), device=mask.device)
        keep = mask.view(-1, *[1] * (piece.ndim - 1))
        self.lengths[level, column] = torch.where(mask, length, self.lengths[level, column])
        self.pieces[level, column] = torch.where(keep, piece, self.pieces[level, column])

    def _top(self, stack: Tensor) -> Tensor:
        return stack[(self.level - 1).clamp_min(0), torch.arange(len(self.level), device=stack.device)]

    def _slope(self, x: Tensor, t: Tensor, h: Tensor, w: Tensor) -> Tensor:
        """-h (f x - g^2 score) + g w at (x, t)."""
        f, g = self.sde.drift(t), self.sde.diffusion(t)
        score = self.model.predict(x, t, self.ids).score
        return expand(-h * f, x) * x + expand(h * g**2, x) * score + expand(g, x) * w

    def _size(self, twice: Tensor, proposal: Tensor) -> Tensor:
        """The error (K_2 - K_1) / 2 of each sample, in units of its tolerance."""
        scale = torch.maximum(proposal.abs(), self.before.abs()).mul_(self.method.rtol).clamp_min_(self.method.atol)
        return rms(twice / (2 * scale))

    def _put_away(self, done: Tensor) -> None:
        ids = self.ids[done]
        self.result[ids] = self.x[done]
        self.calls[ids] = self.model.calls
        self.total_rejected[ids] = self.rejected[done]
        stay = (~done).nonzero().squeeze(-1)
        for name in ("ids", "x", "before", "t", "h", "rejected", "level"):
            setattr(self, name, getattr(self, name)[stay])
        self.lengths, self.pieces = self.lengths[:, stay], self.pieces[:, stay]

r"""Twisted diffusion sampling: a particle filter whose target is the posterior p(x_0 | y) itself.

Particles move by a guided step q and carry the weights that guidance alone leaves out,

    w_s = p(x_s | x_t) pi_s(x_s) / (q(x_s | x_t) pi_t(x_t)),     pi_t(x) = N(y; A D(x, t), v_t A A^T + noise_std^2 I),

with the twist pi_t of `PiGDM`. For a nonlinear A it is N(y; A(D), (v_t g + noise_std^2) I), g the cloud's median of
|A'(D)^T r|^2 / |r|^2 for r = y - A(D). With more particles and steps the law of the particles tends to the posterior.
Source: Wu et al. 2023, https://arxiv.org/abs/2306.17775, algorithm 1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from score_sde.checks import whole
from score_sde.grid import Grid
from score_sde.guidance.base import pushed, with_pull
from score_sde.guidance.observed import MMPS, solve, spread
from score_sde.guidance.operators import LinearOperator, Operator
from score_sde.noise import NoiseSource
from score_sde.prediction import Prediction
from score_sde.progress import tqdm
from score_sde.score import ScoreModel
from score_sde.sde import SDE
from score_sde.solver import SampleResult, begin, warn_of_lost
from score_sde.steps.linear import Ancestral, LinearRow, LinearStep


class TwistedParticles:
    """A sampler of p(x_0 | y) whose batch is one cloud of particles: by design each depends on all the others.

    Assumes: a differentiable A, noise. Cost: one call and one gradient per step and particle. Bias: of order 1 over the
    number of particles, plus the base step's; a small cloud collapses where y is precise. There is no certificate, as the
    draws are not affine in the noise; docs/guidance.md has distances to exact posteriors. Particles may share an ancestor,
    so n particles say less than n independent samples.

    Args:
        grid: function SDE -> times.
        operator, y, noise_std: the observation, one for all particles.
        data_std: standard deviation of the clean data, for the twist (see `PiGDM`); the model's by default. Any value is
            right in the limit of many particles.
        step: the base step p(x_s | x_t), a linear predictor of memory 1 with noise; `Ancestral()` by default.
        threshold: the cloud is resampled, systematically, when its effective share falls below this, in (0, 1].
        particles: size of the cloud from which the samples are drawn at the end; the number of samples by default.

    Raises:
        ValueError: the step is not a linear predictor of memory 1, y does not fit, or an option is out of range.
    """

    def __init__(
        self, grid: Grid, operator: Operator, y: Tensor, noise_std: float, *, data_std: float | None = None,
        step: LinearStep | None = None, threshold: float = 0.5, particles: int | None = None,
    ) -> None:  # fmt: skip
        self.step = Ancestral() if step is None else step
        if not isinstance(self.step, LinearStep) or self.step.memory != 1 or self.step.role != "predictor":
            raise ValueError(f"TwistedParticles moves by a linear predictor of memory 1, got {self.step!r}")
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is a share of particles in (0, 1], got {threshold}")
        if tuple(y.shape) != tuple(operator.output_shape):
            raise ValueError(f"one observation y has shape {tuple(operator.output_shape)}, got {tuple(y.shape)}")
        if not (noise_std > 0 and (data_std is None or data_std > 0)):
            raise ValueError(f"noise_std and data_std are positive, got {noise_std=} and {data_std=}")
        if particles is not None:
            whole("particles", particles)
        self.grid, self.operator, self.y, self.particles = grid, operator, y, particles
        self.noise_std, self.data_std, self.threshold = float(noise_std), data_std, float(threshold)

    @torch.no_grad()
    def sample(
        self, model: ScoreModel, shape: Sequence[int], *, seed: int | None = None, noise: NoiseSource | None = None,
        x_init: Tensor | None = None, condition: Mapping[str, Any] | None = None, progress: bool = False,
        dtype: torch.dtype | None = None,
    ) -> SampleResult:  # fmt: skip
        """shape[0] draws from the cloud; arguments as in `Sampler.sample`, with an `x_init` for the whole cloud.

        Raises:
            ValueError: see `Observed`, `begin` and `grid.check`; or the grid goes up, the step adds no noise, or a condition
                differs between particles.
            FloatingPointError: no particle has a finite weight any more.
        """
        MMPS(model, self.operator, self.y, self.noise_std)  # for its refusals
        count = shape[0]
        shape = (self.particles or count, *shape[1:])
        start = begin(model, shape, seed, noise, x_init, condition, dtype, self.grid)
        given, times = start.model.condition, start.times
        _check_shared(model, given, len(start.x))
        rows = [_of_denoised(row, model.sde) for row in self.step.plan(model.sde, times[:-1], times[1:])]
        if (times.diff() > 0).any() or any(row.c <= 0 for row in rows):
            raise ValueError(f"TwistedParticles needs a decreasing grid and a step with noise, got {self.step!r}")
        model.prepare(times.tolist())
        clock, calls = time.perf_counter(), 0
        x, log_weights, twist = start.x, torch.zeros(len(start.x), dtype=torch.float64, device=start.x.device), None
        for i in tqdm(range(len(times)), desc="particles", disable=not progress, delay=1.0, leave=False):
            draw = start.noise(i + 1, 0)
            prediction, clean, push, log_twist = self._twisted(model, x, times[i].item(), given)
            calls += prediction.calls
            log_weights = log_weights + log_twist - (0.0 if twist is None else twist)
            log_weights = log_weights.nan_to_num(nan=-math.inf, neginf=-math.inf)  # a NaN particle has no descendants
            if i == len(rows):
                break
            chosen, log_weights = self._resampled(log_weights, draw)
            x, clean, push, twist = x[chosen], clean[chosen], push[chosen], log_twist[chosen]
            row, z = rows[i], start.noise(i + 1, 1)
            shift = row.b[0] * push / row.c  # of the guided step's mean, in units of its noise: log(p / q) follows
            log_weights = log_weights - (shift**2 / 2 + shift * z).flatten(1).double().sum(1)
            x = row.a * x + row.b[0] * clean + row.c * (shift + z)
        if len(x) and not log_weights.isfinite().any():
            raise FloatingPointError("no particle has a finite weight: the model's outputs are not finite, or noise_std is "
                                     "far too small for y")  # fmt: skip
        x = (clean + push)[_systematic(log_weights.softmax(0), draw, count)]
        seconds = time.perf_counter() - clock
        warn_of_lost(x, model, times[-1].item())
        return SampleResult(x, calls, seconds, None, times)

    def _twisted(
        self, model: ScoreModel, x: Tensor, t: float, condition: Mapping[str, Any]
    ) -> tuple[Prediction, Tensor, Tensor, Tensor]:
        """The prediction, D, the change of D by the twist, and log pi_t up to a constant, shape (particles,)."""
        prediction, clean, pull = with_pull(model, x, t, condition)
        seen, _, back = self.operator.linearised(clean)
        residual = self.y.to(x) - seen
        v = spread(prediction, model.data_std if self.data_std is None else self.data_std)
        if isinstance(self.operator, LinearOperator):
            solved = solve(self.operator, residual, v, self.noise_std**2)
        else:
            gain = back(residual).flatten(1).square().sum(1) / residual.flatten(1).square().sum(1)
            solved = residual / (v * gain.nanmedian() + self.noise_std**2)
        guided = pushed(prediction, pull(back(solved)))
        return prediction, clean, guided.denoised - clean, -(residual * solved).flatten(1).double().sum(1) / 2

    def _resampled(self, log_weights: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Ancestors and log-weights: drawn, and equal, if too few particles are effective, else unchanged."""
        weights, count = log_weights.softmax(0), len(log_weights)
        few = 1 / weights.square().sum() < self.threshold * count
        own = torch.arange(count, device=weights.device)
        return torch.where(few, _systematic(weights, noise, count), own), torch.where(few, 0, log_weights)


def _check_shared(model: ScoreModel, condition: Mapping[str, Any], particles: int) -> None:
    """Refuses, with ValueError, a condition that differs between particles: resampling would mix them up."""
    for name, value in condition.items():
        if model.per_sample(name, value, particles) and not torch.isclose(value, value[:1], 0, 0, equal_nan=True).all():
            raise ValueError(f"TwistedParticles draws one cloud under one {name}, got several: sample each by itself")


def _systematic(weights: Tensor, noise: Tensor, count: int) -> Tensor:
    """`count` indices by systematic resampling (Kitagawa 1996), whose one uniform number is taken from normal noise."""
    uniform = torch.special.ndtr(noise.flatten()[:1].double())
    places = (torch.arange(count, device=weights.device) + uniform) / count
    return torch.searchsorted(weights.cumsum(0), places).clamp_max(len(weights) - 1)


def _of_denoised(row: LinearRow, sde: SDE) -> LinearRow:
    """The same move in terms of D instead of N = u D + w eps, by eps = (x - alpha D) / sigma."""
    alpha, sigma, (u, w), b = float(sde.alpha(row.t)), float(sde.sigma(row.t)), row.output, row.b[0]
    return row._replace(a=row.a + b * w / sigma, b=(b * (u - w * alpha / sigma),), output=(1.0, 0.0))

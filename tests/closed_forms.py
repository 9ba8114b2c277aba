"""What samplers are compared with: affine maps of Gaussian runs, and the exact flow of a one-dimensional mixture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from score_sde.noise import NoiseSource, Stream
from score_sde.sampler import Move, Sampler
from score_sde.score import ExactScore
from score_sde.sde import SDE
from score_sde.targets import GaussianMixture

F64 = torch.float64


def gaussian(mean: float = 0.3, std: float = 0.5) -> GaussianMixture:
    """N(mean, std^2) on the line; a point mass at std = 0."""
    return GaussianMixture([1.0], [[mean]], [[[std**2]]])


def moments(sde: SDE, t: float, mean: float, std: float) -> tuple[float, float]:
    """Mean and standard deviation of p_t for data N(mean, std^2)."""
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    return alpha * mean, math.hypot(alpha * std, sigma)


class Impulses(NoiseSource):
    """Sample i + 1 of a batch sees a one in the i-th draw of the run and zeros elsewhere; sample 0 sees zeros only."""

    def __init__(self) -> None:
        self.draws = 0

    def open(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Stream:
        def stream(step: int, draw: int) -> Tensor:
            z = torch.zeros(tuple(shape), dtype=dtype)
            self.draws += 1
            if self.draws < len(z):
                z[self.draws] = 1.0
            return z

        return stream


def affine_run(sampler: Sampler, sde: SDE, mean: float, std: float, draws: int = 60) -> np.ndarray:
    """A run on data N(mean, std^2) as an affine map: rows are grid times, columns (constant, x_init, draw 1, ...)."""
    noise = Impulses()
    x = torch.zeros(draws + 2, 1, dtype=F64)
    x[-1] = 1.0
    run = sampler.sample(ExactScore(gaussian(mean, std), sde), x.shape, x_init=x, noise=noise, trajectory=True)
    assert noise.draws <= draws, "the run draws more often than the test has room for"
    path = run.trajectory[:, :, 0].numpy()
    return np.column_stack([path[:, :1], path[:, -1:] - path[:, :1], path[:, 1:-1] - path[:, :1]])


def affine_table(moves: Sequence[Move], sde: SDE, mean: float, std: float, draws: int = 60) -> np.ndarray:
    """The same map from the table alone: every row is carried out on (constant, x_init, draw 1, ...) by hand."""
    x = np.zeros(draws + 2)
    x[1] = 1.0
    states, history, drawn = [x], [], 1
    for move in moves:
        row, past = move.row, history if move.step.role == "predictor" else []
        alpha, sigma = float(sde.alpha(row.t)), float(sde.sigma(row.t))
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        for _ in range(move.step.repeats):
            if row.b:
                D = gain * x
                D[0] += mean - gain * alpha * mean
                u, w = getattr(row, "output", (1.0, 0.0))
                past = [u * D + w * (x - alpha * D) / sigma, *past]
            x = row.a * x + sum(b * N for b, N in zip(row.b, past, strict=False))
            if row.c:
                drawn += 1
                x[drawn] += row.c
        if move.step.role == "predictor" and row.b:
            history = past
        if move.arrives:
            states.append(x)
    return np.stack(states)


def propagate(table: np.ndarray, mean: float, std: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation at every grid time, for x_init ~ N(mean, std^2) and standard normal draws."""
    return table[:, 0] + table[:, 1] * mean, np.sqrt((table[:, 1] * std) ** 2 + (table[:, 2:] ** 2).sum(1))


def plane() -> GaussianMixture:
    """Two overlapping modes in the plane."""
    return GaussianMixture([0.6, 0.4], [[1.0, 0.0], [-1.0, 0.5]], 0.2)


def mixture() -> GaussianMixture:
    """A smooth skew law on the line with three overlapping modes."""
    return GaussianMixture([0.3, 0.5, 0.2], [[-1.4], [0.3], [1.6]], [[[0.16]], [[0.25]], [[0.09]]])


def distribution(target: GaussianMixture, alpha: float, sigma: float) -> Callable[[Tensor], Tensor]:
    """The distribution function of alpha x_0 + sigma eps."""
    std = (alpha**2 * target.covariances[:, 0, 0] + sigma**2).sqrt()
    return lambda x: (target.weights * torch.special.ndtr((x[:, None] - alpha * target.means[:, 0]) / std)).sum(-1)


def quantile(target: GaussianMixture, sde: SDE, t: float, share: Tensor) -> Tensor:
    """Where the distribution function of p_t reaches `share`, by bisection."""
    below = distribution(target, float(sde.alpha(t)), float(sde.sigma(t)))
    low, high = torch.full_like(share, -1e3), torch.full_like(share, 1e3)
    for _ in range(100):
        middle = (low + high) / 2
        short = below(middle) < share
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return (low + high) / 2


def flow(target: GaussianMixture, sde: SDE, x: Tensor, t: float, s: float) -> Tensor:
    """The probability-flow ODE from (x, t) to s: on the line it carries quantiles to quantiles."""
    return quantile(target, sde, s, distribution(target, float(sde.alpha(t)), float(sde.sigma(t)))(x))


def quantiles(target: GaussianMixture, sde: SDE, t: float, count: int = 33) -> Tensor:
    """Evenly spread quantiles of p_t, from 4 % to 96 %."""
    return quantile(target, sde, t, torch.linspace(0.04, 0.96, count, dtype=F64))


def log_snr_between(first: float, last: float, steps: int) -> Callable[[SDE], Tensor]:
    """A grid of equal steps in lambda between two given values."""
    return lambda sde: sde.time_at(torch.linspace(first, last, steps + 1, dtype=F64))


def graded(first: float, last: float, steps: int) -> Callable[[SDE], Tensor]:
    """A grid in lambda whose steps grow from nothing, so that a multistep method's low-order start does not show."""
    share = torch.linspace(0, 1, steps + 1, dtype=F64) ** 2
    return lambda sde: sde.time_at(first + (last - first) * share)

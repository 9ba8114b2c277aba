r"""The exact law of a step's output on Gaussian data, without Monte Carlo.

On Gaussian data D is affine in x, so x keeps the form m + sum_j g_j z_j in the noise draws z_j. Running the step on the
coefficients (m, g) instead of numbers gives the law of its output; a constant D is that of a point mass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from score_sde import grid as grids
from score_sde.evaluation.trials import Denoiser, Draws, Evaluator, kernel, travel, uneven
from score_sde.sde import SDE
from score_sde.steps import Step

BUDGETS = (5, 10, 20, 50, 100)


def gaussian_denoiser(mean: Tensor, variance: Tensor) -> Denoiser:
    """D = mean + gain (x - alpha mean) for data of this mean and variance, of shapes that broadcast with x."""

    def denoise(x: Tensor, t: float, alpha: float, sigma: float) -> Tensor:
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        return torch.addcmul(mean, gain, torch.sub(x, mean, alpha=alpha))

    return denoise


def moments(
    step: Step, sde: SDE, times: Tensor, mean: float, std: Tensor, warm: int = 0
) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation after each move on data N(mean, std^2), exactly; None if the step is not affine.

    Args:
        step: a predictor.
        sde: the forward process.
        times: the grid, N + 1 decreasing times.
        mean, std: of the data; `std` has shape (cases,).
        warm: the number of first moves that begin from exact states, those of the probability-flow ODE from the start.

    Returns:
        Two tensors of shape (N, cases).
    """
    std, alpha = std[:, None], sde.alpha(times)
    marginal = (alpha**2 * std**2 + sde.sigma(times) ** 2).sqrt()  # (cases, N + 1)

    def run(one: Tensor, z: Tensor, draws: Draws) -> Tensor:
        """The states from x = alpha mean + marginal z at the start, `one` standing for the number 1."""
        exact = torch.stack([mean * alpha[i] * one + marginal[:, i, None] * z for i in range(max(warm, 1))])
        evaluate = Evaluator(sde, gaussian_denoiser(mean * one, std**2))
        return torch.stack([*travel(step, sde, times, exact[0], evaluate, draws, exact[:warm])])

    generator, keys = torch.Generator().manual_seed(1), _Keys()
    z = [torch.ones(1, dtype=torch.float64), torch.randn(1, dtype=torch.float64, generator=generator)]

    def number(move: int, k: int) -> Tensor:
        if (move, k) not in keys:
            keys[move, k] = len(z)
            z.append(torch.randn(1, dtype=torch.float64, generator=generator))
        return z[keys[move, k]].expand(len(std), 1)

    numbers = run(z[0], z[1], number)[-1, :, 0]
    unit = torch.eye(len(z), dtype=torch.float64)  # rows for the number 1, the start's z and every draw
    states = run(unit[0], unit[1], lambda i, k: unit[keys[i, k]].expand(len(std), -1))
    if not torch.allclose(numbers, states[-1] @ torch.cat(z), rtol=1e-8, atol=1e-8 * states[-1].abs().max().item()):
        return None
    return states[..., 0], states[..., 1:].norm(dim=-1)


def bias(
    step: Step, sde: SDE, budgets: Sequence[int] = BUDGETS, grid: Callable[..., Tensor] = grids.log_snr
) -> pd.DataFrame:
    """Exact errors of mean and std at the end of a grid, on data N(1, 0.5^2): columns steps, calls, mean, std."""
    rows, data = [], torch.tensor([0.5], dtype=torch.float64)
    for steps in budgets:
        times = grid(sde, steps=steps)
        found = moments(step, sde, times, 1.0, data)
        alpha, sigma = sde.alpha(times[-1]), sde.sigma(times[-1])
        true = (alpha * 0.5).hypot(sigma)
        errors = (math.nan, math.nan)
        if found is not None:
            errors = (((found[0][-1, 0] - alpha) / true).item(), (found[1][-1, 0] / true - 1).item())
        rows.append({"steps": steps, "calls": steps * step.calls, "mean": errors[0], "std": errors[1]})
    return pd.DataFrame(rows)


def point_mass_residual(step: Step, sde: SDE, steps: int = 20) -> float:
    """Largest error of mean / alpha and std / sigma over a run on the data point 1; nan if the step is not affine."""
    times = uneven(sde, steps)
    found = moments(step, sde, times, 1.0, torch.zeros(1, dtype=torch.float64))
    if found is None:
        return math.nan
    alpha, sigma = sde.alpha(times[1:]), sde.sigma(times[1:])
    return max((found[0][:, 0] / alpha - 1).abs().max().item(), (found[1][:, 0] / sigma - 1).abs().max().item())


def stationary_variance(step: Step, sde: SDE) -> float:
    """A corrector's stationary variance over the marginal's, for data N(0, I) at sigma = alpha.

    Exact if the corrector is affine, else simulated in 64 dimensions.
    """
    t = sde.time_at(0.0)
    scale = sde.alpha(t).hypot(sde.sigma(t))
    affine = None if step.needs_density else _one_visit(step, sde, t)
    if affine is None:
        return _simulated_variance(step, sde, t, scale) / float(scale) ** 2
    contraction, noise = affine
    return (noise / (1 - contraction**2) / scale**2).item() if contraction.abs() < 1 else math.inf


def _simulated_variance(step: Step, sde: SDE, t: Tensor, scale: Tensor, burn: int = 60, visits: int = 40) -> float:
    """The mean square of x over `visits` visits of a corrector after `burn` others, started from the exact law."""
    evaluate, g = Gaussian(sde), torch.Generator().manual_seed(0)

    def draw(k: int) -> Tensor:
        return torch.randn(2048, 64, dtype=torch.float64, generator=g)

    x, total = scale * draw(0), 0.0
    (row,) = step.plan(sde, t[None], t[None])
    for visit in range(burn + visits):
        x, _ = step.advance(row, x, (), evaluate, draw)
        total += x.square().mean().item() * (visit >= burn)
    return total / visits


class Gaussian(Evaluator):
    """Data N(0, I), with the density that Metropolis steps need."""

    def __init__(self, sde: SDE) -> None:
        zero = torch.zeros((), dtype=torch.float64)
        super().__init__(sde, gaussian_denoiser(zero, zero + 1))

    def log_prob(self, x: Tensor, t: float) -> Tensor:
        alpha, sigma = kernel(self.sde, t)
        return -x.square().flatten(1).sum(1) / (2 * (alpha**2 + sigma**2))


def _one_visit(step: Step, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor] | None:
    """(A, V) of x' = A x + noise of variance V; None if the corrector is not affine on Gaussian data."""
    (row,) = step.plan(sde, t[None], t[None])
    draws: list[int] = []

    def visit(x: Tensor, draw: Callable[[int], Tensor]) -> Tensor:
        return step.advance(row, x, (), Gaussian(sde), draw)[0]

    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)

    def record(k: int) -> Tensor:
        draws.append(k)
        return zero

    visit(one, record)
    keys = _Keys({k: i for i, k in enumerate(dict.fromkeys(draws), start=1)})
    unit = torch.eye(len(keys) + 1, dtype=torch.float64)
    response = torch.cat([visit(u[:1, None], partial(_chosen, u, keys)) for u in unit]).squeeze(1)
    z = torch.linspace(-1, 2, len(unit), dtype=torch.float64)
    mixed = visit(z[:1, None], partial(_chosen, z, keys))
    if not torch.allclose(mixed.squeeze(), response @ z, rtol=1e-9):
        return None
    return response[0], response[1:].square().sum()


class _Keys(dict[Any, int]):
    """The index of each noise draw of a run among the coefficients."""

    def __missing__(self, key: Any) -> int:
        raise ValueError("the step draws other noise when it is run again: it must not keep state on self")


def _chosen(values: Tensor, keys: Mapping[int, int], k: int) -> Tensor:
    return values[keys[k]].view(1, 1)

r"""The order of a step, and the polynomials that it integrates exactly.

The global error of an ODE step is measured on a Gaussian mixture, against a Runge-Kutta solution of tight tolerance; the weak
error of an SDE step is that of mean and variance on Gaussian data. The first moves begin at exact states, so that the
formula is measured and not the building up of its history.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from score_sde.evaluation.exact_laws import moments
from score_sde.evaluation.trials import Evaluator, end, kernel, travel, uneven
from score_sde.sde import SDE, as_time
from score_sde.steps import Step
from score_sde.steps.multistep import CLOCKS, PREDICTIONS, output_of
from score_sde.targets import GaussianMixture

WARM = 6  # moves that begin at exact states: more than the longest history


@functools.lru_cache(maxsize=32)
def _mixture_paths(sde: SDE, steps: int) -> tuple[GaussianMixture, Tensor, Tensor]:
    """A mixture, the grid, and exact ODE states on it, shape (steps + 1, batch, 2)."""
    from scipy.integrate import solve_ivp

    covariances = [[[0.3, 0.1], [0.1, 0.2]], [[0.2, 0.0], [0.0, 0.4]], [[0.25, -0.1], [-0.1, 0.3]]]
    target = GaussianMixture([0.5, 0.3, 0.2], [[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]], covariances)
    times = uneven(sde, steps)
    lmbda = sde.half_log_snr(times)
    z = torch.randn(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = (1 + (-2 * lmbda[0]).exp()).sqrt() * z * lmbda[0].exp()  # x / sigma

    def rate(u: float, y: np.ndarray) -> np.ndarray:  # d(x / sigma) / dlambda = e^lambda D
        level = math.exp(-u)
        x = torch.from_numpy(y).view(12, 2) * level
        return (target.denoise(x, 1.0, level) / level).flatten().numpy()

    solution = solve_ivp(rate, (lmbda[0].item(), lmbda[-1].item()), start.flatten().numpy(), "DOP853",
                         t_eval=lmbda.tolist(), rtol=1e-13, atol=1e-13)  # fmt: skip
    states = torch.from_numpy(solution.y.T.copy()).view(-1, 12, 2) * sde.sigma(times)[:, None, None]
    return target, times, states


def forget() -> None:
    """Empties what is kept for all steps of one certification: an SDE may be learnt, or edited, until the next."""
    for kept in (kernel, uneven, _mixture_paths, _at, _polynomial_path):
        kept.cache_clear()


def ode_error(step: Step, sde: SDE, steps: int) -> float:
    """Root mean square endpoint error of an ODE step on a Gaussian mixture, in x / alpha, from exact starts."""
    target, times, states = _mixture_paths(sde, steps)
    evaluate = Evaluator(sde, lambda x, t, alpha, sigma: target.denoise(x, alpha, sigma))
    x = end(travel(step, sde, times, states[0], evaluate, _no_draw, states[:WARM]))
    return ((x - states[-1]) / sde.alpha(times[-1])).square().mean().sqrt().item()


def weak_error(step: Step, sde: SDE, steps: int) -> float:
    """Error of mean and variance on Gaussian data of several widths, in x / alpha; nan if not affine."""
    times, std = uneven(sde, steps), torch.tensor([0.3, 0.6, 1.5], dtype=torch.float64)
    found = moments(step, sde, times, 1.0, std, WARM)
    if found is None:
        return math.nan
    alpha, sigma = sde.alpha(times[-1]), sde.sigma(times[-1])
    mean, variance = found[0][-1] / alpha - 1, (found[1][-1] / alpha) ** 2 - std**2 - (sigma / alpha) ** 2
    return torch.cat([mean, variance]).norm().item()


def measured_order(error: Callable[[int], float], finest: int = 256) -> float:
    """log2(error(finest / 2) / error(finest)); nan where the errors are rounding or not finite."""
    coarse, fine = error(finest // 2), error(finest)
    return math.log2(coarse / fine) if coarse > 1e-13 and fine > 1e-14 else math.nan


def _no_draw(move: int, k: int) -> Tensor:
    raise RuntimeError("a deterministic step drew noise")


def polynomial_exactness(step: Step, sde: SDE, degrees: int = 5) -> tuple[str, str, int] | None:
    """The (prediction, clock, degree) of the highest polynomials that an ODE step integrates exactly.

    The prediction is set to u(t)^j for all x, u the clock; the exact solution is then a quadrature. None if not even
    constants are integrated exactly.
    """
    best: tuple[str, str, int] | None = None
    for prediction in sorted(PREDICTIONS, key=lambda name: name != getattr(step, "prediction", "denoised")):
        for clock in CLOCKS:
            degree = -1
            while degree < degrees - 1 and _polynomial_residual(step, sde, prediction, clock, degree + 1) < 1e-10:
                degree += 1
            if degree > (best[2] if best else -1):
                best = prediction, clock, degree
    return best


def _polynomial_residual(step: Step, sde: SDE, prediction: str, clock: str, degree: int) -> float:
    """The largest relative error of a move that begins at an exact state."""
    times, x = _polynomial_path(sde, prediction, clock, degree)

    def denoise(x: Tensor, t: float, alpha: float, sigma: float) -> Tensor:
        # u D + w eps = N and alpha D + sigma eps = x: two equations for D and eps.
        u, w, reading = _at(sde, prediction, clock, t)
        return (sigma * reading**degree - w * x) / (u * sigma - w * alpha)

    exact = x[:, None, None]
    found = torch.stack([*travel(step, sde, times, exact[0], Evaluator(sde, denoise), _no_draw, exact[:-1])])
    return (found / exact[1:] - 1)[WARM:].abs().max().item()


@functools.lru_cache(maxsize=16384)
def _at(sde: SDE, prediction: str, clock: str, t: float) -> tuple[float, float, float]:
    """The weights (u, w) of a prediction and the clock's reading at t, once for all steps and degrees."""
    u, w = output_of(prediction, sde, as_time(t))
    return u.item(), w.item(), _clock(sde, clock, as_time(t)).item()


@functools.lru_cache(maxsize=128)
def _polynomial_path(sde: SDE, prediction: str, clock: str, degree: int) -> tuple[Tensor, Tensor]:
    """A grid, and the x that solves the ODE on it: scale (x_0 / scale_0 + int N dm), by 40-point Gauss quadrature."""
    times = uneven(sde, WARM + 4)
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(40))
    t = times[:-1, None] + (nodes + 1) / 2 * times.diff()[:, None]
    N = _clock(sde, clock, t) ** degree
    rate = -((sde.diffusion(t) / sde.sigma(t)) ** 2) / 2  # lambda'
    level = sde.sigma(t) / sde.alpha(t)
    scale = (
        torch.ones_like(times)
        if prediction == "velocity"
        else (sde.sigma if prediction == "denoised" else sde.alpha)(times)
    )
    integrand = {"denoised": rate / level, "noise": -rate * level, "score": sde.sigma(t) * rate * level,
                 "velocity": torch.ones_like(t)}[prediction]  # fmt: skip
    steps = (integrand * N * weights).sum(1) * times.diff() / 2
    y = torch.cat([torch.ones(1, dtype=torch.float64), steps]).cumsum(0)
    return times, y * scale


def _clock(sde: SDE, clock: str, t: Tensor) -> Tensor:
    """The clock's reading, shifted and scaled to about [0, 1] on the grid."""
    times = uneven(sde, WARM + 4)

    def read(t: Tensor) -> Tensor:
        lmbda = sde.half_log_snr(t)
        return {"time": t, "level": (-lmbda).exp(), "log_snr": lmbda}[clock]

    first, last = read(times[0]), read(times[-1])
    return (read(t) - last) / (first - last) + 0.5

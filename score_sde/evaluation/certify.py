r"""Certificates: what a step does, computed rather than claimed.

Nothing here looks inside a step: its own `plan` and `advance` are run, in float64, on models chosen so that the answer
is known.

    order        the ODE's global error on a Gaussian mixture, against a tight Runge-Kutta solution; for an SDE step the
                 weak error of mean and variance on Gaussian data. The history starts from exact states, so that it is
                 the formula that is measured and not its first moves.
    moments      with Gaussian data D is affine in x, so x is, for ever, m + sum_j g_j z_j in the draws z_j. Running it
                 on the coefficients (m, g) instead of numbers gives the exact law of its output: no Monte Carlo.
    point mass   the same with D constant; exactness: the same with D, eps, score or velocity a polynomial in a clock.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from score_sde import grid as grids
from score_sde.checks import wholes
from score_sde.noise import SampleNoise
from score_sde.prediction import Prediction
from score_sde.progress import tqdm
from score_sde.sampler import Sampler
from score_sde.score import ScoreModel
from score_sde.sde import SDE, VPSDE, Time, as_time
from score_sde.steps import Step
from score_sde.steps.linear import Carry, Renoise
from score_sde.steps.multistep import CLOCKS, PREDICTIONS, output_of
from score_sde.targets import GaussianMixture

BUDGETS = (5, 10, 20, 50, 100)
EXACT = 1e-9  # what counts as exact: rounding over a hundred moves stays below
STATIONARY = 1.25  # and what as a corrector's stationary variance, over or under the law's

Draws = Callable[[int, int], Tensor]
"""(move, k) -> the k-th draw of a move."""


@dataclass(frozen=True)
class Certificate:
    """What was found about one step.

    Attributes:
        name: as listed.
        role: "predictor" or "corrector".
        stochastic: whether it draws noise.
        declared, measured: order of convergence, global (ODE) or weak (SDE); nan for correctors and where no order
            shows.
        calls, counted: network calls a move, declared and counted.
        claims_point_mass: whether it declares that it carries data at one point exactly (`Step.point_mass`).
        point_mass: largest relative error of mean or standard deviation over a run on such data; nan where not affine.
        exact: the polynomials that are integrated exactly, as (prediction, clock, degree), or None.
        bias: DataFrame with the columns steps, calls, mean, std: signed errors at the end on data N(1, 0.5^2), the
            mean's in data std, the std's relative; nan for a step that is not affine in x.
        claims_independence: whether it declares that samples do not depend on their companions.
        batch_independent: whether a sample is bitwise the same whatever its companions.
        stationary: for a corrector, its stationary variance on N(0, I) at sigma = 1, relative to 1; exact where it is
            affine, else simulated in 64 dimensions (standard error about 0.002).
    """

    name: str
    role: str
    stochastic: bool
    declared: float
    measured: float
    calls: int
    counted: float
    claims_point_mass: bool
    point_mass: float
    exact: tuple[str, str, int] | None
    bias: pd.DataFrame = field(repr=False)
    claims_independence: bool
    batch_independent: bool
    stationary: float

    @property
    def faults(self) -> list[str]:
        """What contradicts the class's declarations."""
        faults = []
        excess = self.measured - self.declared
        # Of little noise the term that leads in a weak error may be too small to be seen on these grids.
        if not math.isnan(self.declared) and not -0.3 <= excess <= (math.inf if self.stochastic else 0.3):
            faults.append(f"order {self.measured:.2f}, declared {self.declared:g}")
        if self.claims_point_mass and self.point_mass > EXACT:
            faults.append(f"a point mass is missed by {self.point_mass:.2g}, declared exact (point_mass)")
        if self.counted != self.calls:
            faults.append(f"{self.counted:g} calls a move, declared {self.calls}")
        if self.claims_independence and not self.batch_independent:
            faults.append("samples of a batch are coupled, declared independent (batch_independent)")
        if self.role == "corrector" and not 1 / STATIONARY < self.stationary < STATIONARY:
            faults.append(f"the variance that it leaves stationary is {self.stationary:.3g} of the law's")
        return faults

    def row(self) -> dict[str, Any]:
        """One line of the table."""
        prediction, clock, degree = self.exact or ("", "", -1)
        row = {
            "step": self.name, "role": self.role, "noise": self.stochastic, "order": self.declared,
            "measured order": self.measured, "calls": self.calls, "point mass": self.point_mass,
            "exact degree": degree, "exact in": f"{prediction}({clock})" if self.exact else "",
            "batch independent": self.batch_independent, "stationary variance": self.stationary,
        }  # fmt: skip
        for entry in self.bias.to_dict("records"):
            row |= {f"{part} bias {entry['steps']}": entry[part] for part in ("mean", "std")}
        return row | {"faults": "; ".join(self.faults)}


# --- running a step by hand -------------------------------------------------------------------------------------------


Denoiser = Callable[[Tensor, float, float, float], Tensor]
"""(x, t, alpha, sigma) -> D."""


class Evaluator:
    """A denoiser as a sampler's `evaluate`: counted, in one SDE."""

    def __init__(self, sde: SDE, denoiser: Denoiser) -> None:
        self.sde, self.denoiser, self.calls = sde, denoiser, 0
        self.levels: dict[float, tuple[float, float]] = {}

    def __call__(self, x: Tensor, t: float) -> Prediction:
        self.calls += 1
        if t not in self.levels:
            self.levels[t] = self.sde.alpha(t).item(), self.sde.sigma(t).item()
        alpha, sigma = self.levels[t]
        return Prediction(x, self.denoiser(x, t, alpha, sigma), alpha, sigma)


def travel(
    step: Step, sde: SDE, times: Tensor, x: Tensor, evaluate: Any, draws: Draws, exact: Tensor | None = None
) -> Iterator[Tensor]:
    """The states of a predictor over a grid, or of a corrector at the times of a grid.

    `exact` has the states with which the first len(exact) moves begin, whatever the moves before them gave.
    """
    rows = step.plan(sde, times[:-1], times[1:] if step.role == "predictor" else times[:-1])
    history: tuple[Tensor, ...] = ()
    for i, row in enumerate(rows):
        x = exact[i] if exact is not None and i < len(exact) else x
        x, history = step.advance(row, x, history, evaluate, partial(draws, i))
        yield x


def end(states: Iterator[Tensor]) -> Tensor:
    *_, x = states
    return x


# --- Gaussian data: the exact law of the output -----------------------------------------------------------------------


def gaussian_denoiser(mean: float, std: Tensor, constant: int | None) -> Denoiser:
    """D = mean + gain (x - alpha mean) for data N(mean, std^2), std of shape (cases, 1).

    With `constant`, x holds coefficients and mean multiplies the one at that index.
    """

    def denoise(x: Tensor, t: float, alpha: float, sigma: float) -> Tensor:
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        offset = mean * (1 - gain * alpha)
        if constant is None:
            return gain * x + offset
        D = gain * x
        D[:, constant : constant + 1] += offset
        return D

    return denoise


def moments(
    step: Step, sde: SDE, times: Tensor, mean: float, std: Tensor, warm: int = 0
) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation after each move on data N(mean, std^2), from the exact law; None if not affine.

    Args:
        step: a predictor.
        sde: the forward process.
        times: the grid, N + 1 decreasing times.
        mean, std: of the data; `std` has shape (cases,).
        warm: so many moves begin from exact states: those of the deterministic flow from the start.

    Returns:
        Two tensors of shape (N, cases).
    """
    std = std[:, None]
    keys = _Keys()

    def record(move: int, k: int) -> Tensor:
        keys.setdefault((move, k), len(keys) + 2)
        return torch.zeros(len(std), 1, dtype=torch.float64)

    alpha = sde.alpha(times)
    marginal = (alpha**2 * std**2 + sde.sigma(times) ** 2).sqrt()  # (cases, N + 1)
    zero = torch.zeros(len(std), 1, dtype=torch.float64)
    end(travel(step, sde, times, zero, Evaluator(sde, gaussian_denoiser(mean, std, None)), record))
    width = len(keys) + 2
    unit = torch.eye(width, dtype=torch.float64)

    def state(i: int) -> Tensor:  # column 0 is the constant 1, column 1 the start's z
        return mean * alpha[i] * unit[0] + marginal[:, i, None] * unit[1]

    evaluate = Evaluator(sde, gaussian_denoiser(mean, std, 0))
    exact = torch.stack([state(i) for i in range(warm)]) if warm else None
    states = torch.stack(
        list(travel(step, sde, times, state(0), evaluate, lambda i, k: unit[keys[i, k]].expand(len(std), -1), exact))
    )
    if not _is_affine(step, sde, times, mean, std, states, keys, exact):
        return None
    return states[..., 0], states[..., 1:].norm(dim=-1)


def _is_affine(
    step: Step, sde: SDE, times: Tensor, mean: float, std: Tensor, states: Tensor, keys: Mapping[Any, int],
    exact: Tensor | None,
) -> bool:  # fmt: skip
    """Whether a run on numbers agrees with the affine form at these numbers."""
    z = torch.randn(states.shape[-1], 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z[0] = 1.0
    start = mean * sde.alpha(times[0]) + (sde.alpha(times[0]) ** 2 * std**2 + sde.sigma(times[0]) ** 2).sqrt() * z[1]
    evaluate = Evaluator(sde, gaussian_denoiser(mean, std, None))
    known = exact @ z if exact is not None else None
    x = end(travel(step, sde, times, start, evaluate, lambda i, k: z[keys[i, k]].expand(len(std), 1), known))
    return bool(torch.allclose(x, states[-1] @ z, rtol=1e-8, atol=1e-8 * states[-1].abs().max().item()))


def bias(
    step: Step, sde: SDE, budgets: Sequence[int] = BUDGETS, grid: Callable[..., Tensor] = grids.log_snr
) -> pd.DataFrame:
    """Errors of mean and std at the end of a grid on data N(1, 0.5^2), exactly: columns steps, calls, mean, std."""
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
    """Largest error of mean / alpha and std / sigma over a run on the data point 1; nan if not affine."""
    times = uneven(sde, steps)
    found = moments(step, sde, times, 1.0, torch.zeros(1, dtype=torch.float64))
    if found is None:
        return math.nan
    alpha, sigma = sde.alpha(times[1:]), sde.sigma(times[1:])
    return max((found[0][:, 0] / alpha - 1).abs().max().item(), (found[1][:, 0] / sigma - 1).abs().max().item())


# --- order ------------------------------------------------------------------------------------------------------------

WARM = 6  # moves that begin at exact states: more than any history is long


def uneven(sde: SDE, steps: int) -> Tensor:
    """A smooth grid whose steps are equal in none of t, lambda and sigma / alpha, over noise levels 5 to 0.35."""
    first, last = sde.half_log_snr_range
    low, high = (min(max(-math.log(level), first), last) for level in (5.0, 0.35))
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return sde.time_at(low + (high - low) * (u + 0.3 * u * (1 - u)))


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


# --- exactness for polynomials ----------------------------------------------------------------------------------------


def polynomial_exactness(step: Step, sde: SDE, degrees: int = 5) -> tuple[str, str, int] | None:
    """The (prediction, clock, degree) of the highest polynomials in time that an ODE step integrates exactly.

    The prediction is set to u(t)^j, whatever x; the exact solution is then a quadrature. None if no constants are.
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
    times, x = _polynomial_path(sde, prediction, clock, degree)

    def denoise(x: Tensor, t: float, alpha: float, sigma: float) -> Tensor:
        # u D + w eps = N and alpha D + sigma eps = x: two equations for D and eps.
        u, w = output_of(prediction, sde, as_time(t))
        N = _clock(sde, clock, as_time(t), times) ** degree
        return (sigma * N - w * x) / (u * sigma - w * alpha)

    states = x[:, None, None]
    rows = step.plan(sde, times[:-1], times[1:])
    history: tuple[Tensor, ...] = ()
    residual, evaluate = 0.0, Evaluator(sde, denoise)
    for i, row in enumerate(rows):
        y, history = step.advance(row, states[i], history, evaluate, partial(_no_draw, i))
        if i >= WARM:
            residual = max(residual, (y / states[i + 1] - 1).abs().item())
    return residual


@functools.lru_cache(maxsize=128)
def _polynomial_path(sde: SDE, prediction: str, clock: str, degree: int) -> tuple[Tensor, Tensor]:
    """A grid, and the x that solves the ODE on it: scale (x_0 / scale_0 + int N dm), by 40-point Gauss quadrature."""
    times = uneven(sde, WARM + 4)
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(40))
    t = times[:-1, None] + (nodes + 1) / 2 * times.diff()[:, None]
    N = _clock(sde, clock, t, times) ** degree
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


def _clock(sde: SDE, clock: str, t: Tensor, times: Tensor) -> Tensor:
    """The clock's reading, shifted and scaled to about [0, 1] on the grid."""

    def read(t: Tensor) -> Tensor:
        lmbda = sde.half_log_snr(t)
        return {"time": t, "level": (-lmbda).exp(), "log_snr": lmbda}[clock]

    first, last = read(times[0]), read(times[-1])
    return (read(t) - last) / (first - last) + 0.5


# --- the rest ---------------------------------------------------------------------------------------------------------


class _Elementwise(ScoreModel):
    """D = 2 y / (1 + y^2), y = x / alpha, element by element: bounded, and bitwise the same in any batch."""

    def __init__(self, sde: SDE, event_shape: tuple[int, ...]) -> None:
        self.sde, self.event_shape = sde, event_shape

    def __call__(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        alpha, sigma = self.sde.alpha(t).item(), self.sde.sigma(t).item()
        y = x / alpha
        return Prediction(x, 2 * y / (1 + y * y), alpha, sigma)

    def log_prob(self, x: Tensor, t: Time) -> Tensor:
        return -x.square().flatten(1).sum(1) / 2


def is_batch_independent(step: Step, sde: SDE, steps: int = 8) -> bool:
    """Whether samples 0 to 6 of a batch are bitwise those drawn one by one and in pairs, in float32."""
    model, grid = _Elementwise(sde, (16,)), partial(grids.log_snr, steps=steps)
    roles = {"predictor": None, "corrector": None} | {step.role: step}
    sampler = Sampler(roles["predictor"], grid, roles["corrector"])

    def draw(seeds: range) -> Tensor:
        return sampler.sample(model, (len(seeds), 16), noise=SampleNoise(seeds), dtype=torch.float32).x

    whole = draw(range(7))
    parts = [draw(range(i, i + n)) for i, n in ((0, 1), (1, 2), (3, 1), (4, 2), (6, 1))]
    return bool(torch.equal(whole, torch.cat(parts)))


def stationary_variance(step: Step, sde: SDE) -> float:
    """A corrector's stationary variance on N(0, I) at a marginal of variance 1 + 1 in x / alpha, relative to it."""
    t = sde.time_at(0.0)
    scale = sde.alpha(t).hypot(sde.sigma(t))
    affine = None if step.needs_density else _one_visit(step, sde, t)
    if affine is not None:
        contraction, noise = affine
        if contraction.abs() >= 1:
            return math.inf
        return (noise / (1 - contraction**2) / scale**2).item()
    evaluate = Gaussian(sde)
    g = torch.Generator().manual_seed(0)
    x = scale * torch.randn(4096, 64, dtype=torch.float64, generator=g)
    (row,) = step.plan(sde, t[None], t[None])
    shape = x.shape

    def draw(k: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=g)

    total, burn, visits = 0.0, 60, 100
    for visit in range(visits):
        x, _ = step.advance(row, x, (), evaluate, draw)
        total += x.square().mean().item() * (visit >= burn)
    return total / (visits - burn) / float(scale) ** 2


class Gaussian(Evaluator):
    """Data N(0, I), with the density that Metropolis steps ask for."""

    def __init__(self, sde: SDE) -> None:
        super().__init__(sde, gaussian_denoiser(0.0, torch.ones((), dtype=torch.float64), None))

    def log_prob(self, x: Tensor, t: float) -> Tensor:
        return -x.square().flatten(1).sum(1) / (2 * (self.sde.alpha(t) ** 2 + self.sde.sigma(t) ** 2))


def _one_visit(step: Step, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor] | None:
    """(A, V) of x' = A x + noise of variance V, if the corrector is affine on Gaussian data."""
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
    """The places of a run's draws among all."""

    def __missing__(self, key: Any) -> int:
        raise ValueError(
            "the step draws other noise when it is run again: it keeps something on self, which no step may"
        )


def _chosen(values: Tensor, keys: Mapping[int, int], k: int) -> Tensor:
    return values[keys[k]].view(1, 1)


def counted_calls(step: Step, sde: SDE, moves: int = 4) -> tuple[float, bool]:
    """Network calls a move, and whether noise was drawn."""
    evaluate, drawn = Gaussian(sde), []
    x = torch.full((2, 3), 0.5, dtype=torch.float64)

    def draw(move: int, k: int) -> Tensor:
        drawn.append(k)
        return torch.full_like(x, 0.3)

    end(travel(step, sde, grids.log_snr(sde, steps=moves), x, evaluate, draw))
    return evaluate.calls / moves, bool(drawn)


@torch.no_grad()
def certify(
    step: Step, sde: SDE | None = None, name: str | None = None, budgets: Sequence[int] = BUDGETS
) -> Certificate:
    """Runs every check on one step: the package's, or one of the user's own.

    Args:
        step: a predictor or a corrector.
        sde: where it is tried; VP with its default rates if left out.
        name: for the tables; the class's name if left out.
        budgets: the numbers of steps for the bias.

    Raises:
        ValueError: the step refuses the SDE or the grids.
    """
    if not isinstance(step, Step):
        raise ValueError(f"what is certified is a Step, e.g. Heun(), got {step!r}")
    sde, budgets = sde or _default_sde(), wholes("budgets", budgets)
    counted, stochastic = counted_calls(step, sde)
    declared = measured = residual = stationary = math.nan
    exact, table = None, pd.DataFrame(columns=["steps", "calls", "mean", "std"])
    if step.role == "predictor":
        declared = float(step.order)
        error, finest = (weak_error, 512) if stochastic else (ode_error, 256)
        measured = measured_order(partial(error, step, sde), finest)
        residual, table = point_mass_residual(step, sde), bias(step, sde, budgets)
        exact = None if stochastic else polynomial_exactness(step, sde)
    else:
        stationary = stationary_variance(step, sde)
    return Certificate(
        name or type(step).__name__, step.role, stochastic, declared, measured, step.calls, counted, step.point_mass,
        residual, exact, table, step.batch_independent, is_batch_independent(step, sde), stationary,
    )  # fmt: skip


@functools.cache
def _default_sde() -> SDE:
    return VPSDE()


MACHINERY = (Carry, Renoise)
"""Steps that are the sampler's own."""


def discover(base: type[Step] = Step) -> dict[str, Step]:
    """Every step of the package and of modules imported by the user: default settings, then each class's presets.

    Classes that cannot be built without arguments and have no presets (a table from a file) are left out.
    """
    found: dict[str, Step] = {}
    for cls in base.__subclasses__():
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_") and cls not in MACHINERY:
            required = [p for p in inspect.signature(cls).parameters.values() if p.default is p.empty]
            settings: dict[str, Mapping[str, Any]] = {} if required else {cls.__name__: {}}
            settings |= vars(cls).get("presets", {})
            found |= {name: cls(**options) for name, options in settings.items()}
        found |= discover(cls)
    return found


@dataclass(frozen=True)
class Certificates:
    """A table of certificates (`table`) and what contradicts a declaration (`faults`)."""

    certificates: list[Certificate]

    @property
    def table(self) -> pd.DataFrame:
        """One row a step, predictors by declared order first."""
        rows = pd.DataFrame([certificate.row() for certificate in self.certificates])
        return rows.sort_values(
            ["role", "noise", "order", "step"], ascending=[False, True, True, True], ignore_index=True
        )

    @property
    def faults(self) -> dict[str, list[str]]:
        """What contradicts a declaration, by step."""
        return {c.name: c.faults for c in self.certificates if c.faults}


def certify_all(
    sde: SDE | None = None, steps: Mapping[str, Step] | None = None, budgets: Sequence[int] = BUDGETS,
    progress: bool = False,
) -> Certificates:  # fmt: skip
    """Certificates of every known step (see `discover`), or of the steps given by name."""
    found = discover() if steps is None else steps
    if not found:
        raise ValueError("no step to certify: give one or more")
    bar = tqdm(found.items(), desc="certifying", disable=not progress, leave=False)
    return Certificates([certify(step, sde, name, budgets) for name, step in bar])

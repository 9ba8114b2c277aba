r"""Diagnostics of a learned score: how far it is from the exact one, where, and whether it is a score at all.

All errors are of the predicted noise n = -sigma score, per dimension, so that 1 is the size of the noise itself:

    loss E|eps - n|^2 / d  =  irreducible E|eps - n*|^2 / d  +  Fisher divergence E|n - n*|^2 / d,      x_t ~ p_t,

with the exact n*. An exact score obeys the Fokker-Planck equation and has a symmetric Jacobian, and its denoiser is
calibrated.
Source: Vincent 2011; Lai et al. 2023, https://arxiv.org/abs/2210.04296 (score Fokker-Planck equation).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from score_sde.checks import whole
from score_sde.keyed import generator
from score_sde.progress import tqdm
from score_sde.score import ExactScore, ScoreModel, checked_condition
from score_sde.sde import SDE, expand
from score_sde.targets import Target
from score_sde.trace import ExactTrace

__all__ = [
    "Calibration",
    "Consistency",
    "Diagnosis",
    "ScoreError",
    "asymmetry",
    "calibration",
    "check_target",
    "consistency",
    "diagnose",
    "field_error",
    "fokker_planck_residual",
    "score_error",
]

Condition = Mapping[str, Any] | None
"""A condition by name, as `Sampler.sample` takes it for as many samples as there are points; one label serves all points."""


@dataclass(frozen=True)
class ScoreError:
    """Errors by noise level, each float64 of shape (levels,).

    Attributes:
        times, half_log_snr: the levels, equally spaced in lambda, least noisy first.
        fisher: E|n - n*|^2 / d.
        std_error: of `fisher`.
        relative: E|n - n*|^2 / E|n*|^2.
        loss: E|eps - n|^2 / d, what training minimises.
        irreducible: E|eps - n*|^2 / d, the least value it can take.
    """

    times: Tensor
    half_log_snr: Tensor
    fisher: Tensor
    std_error: Tensor
    relative: Tensor
    loss: Tensor
    irreducible: Tensor

    @property
    def mean(self) -> float:
        """The mean of `fisher` over lambda.

        Multiplied by d and the span of lambda it bounds KL(p_0 || law of the reverse SDE's samples), up to the errors at the
        two ends of time. The probability-flow ODE may be farther from p_0.

        Source: Song et al. 2021, https://arxiv.org/abs/2101.09258, theorem 1.
        """
        return (torch.trapezoid(self.fisher, self.half_log_snr) / (self.half_log_snr[-1] - self.half_log_snr[0])).item()


@torch.no_grad()
def score_error(
    model: ScoreModel, target: Target, *, levels: int = 32, count: int = 2000, seed: int = 0,
    condition: Condition = None,
) -> ScoreError:  # fmt: skip
    """Compares a model with the exact score of closed-form data at `levels` noise levels, on `count` new points each."""
    exact, times = ExactScore(target, model.sde), _levels(model.sde, levels)
    source, rows = generator(seed, "score error"), []
    named = checked_condition(model, (whole("count", count), *target.event_shape), condition, model.device)
    for t in times.tolist():
        x0, noise = _draw(model, target, count, source)
        x = model.sde.perturb(x0, t, noise)
        # In double precision even for x in single: under little noise n* is a small difference of large numbers.
        found, truth = model(x, t, **named).noise.double(), exact(x.double(), t).noise
        excess, size = _mean_square(found - truth), _mean_square(truth)
        rows.append([excess.mean(), excess.std() / math.sqrt(count), excess.mean() / size.mean(),
                     _mean_square(noise - found).mean(), _mean_square(noise - truth).mean()])  # fmt: skip
    columns = torch.tensor(rows, dtype=torch.float64).T
    return ScoreError(times, model.sde.half_log_snr(times), *columns)


@torch.no_grad()
def field_error(model: ScoreModel, target: Target, x: Tensor, t: float, condition: Condition = None) -> Tensor:
    """|n - n*| / sqrt(d) at points x (count, *event) at time t, shape (count,), to plot over space."""
    truth = ExactScore(target, model.sde)(x.double(), t).noise
    named = checked_condition(model, x.shape, condition, x.device)
    return _mean_square(model(x, t, **named).noise - truth).sqrt()


@torch.no_grad()
def fokker_planck_residual(model: ScoreModel, x: Tensor, t: float | Tensor, condition: Condition = None) -> Tensor:
    """R = n - dn/du - sigma grad |n|^2 + sigma^2 grad tr(dn/dx), shape (batch, *event); 0 for the score of any law.

    u = -lambda, and dn/du is taken at fixed x / alpha. In z = x / alpha and s = sigma / alpha, log p obeys the heat equation
    d log p / d(s^2) = (Laplacian log p + |grad log p|^2) / 2; R is 2 s^3 times the gradient of its left minus its right side.
    """
    sde, named = model.sde, checked_condition(model, x.shape, condition, x.device)
    t = torch.as_tensor(t, dtype=torch.float64).expand(len(x)).to(x.device).contiguous()
    sigma = expand(sde.sigma(t), x)

    def noise(v: Tensor, time: Tensor) -> Tensor:
        return model(v, time, **named).noise

    def divergence(v: Tensor) -> Tensor:
        _, pull = torch.func.vjp(lambda y: noise(y, t), v)  # type: ignore[misc]
        return ExactTrace(x.flatten(1))(
            lambda w: pull(w.view_as(x))[0].flatten(1), torch.arange(len(x), device=x.device)
        ).sum()

    along = (expand(sde.drift(t), x) * x, torch.ones_like(t))
    value, change = torch.func.jvp(noise, (x, t), along)  # type: ignore[misc]
    change = change * expand(2 * (sde.sigma(t) / sde.diffusion(t)) ** 2, x)
    square = torch.func.grad(lambda v: noise(v, t).square().sum())(x)
    return value - change - sigma * square + sigma**2 * torch.func.grad(divergence)(x)


@torch.no_grad()
def asymmetry(model: ScoreModel, x: Tensor, t: float | Tensor, condition: Condition = None) -> Tensor:
    """|J - J^T|_F / (2 |J|_F) of the denoiser's Jacobian at each point, shape (batch,): 0 if the field is conservative.

    It is 1 for a pure rotation. Costs one vector-Jacobian product per dimension.
    """
    named = checked_condition(model, x.shape, condition, x.device)
    _, pull = torch.func.vjp(lambda v: model(v, t, **named).denoised, x)  # type: ignore[misc]
    size = x[0].numel()
    basis = torch.eye(size, dtype=x.dtype, device=x.device)[:, None].expand(size, len(x), size)
    jacobian = torch.func.vmap(lambda v: pull(v.view_as(x))[0].flatten(1))(basis).movedim(0, 1).double()
    odd = (jacobian - jacobian.mT).square().sum((1, 2)).sqrt() / 2
    return odd / jacobian.square().sum((1, 2)).sqrt().clamp_min(1e-300)


def check_target(target: Target, *, count: int = 64, tolerance: float = 1e-3) -> None:
    """Checks a law's denoiser against its density by Tweedie's formula for x = alpha x_0 + sigma eps,

        E[x_0 | x] = (x + sigma^2 grad log p(x)) / alpha,    p the `marginal(alpha, sigma)`,

    on `count` draws of x in float64 at four noise levels. A law without `marginal` is not checked. Source: Efron 2011,
    Tweedie's formula and selection bias, https://doi.org/10.1198/jasa.2011.tm11181.

    Raises:
        ValueError: the two sides differ by more than `tolerance` standard deviations of the data.
    """
    if not hasattr(target, "marginal"):
        return
    source, alpha, unit = generator(0, "check target"), 0.8, float(target.std) or 1.0
    for ratio in (0.1, 0.5, 2.0, 10.0):
        sigma = alpha * ratio * unit
        x_0 = target.sample((count,), generator=source).double()
        x = alpha * x_0 + sigma * torch.randn(x_0.shape, generator=source, dtype=torch.float64)
        expected = (x + sigma**2 * Target.score(target.marginal(alpha, sigma), x)) / alpha
        miss = ((target.denoise(x, alpha, sigma) - expected).abs().max() / unit).item()
        if not miss <= tolerance:
            raise ValueError(f"{type(target).__name__}.denoise contradicts marginal(alpha, sigma).log_prob: at alpha={alpha}, "
                             f"sigma={sigma:.3g} it is up to {miss:.2g} data standard deviations from "
                             "(x + sigma^2 grad log_prob(x)) / alpha")  # fmt: skip


@dataclass(frozen=True)
class Calibration:
    """Whether D(x_t) is a posterior mean of x_0, by noise level; each float64 of shape (levels,).

    Attributes:
        times, half_log_snr: the levels, least noisy first.
        slope: of the regression of x_0 on D over all dimensions, 1 for a posterior mean; below 1, D varies too much.
        slope_error: standard error of `slope`, large where D hardly varies.
        bias: E(x_0 - D), in root mean square over dimensions.
        bias_floor: the bias that a posterior mean would have from the finite number of points alone.
        mse: E|x_0 - D|^2 / d.
        predicted_mse: E sigma^2 / alpha tr(dD/dx) / d, the posterior variance that the model's own Jacobian implies.
    """

    times: Tensor
    half_log_snr: Tensor
    slope: Tensor
    slope_error: Tensor
    bias: Tensor
    bias_floor: Tensor
    mse: Tensor
    predicted_mse: Tensor


@torch.no_grad()
def calibration(
    model: ScoreModel, x0: Tensor, *, levels: int = 16, seed: int = 0, condition: Condition = None
) -> Calibration:
    """Regresses clean data x0 (n, *event) on the denoiser's output at each level; no exact score is needed."""
    times = _levels(model.sde, levels)
    source = generator(seed, "calibration", device=x0.device)
    named = checked_condition(model, x0.shape, condition, x0.device)
    trace, ids, rows = ExactTrace(x0.flatten(1)), torch.arange(len(x0), device=x0.device), []
    for t in times.tolist():
        noise = torch.randn(x0.shape, generator=source, dtype=x0.dtype, device=x0.device)
        x = model.sde.perturb(x0, t, noise)
        denoised, pull = torch.func.vjp(lambda v, t=t: model(v, t, **named).denoised, x)  # type: ignore[misc]

        def products(v: Tensor, pull: Any = pull) -> Tensor:
            return pull(v.view_as(x0))[0].flatten(1)

        variance = trace(products, ids).mean() / x0[0].numel()
        variance = variance * model.sde.sigma(t) ** 2 / model.sde.alpha(t)
        error, centred = (x0 - denoised).double(), (denoised - denoised.mean(0)).double()
        spread = centred.square().sum().clamp_min(1e-300)
        slope = 1 + (error * centred).sum() / spread
        residual = error - error.mean(0) - (slope - 1) * centred
        slope_error = (residual * centred).flatten(1).sum(1).square().sum().sqrt() / spread
        bias, floor = error.mean(0).square().mean().sqrt(), (error.square().mean() / len(x0)).sqrt()
        rows.append([slope, slope_error, bias, floor, error.square().mean(), variance])
    return Calibration(times, model.sde.half_log_snr(times), *torch.tensor(rows, dtype=torch.float64).T)


@dataclass(frozen=True)
class Consistency:
    """Whether the model is the score of any law at all, by noise level; each float64 of shape (levels,).

    Attributes:
        times, half_log_snr: the levels, least noisy first.
        residual: of the Fokker-Planck equation, in root mean square over points and dimensions; 1 is the noise's size.
        asymmetry: of the denoiser's Jacobian, mean over points; 0 for a conservative field, 1 for a rotation.
    """

    times: Tensor
    half_log_snr: Tensor
    residual: Tensor
    asymmetry: Tensor


def consistency(
    model: ScoreModel, x0: Tensor, *, levels: int = 16, seed: int = 0, condition: Condition = None
) -> Consistency:
    """`fokker_planck_residual` and `asymmetry` on clean data x0 (n, *event) noised to each level; needs no exact score."""
    times = _levels(model.sde, levels)
    source, rows = generator(seed, "consistency", device=x0.device), []
    for t in times.tolist():
        x = model.sde.perturb(x0, t, torch.randn(x0.shape, generator=source, dtype=x0.dtype, device=x0.device))
        residual = _mean_square(fokker_planck_residual(model, x, t, condition)).mean().sqrt()
        rows.append([residual, asymmetry(model, x, t, condition).double().mean()])
    return Consistency(times, model.sde.half_log_snr(times), *torch.tensor(rows, dtype=torch.float64).T)


@dataclass(frozen=True)
class Diagnosis:
    """All diagnostics of a model of closed-form data at the same noise levels."""

    error: ScoreError
    calibration: Calibration
    consistency: Consistency

    @property
    def table(self) -> pd.DataFrame:
        """A row per level: time, noise sigma / alpha, and all diagnostics by name."""
        columns = {"time": self.error.times, "noise": (-self.error.half_log_snr).exp()}
        for part in (self.error, self.calibration, self.consistency):
            columns |= {name: v for name, v in vars(part).items() if name not in ("times", "half_log_snr")}
        return pd.DataFrame({name: column.numpy() for name, column in columns.items()})


def diagnose(
    model: ScoreModel,
    target: Target,
    *,
    levels: int = 16,
    count: int = 2000,
    seed: int = 0,
    condition: Condition = None,
) -> Diagnosis:
    """Score error, calibration and consistency of a model of a known target; the latter two use a quarter of `count`.

    Calibration and consistency need a vector-Jacobian product per dimension, so this is for data of few dimensions. Since the
    parts use different numbers of points, the condition must be one that serves any number.
    """
    x0 = target.sample((max(2, count // 4),), generator=generator(seed, "diagnosis")).to(model.device)
    shared: dict[str, Any] = {"levels": levels, "seed": seed, "condition": condition}
    parts: list[Callable[[], Any]] = [
        partial(score_error, model, target, count=count, **shared),
        partial(calibration, model, x0, **shared), partial(consistency, model, x0, **shared),
    ]  # fmt: skip
    return Diagnosis(*(part() for part in tqdm(parts, desc="diagnosis", delay=2, leave=False)))


def _levels(sde: SDE, count: int) -> Tensor:
    first, last = sde.half_log_snr_range
    levels = torch.linspace(last, first, whole("levels", count, 2), dtype=torch.float64)
    return sde.time_at(levels).clamp(sde.t_min, sde.t_max)


def _draw(model: ScoreModel, target: Target, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x0 = target.sample((count,), generator=generator)
    noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    return x0.to(model.device), noise.to(model.device)


def _mean_square(v: Tensor) -> Tensor:
    return v.double().square().flatten(1).mean(1)

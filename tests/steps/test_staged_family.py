"""Staged steps against the algorithm boxes of their papers, written out independently."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from closed_forms import plane

from score_sde import VPSDE, ExactScore, Sampler, grid
from score_sde.noise import BatchNoise
from score_sde.steps import DPMSolverSDE, DPMSolverSinglestep, ExponentialAdams, Heun, RungeKutta, RungeKutta2

SDE = VPSDE()
MODEL = ExactScore(plane(), SDE)
TIMES = grid.log_snr(SDE, steps=4)
X = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def sample(step):
    return Sampler(step, lambda sde: TIMES, final="none").sample(MODEL, (5, 2), x_init=X, seed=0)


def read(lmbda):
    t = SDE.time_at(torch.tensor(lmbda, dtype=torch.float64))
    return t.item(), SDE.alpha(t).item(), SDE.sigma(t).item()


def runge_kutta(matrix, weights, x):
    """dy/dl = (y - D(y)) / l on y = x / alpha, slopes kept as tensors."""
    levels = (-SDE.half_log_snr(TIMES)).exp().tolist()
    y = x / SDE.alpha(TIMES[0]).item()

    def slope(y, level):
        t, alpha, _ = read(-np.log(level))
        return (y - MODEL(alpha * y, t).denoised) / level

    for level, end in pairwise(levels):
        h, slopes = end - level, [slope(y, level)]
        for row in matrix:
            slopes.append(slope(y + h * sum(w * k for w, k in zip(row, slopes, strict=True)), level + h * sum(row)))
        y = y + h * sum(w * k for w, k in zip(weights, slopes, strict=True))
    return y * SDE.alpha(TIMES[-1]).item()


@pytest.mark.parametrize(
    ("step", "matrix", "weights"),
    [
        (RungeKutta(), ((1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
        (RungeKutta2(0.5), ((1 / 2,),), (0, 1)),
        (RungeKutta2(2 / 3), ((2 / 3,),), (1 / 4, 3 / 4)),
        (RungeKutta2(1.0), ((1.0,),), (1 / 2, 1 / 2)),
        (Heun(), ((1.0,),), (1 / 2, 1 / 2)),
    ],
    ids=["classical", "midpoint", "Ralston", "alpha 1", "Heun"],
)
def test_the_table_is_the_method_in_edms_variables(step, matrix, weights):
    result = sample(step)
    torch.testing.assert_close(result.x, runge_kutta(matrix, weights, X), rtol=1e-8, atol=1e-8)
    assert result.nfe == len(weights) * 4 == step.calls * 4


def noise_of(x, t, alpha, sigma):
    return (x - alpha * MODEL(x, t).denoised) / sigma


def dpm_solver(order, x):
    """Lu et al. 2022a, algorithms 1 and 2: exponents in +h, on the noise."""
    for start, end in pairwise(TIMES):
        lam, h = SDE.half_log_snr(start).item(), (SDE.half_log_snr(end) - SDE.half_log_snr(start)).item()
        (t, a, s), (_, a2, s2) = read(lam), read(lam + h)
        e0 = noise_of(x, t, a, s)
        if order == 2:
            tm, am, sm = read(lam + h / 2)
            u = am / a * x - sm * np.expm1(h / 2) * e0
            x = a2 / a * x - s2 * np.expm1(h) * noise_of(u, tm, am, sm)
            continue
        r1, r2 = 1 / 3, 2 / 3
        t1, a_1, s_1 = read(lam + r1 * h)
        t2, a_2, s_2 = read(lam + r2 * h)
        u1 = a_1 / a * x - s_1 * np.expm1(r1 * h) * e0
        d1 = noise_of(u1, t1, a_1, s_1) - e0
        u2 = a_2 / a * x - s_2 * np.expm1(r2 * h) * e0 - s_2 * r2 / r1 * (np.expm1(r2 * h) / (r2 * h) - 1) * d1
        d2 = noise_of(u2, t2, a_2, s_2) - e0
        x = a2 / a * x - s2 * np.expm1(h) * e0 - s2 / r2 * (np.expm1(h) / h - 1) * d2
    return x


def dpm_solver_plus_plus(order, x):
    """Lu et al. 2022b, algorithm 1 and its third order: exponents in -h, on the denoised."""
    for start, end in pairwise(TIMES):
        lam, h = SDE.half_log_snr(start).item(), (SDE.half_log_snr(end) - SDE.half_log_snr(start)).item()
        (t, _, s), (_, a2, s2) = read(lam), read(lam + h)
        D0 = MODEL(x, t).denoised
        if order == 2:
            tm, am, sm = read(lam + h / 2)
            u = sm / s * x - am * np.expm1(-h / 2) * D0
            x = s2 / s * x - a2 * np.expm1(-h) * MODEL(u, tm).denoised
            continue
        r1, r2 = 1 / 3, 2 / 3
        t1, a_1, s_1 = read(lam + r1 * h)
        t2, a_2, s_2 = read(lam + r2 * h)
        u1 = s_1 / s * x - a_1 * np.expm1(-r1 * h) * D0
        d1 = MODEL(u1, t1).denoised - D0
        u2 = s_2 / s * x - a_2 * np.expm1(-r2 * h) * D0 + a_2 * r2 / r1 * (np.expm1(-r2 * h) / (r2 * h) + 1) * d1
        d2 = MODEL(u2, t2).denoised - D0
        x = s2 / s * x - a2 * np.expm1(-h) * D0 + a2 / r2 * (np.expm1(-h) / h + 1) * d2
    return x


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(("prediction", "published"), [("noise", dpm_solver), ("denoised", dpm_solver_plus_plus)])
def test_single_step_dpm_solver_is_the_published_algorithm(prediction, published, order):
    result = sample(DPMSolverSinglestep(order, prediction))
    torch.testing.assert_close(result.x, published(order, X), rtol=1e-8, atol=1e-8)
    assert result.nfe == order * 4


@pytest.mark.parametrize(("last", "order"), [((), 3), ((2,), 3), ((1,), 2), ((2, 1), 2)])
def test_a_last_move_limits_the_order_of_convergence_to_one_more_than_its_own(last, order):
    step = DPMSolverSinglestep(3, last=last)

    def end(step, steps):
        return Sampler(step, partial(grid.log_snr, steps=steps), final="none").sample(MODEL, (5, 2), x_init=X).x

    exact = end(DPMSolverSinglestep(3), 1024)
    coarse, fine = ((end(step, steps) - exact).abs().max().item() for steps in (64, 128))
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.3)
    assert step.order == order


@pytest.mark.parametrize("prediction", ["denoised", "noise"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_the_first_order_step_is_exponential_adams(prediction, eta):
    one = sample(DPMSolverSDE(eta, order=1, prediction=prediction))
    other = sample(ExponentialAdams(1, eta, prediction))
    torch.testing.assert_close(one.x, other.x, rtol=1e-12, atol=1e-12)
    assert one.nfe == 4


def test_without_noise_the_stochastic_two_stage_step_is_2s():
    torch.testing.assert_close(
        sample(DPMSolverSDE(eta=0.0)).x, sample(DPMSolverSinglestep(2)).x, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(("eta", "r"), [(1.0, 0.5), (0.6, 0.3)])
def test_the_two_noises_of_a_stochastic_step_are_one_path(eta, r):
    # With D held fixed, noise at u and at s has the covariance (sigma_s / sigma_u) e^{-eta^2 (lam_s - lam_u)} Var_u.
    t, s = (torch.tensor([v], dtype=torch.float64) for v in (0.6, 0.4))
    trial, last = DPMSolverSDE(eta, r).stages(SDE, t, s)
    lam, end = SDE.half_log_snr(t), SDE.half_log_snr(s)
    middle = lam + r * (end - lam)
    torch.testing.assert_close(SDE.half_log_snr(trial.time), middle, rtol=1e-12, atol=1e-12)

    def variance(time, to):
        return SDE.sigma(time) ** 2 * -torch.expm1(-2 * eta**2 * (to - lam))

    decay = SDE.sigma(s) / SDE.sigma(trial.time) * (-(eta**2) * (end - middle)).exp()
    torch.testing.assert_close(trial.c[0] ** 2, variance(trial.time, middle), rtol=1e-12, atol=0)
    torch.testing.assert_close(trial.c[0] * last.c[0], decay * variance(trial.time, middle), rtol=1e-12, atol=0)
    torch.testing.assert_close(last.c[0] ** 2 + last.c[1] ** 2, variance(s, end), rtol=1e-12, atol=0)


def test_a_stochastic_step_draws_each_increment_once():
    step, drawn = DPMSolverSDE(), []
    stream = BatchNoise(0).open((5, 2), torch.float64, "cpu")

    def draw(k):
        drawn.append(k)
        return stream(0, k)

    (row,) = step.plan(SDE, TIMES[:1], TIMES[1:2])
    step.advance(row, X, (), MODEL, draw)
    assert drawn == [0, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RungeKutta2(0.0), r"lies in \(0, 1\]"),
        (lambda: RungeKutta(((0.5,),), (0.5, 0.6)), "sum 1"),
        (lambda: RungeKutta(((1.5,),), (0.5, 0.5)), "inside the step"),
        (lambda: RungeKutta(((0.5, 0.5),), (0.5, 0.5)), "rows of lengths"),
        (lambda: DPMSolverSinglestep(4), "orders 1 to 3"),
        (lambda: DPMSolverSinglestep(3, last=(2, 0)), "orders 1 to 3, got order=0"),
        (lambda: DPMSolverSinglestep(2, "score"), "prediction is one of denoised, noise"),
        (lambda: DPMSolverSinglestep(3, weights="midpoint"), "up to order 2, 'midpoint'"),
        (lambda: DPMSolverSDE(eta=-0.1), "eta >= 0"),
        (lambda: DPMSolverSDE(r=0.0), r"r lies in \(0, 1\] at order 2"),
        (lambda: DPMSolverSDE(r=0.7, order=3), r"r lies in \(0, 2/3\) at order 3"),
        (lambda: Sampler(None, partial(grid.uniform, steps=2)), "predictor, a corrector or both"),
    ],
)
def test_unknown_options_are_refused_when_the_step_is_built(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""Coefficients of the linear steps in the words of the papers, and the polynomials they integrate exactly."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from closed_forms import F64
from scipy.integrate import quad, solve_ivp

from score_sde import grid
from score_sde.guidance import StaticThreshold
from score_sde.parameterization import Denoised, Karras, Noise, Velocity
from score_sde.prediction import Prediction
from score_sde.sampler import Sampler
from score_sde.score import ExactScore, LearnedScore
from score_sde.sde import SDE, VESDE, VPSDE, DiscreteSDE, KarrasSDE
from score_sde.steps import (
    DDIM,
    IPNDM,
    Ancestral,
    DPMSolverSDE,
    ERSDESolver,
    EulerMaruyama,
    ExponentialAdams,
    GradientEstimation,
    LearnedVariance,
    LinearStep,
    ProbabilityFlowEuler,
    RectifiedAdams,
    ReverseDiffusion,
    SASolver,
)
from score_sde.steps.linear import Carry, LinearRow, Renoise
from score_sde.targets import GaussianMixture


def row(step: LinearStep, sde: SDE, t: float, s: float):
    return step.plan(sde, torch.tensor([t], dtype=F64), torch.tensor([s], dtype=F64))[0]


def of_score(step: LinearStep, sde: SDE, t: float, s: float) -> tuple[float, float, float]:
    """(p, q, c) of x_s = p x + q score + c z: the row with D = (x + sigma^2 score) / alpha put in."""
    a, (b,), c = row(step, sde, t, s)[1:4]
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    return a + b / alpha, b * sigma**2 / alpha, c


DDPM = DiscreteSDE.ddpm()
BETA = torch.linspace(1e-4, 0.02, 1000, dtype=F64).tolist()
SIGMA = torch.linspace(math.log(0.01), math.log(50.0), 1000, dtype=F64).exp().tolist()
SMLD = DiscreteSDE.smld(SIGMA)


@pytest.mark.parametrize("i", [1, 500, 999])
def test_reverse_diffusion_is_songs(i):
    """VP: x <- (2 - sqrt(1 - beta)) x + beta s + sqrt(beta) z. VE: G^2 = sigma_i^2 - sigma_{i-1}^2."""
    beta, grown = BETA[i], SIGMA[i] ** 2 - SIGMA[i - 1] ** 2
    assert of_score(ReverseDiffusion(), DDPM, i, i - 1) == pytest.approx(
        (2 - math.sqrt(1 - beta), beta, math.sqrt(beta)), rel=1e-9
    )
    assert of_score(ReverseDiffusion(), SMLD, i, i - 1) == pytest.approx((1, grown, math.sqrt(grown)), rel=1e-9)


@pytest.mark.parametrize("i", [1, 500, 999])
def test_ancestral_is_ddpms_and_smlds(i):
    """VP: x <- (x + beta s) / sqrt(1 - beta) + noise, of variance beta or the posterior's. VE: SMLD's."""
    beta, below, here = BETA[i], SIGMA[i - 1] ** 2, SIGMA[i] ** 2
    mean = (1 / math.sqrt(1 - beta), beta / math.sqrt(1 - beta))
    alpha_bar = np.cumprod(1 - np.array(BETA))
    posterior = math.sqrt(beta * (1 - alpha_bar[i - 1]) / (1 - alpha_bar[i]))
    assert of_score(Ancestral("forward"), DDPM, i, i - 1) == pytest.approx((*mean, math.sqrt(beta)), rel=1e-8)
    assert of_score(Ancestral(), DDPM, i, i - 1) == pytest.approx((*mean, posterior), rel=1e-8)
    smld = (1, here - below, math.sqrt(below * (here - below) / here))
    assert of_score(Ancestral(), SMLD, i, i - 1) == pytest.approx(smld, rel=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_is_the_papers(eta):
    """sigma = eta sqrt((1 - a') / (1 - a)) sqrt(1 - a / a'); x' = sqrt(a') x0 + sqrt(1 - a' - sigma^2) eps + sigma z"""
    t, s = 700, 400
    here, there = (float(DDPM.alpha(v)) ** 2 for v in (t, s))
    sigma = eta * math.sqrt((1 - there) / (1 - here)) * math.sqrt(1 - here / there)
    of_eps = math.sqrt(1 - there - sigma**2)
    a, (b,), c = row(DDIM(eta), DDPM, t, s)[1:4]
    # x = sqrt(a) x0 + sqrt(1 - a) eps in the row's own terms.
    assert a * math.sqrt(here) + b == pytest.approx(math.sqrt(there), rel=1e-12)
    assert a * math.sqrt(1 - here) == pytest.approx(of_eps, rel=1e-12)
    assert c == pytest.approx(sigma, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("sde", [VPSDE(), VESDE(), KarrasSDE()], ids=repr)
def test_euler_steps_are_the_equations(sde):
    """x + h (f x - g^2 s) + g sqrt(-h) z, and x + h (f x - g^2 s / 2)."""
    t, s = 0.6, 0.55
    h, f, g = s - t, float(sde.drift(t)), float(sde.diffusion(t))
    assert of_score(EulerMaruyama(), sde, t, s) == pytest.approx((1 + h * f, -h * g**2, g * math.sqrt(-h)), rel=1e-10)
    assert of_score(ProbabilityFlowEuler(), sde, t, s) == pytest.approx((1 + h * f, -h * g**2 / 2, 0), rel=1e-10)


def test_one_formula_has_many_names(sde):
    """DDIM(1) = Ancestral = first-order SDE-DPM-Solver++; DDIM(0) = first-order DPM-Solver++."""
    t, s = (float(sde.time_at(lmbda)) for lmbda in (-1.0, -0.2))
    posterior = row(Ancestral(), sde, t, s)
    for twin in (DDIM(1.0), ExponentialAdams(1, eta=1.0)):
        other = row(twin, sde, t, s)
        assert (other.a, *other.b, other.c) == pytest.approx((posterior.a, *posterior.b, posterior.c), rel=1e-11)
    first, other = row(DDIM(), sde, t, s), row(ExponentialAdams(1), sde, t, s)
    assert (other.a, *other.b, other.c) == pytest.approx((first.a, *first.b, first.c), rel=1e-11)


def test_dpm_solver_2m_is_the_published_formula():
    """x_s = sigma_s / sigma_t x - alpha_s (e^{-h} - 1) D + second-order correction, for steps h of equal length, where
    the exact weights are alpha_s (1 - e^{-h} + (h - 1 + e^{-h}) / h) and its counterpart."""
    sde = VPSDE()
    r, t, s = sde.time_at(torch.tensor([-1.0, -0.7, -0.4], dtype=F64))
    a, (b0, b1), c = ExponentialAdams(2).coefficients(sde, torch.stack([t, r])[:, None], s[None])
    alpha, h = float(sde.alpha(s)), 0.3
    second = alpha * (h - 1 + math.exp(-h)) / h
    assert float(a) == pytest.approx(float(sde.sigma(s) / sde.sigma(t)), rel=1e-12)
    assert float(b0) == pytest.approx(alpha * -math.expm1(-h) + second, rel=1e-11)
    assert float(b1) == pytest.approx(-second, rel=1e-11)
    assert float(c) == 0


def weights(step: LinearStep, sde: SDE, lambdas: list[float], end: float) -> tuple[list[float], float, float]:
    """(b, a, c) for nodes at given lambdas, the newest first."""
    times, s = sde.time_at(torch.tensor(lambdas, dtype=F64)), sde.time_at(torch.tensor(end, dtype=F64))
    a, b, c = step.coefficients(sde, times[:, None], s[None])
    return [float(v) for v in b], float(a), float(c)


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("gap", [0.02, 0.4, 2.5])
def test_exponential_adams_integrates_polynomials_exactly(order, eta, gap):
    """D = lambda^j, j < order, on uneven nodes: sum b_k lambda_k^j = alpha_s k int_0^h e^{-k u} (lambda_s - u)^j du."""
    sde = VPSDE()
    start = -1.1
    nodes, end = [start, start - 0.7 * gap, start - 1.9 * gap, start - 2.4 * gap][:order], start + gap
    b, a, c = weights(ExponentialAdams(order, eta=eta), sde, nodes, end)
    t, s = (float(sde.time_at(v)) for v in (start, end))
    k = 1 + eta**2
    size = sum(abs(v) for v in b)
    for j in range(order):
        integral = quad(lambda u: math.exp(-k * u) * (end - u) ** j, 0, gap, epsabs=1e-13, epsrel=1e-13)[0]  # noqa: B023
        expected = float(sde.alpha(s)) * k * integral
        found = sum(w * v**j for w, v in zip(b, nodes, strict=True))
        assert abs(found - expected) < 1e-12 * max(1, size) * max(abs(v) ** j for v in [*nodes, 1])
    # Point mass: a sigma_t and c make up sigma_s, and what is left goes to the mean.
    alpha_t, sigma_t = float(sde.alpha(t)), float(sde.sigma(t))
    assert a * alpha_t + sum(b) == pytest.approx(float(sde.alpha(s)), rel=1e-12)
    assert math.hypot(a * sigma_t, c) == pytest.approx(float(sde.sigma(s)), rel=1e-12)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_no_order_is_claimed_that_is_not_there(order):
    """One degree higher is not integrated exactly."""
    sde, nodes, end = VPSDE(), [-1.1, -1.4, -1.9, -2.1][:order], -0.7
    b, _, _ = weights(ExponentialAdams(order), sde, nodes, end)
    integral = quad(lambda u: math.exp(-u) * (end - u) ** order, 0, 0.4)[0]
    expected = float(sde.alpha(sde.time_at(end))) * integral
    assert abs(sum(w * v**order for w, v in zip(b, nodes, strict=True)) - expected) > 1e-4


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_exponential_adams_solves_the_family_of_reverse_equations(eta):
    """Mean and variance of dx = [f x - (1 + eta^2) g^2 score / 2] dt + eta g dw with D = 2 - lambda, by scipy."""
    sde = VPSDE()
    nodes, end = [-0.5, -1.3], 0.4
    t, s = (float(sde.time_at(v)) for v in (nodes[0], end))

    def rates(u, y):
        f, g2, variance = float(sde.drift(u)), float(sde.diffusion(u)) ** 2, float(sde.sigma(u)) ** 2
        k, alpha, D = (1 + eta**2) / 2, float(sde.alpha(u)), 2 - float(sde.half_log_snr(u))
        growth = f + k * g2 / variance  # of x, from -k g^2 (alpha D - x) / sigma^2
        return [growth * y[0] - k * g2 * alpha * D / variance, 2 * growth * y[1] - eta**2 * g2]

    y = solve_ivp(rates, (t, s), [0.8, 0.3], "DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
    b, a, c = weights(ExponentialAdams(2, eta=eta), sde, nodes, end)
    assert a * 0.8 + b[0] * 2.5 + b[1] * 3.3 == pytest.approx(y[0], rel=1e-9)
    assert a**2 * 0.3 + c**2 == pytest.approx(y[1], rel=1e-9)


def test_first_moves_use_the_outputs_there_are_and_a_break_starts_anew():
    sde = VPSDE()
    t = torch.tensor([1.0, 0.8, 0.6, 0.7, 0.5, 0.4], dtype=F64)
    s = torch.tensor([0.8, 0.6, 0.5, 0.5, 0.4, 0.3], dtype=F64)
    rows = ExponentialAdams(3).plan(sde, t, s)
    assert [len(r.b) for r in rows] == [1, 2, 3, 1, 2, 3]
    assert [r.t for r in rows] == t.tolist()
    _, expected, _ = ExponentialAdams(3).coefficients(sde, t[[2, 1, 0]][:, None], s[2:3])
    assert rows[2].b == pytest.approx([float(v) for v in expected])


def test_carrying_and_renoising(sde):
    t, s = (float(sde.time_at(lmbda)) for lmbda in (0.5, -0.5))
    scale, std = (float(v) for v in sde.transition_kernel(t, s))
    for step, noise in ((Carry(), 0.0), (Renoise(), std)):
        a, b, c = row(step, sde, t, s)[1:4]
        assert (a, b, c) == (pytest.approx(scale), (), pytest.approx(noise))


def test_a_step_without_finite_coefficients_is_refused():
    sde = VPSDE()
    with pytest.raises(ValueError, match=r"EulerMaruyama has no finite coefficients at t=0\.5 of VPSDE"):
        row(EulerMaruyama(), sde, 0.5, 0.6)
    with pytest.raises(ValueError, match="choose a grid that avoids this time"):
        row(Renoise(), sde, 0.6, 0.5)
    t = torch.tensor([0.9, 0.5], dtype=F64)
    with pytest.raises(ValueError, match=r"at t=0\.9 and every later time of VPSDE\(.*\): choose another step"):
        Euler(lambda b: [b / 0]).plan(sde, t, t / 2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ExponentialAdams(order=0), "orders 1 to 4, got order=0"),
        (lambda: ExponentialAdams(order=7), "orders 1 to 4, got order=7"),
        *(
            (lambda kind=kind, eta=eta: kind(eta=eta), "eta >= 0")
            for kind in (ExponentialAdams, SASolver, ERSDESolver, DPMSolverSDE)
            for eta in (-1.0, math.nan, math.inf, 1e200, "one")
        ),
        (lambda: DPMSolverSDE(r="half"), "give a number r"),
        (lambda: GradientEstimation(math.nan), "gamma is a finite number"),
        (lambda: DDIM(eta=1.5), r"eta lies in \[0, 1\]"),
        (lambda: DDIM(eta=math.nan), r"eta lies in \[0, 1\]"),
        (lambda: Ancestral("large"), "variance is one of posterior, forward"),
    ],
)
def test_impossible_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message) as refusal:
        build()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "parameterization", [Noise(), Denoised(), Velocity(), Karras(0.5)], ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize("step", [DDIM(), EulerMaruyama(), IPNDM(1), RectifiedAdams(1)], ids=lambda s: type(s).__name__)
def test_a_step_without_memory_need_not_form_what_it_weighs(step, parameterization):
    """(a + b p) x + b q F is a x + b N, N = p x + q F, for floats and for a time per sample."""

    class Bent(torch.nn.Module):
        def forward(self, x, c_noise):
            return x.sin() + 1

    model, t = LearnedScore(Bent(), VPSDE(), parameterization, (3,)), torch.tensor([0.5], dtype=F64)
    (row,) = step.plan(model.sde, t, t - 0.1)
    x, z = torch.randn(2, 2, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    said = model(x, 0.5)
    expected = row.a * x + row.b[0] * (row.output[0] * said.denoised + row.output[1] * said.noise) + row.c * z
    for evaluate in (model, lambda x, t: model(x, torch.full((2,), t, dtype=F64))):
        found, _ = step.advance(row, x, (), evaluate, lambda k: z)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_noise_is_not_added_into_the_networks_own_output():
    x, output = torch.ones(2, 3), torch.zeros(2, 3)
    said = Prediction(x, output, 0.6, 0.8)
    row = LinearRow(0.5, 0.0, (1.0,), 0.3)  # x_s = D + c z
    moved, _ = DDIM().advance(row, x, (), lambda x, t: said, lambda k: torch.ones(2, 3))
    torch.testing.assert_close(moved, torch.full((2, 3), 0.3))
    assert not output.any()


class Euler(DDIM):
    """A step whose coefficients are written by hand, rightly or wrongly."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def coefficients(self, sde, times, s):
        a, b, c = super().coefficients(sde, times, s)
        return a, self.shape(b[0]), c


def test_weights_are_a_list_of_at_most_memory_tensors():
    t, s = torch.tensor([0.9, 0.5]), torch.tensor([0.5, 0.1])
    assert Euler(lambda b: [b]).plan(VPSDE(), t, s) == DDIM().plan(VPSDE(), t, s)
    with pytest.raises(ValueError, match=r"gives b as a list.* got a tensor of shape \(2,\)"):
        Euler(lambda b: b).plan(VPSDE(), t, s)
    with pytest.raises(ValueError, match=r"at most memory=1, here 1.* got 2 of them"):
        Euler(lambda b: [b / 2, b / 2]).plan(VPSDE(), t, s)


def unpacked(times):
    _, before = times
    return before


@pytest.mark.parametrize("earlier", [lambda times: times[1], unpacked])
def test_a_step_that_needs_more_calls_than_there_were_is_told_so(earlier):
    class Two(DDIM):
        memory = 2

        def coefficients(self, sde, times, s):
            return super().coefficients(sde, times, s + 0 * earlier(times))

    t = torch.tensor([0.9, 0.5], dtype=F64)
    with pytest.raises(ValueError, match=r"Two\.coefficients fails .*in the first moves of a run fewer"):
        Two().plan(VPSDE(), t, t / 2)


class Unasked(torch.nn.Module):
    def forward(self, x, c_noise):
        raise AssertionError("asked")


def test_a_learned_variance_lies_between_two_on_a_logarithmic_scale():
    """w = 0 and 1 are the two steps; between them the noise's standard deviation is their weighted geometric mean."""
    small, large = Ancestral(), Ancestral("forward")
    step, sde, times = LearnedVariance(small, large), DiscreteSDE.ddpm(100), partial(grid.uniform, steps=20)

    class Knowing(ExactScore):
        weight: float | None = 0.0

        def __call__(self, x, t, **condition):
            weight = None if self.weight is None else torch.full_like(x, self.weight)
            return replace(super().__call__(x, t, **condition), variance_weight=weight)

    model = Knowing(GaussianMixture([1.0], [[0.5, 0.0]], [[[0.3, 0.1], [0.1, 0.2]]]), sde)
    for weight, known in ((0.0, small), (1.0, large)):
        model.weight = weight
        mine, theirs = (Sampler(one, times).sample(model, (8, 2), seed=0, dtype=F64).x for one in (step, known))
        torch.testing.assert_close(mine, theirs)
    model.weight = 0.25
    t, s = (torch.tensor([time], dtype=F64) for time in (60.0, 40.0))
    (row,), (low,), (high,) = (one.plan(sde, t, s) for one in (step, small, large))
    x, z = torch.ones(1, 2, dtype=F64), torch.ones(1, 2, dtype=F64)
    still, noisy = (step.advance(row, x, (), model, lambda _, z=z: z)[0] for z in (0 * z, z))
    torch.testing.assert_close(noisy - still, (low.c**0.75 * high.c**0.25) * z)
    model.weight = None
    with pytest.raises(ValueError, match="needs a network with a variance head"):
        Sampler(step, times).sample(model, (8, 2), seed=0)
    bare = LearnedScore(Unasked(), sde, Noise(), (2,))
    for headless in (bare, StaticThreshold(bare)):
        with pytest.raises(ValueError, match="needs a network with a variance head"):
            Sampler(step, times).sample(headless, (8, 2), seed=0)
    for pair in ((DDIM(), large), (small, ExponentialAdams(2))):
        with pytest.raises(ValueError, match="LearnedVariance is between"):
            LearnedVariance(*pair).plan(sde, t, s)

"""Posterior samplers against exact posteriors, their published formulas and each other."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from conftest import few_steps
from exact_models import Shrink

from score_sde import grid
from score_sde.adaptive import AdaptiveODE
from score_sde.adaptive_sde import AdaptiveSDE
from score_sde.guidance import (
    DPS,
    MMPS,
    Autoguidance,
    Blur,
    DiffPIR,
    Downsample,
    Mask,
    Matrix,
    Nonlinear,
    PiGDM,
    Replacement,
    StaticThreshold,
)
from score_sde.guidance.observed import conjugate_residuals
from score_sde.likelihood import log_likelihood
from score_sde.noise import SampleNoise
from score_sde.ode import ProbabilityFlowODE
from score_sde.parallel import ParallelSampler
from score_sde.sampler import Sampler
from score_sde.score import ExactScore, reparameterize
from score_sde.sde import VESDE, VPSDE, DiscreteSDE, KarrasSDE, RectifiedFlow, SubVPSDE
from score_sde.steps import DDIM, Ancestral
from score_sde.targets import GaussianMixture

D, N = 4, 0.3
PARALLEL = ParallelSampler(DDIM(), partial(grid.log_snr, steps=8))


def gaussian(dimensions=D, isotropic=False):
    g = torch.Generator().manual_seed(3)
    root = torch.randn(dimensions, dimensions, generator=g, dtype=torch.float64)
    covariance = 0.49 * torch.eye(dimensions) if isotropic else root @ root.mT / dimensions
    return GaussianMixture([1.0], torch.randn(1, dimensions, generator=g), covariance[None])


def problem(isotropic=False, sde=None):
    target = gaussian(isotropic=isotropic)
    operator = Matrix(torch.randn(2, D, generator=torch.Generator().manual_seed(5)))
    y = torch.tensor([0.7, -0.4], dtype=torch.float64)
    return ExactScore(target, sde or VPSDE()), operator, y, target.condition(operator, y, N)


def points(batch=5, shape=(D,)):
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), VESDE(), KarrasSDE(), RectifiedFlow()], ids=repr)
@pytest.mark.parametrize("method", ["PiGDM", "MMPS"])
@pytest.mark.parametrize("share", [0.05, 0.4, 0.9])
def test_exact_on_a_gaussian(sde, method, share):
    model, operator, y, posterior = problem(method == "PiGDM", sde)
    guided = PiGDM(model, operator, y, N, data_std=0.7) if method == "PiGDM" else MMPS(model, operator, y, N, 2)
    t = sde.t_min + share * (sde.t_max - sde.t_min)
    x = points() * float(sde.sigma(t)) + float(sde.alpha(t))
    exact = ExactScore(posterior, sde)
    for at in (t, torch.full((5,), t, dtype=torch.float64)):
        got, wanted = guided(x, at), exact(x, at)
        torch.testing.assert_close(got.denoised, wanted.denoised, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(got.score, wanted.score, rtol=1e-5, atol=1e-6)
        assert got.calls == 1


def test_dps_is_the_gradient_of_the_likelihood_at_the_denoised_point():
    model, operator, y, _ = problem()
    x, t = points().requires_grad_(), 0.3
    clean = model(x, t).denoised
    loss = -((y - operator(clean)) ** 2).sum() / (2 * N**2)
    (gradient,) = torch.autograd.grad(loss, x)
    got = DPS(model, operator, y, N, zeta=0.5)(x.detach(), t).score - model(x.detach(), t).score
    torch.testing.assert_close(got, 0.5 * gradient)


def test_dps_takes_a_nonlinear_operator():
    model, _, _, _ = problem()
    operator = Nonlinear(lambda x: x.square().sum(1, keepdim=True), (D,))
    x, t, y = points().requires_grad_(), 0.3, torch.tensor([2.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(-((y - operator(model(x, t).denoised)) ** 2).sum() / (2 * N**2), x)
    got = DPS(model, operator, y, N)(x.detach(), t).score - model(x.detach(), t).score
    torch.testing.assert_close(got, gradient)


def test_mmps_linearises_a_nonlinear_operator_at_the_denoised_point():
    model, _, y, _ = problem()
    operator = Nonlinear(lambda x: torch.stack([x.square().sum(1), (x[:, 0] * x[:, 1]).sin()], 1), (D,))
    x, t = points(), 0.3
    got = MMPS(model, operator, y, N, iterations=2)(x, t).score - model(x, t).score
    for v, gradient in zip(x, got, strict=True):
        clean, J = model(v[None], t).denoised, torch.func.jacrev(lambda u: model(u[None], t).denoised[0])(v)
        H = torch.func.jacrev(lambda u: operator(u[None])[0])(clean[0])
        C = model.sde.sigma(t) ** 2 / model.sde.alpha(t) * J
        solved = torch.linalg.solve(H @ C @ H.T + N**2 * torch.eye(2), y - operator(clean)[0])
        torch.testing.assert_close(gradient, J.T @ H.T @ solved)


def test_dps_by_the_published_rule_is_algorithm_1_on_the_ddpm_ladder():
    sde = DiscreteSDE.ddpm()
    model, operator, y, _ = problem(sde=sde)
    x, t = points(), 500.0
    step = Ancestral()
    (row,) = step.plan(sde, torch.tensor([t], dtype=torch.float64), torch.tensor([t - 1], dtype=torch.float64))
    moves = [row.a * x + row.b[0] * m(x, t).denoised for m in (DPS(model, operator, y, 0.0, 0.4, "residual"), model)]
    v = x.clone().requires_grad_()
    norms = (y - operator(model(v, t).denoised)).norm(dim=1)
    (gradient,) = torch.autograd.grad(norms.sum(), v)
    # The rate is that of the continuous schedule through the ladder: equal up to 1 / steps.
    torch.testing.assert_close(moves[0] - moves[1], -0.4 * gradient, rtol=1e-2, atol=1e-4)


def test_diffpir_solves_its_proximal_problem():
    model, operator, y, _ = problem()
    x, t, lam = points(), 0.3, 2.0
    clean, alpha, sigma = model(x, t).denoised, float(model.sde.alpha(t)), float(model.sde.sigma(t))
    u = DiffPIR(model, operator, y, N, lam)(x, t).denoised
    gradient = operator.transpose(operator(u) - y) / N**2 + lam * alpha**2 / sigma**2 * (u - clean)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-9)
    plain, replaced = DiffPIR(model, operator, y)(x, t), Replacement(model, operator, y)(x, t)
    torch.testing.assert_close(plain.denoised, replaced.denoised)


def test_replacement_keeps_the_seen_part_on_the_forward_process_of_y():
    sde, operator = VPSDE(), Mask((D,), torch.tensor([True, False, True, False]))
    y = torch.tensor([1.5, -2.0])
    guided = Replacement(ExactScore(gaussian(), sde), operator, y)
    sampler = Sampler(Ancestral(), partial(grid.log_snr, steps=10))
    result = sampler.sample(guided, (4000, D), seed=0, trajectory=True)
    assert torch.equal(operator(result.x), y.expand(4000, 2))
    for i in (0, 4, 9):
        t = result.times[i].item()
        z = (operator(result.trajectory[i]) - sde.alpha(t).item() * y) / sde.sigma(t).item()
        assert z.mean(0).abs().max() < 4.5 / 4000**0.5  # false alarm 1e-5
        assert (z.var(0) - 1).abs().max() < 4.5 * (2 / 4000) ** 0.5


@pytest.mark.parametrize("t", [0.2, 1.0])
def test_replacement_starts_at_any_time_with_what_a_sees_of_the_forward_process(t):
    sde, operator, y = VPSDE(), Matrix([[1.0, -1.0, 0.0, 0.5]]), torch.tensor([0.7])
    z = torch.randn(50, D, generator=torch.Generator().manual_seed(0))
    x = Replacement(ExactScore(gaussian(), sde), operator, y).start_at(z, t)
    torch.testing.assert_close(operator(x), sde.alpha(t).float() * y + sde.sigma(t).float() * operator(z))


def test_pigdm_takes_the_spread_of_the_models_data():
    law = GaussianMixture([1.0], [[0.0] * D], [9 * torch.eye(D).double()])
    model = ExactScore(law, VPSDE())
    operator, y, x = Matrix([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([6.0]), 3 * points()
    exact = ExactScore(law.condition(operator, y, 1.0), VPSDE())
    torch.testing.assert_close(PiGDM(model, operator, y, 1.0)(x, 0.3).denoised, exact(x, 0.3).denoised)
    assert not torch.allclose(PiGDM(model, operator, y, 1.0, 1.0)(x, 0.3).denoised, exact(x, 0.3).denoised, rtol=0.05)


METHODS = {
    "replacement": lambda m, a, y: Replacement(m, a, y),
    "dps": lambda m, a, y: DPS(m, a, y, 0.5),
    "dps-residual": lambda m, a, y: DPS(m, a, y, 0.0, 0.01, "residual"),
    "pigdm": lambda m, a, y: PiGDM(m, a, y, 0.2),
    "mmps": lambda m, a, y: MMPS(m, a, y, 0.2, 3),
    "diffpir": lambda m, a, y: DiffPIR(m, a, y, 0.2),
}


@pytest.mark.parametrize("name", METHODS)
def test_works_with_every_predictor(name, predictor):
    sde, operator = VPSDE(), Downsample((1, 2, 2), 2)
    guided = METHODS[name](Shrink(sde, (1, 2, 2)), operator, torch.full((1, 1, 1), 0.3))
    sampler = Sampler(predictor, partial(grid.log_snr, steps=5))
    try:
        sampler.check(sde)
    except ValueError:
        pytest.skip("this step refuses the grid or the process")
    result = sampler.sample(guided, (3, 1, 2, 2), seed=0)
    assert result.x.isfinite().all()
    assert result.nfe <= 5 * predictor.calls + 6


@few_steps
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(7,), (2, 4, 4)])
def test_a_sample_does_not_know_its_companions(name, shape):
    operator = Mask.random(shape, 0.5, seed=1) if len(shape) == 1 else Blur.gaussian(shape, 0.8)
    sde, batch = VPSDE(), 5
    y = torch.randn(batch, *operator.output_shape, generator=torch.Generator().manual_seed(2))
    sampler = Sampler(Ancestral(), partial(grid.log_snr, steps=8))

    def run(places):
        guided = METHODS[name](Shrink(sde, shape), operator, y[places])
        return sampler.sample(guided, (len(places), *shape), noise=SampleNoise(places)).x

    together = run(list(range(batch)))
    assert together.isfinite().all()
    assert torch.equal(torch.cat([run([0]), run([1, 2, 3]), run([4])]), together)


def test_ode_reaches_the_posterior_of_a_gaussian():
    model, operator, y, posterior = problem()
    x0 = points(64)
    ends = [ProbabilityFlowODE(rtol=1e-7, atol=1e-7).sample(m, (64, D), x_init=x0).x
            for m in (MMPS(model, operator, y, N, 2), ExactScore(posterior, model.sde))]  # fmt: skip
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-4)


def test_an_observation_may_be_a_condition():
    model, operator, y, _ = problem()
    ys = torch.stack([y + i for i in range(5)])
    wanted = PiGDM(model, operator, ys, N)(points(), 0.3).denoised
    free = PiGDM(model, operator, noise_std=N)
    assert torch.equal(free(points(), 0.3, y=ys).denoised, wanted)
    assert torch.equal(free(points(), 0.3, y=y).denoised[:1], wanted[:1])


def test_derivatives_flow_through_guidance():
    model, operator, y, posterior = problem()
    guided, x = MMPS(model, operator, y, N, 2), points(1)
    jacobian = torch.func.jacrev(lambda v: guided(v, 0.4).score)(x)[0, :, 0]
    wanted = torch.func.jacrev(lambda v: ExactScore(posterior, model.sde)(v, 0.4).score)(x)[0, :, 0]
    torch.testing.assert_close(jacobian, wanted, rtol=1e-5, atol=1e-6)


MASK = Mask((D,), torch.tensor([True, False, True, False]))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: Replacement(m, MASK, torch.zeros(D)), ValueError, "pass the observation operator(x), not x itself"),
        (lambda m: PiGDM(m, Mask((3,), torch.ones(3) > 0), torch.zeros(3)), ValueError, "the model's is (4,)"),
        (lambda m: PiGDM(m, Nonlinear(torch.sin, (D,)), torch.zeros(D)), TypeError, "MMPS takes any Operator"),
        (lambda m: DPS(m, MASK, torch.zeros(2)), ValueError, "noise_std is one number > 0 for all of y, got 0.0"),
        (lambda m: DPS(m, MASK, torch.zeros(2), 0.1, rule="norm"), ValueError, "rule is one of likelihood, residual"),
        (lambda m: MMPS(m, MASK, torch.zeros(2), 0.1, 0), ValueError, "iterations >= 1, got iterations=0"),
        (lambda m: PiGDM(m, MASK, torch.zeros(3, 2))(points(), 0.5), ValueError, "3 observations for 5 samples"),
        (lambda m: PiGDM(m, MASK)(points(), 0.5), ValueError, "give condition={'y': ...}"),
        (lambda m: PiGDM(m, MASK, torch.zeros(2))(points(), 0.5, label=1), TypeError, "unknown condition 'label'"),
        (lambda m: PiGDM("model", MASK, torch.zeros(2)), TypeError, "wraps a ScoreModel, got str"),
    ],
)
def test_refusals(make, error, message):
    with pytest.raises(error) as refusal:
        make(ExactScore(gaussian(), VPSDE()))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("solver", [AdaptiveODE(), AdaptiveSDE(), PARALLEL], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("batch", [2, 3])
def test_one_observation_for_all_stays_one_where_the_batch_is_regrouped(solver, batch):
    """Also where it happens to have as many numbers as there are samples."""
    model, operator, y, _ = problem()
    given = solver.sample(MMPS(model, operator, None, N), (batch, D), seed=0, condition={"y": y}).x
    assert torch.equal(given, solver.sample(MMPS(model, operator, y, N), (batch, D), seed=0).x)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: Autoguidance(m.model, m, 2.0)], ids=["itself", "as bad model"])
@pytest.mark.parametrize(
    "solver", [AdaptiveODE(), AdaptiveSDE(), PARALLEL, log_likelihood], ids=["ODE", "SDE", "parallel", "likelihood"]
)
def test_an_observation_for_each_sample_is_refused_by_what_regroups_a_batch_before_any_call(solver, wrap):
    class Unasked(ExactScore):
        def __call__(self, x, t, **condition):
            raise AssertionError("asked")

    model = wrap(PiGDM(Unasked(gaussian(), VPSDE()), MASK, torch.zeros(3, 2), N))
    with pytest.raises(ValueError, match=r"3 observations for 1 samples.*as the condition y"):
        solver(model, torch.zeros(3, D)) if solver is log_likelihood else solver.sample(model, (3, D), seed=0)


def test_the_linear_solver_of_mmps_is_gmres() -> None:
    # In exact arithmetic k iterations leave the residual of scipy's GMRES, and of no smaller Krylov space: here for
    # matrices that are neither symmetric nor normal.
    generator = torch.Generator().manual_seed(0)
    S = torch.randn(4, 6, 6, dtype=torch.float64, generator=generator) + 3 * torch.eye(6, dtype=torch.float64)
    b = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    b[3] = 0
    for k in (1, 2, 4, 6):
        u = conjugate_residuals(lambda v: torch.einsum("bij,bj->bi", S, v), b, k)
        left = (b - torch.einsum("bij,bj->bi", S, u)).norm(dim=1)
        for i in range(3):
            exact, _ = scipy.sparse.linalg.gmres(S[i].numpy(), b[i].numpy(), restart=k, maxiter=1, rtol=0, atol=0)
            expected = np.linalg.norm(b[i].numpy() - S[i].numpy() @ exact)
            assert left[i].item() == pytest.approx(expected, rel=1e-6, abs=1e-10)
        assert u[3].abs().max() == 0
    again = conjugate_residuals(lambda v: 2 * v, b, 5)  # solved after one
    torch.testing.assert_close(again, b / 2, rtol=1e-14, atol=0)


@pytest.mark.parametrize("method", [PiGDM, MMPS, DPS, DiffPIR, Replacement], ids=lambda m: m.__name__)
@pytest.mark.parametrize("y", [torch.zeros(1), torch.zeros(3, 1), torch.zeros(2, dtype=torch.int64)], ids=str)
def test_an_observation_given_as_a_condition_has_the_operators_shape(method, y):
    model, operator, _, _ = problem()
    guided = method(model, operator, noise_std=0.0 if method is Replacement else N)
    with pytest.raises(ValueError, match="observation"):
        guided(points(3), 0.3, y=y)


def test_what_wraps_a_replacement_starts_as_it_does():
    """The start of a replacement is not independent from element to element, and a wrapper must not think so."""
    operator, sde = Matrix([[1.0, -1.0, 0.0, 0.5]]), VESDE(sigma_max=1.0)
    model = Replacement(ExactScore(gaussian(), sde), operator, torch.tensor([0.7]))
    z = points(4000)
    for t in (0.2, 1.0):
        torch.testing.assert_close(StaticThreshold(model, 9.0).start_at(z, t), model.start_at(z, t), rtol=0, atol=0)
        x = model.start_at(z, t)
        fitted = torch.distributions.MultivariateNormal(x.mean(0), x.T.cov()).log_prob(x[:5])
        for wrapped in (model, StaticThreshold(model, 9.0), reparameterize(model, sde)):
            torch.testing.assert_close(wrapped.log_terminal(x[:5], t), fitted, rtol=0, atol=0.15)

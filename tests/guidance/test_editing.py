"""Imputation and DDRM against their formulas, jump-back grids, and editing."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from exact_models import Labelled, Shrink

from score_sde import grid
from score_sde.adaptive import AdaptiveODE
from score_sde.adaptive_sde import AdaptiveSDE
from score_sde.evaluation import affine
from score_sde.evaluation.posterior import Problem
from score_sde.guidance import (
    DDRM,
    Blur,
    Impute,
    Mask,
    Matrix,
    Nonlinear,
    Replacement,
    TwistedParticles,
    interpolate,
    sdedit,
    translate,
)
from score_sde.likelihood import slerp
from score_sde.networks import MLP
from score_sde.noise import SampleNoise
from score_sde.ode import ProbabilityFlowODE
from score_sde.parameterization import Noise
from score_sde.sampler import Sampler
from score_sde.score import ExactScore, LearnedScore
from score_sde.sde import VESDE, VPSDE
from score_sde.steps import DDIM, Ancestral, EulerMaruyama, ExponentialAdams
from score_sde.targets import GaussianMixture

SDE = VPSDE()
BASE = partial(grid.log_snr, steps=12)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian():
    return GaussianMixture([1.0], [[1.0, -0.5]], [[[1.0, 0.6], [0.6, 0.8]]])


def carried(step, sde, t, s, x, model=None, z=None):
    (row,) = step.plan(sde, torch.tensor([t], dtype=torch.float64), torch.tensor([s], dtype=torch.float64))
    return step.advance(row, x, (), model, lambda k: z)[0]


def test_imputed_part_has_the_law_of_the_forward_process():
    operator, n = Matrix([[2.0, 0.0, 0.0], [0.0, 0.5, 0.0]]), 0.2
    x0 = torch.tensor([[1.0, -1.0, 3.0]], dtype=torch.float64).expand(40_000, 3)
    y = operator.observe(x0, n, generator=generator())
    x, z = torch.full_like(x0, 7.0), torch.randn(x0.shape, generator=generator(1), dtype=torch.float64)
    t = 0.2
    out = carried(Impute(operator, y, n), SDE, t, t, x, z=z)
    alpha, sigma = float(SDE.alpha(t)), float(SDE.sigma(t))
    assert torch.equal(out[:, 2], x[:, 2])
    error = (out[:, :2] - alpha * x0[:, :2]) / sigma
    assert error.mean(0).abs().max() < 4.5 / 200
    assert (error.var(0) - 1).abs().max() < 4.5 * math.sqrt(2 / 40_000)


def test_a_coordinate_known_worse_than_the_noise_is_left_alone():
    operator = Matrix([[2.0, 0.0], [0.0, 0.01]])
    x, z = torch.randn(5, 2, generator=generator(), dtype=torch.float64), torch.zeros(5, 2, dtype=torch.float64)
    out = carried(Impute(operator, torch.zeros(2), 0.1), SDE, 0.2, 0.2, x, z=z)
    torch.testing.assert_close(out[:, 1], x[:, 1])
    torch.testing.assert_close(out[:, 0], torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("noise_std", [0.0, 0.3])
def test_ddrm_is_its_formula_coordinate_by_coordinate(noise_std):
    s = torch.tensor([2.0, 0.4], dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator(), dtype=torch.float64))[0]
    left = torch.linalg.qr(torch.randn(2, 2, generator=generator(1), dtype=torch.float64))[0]
    operator = Matrix(left @ torch.diag(s) @ turn[:, :2].T)
    x, z = (torch.randn(4, 3, generator=generator(i), dtype=torch.float64) for i in (2, 3))
    y, model = torch.tensor([0.5, -1.0], dtype=torch.float64), Shrink(SDE, (3,))
    eta, eta_b, t, to = 0.7, 0.9, 0.3, 0.2
    got = carried(DDRM(operator, y, noise_std, eta, eta_b), SDE, t, to, x, model, z)
    clean = model(x, t).denoised @ turn
    scaled, ybar, noise = x @ turn / float(SDE.alpha(t)), (left.T @ y) / s, z @ turn
    l_t, l_s = (math.exp(-float(SDE.half_log_snr(v))) for v in (t, to))
    wanted = clean + math.sqrt(1 - eta**2) * l_s * (scaled - clean) / l_t + eta * l_s * noise
    for i in range(2):
        n = noise_std / s[i].item()
        if l_s >= n:
            fresh = math.sqrt(l_s**2 - eta_b**2 * n**2)
            wanted[:, i] = (1 - eta_b) * clean[:, i] + eta_b * ybar[i] + fresh * noise[:, i]
        else:
            toward = math.sqrt(1 - eta**2) * l_s * (ybar[i] - clean[:, i]) / n
            wanted[:, i] = clean[:, i] + toward + eta * l_s * noise[:, i]
    if noise_std:
        assert noise_std / s[0] < l_s < noise_std / s[1]  # both cases are met
    torch.testing.assert_close(got, float(SDE.alpha(to)) * wanted @ turn.T)


def test_jump_back_goes_through_every_stretch_again():
    base = grid.uniform(SDE, 6)
    times = grid.jump_back(SDE, partial(grid.uniform, steps=6), length=3, repeats=2)
    first, second = base[:4], base[3:]
    assert torch.equal(times, torch.cat([first, first, second[1:], second]))
    grid.check(times, SDE)
    assert torch.equal(grid.jump_back(SDE, partial(grid.uniform, steps=6), 3, 1), base)
    low = (SDE.sigma(base[5]) / SDE.alpha(base[5])).item() * 0.999
    part = grid.jump_back(SDE, partial(grid.uniform, steps=6), length=1, repeats=2, low=low)
    again = [base[j] for i in range(1, 6) for j in (i, i - 1, i)]
    assert torch.equal(part, torch.stack([base[0], *again, base[6]]))
    for length in (1, 2, 3):  # below a time the rest is gone through as it was, without what led back above
        jumps = partial(grid.jump_back, base=partial(grid.uniform, steps=6), length=length, repeats=3)
        rest = grid.below(SDE, jumps, 0.6)
        assert rest[0] == 0.6
        assert (rest[1:] < 0.6).all()
        assert torch.equal(rest[1:], jumps(SDE)[1 - len(rest) :])
        assert (rest.diff() != 0).all()
    assert (times.diff() < 0).sum() == 12


def test_jumps_are_exact_forward_transitions():
    # Down by a solver that is nearly exact, up by the forward process: the law stays what it is.
    target = GaussianMixture([1.0], [[0.5]], [[[0.49]]])
    fine = partial(grid.jump_back, base=partial(grid.log_snr, steps=60), length=10, repeats=3)
    result = Sampler(ExponentialAdams(2), fine).sample(ExactScore(target, SDE), (20_000, 1), seed=0)
    assert result.nfe == 181
    assert result.x.mean().item() == pytest.approx(0.5, abs=0.02)
    assert result.x.std().item() == pytest.approx(0.7, abs=0.015)


def test_repaint_comes_nearer_to_the_posterior_than_replacement():
    target, operator, y = gaussian(), Mask((2,), torch.tensor([True, False])), torch.tensor([2.5])
    mean = target.condition(operator, y).mean[1].item()
    model = ExactScore(target, SDE)
    base = partial(grid.log_snr, steps=30)
    once = Sampler(Ancestral(), base).sample(Replacement(model, operator, y), (4000, 2), seed=0).x[:, 1].mean().item()
    again = partial(grid.jump_back, base=base, length=5, repeats=6)
    repaint = Sampler(Ancestral(), again, corrector=Impute(operator, y)).sample(model, (4000, 2), seed=0)
    assert abs(repaint.x[:, 1].mean().item() - mean) < 0.5 * abs(once - mean)
    assert abs(once - mean) > 0.1  # the known bias


def test_repaint_of_a_noisy_observation_falls_with_repeats_above_its_level_and_forgets_it_below():
    """Exact laws: W2 to the posterior, over its spread. Below sigma / alpha = noise / s each repeat leaves y alone."""
    operator = Matrix([[0.5, 0.0]])
    prior = GaussianMixture([1.0], [[0.5, -0.3]], [[[1.0, 0.8], [0.8, 1.0]]])
    problem = Problem(prior, operator, torch.tensor([0.6], dtype=torch.float64), 0.15, SDE)
    low = 0.15 / operator.least_singular_value()

    def distance(repeats: int, low: float) -> float:
        again = partial(grid.jump_back, base=partial(grid.log_snr, steps=60), length=1, repeats=repeats, low=low)
        sampler = Sampler(Ancestral(), again, corrector=Impute(operator, problem.y, 0.15))
        return affine.bias(affine.sampled_law(sampler, problem.model), problem.posterior)["w2"]

    assert distance(10, low) < 0.4 * distance(1, low)
    assert distance(10, 0.0) > 2 * distance(1, 0.0)


@pytest.mark.parametrize("make", [lambda a, y: Impute(a, y, 0.1), lambda a, y: DDRM(a, y, 0.1)])
def test_a_sample_does_not_know_its_companions(make):
    shape = (2, 4, 4)
    operator = Blur.gaussian(shape, 0.8)
    y = torch.randn(4, *shape, generator=generator())

    def run(places):
        step = make(operator, y[places])
        steps = {"corrector": step, "predictor": EulerMaruyama()} if step.role == "corrector" else {"predictor": step}
        sampler, model = Sampler(grid=BASE, **steps), Shrink(SDE, shape)
        return sampler.sample(model, (len(places), *shape), noise=SampleNoise(places)).x

    assert torch.equal(torch.cat([run([0]), run([1, 2, 3])]), run([0, 1, 2, 3]))


def test_sdedit_keeps_more_of_x_the_later_it_starts():
    model, x = ExactScore(gaussian(), SDE), torch.full((2000, 2), 4.0)
    sampler = Sampler(DDIM(), BASE)
    ends = [sdedit(sampler, model, x, time, seed=0).x.mean(0) for time in (0.02, 0.3, 1.0)]
    far = [(end - torch.tensor([1.0, -0.5])).norm().item() for end in ends]
    assert far[0] > far[1] > far[2]
    assert far[2] < 0.15
    assert len(grid.below(SDE, BASE, 0.3)) < 13
    assert sdedit(sampler, model, x, 0.3, seed=0).times[0] == 0.3
    assert len(sampler.grid(SDE)) == 13  # the sampler itself is as it was
    # From x ~ p_0 the end is again p_0, wherever it starts.
    own = gaussian().sample((20_000,), generator=generator())
    again = sdedit(Sampler(DDIM(), partial(grid.log_snr, steps=60)), model, own, 0.2, seed=0).x
    torch.testing.assert_close(torch.cov(again.T), torch.tensor([[1.0, 0.6], [0.6, 0.8]]), rtol=0, atol=0.05)


def test_translation_by_latent_codes_is_the_monge_map_between_gaussians_on_a_line():
    sde, ode = VESDE(sigma_max=20.0), ProbabilityFlowODE(rtol=1e-8, atol=1e-8)
    source, target = (ExactScore(GaussianMixture([1.0], [[m]], [[[v]]]), sde) for m, v in ((0.0, 1.0), (3.0, 4.0)))
    x = torch.tensor([[-1.0], [0.0], [2.0]], dtype=torch.float64)
    end = translate(ode, source, target, x)

    def root(v, t):
        return math.sqrt(v + float(sde.sigma(t)) ** 2)

    ratio = root(4.0, sde.t_min) / root(4.0, 1.0) * root(1.0, 1.0) / root(1.0, sde.t_min)
    shift = 3.0 * (1 - root(4.0, sde.t_min) / root(4.0, 1.0))  # codes are not moved to the target's mean
    torch.testing.assert_close(end, ratio * x + shift, rtol=1e-4, atol=1e-4)
    back = translate(ode, source, source, x)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)


def test_interpolation_meets_its_ends():
    model, ode = ExactScore(gaussian(), SDE), ProbabilityFlowODE(rtol=1e-7, atol=1e-7)
    x, y = (torch.randn(3, 2, generator=generator(i), dtype=torch.float64) for i in (0, 1))
    path = interpolate(ode, model, x, y, [0.0, 0.5, 1.0])
    torch.testing.assert_close(path[0], x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(path[2], y, rtol=1e-4, atol=1e-4)
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    torch.testing.assert_close(slerp(a, b, [1 / 3])[0], torch.tensor([[3 * math.cos(math.pi / 6), 1.5]]))
    torch.testing.assert_close(slerp(a, 2 * a, [0.5])[0], 1.5 * a)
    for wrong, shares in ((y[:-1], [0.5]), (y, [])):
        with pytest.raises(ValueError, match="of one shape through one share or more"):
            interpolate(ode, model, x, wrong, shares)
    with pytest.raises(TypeError, match="give floats"):
        sdedit(Sampler(DDIM(), BASE), model, x.long(), 0.2, seed=0)


@pytest.mark.parametrize("step", [None, ExponentialAdams(1, eta=1.0, prediction="noise")], ids=["ancestral", "noise"])
def test_particles_reach_the_posterior_of_a_mixture(step):
    prior = GaussianMixture([0.3, 0.7], [[-2.0, 0.0], [2.0, 1.0]], 0.25 * torch.eye(2).expand(2, 2, 2))
    operator, y = Matrix([[0.3, 1.0]]), torch.tensor([0.2])
    posterior = prior.condition(operator, y, 0.5)
    model = ExactScore(prior, SDE)
    filters = TwistedParticles(partial(grid.log_snr, steps=60), operator, y, 0.5, data_std=prior.std, step=step)
    result = filters.sample(model, (10_000, 2), seed=0)
    assert result.nfe == 61
    share = (result.x[:, 0] > 0).double().mean().item()
    assert 0.3 < posterior.weights[1].item() < 0.5
    assert share == pytest.approx(posterior.weights[1].item(), abs=0.03)
    assert torch.equal(result.x, filters.sample(model, (10_000, 2), seed=0).x)
    torch.testing.assert_close(result.x.mean(0).double(), posterior.mean, rtol=0, atol=0.1)


def test_particles_reach_the_posterior_of_a_nonlinear_observation():
    """Against the prior's draws, weighted by the likelihood; the means of MMPS and DPS are off by up to 1."""
    prior = GaussianMixture([0.3, 0.7], [[-2.0, 0.0], [2.0, 1.0]], 0.3)
    operator = Nonlinear(lambda x: x.square().sum(-1, keepdim=True), (2,))
    filters = TwistedParticles(partial(grid.log_snr, steps=60), operator, torch.tensor([3.0]), 0.5)
    x = filters.sample(ExactScore(prior, SDE), (10_000, 2), seed=0).x
    draws = prior.sample((400_000,), generator=generator(0))
    weight = (-((operator(draws)[:, 0] - 3.0) ** 2) / (2 * 0.5**2)).softmax(0)
    share = weight @ (draws[:, 0] > 0).float()
    assert 0.58 < share < 0.66  # of the prior 0.7: the far mode is less likely
    assert (x[:, 0] > 0).float().mean() == pytest.approx(share.item(), abs=0.03)
    for got, known in ((x, draws), (operator(x), operator(draws))):
        mean = weight @ known
        torch.testing.assert_close(got.mean(0), mean, rtol=0, atol=0.1)
        torch.testing.assert_close(got.std(0), (weight @ (known - mean) ** 2).sqrt(), rtol=0, atol=0.05)


def test_a_lost_particle_has_no_descendants():
    class Broken(Shrink):
        lost = slice(1)

        def __call__(self, x, t, **condition):
            prediction = super().__call__(x, t, **condition)
            return replace(prediction, raw=prediction.raw.index_fill(0, torch.arange(len(x))[self.lost], math.nan))

    filters = TwistedParticles(BASE, Matrix([[1.0, 0.0]]), torch.zeros(1), 0.3, data_std=1.0)
    x = filters.sample(Broken(SDE, (2,)), (30, 2), seed=0).x
    assert x.isfinite().all()
    assert len(x.unique(dim=0)) > 10
    Broken.lost = slice(None)
    with pytest.raises(FloatingPointError, match="no particle has a finite weight"):
        filters.sample(Broken(SDE, (2,)), (30, 2), seed=0)
    assert filters.sample(Shrink(SDE, (2,)), (0, 2), seed=0).x.shape == (0, 2)


def test_seeds_of_sdedit_share_no_noise():
    seen = []

    class Seen(Shrink):
        def __call__(self, x, t, **condition):
            seen.append(x)
            return super().__call__(x, t, **condition)

    x, model = torch.zeros(3, 2), Seen(SDE, (2,))
    for seed in (0, 1):
        sdedit(Sampler(EulerMaruyama(), BASE), model, x, 0.5, seed=seed)
    start = [states[0] / float(SDE.sigma(0.5)) for states in (seen, seen[len(seen) // 2 :])]
    firsts = [torch.randn(3, 2, generator=generator(seed)) for seed in (0, 1, 2)]
    assert not any(torch.allclose(a, b) for a in start for b in firsts)
    assert not torch.allclose(*start)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda a: a.observe(torch.zeros(1, 2), 0.1), "observe needs a generator for its noise"),
        (lambda a: Impute(a, torch.zeros(2, 3)), "not x itself"),
        (lambda a: Impute(a, torch.zeros(1), -1.0), "noise_std is 0 or more, got -1.0"),
        (lambda a: DDRM(a, torch.zeros(1), eta=2.0), "lie in [0, 1], got eta=2.0"),
        (lambda a: grid.jump_back(SDE, BASE, 0), "length >= 1"),
        (lambda a: grid.below(SDE, BASE, 1e-3), "must lie in (0.001, 1]"),
        (lambda a: TwistedParticles(BASE, a, torch.zeros(1), 0.0), "noise_std=0.0"),
        (lambda a: TwistedParticles(BASE, a, torch.zeros(4, 1), 0.1), "one observation y has shape (1,), got (4, 1)"),
        (
            lambda a: TwistedParticles(BASE, a, torch.zeros(1), 0.1, step=DDIM()).sample(Shrink(SDE, (2,)), (3, 2)),
            "a step with noise",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError) as refusal:
        make(Mask((3,), torch.tensor([True, False, False])) if "not x" in message else Matrix([[1.0, 0.0]]))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("solver", [AdaptiveODE(), ProbabilityFlowODE(), AdaptiveSDE()], ids=lambda s: type(s).__name__)
def test_solvers_with_steps_of_their_own_edit_from_the_given_time_on(solver):
    """E[x_0] of guides noised up to t is that of the closed form, not of the prior."""
    law, time, x = gaussian(), 0.05, torch.full((2000, 2), 2.0, dtype=torch.float64)
    model = ExactScore(law, SDE)
    alpha, sigma = float(SDE.alpha(time)), float(SDE.sigma(time))
    covariance = law.covariances[0]
    result = sdedit(solver, model, x, time, seed=0)
    # The reverse SDE draws from p(x_0 | x_t), whose mean is D; the ODE's map is linear with its own mean.
    total = alpha**2 * covariance + sigma**2 * torch.eye(2, dtype=torch.float64)
    start = alpha * (x[0] - law.mean)
    if isinstance(solver, AdaptiveSDE):
        expected = law.mean + alpha * covariance @ torch.linalg.solve(total, start)
    else:
        value, basis = torch.linalg.eigh(covariance)
        expected = law.mean + basis @ ((value / (alpha**2 * value + sigma**2)).sqrt() * (basis.T @ start))
    torch.testing.assert_close(result.x.mean(0), expected, rtol=0, atol=0.05)
    with pytest.raises(ValueError, match="a start at time=2 must lie in"):
        sdedit(solver, model, x, 2.0, seed=0)


def test_translation_is_between_models_of_one_process():
    with pytest.raises(ValueError, match="translate takes two models of one process"):
        translate(AdaptiveODE(), ExactScore(gaussian(), SDE), ExactScore(gaussian(), VESDE()), torch.zeros(3, 2))


def test_one_cloud_of_particles_has_one_condition():
    """Resampling would hand particles on to other labels than those they have moved under."""
    law = GaussianMixture([1.0, 1.0], [[-2.0, 0.0], [2.0, 0.0]], torch.stack([0.1 * torch.eye(2)] * 2))
    model = Labelled(law, SDE)
    filters = TwistedParticles(BASE, Matrix([[0.0, 1.0]]), torch.zeros(1), 1.0)
    x = filters.sample(model, (200, 2), seed=0, condition={"label": 1}).x
    assert (x[:, 0] > 0).all()
    told = LearnedScore(MLP((2,), context_width=3), SDE, Noise(), (2,))
    none = {"context": torch.full((4, 3), torch.nan)}  # the null, of every particle
    assert filters.sample(told, (4, 2), seed=0, condition=none).x.isfinite().all()
    with pytest.raises(ValueError, match="one cloud under one label"):
        filters.sample(model, (4, 2), seed=0, condition={"label": torch.tensor([0, 1, 0, 1])})

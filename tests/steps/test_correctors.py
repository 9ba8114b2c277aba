"""Markov-chain correctors: stationary laws in closed form, and where on the grid they act."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from score_sde import DDIM, VPSDE, ExactScore, GaussianMixture, LearnedScore, Sampler, grid
from score_sde.evaluation.exact_laws import stationary_variance
from score_sde.guidance import Classifier, Impute, Mask
from score_sde.parameterization import Denoised
from score_sde.steps import KineticLangevin, LangevinCorrector, MetropolisLangevin, UnadjustedLangevin

SDE = VPSDE()
ONE = GaussianMixture([1.0], [[0.0]], [[[1.0]]])


# At lambda = 0, alpha = sigma, data N(0, I): p_t = N(0, v I) with v = 2 sigma^2, and eps = ratio sigma^2 = ratio v / 2.
@pytest.mark.parametrize("ratio", [0.02, 0.2])
def test_unadjusted_langevin_has_its_known_bias(ratio):
    assert stationary_variance(UnadjustedLangevin(ratio), SDE) == pytest.approx(1 / (1 - ratio / 4), rel=1e-10)
    assert stationary_variance(UnadjustedLangevin(ratio, steps=3), SDE) == pytest.approx(1 / (1 - ratio / 4), rel=1e-10)


@pytest.mark.parametrize("persistence", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_kinetic_langevin_has_the_bias_of_the_leapfrog_whatever_its_friction(steps, persistence):
    # OBABO leaves N(0, v / (1 - h^2 / (4 v))) x N(0, I) invariant, and v from its factor: h^2 / (4 v) = ratio / 4.
    step = KineticLangevin(0.2, steps, persistence)
    assert stationary_variance(step, SDE) == pytest.approx(1 / (1 - 0.2 / 4), rel=1e-10)


def test_one_kinetic_step_is_the_overdamped_step():
    # x' = x + h v + h^2 / 2 score with fresh v.
    t = torch.tensor([0.4], dtype=torch.float64)
    kinetic, over = KineticLangevin(0.1, 1, 0.0), UnadjustedLangevin(0.1)
    (row,), (other,) = kinetic.plan(SDE, t, t), over.plan(SDE, t, t)
    model, x, z = (
        ExactScore(ONE, SDE),
        torch.tensor([[0.7]], dtype=torch.float64),
        torch.tensor([[0.3]], dtype=torch.float64),
    )
    with_fresh_v = kinetic.advance(row, x, (), model, lambda k: z)[0]
    torch.testing.assert_close(with_fresh_v, over.advance(other, x, (), model, lambda k: z)[0], rtol=1e-12, atol=1e-12)


def test_metropolis_leaves_a_bimodal_law_as_it_is():
    # 40,000 chains from exact draws, 20 large proposals: mean square and tail mass stay, at 4.5 standard errors.
    target = GaussianMixture([0.7, 0.3], [[1.0], [-1.5]], [[[0.1]], [[0.3]]])
    model, t, n = ExactScore(target, SDE), 0.2, 40_000
    g = torch.Generator().manual_seed(0)
    law = target.marginal(SDE.alpha(t).item(), SDE.sigma(t).item())
    x = law.sample((n,), generator=g).double()
    start = x.clone()
    step = MetropolisLangevin(0.9, steps=20)
    (row,) = step.plan(SDE, torch.tensor([t], dtype=torch.float64), torch.tensor([t], dtype=torch.float64))

    class Evaluate:
        log_prob = staticmethod(model.log_prob)

        def __call__(self, x, t):
            return model(x, t)

    x, _ = step.advance(row, x, (), Evaluate(), lambda k: torch.randn(n, 1, dtype=torch.float64, generator=g))
    assert (x != start).double().mean() > 0.9
    fresh = law.sample((400_000,), generator=g).double()
    for f in (lambda v: v, torch.square, lambda v: (v > 1.2).double(), lambda v: (v < -0.5).double()):
        error = f(x).mean() - f(fresh).mean()
        assert abs(error) < 4.5 * f(fresh).std() * (1 / n + 1 / 400_000) ** 0.5


def test_metropolis_rejects_what_the_unadjusted_chain_would_keep():
    # Stationary variance 1 within 4.5 standard errors (0.0022) where the unadjusted step has 1 / (1 - 0.9 / 4) = 1.29.
    assert stationary_variance(MetropolisLangevin(0.05), SDE) == pytest.approx(1, abs=0.01)


def test_metropolis_needs_a_density():
    class Net(torch.nn.Module):
        def forward(self, x, c_noise):
            return x

    sampler = Sampler(DDIM(), partial(grid.log_snr, steps=3), MetropolisLangevin())
    half = sampler.sample(ExactScore(ONE, SDE), (4, 1), seed=0, dtype=torch.bfloat16).x
    assert half.isfinite().all()
    with pytest.raises(ValueError, match=r"needs a model with a density log_prob\(x, t\), which LearnedScore lacks"):
        sampler.sample(LearnedScore(Net(), SDE, Denoised(), (1,)), (4, 1), seed=0)
    guided = Classifier(ExactScore(ONE, SDE), lambda x, t: -x.square().sum(1))  # its log_prob is the label's
    with pytest.raises(ValueError, match="which Classifier lacks"):
        sampler.sample(guided, (4, 1), seed=0)
    assert sampler.sample(ExactScore(ONE, SDE), (4, 1), seed=0).nfe == 3 * (1 + 2) + 1


def test_the_exact_models_density_is_that_of_the_marginal():
    x, t = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None], 0.3
    v = SDE.alpha(t) ** 2 + SDE.sigma(t) ** 2
    expected = -(x[:, 0] ** 2) / (2 * v) - (2 * torch.pi * v).log() / 2
    torch.testing.assert_close(ExactScore(ONE, SDE).log_prob(x, t), expected)


def test_the_adapted_step_is_short_where_the_score_is_large():
    t = torch.tensor([0.3], dtype=torch.float64)
    step = UnadjustedLangevin(0.1, adapt=True)
    (row,) = step.plan(SDE, t, t)
    model, sigma = ExactScore(ONE, SDE), SDE.sigma(t).item()
    x = torch.tensor([[0.0], [1.0], [50.0]], dtype=torch.float64)
    moved = step.advance(row, x, (), model, lambda k: torch.ones(3, 1, dtype=torch.float64))[0]
    score = model(x, 0.3).score
    eps = 2 * 0.1 / (score**2 + 1 / sigma**2)
    torch.testing.assert_close(moved, x + eps * score + (2 * eps).sqrt(), rtol=1e-12, atol=1e-12)
    assert eps[0].item() == pytest.approx(2 * 0.1 * sigma**2)


@pytest.mark.parametrize("d", [1, 2, 8])
def test_what_the_adapted_step_leaves_as_it_is_is_p_over_eps(d):
    """On N(0, sigma^2 I) a variance of (1 + 1 / d) sigma^2, as the docstring says."""
    target = GaussianMixture([1.0], torch.zeros(1, d), 1e-8 * torch.eye(d)[None])
    t, generator = torch.tensor([0.5], dtype=torch.float64), torch.Generator().manual_seed(0)
    step, sigma = UnadjustedLangevin(0.01, steps=1, adapt=True), SDE.sigma(t).item()
    (row,) = step.plan(SDE, t, t)
    x, model, found = sigma * torch.randn(4000, d, generator=generator), ExactScore(target, SDE), []
    for k in range(1500):
        x, _ = step.advance(row, x, (), model, lambda _: torch.randn(4000, d, generator=generator))
        if k >= 500 and k % 20 == 0:
            found.append(x.square().mean().item() / sigma**2)
    assert sum(found) / len(found) == pytest.approx(1 + 1 / d, rel=0.04)


@pytest.mark.parametrize("first", [True, False])
def test_a_corrector_acts_where_it_is_told(first):
    model, schedule = ExactScore(ONE, SDE), partial(grid.log_snr, steps=10)
    times = schedule(SDE)

    def run(where):
        sampler = Sampler(DDIM(), schedule, LangevinCorrector(), corrector_first=first, corrector_where=where)
        result = sampler.sample(model, (3, 1), seed=0, trajectory=True)
        assert result.trajectory.shape[0] == len(times)
        return result.nfe - 11

    acting = times[:-1] if first else times[1:]
    level = (-SDE.half_log_snr(acting)).exp()
    assert run(None) == 10
    assert run(partial(grid.within, low=0.1, high=3.0)) == int(((level >= 0.1) & (level <= 3.0)).sum()) > 0
    assert run(partial(grid.every, period=3)) == (4 if first else 3)
    assert run(partial(grid.within, low=1e6)) == 0


def test_a_corrector_that_never_acts_changes_nothing():
    model, schedule = ExactScore(ONE, SDE), partial(grid.log_snr, steps=6)
    never = Sampler(DDIM(), schedule, LangevinCorrector(), corrector_where=partial(grid.within, low=1e6))
    run = {"seed": 3, "trajectory": True}
    assert torch.equal(
        never.sample(model, (3, 1), **run).trajectory, Sampler(DDIM(), schedule).sample(model, (3, 1), **run).trajectory
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UnadjustedLangevin(0.0), "ratio lies in"),
        (lambda: UnadjustedLangevin(steps=0), "steps >= 1"),
        (lambda: MetropolisLangevin(1.5), "ratio lies in"),
        (lambda: KineticLangevin(steps=0), "steps >= 1"),
        (lambda: KineticLangevin(persistence=1.0), "persistence lies in"),
    ],
)
def test_unknown_options_are_refused_when_the_step_is_built(make, message):
    with pytest.raises(ValueError, match=message):
        make()


IMPUTE = Impute(Mask((2,), torch.tensor([True, False])), torch.zeros(1))


@pytest.mark.parametrize(
    "step", [MetropolisLangevin(), KineticLangevin(), IMPUTE], ids=lambda step: type(step).__name__
)
def test_a_visit_without_a_finite_step_size_is_refused(step):
    class Hole(VPSDE):
        def sigma(self, t):
            return super().sigma(t).where(t < 0.5, torch.nan)

    t = torch.tensor([0.4, 0.9], dtype=torch.float64)
    with pytest.raises(ValueError, match=f"{type(step).__name__} has no finite coefficients at t=0.9"):
        step.plan(Hole(), t, t)

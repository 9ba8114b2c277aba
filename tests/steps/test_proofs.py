"""The six proofs of every step, found by discovery: point mass, exact moments, order, batch independence, and that
every SDE goes with every predictor and corrector or says why not.

A run on Gaussian data is an affine map of its start and its draws. `affine_run` reads this map off the sampler itself,
one unit impulse a sample; nothing below looks into a step, except to compare the sampler with the step's own table.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from closed_forms import (
    F64,
    affine_run,
    affine_table,
    flow,
    gaussian,
    graded,
    log_snr_between,
    mixture,
    moments,
    propagate,
    quantiles,
)
from conftest import CORRECTORS, LINEAR, PREDICTORS, SDES, STEPS, few_steps

import score_sde
from score_sde.noise import BatchNoise, SampleNoise
from score_sde.prediction import Prediction
from score_sde.sampler import Sampler
from score_sde.score import ExactScore, ScoreModel
from score_sde.sde import SDE, VESDE, VPSDE, RectifiedFlow
from score_sde.steps import (
    EulerMaruyama,
    LinearStep,
    StagedStep,
    Step,
    Tabulated,
)
from score_sde.steps.corrected import CorrectedStep
from score_sde.steps.linear import Renoise

SOLVERS = {name: step for name, step in PREDICTORS.items() if step.calls > 0}


def stochastic(step: Step) -> bool:
    """Whether a run draws noise."""
    draws = []

    class Watching(BatchNoise):
        def open(self, shape, dtype, device):
            stream = super().open(shape, dtype, device)
            return lambda step, draw: draws.append((step, draw)) or stream(step, draw)

    model = ExactScore(gaussian(), VPSDE())
    sampler = Sampler(step, log_snr_between(-3.0, -2.5, 2), final="none")
    sampler.sample(model, (1, 1), x_init=torch.zeros(1, 1, dtype=F64), noise=Watching(0))
    return bool(draws)


NOISY = {name: step for name, step in SOLVERS.items() if stochastic(step)}
NOISELESS = {name: step for name, step in SOLVERS.items() if name not in NOISY}


def each(steps: dict[str, Step]):
    return pytest.mark.parametrize("step", list(steps.values()), ids=list(steps))


def residual_on_a_point(step: Step, sde, make_grid) -> float:
    """Largest error of mean and standard deviation on the way, relative to alpha and sigma, for data at one point."""
    sampler = Sampler(step, make_grid, final="none")
    times = make_grid(sde)
    start = moments(sde, float(times[0]), 1.5, 0.0)
    means, stds = propagate(affine_run(sampler, sde, 1.5, 0.0), *start)
    expected = np.array([moments(sde, float(t), 1.5, 0.0) for t in times])
    scale = expected[:, 0] / 1.5 + expected[:, 1]
    return float(max((abs(means - expected[:, 0]) / scale).max(), (abs(stds - expected[:, 1]) / scale).max()))


# --- 1: a point mass --------------------------------------------------------------------------------------------------


@each({name: step for name, step in SOLVERS.items() if step.point_mass})
def test_a_point_mass_is_carried_exactly(sde, step):
    """From p_t of a point, every step of a run has mean alpha_s x_0 and standard deviation sigma_s."""
    assert residual_on_a_point(step, sde, log_snr_between(-3.5, 3.0, 7)) < 1e-12


@each({name: step for name, step in SOLVERS.items() if not step.point_mass})
def test_the_steps_said_to_be_approximate_are(step):
    assert residual_on_a_point(step, VPSDE(), log_snr_between(-3.5, 3.0, 7)) > 1e-4


# --- 3: exact moments -------------------------------------------------------------------------------------------------


def moves_at(linear, count: int, sde) -> Sampler:
    make_grid = log_snr_between(-3.0, 2.0, count)
    if linear.role == "corrector":
        return Sampler(None, make_grid, linear, final="none")
    return Sampler(linear, make_grid, final="none")


def table_of(sampler: Sampler, sde):
    return affine_table(sampler.plan(sde, sampler.grid(sde)), sde, 0.4, 0.6)


@each({name: step for name, step in LINEAR.items() if name != "Renoise"})
def test_the_sampler_carries_out_its_table(sde, step):
    """The coefficients, propagated by hand, are the affine map of the run: to rounding, draw by draw."""
    if step.role == "corrector" and step.repeats > 10:
        step = type(step)(steps=3)
    sampler = moves_at(step, 5, sde)
    by_hand, run = table_of(sampler, sde), affine_run(sampler, sde, 0.4, 0.6)
    assert by_hand.shape == run.shape == (6, 62)
    np.testing.assert_allclose(run, by_hand, rtol=1e-9, atol=1e-10 * abs(by_hand).max())


class Line(ScoreModel):
    """The exact model of N(mean, std^2) data of any shape, in elementwise arithmetic."""

    def __init__(self, sde, mean: float, std: float, event_shape=(1,)) -> None:
        self.sde, self.mean, self.std, self.event_shape = sde, mean, std, tuple(event_shape)

    def __call__(self, x, t, **condition):
        self.check(x.shape, condition)
        alpha, sigma = float(self.sde.alpha(t)), float(self.sde.sigma(t))
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return Prediction(x, x * gain + self.mean * (1 - gain * alpha), alpha, sigma)


@each({name: step for name, step in LINEAR.items() if name != "Renoise"})
def test_a_million_samples_have_the_tables_mean_and_variance(step):
    """10^6 samples; bounds of 4.5 standard errors, false alarm 7e-6 for each of the two."""
    sde, count = VPSDE(), 10**6
    if step.role == "corrector" and step.repeats > 10:
        step = type(step)(steps=2)
    sampler = moves_at(step, 4, sde)
    start = moments(sde, float(sampler.grid(sde)[0]), 0.4, 0.6)
    means, stds = propagate(table_of(sampler, sde), *start)
    mean, std = means[-1], stds[-1]
    z = torch.randn(count, 1, generator=torch.Generator().manual_seed(1))
    run = sampler.sample(Line(sde, 0.4, 0.6), (count, 1), x_init=start[0] + start[1] * z, seed=2)
    x = run.x.double()
    assert abs(float(x.mean()) - mean) < 4.5 * std / math.sqrt(count) + 1e-6
    assert abs(float(x.var()) / std**2 - 1) < 4.5 * math.sqrt(2 / count) + 1e-6


# --- 4: order ---------------------------------------------------------------------------------------------------------


@each(NOISELESS)
@pytest.mark.parametrize("sde", [VPSDE(), VESDE(), RectifiedFlow()], ids=["VP", "VE", "flow"])
def test_the_declared_order_is_the_measured_one(sde, step):
    """Error against the exact flow of quantiles on a mixture, halved steps; the start is graded, so that the low-order
    first moves of a multistep method do not show."""
    target, first, last = mixture(), -3.8, 2.0
    t, s = (float(sde.time_at(lmbda)) for lmbda in (first, last))
    x = quantiles(target, sde, t)
    expected = flow(target, sde, x, t, s)
    errors = []
    for count in (96, 192):
        sampler = Sampler(step, graded(first, last, count), final="none")
        run = sampler.sample(ExactScore(target, sde), (len(x), 1), x_init=x[:, None])
        errors.append(float((run.x[:, 0] - expected).abs().max()))
    assert errors[1] > 1e-11, "at the rounding floor: no order to be measured"
    assert abs(math.log2(errors[0] / errors[1]) - step.order) < 0.3


@each(NOISY)
@pytest.mark.parametrize("sde", [VPSDE(), VESDE(), RectifiedFlow()], ids=["VP", "VE", "flow"])
def test_the_weak_order_is_at_least_the_declared_one(sde, step):
    """Error of mean and variance on Gaussian data, without Monte Carlo; on finer grids where terms of two signs meet."""

    def error(count: int) -> float:
        sampler = Sampler(step, graded(-3.0, 1.5, count), final="none")
        times = sampler.grid(sde)
        start, end = (moments(sde, float(times[i]), 1.0, 0.7) for i in (0, -1))
        means, stds = propagate(affine_run(sampler, sde, 1.0, 0.7, draws=count * 4), *start)
        return max(abs(means[-1] - end[0]), abs(stds[-1] - end[1]))

    coarse, fine = error(40), error(80)
    assert fine < 0.2
    if math.log2(coarse / fine) <= step.order - 0.3:
        coarse, fine = fine, error(160)
    assert math.log2(coarse / fine) > step.order - 0.3


# --- where a move goes on from -----------------------------------------------------------------------------------------


@each(SOLVERS)
def test_a_move_goes_on_from_the_predictions_x_if_the_step_says_so(step):
    """Of predictions that are all of one point, where a move began does not count; history and noise aside."""
    sde, times = VPSDE(), torch.tensor([0.8, 0.6, 0.4], dtype=F64)
    model, rows = ExactScore(mixture(), sde), step.plan(sde, times[:-1], times[1:])

    def at_one_point(x, t):
        return model(torch.full_like(x, 0.3), t)

    def end(x):
        history = ()
        for row in rows:
            moved, history = step.advance(row, x, history, at_one_point, lambda k: x * 0)
        return moved

    starts = (torch.full((1, *model.event_shape), value, dtype=F64) for value in (-1.0, 2.0))
    assert torch.equal(*map(end, starts)) == step.takes_x


# --- 5: batch independence --------------------------------------------------------------------------------------------


class Bumpy(ScoreModel):
    """Elementwise and nonlinear, so that any coupling of samples is the sampler's."""

    def __init__(self, sde, event_shape) -> None:
        self.sde, self.event_shape = sde, tuple(event_shape)

    def __call__(self, x, t, **condition):
        alpha, sigma = float(self.sde.alpha(t)), float(self.sde.sigma(t))
        return Prediction(x, torch.tanh(x + 0.3), alpha, sigma)

    def log_prob(self, x, t):
        return -(x**2).flatten(1).cumsum(1)[:, -1]


def same_in_any_batch(sampler: Sampler, model: ScoreModel) -> bool:
    def run(seeds):
        return sampler.sample(model, (len(seeds), *model.event_shape), noise=SampleNoise(seeds)).x

    whole = run(range(9))
    parts = [run(range(0, 1)), run(range(1, 4)), run(range(4, 9))]
    shuffled = run([8, 3, 100, 0])
    return (
        bool(whole.isfinite().all())
        and torch.equal(torch.cat(parts), whole)
        and torch.equal(shuffled[[0, 1, 3]], whole[[8, 3, 0]])
    )


@few_steps
@each({name: step for name, step in PREDICTORS.items() if name != "Renoise"})
def test_a_predictors_sample_is_bitwise_the_same_in_any_batch(step):
    for sde, shape in ((VPSDE(), (3,)), (VESDE(), (2, 2, 3))):
        assert same_in_any_batch(Sampler(step, log_snr_between(-3.0, 2.0, 4)), Bumpy(sde, shape))


@few_steps
@each({name: step for name, step in CORRECTORS.items() if getattr(step, "norm", "sample") != "batch"})
def test_a_correctors_sample_is_bitwise_the_same_in_any_batch(step):
    for sde, shape in ((VPSDE(), (3,)), (VESDE(), (2, 2, 3))):
        sampler = Sampler(EulerMaruyama(), log_snr_between(-3.0, 2.0, 4), step)
        assert same_in_any_batch(sampler, Bumpy(sde, shape))


@few_steps
def test_batch_norms_couple_the_samples_as_documented():
    step = next(step for step in CORRECTORS.values() if getattr(step, "norm", "") == "batch")
    assert not same_in_any_batch(Sampler(None, log_snr_between(-3.0, 2.0, 4), step), Bumpy(VPSDE(), (3,)))


# --- 6: every pairing -------------------------------------------------------------------------------------------------


def first_of_each_class(steps: dict[str, Step]) -> dict[str, Step]:
    return {type(step).__name__: step for step in reversed(steps.values())}


@few_steps
def test_every_pairing_samples_two_finite_steps_or_is_refused(sde, predictor):
    """The classes with every class of corrector, in both orders, and their presets with none; network calls are counted
    and as declared."""
    correctors: dict[str, Step | None] = {"none": None}
    if predictor in first_of_each_class(PREDICTORS).values():
        correctors |= first_of_each_class(CORRECTORS)
    model = ExactScore(gaussian().marginal(1.0, 0.1), sde)
    for name, corrector in correctors.items():
        for first in (True, False):
            sampler = Sampler(predictor, log_snr_between(-3.0, 2.0, 2), corrector, corrector_first=first)
            if type(predictor) is Renoise:  # the sampler's own, for the moves of a grid that go up
                with pytest.raises(ValueError, match="Renoise has no finite coefficients"):
                    sampler.check(sde)
                continue
            sampler.check(sde)
            run = sampler.sample(model, (3, 1), seed=0)
            assert run.x.isfinite().all(), name
            assert run.nfe == 2 * (predictor.calls + (corrector.calls if corrector else 0)) + 1, name


@few_steps
def test_the_pairings_of_an_sde_and_a_corrector_alone(sde, corrector):
    run = Sampler(None, log_snr_between(-3.0, 2.0, 2), corrector).sample(ExactScore(gaussian(), sde), (3, 1), seed=0)
    assert run.x.isfinite().all()
    assert run.nfe == 3 * corrector.calls + 1


def test_discovery_finds_the_classes_of_the_design():
    found = {type(thing) for things in (SDES, PREDICTORS, CORRECTORS) for thing in things.values()}
    public = [getattr(score_sde, name) for name in score_sde.__all__]
    abstract = {SDE, Step, LinearStep, StagedStep, CorrectedStep, Tabulated}
    assert {c for c in public if isinstance(c, type) and issubclass(c, (SDE, Step))} - abstract <= found
    assert NOISY.keys() >= {"EulerMaruyama", "ReverseDiffusion", "Ancestral"}
    assert NOISELESS.keys() >= {"DDIM", "ProbabilityFlowEuler", "ExponentialAdams", "Heun"}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_shown_as_one_writes_it(name: str) -> None:
    step = STEPS[name]
    again = eval(repr(step), {type(step).__name__: type(step)})
    assert vars(again) == vars(step)
    assert repr(copy.deepcopy(step)) == repr(step)

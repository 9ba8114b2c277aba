"""The one loop: where it starts, what it counts, the order of its moves, where it ends, and what it refuses."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
import warnings

import conftest
import pytest
import torch
from closed_forms import F64, affine_run, gaussian, mixture, moments, propagate

from score_sde import AdaptiveODE, AdaptiveSDE, ProbabilityFlowODE, grid
from score_sde.networks import MLP
from score_sde.noise import BatchNoise, SampleNoise
from score_sde.parallel import ParallelSampler
from score_sde.parameterization import Karras
from score_sde.prediction import Prediction
from score_sde.sampler import Sampler
from score_sde.score import ExactScore, FunctionScore, LearnedScore, ScoreModel, reparameterize
from score_sde.sde import VESDE, VPSDE, CosineSDE, DiscreteSDE, KarrasSDE, RectifiedFlow
from score_sde.steps import (
    DDIM,
    Ancestral,
    AnnealedLangevin,
    EulerMaruyama,
    ExponentialAdams,
    Heun,
    KineticLangevin,
    LangevinCorrector,
    RungeKutta2,
    Step,
    UnadjustedLangevin,
)
from score_sde.targets import Empirical, GaussianMixture, make

FIVE = functools.partial(grid.uniform, steps=5)


class Note(Step):
    """Writes down what it is asked to do, and adds one."""

    def __init__(self, role: str, log: list) -> None:
        self.role, self.log = role, log  # type: ignore[misc]

    def plan(self, sde, t, s):
        return list(zip(t.tolist(), s.tolist(), strict=True))

    def advance(self, row, x, history, evaluate, draw):
        self.log.append((self.role, *row))
        evaluate(x, row[0])
        return x + 1, history


def at(*times):
    return lambda sde: torch.tensor(times, dtype=F64)


def model(sde=None, event=(2,)):
    target = make("ring") if event == (2,) else Empirical(torch.zeros(2, *event), 1.0)
    return ExactScore(target, sde or VPSDE())


# --- order of moves, counts, trajectories -----------------------------------------------------------------------------


def noted(corrector_first: bool, predictor: bool = True, corrector: bool = True, **options):
    log: list = []
    sampler = Sampler(
        Note("predictor", log) if predictor else None,
        at(0.9, 0.5, 0.1),
        Note("corrector", log) if corrector else None,
        corrector_first=corrector_first,
        **options,
    )
    run = sampler.sample(model(), (1, 2), x_init=torch.zeros(1, 2), trajectory=True)
    return log, run


def test_corrector_first_is_the_published_code():
    """for t in times: correct at t, predict from t; the last time is reached and not corrected."""
    log, run = noted(corrector_first=True, final="none")
    assert log == [
        ("corrector", 0.9, 0.9), ("predictor", 0.9, 0.5), ("corrector", 0.5, 0.5), ("predictor", 0.5, 0.1)
    ]  # fmt: skip
    assert run.trajectory[:, 0, 0].tolist() == [0, 3, 4]
    assert run.nfe == 4


def test_predictor_first_is_the_papers_algorithm():
    """predict to t_{i+1}, then correct there."""
    log, run = noted(corrector_first=False, final="none")
    assert log == [
        ("predictor", 0.9, 0.5), ("corrector", 0.5, 0.5), ("predictor", 0.5, 0.1), ("corrector", 0.1, 0.1)
    ]  # fmt: skip
    assert run.trajectory[:, 0, 0].tolist() == [0, 2, 4]


@pytest.mark.parametrize("first", [True, False])
def test_a_corrector_alone_visits_every_level(first):
    log, _ = noted(first, predictor=False)
    assert log == [("corrector", t, t) for t in (0.9, 0.5, 0.1)]


@pytest.mark.parametrize("first", [True, False])
def test_a_predictor_alone_makes_every_move(first):
    log, run = noted(first, corrector=False, final="none")
    assert log == [("predictor", 0.9, 0.5), ("predictor", 0.5, 0.1)]
    assert run.trajectory[:, 0, 0].tolist() == [0, 1, 2]


class Watched(ScoreModel):
    """The exact model, which keeps the times it was called at."""

    def __init__(self):
        self.exact, self.calls = model(), []
        self.sde, self.event_shape = self.exact.sde, (2,)

    def __call__(self, x, t, **condition):
        self.calls.append(t)
        return self.exact(x, t)


@pytest.mark.parametrize(
    ("sampler", "nfe"),
    [
        (Sampler(EulerMaruyama(), FIVE), 6),
        (Sampler(EulerMaruyama(), FIVE, final="none"), 5),
        (Sampler(EulerMaruyama(), FIVE, LangevinCorrector(steps=2)), 16),
        (Sampler(EulerMaruyama(), FIVE, LangevinCorrector(steps=2), corrector_first=False), 16),
        (Sampler(None, FIVE, AnnealedLangevin(steps=3)), 19),
        (Sampler(ExponentialAdams(3), FIVE), 6),
        (Sampler(Heun(), functools.partial(grid.karras, steps=17)), 35),
    ],
)
def test_calls_are_counted(sampler, nfe):
    """EDM at N = 18 levels: 2 N - 1 = 35."""
    watched = Watched()
    assert sampler.sample(watched, (3, 2), seed=0).nfe == nfe == len(watched.calls)


def test_a_trajectory_has_the_state_at_every_grid_time():
    x = torch.ones(4, 2)
    run = Sampler(DDIM(), FIVE, final="none").sample(model(), (4, 2), x_init=x, trajectory=True)
    assert run.trajectory.shape == (6, 4, 2)
    assert torch.equal(run.times, FIVE(VPSDE()))
    assert torch.equal(run.trajectory[0], x)
    assert torch.equal(run.trajectory[-1], run.x)
    halfway = Sampler(DDIM(), lambda sde: FIVE(sde)[:4], final="none").sample(model(), (4, 2), x_init=x)
    assert torch.equal(run.trajectory[3], halfway.x)
    plain = Sampler(DDIM(), FIVE).sample(model(), (4, 2), x_init=x)
    assert plain.trajectory is None
    assert plain.seconds > 0
    assert torch.equal(x, torch.ones(4, 2))


@pytest.mark.parametrize("final", ["denoise", "none"])
@pytest.mark.parametrize("corrector_first", [True, False])
def test_states_are_those_of_the_run(final, corrector_first):
    sampler = Sampler(Ancestral(), FIVE, LangevinCorrector(), final, corrector_first)
    run = sampler.sample(model(), (4, 2), seed=0, trajectory=True)
    states = list(sampler.states(model(), (4, 2), seed=0))
    denoised = final == "denoise"
    assert [state.time for state in states] == [*run.times.tolist(), *run.times[-1:].tolist() * denoised]
    assert torch.equal(torch.stack([state.x for state in states[:6]]), run.trajectory)
    assert torch.equal(states[-1].x, run.x)
    calls = [0, 3, 5, 7, 9, 10] if corrector_first else [0, 2, 4, 6, 8, 10]
    assert [state.nfe for state in states] == [*calls, *[run.nfe] * denoised]
    assert states[0].prediction is None
    assert all(state.prediction is not None for state in states[1:])


def test_a_state_has_the_last_prediction_and_a_run_goes_on_from_what_is_written_into_it():
    case = model()
    given = []
    for state in Sampler(DDIM(), FIVE, final="none").states(case, (4, 2), seed=0):
        if state.prediction is not None:
            t, x = given[-1]
            assert torch.equal(state.prediction.denoised, case(x, t).denoised)
        state.x.clamp_(-1, 1)
        given.append((state.time, state.x.clone()))
    assert len(given) == 6
    (t, x), *_ = given[4:]
    rest = Sampler(DDIM(), at(t, given[5][0]), final="none").sample(case, (4, 2), x_init=x)
    assert torch.equal(rest.x.clamp(-1, 1), given[5][1])


def test_a_run_that_is_left_calls_the_network_no_more_and_wrong_requests_are_refused_before_it():
    log: list = []
    for state in Sampler(Note("predictor", log), FIVE).states(model(), (1, 2), seed=0):
        if state.time < 0.5:
            break
    assert len(log) == 3
    with pytest.raises(ValueError, match="shape"):
        Sampler(DDIM(), FIVE).states(model(), (1, 3))
    x = torch.zeros(1, 2, requires_grad=True)
    assert not any(state.x.requires_grad for state in Sampler(DDIM(), FIVE).states(model(), (1, 2), x_init=x))


def test_kept_states_are_not_overwritten_by_later_moves():
    for corrector in (None, LangevinCorrector(steps=2)):
        run = Sampler(Ancestral(), FIVE, corrector).sample(model(), (4, 2), seed=0, trajectory=True)
        again = Sampler(Ancestral(), FIVE, corrector).sample(model(), (4, 2), seed=0, trajectory=True)
        assert len({tuple(state.flatten().tolist()) for state in run.trajectory}) == 6
        assert torch.equal(run.trajectory, again.trajectory)


# --- start and end ----------------------------------------------------------------------------------------------------


def test_the_last_word_is_tweedies_or_the_samples_own():
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    kept, denoised = (
        Sampler(DDIM(), FIVE, final=final).sample(model(), (4, 2), x_init=x) for final in ("none", "denoise")
    )
    torch.testing.assert_close(denoised.x, model()(kept.x, VPSDE().t_min).denoised)
    assert denoised.nfe == kept.nfe + 1


def test_sampling_starts_at_the_models_start():
    for sde in (VESDE(), VPSDE(), KarrasSDE()):
        exact = model(sde)
        run = Sampler(DDIM(), FIVE).sample(exact, (3, 2), seed=5, trajectory=True)
        z = BatchNoise(5).open((3, 2), torch.float32, "cpu")(0, 0)
        assert torch.equal(run.trajectory[0], exact.start(z))

    run = Sampler(DDIM(), FIVE).sample(learned(VESDE()), (20_000, 2), seed=0, trajectory=True)
    assert float(run.trajectory[0].std()) == pytest.approx(50.0, rel=0.02)


class Zero(torch.nn.Module):
    def forward(self, x, c_noise):
        return 0 * x


def learned(sde, data_std=1.0):
    return LearnedScore(Zero(), sde, Karras(data_std), (2,))


LEVELS = functools.partial(grid.tabulated, steps=10, levels="stable_diffusion_xl", stretch=False)
LEADING = functools.partial(grid.respaced, steps=3, spacing="leading")


@pytest.mark.parametrize(
    ("sde", "make_grid"),
    [(KarrasSDE(), LEVELS), (RectifiedFlow(), LEVELS), (VPSDE(), at(0.4, 0.1)), (DiscreteSDE.ddpm(), LEADING)],
    ids=["Karras", "flow", "VP", "leading"],
)
def test_a_grid_that_begins_below_t_max_starts_at_the_gaussian_of_its_own_level(sde, make_grid):
    """Of the target's mean and spread for an exact model, of the data's standard deviation for a learned one."""
    target = GaussianMixture([0.5, 0.5], [[2.0, 0.0], [0.0, 4.0]], torch.eye(2).expand(2, 2, 2) * 0.5)
    z = BatchNoise(5).open((3, 2), torch.float32, "cpu")(0, 0)
    first = float(make_grid(sde)[0])
    alpha, sigma = float(sde.alpha(first)), float(sde.sigma(first))
    exact = ExactScore(target, sde)
    elsewhere = reparameterize(ExactScore(target, VESDE(0.001, 1000.0)), sde)
    cases = [(exact, target.mean, target.std), (elsewhere, target.mean, target.std), (learned(sde, 0.5), 0.0, 0.5)]
    for case, mean, std in cases:
        run = Sampler(DDIM(), make_grid).sample(case, (3, 2), seed=5, trajectory=True)
        expected = (alpha * mean + math.hypot(alpha * std, sigma) * z).float()
        torch.testing.assert_close(run.trajectory[0], expected, rtol=1e-5, atol=1e-5)


def test_optimised_levels_that_begin_below_t_max_have_the_rings_spread():
    """20,000 samples from level 14.6 of 80; started at t_max's prior they came out with a spread of 3.7."""
    run = Sampler(ExponentialAdams(3), LEVELS).sample(model(KarrasSDE()), (20_000, 2), seed=0)
    assert float(run.x.std()) == pytest.approx(make("ring").std, rel=0.02)


def test_the_last_ancestral_step_of_ddpm_is_the_mean():
    """From the least noisy rung DDPM draws no noise: x_{-1} = D, which is final='denoise'."""
    sde = DiscreteSDE.ddpm(100)
    sampler = Sampler(Ancestral(), functools.partial(grid.uniform, steps=99))
    run = sampler.sample(model(sde), (5, 2), seed=0, trajectory=True)
    torch.testing.assert_close(run.x, model(sde)(run.trajectory[-1], 0.0).denoised)


@conftest.few_steps
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_state_keeps_the_callers_dtype(dtype):
    assert Sampler(Ancestral(), FIVE).sample(model(), (3, 2), seed=0, dtype=dtype).x.dtype == dtype
    run = Sampler(Ancestral(), FIVE, LangevinCorrector(norm="sample")).sample(
        model(), (3, 2), x_init=torch.zeros(3, 2, dtype=dtype)
    )
    assert run.x.dtype == dtype


@pytest.mark.parametrize("event", [(5,), (2, 7), (1, 4, 4), (2, 1, 3, 3)])
def test_any_event_shape_goes(event):
    for sampler in (Sampler(Ancestral(), FIVE, LangevinCorrector(norm="sample")), Sampler(Heun(), FIVE)):
        assert sampler.sample(model(event=event), (3, *event), noise=SampleNoise(range(3))).x.shape == (3, *event)


def test_an_empty_batch_is_a_batch():
    assert Sampler(Ancestral(), FIVE).sample(model(), (0, 2), seed=0).x.shape == (0, 2)


# --- grids that go up -------------------------------------------------------------------------------------------------


def test_up_moves_are_exact_forward_transitions():
    """Gaussian data: going up has the transition's moments, and a multistep history starts anew."""
    sde = VPSDE()
    times = sde.time_at(torch.tensor([-3.0, -2.0, -1.0, -2.5, -1.5, 0.0], dtype=F64))
    sampler = Sampler(ExponentialAdams(2), lambda _: times, final="none")
    assert [len(m.row.b) for m in sampler.plan(sde, times)] == [1, 2, 0, 1, 2]
    start = moments(sde, float(times[0]), 0.5, 0.7)
    means, stds = propagate(affine_run(sampler, sde, 0.5, 0.7), *start)
    scale, std = (float(v) for v in sde.transition_kernel(times[2], times[3]))
    assert means[3] == pytest.approx(scale * means[2], rel=1e-12)
    assert stds[3] == pytest.approx(math.hypot(scale * stds[2], std), rel=1e-12)
    run = sampler.sample(ExactScore(gaussian(), sde), (2, 1), seed=0)
    assert run.nfe == 4


def test_going_down_and_up_and_down_keeps_the_law():
    """A finely resolved restart: the moments at the end are those of the data's marginal."""
    sde = VPSDE()
    down = torch.linspace(-4, 1, 200, dtype=F64)
    lambdas = torch.cat([down, torch.tensor([-1.0], dtype=F64), torch.linspace(-1, 1.5, 100, dtype=F64)[1:]])
    sampler = Sampler(ExponentialAdams(2), lambda _: sde.time_at(lambdas), final="none")
    times = sampler.grid(sde)
    start, end = (moments(sde, float(times[i]), 0.5, 0.7) for i in (0, -1))
    means, stds = propagate(affine_run(sampler, sde, 0.5, 0.7), *start)
    assert (means[-1], stds[-1]) == (pytest.approx(end[0], rel=1e-4), pytest.approx(end[1], rel=1e-4))


# --- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [{"seed": 3}, {}, {"noise": SampleNoise(range(4))}])
def test_a_run_leaves_torchs_global_generator_alone(noise):
    state = torch.get_rng_state()
    Sampler(EulerMaruyama(), FIVE, LangevinCorrector()).sample(model(), (4, 2), **noise)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_seed_says_it_all():
    sampler = Sampler(EulerMaruyama(), FIVE, LangevinCorrector())
    first, again, other = (sampler.sample(model(), (4, 2), seed=seed).x for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(sampler.sample(model(), (4, 2)).x, sampler.sample(model(), (4, 2)).x)


def test_a_sample_keeps_its_seed_in_any_batch():
    sampler = Sampler(EulerMaruyama(), FIVE, LangevinCorrector(steps=2))

    class Elementwise(ScoreModel):
        sde, event_shape = VPSDE(), (2,)

        def __call__(self, x, t, **condition):
            return Prediction(x, x.sin(), float(self.sde.alpha(t)), float(self.sde.sigma(t)))

    whole = sampler.sample(Elementwise(), (8, 2), noise=SampleNoise(range(8))).x
    for i in range(8):
        assert torch.equal(sampler.sample(Elementwise(), (1, 2), noise=SampleNoise([i])).x[0], whole[i])


def test_no_two_draws_of_a_run_share_a_key():
    keys = []

    class Watching(BatchNoise):
        def open(self, shape, dtype, device):
            stream = super().open(shape, dtype, device)
            return lambda step, draw: keys.append((step, draw)) or stream(step, draw)

    times = at(0.9, 0.6, 0.3, 0.7, 0.2)
    sampler = Sampler(EulerMaruyama(), times, LangevinCorrector(steps=3), corrector_first=False)
    sampler.sample(model(), (1, 2), noise=Watching(0))
    assert len(keys) == len(set(keys)) == 1 + 4 + 12


# --- quality with the exact score -------------------------------------------------------------------------------------


def test_samples_of_a_mixture_have_its_law():
    """10,000 samples by EM + corrector: shares of the half lines and moments within 5 standard errors."""
    target, sde = mixture(), VPSDE()
    sampler = Sampler(EulerMaruyama(), functools.partial(grid.uniform, steps=250), LangevinCorrector(0.1))
    x = sampler.sample(ExactScore(target, sde), (10_000, 1), seed=0).x.double()
    mean, std = float(target.mean), target.std
    assert float(x.mean()) == pytest.approx(mean, abs=5 * std / 100)
    assert float(x.std()) == pytest.approx(std, abs=5 * std / 100)
    share = float((x < -0.6).double().mean())
    normal = torch.distributions.Normal(target.means[:, 0], target.covariances[:, 0, 0].sqrt())
    expected = float((target.weights * normal.cdf(torch.tensor(-0.6, dtype=F64))).sum())
    assert share == pytest.approx(expected, abs=5 * 0.5 / 100)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Sampler(None, FIVE), "a predictor, a corrector or both"),
        (lambda: Sampler(EulerMaruyama, FIVE), r"construct it, e\.g\. EulerMaruyama\(\)"),
        (lambda: Sampler(EulerMaruyama(), 100), r"partial\(grid\.uniform, steps=100\)"),
        (lambda: Sampler(EulerMaruyama(), grid.log_snr), r"log_snr is not \(missing a required argument: 'steps'\)"),
        (lambda: Sampler(EulerMaruyama(), FIVE, final="zero"), "final is one of denoise, none; got 'zero'"),
        (lambda: Sampler(LangevinCorrector(), FIVE), "cannot be the predictor"),
        (lambda: Sampler(DDIM(), FIVE, DDIM()), "cannot be the corrector"),
    ],
)
def test_impossible_samplers_are_refused(build, message):
    with pytest.raises(ValueError, match=message) as refusal:
        build()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"seed": 1, "noise": BatchNoise(1)}, ValueError, "not both"),
        ({"noise": 7}, TypeError, "noise is a noise source"),
        ({"noise": SampleNoise(range(3))}, ValueError, "3 seeds for a batch of 4"),
        ({"x_init": torch.zeros(3, 2)}, ValueError, r"x_init has shape \(3, 2\)"),
        ({"x_init": torch.zeros(4, 2, dtype=torch.uint8)}, TypeError, "floating-point"),
        ({"x_init": [[0.0, 0.0]] * 4}, TypeError, "x_init is a tensor, got list"),
        ({"condition": {"lable": 1}}, TypeError, "unknown condition 'lable'"),
        ({"shape": 10}, ValueError, r"shape is \(batch, 2\) for this model, got 10"),
        ({"shape": (-1, 2)}, ValueError, "size in shape >= 0, got size in shape=-1"),
        ({"seed": 0.5}, ValueError, "a whole number seed, got seed=0.5"),
        ({"shape": (4, 3)}, ValueError, r"x of shape \(batch, 2\), got \(4, 3\)"),
    ],
)
def test_impossible_requests_are_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        Sampler(DDIM(), FIVE).sample(model(), **{"shape": (4, 2), **options})


@pytest.mark.parametrize(
    ("make_grid", "message"),
    [
        (at(0.1, 0.9), "reverse it"),
        (at(0.9, 0.9, 0.1), "two equal times"),
        (at(2.0, 0.1), r"\[t_min, t_max\]"),
        (at(0.9, math.nan), "finite noise level"),
        (functools.partial(grid.uniform, steps=0), "steps >= 1, got steps=0"),
    ],
)
def test_impossible_grids_are_refused_before_any_call(make_grid, message):
    watched = Watched()
    for act in (lambda s: s.check(VPSDE()), lambda s: s.sample(watched, (1, 2), seed=0)):
        with pytest.raises(ValueError, match=message):
            act(Sampler(DDIM(), make_grid))
    assert not watched.calls


# --- the package ------------------------------------------------------------------------------------------------------


def test_dropout_that_is_at_work_is_warned_of():
    network = torch.nn.Sequential(torch.nn.Dropout(0.5))
    network.forward = lambda x, c_noise: network[0](x)
    model, sampler = LearnedScore(network, VPSDE(), Karras(1.0), (2,)), Sampler(DDIM(), FIVE)
    with pytest.warns(UserWarning, match=r"its dropout changes every call: model.eval\(\) first") as caught:
        sampler.sample(model, (3, 2), seed=0)
    assert caught[0].filename == __file__
    network[0].p = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.sample(model, (3, 2), seed=0)
        network[0].p = 0.5
        sampler.sample(model.eval(), (3, 2), seed=0)


def test_importing_the_package_is_cheap_and_drags_nothing_in():
    """At most 0.3 s of processor time on top of torch, the better of two runs; 0.04 s when written."""
    script = (
        "import time, torch, sys; start = time.process_time(); import score_sde; "
        "print(time.process_time() - start, *sorted({m.split('.')[0] for m in sys.modules}))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True) for _ in range(2)
    ]
    loaded = set(runs[0].stdout.split()[1:])
    assert not loaded & {"hydra", "omegaconf", "matplotlib", "pandas", "sklearn", "ot", "lightning_fabric", "scipy"}
    assert min(float(run.stdout.split()[0]) for run in runs) < 0.3


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            lambda sde, times: torch.ones(3, dtype=torch.bool),
            r"each of the 6 grid times, got torch\.bool of shape \(3,\)",
        ),
        (lambda sde, times: torch.ones(6), "got torch.float32"),
        ([True] * 6, "corrector_where is a function"),
    ],
)
def test_where_a_corrector_acts_is_a_mask_of_the_grid(mask, message):
    with pytest.raises(ValueError, match=message):
        Sampler(DDIM(), FIVE, LangevinCorrector(), corrector_where=mask).check(VPSDE())
    with pytest.raises(ValueError, match="without a corrector"):
        Sampler(DDIM(), FIVE, corrector_where=grid.every)


def test_results_are_printed_on_one_line():
    model = ExactScore(make("ring"), VPSDE())
    result = Sampler(DDIM(), FIVE).sample(model, (7, 2), seed=0)
    shown = repr(result)
    assert shown.startswith("SampleResult(x=<7x2 float32>, nfe=6, seconds=")
    assert shown.endswith("trajectory=None, times=<6 float64>)")
    assert repr(model(result.x, 0.5)).startswith("Prediction(x=<7x2 float32>, raw=<7x2 float32>, alpha=0.")


def test_a_sampler_is_shown_as_one_writes_it():
    sampler = Sampler(Heun(), functools.partial(grid.churn, base=functools.partial(grid.karras, steps=5)), final="none")
    shown = "Sampler(predictor=Heun(), grid=partial(churn, base=partial(karras, steps=5)), final='none')"
    assert repr(sampler) == shown


def test_a_sampler_of_ones_own_is_shown_by_its_name_and_arguments():
    class Mine(Sampler):
        def __init__(self, steps):
            self.steps = steps
            super().__init__(DDIM(), functools.partial(grid.uniform, steps=steps))

    assert repr(Mine(7)) == "Mine(steps=7)"


@pytest.mark.parametrize(
    "solver",
    [Sampler(DDIM(), FIVE), ParallelSampler(DDIM(), FIVE), AdaptiveODE(), AdaptiveSDE(), ProbabilityFlowODE()],
    ids=lambda solver: type(solver).__name__,
)
def test_a_model_that_returns_no_prediction_or_one_of_another_process_is_refused(solver):
    class Foreign(ExactScore):
        def __call__(self, x, t, **condition):
            return ExactScore(self.target, VESDE())(x, t)

    class Bare(ExactScore):
        def __call__(self, x, t, **condition):
            return x

    with pytest.raises(
        ValueError, match=r"predicts with alpha=1 and sigma=50 at t=1, where its sde has 0\.006572 and 1"
    ):
        solver.sample(Foreign(make("ring"), VPSDE()), (3, 2), seed=0)
    with pytest.raises(TypeError, match="Bare returns a Prediction, got Tensor"):
        solver.sample(Bare(make("ring"), VPSDE()), (3, 2), seed=0)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (DDIM, "eta"), (RungeKutta2, "alpha"), (UnadjustedLangevin, "ratio"), (KineticLangevin, "persistence"),
        (AnnealedLangevin, "epsilon"), (AnnealedLangevin, "sigma_L"), (AnnealedLangevin.by_variance, "gamma"),
        (functools.partial(ParallelSampler, DDIM(), FIVE), "tolerance"), (AdaptiveSDE, "safety"), (AdaptiveSDE, "exponent"),
        (functools.partial(grid.hyperbolic, VPSDE(), 3), "width"), (functools.partial(grid.beta, VPSDE(), 3), "a"),
        (functools.partial(grid.churn, VPSDE(), FIVE), "S_churn"), (functools.partial(grid.ancestral, VPSDE(), FIVE), "eta"),
        (functools.partial(grid.within, VPSDE(), torch.ones(3)), "low"), (CosineSDE, "s"), (VPSDE, "t_min"), (VESDE, "t_min"),
        (RectifiedFlow, "t_max"), (DiscreteSDE.ddpm, "beta_1"), (DiscreteSDE.overlapping, "overlap"),
    ],
)  # fmt: skip
def test_a_word_in_place_of_a_number_is_named(make, name):
    with pytest.raises(ValueError, match=f"give a number {name}, got {name}='half'"):
        make(**{name: "half"})


def test_samples_that_are_lost_are_warned_of():
    model = ExactScore(make("ring"), VPSDE())
    x = model.start(torch.zeros(3, 2))
    x[1] = math.nan
    with pytest.warns(UserWarning, match="1 of 3 samples are not finite"):
        Sampler(DDIM(), FIVE).sample(model, x.shape, x_init=x)
    with pytest.warns(UserWarning, match="1 of 3 samples are not finite"):
        ParallelSampler(DDIM(), FIVE).sample(model, x.shape, x_init=x)
    with warnings.catch_warnings(action="error"):
        Sampler(DDIM(), FIVE).sample(model, x.shape, seed=0)


def test_finite_samples_that_have_run_off_are_warned_of_wherever_the_data_and_the_grid_end_lie():
    """Against E x^2, of which an offset of the data is part, and the noise at the grid's end."""
    far = GaussianMixture([1.0], [[1e4, -1e4]], [[[1e-4, 0.0], [0.0, 1e-4]]])
    model, early = ExactScore(far, KarrasSDE()), lambda sde: torch.tensor([80.0, 75.0, 70.0], dtype=F64)
    with warnings.catch_warnings(action="error"):
        x = Sampler(DDIM(), FIVE).sample(model, (3, 2), seed=0).x
        Sampler(DDIM(), early, final="none").sample(ExactScore(make("ring"), KarrasSDE()), (3, 2), seed=0)
    for sampler in (Sampler(DDIM(), FIVE), ParallelSampler(DDIM(), FIVE)):
        wild = FunctionScore(lambda x, t: 300 * x, KarrasSDE(), (2,), gives="denoised")
        with pytest.warns(UserWarning, match=r"samples have a root mean square of .* where 1 is expected"):
            sampler.sample(wild, x.shape, seed=0)


def through(step: Step) -> Sampler:
    if step.role == "predictor":
        return Sampler(step, functools.partial(grid.log_snr, steps=4))
    return Sampler(Ancestral(), functools.partial(grid.log_snr, steps=3), corrector=step)


@pytest.mark.parametrize("name", conftest.STEPS)
def test_derivatives_flow_through_every_step(name):
    """Against central differences in one number of one start; the noise is the same."""
    exact, options = model(), {"noise": SampleNoise(range(3)), "shape": (3, 2)}
    try:
        through(conftest.STEPS[name]).check(exact.sde)
    except ValueError:
        pytest.skip("a step of ladders")
    start = torch.randn(3, 2, generator=torch.Generator().manual_seed(2), dtype=F64)
    x, h = start.clone().requires_grad_(), torch.tensor([[0.0, 0.0], [1e-5, 0.0], [0.0, 0.0]], dtype=F64)
    made = through(conftest.STEPS[name]).sample(exact, x_init=x, gradient=True, **options).x
    (found,) = torch.autograd.grad(made.sum(), x)
    ends = [through(conftest.STEPS[name]).sample(exact, x_init=start + sign * h, **options).x for sign in (1, -1)]
    wanted = (ends[0] - ends[1]).sum() / 2e-5
    torch.testing.assert_close(found[1, 0], wanted, rtol=1e-5, atol=1e-6)
    assert not through(conftest.STEPS[name]).sample(exact, x_init=x, **options).x.requires_grad


def test_weights_get_their_gradient_and_cuda_graphs_have_none():
    learned = LearnedScore(MLP((2,), width=8, depth=1), VPSDE(), Karras(), (2,))
    learned.network.requires_grad_()
    x = Sampler(Heun(), FIVE).sample(learned, (4, 2), seed=0, gradient=True).x
    x.square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in learned.parameters())
    graphed = Sampler(Heun(), FIVE)
    graphed.cuda_graph = True  # which cannot be asked for without a GPU
    with pytest.raises(ValueError, match="cuda_graph=False"):
        graphed.sample(learned, (4, 2), gradient=True)

"""The probability-flow ODE against its solutions in closed form, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
from closed_forms import F64, flow, gaussian, mixture, quantiles

from score_sde.adaptive import AdaptiveODE
from score_sde.evaluation.tilted import LabelledMixture
from score_sde.noise import SampleNoise
from score_sde.ode import METHODS, ProbabilityFlowODE
from score_sde.score import ExactScore, FunctionScore, ScoreModel
from score_sde.sde import VESDE, VPSDE, DiscreteSDE, KarrasSDE
from score_sde.targets import GaussianMixture, make


def solution(sde, mean: float, std: float, x, t: float, s: float):
    """x(s) = alpha_s mu + sqrt(v_s / v_t) (x(t) - alpha_t mu), v = alpha^2 std^2 + sigma^2."""
    (a, v), (b, w) = (
        (float(sde.alpha(u)), float(sde.alpha(u)) ** 2 * std**2 + float(sde.sigma(u)) ** 2) for u in (t, s)
    )
    return b * mean + math.sqrt(w / v) * (x - a * mean)


def test_the_flow_of_a_gaussian_is_the_closed_form(sde):
    """Every SDE, there and back. A ladder's rates jump at its rungs: the step-size control sees little of it, and the
    error is larger than the tolerance."""
    model = ExactScore(gaussian(0.4, 0.5), sde)
    std = sde.prior_std
    x = float(sde.alpha(sde.t_max)) * 0.4 + std * torch.linspace(-2, 2, 5, dtype=F64)[:, None]
    ladder = isinstance(sde, DiscreteSDE)
    solver = ProbabilityFlowODE(rtol=1e-5, atol=1e-5) if ladder else ProbabilityFlowODE("DOP853", rtol=1e-9, atol=1e-9)
    bound = 5e-3 if ladder else 1e-6
    run = solver.sample(model, (5, 1), x_init=x)
    expected = solution(sde, 0.4, 0.5, x, sde.t_max, sde.t_min)
    torch.testing.assert_close(run.x, expected, rtol=0, atol=bound)
    back = solver.encode(model, expected)
    torch.testing.assert_close(back.x, x, rtol=0, atol=2 * bound * std)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_scipy_solves_it(method):
    sde = VPSDE()
    x = torch.tensor([[-1.5], [0.2], [2.0]], dtype=F64)
    run = ProbabilityFlowODE(method, rtol=1e-6, atol=1e-8).sample(ExactScore(gaussian(0.4, 0.5), sde), (3, 1), x_init=x)
    torch.testing.assert_close(run.x, solution(sde, 0.4, 0.5, x, 1.0, 1e-3), rtol=0, atol=2e-4)


def test_the_default_is_as_good_as_the_peers():
    """RK45 at 1e-5 on N(0, 0.25): the reference has an error of 6.1e-5 at 50 calls."""
    x = torch.linspace(-2, 2, 9, dtype=F64)[:, None]
    run = ProbabilityFlowODE().sample(ExactScore(gaussian(0.0, 0.5), VPSDE()), (9, 1), x_init=x)
    assert (run.x - solution(VPSDE(), 0.0, 0.5, x, 1.0, 1e-3)).abs().max() < 1.2e-4
    assert run.nfe <= 60


@pytest.mark.parametrize("sde", [VPSDE(), VESDE(sigma_max=20.0), KarrasSDE()], ids=repr)
def test_the_flow_of_a_mixture_carries_quantiles(sde):
    target = mixture()
    x = quantiles(target, sde, sde.t_max, 9)
    run = ProbabilityFlowODE("DOP853", rtol=1e-9, atol=1e-9).sample(ExactScore(target, sde), (9, 1), x_init=x[:, None])
    torch.testing.assert_close(run.x[:, 0], flow(target, sde, x, sde.t_max, sde.t_min), rtol=0, atol=2e-6)


@pytest.mark.parametrize("control", ["joint", "each"])
def test_encoding_and_sampling_are_inverses(control):
    model = ExactScore(make("ring", std=0.5), VPSDE())
    x = make("ring", std=0.5).sample((4,), generator=torch.Generator().manual_seed(0)).double()
    solver = ProbabilityFlowODE(rtol=1e-8, atol=1e-8, error_control=control)
    code = solver.encode(model, x)
    torch.testing.assert_close(solver.sample(model, (4, 2), x_init=code.x).x, x, rtol=0, atol=1e-4)


def test_latent_codes_are_normal():
    """What the encoder makes of the data's marginal is the prior: moments of 2,000 codes within 5 standard errors."""
    target, sde = make("ring", components=4, radius=1.0, std=0.3), VPSDE()
    x = target.marginal(float(sde.alpha(1e-3)), float(sde.sigma(1e-3))).sample(
        (2000,), generator=torch.Generator().manual_seed(0)
    )
    code = ProbabilityFlowODE().encode(ExactScore(target, sde), x).x
    assert (code.mean(0).abs() < 5 / math.sqrt(2000)).all()
    assert ((code.std(0) - 1).abs() < 5 / math.sqrt(4000)).all()


def test_each_sample_has_its_own_condition():
    target = make("ring", components=3)
    model, x = LabelledMixture(target, VPSDE()), torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    condition = {"label": torch.tensor([2, 0, 1])}
    each, joint = (ProbabilityFlowODE(error_control=control).sample(model, (3, 2), x_init=x, condition=condition).x
                   for control in ("each", "joint"))  # fmt: skip
    torch.testing.assert_close(each, joint, atol=2e-3, rtol=0)


def test_each_samples_error_is_its_own():
    """A sample keeps its solution in any batch, and one hard companion does not spoil it."""
    target = GaussianMixture([0.5, 0.5], [[-3.0], [3.0]], [[[1e-4]], [[1.0]]])
    model, solver = ExactScore(target, VPSDE()), ProbabilityFlowODE(error_control="each")
    noise = SampleNoise(range(5))
    whole = solver.sample(model, (5, 1), noise=noise, dtype=F64)
    alone = solver.sample(model, (1, 1), noise=SampleNoise([3]), dtype=F64)
    assert torch.equal(whole.x[3:4], alone.x)
    assert whole.nfe >= alone.nfe


def test_trajectories_have_their_times():
    model, x = ExactScore(gaussian(), VPSDE()), torch.tensor([[0.5], [-1.0]], dtype=F64)
    solver = ProbabilityFlowODE(rtol=1e-8, atol=1e-8)
    run = solver.sample(model, (2, 1), x_init=x, trajectory=True, points=11)
    assert run.trajectory.shape == (11, 2, 1)
    torch.testing.assert_close(run.times, torch.linspace(1.0, 1e-3, 11, dtype=F64))
    for state, t in zip(run.trajectory, run.times.tolist(), strict=True):
        torch.testing.assert_close(state, solution(VPSDE(), 0.3, 0.5, x, 1.0, t), rtol=0, atol=1e-3)
    assert torch.equal(run.trajectory[-1], run.x)
    back = solver.encode(model, x, trajectory=True, points=5)
    assert float(back.times[0]) == pytest.approx(1e-3)
    assert torch.equal(back.trajectory[0], x)
    assert solver.sample(model, (2, 1), x_init=x).trajectory is None
    with pytest.raises(ValueError, match="points >= 2, got points=1"):
        solver.sample(model, (2, 1), x_init=x, trajectory=True, points=1)


def test_calls_are_counted_and_the_last_is_tweedies():
    exact, calls = ExactScore(gaussian(), VPSDE()), []

    class Watched(ScoreModel):
        sde, event_shape = exact.sde, (1,)

        def __call__(self, x, t, **condition):
            calls.append(len(x))
            return exact(x, t)

    x = torch.ones(3, 1, dtype=F64)
    plain = ProbabilityFlowODE().sample(Watched(), (3, 1), x_init=x)
    assert plain.nfe == len(calls)
    denoised = ProbabilityFlowODE(final="denoise").sample(Watched(), (3, 1), x_init=x)
    assert denoised.nfe == plain.nfe + 1
    torch.testing.assert_close(denoised.x, exact(plain.x, 1e-3).denoised)
    calls.clear()
    each = ProbabilityFlowODE(error_control="each").sample(Watched(), (3, 1), x_init=x)
    assert set(calls) == {1}
    assert each.nfe == len(calls) / 3


def test_it_starts_and_keeps_dtype_as_the_sampler_does():
    model = ExactScore(make("ring"), VPSDE())
    solver = ProbabilityFlowODE(rtol=1e-3, atol=1e-3)
    state = torch.get_rng_state()
    first, again = (solver.sample(model, (3, 2), seed=4) for _ in range(2))
    assert torch.equal(first.x, again.x)
    assert first.x.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), state)
    assert solver.sample(model, (2, 2), seed=0, dtype=F64).x.dtype == F64


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("start", [0.5, 2.0])
def test_a_model_that_is_not_finite_from_some_time_on_ends_in_one_line(method, start):
    """LSODA returned samples that were not finite; a NaN at the first call was an error about the time NaN."""
    broken = FunctionScore(lambda x, t: -x * (math.nan if t < start else 1.0), VPSDE(), (1,))
    with pytest.raises(RuntimeError, match=f"{method} met a rate of change that is not finite"):
        ProbabilityFlowODE(method).sample(broken, (1, 1), x_init=torch.ones(1, 1, dtype=F64))


@pytest.mark.parametrize("solver", [ProbabilityFlowODE(), ProbabilityFlowODE("LSODA"), AdaptiveODE()], ids=repr)
def test_a_model_that_is_too_rough_is_given_up(solver, monkeypatch):
    """The solvers had no bound, or one of 100,000 steps: hours of a network's calls."""
    for module in ("ode", "embedded"):
        monkeypatch.setattr(f"score_sde.{module}.MAX_CALLS", 2000)
    calls = []

    def rough(x, t):
        calls.append(t)
        return 50 * (1e4 * x).sin() - x

    with pytest.raises(RuntimeError, match=r"not come to its end in [0-9,]+ calls: .* loosen rtol and atol"):
        solver.sample(FunctionScore(rough, VPSDE(), (2,)), (4, 2), seed=0)
    assert 2000 <= len(calls) < 3000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "RK4"}, "method is one of RK45"),
        ({"rtol": 0.0}, "tolerances are positive"),
        ({"atol": float("nan")}, "tolerances are positive"),
        ({"error_control": "batch"}, "error_control is one of joint, each"),
        ({"final": "zero"}, "final is one of denoise, none"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ProbabilityFlowODE(**options)

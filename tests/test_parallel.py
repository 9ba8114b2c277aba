"""Parallel-in-time sampling against the sequential sampler with the same noise."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from score_sde import (
    DDIM,
    VPSDE,
    BatchNoise,
    EulerMaruyama,
    ExactScore,
    ExponentialAdams,
    Heun,
    LinearStep,
    Prediction,
    SampleNoise,
    Sampler,
    ScoreModel,
    grid,
    targets,
)
from score_sde.parallel import ParallelSampler
from score_sde.sde import SDE, Time
from score_sde.steps import Tabulated
from score_sde.steps.linear import Coefficients

DOUBLE = torch.float64
STEPS = partial(grid.log_snr, steps=25)


class NoiseAdams(LinearStep):
    """Second-order Adams-Bashforth on the noise prediction, a step whose history is not D."""

    memory = 2

    def output(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)

    def coefficients(self, sde: SDE, times: Tensor, s: Tensor) -> Coefficients:
        level = (-sde.half_log_snr(torch.cat([s[None], times]))).exp()
        h = level[0] - level[1]
        second = h**2 / 2 / (level[1] - level[2]) if len(times) == 2 else None
        weights = [h] if second is None else [h + second, -second]
        return sde.alpha(s) / sde.alpha(times[0]), [sde.alpha(s) * w for w in weights], torch.zeros_like(s)


PREDICTORS: dict[str, LinearStep] = {
    "DDIM": DDIM(),
    "ancestral DDIM": DDIM(eta=1.0),
    "ExponentialAdams 3": ExponentialAdams(3),
    "SDE ExponentialAdams 2": ExponentialAdams(2, eta=1.0),
    "EulerMaruyama": EulerMaruyama(),
    "NoiseAdams": NoiseAdams(),
}


@pytest.fixture(scope="module")
def model() -> ExactScore:
    return ExactScore(targets.make("ring", weights=list(range(1, 9))), VPSDE())


@pytest.mark.parametrize("window", [1, 4, None])
@pytest.mark.parametrize("predictor", PREDICTORS.values(), ids=PREDICTORS.keys())
def test_at_tolerance_zero_it_is_the_sequential_run(
    model: ExactScore, predictor: LinearStep, window: int | None
) -> None:
    for noise in (BatchNoise(5), SampleNoise(range(12))):
        for final in ("denoise", "none"):
            asked = {"noise": noise, "dtype": DOUBLE, "trajectory": True}
            expected = Sampler(predictor, STEPS, final=final).sample(model, (12, 2), **asked)
            found = ParallelSampler(predictor, STEPS, window, 0.0, final).sample(model, (12, 2), **asked)
            torch.testing.assert_close(found.trajectory, expected.trajectory, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(found.x, expected.x, rtol=1e-9, atol=1e-9)
            assert torch.equal(found.times, expected.times)
            assert found.rounds <= expected.nfe + 1


def test_a_grid_that_begins_below_t_max_starts_as_the_sequential_run(model: ExactScore) -> None:
    levels = partial(grid.tabulated, steps=10, levels="stable_diffusion_xl", stretch=False)
    expected, found = (
        sampler.sample(model, (12, 2), seed=3, dtype=DOUBLE)
        for sampler in (Sampler(DDIM(), levels), ParallelSampler(DDIM(), levels, tolerance=0.0))
    )
    torch.testing.assert_close(found.x, expected.x, rtol=1e-9, atol=1e-9)


def test_the_tolerance_buys_rounds_and_the_error_falls_with_it(model: ExactScore) -> None:
    long = partial(grid.log_snr, steps=200)
    expected = Sampler(DDIM(), long).sample(model, (32, 2), seed=2, dtype=DOUBLE)
    errors, rounds = [], []
    for tolerance in (1e-3, 1e-5, 1e-7):
        found = ParallelSampler(DDIM(), long, 40, tolerance).sample(model, (32, 2), seed=2, dtype=DOUBLE)
        errors.append((found.x - expected.x).square().mean().sqrt().item())
        rounds.append(found.rounds)
        assert found.nfe >= expected.nfe
    assert rounds[0] <= rounds[1] <= rounds[2] < expected.nfe / 3
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[1] < 1e-3


class Affine(ScoreModel):
    """D = x / (1 + sigma^2) in elementwise arithmetic, counting the samples that it is called with."""

    condition_names = frozenset({"shift"})

    def __init__(self) -> None:
        self.sde, self.event_shape, self.seen = VPSDE(), (3, 2), 0

    def __call__(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        self.seen += len(x)
        t = torch.as_tensor(t, dtype=DOUBLE).expand(len(x))
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        denoised = x / (1 + sigma**2).to(x)[:, None, None] + condition.get("shift", torch.zeros(len(x)))[:, None, None]
        return Prediction(x, denoised.to(x), alpha, sigma)


def test_companions_change_nothing_and_conditions_follow() -> None:
    model = Affine()
    sampler = ParallelSampler(DDIM(eta=0.5), STEPS, 6, 1e-4)
    shift = torch.tensor([0.0, 3.0, -1.0, 0.5, 9.0])
    whole = sampler.sample(model, (5, 3, 2), noise=SampleNoise(range(5)), condition={"shift": shift})
    for i in range(5):
        alone = sampler.sample(model, (1, 3, 2), noise=SampleNoise([i]), condition={"shift": shift[i : i + 1]})
        assert torch.equal(alone.x[0], whole.x[i])


def test_evaluations_are_counted() -> None:
    model = Affine()
    result = ParallelSampler(DDIM(), STEPS, 6, 1e-4).sample(model, (5, 3, 2), seed=0)
    assert result.nfe == math.ceil(model.seen / 5)


class Scalars(TorchDispatchMode):
    """Counts the scalars that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_round_with_noise_waits_for_no_scalar() -> None:
    counts, rounds = [], []
    for tolerance in (0.0, 0.1):
        with Scalars() as scalars:
            rounds.append(ParallelSampler(DDIM(1.0), STEPS, 6, tolerance).sample(Affine(), (5, 3, 2), seed=0).rounds)
        counts.append(scalars.count)
    assert rounds[0] > rounds[1] + 5
    assert counts[0] == counts[1]  # those of the tables


def test_what_has_no_linear_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="linear predictor"):
        ParallelSampler(Heun(), STEPS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="window"):
        ParallelSampler(DDIM(), STEPS, window=0)
    with pytest.raises(ValueError, match="tolerance"):
        ParallelSampler(DDIM(), STEPS, tolerance=-1.0)

    def churned(sde: SDE) -> Tensor:
        return torch.tensor([1.0, 0.5, 0.6, 0.1], dtype=DOUBLE)

    with pytest.raises(ValueError, match="only decreases"):
        ParallelSampler(DDIM(), churned).check(VPSDE())


def test_tables_with_a_row_without_a_call_are_refused() -> None:
    """The sequential history skips such a row, the windows would count it."""
    model = ExactScore(targets.make("ring"), VPSDE())
    levels = [float(model.sde.noise_level(1.0)), 3.0, 2.0, 0.0]
    step = Tabulated({"levels": levels, "a": [0.5, 0.5, 0.0], "b": [[0.4], [], [1.2, -0.2]]})
    with pytest.raises(ValueError, match="a network call in every row after the first"):
        ParallelSampler(step, step.grid, final="none").sample(model, (4, 2), seed=0)

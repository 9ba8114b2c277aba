"""Everything gives on an accelerator what it gives on the host, mixes no devices, and waits only where it has to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from accelerator import DEVICE, accelerator, host
from torch import Tensor
from training import tiny

from score_sde import (
    AdaptiveODE,
    AdaptiveSDE,
    Ancestral,
    ExactScore,
    ExponentialAdams,
    LearnedScore,
    ParallelSampler,
    ProbabilityFlowODE,
    Sampler,
    ScoreModel,
    grid,
    log_likelihood,
    targets,
)
from score_sde.guidance import (
    DDRM,
    DPS,
    MMPS,
    ClassifierFree,
    DiffPIR,
    Impute,
    Mask,
    PiGDM,
    TwistedParticles,
    interpolate,
)
from score_sde.networks import MLP, UNet
from score_sde.parameterization import Karras, Parameterization
from score_sde.sde import SDE, VPSDE
from score_sde.steps import DDIM, Step
from score_sde.steps.linear import Renoise
from score_sde.training import DenoisingScoreMatching, ImportanceTimes, UniformTimes

STEPS = partial(grid.log_snr, steps=6)


def learned(sde: SDE | None = None, parameterization: Parameterization | None = None) -> LearnedScore:
    torch.manual_seed(0)
    network = MLP((2,), width=8)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return LearnedScore(network, sde or VPSDE(), parameterization or Karras(1.0), (2,)).eval()


def on_both(job: Callable[[Any], Any]) -> list[str]:
    """Holds what the job gives on the accelerator against what it gives on the host, and returns its waits."""
    expected = job("cpu")
    with accelerator() as emulation:
        found = job(DEVICE)
    torch.testing.assert_close(host(found), host(expected), rtol=1e-4, atol=1e-4)
    return emulation.waits


def samples(sampler: Any, model: ScoreModel, device: Any, **options: Any) -> Tensor:
    """Ten samples from the same start on every device."""
    x = 2 * torch.randn(10, *model.event_shape, generator=torch.Generator().manual_seed(1)).to(device)
    return sampler.sample(model, x.shape, x_init=x, seed=0, **options).x


AT_THE_END = ["aten._local_scalar_dense.default"]  # whether the samples are finite


def test_predictors(predictor: Step) -> None:
    if isinstance(predictor, Renoise):
        pytest.skip("the sampler's own, for the moves of a grid that go up")
    assert on_both(lambda device: samples(Sampler(predictor, STEPS), learned().to(device), device)) == AT_THE_END


def test_correctors(corrector: Step) -> None:
    if corrector.needs_density:
        pytest.skip("a network has no density")
    sampler = Sampler(DDIM(), STEPS, corrector)
    assert on_both(lambda device: samples(sampler, learned().to(device), device)) == AT_THE_END


def test_sdes(sde: SDE) -> None:
    sampler = Sampler(ExponentialAdams(2, 1.0), STEPS)
    assert on_both(lambda device: samples(sampler, learned(sde).to(device), device)) == AT_THE_END


def test_parameterizations(parameterization: Parameterization) -> None:
    model = partial(learned, parameterization=parameterization)
    assert on_both(lambda device: samples(Sampler(DDIM(), STEPS), model().to(device), device)) == AT_THE_END


@pytest.mark.parametrize("name", targets.TOYS)
def test_exact_scores(name: str) -> None:
    model = ExactScore(targets.make(name), VPSDE())
    assert on_both(lambda device: samples(Sampler(DDIM(), STEPS), model, device)) == AT_THE_END


RESTART = partial(grid.restart, base=partial(grid.karras, steps=6), intervals=((0.06, 0.3, 3, 2),))


@pytest.mark.parametrize(
    "solver",
    [
        AdaptiveODE("dopri5", rtol=1e-3, atol=1e-3),
        AdaptiveODE("tsit5", rtol=1e-3, atol=1e-3),
        AdaptiveODE("exponential", rtol=1e-3, atol=1e-3),
        AdaptiveSDE(rtol=0.5),
        ParallelSampler(Ancestral(), STEPS, window=3),
        ProbabilityFlowODE(rtol=1e-3, atol=1e-3),
        Sampler(Ancestral(), RESTART),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_solvers(solver: Any) -> None:
    on_both(lambda device: samples(solver, learned().to(device), device))


def test_networks_and_conditions() -> None:
    def job(device: Any) -> Tensor:
        torch.manual_seed(0)
        network = UNet((1, 8, 8), width=8, multipliers=(1, 2), blocks=1, num_classes=3)
        torch.nn.init.normal_(network.last[-1].weight, std=0.1)
        model = ClassifierFree(LearnedScore(network, VPSDE(), Karras(1.0), (1, 8, 8)).eval().to(device), 2.0)
        label = torch.arange(10, device=device) % 3
        return samples(Sampler(DDIM(), STEPS), model, device, condition={"label": label})

    assert on_both(job) == 2 * AT_THE_END  # and the greatest label


@pytest.mark.parametrize("method", [DPS, PiGDM, MMPS, DiffPIR], ids=["dps", "pigdm", "mmps", "diffpir"])
def test_guidance(method: Any) -> None:
    observed = Mask((2,), torch.tensor([True, False]))

    def job(device: Any) -> Tensor:
        y = torch.full((10, 1), 0.5).to(device)
        return samples(Sampler(Ancestral(), STEPS), method(learned().to(device), observed, y, 0.1), device)

    assert on_both(job) == 2 * AT_THE_END  # and whether y is finite


@pytest.mark.parametrize("how", ["impute", "ddrm", "particles"])
def test_steps_of_observations(how: str) -> None:
    observed, y = Mask((2,), torch.tensor([True, False])), torch.tensor([0.5])

    def job(device: Any) -> Tensor:
        sampler = {
            "impute": lambda: Sampler(Ancestral(), STEPS, Impute(observed, y.expand(10, 1).to(device))),
            "ddrm": lambda: Sampler(DDRM(observed, y.expand(10, 1).to(device), 0.1), STEPS),
            "particles": lambda: TwistedParticles(STEPS, observed, y.to(device), 0.1),
        }[how]()
        return samples(sampler, learned().to(device), device)

    on_both(job)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson", "hutch++"])
@pytest.mark.parametrize("method", ["dopri5", "adams"])
def test_likelihoods(divergence: str, method: str) -> None:
    def job(device: Any) -> tuple[Tensor, Tensor]:
        x = torch.randn(5, 2, generator=torch.Generator().manual_seed(1)).to(device)
        options = {"rtol": 1e-3, "atol": 1e-3} if method == "dopri5" else {"steps": 12}
        said = log_likelihood(learned().to(device), x, divergence=divergence, probes=1 if divergence == "exact" else 2,
                              method=method, **options)  # fmt: skip
        return said.log_prob, said.latent

    on_both(job)


def test_interpolation() -> None:
    def job(device: Any) -> Tensor:
        x = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(1)).to(device)
        return interpolate(AdaptiveODE(rtol=1e-3, atol=1e-3), learned().to(device), *x, [0.3, 0.6])

    on_both(job)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "optimizer": "muon"}, {"power_emas": (0.1,)}])
def test_training_waits_for_its_reports_alone(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    for times in (UniformTimes(), ImportanceTimes()):

        def job(device: Any, times: Any = times) -> list[Tensor]:
            monkeypatch.setattr("score_sde.distributed.device", lambda name: torch.device(device))
            trainer = tiny.trainer(10, log_every=5, **options)
            result = trainer.fit(tiny.model(), tiny.data(), DenoisingScoreMatching(), times)
            return [*result.model.parameters()]

        assert len(on_both(job)) == 2  # reports

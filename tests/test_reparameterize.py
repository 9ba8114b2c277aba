"""A model seen on another SDE's path: predictions, starts and trajectories against the exact model of that path."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from score_sde import (
    DDIM,
    SDE,
    VESDE,
    VPSDE,
    CosineSDE,
    DiscreteSDE,
    ExactScore,
    ExponentialAdams,
    GaussianMixture,
    Karras,
    KarrasSDE,
    LearnedScore,
    Noise,
    RectifiedFlow,
    Sampler,
    SubVPSDE,
    Velocity,
    grid,
)
from score_sde.adaptive import AdaptiveODE
from score_sde.classifier import NoisyClassifier
from score_sde.energy import EnergyScore
from score_sde.likelihood import log_likelihood
from score_sde.networks import MLP, Encoder
from score_sde.networks.energy import Conservative
from score_sde.score import reparameterize
from score_sde.steps import Ancestral, LearnedVariance, MetropolisLangevin

DOUBLE = torch.float64
LAW = GaussianMixture(
    [0.3, 0.7], [[1.0, 0.0], [-1.0, 2.0]], [[[0.2, 0.1], [0.1, 0.3]], [[0.05, 0.0], [0.0, 0.4]]]
)  # fmt: skip
PATHS: list[SDE] = [VPSDE(), SubVPSDE(), VESDE(), CosineSDE(), KarrasSDE(), RectifiedFlow(), DiscreteSDE.ddpm()]
VIEWS = ("denoised", "noise", "score", "velocity")


def name(sde: SDE) -> str:
    return type(sde).__name__


def points(sde: SDE, count: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    t = sde.t_min + (sde.t_max - sde.t_min) * torch.rand(count, generator=generator, dtype=DOUBLE)
    clean = LAW.sample((count,), generator=generator).double()
    return sde.perturb(clean, t, torch.randn(count, 2, generator=generator, dtype=DOUBLE)), t


@pytest.mark.parametrize("there", PATHS, ids=name)
@pytest.mark.parametrize("own", [VPSDE(), VESDE(), RectifiedFlow()], ids=name)
def test_an_exact_model_on_another_path_is_that_paths_exact_model(own: SDE, there: SDE) -> None:
    model = reparameterize(ExactScore(LAW, own), there)
    exact = ExactScore(LAW, model.sde)
    x, t = points(model.sde)
    for view in VIEWS:
        torch.testing.assert_close(getattr(model(x, t), view), getattr(exact(x, t), view), rtol=1e-7, atol=1e-9)
        at = t[0].item()
        torch.testing.assert_close(getattr(model(x, at), view), getattr(exact(x, at), view), rtol=1e-7, atol=1e-9)
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    torch.testing.assert_close(model.start(z), exact.start(z), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("there", PATHS, ids=name)
@pytest.mark.parametrize("own", [VPSDE(), VESDE(), RectifiedFlow()], ids=name)
def test_the_density_on_another_path_is_that_of_its_exact_model(own: SDE, there: SDE) -> None:
    model = reparameterize(ExactScore(LAW, own), there)
    exact = ExactScore(LAW, model.sde)
    x, t = points(model.sde, 5)
    for at in t.tolist():
        torch.testing.assert_close(model.log_prob(x, at), exact.log_prob(x, at), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(model.log_terminal(x), exact.log_terminal(x), rtol=1e-7, atol=1e-7)


def test_metropolis_steps_take_another_path_exactly_where_the_model_has_a_density() -> None:
    sampler = Sampler(DDIM(), partial(grid.log_snr, steps=8), MetropolisLangevin())
    own = ExactScore(LAW, VPSDE())
    model = reparameterize(own, KarrasSDE(*((-own.sde.half_log_snr(t)).exp().item() for t in (1e-3, 1.0))))
    z = torch.randn(8, 2, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
    here, there = (sampler.sample(m, z.shape, x_init=m.start(z), seed=1).x for m in (own, model))
    torch.testing.assert_close(there, here, rtol=1e-7, atol=1e-7)
    learned = reparameterize(LearnedScore(MLP((2,)), VPSDE(), Noise(), (2,)), VESDE())
    with pytest.raises(ValueError, match="a density log_prob"):
        sampler.sample(learned, (8, 2), seed=1)


@pytest.mark.parametrize("parameterization", [Noise(), Velocity(), Karras(0.5)], ids=lambda p: type(p).__name__)
def test_a_learned_models_denoiser_is_its_own_at_the_same_noise_level(parameterization: object) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2, dtype=DOUBLE)

        def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
            return self.layer(torch.cat([x, c_noise[:, None]], 1)).sin() + label[:, None]

    torch.manual_seed(0)
    own = LearnedScore(Network(), VPSDE(), parameterization, (2,))  # type: ignore[arg-type]
    model = reparameterize(own, VESDE())
    assert model.event_shape == (2,)
    assert model.condition_names == {"label"}
    assert model.data_std == own.data_std
    label = torch.arange(4, dtype=DOUBLE)
    x = torch.randn(4, 2, dtype=DOUBLE)
    for t in (0.2, 0.5, 0.9):
        # VE and VP at the same sigma / alpha: x_vp = x_ve / sqrt(1 + sigma^2), D the same.
        sigma = float(VESDE().sigma(t))
        level = VPSDE().time_at(-torch.tensor(sigma, dtype=DOUBLE).log()).item()
        expected = own(x / (1 + sigma**2) ** 0.5, level, label=label)
        said = model(x, t, label=label)
        torch.testing.assert_close(said.denoised, expected.denoised)
        torch.testing.assert_close(said.score, expected.score / (1 + sigma**2) ** 0.5)
        torch.testing.assert_close(model(x, torch.full((4,), t, dtype=DOUBLE), label=label).denoised, said.denoised)


@pytest.mark.parametrize("there", [VESDE(), RectifiedFlow(), DiscreteSDE.ddpm()], ids=name)
def test_the_probability_flow_has_the_same_trajectories_up_to_scale(there: SDE) -> None:
    # The ring's own path and another: from starts of equal noise level to endpoints of equal noise level.
    own = ExactScore(LAW, VPSDE())
    model = reparameterize(own, there)
    low, high = (model.sde.half_log_snr(t) for t in (model.sde.t_max, model.sde.t_min))
    narrow = copy.copy(own.sde)
    narrow.t_max, narrow.t_min = (float(own.sde.time_at(level)) for level in (low, high))
    here = ExactScore(LAW, narrow)
    z = torch.randn(16, 2, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    solver = AdaptiveODE(rtol=1e-9, atol=1e-9)
    ends = [solver.sample(m, z.shape, x_init=m.start(z)).x / m.sde.alpha(m.sde.t_min) for m in (model, here)]
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("step", [DDIM(), ExponentialAdams(3)], ids=lambda s: type(s).__name__)
def test_samplers_that_live_in_lambda_give_the_same_samples_on_both_paths(step: DDIM | ExponentialAdams) -> None:
    own = ExactScore(LAW, VPSDE())
    model = reparameterize(own, KarrasSDE(sigma_min=float(torch.exp(-VPSDE().half_log_snr(1e-3))),
                                          sigma_max=float(torch.exp(-VPSDE().half_log_snr(1.0)))))  # fmt: skip
    sampler = Sampler(step, partial(grid.log_snr, steps=12))
    z = torch.randn(8, 2, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
    results = [sampler.sample(m, z.shape, x_init=m.start(z)) for m in (own, model)]
    torch.testing.assert_close(results[0].x, results[1].x, rtol=1e-8, atol=1e-8)
    assert results[0].nfe == results[1].nfe == 13


def test_noise_levels_that_the_model_does_not_know_are_left_out_or_refused() -> None:
    own, flow = ExactScore(LAW, VPSDE()), RectifiedFlow()
    model = reparameterize(own, flow)
    for t, known in ((model.sde.t_min, own.sde.t_min), (model.sde.t_max, own.sde.t_max)):
        assert float(model.sde.half_log_snr(t)) == pytest.approx(float(own.sde.half_log_snr(known)), abs=1e-9)
    assert (flow.t_min, flow.t_max) == (0.001, 0.999)  # the caller's SDE is not touched
    with pytest.raises(ValueError, match="does not know"):
        reparameterize(own, flow, outside="refuse")
    with pytest.raises(ValueError, match="outside is"):
        reparameterize(own, flow, outside="clamp")
    with pytest.raises(ValueError, match="in common"):
        reparameterize(own, KarrasSDE(sigma_min=1e-9, sigma_max=1e-8))
    with pytest.raises(ValueError, match=r"t=0\.999 lies outside"):
        model(torch.zeros(1, 2), 0.999)
    out = model(torch.zeros(3, 2), torch.tensor([0.5, 0.999, 0.5], dtype=DOUBLE)).denoised
    assert torch.equal(out.isnan().any(1), torch.tensor([False, True, False]))


def test_a_learnt_variance_which_is_between_two_of_its_own_process_is_left_out() -> None:
    model = LearnedScore(MLP((2,), width=8, depth=1, learned_variance=True), VPSDE(), Noise(), (2,))
    sampler = Sampler(LearnedVariance(Ancestral(), Ancestral("forward")), partial(grid.uniform, steps=2))
    there = reparameterize(model, RectifiedFlow())
    assert model(torch.zeros(1, 2), 0.5).variance_weight is not None
    assert there(torch.zeros(1, 2), 0.5).variance_weight is None
    with pytest.raises(ValueError, match=r"on another SDE's path \(reparameterize\) a model has none"):
        sampler.sample(there, (1, 2), seed=0)


def test_a_time_in_single_precision_may_be_the_last() -> None:
    model, x = reparameterize(ExactScore(LAW, VPSDE()), RectifiedFlow()), torch.zeros(2, 2)
    for t in (torch.full((2,), model.sde.t_max), torch.tensor(model.sde.t_max), torch.full((2,), model.sde.t_min)):
        assert model(x, t).denoised.isfinite().all()


def test_a_path_inside_the_models_range_keeps_its_times_and_starts_at_its_own_marginal() -> None:
    own = ExactScore(LAW, VESDE())
    model = reparameterize(own, KarrasSDE(sigma_min=0.1, sigma_max=3.0))
    assert (model.sde.t_min, model.sde.t_max) == (0.1, 3.0)
    z = torch.randn(4, 2, dtype=DOUBLE)
    expected = LAW.mean + (LAW.std**2 + 9.0) ** 0.5 * z
    torch.testing.assert_close(model.start(z), expected, rtol=1e-6, atol=1e-6)


def test_a_learned_model_starts_below_its_own_t_max_with_the_spread_of_its_data() -> None:
    class Network(nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            return x

    own = LearnedScore(Network(), VESDE(), Karras(2.0), (2,))
    z = torch.randn(4, 2, dtype=DOUBLE)
    torch.testing.assert_close(reparameterize(own, KarrasSDE(0.1, 3.0)).start(z), 13.0**0.5 * z)
    torch.testing.assert_close(reparameterize(own, KarrasSDE(0.1, 50.0)).start(z), 50.0 * z)


@pytest.mark.parametrize("own", [KarrasSDE(), VPSDE()], ids=name)
@pytest.mark.parametrize("there", [VPSDE(), RectifiedFlow(), KarrasSDE()], ids=name)
def test_a_density_known_up_to_a_constant_does_not_end_at_itself(own: SDE, there: SDE) -> None:
    """With F = 0 under Karras's parameterization the model is N(0, 0.25 I); its log_prob lacks -3/2 log(2 pi v)."""
    network = Conservative(MLP((3,), width=8, depth=1)).double()  # networks start at 0
    model = EnergyScore(network, own, Karras(0.5), (3,)).requires_grad_(False)
    x = 0.5 * torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    wanted = torch.distributions.Normal(0.0, 0.5).log_prob(x).sum(1)
    found = log_likelihood(reparameterize(model, there), x, rtol=1e-6, atol=1e-6).log_prob
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)


def test_a_classifier_has_no_density_to_be_brought_along() -> None:
    network = Encoder((1, 8, 8), num_classes=3, width=8)
    with pytest.raises(TypeError, match="takes a score model"):
        reparameterize(NoisyClassifier(network, VPSDE(), Noise(), (1, 8, 8)), VESDE())


@pytest.mark.parametrize("t_max", [1 - 1e-4, 1 - 1e-9])
def test_starts_below_t_max_know_the_data_s_own_moments(t_max: float) -> None:
    """Taken back from the start at t_max, they would drown in rounding where that is noise alone."""
    sde, z = RectifiedFlow(t_max=t_max), torch.ones(1, 2, dtype=DOUBLE)
    wanted = 0.5 * LAW.mean.double() + (0.25 * float(LAW.std) ** 2 + 0.25) ** 0.5
    torch.testing.assert_close(ExactScore(LAW, sde).start_at(z, 0.5)[0], wanted, rtol=1e-6, atol=1e-6)

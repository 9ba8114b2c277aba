"""A schedule whose noise levels are learnt with the network: an SDE that is a module too."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

from score_sde import DDIM, VPSDE, LearnedScore, Sampler, distributed, grid, reparameterize
from score_sde.evaluation import certify
from score_sde.parameterization import Noise
from score_sde.sde import SDE
from score_sde.steps import Heun
from score_sde.training import ImportanceTimes, UniformTimes

pytestmark = pytest.mark.filterwarnings("error")


class Learnt(nn.Module, SDE):
    """log(sigma^2 / alpha^2) = 8 (t + 0.001)^p - 4 + t^2, alpha^2 + sigma^2 = 1, with a p that is learnt."""

    t_min, t_max = 0.0, 1.0

    def __init__(self) -> None:
        super().__init__()
        self.log_p = nn.Parameter(torch.zeros(()))

    def gamma(self, t):
        return 8 * (t + 1e-3) ** self.log_p.double().exp() - 4 + t**2

    def alpha(self, t):
        return torch.sigmoid(-self.gamma(t)).sqrt()

    def sigma(self, t):
        return torch.sigmoid(self.gamma(t)).sqrt()


def model() -> LearnedScore:
    return LearnedScore(tiny.model().network, Learnt(), Noise(), (2,))


def test_a_run_that_ended_early_goes_on_with_what_its_schedule_has_learnt(tmp_path: Path) -> None:
    settings = {"schedule": "constant", "learning_rate": 0.01}
    whole = tiny.train(tmp_path / "whole", tiny.trainer(40, **settings), model=model()).model.state_dict()
    assert whole["sde.log_p"].abs() > 1e-3
    tiny.train(tmp_path / "parts", tiny.trainer(20, **settings), model=model())
    parts = tiny.train(tmp_path / "parts", tiny.trainer(40, **settings), model=model(), resume=True).model.state_dict()
    for name, weight in whole.items():
        assert torch.equal(weight, parts[name]), name


def test_loaded_weights_are_those_of_the_schedule_too() -> None:
    other, own = model().requires_grad_(False), model().requires_grad_(False)
    other.sde.log_p.fill_(0.5)
    x = torch.ones(1, 2)
    own(x, 0.5)
    own.load_state_dict(other.state_dict())
    assert own(x, 0.5).alpha == other.sde.alpha(0.5).item() != model().sde.alpha(0.5).item()


def test_a_schedule_that_is_learnt_is_asked_anew_after_every_step() -> None:
    own, x = model(), torch.ones(1, 2)
    elsewhere = reparameterize(own, Learnt())  # at the noise levels of a schedule that stays
    before = elsewhere(x, 0.5).denoised
    own(x, 0.5)
    with torch.no_grad():
        own.sde.log_p.fill_(0.5)
    assert own(x, 0.5).alpha == own.sde.alpha(0.5).item() != Learnt().alpha(0.5).item()
    torch.testing.assert_close(elsewhere(x, 0.5).denoised, before)
    onto = reparameterize(LearnedScore(own.network, VPSDE(), Noise(), (2,)), Learnt())
    onto(x, 0.5)
    with torch.no_grad():
        onto.sde.log_p.fill_(0.5)
    assert onto(x, 0.5).alpha == own.sde.alpha(0.5).item()


def test_a_schedule_that_is_learnt_is_sampled_and_certified_while_it_is() -> None:
    x = Sampler(DDIM(), lambda sde: grid.karras(sde, steps=5)).sample(model().eval(), (3, 2), seed=0).x
    assert not x.requires_grad
    assert certify(Heun(), Learnt(), budgets=[5]).faults == []


def test_a_schedule_is_not_learnt_by_several_processes_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "count", lambda: 2)
    with pytest.raises(ValueError, match=r"sde\.log_p is learnt outside the network"):
        tiny.trainer().check(model(), tiny.data(), UniformTimes())
    frozen = model()
    frozen.sde.requires_grad_(False)
    tiny.trainer().check(frozen, tiny.data(), UniformTimes())


class Flat(Learnt):
    """log(sigma^2 / alpha^2) = e^a (10 t^2 - 5): flat at t = 0, where a secant has no slope."""

    def gamma(self, t):
        return self.log_p.double().exp() * (10 * t**2 - 5)


@pytest.mark.parametrize("schedule", [Learnt, Flat])
def test_importance_times_have_the_schedules_own_derivative(schedule: type[Learnt]) -> None:
    """Of the mean of sigma^2 over t, which drawn times and weights stand for: against its value by quadrature, to 1 %."""
    sde = schedule()
    times = ImportanceTimes()(sde, 20_000, torch.Generator().manual_seed(0))
    t = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    means = [(times.weight * sde.sigma(times.t) ** 2).mean(), torch.trapezoid(sde.sigma(t) ** 2, t)]
    drawn, exact = (torch.autograd.grad(mean, sde.log_p)[0] for mean in means)
    torch.testing.assert_close(drawn, exact, rtol=0.01, atol=0)


def test_the_time_of_a_level_has_a_derivative_where_the_schedule_is_flat() -> None:
    sde = Flat()  # of e^a (5 - 10 t^2) = 2 lambda = 1 at a = 0, where t^2 = 0.4
    slope = torch.autograd.grad(sde.time_at(torch.tensor(0.5, dtype=torch.float64)), sde.log_p)[0]
    torch.testing.assert_close(slope, torch.tensor(1 / (20 * 0.4**0.5)), rtol=1e-4, atol=0)

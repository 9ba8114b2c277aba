"""Weightings, times and the loss against closed forms on Gaussian data, whose exact denoiser is linear."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch
from torch import nn

from score_sde import sde as sdes
from score_sde.data import Batch, TargetStream
from score_sde.keyed import generator
from score_sde.networks import MLP
from score_sde.parameterization import Denoised, Flow, Karras, Noise, Score, Velocity
from score_sde.score import LearnedScore
from score_sde.targets import GaussianMixture, make
from score_sde.training import (
    DenoisingScoreMatching,
    ImportanceTimes,
    KarrasWeighting,
    LadderTimes,
    LikelihoodWeighting,
    LogNormalTimes,
    LossAwareTimes,
    MinSNRWeighting,
    OneLevelTimes,
    SigmaWeighting,
    SimpleWeighting,
    Times,
    Trainer,
    UniformTimes,
    VariationalObjective,
)
from score_sde.training.objective import LabelDropout

S0 = 0.7
SDES = {
    "vp": sdes.VPSDE(),
    "subvp": sdes.SubVPSDE(),
    "ve": sdes.VESDE(),
    "karras": sdes.KarrasSDE(),
    "cosine": sdes.CosineSDE(),
    "flow": sdes.RectifiedFlow(),
    "ddpm": sdes.DiscreteSDE.ddpm(100),
}
PARAMETERIZATIONS = [Score(), Noise(), Denoised(), Velocity(), Flow(), Karras(0.5)]
WEIGHTINGS = [SimpleWeighting(), SigmaWeighting(1.0), LikelihoodWeighting(), KarrasWeighting(0.4), MinSNRWeighting(5.0)]


@pytest.fixture(params=SDES)
def sde(request) -> sdes.SDE:
    return SDES[request.param]


class Shrinkage(nn.Module):
    """The network of the denoiser D(x, t) = k(t) x, k = scale times the exact alpha S0^2 / (alpha^2 S0^2 + sigma^2)."""

    def __init__(self, sde, parameterization, t, scale=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))
        row, alpha, sigma = parameterization.row(sde, t), sde.alpha(t), sde.sigma(t)
        self.c_in, self.c_skip, self.c_out = row.c_in[:, None], row.c_skip[:, None], row.c_out[:, None]
        self.k = (alpha * S0**2 / (alpha**2 * S0**2 + sigma**2))[:, None]

    def forward(self, x, c_noise):
        return (self.scale * self.k - self.c_skip) / self.c_out * x / self.c_in


def times_inside(sde, count: int = 64) -> torch.Tensor:
    return sde.t_min + (sde.t_max - sde.t_min) * torch.linspace(0.05, 0.95, count, dtype=torch.float64)


def evaluate(sde, parameterization, weighting, t, scale=1.0, features=20_000):
    """Losses at times t, each the mean over `features` independent components of N(0, S0^2) data."""
    x0 = S0 * torch.randn(len(t), features, generator=generator(0, "x"), dtype=torch.float64)
    model = LearnedScore(Shrinkage(sde, parameterization, t, scale), sde, parameterization, (features,))
    times = Times(t, torch.zeros_like(t), torch.ones_like(t))
    return DenoisingScoreMatching(weighting)(model, Batch(x0), times, generator(0, "noise")).loss, model


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS, ids=repr)
def test_the_exact_model_has_the_irreducible_loss(sde, parameterization):
    # Var[eps | x_t] = alpha^2 S0^2 / (alpha^2 S0^2 + sigma^2); a mean of 20,000 squares has a relative error of 0.01,
    # five of which are allowed.
    t = times_inside(sde, 16)
    signal, noise = sde.alpha(t) ** 2 * S0**2, sde.sigma(t) ** 2
    losses, _ = evaluate(sde, parameterization, SimpleWeighting(), t)
    torch.testing.assert_close(losses.double(), signal / (signal + noise), rtol=0.05, atol=0)


def test_the_gradient_vanishes_at_the_exact_model_and_has_the_closed_form_elsewhere(sde):
    # E |c k x - x_0|^2 = S0^2 + (c^2 - 2 c) k alpha S0^2 per component: d/dc = 2 (c - 1) k alpha S0^2.
    t = times_inside(sde, 8)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    unit = (alpha / sigma) ** 2 * alpha**2 * S0**4 / (alpha**2 * S0**2 + sigma**2)
    for scale in (1.0, 1.5):
        losses, model = evaluate(sde, Velocity(), SimpleWeighting(), t, scale)
        ratio = sigma / alpha / S0  # the relative standard error is 2 ratio / sqrt(20,000)
        for i in range(len(t)):
            (gradient,) = torch.autograd.grad(losses[i], model.network.scale, retain_graph=True)
            assert float(gradient / unit[i]) == pytest.approx(2 * (scale - 1), abs=0.1 * (1 + float(ratio[i])))


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=lambda w: type(w).__name__)
def test_the_loss_does_not_depend_on_what_the_network_outputs(sde, weighting):
    t = times_inside(sde)
    first, *others = (evaluate(sde, p, weighting, t, 1.3, features=50)[0] for p in PARAMETERIZATIONS)
    for losses in others:
        torch.testing.assert_close(losses, first, rtol=2e-3, atol=0)


def test_weightings_against_their_papers(sde):
    t = times_inside(sde)
    alpha, sigma, g = sde.alpha(t), sde.sigma(t), sde.diffusion(t)
    snr = (alpha / sigma) ** 2
    close = torch.testing.assert_close
    close(SimpleWeighting()(sde, t) * Noise().row(sde, t).c_out ** 2, torch.ones_like(t))
    close(SigmaWeighting(2.0)(sde, t), SimpleWeighting()(sde, t))
    close(SigmaWeighting(0.0)(sde, t) * Score().row(sde, t).c_out ** 2, torch.ones_like(t))
    close(LikelihoodWeighting()(sde, t) * Score().row(sde, t).c_out ** 2, g**2)
    close(KarrasWeighting(0.3)(sde, t) * Karras(0.3).row(sde, t).c_out ** 2, torch.ones_like(t))
    close(MinSNRWeighting(5.0)(sde, t) * Noise().row(sde, t).c_out ** 2, (5 / snr).clamp(max=1))


def test_karras_weights_of_edm():
    weights = KarrasWeighting(0.5)(sdes.KarrasSDE(), torch.tensor([0.5, 80.0, 0.002], dtype=torch.float64))
    torch.testing.assert_close(
        weights, torch.tensor([8.0, 4.00015625, 250004.0], dtype=torch.float64), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize(
    "sampler", [UniformTimes(), ImportanceTimes(), LogNormalTimes()], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("stratified", [True, False])
def test_times_are_in_range_noisier_with_u_and_stratified(sde, sampler, stratified):
    sampler.stratified = stratified
    times = sampler(sde, 64, generator(0, "times"))
    assert times.t.dtype == torch.float64
    assert (times.t >= sde.t_min).all()
    assert (times.t <= sde.t_max).all()
    noise = -sde.half_log_snr(times.t[times.u.argsort()])
    assert (noise.diff() >= -1e-9).all()
    cells = (64 * times.u).long().sort().values
    assert torch.equal(cells, torch.arange(64)) == stratified


def test_stratified_draws_are_uniform_within_their_strata():
    u = torch.stack([UniformTimes()(SDES["vp"], 4, generator(i, "times")).u for i in range(2000)])
    inside = (4 * u) % 1  # 8,000 uniforms: standard errors 0.0032 and 0.0008, five of each allowed
    assert abs(inside.mean() - 0.5) < 0.016
    assert abs(inside.var() - 1 / 12) < 0.004


def test_log_normal_times_have_the_law_of_edm():
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    for sde in (sdes.KarrasSDE(), sdes.VPSDE(t_min=1e-5)):
        log_sigma = -sde.half_log_snr(LogNormalTimes(-1.2, 1.2).quantile(sde, u))
        expected = torch.distributions.Normal(torch.tensor(-1.2, dtype=torch.float64), 1.2).icdf(u)
        torch.testing.assert_close(log_sigma, expected, rtol=0, atol=2e-3)  # the tails cut off hold 3e-5 of the law


def test_log_normal_times_are_cut_without_atoms():
    sde = sdes.VESDE(sigma_min=0.2, sigma_max=1.0)
    t = LogNormalTimes(-1.2, 1.2)(sde, 1000, generator(0, "times")).t
    assert len(t.unique()) == 1000
    assert t.min() > sde.t_min
    assert t.max() < sde.t_max


def test_ladder_times_take_every_level_equally_often():
    sde = sdes.DiscreteSDE.ddpm(50)
    times = LadderTimes()(sde, 200, generator(0, "times"))
    assert torch.equal(times.t.long().bincount(), torch.full((50,), 4))
    assert torch.equal(times.t, times.t.floor())


def test_importance_times_are_unbiased_and_flatten_the_likelihood_weighting(sde):
    # The mean of a weighted quantity under importance sampling equals its integral under uniform times (midpoint rule).
    sampler, weighting = ImportanceTimes(), LikelihoodWeighting()
    u = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    t = sampler.quantile(sde, u)
    uniform = sde.t_min + (sde.t_max - sde.t_min) * u
    span = sde.t_max - sde.t_min

    def quantity(t):
        return 1 + ((t - sde.t_min) / span) ** 2

    assert (sampler.weight(sde, t) * quantity(t)).mean() == pytest.approx(quantity(uniform).mean().item(), rel=1e-2)
    ratio = sampler.weight(sde, t) * weighting(sde, t) / SimpleWeighting()(sde, t)
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))
    expected = 2 * (sde.half_log_snr(sde.t_min) - sde.half_log_snr(sde.t_max)) / span
    torch.testing.assert_close(ratio.mean(), expected)


def test_one_level_is_that_level(sde):
    level = math.exp(-0.5 * float(sde.half_log_snr(sde.t_min) + sde.half_log_snr(sde.t_max)))
    sampler = OneLevelTimes(level)
    sampler.check(sde)
    t = sampler(sde, 5, generator(0, "times")).t
    torch.testing.assert_close(-sde.half_log_snr(t), torch.full((5,), math.log(level), dtype=torch.float64))
    with pytest.raises(ValueError, match=r"level=1000000.0 is outside the SDE's noise levels"):
        OneLevelTimes(1e6).check(sde)


@pytest.mark.parametrize("parameterization", [Score(), Velocity(), Karras(0.5)], ids=repr)
def test_the_excess_of_a_wrong_shrinkage_is_its_fisher_divergence(sde, parameterization):
    """D = 1.3 D*: n - n* = -0.3 alpha / sigma D*, whose mean square is 0.09 alpha^4 S0^4 / (sigma^2 total)."""
    t = times_inside(sde, 8).repeat(2000)
    target = GaussianMixture([1.0], torch.zeros(1, 1), torch.full((1, 1, 1), S0**2))
    model = LearnedScore(Shrinkage(sde, parameterization, t, 1.3), sde, parameterization, (1,))
    x0 = S0 * torch.randn(len(t), 1, generator=generator(0, "x"), dtype=torch.float64)
    times = Times(t, torch.zeros_like(t), torch.full_like(t, 7.0))  # unweighted, whatever the importance weight
    found = DenoisingScoreMatching(target=target)(model, Batch(x0), times, generator(0, "noise")).diagnostics
    fisher, irreducible = (found[name].view(2000, 8).mean(0) for name in ("fisher", "irreducible"))
    t = t[:8]
    total = sde.alpha(t) ** 2 * S0**2 + sde.sigma(t) ** 2
    expected = 0.09 * sde.alpha(t) ** 4 * S0**4 / (sde.sigma(t) ** 2 * total)
    torch.testing.assert_close(fisher.double(), expected, rtol=0.18, atol=1e-12)  # a mean of 2,000 squares: 5 x 3.2 %
    torch.testing.assert_close(irreducible.double(), sde.alpha(t) ** 2 * S0**2 / total, rtol=0.18, atol=0)
    assert DenoisingScoreMatching()(model, Batch(x0), times, generator(0, "noise")).diagnostics == {}


def test_training_logs_the_excess_by_noise_level_and_resumes_loss_aware_times_exactly(tmp_path):
    target = make("ring")
    sde = sdes.DiscreteSDE.cosine(4)

    def train(folder, steps, resume=False):
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            network = MLP((2,), width=8, depth=1, frequencies=4, learned_variance=True)
        trainer = Trainer(steps=steps, batch_size=16, schedule="constant", log_every=4, device="cpu", progress=False)
        model, times = LearnedScore(network, sde, Noise(), (2,)), LossAwareTimes(4, history=3)
        objective = VariationalObjective(0.0, 1.0, target=target)
        return trainer.fit(model, TargetStream(target), objective, times, folder, resume=resume), times

    whole, times = train(tmp_path / "whole", 12)
    assert times.probabilities.std() > 0.01  # it has learnt
    train(tmp_path / "halves", 6)
    resumed, again = train(tmp_path / "halves", 12, resume=True)
    assert torch.equal(again.probabilities, times.probabilities)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    names = ("loss", "simple", "vlb", "fisher", "irreducible")
    assert all(row[f"{name}{q}"] is not None for row in rows for name in names for q in ("", "_q1", "_q4"))
    for name in names:  # the batch's mean is that of its quartiles
        mean = sum(rows[0][f"{name}_q{i}"] for i in range(1, 5)) / 4
        assert mean == pytest.approx(rows[0][name], rel=0.2)


def test_conditions_of_other_names_are_dropped_to_their_own_null_or_refused() -> None:
    theta, label = torch.rand(4000, 5), torch.arange(4000) % 3
    augment = torch.ones(4000, 9)  # labels of what was done to x stay
    given = {"augment": augment, "theta": theta, "label": label}
    said = LabelDropout(0.25, {"theta": -7.0})(given, generator(0, "drop"))
    assert said["augment"] is augment
    dropped = (said["theta"] == -7).all(1)
    assert torch.equal(dropped, said["label"] == -1)  # all conditions of an example together
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)  # four standard errors
    assert torch.equal(said["theta"][~dropped], theta[~dropped])
    with pytest.raises(ValueError, match="has no null value for the condition 'theta': give one, nulls="):
        LabelDropout(0.25)({"theta": theta}, generator(0, "drop"))
    with pytest.raises(ValueError, match="the data have no conditions: leave it out"):
        LabelDropout(0.25)({"augment": augment}, generator(0, "drop"))
    assert LabelDropout(0.0)({"theta": theta}, generator(0, "drop"))["theta"] is theta
    small = LabelDropout(1.0)({"label": label.to(torch.uint8)}, generator(0, "drop"))["label"]
    assert set(small.tolist()) == {-1}  # which bytes cannot hold


@pytest.mark.parametrize(
    "objective", [DenoisingScoreMatching, partial(VariationalObjective, vlb=0.0, variance="small")]
)
def test_label_dropout_replaces_that_share_by_the_null_class(objective):
    seen = []

    class Spy(nn.Module):
        def forward(self, x, c_noise, label=None):
            seen.append(label)
            return x

    sde = sdes.DiscreteSDE.ddpm()
    model = LearnedScore(Spy(), sde, Noise(), (1,))
    batch = Batch(torch.zeros(10_000, 1), {"label": torch.full((10_000,), 7)})
    times = LadderTimes()(sde, 10_000, generator(0, "times"))
    for share in (0.0, 0.1, 1.0):
        objective(label_dropout=share)(model, batch, times, generator(0, "noise"))
        null = (seen[-1] == -1).double().mean().item()
        assert null == pytest.approx(share, abs=0.015 if 0 < share < 1 else 0)  # five standard errors of 0.003
        assert set(seen[-1].tolist()) <= {-1, 7}
    assert (batch.condition["label"] == 7).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LadderTimes().check(sdes.VPSDE()), "VPSDE has no ladder: use UniformTimes"),
        (lambda: LogNormalTimes(20.0, 0.1).check(sdes.VPSDE()), "move the mean"),
        (lambda: LogNormalTimes(std=0.0), "std > 0, got std=0.0"),
        (lambda: DenoisingScoreMatching(label_dropout=1.5), "label_dropout=1.5"),
        (lambda: VariationalObjective(label_dropout=-0.1), "label_dropout=-0.1"),
        (lambda: VariationalObjective(variance="large"), "variance='large' is fixed: use vlb=0, simple=0 or"),
        (lambda: KarrasWeighting(0.0), "sigma_data=0.0"),
        (lambda: MinSNRWeighting(-1.0), "gamma=-1.0"),
        (lambda: OneLevelTimes(0.0), "level=0.0"),
    ],
)
def test_impossible_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_ema_decay_of_edm():
    from score_sde.training import EMA, HalfLife, ema_decay

    assert ema_decay(512, 10**9, half_life=500_000) == pytest.approx(0.99929047, abs=5e-9)
    assert ema_decay(512, 1_000_000, half_life=500_000, ramp=0.05) == pytest.approx(0.5 ** (512 / 50_000))
    assert ema_decay(512, 0) == 0.0
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    ema = EMA(list(model.parameters()), HalfLife(100, ramp=1.0))
    nn.init.constant_(model.weight, 4.0)
    ema.update(list(model.parameters()), batch_size=50, images=100)
    assert ema.tensors[0].item() == pytest.approx(4 - 2 * math.sqrt(0.5))
    assert not ema.tensors[0].requires_grad

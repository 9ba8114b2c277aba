"""The variational bound against its closed form on Gaussian data, against DDPM's own formulas and numerical sums."""

from __future__ import annotations

import math

import pytest
import torch

from score_sde import targets
from score_sde.adaptive import AdaptiveODE
from score_sde.data import Batch, TargetStream
from score_sde.evaluation.bounds import continuous_bound, variational_bound
from score_sde.networks import MLP
from score_sde.parameterization import Noise
from score_sde.score import ExactScore, LearnedScore
from score_sde.sde import VESDE, VPSDE, DiscreteSDE, SubVPSDE
from score_sde.training import Trainer
from score_sde.training.times import LadderTimes, Times
from score_sde.training.variational import (
    ContinuousDecoder,
    DiscretisedDecoder,
    Ladder,
    LossAwareTimes,
    StepVariance,
    VariationalObjective,
)

STD = 0.5
GAUSSIAN = targets.GaussianMixture([1.0], torch.zeros(1, 2), STD**2 * torch.eye(2)[None])
ENTROPY = 1 + math.log(2 * math.pi * STD**2)


def data(count, seed=0, target=GAUSSIAN):
    return target.sample((count,), generator=torch.Generator().manual_seed(seed)).double()


def spaced(sde, steps):
    """Times at equal distances in lambda, least noisy first."""
    ends = sde.half_log_snr(torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64))
    return sde.time_at(torch.linspace(ends[0], ends[1], steps, dtype=torch.float64)).clamp(sde.t_min, sde.t_max)


def closed_form(sde, times, kind):
    """Prior, decoder and step terms for N(0, STD^2 I) in two dimensions, from Gaussian algebra in x_t alone."""
    alpha, sigma = sde.alpha(times), sde.sigma(times)
    total = alpha**2 * STD**2 + sigma**2
    error = STD**2 * sigma**2 / total
    step = sigma[1:] ** 2 - (alpha[1:] / alpha[:-1]) ** 2 * sigma[:-1] ** 2
    q = step * sigma[:-1] ** 2 / sigma[1:] ** 2
    p = q if kind == "small" else step
    b = alpha[:-1] * step / sigma[1:] ** 2
    steps = q / p - 1 - (q / p).log() + b**2 * error[1:] / p
    v = q[0] if kind == "small" else sigma[0] ** 2
    decoder = (2 * math.pi * v).log() + error[0] / v
    std = sde.prior_std
    prior = total[-1] / std**2 - 1 - (sigma[-1] ** 2 / std**2).log()
    return prior, decoder, steps


@pytest.mark.parametrize("sde", [DiscreteSDE.ddpm(50), DiscreteSDE.geometric(0.05, 20.0, 30)], ids=repr)
@pytest.mark.parametrize("kind", ["small", "large"])
def test_every_term_on_gaussian_data_is_its_closed_form(sde, kind):
    x = data(4000)
    bound = variational_bound(ExactScore(GAUSSIAN, sde), x, variance=kind)
    prior, decoder, steps = closed_form(sde, torch.arange(sde.num_steps).double(), kind)
    assert bound.nfe == sde.num_steps
    ends = ((bound.prior[None], prior[None]), (bound.decoder[None], decoder[None]))
    for found, expected in (*ends, (bound.steps, steps)):
        error = found.mean(1) - expected
        assert (error.abs() < 4.5 * found.std(1) / math.sqrt(len(x)) + 1e-9).all()  # false alarms: 80 x 7e-6


def test_ladder_has_ddpm_s_posterior_coefficients():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = (1 - betas).cumprod(0)
    ladder = Ladder(DiscreteSDE.ddpm())
    before = alpha_bar[:-1]
    torch.testing.assert_close(ladder.log_large.exp(), betas)
    torch.testing.assert_close(ladder.log_small.exp()[1:], (betas * 1)[1:] * (1 - before) / (1 - alpha_bar[1:]))
    torch.testing.assert_close(ladder.of_data[1:], before.sqrt() * betas[1:] / (1 - alpha_bar[1:]))
    assert ladder.log_small[0] == ladder.log_small[1]


def test_gap_to_the_likelihood_falls_as_one_over_steps():
    sde = VPSDE()
    gaps = []
    for steps in (10, 30, 100, 300, 1000):
        prior, decoder, terms = closed_form(sde, spaced(sde, steps), "large")
        gaps.append((prior + decoder + terms.sum() - ENTROPY).item())
    assert min(gaps) > 0
    slope = math.log(gaps[-1] / gaps[1]) / math.log(1000 / 30)
    assert abs(slope + 1) < 0.06
    # The measured bound is that one.
    x = data(2000)
    measured = variational_bound(ExactScore(GAUSSIAN, sde), x, times=spaced(sde, 30))
    gap = measured.total + GAUSSIAN.log_prob(x)
    assert abs(gap.mean() - gaps[1]) < 4 * gap.std() / math.sqrt(len(x))


@pytest.mark.parametrize("steps", [10, 25, 50])
def test_learned_variance_beats_both_fixed_ones(steps):
    target = targets.ring(weights=[1, 2, 3, 4, 1, 2, 3, 4])
    sde = VPSDE()
    times, model = spaced(sde, steps), ExactScore(target, sde)
    learned = StepVariance(steps).fit(model, data(2000, 1, target), Ladder(sde, times))
    x = data(2000, 2, target)
    kinds = ("small", "large", learned)
    small, large, best = (variational_bound(model, x, times=times, variance=v).mean for v in kinds)
    assert best < min(small, large) - 0.005
    assert best > -target.log_prob(x).mean()
    # Each weight is the minimiser of its own term, the decoder's among them.
    for step in (0, steps // 2):
        for change in (-0.2, 0.2):
            other = StepVariance(steps)
            other.w = learned.w.clone()
            other.w[step] += change
            assert variational_bound(model, x, times=times, variance=other).mean > best


@pytest.mark.slow
@pytest.mark.parametrize("steps", [10, 50])
def test_a_trained_variance_head_beats_both_fixed_variances(steps, tmp_path):
    """L_hybrid on a short cosine ladder; the same network's bound on fresh data under each variance."""
    target = targets.ring(weights=[1, 2, 3, 4, 1, 2, 3, 4])
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = MLP((2,), width=64, depth=2, frequencies=16, learned_variance=True)
    model = LearnedScore(network, DiscreteSDE.cosine(steps), Noise(2.8), (2,))
    trainer = Trainer(
        steps=1000, batch_size=256, learning_rate=2e-3, ema_half_life=20_000, device="cpu", progress=False
    )
    # The bound moves only the head here, which AdamW's scale does not slow: the published 0.001 is for images.
    objective = VariationalObjective(1.0, 0.01)
    trained = trainer.fit(model, TargetStream(target), objective, LadderTimes(), tmp_path).model.eval()
    x = data(4000, 5, target).float()
    small, large, learned = (variational_bound(trained, x, variance=v).mean for v in ("small", "large", "learned"))
    print(f"{steps} steps: small {small:.3f}, large {large:.3f}, learned {learned:.3f} nats")
    assert learned < min(small, large) - 0.02


@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), VESDE()], ids=repr)
def test_continuous_bound_is_tight_for_the_exact_denoiser(sde):
    x = data(4000)
    bound = continuous_bound(ExactScore(GAUSSIAN, sde), x, draws=8)
    excess = bound.total + GAUSSIAN.log_prob(x)
    assert abs(excess.mean()) < 4 * excess.std() / math.sqrt(len(x)) + 2e-3  # prior and decoder
    assert bound.nfe == 9


def test_confidence_intervals_cover():
    sde = VPSDE()
    model = ExactScore(GAUSSIAN, sde)
    intervals = [continuous_bound(model, data(100, seed), draws=4, seed=seed).interval() for seed in range(200)]
    covered = sum(low < ENTROPY < high for low, high in intervals)
    assert 180 <= covered <= 198  # binomial(200, 0.95): outside with probability 1 %


def test_discretised_decoder_is_a_law_on_its_lattice():
    lattice = torch.linspace(-1, 1, 17, dtype=torch.float64)[:, None]
    decoder = DiscretisedDecoder(2 / 16)
    for mean, log_variance in ((0.3, -6.0), (-1.4, -2.0), (0.99, 0.0), (0.0, -12.0)):
        nats = decoder(lattice, torch.full_like(lattice, mean), torch.tensor(log_variance).double())
        assert torch.isfinite(nats).all()
        torch.testing.assert_close((-nats).exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    wide = decoder(lattice[8:9], torch.zeros(1, 1).double(), torch.tensor(1.0).double())
    density = ContinuousDecoder()(lattice[8:9], torch.zeros(1, 1).double(), torch.tensor(1.0).double())
    torch.testing.assert_close(wide, density - math.log(2 / 16), atol=1e-3, rtol=0)


def small_model(num_steps=20, learned_variance=True):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = MLP((2,), width=16, depth=1, frequencies=4, learned_variance=learned_variance)
        torch.nn.init.normal_(network.last.weight, std=0.3)
    return LearnedScore(network, DiscreteSDE.ddpm(num_steps, beta_T=0.019), Noise(), (2,))


def loss(model, objective, times, seed=0):
    x = data(len(times.t), 3).float()
    return objective(model, Batch(x), times, torch.Generator().manual_seed(seed)).loss


@pytest.mark.parametrize("variance", ["large", "learned"])
def test_vlb_objective_estimates_the_bound_without_its_prior(variance):
    model = small_model()
    objective = VariationalObjective(0.0, 1.0, variance)
    times = LadderTimes()(model.sde, 40_000, torch.Generator().manual_seed(1))
    losses = loss(model, objective, times)
    x = data(40_000, 3)[:4000].float()
    bound = variational_bound(model, x, variance=variance)
    expected = (bound.total - bound.prior).mean().item() / 2
    assert abs(losses.mean().item() - expected) < 4 * (losses.std().item() / 200 + bound.std_error / 2)


def test_hybrid_trains_the_mean_by_l_simple_and_the_variance_by_the_bound():
    def gradients(*weights):
        """Of the output layer: the two rows of the mean, and the two of the variance."""
        model = small_model()
        times = LadderTimes()(model.sde, 64, torch.Generator().manual_seed(1))
        loss(model, VariationalObjective(*weights), times).mean().backward()
        return model.network.last.weight.grad.split(2)

    mean_hybrid, variance_hybrid = gradients(1.0, 0.001)
    mean_simple, variance_simple = gradients(1.0, 0.0)
    mean_vlb, variance_vlb = gradients(0.0, 1.0)
    torch.testing.assert_close(mean_hybrid, mean_simple)
    torch.testing.assert_close(variance_hybrid, 0.001 * variance_vlb)
    assert variance_simple.abs().max() == 0
    assert mean_vlb.abs().max() > 0


def test_a_variance_head_starts_half_way_and_follows_its_output():
    model = small_model()
    x, t = data(3).float(), 5.0
    row = model.parameterization.row(model.sde, t)
    raw = model.network(row.c_in.float() * x, row.c_noise.float().expand(3))
    said = model(x, t)
    torch.testing.assert_close(said.raw, raw[:, :2])
    torch.testing.assert_close(said.variance_weight, (raw[:, 2:] + 1) / 2)
    ladder, index = Ladder(model.sde), torch.tensor([5, 5, 5])
    w = said.variance_weight.double()
    expected = w * ladder.log_large[5] + (1 - w) * ladder.log_small[5]
    torch.testing.assert_close(ladder.log_variance("learned", said, index).double(), expected)
    fresh = LearnedScore(MLP((2,), width=8, depth=1, learned_variance=True), model.sde, Noise(), (2,))
    assert (fresh(x, t).variance_weight == 0.5).all()


def test_diagnostics_are_the_parts_and_the_excess():
    model = small_model()
    times = LadderTimes()(model.sde, 500, torch.Generator().manual_seed(1))
    x = data(500, 3).float()
    found = VariationalObjective(0.7, 0.2, target=GAUSSIAN)(model, Batch(x), times, torch.Generator().manual_seed(0))
    parts = found.diagnostics
    torch.testing.assert_close(found.loss.detach(), 0.7 * parts["simple"] + 0.2 * parts["vlb"])
    assert set(parts) == {"simple", "vlb", "fisher", "irreducible"}
    # |eps - n|^2 = |eps - n*|^2 + |n* - n|^2 + a cross term that vanishes in expectation.
    gap = parts["simple"] - parts["fisher"] - parts["irreducible"]
    assert abs(gap.mean()) < 4 * gap.std() / math.sqrt(500)


def test_loss_aware_times_are_unbiased_and_less_noisy():
    model = small_model()
    times = LossAwareTimes(20)
    times.check(model.sde)
    objective = VariationalObjective(0.0, 1.0, "large")
    torch.testing.assert_close(times.probabilities, torch.full((20,), 0.05).double())
    for seed in range(4):
        draw = times(model.sde, 400, torch.Generator().manual_seed(seed))
        times.update(draw, loss(model, objective, draw, seed))
    aware = times(model.sde, 20_000, torch.Generator().manual_seed(1))
    uniform = LadderTimes()(model.sde, 20_000, torch.Generator().manual_seed(1))
    found, expected = loss(model, objective, aware), loss(model, objective, uniform)
    assert found.std() < 0.9 * expected.std()
    assert abs(found.mean() - expected.mean()) < 4 * (found.std() + expected.std()) / math.sqrt(20_000)


def test_loss_aware_times_keep_the_last_losses_of_each_step():
    times, kept = LossAwareTimes(3, history=4), [[], [], []]
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        t = torch.randint(3, (7,), generator=generator)
        losses, weight = torch.rand(7, generator=generator).double(), 1 + torch.rand(7, generator=generator).double()
        times.update(Times(t.double(), t / 3, weight), losses)
        for i, value in zip(t.tolist(), (losses / weight).tolist(), strict=True):
            kept[i].append(value)
    expected = torch.tensor([sorted(past[-4:]) for past in kept], dtype=torch.float64)
    torch.testing.assert_close(times.losses.sort(1).values, expected)
    p = expected.square().mean(1).sqrt()
    torch.testing.assert_close(times.probabilities, 0.999 * p / p.sum() + 0.001 / 3)
    twin = LossAwareTimes(3, history=4)
    twin.load_state_dict(times.state_dict())
    assert torch.equal(twin.probabilities, times.probabilities)


def test_wrong_requests_are_refused_in_one_line():
    model = ExactScore(GAUSSIAN, VPSDE())
    with pytest.raises(ValueError, match="VPSDE has no ladder: take a DiscreteSDE"):
        variational_bound(model, data(2))
    with pytest.raises(ValueError, match="increasing"):
        variational_bound(model, data(2), times=torch.tensor([0.5, 0.1]))
    with pytest.raises(ValueError, match="variance is 'small', 'large', 'learned'"):
        variational_bound(model, data(2), times=spaced(VPSDE(), 3), variance="middle")
    with pytest.raises(TypeError, match="uint8 data"):
        continuous_bound(model, torch.zeros(2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(batch, 2\)"):
        continuous_bound(model, torch.zeros(2, 3))
    bare = small_model(learned_variance=False)
    with pytest.raises(ValueError, match="needs a network with a variance head"):
        loss(bare, VariationalObjective(), LadderTimes()(bare.sde, 4, torch.Generator()))
    with pytest.raises(ValueError, match="20 steps, the ladder 3"):
        StepVariance(20).fit(model, data(2), Ladder(VPSDE(), spaced(VPSDE(), 3)))


def test_noise_of_the_bound_is_independent_of_the_noise_that_samples_were_made_of():
    """By default both have seed 0: with shared noise this bound is 0.3 nats too low."""
    model, times = ExactScore(targets.make("ring"), VESDE()), spaced(VESDE(), 12)
    x = AdaptiveODE().sample(model, (2000, 2), seed=0, dtype=torch.float64).x
    found = [variational_bound(model, x, times=times, seed=seed).total.mean().item() for seed in (0, 1, 2)]
    assert abs(found[0] - (found[1] + found[2]) / 2) < 0.1


def test_the_decoder_far_from_the_data_leaves_no_gradient_that_is_none():
    """At high noise D is so large that a bin has no probability in single precision: its term is of level 0 alone."""
    model = LearnedScore(MLP((3,), width=8, depth=1), DiscreteSDE.cosine(1000), Noise(), (3,))
    ladder, index = Ladder(model.sde), torch.tensor([0, 999])
    said = model(torch.full((2, 3), 9.0), ladder.times[index])
    assert said.denoised.abs().max() > 1e5
    loss = ladder.term(torch.zeros(2, 3), said, index, "small", DiscretisedDecoder()).sum()
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

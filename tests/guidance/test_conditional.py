"""Guidance by labels and classifiers, on mixtures whose conditional laws are known."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import few_steps
from exact_models import Labelled, Shrink

from score_sde import grid
from score_sde.adaptive import AdaptiveODE
from score_sde.adaptive_sde import AdaptiveSDE
from score_sde.evaluation.cells import fingerprint
from score_sde.guidance import (
    DDRM,
    Autoguidance,
    Classifier,
    ClassifierFree,
    ClassifierFreePlusPlus,
    Conditioned,
    DynamicThreshold,
    Mask,
    StaticThreshold,
)
from score_sde.likelihood import log_likelihood
from score_sde.networks import MLP
from score_sde.noise import BatchNoise
from score_sde.ode import ProbabilityFlowODE
from score_sde.parallel import ParallelSampler
from score_sde.parameterization import Noise
from score_sde.prediction import Prediction
from score_sde.sampler import Sampler
from score_sde.score import ExactScore, LearnedScore, reparameterize
from score_sde.sde import VESDE, VPSDE, DiscreteSDE
from score_sde.steps import (
    DDIM,
    Ancestral,
    DPMSolverSinglestep,
    ERSDESolver,
    ExponentialAdams,
    GradientEstimation,
    Heun,
    LangevinCorrector,
    UnadjustedLangevin,
)
from score_sde.targets import GaussianMixture, make

SDE = VPSDE()
RING = make("ring", components=3, radius=2.0, std=0.6)
LABEL = torch.tensor([0, 1, 2, 1])
SPACED = torch.linspace(0.01 ** (1 / 7), 50 ** (1 / 7), 100, dtype=torch.float64) ** 7
LADDERS = (DiscreteSDE.geometric(0.01, 50.0, 100), DiscreteSDE.smld(SPACED))  # of the same ends


def points(batch=4):
    return 2 * torch.randn(batch, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_scale_one_is_the_conditional_model_and_zero_the_unconditional_bitwise():
    model, x = Labelled(RING, SDE), points()
    conditional, unconditional = (ClassifierFree(model, scale)(x, 0.3, label=LABEL) for scale in (1.0, 0.0))
    assert torch.equal(conditional.denoised, model(x, 0.3, label=LABEL).denoised)
    assert torch.equal(unconditional.denoised, model(x, 0.3).denoised)
    assert (conditional.calls, unconditional.calls) == (1, 1)


def test_guided_score_is_that_of_the_tilted_density_at_each_noise_level():
    model, x, scale = Labelled(RING, SDE), points(), 3.0
    alpha, sigma = float(SDE.alpha(0.3)), float(SDE.sigma(0.3))
    marginal = RING.marginal(alpha, sigma)
    v = x.clone().requires_grad_()
    log_posterior = marginal.responsibilities(v).log().gather(1, LABEL[:, None]).sum()
    (gradient,) = torch.autograd.grad(marginal.log_prob(v).sum() + scale * log_posterior, v)
    guided = ClassifierFree(model, scale)(x, 0.3, label=LABEL)
    torch.testing.assert_close(guided.score, gradient)
    per_sample = ClassifierFree(model, scale)(x, torch.full((4,), 0.3, dtype=torch.float64), label=LABEL)
    torch.testing.assert_close(per_sample.score, gradient)

    def log_prob(x, t, label):
        return marginal.responsibilities(x).log().gather(1, label[:, None]).squeeze(1)

    classified = Classifier(ExactScore(RING, SDE), log_prob, scale)
    assert classified.condition_names == {"label"}
    with torch.no_grad():
        torch.testing.assert_close(classified(x, 0.3, label=LABEL).score, gradient)


@few_steps
def test_a_label_beyond_the_classes_is_refused_and_no_null_class():
    network = MLP((2,), width=8, depth=1, frequencies=4, num_classes=3)
    model = LearnedScore(network, SDE, Noise(), (2,))
    sampler = Sampler(DDIM(), partial(grid.log_snr, steps=2))
    for asked in (model, ClassifierFree(model, 2.0)):
        for label in (torch.tensor([0, 3]), torch.tensor([4, -1])):
            with pytest.raises(ValueError, match="but this model knows the classes 0 to 2"):
                sampler.sample(asked, (2, 2), seed=0, condition={"label": label})
        one, each = (sampler.sample(asked, (2, 2), seed=0, condition={"label": label}).x
                     for label in (1, torch.tensor([1, 1])))  # fmt: skip
        assert torch.equal(one, each)
    with pytest.raises(IndexError):
        model(torch.zeros(2, 2), 0.5, label=torch.tensor([0, 3]))


def test_a_static_threshold_clips_the_denoiser_and_is_seen_in_every_view():
    model = StaticThreshold(ExactScore(RING, SDE), 0.5)
    x, t = 3 * torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 0.3
    said, plain = model(x, t), ExactScore(RING, SDE)(x, t)
    assert (plain.denoised.abs() > 0.5).any()
    torch.testing.assert_close(said.denoised, plain.denoised.clamp(-0.5, 0.5))
    torch.testing.assert_close(float(SDE.alpha(t)) * said.denoised + float(SDE.sigma(t)) * said.noise, x)
    with pytest.raises(ValueError, match="give a number limit > 0"):
        StaticThreshold(ExactScore(RING, SDE), 0)


def test_calls_are_counted_as_they_are_made():
    model = Labelled(RING, SDE)
    sampler = Sampler(DDIM(), partial(grid.log_snr, steps=9))
    condition = {"label": LABEL}
    for guided in (
        ClassifierFree(model, 2.0),
        ClassifierFree(model, 1.0),
        ClassifierFree(model, 2.0, interval=(0.1, 2.0)),
        ClassifierFreePlusPlus(model, 0.0),
        ClassifierFreePlusPlus(model, 1.0),
        ClassifierFreePlusPlus(model, 1.0, interval=(0.1, 2.0)),
        DynamicThreshold(ClassifierFree(model, 2.0), 1.0, 4.0),
        Autoguidance(ClassifierFree(model, 2.0), model, 2.0),
    ):
        model.calls = 0
        assert sampler.sample(guided, (4, 2), seed=0, condition=condition).nfe == model.calls
    inside = ClassifierFree(model, 2.0, interval=(0.1, 2.0))
    assert 10 < sampler.sample(inside, (4, 2), seed=0, condition=condition).nfe < 20


class LabelledNoise(Labelled):
    """The same by its noise, as a network of that parameterization says it."""

    def __call__(self, x, t, label=None):
        said = super().__call__(x, t, label)
        return Prediction.from_noise(x, said.noise, said.alpha, said.sigma)


LEVELS = partial(grid.log_snr, steps=6)


def by_hand(model, scale, move):
    """A run of LEVELS in which move(i, x, D, eps, before) is x at the next time: D guided, eps without a label."""
    times = LEVELS(SDE)
    x, before = points(), None
    for i, t in enumerate(times.tolist()):
        plain, towards = model(x, t), model(x, t, label=LABEL)
        eps = plain.noise + scale * (towards.noise - plain.noise)
        clean = (x - SDE.sigma(times[i]) * eps) / SDE.alpha(times[i])
        if i < len(times) - 1:
            x, before = move(i, x, clean, plain, before), (clean, plain)
    return clean


def renoised(step, model, scale):
    run = Sampler(step, LEVELS)
    guided = ClassifierFreePlusPlus(model, scale)
    return run.sample(guided, (4, 2), x_init=points(), noise=BatchNoise(3), condition={"label": LABEL}).x


@pytest.mark.parametrize("kind", [Labelled, LabelledNoise])
@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_plus_plus_with_ddim_is_the_published_algorithm(eta, scale, kind):
    model, times = kind(RING, SDE), LEVELS(SDE)
    z = BatchNoise(3).open((4, 2), torch.float64, "cpu")

    def move(i, x, clean, plain, before):
        sigma_s, ratio = SDE.sigma(times[i + 1]), SDE.transition_kernel(times[i + 1], times[i])[1] / SDE.sigma(times[i])
        c = eta * ratio * sigma_s
        return SDE.alpha(times[i + 1]) * clean + (sigma_s**2 - c**2).sqrt() * plain.noise + c * z(2 * i + 1, 0)

    torch.testing.assert_close(renoised(DDIM(eta), model, scale), by_hand(model, scale, move))


def test_plus_plus_with_other_predictors_renoises_as_comfyui_does():
    """`dpmpp_2m`, `dpmpp_2s`, `gradient_estimation`, each `_cfg_pp`, on x / alpha; the multistep one with D before guided."""
    model, times, scale = Labelled(RING, SDE), LEVELS(SDE), 0.6
    lam, alpha = SDE.half_log_snr(times), SDE.alpha(times)
    level, h = (-lam).exp(), lam.diff()

    def multistep(i, x, clean, plain, before):
        decay = (-h[i]).exp()
        new = decay * (x / alpha[i] + clean - plain.denoised) - torch.expm1(-h[i]) * clean
        slope = 0 if before is None else (clean - before[0]) * h[i] / (2 * h[i - 1])
        return alpha[i + 1] * (new - torch.expm1(-h[i]) * slope)

    def singlestep(i, x, clean, plain, before):
        start, middle = x / alpha[i] + clean - plain.denoised, SDE.time_at(lam[i] + h[i] / 2)
        u = (-h[i] / 2).exp() * start - torch.expm1(-h[i] / 2) * clean
        u, t = SDE.alpha(middle) * u, middle.item()
        plain, towards = model(u, t).denoised, model(u, t, label=LABEL).denoised
        return alpha[i + 1] * ((-h[i]).exp() * start - torch.expm1(-h[i]) * (plain + scale * (towards - plain)))

    def gradient(i, x, clean, plain, before):
        change = 0 if before is None else plain.noise - before[1].noise
        return alpha[i + 1] * (clean + level[i + 1] * plain.noise + (level[i + 1] - level[i]) * change)

    for step, move in (
        (ExponentialAdams(2, weights="midpoint"), multistep),
        (DPMSolverSinglestep(2), singlestep),
        (GradientEstimation(), gradient),
    ):
        torch.testing.assert_close(renoised(step, model, scale), by_hand(model, scale, move))


@pytest.mark.parametrize(
    "step", [DDIM(), DDIM(1.0), Ancestral(), ExponentialAdams(1, eta=0.5), ERSDESolver(1)], ids=repr
)
def test_plus_plus_in_one_step_is_classifier_free_of_a_scale_that_the_move_sets(step):
    model, x, scale = Labelled(RING, SDE), points(), 0.4
    t, s = torch.tensor([0.6], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    (row,) = step.plan(SDE, t, s)

    def moved(guided):
        return step.advance(row, x, (), lambda x, t: guided(x, t, label=LABEL), lambda k: points(4).flip(0))[0]

    expected = moved(ClassifierFree(model, scale * float(SDE.alpha(s)) / row.b[0]))
    torch.testing.assert_close(moved(ClassifierFreePlusPlus(model, scale)), expected)
    if step.__class__ is DDIM and step.eta == 0:
        l_t, l_s = (float(SDE.noise_level(u)) for u in (t, s))
        assert float(SDE.alpha(s)) / row.b[0] == pytest.approx(l_t / (l_t - l_s))


def test_plus_plus_says_the_noise_without_the_label_bitwise_and_one_point():
    model, x = LabelledNoise(RING, SDE), points()
    said, guided = (
        ClassifierFreePlusPlus(model, 0.6)(x, 0.3, label=LABEL),
        ClassifierFree(model, 0.6)(x, 0.3, label=LABEL),
    )
    torch.testing.assert_close(said.mix(0.0, 1.0), model(x, 0.3).noise, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(said.denoised, guided.denoised, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(said.x, said.alpha * said.denoised + said.sigma * said.mix(0.0, 1.0))
    outside = ClassifierFreePlusPlus(model, 0.6, interval=(1e-3, 1e-2))(x, 0.3, label=LABEL)
    assert outside.x is x
    assert torch.equal(outside.denoised, model(x, 0.3, label=LABEL).denoised)


class OfItsOwn(DDIM):
    """DDIM as one writes it, which with CFG++ would be `ClassifierFree` of the same scale."""

    def advance(self, row, x, history, evaluate, draw):
        return row.a * x + row.b[0] * evaluate(x, row.t).denoised, history


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (ProbabilityFlowODE(), "has no score"),
        (AdaptiveODE(), "times of a fixed grid"),
        (AdaptiveSDE(), "times of a fixed grid"),
        (ParallelSampler(DDIM(), LEVELS), "times of a fixed grid"),
        (Sampler(DDIM(), LEVELS, LangevinCorrector()), "needs a score"),
        (Sampler(DDIM(), LEVELS, UnadjustedLangevin()), "needs a score"),
        (
            Sampler(DDRM(Mask((2,), torch.tensor([True, False])), torch.zeros(1)), LEVELS),
            "does not go on from the prediction's x",
        ),
        (Sampler(OfItsOwn(), LEVELS), "OfItsOwn does not go on from the prediction's x.*takes_x = True"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_plus_plus_is_refused_where_a_score_is_asked_for(sampler, message):
    guided = DynamicThreshold(ClassifierFreePlusPlus(Labelled(RING, SDE), 0.6))
    with pytest.raises(ValueError, match=message):
        sampler.sample(guided, (4, 2), seed=0, condition={"label": LABEL})
    with pytest.raises(ValueError, match="has no score"):
        log_likelihood(guided, points(), method="adams", steps=12, condition={"label": LABEL})
    with pytest.raises(ValueError, match="reparameterize, or observe, the model inside"):
        reparameterize(guided, VESDE())(points(), 0.5, label=LABEL)


def test_interval_is_open_below_and_in_noise_levels():
    sde = VESDE()
    model, x = Labelled(RING, sde), points()
    level = float(sde.sigma(0.5)) * (1 + 1e-12)
    outside = ClassifierFree(model, 5.0, interval=(level, 10 * level))(x, 0.5, label=LABEL)
    inside = ClassifierFree(model, 5.0, interval=(level / 2, level * 1.000001))(x, 0.5, label=LABEL)
    assert torch.equal(outside.denoised, model(x, 0.5, label=LABEL).denoised)
    torch.testing.assert_close(inside.denoised, ClassifierFree(model, 5.0)(x, 0.5, label=LABEL).denoised)
    mixed = torch.tensor([0.4, 0.5, 0.6, 0.9], dtype=torch.float64)
    half = ClassifierFree(model, 5.0, interval=(float(sde.sigma(0.45)), float(sde.sigma(0.7))))
    got, full, plain = (m(x, mixed, label=LABEL).denoised for m in (half, ClassifierFree(model, 5.0), model))
    torch.testing.assert_close(got, torch.stack([plain[0], full[1], full[2], plain[3]]))


def test_negative_condition_takes_the_place_of_none():
    model, x, other = Labelled(RING, SDE), points(), torch.tensor([2, 2, 0, 0])
    guided = ClassifierFree(model, 3.0, negative={"label": other})(x, 0.3, label=LABEL)
    toward, away = (model(x, 0.3, label=v).denoised for v in (LABEL, other))
    torch.testing.assert_close(guided.denoised, 3 * toward - 2 * away)


def test_rescaling_gives_each_sample_the_conditional_spread():
    model, x = Labelled(RING, SDE), points()
    plain, full, half = (ClassifierFree(model, 4.0, rescale=r)(x, 0.3, label=LABEL).denoised for r in (0.0, 1.0, 0.5))
    spread = model(x, 0.3, label=LABEL).denoised.std(1)
    torch.testing.assert_close(full.std(1), spread)
    torch.testing.assert_close(half, (plain + full) / 2)


def test_rescaling_leaves_alone_what_has_no_spread():
    line = GaussianMixture([0.2, 0.3, 0.5], [[0.5], [-1.0], [2.0]], [[[0.3]]] * 3)
    model, x = Labelled(line, SDE), torch.linspace(-1, 1, 4, dtype=torch.float64)[:, None]
    plain, rescaled = (ClassifierFree(model, 4.0, rescale=r)(x, 0.3, label=LABEL).denoised for r in (0.0, 0.5))
    torch.testing.assert_close(rescaled, plain)


def test_autoguidance_extrapolates_from_the_bad_model():
    good, bad = ExactScore(RING, SDE), ExactScore(RING.marginal(1.0, 0.8), SDE)
    x = points()
    guided = Autoguidance(good, bad, 2.5)(x, 0.3)
    torch.testing.assert_close(guided.denoised, 2.5 * good(x, 0.3).denoised - 1.5 * bad(x, 0.3).denoised)
    assert guided.calls == 2


def test_dynamic_threshold_by_hand():
    class Fixed(Shrink):
        def __call__(self, x, t, **condition):
            clean = torch.tensor([[0.5, -0.2, 0.1, 0.0], [4.0, -2.0, 0.5, -0.1]], dtype=x.dtype)
            return Prediction(x, clean, 0.5, 0.5)

    clean = DynamicThreshold(Fixed(SDE, (4,)), 0.75)(torch.zeros(2, 4, dtype=torch.float64), 0.5).denoised
    size = 2.0 + 0.25 * 2.0  # the 0.75 quantile of 0.1, 0.5, 2, 4 lies a quarter of the way from 2 to 4
    wanted = torch.tensor([[0.5, -0.2, 0.1, 0.0], [1.0, -2.0 / size, 0.5 / size, -0.1 / size]], dtype=torch.float64)
    torch.testing.assert_close(clean, wanted)
    half = DynamicThreshold(Fixed(SDE, (4,)), 0.75)(torch.zeros(2, 4, dtype=torch.bfloat16), 0.5).denoised
    torch.testing.assert_close(half.double(), wanted, rtol=1e-2, atol=1e-2)


def test_native_output_is_kept_in_float32():
    torch.manual_seed(0)
    network = MLP((2,), width=16, depth=1, frequencies=4, num_classes=3)
    for weight in (network.last.weight, network.blocks[0].branch[-1].weight, network.embedding.label.weight):
        torch.nn.init.normal_(weight, std=0.5)
    model, x = LearnedScore(network, SDE, Noise(), (2,)).requires_grad_(False), points().float()
    t = 1e-3
    guided = ClassifierFree(model, 3.0)(x, t, label=LABEL)
    exact = 3 * model(x, t, label=LABEL).raw - 2 * model(x, t).raw
    torch.testing.assert_close(guided.noise, exact, rtol=2e-5, atol=2e-5)
    assert (guided.noise - model(x, t).noise).abs().max() > 1e-2


def test_a_point_alone_is_a_point_among_many():
    model, sampler = Labelled(RING, SDE), Sampler(Heun(), partial(grid.karras, steps=6))
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    guided = ClassifierFree(model, 3.0, rescale=0.5)
    together = sampler.sample(guided, (4, 2), seed=0, x_init=x, condition={"label": LABEL}).x
    alone = [sampler.sample(guided, (1, 2), seed=0, x_init=x[i : i + 1], condition={"label": LABEL[i : i + 1]}).x
             for i in range(4)]  # fmt: skip
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-5, atol=1e-5)  # the mixture multiplies by BLAS


@pytest.mark.parametrize(
    ("make_it", "error", "message"),
    [
        (lambda m: ClassifierFree(m, float("nan")), ValueError, "scale is a finite number, got nan"),
        (lambda m: ClassifierFree(m, "abc"), ValueError, "scale is a finite number, got 'abc'"),
        (lambda m: ClassifierFree(m, 2.0, interval=(3, 1)), ValueError, "0 <= low < high, got (3, 1)"),
        (lambda m: ClassifierFree(m, 2.0, rescale=2.0), ValueError, "rescale lies in [0, 1], got 2.0"),
        (lambda m: ClassifierFree(m, 2.0, negative={"prompt": 1}), TypeError, "unknown condition 'prompt'"),
        (lambda m: ClassifierFree(m, 2.0)(points(), 0.5), ValueError, "towards a condition, got none"),
        (lambda m: ClassifierFree(m, 2.0)(points(), 0.5, labels=LABEL), TypeError, "unknown condition 'labels'"),
        (lambda m: Autoguidance(m, ExactScore(RING, VESDE()), 2.0), ValueError, "one process"),
        (lambda m: Autoguidance(*(ExactScore(RING, sde) for sde in LADDERS), 2.0), ValueError, "one process"),
        (lambda m: DynamicThreshold(m, 1.5), ValueError, "quantile=1.5"),
        (lambda m: ClassifierFree(RING, 2.0), TypeError, "wraps a ScoreModel, got GaussianMixture"),
    ],
)
def test_refusals(make_it, error, message):
    with pytest.raises(error) as refusal:
        make_it(Labelled(RING, SDE))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_guided_network_starts_where_its_model_does_on_grids_below_t_max():
    torch.manual_seed(0)
    model = LearnedScore(MLP((2,), width=8, depth=1, num_classes=3), VESDE(sigma_max=20.0), Noise(sigma_data=3.0), (2,))
    guided, z = ClassifierFree(model, 1.0), points()
    torch.testing.assert_close(guided.start_at(z, 0.4), model.start_at(z, 0.4), rtol=0, atol=0)
    sigma = model.sde.sigma(0.4).item()
    torch.testing.assert_close(guided.start_at(z, 0.4), (9 + sigma**2) ** 0.5 * z)


def test_a_negative_condition_is_for_all_samples_or_one_a_sample():
    model, x = Labelled(RING, SDE), points()
    shared, each = (
        ClassifierFree(model, 2.0, negative={"label": label})(x, 0.3, label=LABEL).denoised
        for label in (torch.tensor([2]), torch.full((4,), 2))
    )
    assert torch.equal(shared, each)
    guided = ClassifierFree(model, 2.0, negative={"label": torch.tensor([2])})
    assert torch.isfinite(AdaptiveODE().sample(guided, (4, 2), seed=0, condition={"label": LABEL}).x).all()
    with pytest.raises(ValueError, match="the negative 'label' has 3 rows for 4 samples: give one for all"):
        ClassifierFree(model, 2.0, negative={"label": LABEL[:3]})(x, 0.3, label=LABEL)
    each = ClassifierFree(model, 2.0, negative={"label": torch.full((4,), 2)})
    with pytest.raises(ValueError, match="the negative 'label' has 4 rows for 1 samples: give one for all"):
        AdaptiveODE().sample(each, (4, 2), seed=0, condition={"label": LABEL})  # which once worked or not, by chance


def test_the_last_denoising_counts_the_calls_that_it_makes():
    guided = ClassifierFree(Labelled(RING, SDE), 2.0)
    plain, denoised = (
        ProbabilityFlowODE(final=final).sample(guided, (4, 2), seed=0, condition={"label": LABEL})
        for final in ("none", "denoise")
    )
    assert denoised.nfe == plain.nfe + 2


@few_steps
def test_a_model_under_one_condition_needs_none():
    model, x = Labelled(RING, SDE), points()
    for t in (0.3, torch.full((4,), 0.3)):
        bound, asked = Conditioned(model, label=2)(x, t).denoised, model(x, t, label=torch.full((4,), 2)).denoised
        torch.testing.assert_close(bound, asked, rtol=0, atol=0)
    network = MLP((2,), width=8, depth=1, num_classes=3, context_width=2)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    learned = LearnedScore(network, SDE, Noise(), (2,))
    both = Conditioned(Conditioned(learned, label=1), context=torch.tensor([1.0, -1.0]))
    asked = {"label": 1, "context": [1.0, -1.0]}
    samples = [AdaptiveODE().sample(model, (5, 2), seed=0, condition=condition).x
               for model, condition in ((both, None), (learned, asked))]  # fmt: skip
    torch.testing.assert_close(*samples, rtol=0, atol=0)
    assert not torch.allclose(
        AdaptiveODE().sample(learned, (5, 2), seed=0, condition=asked | {"label": 2}).x, samples[0]
    )
    with pytest.raises(ValueError, match="label=7, but this model knows the classes 0 to 2"):
        Conditioned(learned, label=7)
    with pytest.raises(TypeError, match="unknown condition 'label'"):
        both(x, 0.3, label=LABEL)
    with pytest.raises(ValueError, match="one condition for all samples"):
        Conditioned(learned, label=[0, 1])
    assert (
        len({fingerprint(Conditioned(learned, label=k)) for k in range(3)}) == 3
    )  # or comparisons would share their cells
    doubled = Sampler(DDIM(), partial(grid.log_snr, steps=3)).sample(both, (5, 2), seed=0, dtype=torch.float64)
    assert doubled.x.dtype == torch.float64


def test_a_classifier_gives_one_number_a_sample():
    """Summed over all classes, log-probabilities would guide to none of them, without a word."""
    wrong = Classifier(Labelled(RING, SDE), lambda x, t: torch.stack([x[:, 0], x[:, 1]], 1).log_softmax(1))
    with pytest.raises(ValueError, match=r"one number per sample, shape \(4,\), got \(4, 2\)"):
        wrong(points(), 0.3)


def test_a_classifier_s_conditions_are_its_named_parameters():
    """Those that **rest swallows have no name: a misspelt condition would vanish in it."""
    guided = Classifier(Labelled(RING, SDE), lambda x, t, weight, **rest: -weight * x.square().sum(1))
    assert guided.condition_names == {"label", "weight"}
    with pytest.raises(TypeError, match="unknown condition 'rest'"):
        guided(points(), 0.3, weight=1.0, rest=2.0)

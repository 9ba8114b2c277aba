"""Langevin steps: the rules of the papers, what they leave stationary, and that a scaled variable changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from closed_forms import F64, gaussian, log_snr_between, mixture
from conftest import SDES

from score_sde.noise import BatchNoise, SampleNoise
from score_sde.prediction import Prediction
from score_sde.sampler import Sampler
from score_sde.score import ExactScore, ScoreModel
from score_sde.sde import VPSDE, DiscreteSDE, KarrasSDE
from score_sde.steps import AnnealedLangevin, EulerMaruyama, LangevinCorrector


def row_at(step, sde, t: float):
    times = torch.tensor([t], dtype=F64)
    return step.plan(sde, times, times)[0]


def score_form(step, sde, t: float) -> tuple[float, float, float]:
    """(p, q, c) of x <- p x + q score + c z."""
    _, a, (b,), c = row_at(step, sde, t)[:4]
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    return a + b / alpha, b * sigma**2 / alpha, c


def test_the_expected_rule_of_song():
    """eps = 2 (r |z| / |g|)^2 with E|z|^2 = d and E|g|^2 = d / sigma^2: 2 r^2 sigma^2."""
    for sde in SDES.values():
        t = float(sde.time_at(-0.4))
        eps = 2 * (0.16 * float(sde.sigma(t))) ** 2
        assert score_form(LangevinCorrector(0.16), sde, t) == pytest.approx((1, eps, math.sqrt(2 * eps)), rel=1e-9)


def test_ncsns_rule():
    """step_i = eps sigma_i^2 / sigma_L^2, x <- x + step s + sqrt(2 step) z."""
    sde = DiscreteSDE.smld([0.01, 0.1, 1.0, 10.0])
    for i, sigma in enumerate([0.01, 0.1, 1.0, 10.0]):
        step = 2e-5 * sigma**2 / 0.01**2
        found = score_form(AnnealedLangevin(epsilon=2e-5, sigma_L=0.01), sde, float(i))
        assert found == pytest.approx((1, step, math.sqrt(2 * step)), rel=1e-9)


@pytest.mark.parametrize(("epsilon", "snr"), [(6.2e-6, 0.17607), (2e-5, 0.31623)])
def test_song_snr_and_ncsn_epsilon_are_one_rule(epsilon, snr):
    """snr = sqrt(epsilon / (2 sigma_L^2)): 6.2e-6 is the config's 0.176, 2e-5 its 0.316."""
    assert math.sqrt(epsilon / (2 * 0.01**2)) == pytest.approx(snr, rel=2e-5)
    sde, t = VPSDE(), 0.3
    one = row_at(LangevinCorrector(math.sqrt(epsilon / (2 * 0.01**2))), sde, t)
    assert tuple(one)[1:2] == pytest.approx(tuple(row_at(AnnealedLangevin(epsilon), sde, t))[1:2], rel=1e-12)
    assert one.c == pytest.approx(row_at(AnnealedLangevin(epsilon), sde, t).c, rel=1e-12)


def test_the_stationary_variance_of_the_linear_step(sde):
    """v / (1 - eps / (2 v)) on N(0, v): the fixed point of V = A^2 V + c^2 with the table's own coefficients."""
    for step in (LangevinCorrector(0.3), AnnealedLangevin()):
        t = float(sde.time_at(-0.3))
        alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
        v, eps = alpha**2 * 0.49 + sigma**2, step.ratio * sigma**2
        _, a, (b,), c = row_at(step, sde, t)[:4]
        gain = a + b * alpha * 0.49 / v
        assert c**2 / (1 - gain**2) == pytest.approx(v / (1 - eps / (2 * v)), rel=1e-9)


class Wide(ScoreModel):
    """N(0, v I) at every time: the score is -x / v."""

    def __init__(self, v: float, dimension: int) -> None:
        self.sde, self.event_shape, self.v = KarrasSDE(), (dimension,), v

    def __call__(self, x, t, **condition):
        sigma = float(t)
        return Prediction(x, x * (1 - sigma**2 / self.v), 1.0, sigma)


@pytest.mark.parametrize("norm", ["sample", "batch"])
@pytest.mark.parametrize(("snr", "v"), [(0.16, 1.0), (0.3, 2.5)])
def test_measured_norms_leave_v_times_one_plus_snr_squared(norm, snr, v):
    """snr^2 is 0.0256 and 0.09; the average over 8 samples of 20,000 dimensions and 60 correlated visits has relative
    standard error 0.002, so that the bound is false by chance once in 10^4."""
    model, batch = Wide(v, 20_000), 8
    step = LangevinCorrector(snr, steps=1, norm=norm)
    row, stream = row_at(step, model.sde, 1.0), BatchNoise(3).open((batch, 20_000), torch.float32, "cpu")
    x, found = math.sqrt(v) * stream(0, 0), []
    for i in range(140):
        x, _ = step.advance(row, x, (), model, lambda k, i=i: stream(i + 1, k))
        if i >= 80:
            found.append(float(x.square().mean()))
    assert sum(found) / len(found) == pytest.approx(v * (1 + snr**2), rel=8e-3)


def test_norms_per_sample_are_the_formula():
    """x + eps g + sqrt(2 eps) z with eps = 2 (r |z| / |g|)^2 for each sample; with batch norms, from their means."""
    model, snr = ExactScore(mixture(), VPSDE()), 0.2
    x = torch.tensor([[0.5], [-2.0], [3.0]], dtype=F64)
    z = torch.tensor([[1.0], [-0.5], [2.0]], dtype=F64)
    g = model(x, 0.4).score
    for norm in ("sample", "batch"):
        step = LangevinCorrector(snr, norm=norm)
        ratio = z.abs() / g.abs() if norm == "sample" else z.abs().mean() / g.abs().mean()
        eps = 2 * (snr * ratio) ** 2
        found, _ = step.advance(row_at(step, model.sde, 0.4), x, (), model, lambda k: z)
        torch.testing.assert_close(found, x + eps * g + (2 * eps).sqrt() * z)


@pytest.mark.parametrize(
    "step", [AnnealedLangevin(steps=3), LangevinCorrector(0.2, steps=2), LangevinCorrector(norm="sample")]
)
def test_the_same_noise_gives_the_same_path_of_x_over_alpha(step):
    """VP and VE at the same noise levels: the scaled variable takes one path, so the law is one."""
    target, vp, ve = mixture(), VPSDE(), KarrasSDE()
    grids = log_snr_between(-4.0, 3.0, 10)
    y = math.exp(4.0) * torch.linspace(-2, 2, 5, dtype=F64)[:, None]
    runs = {}
    for sde in (vp, ve):
        start = y * sde.alpha(grids(sde)[0])
        run = Sampler(None, grids, step).sample(
            ExactScore(target, sde), (5, 1), x_init=start, noise=SampleNoise(range(5)), trajectory=True
        )
        runs[sde] = run.trajectory / sde.alpha(grids(sde))[:, None, None]
    torch.testing.assert_close(runs[vp], runs[ve], rtol=1e-8, atol=1e-8)


def test_annealed_langevin_reaches_the_law_it_should():
    """Gaussian data, exact moments: at slow annealing the end is the last level's stationary law."""
    sde, step = VPSDE(), AnnealedLangevin(steps=20)
    sampler = Sampler(None, log_snr_between(-4.0, 2.0, 60), step, final="none")
    model = ExactScore(gaussian(0.7, 0.5), sde)
    x = sampler.sample(model, (20_000, 1), seed=0).x
    t = float(sampler.grid(sde)[-1])
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    v, eps = alpha**2 * 0.25 + sigma**2, step.ratio * sigma**2
    assert float(x.mean()) == pytest.approx(alpha * 0.7, abs=5 * math.sqrt(v / 20_000))
    assert float(x.var()) == pytest.approx(v / (1 - eps / (2 * v)), rel=0.05)  # 5 standard errors


def test_a_corrector_at_the_exact_law_changes_it_by_order_eps_squared():
    """p_t is stationary up to eps: one tiny step changes the variance by eps^2 / v, not by eps."""
    sde, t = VPSDE(), 0.4
    for snr in (0.01, 0.02):
        _, a, (b,), c = row_at(LangevinCorrector(snr), sde, t)[:4]
        alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
        v, eps = alpha**2 * 0.49 + sigma**2, 2 * snr**2 * sigma**2
        gain = a + b * alpha * 0.49 / v
        assert gain**2 * v + c**2 - v == pytest.approx(eps**2 / v, rel=1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LangevinCorrector(snr=0.0), r"snr lies in \(0, 1\)"),
        (lambda: LangevinCorrector(snr=math.nan), r"snr lies in \(0, 1\)"),
        (lambda: LangevinCorrector(steps=0), "whole number steps >= 1"),
        (lambda: LangevinCorrector(steps=1.5), "whole number steps >= 1"),
        (lambda: LangevinCorrector(steps="two"), "whole number steps >= 1"),
        (lambda: LangevinCorrector(norm="mean"), "norm is one of expected, sample, batch"),
        (lambda: AnnealedLangevin(epsilon=1.0), "lower epsilon"),
        (lambda: AnnealedLangevin(epsilon=-1e-5), "0 < epsilon"),
        (lambda: AnnealedLangevin(sigma_L=0.0), "sigma_L"),
        (lambda: Sampler(LangevinCorrector(), log_snr_between(-1, 1, 2)), "is a corrector, it cannot be the predictor"),
        (
            lambda: Sampler(None, log_snr_between(-1, 1, 2), EulerMaruyama()),
            "is a predictor, it cannot be the corrector",
        ),
    ],
)
def test_impossible_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def variance_after(ratio: float, gamma: float, steps: int) -> float:
    """Langevin steps on N(0, 1) from variance gamma^2, one by one: v <- (1 - r)^2 v + 2 r."""
    v = gamma**2
    for _ in range(steps):
        v = (1 - ratio) ** 2 * v + 2 * ratio
    return v


@pytest.mark.parametrize(
    ("sigma_max", "levels", "steps", "published", "computed"),
    [
        (50, 232, 5, 6.2e-6, 6.18e-6),
        (90, 500, 5, 3.3e-6, 3.34e-6),
        (190, 1086, 3, 1.8e-6, 1.77e-6),
        (348, 2311, 3, 9e-7, 8.93e-7),
    ],
)
def test_step_sizes_by_the_variance_rule_are_those_of_ncsnv2(sigma_max, levels, steps, published, computed) -> None:
    # Song & Ermon 2020, table 3: CIFAR-10, CelebA, LSUN bedroom, FFHQ; and the minimiser to three digits.
    gamma = (sigma_max / 0.01) ** (1 / (levels - 1))
    step = AnnealedLangevin.by_variance(gamma, steps)
    assert step.epsilon == pytest.approx(published, rel=0.02)
    assert step.epsilon == pytest.approx(computed, rel=2e-3)
    assert step.repeats == steps
    off = [abs(variance_after(factor * step.ratio, gamma, steps) - 1) for factor in (0.97, 1.0, 1.03)]
    assert off[1] == min(off)


def test_the_variance_rule_refuses_levels_that_do_not_fall() -> None:
    with pytest.raises(ValueError, match="above 1"):
        AnnealedLangevin.by_variance(1.0)

"""Diagnostics of models whose defect is known in closed form."""

from __future__ import annotations

import math

import pandas.testing
import pytest
import torch
from torch import nn

from score_sde import targets
from score_sde.evaluation.diagnostics import (
    asymmetry,
    calibration,
    check_target,
    diagnose,
    field_error,
    fokker_planck_residual,
    score_error,
)
from score_sde.guidance import Conditioned
from score_sde.networks import MLP
from score_sde.networks.energy import Conservative
from score_sde.parameterization import Denoised, Noise
from score_sde.prediction import Prediction
from score_sde.score import ExactScore, LearnedScore, ScoreModel
from score_sde.sde import VESDE, VPSDE, KarrasSDE, SubVPSDE

RING = targets.ring(weights=[1, 2, 3, 4, 1, 2, 3, 4])
STD = 0.7
GAUSSIAN = targets.GaussianMixture([1.0], torch.zeros(1, 2), STD**2 * torch.eye(2)[None])
SDES = [VPSDE(), SubVPSDE(), VESDE(), KarrasSDE()]


class Scaled(ScoreModel):
    """An exact model whose denoiser is multiplied by `factor` and turned by `angle`."""

    def __init__(self, exact, factor=1.0, angle=0.0):
        self.exact, self.sde, self.event_shape = exact, exact.sde, exact.event_shape
        self.turn = factor * torch.tensor(
            [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64
        )

    def __call__(self, x, t, **condition):
        p = self.exact(x.double(), t)
        return Prediction(p.x, p.denoised @ self.turn, p.alpha, p.sigma)


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_score_error_of_a_scaled_denoiser_and_the_irreducible_loss_are_their_closed_forms(sde):
    found = score_error(Scaled(ExactScore(GAUSSIAN, sde), 1.1), GAUSSIAN, levels=9, count=4000)
    alpha, sigma = sde.alpha(found.times), sde.sigma(found.times)
    total = alpha**2 * STD**2 + sigma**2
    # D = alpha STD^2 / total x, and n - n* = -alpha / sigma 0.1 D.
    expected = 0.01 * alpha**4 * STD**4 / (total * sigma**2)
    assert ((found.fisher - expected).abs() < 4.5 * found.std_error + 1e-12).all()
    relative_error = 4.5 / math.sqrt(4000)  # of a mean of 8,000 squares
    torch.testing.assert_close(found.irreducible, alpha**2 * STD**2 / total, rtol=relative_error, atol=0)
    torch.testing.assert_close(found.relative, expected * total / sigma**2, rtol=relative_error, atol=0)
    assert found.half_log_snr.diff().max() < 0


def test_the_loss_is_the_irreducible_part_and_the_fisher_divergence():
    found = score_error(Scaled(ExactScore(GAUSSIAN, VPSDE()), 1.3), GAUSSIAN, levels=5, count=100_000)
    torch.testing.assert_close(found.loss, found.irreducible + found.fisher, rtol=0.02, atol=1e-3)
    span = found.half_log_snr
    flat = score_error(ExactScore(GAUSSIAN, VPSDE()), GAUSSIAN, levels=5, count=10)
    assert flat.mean < 1e-12
    middle = ((found.fisher[1:] + found.fisher[:-1]) / 2 * span.diff()).sum() / (span[-1] - span[0])
    assert abs(found.mean - middle.item()) < 1e-12


def test_field_error_is_the_pointwise_one():
    model = Scaled(ExactScore(RING, VPSDE()), 1.2)
    x = RING.sample((10,), generator=torch.Generator().manual_seed(0)).double()
    p = model.exact(x, 0.2)
    expected = (p.alpha / p.sigma * 0.2 * p.denoised).norm(dim=1) / math.sqrt(2)
    torch.testing.assert_close(field_error(model, RING, x, 0.2), expected)


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_exact_scores_obey_the_fokker_planck_equation(sde):
    x = 2 * torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.linspace(sde.t_min + 0.2 * (sde.t_max - sde.t_min), sde.t_max, 20, dtype=torch.float64)
    model = ExactScore(RING, sde)
    x = x * torch.hypot(sde.alpha(t), sde.sigma(t))[:, None]
    residual = fokker_planck_residual(model, x, t)
    assert residual.abs().max() < 1e-8 * (1 + model(x, t).noise.abs().max())


def test_the_residual_of_a_scaled_score_is_its_closed_form():
    """For n = k n* of N(0, v): n* obeys R = 0, so R(k n*) = (k - k^2) sigma grad |n*|^2."""

    class Louder(ExactScore):
        def __call__(self, x, t, **condition):
            p = super().__call__(x, t)
            sigma, alpha = (v[:, None] if isinstance(v, torch.Tensor) else v for v in (p.sigma, p.alpha))
            return Prediction(x, (x - 1.5 * sigma * p.noise) / alpha, p.alpha, p.sigma)

    sde = VPSDE()
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha, sigma = sde.alpha(0.3), sde.sigma(0.3)
    total = alpha**2 * STD**2 + sigma**2
    expected = (1.5 - 1.5**2) * sigma * 2 * sigma**2 / total**2 * x
    torch.testing.assert_close(fokker_planck_residual(Louder(GAUSSIAN, sde), x, 0.3), expected)


def test_asymmetry_is_zero_for_gradients_and_the_sine_of_a_turn():
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = ExactScore(GAUSSIAN, VPSDE())
    assert asymmetry(ExactScore(RING, VPSDE()), x, 0.3).max() < 1e-12
    turned = asymmetry(Scaled(exact, angle=0.4), x, 0.3)
    torch.testing.assert_close(turned, torch.full((5,), math.sin(0.4), dtype=torch.float64))
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = MLP((2,), width=16, depth=1, frequencies=4).double()
        nn.init.normal_(network.last.weight)
    plain, energy = (LearnedScore(f, VPSDE(), Noise(), (2,)) for f in (network, Conservative(network)))
    t = torch.full((5,), 0.7, dtype=torch.float64)
    assert asymmetry(plain, x, t).min() > 1e-3
    assert asymmetry(energy, x, t).max() < 1e-10
    still = LearnedScore(MLP((2,)), VPSDE(), Denoised(), (2,))  # whose output starts at 0
    assert (asymmetry(still, x.float(), t) == 0).all()


def test_a_posterior_mean_is_calibrated_and_a_scaled_one_is_not():
    x0 = RING.sample((4000,), generator=torch.Generator().manual_seed(0)).double()
    good = calibration(ExactScore(RING, VPSDE()), x0, levels=6)
    exact_levels = slice(0, 4)  # beyond them D hardly varies, and the slope says little
    assert (good.slope - 1).abs()[exact_levels].max() < 0.03
    assert (good.predicted_mse / good.mse - 1).abs().max() < 0.15
    assert (good.bias / good.bias_floor).max() < 3
    loud = calibration(Scaled(ExactScore(RING, VPSDE()), 1.25), x0, levels=6)
    torch.testing.assert_close(loud.slope, good.slope / 1.25)
    shifted = calibration(ExactScore(RING, VPSDE()), x0 + 1.0, levels=6)
    assert shifted.bias[-1] > 0.5
    assert shifted.bias[-1] > 10 * shifted.bias_floor[-1]


def test_a_diagnosis_finds_nothing_wrong_with_an_exact_model_and_the_turn_of_another():
    exact = ExactScore(GAUSSIAN, VPSDE())
    turned = Scaled(exact, angle=0.3)
    good, bad = (diagnose(model, GAUSSIAN, levels=4, count=400) for model in (exact, turned))
    assert good.error.fisher.max() < 1e-9
    assert good.consistency.residual.max() < 1e-4  # in single precision
    assert good.consistency.asymmetry.max() < 1e-6
    torch.testing.assert_close(bad.consistency.asymmetry, torch.full((4,), math.sin(0.3), dtype=torch.float64))
    assert bad.consistency.residual.max() > 0.01
    # A turn by an angle a shrinks the regression of x_0 on D to cos a.
    slope = (bad.calibration.slope - math.cos(0.3)) / bad.calibration.slope_error
    assert slope.abs().max() < 4
    table = bad.table
    assert len(table) == 4
    assert {"noise", "fisher", "irreducible", "slope_error", "predicted_mse", "residual", "asymmetry"} <= set(table)


def test_one_label_is_for_all_points():
    network = MLP((2,), width=8, depth=1, num_classes=3)
    for part in network.parameters():
        torch.nn.init.normal_(part, std=0.3, generator=torch.Generator().manual_seed(0))
    model = LearnedScore(network, VPSDE(), Noise(), (2,)).eval()
    found = diagnose(model, RING, levels=2, count=12, condition={"label": 1}).table
    bound = diagnose(Conditioned(model, label=1), RING, levels=2, count=12).table
    pandas.testing.assert_frame_equal(found, bound)
    with pytest.raises(ValueError, match="label=3, but this model knows the classes 0 to 2"):
        score_error(model, RING, levels=2, condition={"label": 3})


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="count >= 1"):
        score_error(ExactScore(RING, VPSDE()), RING, count=0)
    with pytest.raises(ValueError, match="levels >= 2"):
        score_error(ExactScore(RING, VPSDE()), RING, levels=1)


def test_the_error_of_a_slope_is_its_spread_over_repeats():
    """Also where the slope is not 1: there the residual is of the regression, not x_0 - D."""
    law = targets.GaussianMixture([1.0], torch.zeros(1, 2), torch.eye(2)[None])
    model = Scaled(ExactScore(law, KarrasSDE()), 2.0)
    draws = [law.sample((200,), generator=torch.Generator().manual_seed(i)).double() for i in range(60)]
    found = [calibration(model, x0, levels=3, seed=i) for i, x0 in enumerate(draws)]
    spread = torch.stack([one.slope for one in found]).std(0)
    claimed = torch.stack([one.slope_error for one in found]).mean(0)
    assert ((claimed / spread).log().abs() < math.log(1.4))[:2].all()  # of 60 repeats it is known to a tenth


class Contradicting(targets.GaussianMixture):
    """A law whose denoiser gives half of what its density says, or takes sigma for its square."""

    def __init__(self, halved: bool) -> None:
        super().__init__([0.3, 0.7], [[-2.0, 0.0], [2.0, 1.0]], [[[0.1, 0.0], [0.0, 0.4]]] * 2)
        self.halved = halved

    def denoise(self, x, alpha, sigma):
        return super().denoise(x, alpha, sigma) / 2 if self.halved else super().denoise(x, alpha, sigma**0.5)


@pytest.mark.parametrize("halved", [True, False])
def test_a_denoiser_that_contradicts_its_density_is_refused(halved):
    says = r"Contradicting.denoise contradicts .* at alpha=0.8, sigma=[\d.]+ it is up to [\d.]+ data standard deviations from"
    with pytest.raises(ValueError, match=says):
        check_target(Contradicting(halved))


@pytest.mark.parametrize(
    "law", [*targets.TOYS.values(), targets.anisotropic, targets.digits], ids=lambda law: law.__name__
)
def test_the_package_s_laws_do_not_contradict_themselves(law):
    check_target(law(), tolerance=1e-6)

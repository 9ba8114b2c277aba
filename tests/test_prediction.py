"""The views of a prediction against each other and against the definitions, with no digits lost on the way."""

from __future__ import annotations

import pytest
import torch

from score_sde.parameterization import Karras, Noise, Score, Velocity
from score_sde.prediction import Prediction, affine
from score_sde.sde import VPSDE, KarrasSDE, SubVPSDE

F64 = torch.float64


def prediction_at(sde, parameterization, t, x0, eps, dtype=F64):
    """What a perfect network says at x_t = alpha x_0 + sigma eps for a point mass at x_0."""
    x = sde.perturb(x0, t, eps).to(dtype)
    raw = parameterization.target(sde, t, x0, eps).to(dtype)
    row = parameterization.row(sde, t)
    return Prediction(x, raw, float(sde.alpha(t)), float(sde.sigma(t)), float(row.c_skip), float(row.c_out))


def pair():
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(5, 3, generator=generator, dtype=F64) for _ in range(2))


def test_the_views_are_the_definitions():
    x, raw = pair()
    p = Prediction(x, raw, alpha=0.8, sigma=0.3, c_skip=0.7, c_out=-0.4)
    D = 0.7 * x - 0.4 * raw
    torch.testing.assert_close(p.denoised, D)
    torch.testing.assert_close(p.noise, (x - 0.8 * D) / 0.3)
    torch.testing.assert_close(p.score, (0.8 * D - x) / 0.3**2)
    torch.testing.assert_close(p.velocity, 0.8 * (x - 0.8 * D) / 0.3 - 0.3 * D)


def test_views_of_a_perfect_network_for_every_sde_and_parameterization(sde, parameterization):
    x0, eps = pair()
    for share in (0.05, 0.5, 0.95):
        low, high = float(sde.half_log_snr(sde.t_max)), float(sde.half_log_snr(sde.t_min))
        t = float(sde.time_at(low + share * (high - low)))
        alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
        p = prediction_at(sde, parameterization, t, x0, eps)
        torch.testing.assert_close(p.denoised, x0, rtol=0, atol=1e-11 * (1 + sigma / alpha))
        torch.testing.assert_close(p.noise, eps, rtol=0, atol=1e-11 * (1 + alpha / sigma))
        torch.testing.assert_close(p.score, -eps / sigma, rtol=0, atol=1e-11 * (1 + alpha / sigma) / sigma)
        velocity = alpha * eps - sigma * x0
        torch.testing.assert_close(p.velocity, velocity, rtol=0, atol=1e-10 * (1 + alpha / sigma) * (1 + sigma))


@pytest.mark.parametrize("native", [Score(), Noise(), Velocity(), Karras(0.5)], ids=repr)
@pytest.mark.parametrize(("sde", "t"), [(KarrasSDE(), 0.002), (VPSDE(), 1e-5), (SubVPSDE(), 1e-3)], ids=repr)
def test_no_view_loses_float32_digits_at_small_noise(native, sde, t):
    """The noise recovered from float32 (x, F) is good to single precision; (x - alpha D) / sigma would lose it."""
    x0, eps = pair()
    p = prediction_at(sde, native, t, x0, eps, torch.float32)
    torch.testing.assert_close(p.noise.double(), eps, rtol=0, atol=2e-6)
    torch.testing.assert_close(p.score.double() * float(sde.sigma(t)), -eps, rtol=0, atol=2e-6)
    torch.testing.assert_close(p.denoised.double(), x0, rtol=0, atol=1e-6)
    naive = (p.x - p.alpha * p.denoised) / p.sigma
    assert (naive.double() - eps).abs().max() > 2e-5, "the round trip through D is exact here: the test proves nothing"


def test_batched_coefficients_equal_scalar_ones(sde, parameterization):
    x0, eps = pair()
    low, high = float(sde.half_log_snr(sde.t_max)), float(sde.half_log_snr(sde.t_min))
    t = sde.time_at(torch.linspace(low, high, 7, dtype=F64)[1:-1])
    x, raw = sde.perturb(x0, t, eps), parameterization.target(sde, t, x0, eps)
    row = parameterization.row(sde, t)
    batched = Prediction(x, raw, sde.alpha(t), sde.sigma(t), row.c_skip, row.c_out)
    for i in range(5):
        one = prediction_at(sde, parameterization, float(t[i]), x0[i : i + 1], eps[i : i + 1])
        for view in ("denoised", "noise", "score", "velocity"):
            expected = getattr(one, view)
            scale = float(expected.abs().max())
            torch.testing.assert_close(getattr(batched, view)[i : i + 1], expected, rtol=1e-9, atol=1e-9 * scale)


def test_affine_takes_floats_and_tensors_and_leaves_its_inputs_alone():
    x, y = pair()
    x_before, y_before = x.clone(), y.clone()
    p, q = torch.arange(5, dtype=F64) + 1, torch.arange(5, dtype=F64) - 2
    for a in (0.0, 1.5, p):
        for b in (1.0, -0.5, q):
            whole = (a if isinstance(a, float) else a[:, None]) * x + (b if isinstance(b, float) else b[:, None]) * y
            torch.testing.assert_close(affine(a, x, b, y), whole)
    assert torch.equal(x, x_before)
    assert torch.equal(y, y_before)


def test_views_are_differentiable_in_x_and_raw():
    x, raw = (v.requires_grad_() for v in pair())
    p = Prediction(x, raw, alpha=0.8, sigma=0.3, c_skip=0.7, c_out=-0.4)
    of_x, of_raw = torch.autograd.grad(p.score.sum(), (x, raw))
    torch.testing.assert_close(of_x, torch.full_like(x, (0.8 * 0.7 - 1) / 0.09))
    torch.testing.assert_close(of_raw, torch.full_like(x, 0.8 * -0.4 / 0.09))


@pytest.mark.parametrize("batched", [False, True])
def test_a_score_a_noise_estimate_or_a_velocity_is_a_prediction(batched):
    x, known = pair()
    alpha, sigma = (torch.linspace(low, 0.9, 5, dtype=F64) if batched else 0.6 for low in (0.2, 0.1))
    column = (lambda v: v[:, None]) if batched else (lambda v: v)
    velocity = column(alpha) * known - column(sigma) * (x - column(sigma) * known) / column(alpha)
    for made, noise in (
        (Prediction.from_velocity(x, velocity, alpha, sigma), known),
        (Prediction.from_noise(x, known, alpha, sigma), known),
        (Prediction.from_score(x, known, alpha, sigma), -column(sigma) * known),
    ):
        torch.testing.assert_close(made.noise, noise)
        torch.testing.assert_close(made.score, -noise / column(sigma))
        torch.testing.assert_close(made.denoised, (x - column(sigma) * noise) / column(alpha))

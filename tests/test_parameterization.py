"""Table rows and regression targets against the published ones and against each other, for every SDE."""

from __future__ import annotations

import math

import pytest
import torch

from score_sde.build import build
from score_sde.parameterization import Denoised, Flow, Karras, Noise, Published, PublishedNoise, Score, Velocity
from score_sde.sde import SDE, VESDE, VPSDE, DiscreteSDE, KarrasSDE, RectifiedFlow
from score_sde.targets import GaussianMixture

F64 = torch.float64


def times(sde: SDE, count: int = 5) -> torch.Tensor:
    low, high = float(sde.half_log_snr(sde.t_max)), float(sde.half_log_snr(sde.t_min))
    t = sde.time_at(torch.linspace(low, high, count + 2, dtype=F64)[1:-1])
    return t.floor() + 0.5 if isinstance(sde, DiscreteSDE) else t


def data(count: int = 5):
    generator = torch.Generator().manual_seed(2)
    return (torch.randn(count, 3, generator=generator, dtype=F64) for _ in range(2))


@pytest.mark.parametrize(
    ("sigma", "c_skip", "c_out", "c_in", "c_noise"),
    [
        (0.5, 0.5, 0.3535534, 1.4142136, -0.1732868),
        (80.0, 3.906097e-5, 0.4999902, 0.0124998, 1.0955067),
        (0.002, 0.9999840, 0.0019999840, 1.9999840, -1.5536520),
    ],
)
def test_edm_rows(sigma, c_skip, c_out, c_in, c_noise):
    row = Karras(0.5).row(KarrasSDE(), sigma)
    assert [float(v) for v in row] == pytest.approx([c_in, c_skip, c_out, c_noise], rel=4e-6)
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    assert weight * float(row.c_out) ** 2 == pytest.approx(1, rel=1e-12)


def test_karras_rows_depend_on_the_noise_level_alone():
    """On VP at the time of EDM's sigma the row is EDM's for x / alpha."""
    vp, edm = VPSDE(), KarrasSDE()
    sigma = torch.tensor([0.02, 0.5, 80.0], dtype=F64)
    t = vp.time_at(-sigma.log())
    row, expected = Karras(0.5).row(vp, t), Karras(0.5).row(edm, sigma)
    alpha = vp.alpha(t)
    torch.testing.assert_close(row.c_in * alpha, expected.c_in)
    torch.testing.assert_close(row.c_skip * alpha, expected.c_skip)
    torch.testing.assert_close(row.c_out, expected.c_out)
    torch.testing.assert_close(row.c_noise, expected.c_noise)


def test_published_targets():
    """Targets in the papers' own words: eps, x_0, -eps / sigma, alpha eps - sigma x_0, eps - x_0."""
    x0, eps = data()
    vp, flow = VPSDE(), RectifiedFlow()
    t = times(vp)
    alpha, sigma = vp.alpha(t)[:, None], vp.sigma(t)[:, None]
    torch.testing.assert_close(Noise().target(vp, t, x0, eps), eps, rtol=0, atol=1e-12)
    torch.testing.assert_close(Denoised().target(vp, t, x0, eps), x0)
    torch.testing.assert_close(Score().target(vp, t, x0, eps), -eps / sigma, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(Velocity().target(vp, t, x0, eps), alpha * eps - sigma * x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(Flow().target(flow, times(flow), x0, eps), eps - x0, rtol=0, atol=1e-10)


def test_flow_target_is_the_time_derivative_of_the_path(sde):
    x0, eps = data()
    t = times(sde)
    h = 1e-6 * float(sde.t_max - sde.t_min)
    h = torch.minimum(torch.full_like(t, h), 0.1 * (t - sde.t_min))
    rate = (sde.perturb(x0, t + h, eps) - sde.perturb(x0, t - h, eps)) / (2 * h)[:, None]
    scale = float(rate.abs().max())
    torch.testing.assert_close(Flow().target(sde, t, x0, eps), rate, rtol=1e-5, atol=1e-8 * scale + 1e-9)


def test_the_target_inverts_the_row(sde, parameterization):
    """c_skip x_t + c_out F* = x_0, and F* is the closed expression (x_0 - c_skip x_t) / c_out."""
    x0, eps = data()
    t = times(sde)
    row = parameterization.row(sde, t)
    x = sde.perturb(x0, t, eps)
    target = parameterization.target(sde, t, x0, eps)
    skip, out = row.c_skip[:, None], row.c_out[:, None]
    size = float((skip * x).abs().max() + (out * target).abs().max())
    torch.testing.assert_close(skip * x + out * target, x0, rtol=0, atol=1e-13 * size)
    direct = (x0 - skip * x) / out
    torch.testing.assert_close(target, direct, rtol=1e-9, atol=1e-12 * float((size / out).abs().max()))


def test_a_perfect_network_gives_the_exact_denoiser(sde, parameterization):
    """F = E[F* | x_t] is what regression finds; for Gaussian data it makes D the posterior mean."""
    mean, variance = torch.tensor([[0.5, -1.0, 2.0]], dtype=F64), 0.49
    target = GaussianMixture([1.0], mean, variance * torch.eye(3, dtype=F64)[None])
    x, _ = data()
    t = times(sde)
    row = parameterization.row(sde, t)
    alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
    x = alpha * mean + (alpha**2 * variance + sigma**2).sqrt() * x
    posterior = target.denoise(x, sde.alpha(t), sde.sigma(t))
    noise = (x - alpha * posterior) / sigma
    F = parameterization.target(sde, t, posterior, noise)  # the target is linear in (x_0, eps): its mean is there
    D = row.c_skip[:, None] * x + row.c_out[:, None] * F
    torch.testing.assert_close(
        D, posterior, rtol=1e-9, atol=1e-12 * float((row.c_skip[:, None] * x).abs().max()) + 1e-12
    )


def test_network_inputs_have_unit_variance(sde, parameterization):
    if isinstance(parameterization, Published):
        pytest.skip("a published network sees x as it is, and is told what its authors told it")
    t = times(sde)
    row = parameterization.row(sde, t)
    variance = row.c_in**2 * (sde.alpha(t) ** 2 * parameterization.sigma_data**2 + sde.sigma(t) ** 2)
    torch.testing.assert_close(variance, torch.ones_like(t))
    torch.testing.assert_close((4 * row.c_noise).exp(), sde.sigma(t) / sde.alpha(t))


def test_published_networks_are_told_what_their_authors_told_them():
    # Karras et al. 2022, table 1: VP networks 999 t; VE networks ln(sigma / 2) for sigma of data in [-1, 1].
    t = torch.tensor([0.1, 0.7], dtype=F64)
    row = PublishedNoise().row(VPSDE(), t)
    torch.testing.assert_close(row.c_noise, 999 * t)
    sde = VESDE(0.02, 100.0)
    row = PublishedNoise("log_sigma", scale=1, shift=-math.log(2), sign=-1).row(sde, t)
    torch.testing.assert_close(row.c_noise, (sde.sigma(t) / 2).log())
    torch.testing.assert_close(row.c_out, sde.sigma(t))  # D = x + sigma F, for F = sigma score
    assert (row.c_in == 1).all()
    with pytest.raises(ValueError, match="level is 'time' or 'log_sigma'"):
        PublishedNoise("sigma")


@pytest.mark.parametrize("sign", [1, -1])
def test_published_predictions_are_what_their_papers_call_them(sign):
    x0, eps = data()
    ladder, flow = DiscreteSDE.ddpm(), RectifiedFlow()
    t = torch.tensor([3, 200, 500, 700, 950], dtype=F64)
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64)).cumprod(0)[t.long(), None]
    straight = t[:, None] / 1000
    for sde, level, says, x in (
        (ladder, t, {"noise": eps, "denoised": x0, "velocity": alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0},
         alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps),
        (flow, t / 1000, {"flow": eps - x0}, (1 - straight) * x0 + straight * eps),
    ):  # fmt: skip
        for prediction, output in says.items():
            p = Published(scale=1000 / sde.t_max, sign=sign, prediction=prediction)
            row = p.row(sde, level)
            D = row.c_skip[:, None] * x + row.c_out[:, None] * sign * output
            torch.testing.assert_close(D, x0, rtol=0, atol=1e-9, msg=prediction)
            torch.testing.assert_close(p.target(sde, level, x0, eps), sign * output, rtol=0, atol=1e-9)
            torch.testing.assert_close(row.c_noise, level * 1000 / sde.t_max)
            assert (row.c_in == 1).all()
            assert f"prediction={prediction!r}" in repr(p)
    with pytest.raises(ValueError, match="prediction is one of noise, velocity, denoised, flow; got 'epsilon'"):
        Published(prediction="epsilon")


def test_saved_runs_name_the_published_noise():
    config = {"_target_": "score_sde.parameterization.PublishedNoise", "level": "log_sigma", "scale": 1, "sign": -1}
    sde, t = VESDE(), torch.tensor([0.1, 0.7], dtype=F64)
    row = build(config).row(sde, t)
    torch.testing.assert_close(row.c_out, sde.sigma(t))
    torch.testing.assert_close(row.c_noise, sde.sigma(t).log())


def test_karras_targets_have_unit_variance():
    """Var F* = 1 for data of variance sigma_data^2, whatever the SDE (EDM, appendix B.6)."""
    for sde in (VPSDE(), VESDE(), KarrasSDE(), RectifiedFlow()):
        t = times(sde)
        p = Karras(0.7)
        one, none = torch.ones(len(t), 1, dtype=F64), torch.zeros(len(t), 1, dtype=F64)
        of_data, of_noise = p.target(sde, t, one, none), p.target(sde, t, none, one)
        torch.testing.assert_close(0.49 * of_data**2 + of_noise**2, one, rtol=1e-9, atol=0)


def test_rows_are_float64_of_the_times_shape(sde, parameterization):
    t = times(sde)
    for given, shape in ((float(t[2]), ()), (t[2], ()), (t, (5,)), (t.float(), (5,))):
        row = parameterization.row(sde, given)
        assert all(v.dtype == F64 and v.shape == shape for v in row)
    for batched, scalar in zip(parameterization.row(sde, t), parameterization.row(sde, float(t[2])), strict=True):
        torch.testing.assert_close(batched[2], scalar, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("sigma_data", [0.0, -1.0, float("nan")])
def test_a_data_scale_that_is_no_scale_is_refused(sigma_data):
    with pytest.raises(ValueError, match="sigma_data"):
        Karras(sigma_data)

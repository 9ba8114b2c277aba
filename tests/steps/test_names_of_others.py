"""The table of names in docs/choosing_a_sampler.md: k-diffusion's and ComfyUI's loops, written out on sigma = t.

Each takes (denoise, x, sigmas, noise), noise(i, k) the k-th draw of move i, and stops before sigma = 0.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from closed_forms import plane
from omegaconf import OmegaConf

from score_sde import ExactScore, KarrasSDE, Sampler, grid
from score_sde.build import build
from score_sde.noise import SampleNoise

CONF = Path(__file__).parents[2] / "conf/sampler/predictor"
SDE = KarrasSDE()
MODEL = ExactScore(plane(), SDE)
GRID = partial(grid.karras, steps=7)
X = 80 * torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def phi_1(z):
    return torch.expm1(z) / z


def phi_2(z):
    return (phi_1(z) - 1) / z


def slope(x, sigma, clean):
    return (x - clean) / sigma


def euler(denoise, x, sigmas, noise):
    for sigma, to in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = x + slope(x, sigma, denoise(x, sigma)) * (to - sigma)
    return x


def lcm(denoise, x, sigmas, noise):
    for i, (sigma, to) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        x = denoise(x, sigma) + to * noise(i, 0)
    return x


def dpm_2(denoise, x, sigmas, noise):
    for sigma, to in zip(sigmas[:-1], sigmas[1:], strict=True):
        middle = (sigma * to).sqrt()
        u = x + slope(x, sigma, denoise(x, sigma)) * (middle - sigma)
        x = x + slope(u, middle, denoise(u, middle)) * (to - sigma)
    return x


def gradient_estimation(denoise, x, sigmas, noise):
    before = None
    for sigma, to in zip(sigmas[:-1], sigmas[1:], strict=True):
        d = slope(x, sigma, denoise(x, sigma))
        x = x + (d if before is None else 2 * d - before) * (to - sigma)
        before = d
    return x


def res_multistep(denoise, x, sigmas, noise):
    lam, before = -sigmas.log(), None
    for i in range(len(sigmas) - 1):
        clean, h = denoise(x, sigmas[i]), lam[i + 1] - lam[i]
        if before is None:
            x = x + slope(x, sigmas[i], clean) * (sigmas[i + 1] - sigmas[i])
        else:
            c2 = (lam[i - 1] - lam[i]) / h
            b2 = phi_2(-h) / c2
            x = (-h).exp() * x + h * ((phi_1(-h) - b2) * clean + b2 * before)
        before = clean
    return x


def dpmpp_2m_sde(denoise, x, sigmas, noise, solver_type, eta):
    lam, before = -sigmas.log(), None
    for i in range(len(sigmas) - 1):
        clean, h = denoise(x, sigmas[i]), lam[i + 1] - lam[i]
        h_eta = h * (eta + 1)
        x = sigmas[i + 1] / sigmas[i] * (-h * eta).exp() * x - torch.expm1(-h_eta) * clean
        if before is not None:
            r = (lam[i] - lam[i - 1]) / h
            curve = 1 - phi_1(-h_eta) if solver_type == "heun" else -0.5 * torch.expm1(-h_eta)
            x = x + curve / r * (clean - before)
        x = x + sigmas[i + 1] * (-torch.expm1(-2 * h * eta)).sqrt() * noise(i, 0)
        before = clean
    return x


def seeds_2(denoise, x, sigmas, noise, eta=1.0, r=0.5, solver_type="phi_1"):
    for i, (sigma, to) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        h = (sigma / to).log()
        k, middle = (1 + eta) * h, sigma * (-r * h).exp()
        D = denoise(x, sigma)
        z = (-torch.expm1(-2 * r * h * eta)).sqrt() * noise(i, 0)
        u = middle / sigma * (-r * h * eta).exp() * x - torch.expm1(-r * k) * D + middle * z
        D_u, total = denoise(u, middle), k * phi_1(-k)
        b = total / (2 * r) if solver_type == "phi_1" else k * phi_2(-k) / r
        z = z * (-(1 - r) * h * eta).exp()
        z = z + (-torch.expm1(-2 * (1 - r) * h * eta)).sqrt() * noise(i, 1)
        x = to / sigma * (-h * eta).exp() * x + (total - b) * D + b * D_u + to * z
    return x


def seeds_3(denoise, x, sigmas, noise, eta=1.0):
    for i, (sigma, to) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        h = (sigma / to).log()
        k, first, second = (1 + eta) * h, sigma * (-h / 3).exp(), sigma * (-2 * h / 3).exp()
        third, carry = (-torch.expm1(-2 * h * eta / 3)).sqrt(), (-h * eta / 3).exp()
        D = denoise(x, sigma)
        z = third * noise(i, 0)
        u = (-(1 + eta) * h / 3).exp() * x + k / 3 * phi_1(-k / 3) * D + first * z
        D_1, z = denoise(u, first), carry * z + third * noise(i, 1)
        a = 2 * 2 * k / 3 * phi_2(-2 * k / 3)
        u = (-2 * k / 3).exp() * x + (2 * k / 3 * phi_1(-2 * k / 3) - a) * D + a * D_1 + second * z
        D_2, z = denoise(u, second), carry * z + third * noise(i, 2)
        b = k * phi_2(-k) / (2 / 3)
        x = (-k).exp() * x + (k * phi_1(-k) - b) * D + b * D_2 + to * z
    return x


def published_seeds(denoise, x, sigmas, noise, order):
    """Gonzalez et al. 2023, of the noise; the increments of a path have the variances sigma^2 - sigma'^2."""
    for i, (sigma, to) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        h = (sigma / to).log()
        times = [sigma * (-h * v).exp() for v in ((0.5, 1) if order == 2 else (1 / 3, 2 / 3, 1))]
        eps = [slope(x, sigma, denoise(x, sigma))]
        steps = [(start**2 - end**2).sqrt() for start, end in zip([sigma, *times[:-1]], times, strict=True)]
        path = [sum(s * noise(i, k) for k, s in enumerate(steps[: j + 1])) for j in range(order)]
        if order == 2:
            u = x - 2 * times[0] * torch.expm1(h / 2) * eps[0] + path[0]
            x = x - 2 * to * torch.expm1(h) * slope(u, times[0], denoise(u, times[0])) + path[1]
            continue
        u = x - 2 * times[0] * torch.expm1(h / 3) * eps[0] + path[0]
        change = slope(u, times[0], denoise(u, times[0])) - eps[0]
        bend = 2 * (phi_1(2 * h / 3) - 1)
        u = x - 2 * times[1] * (torch.expm1(2 * h / 3) * eps[0] + bend * change) + path[1]
        change = slope(u, times[1], denoise(u, times[1])) - eps[0]
        x = x - 2 * to * (torch.expm1(h) * eps[0] + 1.5 * (phi_1(h) - 1) * change) + path[2]
    return x


@pytest.mark.parametrize(
    ("published", "name", "options"),
    [
        (euler, "ddim", {}),
        (lcm, "exponential_adams", {"order": 1, "eta": 100}),
        (dpm_2, "dpm_solver_singlestep", {"prediction": "noise"}),
        (gradient_estimation, "gradient_estimation", {}),
        (res_multistep, "exponential_adams", {"order": 2}),
        (partial(dpmpp_2m_sde, solver_type="midpoint", eta=1.0), "exponential_adams",
         {"order": 2, "eta": 1, "weights": "midpoint"}),
        (partial(dpmpp_2m_sde, solver_type="heun", eta=0.64), "exponential_adams", {"order": 2, "eta": 0.8}),
        (partial(seeds_2, eta=0.0, solver_type="phi_2"), "dpm_solver_singlestep", {"weights": "exact"}),
        (partial(seeds_2, eta=0.0, r=1.0, solver_type="phi_2"), "dpm_solver_sde", {"eta": 0, "r": 1, "weights": "exact"}),
        (partial(seeds_2, r=1.0, solver_type="phi_2"), "dpm_solver_sde", {"r": 1, "weights": "exact"}),
        (seeds_2, "dpm_solver_sde", {}),
        (partial(seeds_2, eta=0.36, r=0.3), "dpm_solver_sde", {"eta": 0.6, "r": 0.3}),
        (seeds_3, "dpm_solver_sde", {"order": 3}),
        (partial(seeds_3, eta=0.36), "dpm_solver_sde", {"order": 3, "eta": 0.6}),
        (partial(published_seeds, order=2), "dpm_solver_sde", {"prediction": "noise"}),
        (partial(published_seeds, order=3), "dpm_solver_sde", {"prediction": "noise", "order": 3}),
    ],
    ids=["euler", "lcm", "dpm_2", "gradient_estimation", "res_multistep", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "res_2s",
         "exp_heun_2_x0", "exp_heun_2_x0_sde", "seeds_2", "seeds_2 eta r", "seeds_3", "seeds_3 eta", "SEEDS-2", "SEEDS-3"],
)  # fmt: skip
def test_the_option_is_the_published_loop(published, name, options):
    step = build(OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), options))
    run = Sampler(step, GRID, final="none").sample(MODEL, (5, 2), x_init=X, noise=SampleNoise(range(5)))
    stream = SampleNoise(range(5)).open((5, 2), torch.float64, "cpu")
    expected = published(
        lambda x, sigma: MODEL(x, sigma.item()).denoised, X, GRID(SDE), lambda i, k: stream(2 * i + 1, k)
    )
    torch.testing.assert_close(run.x, expected, rtol=1e-8, atol=1e-8)


def dpm_fast(denoise, x, sigma_max, sigma_min, n):
    m = n // 3 + 1
    orders = [3] * (m - 2) + [2, 1] if n % 3 == 0 else [3] * (m - 1) + [n % 3]
    sigmas = torch.linspace(math.log(sigma_max), math.log(sigma_min), m + 1, dtype=x.dtype).exp()
    for sigma, to, order in zip(sigmas[:-1], sigmas[1:], orders, strict=True):
        h, eps = (sigma / to).log(), slope(x, sigma, denoise(x, sigma))
        end = x - to * h.expm1() * eps
        if order == 2:
            middle = sigma * (-h / 2).exp()
            u = x - middle * (h / 2).expm1() * eps
            end = end - to * h.expm1() * (slope(u, middle, denoise(u, middle)) - eps)
        if order == 3:
            first, second = sigma * (-h / 3).exp(), sigma * (-2 * h / 3).exp()
            u = x - first * (h / 3).expm1() * eps
            change = slope(u, first, denoise(u, first)) - eps
            u = x - second * ((2 * h / 3).expm1() * eps + 2 * ((2 * h / 3).expm1() / (2 * h / 3) - 1) * change)
            end = end - to * 1.5 * (h.expm1() / h - 1) * (slope(u, second, denoise(u, second)) - eps)
        x = end
    return x


@pytest.mark.parametrize(("n", "last"), [(3, [2, 1]), (9, [2, 1]), (10, [1]), (11, [2])])
def test_dpm_fast_ends_with_moves_of_lower_order(n, last):
    options = OmegaConf.load(CONF / "dpm_solver_singlestep.yaml")
    step = build(OmegaConf.merge(options, {"order": 3, "prediction": "noise", "last": last}))
    run = Sampler(step, partial(grid.log_snr, steps=n // 3 + 1), final="none").sample(MODEL, (5, 2), x_init=X)
    expected = dpm_fast(lambda x, sigma: MODEL(x, sigma.item()).denoised, X, SDE.sigma_max, SDE.sigma_min, n)
    torch.testing.assert_close(run.x, expected, rtol=1e-8, atol=1e-8)
    assert run.nfe == n

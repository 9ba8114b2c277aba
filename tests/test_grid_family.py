"""The further grids against their papers' formulas, grids that go up, and where correctors act."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from closed_forms import affine_run, log_snr_between, propagate
from closed_forms import moments as gaussian_moments
from scipy import stats

from score_sde import (
    DDIM,
    VESDE,
    VPSDE,
    DiscreteSDE,
    ExactScore,
    GaussianMixture,
    Heun,
    KarrasSDE,
    RectifiedFlow,
    Sampler,
    grid,
)
from score_sde.evaluation.exact_laws import moments
from score_sde.noise import NoiseSource

FAMILY = [
    grid.exponential, partial(grid.poly_exponential, rho=2.0), grid.cosine, grid.hyperbolic, grid.beta,
    grid.iddpm,
    partial(grid.tabulated, levels="stable_diffusion_xl"),
]  # fmt: skip


def levels(sde, times):
    return (sde.sigma(times) / sde.alpha(times)).numpy()


@pytest.mark.parametrize("steps", [1, 2, 9, 40])
def test_every_grid_runs_from_the_noisiest_time_to_the_cleanest(sde, steps):
    for f in FAMILY:
        times = grid.check(f(sde, steps=steps), sde)
        assert times.shape == (steps + 1,)
        assert (times[0].item(), times[-1].item()) == (sde.t_max, sde.t_min)
        assert (times.diff() < 0).all(), f


def test_poly_exponential_is_k_diffusions():
    # sigmas = exp(linspace(1, 0, n)^rho (ln max - ln min) + ln min)
    ramp = np.linspace(1, 0, 9) ** 1.7
    expected = np.exp(ramp * (np.log(80) - np.log(0.002)) + np.log(0.002))
    np.testing.assert_allclose(grid.poly_exponential(KarrasSDE(), 8, 1.7).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("sde", [VPSDE(), VESDE(0.01, 6.7), KarrasSDE()], ids=lambda sde: type(sde).__name__)
def test_hyperbolic_is_uniform_in_the_arcsinh_of_the_log_snr(sde):
    lmbda = sde.half_log_snr(grid.hyperbolic(sde, 8, width=0.7)).numpy()
    steps = np.diff(np.arcsinh(lmbda / 0.7))
    np.testing.assert_allclose(steps, steps.mean(), rtol=1e-6)


def test_cosine_is_uniform_in_the_angle():
    sde = VPSDE()
    angle = np.arctan(levels(sde, grid.cosine(sde, 7)))
    np.testing.assert_allclose(np.diff(angle), (angle[-1] - angle[0]) / 7, rtol=1e-9)


def test_beta_takes_the_quantiles_of_a_beta_law():
    sde = VPSDE()
    expected = sde.t_min + stats.beta(0.6, 0.6).ppf(1 - np.arange(11) / 10) * (1 - sde.t_min)
    np.testing.assert_allclose(grid.beta(sde, 10).numpy(), expected, rtol=1e-10)
    skewed = grid.beta(sde, 10, a=0.5, b=1.0).numpy()
    np.testing.assert_allclose(
        skewed, sde.t_min + stats.beta(0.5, 1.0).ppf(1 - np.arange(11) / 10) * (1 - sde.t_min), rtol=1e-10
    )


def test_iddpm_takes_the_levels_of_edms_recursion():
    M, C_1, C_2 = 1000, 0.001, 0.008

    def abar(j):
        return np.sin(np.pi / 2 * j / (M * (C_2 + 1))) ** 2

    u = np.zeros(M + 1)
    for j in range(M, 0, -1):
        u[j - 1] = np.sqrt((u[j] ** 2 + 1) / max(abar(j - 1) / abar(j), C_1) - 1)
    # 998 - 8 = 990 index steps between two of the levels, in 10 moves: every 99th level itself.
    sde = KarrasSDE(sigma_min=u[998], sigma_max=u[8])
    np.testing.assert_allclose(grid.iddpm(sde, 10).numpy(), u[8:999:99], rtol=1e-9)


def test_tabulated_levels_are_met_and_interpolated_log_linearly():
    listed = grid.ALIGN_YOUR_STEPS["stable_video_diffusion"]
    sde = KarrasSDE(sigma_min=0.002, sigma_max=700.0)
    np.testing.assert_allclose(levels(sde, grid.tabulated(sde, 10, "stable_video_diffusion")), listed, rtol=1e-10)
    halved = levels(sde, grid.tabulated(sde, 20, "stable_video_diffusion"))
    np.testing.assert_allclose(halved[1::2], np.sqrt(np.array(listed[1:]) * np.array(listed[:-1])), rtol=1e-10)
    kept = grid.tabulated(sde, 2, [100.0, 1.0, 0.1], stretch=False)
    np.testing.assert_allclose(levels(sde, kept), [100.0, 1.0, 0.1], rtol=1e-10)
    stretched = levels(VPSDE(), grid.tabulated(VPSDE(), 10, "stable_video_diffusion"))
    place = (np.log(listed) - np.log(listed[-1])) / np.log(listed[0] / listed[-1])
    np.testing.assert_allclose(
        np.log(stretched / stretched[-1]) / np.log(stretched[0] / stretched[-1]), place, atol=1e-8
    )


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ("leading", np.arange(9, -1, -1) * 100.0),
        ("trailing", 999 - np.arange(10) * 100.0),
        ("linspace", np.linspace(999, 0, 10)),
    ],
)
def test_respaced_sub_ladders(spacing, expected):
    np.testing.assert_allclose(grid.respaced(DiscreteSDE.ddpm(), 9, spacing).numpy(), expected, rtol=1e-12)


def test_respaced_indices_are_not_rounded():
    assert grid.respaced(DiscreteSDE.ddpm(), 6)[1].item() == pytest.approx(999 - 1000 / 7)


# --- grids that go up -------------------------------------------------------------------------------------------------


def test_churn_raises_edms_levels_by_gamma():
    base = partial(grid.karras, steps=17)
    sigma = base(KarrasSDE()).tolist()
    times = grid.churn(KarrasSDE(), base, S_churn=5.0, S_min=0.05, S_max=50.0).tolist()
    gamma = min(5 / 18, 2**0.5 - 1)
    expected = []
    for i, level in enumerate(sigma):
        expected += [level] if i == 17 or not 0.05 <= level <= 50 else [level, level * (1 + gamma)]
    assert times == pytest.approx(expected, rel=1e-9)
    capped = grid.churn(KarrasSDE(), base, S_churn=1e9, S_min=0.0, S_max=float("inf"))
    assert capped[0] == 80
    assert capped[1] < 80  # no level above the noisiest
    assert capped[2] == 80  # 57.6 sqrt(2) would exceed it
    assert capped[4].item() == pytest.approx(capped[3].item() * 2**0.5)


class Same(NoiseSource):
    """The same draw, whatever the move."""

    def open(self, shape, dtype, device):
        z = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=dtype)
        return lambda step, draw: z


@pytest.mark.parametrize("S_noise", [1.0, 1.007])
def test_heun_on_a_churned_grid_is_edms_algorithm_2(S_noise):
    S_churn, S_min, S_max, N = 30.0, 0.05, 50.0, 18
    sde = KarrasSDE()
    model = ExactScore(GaussianMixture([0.5, 0.5], [[-1.0], [0.6]], [[[0.09]], [[0.04]]]), sde)
    start = 80 * torch.randn(5, 1, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    base = partial(grid.karras, steps=N - 1)
    sampler = Sampler(Heun(), partial(grid.churn, base=base, S_churn=S_churn), S_noise=S_noise)
    ours = sampler.sample(model, start.shape, x_init=start, noise=Same())

    z, x = Same().open(start.shape, torch.float64, "cpu")(0, 0), start
    levels = [*base(sde).tolist(), 0.0]
    for level, end in pairwise(levels):
        gamma = min(S_churn / N, 2**0.5 - 1) if S_min <= level <= S_max else 0.0
        raised = level + gamma * level
        x = x + (raised**2 - level**2) ** 0.5 * S_noise * z
        slope = (x - model(x, raised).denoised) / raised
        trial = x + (end - raised) * slope
        if end > 0:
            slope = (slope + (trial - model(trial, end).denoised) / end) / 2
        x = x + (end - raised) * slope
    torch.testing.assert_close(ours.x, x, rtol=1e-9, atol=1e-9)
    assert ours.nfe == 2 * N - 1


def test_without_noise_the_grid_is_its_base():
    base = partial(grid.karras, steps=5)
    assert torch.equal(grid.ancestral(KarrasSDE(), base, eta=0.0), base(KarrasSDE()))
    assert torch.equal(grid.churn(KarrasSDE(), base, S_churn=0.0), base(KarrasSDE()))


def test_restart_goes_up_and_comes_down_again():
    base = partial(grid.karras, steps=9)
    main = base(KarrasSDE())
    times = grid.restart(KarrasSDE(), base, [(0.11, 0.5, 3, 2), (1.5, 4.0, 1, 1)])
    up = times.diff() > 0
    assert int(up.sum()) == 3
    assert len(times) == 10 + 2 * (1 + 3) + (1 + 1)  # a jump's top and its steps
    assert times[1:][up].tolist() == pytest.approx([4.0, 0.5, 0.5])
    assert set(main.tolist()) <= set(times.tolist())
    jump = times.tolist().index(0.5) if 0.5 in times.tolist() else int((times - 0.5).abs().argmin())
    low = main[(main - 0.11).abs().argmin()].item()
    rho = np.linspace(0.5 ** (1 / 7), low ** (1 / 7), 4) ** 7
    assert times[jump : jump + 4].tolist() == pytest.approx(rho.tolist(), rel=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ancestral_goes_down_and_up_as_k_diffusion_does(eta):
    base = partial(grid.karras, steps=6)
    sigmas = base(KarrasSDE()).tolist()
    expected = sigmas[:1]
    for start, end in pairwise(sigmas[:-1]):
        up = min(end, eta * (end**2 * (start**2 - end**2) / start**2) ** 0.5)
        expected += [(end**2 - up**2) ** 0.5, end] if eta else [end]
    times = grid.ancestral(KarrasSDE(), base, eta).tolist()
    expected = [max(level, sigmas[-1]) for level in expected]  # the last move but one would go below the end
    assert times == pytest.approx([*expected, sigmas[-1]], rel=1e-9)


@pytest.mark.parametrize("sde", [VPSDE(), VESDE(), RectifiedFlow()], ids=repr)
def test_ddim_on_an_ancestral_grid_is_ddim_with_noise(sde):
    base = log_snr_between(-2.0, 1.0, 8)
    split = Sampler(DDIM(), partial(grid.ancestral, base=base, eta=0.8), final="none")
    start = gaussian_moments(sde, float(base(sde)[0]), 0.3, 0.5)
    whole = propagate(affine_run(Sampler(DDIM(0.8), base, final="none"), sde, 0.3, 0.5), *start)
    parts = propagate(affine_run(split, sde, 0.3, 0.5), *start)
    for ours, theirs in zip(parts, whole, strict=True):
        np.testing.assert_allclose(ours[2:-1:2], theirs[1:-1], rtol=1e-9)  # after each move up


@pytest.mark.parametrize("sde", [VPSDE(), KarrasSDE(), RectifiedFlow(), DiscreteSDE.ddpm()], ids=repr)
def test_upward_moves_leave_the_law_as_it_is(sde):
    # Data N(0, 1) through Heun with restarts and with churn: pooled variance at the end within 4.5 standard errors and
    # the solver's own error (0.01). 20,000 samples: standard error of the std 0.5 %.
    model = ExactScore(GaussianMixture([1.0], [[0.0]], [[[1.0]]]), sde)
    base = partial(grid.log_snr, steps=60)
    for f in (
        partial(grid.churn, base=base, S_churn=6.0),
        partial(grid.restart, base=base),
        partial(grid.ancestral, base=base),
    ):
        result = Sampler(Heun(), f, final="none").sample(model, (20_000, 1), seed=0)
        t = result.times[-1]
        true = sde.alpha(t).hypot(sde.sigma(t)).item()
        assert result.x.std().item() == pytest.approx(true, rel=0.0325)
        assert result.nfe == 2 * int((result.times.diff() < 0).sum())


def test_moments_follow_the_recursion_of_the_std():
    # D = K x on centred Gaussian data, so std_s = (a + b K) std_t.
    sde, times = VPSDE(), grid.log_snr(VPSDE(), steps=12)
    mean, std = moments(DDIM(), sde, times, 0.0, torch.tensor([0.5], dtype=torch.float64))
    alpha, sigma = sde.alpha(times), sde.sigma(times)
    v = (alpha[0] ** 2 * 0.25 + sigma[0] ** 2).sqrt()
    for i in range(12):
        a = sigma[i + 1] / sigma[i]
        K = alpha[i] * 0.25 / (alpha[i] ** 2 * 0.25 + sigma[i] ** 2)
        v = v * (a + (alpha[i + 1] - a * alpha[i]) * K)
    assert std[-1, 0].item() == pytest.approx(v.item(), rel=1e-12)
    assert mean.abs().max() == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grid.poly_exponential(VPSDE(), 5, rho=0.0), "rho > 0"),
        (lambda: grid.beta(VPSDE(), 5, a=0.0), "finite a > 0, got a=0.0"),
        (lambda: grid.cosine(VPSDE(), 0), "steps >= 1"),
        (lambda: grid.tabulated(VPSDE(), 5, "sdxl"), "levels is one of stable_diffusion_1.5"),
        (lambda: grid.tabulated(VPSDE(), 5, [0.1, 1.0]), "that decrease"),
        (lambda: grid.tabulated(KarrasSDE(), 5, [100.0, 1.0], stretch=False), "stretch=True"),
        (lambda: grid.respaced(VPSDE(), 5), "takes a DiscreteSDE"),
        (lambda: grid.respaced(DiscreteSDE.ddpm(), 5, "even"), "spacing is"),
        (lambda: grid.respaced(DiscreteSDE.ddpm(10, 1e-4, 5e-3), 10), "at most steps=9"),
        (lambda: grid.churn(VPSDE(), partial(grid.uniform, steps=3), S_churn=-1), "S_churn >= 0"),
        (lambda: grid.restart(VPSDE(), partial(grid.uniform, steps=3), [(1.0, 0.5, 2, 1)]), "low < high"),
        (
            lambda: grid.restart(VPSDE(), partial(grid.uniform, steps=3), (0.1, 0.3, 3, 1)),
            r"intervals is a list .*\[\(0",
        ),
        (
            lambda: grid.restart(VPSDE(), partial(grid.uniform, steps=3), [(0.1, 0.3, 3)]),
            r"intervals is a list .*\[\(0",
        ),
        (
            lambda: grid.restart(VPSDE(), partial(grid.uniform, steps=9), [(0.1, 0.3, 3, 1.5)]),
            "whole number repeats >= 1",
        ),
        (lambda: grid.churn(VPSDE(), grid.karras), r"karras is not .*steps.* bind its other arguments"),
        (lambda: grid.churn(VPSDE(), lambda sde: torch.tensor([1.0, 0.1]), steps=5), "function of the SDE alone"),
        (lambda: grid.jump_back(VPSDE(), grid.karras), r"karras is not .*steps.* bind its other arguments"),
        (lambda: grid.below(VPSDE(), grid.karras, 0.5), r"karras is not .*steps.* bind its other arguments"),
        (lambda: grid.ancestral(VPSDE(), partial(grid.uniform, steps=3), 1.1), "eta lies in"),
        (lambda: grid.ancestral(KarrasSDE(), partial(grid.churn, base=grid.karras, steps=3)), "only goes down"),
        (lambda: grid.every(VPSDE(), torch.ones(3), 0), "period >= 1, got period=0"),
    ],
)
def test_what_makes_no_grid_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("grown", [grid.churn, grid.restart, grid.ancestral])
def test_steps_are_the_bases(grown):
    own = grown(KarrasSDE(), partial(grid.karras, steps=9, rho=5.0))
    assert torch.equal(grown(KarrasSDE(), partial(grid.karras, steps=4, rho=5.0), steps=9), own)
    assert torch.equal(grown(KarrasSDE(), partial(grid.karras, rho=5.0), steps=9), own)

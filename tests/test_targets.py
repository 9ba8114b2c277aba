"""Closed-form laws against automatic differentiation, quadrature and their own samples."""

from __future__ import annotations

import math

import pytest
import torch

from score_sde import VPSDE, DiscreteSDE, ExactScore, targets
from score_sde.targets import Empirical, GaussianMixture, UniformBoxes, from_log_density

F64 = torch.float64


def mixture() -> GaussianMixture:
    covariances = [[[1.0, 0.6], [0.6, 0.5]], [[0.04, 0.0], [0.0, 0.3]], [[0.2, -0.1], [-0.1, 0.1]]]
    return GaussianMixture([2.0, 1.0, 1.0], [[0.0, 1.0], [3.0, 0.0], [-2.0, -1.0]], covariances)


def points(seed: int = 0) -> torch.Tensor:
    return torch.randn(7, 2, dtype=F64, generator=torch.Generator().manual_seed(seed))


def boxes() -> UniformBoxes:
    return UniformBoxes([[0.0, 0.0], [2.0, -1.0]], [[1.0, 2.0], [2.5, 1.0]], [0.3, 0.7])


LAWS = {
    "mixture": mixture(),
    "flat mixture": GaussianMixture([1.0, 3.0], [[0.0, 0.0], [2.0, 1.0]], [[[1.0, 0.0], [0.0, 0.0]], [[0.0] * 2] * 2]),
    "points": Empirical(points()),
    "kernels": Empirical(points(), bandwidth=0.3),
    "weighted kernels": Empirical(points(), 0.3, [3.0, 0.0, 1.0, 1.0, 2.0, 0.5, 0.5]),
    "density": from_log_density(mixture().log_prob, (-4.0, -3.0), (4.0, 4.0), 64),
    "boxes": boxes(),
    "soft boxes": UniformBoxes([[0.0, 0.0]], [[1.0, 2.0]], bandwidth=0.4),
    **{name: targets.make(name) for name in targets.TOYS},
}
LEVELS = [(1.0, 0.1), (0.8, 0.6), (0.05, 1.0), (1.0, 20.0)]


@pytest.fixture(params=list(LAWS.values()), ids=list(LAWS))
def law(request):
    return request.param


def draw(law, count: int, seed: int = 0) -> torch.Tensor:
    return law.sample((count,), generator=torch.Generator().manual_seed(seed)).double()


def noisy(law, alpha: float, sigma: float, count: int = 6) -> torch.Tensor:
    noise = torch.randn(count, 2, dtype=F64, generator=torch.Generator().manual_seed(9))
    return alpha * draw(law, count) + sigma * noise


def two_dimensional_grid(low: float, high: float, count: int) -> tuple[torch.Tensor, float]:
    axis = torch.linspace(low, high, count, dtype=F64)
    return torch.cartesian_prod(axis, axis), float(axis[1] - axis[0]) ** 2


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_denoise_is_tweedies_formula_on_the_marginal(law, alpha, sigma):
    """E[x_0 | x] = (x + sigma^2 grad log p(x)) / alpha with p the law of alpha x_0 + sigma eps, by autograd."""
    x = noisy(law, alpha, sigma)
    by_score = (x + sigma**2 * law.marginal(alpha, sigma).score(x)) / alpha
    scale = 1e-9 * (float(x.abs().max()) + sigma**2) / alpha
    torch.testing.assert_close(law.denoise(x, alpha, sigma), by_score, rtol=1e-8, atol=scale)


@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.5), (0.5, 0.9)])
@pytest.mark.parametrize("name", ["mixture", "kernels", "soft boxes", "boxes"])
def test_denoise_and_marginal_are_the_integrals_they_stand_for(name, alpha, sigma):
    """p(x) = int p(x_0) N(x; alpha x_0, sigma^2) and E[x_0 | x], by quadrature over x_0."""
    law = LAWS[name]
    if name == "boxes":  # midpoints that never straddle an edge
        (low, high), count = (-2.0, 4.0), 600
        step = (high - low) / count
        axis = low + step * (torch.arange(count, dtype=F64) + 0.5)
        clean, cell = torch.cartesian_prod(axis, axis), step**2
    else:
        clean, cell = two_dimensional_grid(-7.0, 8.0, 501)
    log_density = law.log_prob(clean)
    assert float(log_density.exp().sum() * cell) == pytest.approx(1, abs=2e-6)
    for x in noisy(law, alpha, sigma, 4):
        log_kernel = -((x - alpha * clean) ** 2).sum(-1) / (2 * sigma**2) - math.log(2 * math.pi * sigma**2)
        joint = (log_density + log_kernel).exp() * cell
        assert float(law.marginal(alpha, sigma).log_prob(x[None])) == pytest.approx(float(joint.sum().log()), abs=1e-4)
        mean = (joint[:, None] * clean).sum(0) / joint.sum()
        torch.testing.assert_close(law.denoise(x[None], alpha, sigma)[0], mean, rtol=1e-4, atol=1e-4)


def test_gaussian_score_is_linear():
    law = GaussianMixture([1.0], [[1.0, -2.0]], 0.25 * torch.eye(2)[None])
    x = points()
    alpha, sigma = 0.7, 0.3
    v = alpha**2 * 0.25 + sigma**2
    expected = -(x - alpha * law.mean) / v
    torch.testing.assert_close(law.marginal(alpha, sigma).score(x), expected)
    torch.testing.assert_close((alpha * law.denoise(x, alpha, sigma) - x) / sigma**2, expected)


def test_the_mixture_denoiser_is_the_published_formula():
    """s(x) = sum_k w_k(x) Sigma_k(t)^{-1} (m mu_k - x), w the softmax of log joints, by torch's normals."""
    law, (alpha, sigma) = mixture(), (0.8, 0.6)
    x = noisy(law, alpha, sigma)
    total = alpha**2 * law.covariances + sigma**2 * torch.eye(2)
    component = torch.distributions.MultivariateNormal(alpha * law.means, total)
    log_joint = component.log_prob(x[:, None]) + law.weights.log()
    offset = alpha * law.means - x[:, None]
    by_component = torch.linalg.solve(total.expand(len(x), -1, -1, -1), offset[..., None]).squeeze(-1)
    score = (log_joint.softmax(-1)[..., None] * by_component).sum(1)
    torch.testing.assert_close((alpha * law.denoise(x, alpha, sigma) - x) / sigma**2, score)
    torch.testing.assert_close(law.marginal(alpha, sigma).log_prob(x), log_joint.logsumexp(-1))
    torch.testing.assert_close(law.marginal(alpha, sigma).responsibilities(x), log_joint.softmax(-1))


def test_the_empirical_denoiser_averages_its_points():
    law, x = Empirical(points()), points(3)
    alpha, sigma = 0.8, 0.5
    weight = torch.stack([torch.exp(-((v - alpha * law.data) ** 2).sum(-1) / (2 * sigma**2)) for v in x])
    expected = weight @ law.data / weight.sum(1, keepdim=True)
    torch.testing.assert_close(law.denoise(x, alpha, sigma), expected)


def test_blocks_change_nothing():
    data = torch.randn(70_000, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    law, x = Empirical(data, 0.1), points()
    together = law.denoise(x, 1.0, 0.5)  # rows of three
    one_by_one = torch.cat([law.denoise(v[None], 1.0, 0.5) for v in x])
    torch.testing.assert_close(together, one_by_one)
    torch.testing.assert_close(law.log_prob(x), torch.cat([law.log_prob(v[None]) for v in x]))


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_per_sample_levels_equal_scalar_ones(law, alpha, sigma):
    x = noisy(law, alpha, sigma, 3)
    alphas = torch.tensor([alpha, 0.9 * alpha, 0.5], dtype=F64)
    sigmas = torch.tensor([sigma, 2 * sigma, 0.7], dtype=F64)
    together = law.denoise(x, alphas, sigmas)
    for i in range(3):
        one = law.denoise(x[i : i + 1], float(alphas[i]), float(sigmas[i]))
        torch.testing.assert_close(together[i : i + 1], one, rtol=1e-9, atol=1e-9)
    same = law.denoise(x, torch.tensor(alpha, dtype=F64), torch.tensor(sigma, dtype=F64))
    torch.testing.assert_close(same, law.denoise(x, alpha, sigma), rtol=1e-9, atol=1e-9)


def test_marginals_of_marginals_are_marginals(law):
    twice = law.marginal(0.8, 0.5).marginal(0.5, 0.3)
    once = law.marginal(0.4, math.hypot(0.5 * 0.5, 0.3))
    x = noisy(law, 0.4, 0.4)
    torch.testing.assert_close(twice.log_prob(x), once.log_prob(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.01), *LEVELS])
def test_a_hundred_standard_deviations_out_nothing_breaks(law, alpha, sigma, dtype):
    """Far away the denoiser is finite and lies where the law reaches, and the score still points home."""
    spread = math.hypot(alpha * law.std, sigma)
    away = torch.tensor([[1.0, 0.0], [0.3, -0.9], [-0.7, 0.7], [0.0, -1.0]], dtype=dtype)
    x = alpha * law.mean.to(dtype) + 100 * spread * away
    D = law.denoise(x, alpha, sigma)
    assert D.dtype == dtype
    assert D.isfinite().all()
    score = (alpha * D - x) / sigma**2
    assert ((score * (x - alpha * law.mean.to(dtype))).sum(-1) < 0).all()
    marginal = law.marginal(alpha, sigma)
    assert marginal.log_prob(x).isfinite().all()
    exact = law.denoise(x.double(), alpha, sigma)
    if dtype == torch.float32:
        size = float(x.abs().max()) / alpha
        torch.testing.assert_close(D.double(), exact, rtol=1e-3, atol=1e-5 * size + 1e-3)
    else:
        torch.testing.assert_close(marginal.score(x), score, rtol=1e-5, atol=1e-7 * float(score.abs().max()))


def test_the_peer_failure_at_the_edge_of_a_mixture():
    """Modes at (+-1, 0), s = 0.1, sigma = 0.05: at (3, 0) EDM2's toy gives log p = -inf and a NaN score."""
    law = GaussianMixture([0.5, 0.5], [[1.0, 0.0], [-1.0, 0.0]], 0.01 * torch.eye(2).expand(2, 2, 2))
    x = torch.tensor([[3.0, 0.0]])
    v = 0.01 + 0.05**2
    expected = math.log(0.5) - math.log(2 * math.pi * v) - 4 / (2 * v)
    assert float(law.marginal(1.0, 0.05).log_prob(x)) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(law.marginal(1.0, 0.05).score(x), torch.tensor([[-2 / v, 0.0]]), rtol=1e-4, atol=1e-3)


def test_samples_have_the_laws_moments(law):
    """Mean and pooled variance of 40,000 draws within 5 standard errors (false alarm below 1e-5 a law)."""
    x = draw(law, 40_000)
    assert x.shape == (40_000, 2)
    error = x.std(0) / math.sqrt(len(x))
    assert ((x.mean(0) - law.mean).abs() <= 5 * error + 1e-12).all()
    squares = ((x - law.mean) ** 2).mean(-1)
    assert abs(float(squares.mean()) - law.std**2) <= 5 * float(squares.std()) / math.sqrt(len(x))


@pytest.mark.parametrize("name", ["mixture", "kernels", "boxes", "soft boxes"])
def test_samples_follow_the_density(name):
    """Counts in 16 x 16 cells against the integral of exp(log_prob): chi-square below its 1 - 1e-6 quantile."""
    law = LAWS[name]
    count, cells, fine = 40_000, 16, 20
    low, high = -4.0, 5.0
    x = draw(law, count, seed=4)
    index = ((x - low) / (high - low) * cells).floor().long()
    kept = ((index >= 0) & (index < cells)).all(-1)
    observed = torch.bincount(index[kept, 0] * cells + index[kept, 1], minlength=cells**2).double()
    step = (high - low) / (cells * fine)
    axis = low + step * (torch.arange(cells * fine, dtype=F64) + 0.5)
    density = law.log_prob(torch.cartesian_prod(axis, axis)).exp().reshape(cells, fine, cells, fine)
    expected = density.sum((1, 3)).flatten() * step**2 * count
    full = expected > 10
    # Quadrature is exact to about a per cent of a cell where a box's edge cuts it.
    chi = ((observed - expected)[full] ** 2 / (expected[full] + (0.01 * expected[full]) ** 2)).sum()
    freedom = int(full.sum())
    assert float(chi) < freedom + 5 * math.sqrt(2 * freedom) + 10


def test_weights_are_the_share_of_each_component():
    law = targets.make("ring", components=4, weights=[1, 2, 3, 4])
    share = law.responsibilities(draw(law, 20_000)).mean(0)
    torch.testing.assert_close(share, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64), rtol=0, atol=0.014)


@pytest.mark.parametrize(("variances", "each"), [(0.25, (0.25, 0.25)), ([0.25, 4.0], (0.25, 4.0))])
def test_one_variance_or_one_for_each_component_stands_for_equal_directions(variances, each):
    law = GaussianMixture([1.0, 2.0], [[0.0] * 3, [1.0] * 3], variances)
    whole = GaussianMixture([1.0, 2.0], [[0.0] * 3, [1.0] * 3], torch.stack([v * torch.eye(3) for v in each]))
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(law.log_prob(x), whole.log_prob(x))


def test_a_component_of_weight_zero_is_never_drawn():
    law = GaussianMixture([0.0, 1.0, 0.0], [[9.0], [0.0], [-9.0]], torch.ones(3, 1, 1) * 0.01)
    x = draw(law, 1000)
    assert x.abs().max() < 1
    assert law.denoise(x, 1.0, 0.1).isfinite().all()


def test_sampling_is_the_generators(law):
    state = torch.get_rng_state()
    assert torch.equal(draw(law, 10, 3), draw(law, 10, 3))
    assert not torch.equal(draw(law, 10, 3), draw(law, 10, 4))
    assert torch.equal(torch.get_rng_state(), state)
    generator = torch.Generator().manual_seed(0)
    assert law.sample(generator=generator).shape == (2,)
    assert law.sample((3, 4), generator=generator).shape == (3, 4, 2)


def test_the_ring_is_where_it_says():
    law = targets.make("ring", components=8, radius=4.0, std=0.2)
    torch.testing.assert_close(law.means.norm(dim=1), torch.full((8,), 4.0, dtype=F64))
    assert law.std == pytest.approx(math.sqrt(8 + 0.04))
    assert torch.linalg.det(law.covariances).tolist() == pytest.approx([0.2**4] * 8)


def test_the_checkerboard_is_flat_on_its_squares_and_empty_beside_them():
    law = targets.make("checkerboard", side=4, width=2.0)
    x = torch.tensor([[-3.0, -3.0], [-1.0, -3.0], [3.5, 3.5], [9.0, 9.0]])
    expected = torch.tensor([-math.log(32.0), -math.inf, -math.log(32.0), -math.inf])
    torch.testing.assert_close(law.log_prob(x), expected)


def test_the_box_denoiser_is_a_truncated_normals_mean():
    law = UniformBoxes([[0.0]], [[1.0]])
    x, sigma = torch.tensor([[0.3]], dtype=F64), 0.4
    u = torch.linspace(0, 1, 200_001, dtype=F64)
    weight = torch.exp(-((x[0] - u) ** 2) / (2 * sigma**2))
    expected = torch.trapezoid(weight * u, u) / torch.trapezoid(weight, u)
    torch.testing.assert_close(law.denoise(x, 1.0, sigma)[0, 0], expected, rtol=1e-9, atol=0)


def test_images_are_data_too():
    law = Empirical(torch.randn(6, 1, 3, 3, generator=torch.Generator().manual_seed(0)), 0.2)
    x = law.sample((4,), generator=torch.Generator().manual_seed(1))
    assert x.shape == (4, 1, 3, 3)
    assert law.denoise(x, torch.full((4,), 0.9), 0.3 * torch.ones(4)).shape == x.shape
    assert law.log_prob(x).shape == (4,)
    assert law.score(x).shape == x.shape
    torch.testing.assert_close(law.denoise(x, 1.0, 1e-3), x, rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GaussianMixture([1.0], [0.0, 0.0], torch.eye(2)), r"means have shape \(K, D\)"),
        (lambda: GaussianMixture([1.0], [[0.0, 0.0]], torch.eye(2)), r"covariances \(K, D, D\)"),
        (lambda: GaussianMixture([1.0, 1.0], [[0.0], [1.0]], [0.1, 0.1, 0.1]), r"covariances \(K, D, D\)"),
        (lambda: GaussianMixture([1.0, 1.0], [[0.0]], [[[1.0]]]), "weights are 1 non-negative"),
        (lambda: GaussianMixture([-1.0], [[0.0]], [[[1.0]]]), "non-negative"),
        (lambda: GaussianMixture([math.nan], [[0.0]], [[[1.0]]]), "non-negative"),
        (lambda: GaussianMixture([1.0], [[math.nan]], [[[1.0]]]), "finite"),
        (lambda: GaussianMixture([1.0], [[0.0]], [[[math.nan]]]), "finite"),
        (lambda: GaussianMixture([1.0], [[0.0, 0.0]], [[[1.0, 0.5], [0.0, 1.0]]]), "symmetric"),
        (lambda: GaussianMixture([1.0], [[0.0]], [[[-1.0]]]), "semi-definite"),
        (lambda: Empirical(torch.zeros(3)), r"\(n, \*event_shape\) with n >= 1, of numbers \(n, 1\); got \(3,\)"),
        (lambda: Empirical(torch.zeros(0, 2)), "n >= 1"),
        (lambda: Empirical(torch.tensor([[math.inf]])), "not finite"),
        (lambda: Empirical(torch.zeros(1, 2), bandwidth=-1.0), "bandwidth"),
        (lambda: Empirical(torch.zeros(1, 2)).log_prob(torch.zeros(1, 2)), "no density"),
        (lambda: Empirical(torch.zeros(2, 2), weights=[1.0]), "weights are 2"),
        (lambda: from_log_density(lambda x: x[:, 0], (1.0, 0.0), (0.0, 1.0)), "corners low < high"),
        (lambda: from_log_density(lambda x: x, (0.0, 0.0), (1.0, 1.0)), r"got shape \(4096, 2\)"),
        (lambda: from_log_density(lambda x: x[:, 0].log(), (-1.0,), (1.0,)), r"below \+inf.*nan"),
        (lambda: from_log_density(lambda x: x[:, 0] - math.inf, (-1.0,), (1.0,)), "not all -inf"),
        (lambda: from_log_density(lambda x: x[:, 0], [0.0] * 4, [1.0] * 4), "at most 4 million"),
        (lambda: UniformBoxes([[1.0]], [[0.0]]), "low < high"),
        (lambda: UniformBoxes([[0.0]], [[1.0]], bandwidth=-1.0), "bandwidth"),
        (lambda: targets.make("rings"), "got 'rings': did you mean 'ring'"),
        (lambda: targets.make("ring", sdt=0.1), "no option 'sdt'; it has: components, radius, std, weights"),
        (lambda: targets.make("ring", std=0.0), "std is positive"),
        (lambda: targets.make("ring", components=3, weights=[1.0, 1.0]), "weights are 3"),
        (lambda: targets.make("two_moons", points=0), "n >= 1"),
    ],
)
def test_what_is_no_law_is_refused(build, message):
    with pytest.raises(ValueError, match=message) as refusal:
        build()
    assert "\n" not in str(refusal.value)


def test_weighted_kernels_are_a_mixture_of_gaussians():
    weights = [3.0, 0.0, 1.0, 1.0, 2.0, 0.5, 0.5]
    law, x = LAWS["weighted kernels"], points(3)
    mixture = GaussianMixture(weights, points(), (0.09 * torch.eye(2)).expand(7, -1, -1))
    torch.testing.assert_close(law.log_prob(x), mixture.log_prob(x))
    torch.testing.assert_close(law.denoise(x, 0.8, 0.6), mixture.denoise(x, 0.8, 0.6))
    torch.testing.assert_close(law.marginal(0.8, 0.6).log_prob(x), mixture.marginal(0.8, 0.6).log_prob(x))
    torch.testing.assert_close(law.mean, mixture.mean)
    assert law.std == pytest.approx(mixture.std, rel=1e-6)
    nearest = torch.cdist(draw(Empirical(points(), 0.0, weights), 4000), points()).argmin(1)
    shares = torch.bincount(nearest, minlength=7) / 4000
    torch.testing.assert_close(shares, torch.tensor(weights) / 8, rtol=0, atol=0.03)  # 4 standard deviations


def test_a_law_of_a_log_density_known_up_to_a_constant_is_that_law():
    exact = mixture()
    law = from_log_density(lambda x: exact.log_prob(x) + 5.0, (-7.0, -6.0), (7.0, 7.0), 128)
    assert law.std == pytest.approx(exact.std, rel=1e-4)  # kernels that widened it would add 1.4e-3
    torch.testing.assert_close(law.mean, exact.mean, rtol=0, atol=1e-4)
    x = draw(exact, 500)
    assert (law.log_prob(x) - exact.log_prob(x)).abs().mean() < 0.01
    for alpha, sigma in LEVELS:
        y = noisy(exact, alpha, sigma, 200)
        torch.testing.assert_close(law.denoise(y, alpha, sigma), exact.denoise(y, alpha, sigma), rtol=0, atol=0.02)


def test_a_density_finer_than_its_lattice_is_warned_of():
    with pytest.warns(UserWarning, match="lattice is coarse.*more cells than cells=16"):
        from_log_density(mixture().log_prob, (-20.0, -20.0), (20.0, 20.0), 16)


def test_integer_data_are_refused():
    with pytest.raises(TypeError, match="dequantise"):
        Empirical(torch.zeros(3, 1, 8, 8, dtype=torch.uint8))


def test_a_flat_mixture_has_no_density():
    law = LAWS["flat mixture"]
    with pytest.raises(ValueError, match="no density"):
        law.log_prob(torch.zeros(1, 2))
    assert law.marginal(1.0, 0.1).log_prob(torch.zeros(1, 2)).isfinite().all()


def test_the_empirical_denoiser_has_its_jacobian_by_every_way_of_differentiation():
    """dD / dx = alpha / sigma^2 Cov[x_0 | x]: `torch.cdist` gives another one under vmap, and none in forward mode."""
    points = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    law, alpha, sigma = Empirical(points), 0.8, 0.6
    weights = (-(x[:, None] - alpha * points).square().sum(2) / (2 * sigma**2)).softmax(1)
    offset = points - (weights @ points)[:, None]
    expected = alpha / sigma**2 * torch.einsum("bn,bni,bnj->bij", weights, offset, offset)

    def denoise(v):
        return law.denoise(v[None], alpha, sigma)[0]

    for differentiate in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(torch.func.vmap(differentiate(denoise))(x), expected)
    _, pull = torch.func.vjp(lambda v: law.denoise(v, alpha, sigma), x)
    directions = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(pull)(directions)[0], torch.einsum("bij,pbj->pbi", expected, directions))
    torch.autograd.gradgradcheck(lambda v: law.denoise(v, alpha, sigma), x.requires_grad_())


def test_sampling_in_inference_mode_leaves_gradients_possible():
    for model in (ExactScore(mixture(), VPSDE()), ExactScore(mixture(), DiscreteSDE.ddpm(50))):
        t = float(model.sde.t_max) / 2
        with torch.inference_mode():
            model(torch.zeros(3, 2), t)
        x = torch.zeros(3, 2).requires_grad_()
        model(x, t).score.sum().backward()
        assert x.grad.isfinite().all()


def test_draws_come_in_the_default_dtype() -> None:
    laws = [targets.make("ring"), targets.make("checkerboard"), Empirical(torch.zeros(3, 2), bandwidth=0.1)]
    assert all(law.sample((2,)).dtype == torch.float32 for law in laws)
    torch.set_default_dtype(torch.float64)
    try:
        assert all(law.sample((2,)).dtype == torch.float64 for law in laws)
    finally:
        torch.set_default_dtype(torch.float32)

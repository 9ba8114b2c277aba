"""Metrics against closed forms, other libraries' implementations and their invariances."""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import Tensor

from score_sde.evaluation import metrics
from score_sde.evaluation.metrics import Yardstick, measure, noise_floor
from score_sde.targets import GaussianMixture, make

TWO_SAMPLE = [metrics.sliced_w2, metrics.w2, metrics.energy_distance, metrics.mmd]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=generator(seed), dtype=torch.float64)


def quantiles(n: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """The n mid-quantiles of a Gaussian, a sample without randomness: (n, 1)."""
    return mean + std * torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]


@pytest.mark.parametrize("metric", [metrics.sliced_w2, metrics.w2])
def test_w2_between_gaussians_on_a_line(metric: metrics.Metric) -> None:
    x, y = quantiles(1000), quantiles(1000, mean=3.0, std=2.0)
    assert metric(x, y) == pytest.approx(math.sqrt(3**2 + (2 - 1) ** 2), rel=2e-3)


@pytest.mark.parametrize("sizes", [(7, 7), (7, 12), (30, 1), (64, 48)])
def test_w2_on_a_line_is_that_of_linear_programming(sizes: tuple[int, int]) -> None:
    x, y = normal(sizes[0], 1), 2 + 3 * normal(sizes[1], 1, seed=1)
    assert metrics.sliced_w2(x, y) == pytest.approx(metrics.w2(x, y), rel=1e-9)


def test_exact_w2_is_the_least_cost_over_all_assignments() -> None:
    x, y = normal(6, 3), normal(6, 3, seed=1)
    costs = [(x - y[list(order)]).square().sum(1).mean().item() for order in itertools.permutations(range(6))]
    assert metrics.w2(x, y) == pytest.approx(math.sqrt(min(costs)), rel=1e-9)


def test_sliced_w2_of_a_shift_is_its_length_over_the_root_of_the_dimension() -> None:
    x, shift = normal(50, 3), torch.tensor([1.0, -2.0, 2.0])
    # (theta.d)^2 has mean |d|^2 / D and a relative standard deviation of 2 / sqrt(5) for D = 3.
    assert metrics.sliced_w2(x, x + shift, directions=20_000) == pytest.approx(3 / math.sqrt(3), rel=0.015)
    assert metrics.w2(x, x + shift) == pytest.approx(3, rel=1e-9)


def test_sliced_w2_averages_squares_over_the_directions_of_its_seed() -> None:
    x, y = normal(40, 2), 1 + normal(40, 2, seed=1)
    theta = torch.randn(5, 2, generator=generator(7), dtype=torch.float64)
    theta /= theta.norm(dim=1, keepdim=True)
    squared = [scipy.stats.wasserstein_distance(x @ d, y @ d) for d in theta]  # W1 is a lower bound
    each = [(torch.sort(x @ d).values - torch.sort(y @ d).values).square().mean().item() for d in theta]
    value = metrics.sliced_w2(x, y, directions=5, seed=7)
    assert value == pytest.approx(math.sqrt(np.mean(each)), rel=1e-12)
    assert value >= np.mean(squared)


def test_energy_distance_on_a_line_is_scipys() -> None:
    x, y = normal(80, 1), 1 + 2 * normal(50, 1, seed=1)
    expected = scipy.stats.energy_distance(x[:, 0].numpy(), y[:, 0].numpy())
    assert metrics.energy_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_energy_distance_of_two_points_is_the_root_of_twice_their_distance() -> None:
    x = torch.zeros(5, 3)
    assert metrics.energy_distance(x, x + torch.tensor([2.0, -1.0, 2.0])) == pytest.approx(math.sqrt(2 * 3), rel=1e-6)


def test_mmd_of_two_points() -> None:
    x = torch.zeros(4, 2)
    value = metrics.mmd(x, x + torch.tensor([3.0, 4.0]), bandwidths=[5.0, 10.0])
    kernel = (math.exp(-0.5) + math.exp(-0.125)) / 2
    assert value == pytest.approx(math.sqrt(2 - 2 * kernel), rel=1e-9)


def test_unbiased_mmd_between_gaussians_has_the_closed_form_mean() -> None:
    h, shift = 0.8, 0.7
    kernel = h / math.sqrt(h**2 + 2)  # E k(x, x') for x, x' ~ N(0, 1)
    expected = 2 * kernel * (1 - math.exp(-(shift**2) / (2 * (h**2 + 2))))
    squares = {}
    for unbiased in (True, False):
        values = [metrics.mmd(normal(30, 1, 2 * i), shift + normal(30, 1, 2 * i + 1), bandwidths=[h], unbiased=unbiased)
                  for i in range(400)]  # fmt: skip
        squares[unbiased] = np.sign(values) * np.square(values)
    standard_error = squares[True].std() / 20
    assert abs(squares[True].mean() - expected) < 4 * standard_error  # false alarm 6e-5
    assert squares[False].mean() - expected == pytest.approx(2 * (1 - kernel) / 30, abs=4 * standard_error)


def test_mmd_bandwidths_follow_the_median_distance_of_the_reference() -> None:
    x, y = normal(60, 2), 1 + normal(50, 2, seed=1)
    median = torch.pdist(y).median().item()
    assert metrics.mmd(x, y) == pytest.approx(metrics.mmd(x, y, bandwidths=[median / 4**i for i in range(3)]))
    sparse = torch.cat([torch.zeros(450, 2), y])  # most pairs coincide, which say nothing of a scale
    distances = torch.pdist(sparse)
    scale = distances[distances > 0].median().item()
    assert metrics.mmd(x, sparse) == pytest.approx(metrics.mmd(x, sparse, bandwidths=[scale / 4**i for i in range(3)]))
    one, half = torch.zeros(5, 2), math.exp(-0.5) + math.exp(-8) + math.exp(-128)
    assert metrics.mmd(one, one) == 0
    assert metrics.mmd(one + torch.tensor([1.0, 0.0]), one) == pytest.approx(math.sqrt(2 - 2 * half / 3))


@pytest.mark.parametrize("metric", TWO_SAMPLE)
def test_two_sample_metrics_are_symmetric_blind_to_order_and_zero_on_equals(metric: metrics.Metric) -> None:
    x, y = normal(40, 2), 1 + normal(40, 2, seed=1)
    if metric is not metrics.mmd:  # its kernel follows the scale of y
        assert metric(x, y) == pytest.approx(metric(y, x), rel=1e-9)
    assert metric(x.flip(0), y) == pytest.approx(metric(x, y), rel=1e-9)
    assert metric(x, x.flip(0)) == pytest.approx(0, abs=1e-7)
    assert metric(x, y) > 0.3


@pytest.mark.parametrize("metric", [metrics.w2, metrics.energy_distance, metrics.mmd])
def test_metrics_do_not_depend_on_the_frame(metric: metrics.Metric) -> None:
    x, y = normal(40, 3), 1 + normal(30, 3, seed=1)
    rotation = torch.linalg.qr(normal(3, 3, seed=2)).Q
    assert metric(x @ rotation + 5, y @ rotation + 5) == pytest.approx(metric(x, y), rel=1e-8)


def test_events_of_any_shape_are_flattened() -> None:
    x, y = normal(20, 12), normal(20, 12, seed=1)
    for metric in [*TWO_SAMPLE, metrics.frechet_distance]:
        assert metric(x.view(20, 3, 2, 2), y.view(20, 3, 2, 2)) == metric(x, y)


@pytest.mark.parametrize("metric", [metrics.w2, metrics.energy_distance, metrics.mmd])
def test_thinning_keeps_points_of_the_sample(metric: metrics.Metric) -> None:
    metric = partial(metric, bandwidths=[1.0]) if metric is metrics.mmd else metric
    x, y = 0.01 * normal(50, 2), 1 + 0.01 * normal(60, 2, seed=1)
    assert metric(x, y, max_points=10) == pytest.approx(metric(x, y), rel=0.05)
    assert metric(x, y, max_points=10) != metric(x, y)


def test_frechet_distance_is_the_formula_with_a_matrix_square_root() -> None:
    x, y = normal(500, 4) @ normal(4, 4, seed=3), 0.5 + normal(300, 4, seed=1) @ normal(4, 4, seed=4)
    a, b = np.cov(x.T), np.cov(y.T)
    shift = (x.mean(0) - y.mean(0)).square().sum().item()
    expected = shift + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert metrics.frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_on_a_line() -> None:
    x, y = normal(100, 1), 3 + 2 * normal(100, 1)
    shift = (y.mean() - x.mean()).square() + (y.std() - x.std()).square()
    assert metrics.frechet_distance(x, y) == pytest.approx(shift.item(), rel=1e-9)


def test_frechet_distance_of_singular_covariances() -> None:
    x = normal(5, 40)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    # Laws on orthogonal subspaces have A^1/2 B^1/2 = 0: the traces add.
    left, right = torch.cat([x, 0 * x], dim=1), torch.cat([0 * x, x], dim=1)
    expected = 2 * x.mean(0).square().sum() + 2 * x.var(0).sum()
    assert metrics.frechet_distance(left, right) == pytest.approx(expected.item(), rel=1e-6)


def overlapping() -> GaussianMixture:
    covariances = torch.tensor([[[1.0, 0.3], [0.3, 0.5]], [[0.4, 0.0], [0.0, 0.6]], [[1.0, 0.0], [0.0, 1.0]]])
    return GaussianMixture([0.2, 0.3, 0.5], [[-1.0, 0.0], [1.0, 0.0], [0.0, 2.0]], covariances)


def test_mode_weights_and_spread_are_right_for_exact_samples_of_overlapping_modes() -> None:
    mixture, n = overlapping(), 200_000
    x = mixture.sample((n,), generator=generator())
    assert torch.allclose(metrics.mode_weights(x, mixture), mixture.weights, atol=4 * 0.5 / n**0.5)
    assert torch.allclose(metrics.mode_spread(x, mixture), torch.ones(3, dtype=torch.float64), atol=0.01)


def test_mode_metrics_of_samples_with_known_faults() -> None:
    ring = make("ring", components=4, std=0.1)
    x = ring.means.repeat_interleave(torch.tensor([40, 40, 20, 0]), dim=0)
    assert torch.allclose(metrics.mode_weights(x, ring), torch.tensor([0.4, 0.4, 0.2, 0.0], dtype=torch.float64))
    assert metrics.mode_weight_error(x, ring) == pytest.approx(0.15 + 0.15)
    assert metrics.mode_spread(x, ring).tolist() == pytest.approx([0, 0, 0, 0], abs=1e-6)

    exact = ring.sample((40_000,), generator=generator()).double()
    centre = ring.means[ring.responsibilities(exact).argmax(1)]
    wide = centre + 1.5 * (exact - centre)
    assert metrics.mode_spread(wide, ring).tolist() == pytest.approx([1.5] * 4, rel=0.02)
    assert metrics.mode_spread_error(wide, ring) == pytest.approx(0.5, rel=0.05)
    # The spread is about the samples' own centre: a shifted mode is not a wide one.
    assert metrics.mode_spread(exact + 0.2, ring).tolist() == pytest.approx([1.0] * 4, rel=0.02)


def test_the_floor_falls_with_the_root_of_the_number_of_samples() -> None:
    target = make("ring", components=1, radius=0.0, std=1.0)
    floors = [noise_floor(metrics.sliced_w2, target, n, generator=generator(), repeats=30) for n in (200, 3200)]
    assert math.log(floors[0] / floors[1], 16) == pytest.approx(0.5, abs=0.08)


def test_the_floor_is_a_mean_over_pairs() -> None:
    values = iter([1.0, 2.0, 6.0])
    assert noise_floor(lambda x, y: next(values), normal(4, 1), 2, generator=generator(), repeats=3) == 3


def test_the_floor_of_a_tensor_is_between_disjoint_draws() -> None:
    seen = []
    reference = torch.arange(20.0)[:, None]
    noise_floor(lambda x, y: float(seen.append((x, y)) or 0), reference, 10, generator=generator(), repeats=3)
    for x, y in seen:
        assert torch.equal(torch.cat([x, y]).sort(dim=0).values, reference)
    assert not torch.equal(seen[0][0], seen[1][0])


def test_exact_samples_score_their_floor_and_wrong_ones_more() -> None:
    ring = make("ring", weights=[1, 2, 3, 4, 4, 3, 2, 1])
    exact = ring.sample((1000,), generator=generator(1))
    wrong = exact + 0.3 * torch.randn(exact.shape, generator=generator(3))
    right, wide = (measure(x, ring, generator=generator(2), repeats=2).set_index("metric") for x in (exact, wrong))
    assert list(right.index) == [*metrics.METRICS, *metrics.MODE_METRICS]
    assert right["ratio"].between(0.3, 2.5).all()
    assert right["floor"].equals(wide["floor"])
    assert wide["ratio"]["mode_spread"] > 10
    assert wide["ratio"]["energy"] > right["ratio"]["energy"]
    assert (wide["value"] / wide["floor"]).equals(wide["ratio"])


def test_a_reference_tensor_is_halved() -> None:
    data = normal(200, 2)
    table = measure(3 + normal(500, 2, seed=1), data, generator=generator(), metrics=["sliced_w2", "energy"])
    assert table["metric"].tolist() == ["sliced_w2", "energy"]
    assert (table["ratio"] > 5).all()


def test_one_yardstick_holds_all_samples_against_the_same_draws() -> None:
    yardstick = Yardstick(make("two_moons"), 300, generator=generator(), repeats=2)
    x = normal(300, 2)
    assert yardstick(x).equals(yardstick(x))
    custom = Yardstick(normal(20, 1), 10, generator=generator(), metrics={"n": lambda x, y: float(len(x))})
    assert custom(normal(10, 1)).to_dict("records") == [{"metric": "n", "value": 10.0, "floor": 10.0, "ratio": 1.0}]


def test_refusals_name_the_fix() -> None:
    x = normal(10, 2)
    broken = x.clone()
    broken[3, 0], broken[4, 1] = math.nan, math.inf
    with pytest.raises(ValueError, match="2 of 10 samples are not finite"):
        metrics.sliced_w2(broken, x)
    with pytest.raises(ValueError, match="one event shape"):
        metrics.w2(x, x[:, :1])
    with pytest.raises(TypeError, match=r"y is a tensor, got ndarray: torch\.as_tensor makes one"):
        metrics.mmd(x, x.numpy())
    with pytest.raises(ValueError, match="unknown metric 'fid'; for this reference: sliced_w2"):
        Yardstick(x, 5, generator=generator(), metrics=["fid"])
    with pytest.raises(ValueError, match="unknown metric 'mode_spread'"):
        Yardstick(x, 5, generator=generator(), metrics=["mode_spread"])
    with pytest.raises(ValueError, match=r"a metric needs a name: give metrics=\{'<name>': functools.partial"):
        Yardstick(x, 5, generator=generator(), metrics=[partial(metrics.sliced_w2, directions=8)])
    with pytest.raises(ValueError, match="2 of 5 samples are not finite"):  # whatever the metric does with them
        Yardstick(x, 5, generator=generator(), metrics={"size": lambda a, b: float(len(a))})(broken[:5])
    with pytest.raises(ValueError, match="at least 12 samples, got 10"):
        Yardstick(x, 6, generator=generator())
    with pytest.raises(ValueError, match=r"measures 5 samples, .* got 10"):
        Yardstick(x, 5, generator=generator())(x)
    with pytest.raises(ValueError, match="bandwidths are positive"):
        metrics.mmd(x, x, bandwidths=[1.0, 0.0])
    with pytest.raises(ValueError, match="two points or more, got 10 and 1"):
        metrics.mmd(x, x[:1])
    with pytest.raises(ValueError, match="two points or more, got 1 and 10"):
        metrics.mmd(x[:1], x, unbiased=True)
    with pytest.raises(ValueError, match="at least 2 samples"):
        metrics.frechet_distance(x[:1], x)


def test_a_function_is_a_metric_beside_those_known_by_name() -> None:
    def gap(x: torch.Tensor, y: torch.Tensor) -> float:
        return (x.mean() - y.mean()).abs().item()

    x = make("ring").sample((100,), generator=torch.Generator().manual_seed(0))
    table = measure(x + 3, make("ring"), generator=torch.Generator().manual_seed(1), metrics=["sliced_w2", gap])
    assert table["metric"].tolist() == ["sliced_w2", "gap"]
    assert table["value"][1] == pytest.approx(3, abs=0.5)


@pytest.mark.parametrize("name", metrics.PROFILES)
@pytest.mark.parametrize("most", [0, metrics.PROFILED])
def test_a_yardstick_s_figures_are_the_means_of_the_plain_metric_over_its_draws(name, most, monkeypatch):
    """Bitwise, whether what a set alone takes is computed once or not."""
    monkeypatch.setattr(metrics, "PROFILED", most)
    law, source = make("ring"), torch.Generator().manual_seed(0)
    yardstick, x = Yardstick(law, 50, generator=source, metrics=[name], repeats=3), law.sample((50,), generator=source)
    assert yardstick(x)["value"].item() == sum(metrics.METRICS[name](x, draw) for draw in yardstick.draws) / 3

r"""Distances of samples from a law, each next to the value that exact samples would have.

For samples x ~ P and y ~ Q, empirical laws of n and m points, and directions theta uniform on the sphere:

    sliced W2    SW2^2 = E_theta W2^2(theta.x, theta.y),         W2^2 on a line = int_0^1 (F^-1(u) - G^-1(u))^2 du
    exact W2     W2^2 = min over couplings of E|x - y|^2
    energy       E^2 = 2 E|x - y| - E|x - x'| - E|y - y'|
    MMD          M^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)
    Fréchet      d^2 = |mu - nu|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2)       for means mu, nu and covariances A, B

All but the last are reported as distances (roots), in the units of x where they have any. They are positive for finite
samples even when P = Q: the value between two independent exact draws is the noise floor, given with every figure.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from score_sde.checks import tensor, whole
from score_sde.targets import GaussianMixture, Target

Metric = Callable[[Tensor, Tensor], float]

Metrics = Sequence[str | Metric] | Mapping[str, Metric]
"""Names of metrics and functions (samples, exact draws) -> number, or a mapping from names to such functions."""


def sliced_w2(x: Tensor, y: Tensor, *, directions: int = 128, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance: the root of the mean over directions of the squared W2 on a line.

    Each one-dimensional W2 is exact, whatever the two sample sizes. The directions depend on `seed` alone, so that
    distances of different samples are comparable.

    Args:
        x, y: (n, *event_shape) and (m, *event_shape); events are flattened.
        directions: number of directions, uniform on the sphere.
        seed: seed of the directions.

    Source: Bonneel et al. 2015, Sliced and Radon Wasserstein barycenters, section 3.
    """
    x, y = pair(x, y)
    theta = _directions(x, directions, seed)
    chunk = max(1, 2**23 // (len(x) + len(y)))
    squared = [_w2_on_lines(_sorted_along(part, x), _sorted_along(part, y)) for part in theta.split(chunk)]
    return torch.cat(squared).mean().sqrt().item()


def _directions(x: Tensor, count: int = 128, seed: int = 0) -> Tensor:
    theta = torch.randn(count, x.shape[1], generator=torch.Generator().manual_seed(seed), dtype=x.dtype).to(x.device)
    return theta / theta.norm(dim=1, keepdim=True)


def _sorted_along(theta: Tensor, x: Tensor) -> Tensor:
    """The sorted projections of points (n, D) on each direction, shape (directions, n)."""
    return (theta @ x.T).sort(dim=1).values


def _w2_on_lines(x: Tensor, y: Tensor) -> Tensor:
    """Exact squared W2 between sorted rows: (rows, n), (rows, m) -> (rows,), by integrating the two quantile functions.

    Both are step functions of u; their jumps i/n and j/m are counted in units of 1/(n m), so that none is rounded.
    """
    n, m = x.shape[1], y.shape[1]
    if n == m:
        return (x - y).square().mean(dim=1)
    jumps = torch.cat([m * torch.arange(1, n + 1), n * torch.arange(1, m + 1)]).unique().to(x.device)
    widths = torch.diff(jumps, prepend=jumps.new_zeros(1)).to(x) / (n * m)
    return (x[:, (jumps - 1) // m] - y[:, (jumps - 1) // n]).square() @ widths


def w2(x: Tensor, y: Tensor, *, max_points: int = 1000) -> float:
    """Exact 2-Wasserstein distance between at most `max_points` random points of each sample, by linear programming.

    Cost grows with the cube of the points: 0.05 s for 1,000 and 0.25 s for 2,000.

    Source: Flamary et al. 2021, POT (`ot.emd2`).
    """
    import ot

    x, y = (_thin(v, max_points) for v in pair(x, y))
    cost = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
    # The default limit of iterations stops short of the optimum beyond some thousand points.
    return float(ot.emd2([], [], cost.cpu().numpy(), numItermax=10_000_000)) ** 0.5


def energy_distance(x: Tensor, y: Tensor, *, max_points: int = 2000) -> float:
    """Energy distance, the root of 2 E|x - y| - E|x - x'| - E|y - y'| between at most `max_points` points of each.

    Source: Székely and Rizzo 2013, Energy statistics, equation 2 (its V-statistic, which is never negative).
    """
    x, y = pair(x, y)
    return _energy_between(_spread(x, max_points), _spread(y, max_points))


def _spread(x: Tensor, max_points: int = 2000) -> tuple[Tensor, float]:
    """At most `max_points` points (n, D), and their mean distance E|x - x'|."""
    x = _thin(_flat(x), max_points)
    return x, _mean_over_pairs(_itself, x, x)


def _energy_between(x: tuple[Tensor, float], y: tuple[Tensor, float]) -> float:
    return max(0.0, 2 * _mean_over_pairs(_itself, x[0], y[0]) - x[1] - y[1]) ** 0.5


def mmd(
    x: Tensor, y: Tensor, *, bandwidths: Sequence[float] | None = None, unbiased: bool = False, max_points: int = 2000
) -> float:
    """Maximum mean discrepancy between at most `max_points` points of each sample.

    The kernel is k(x, y) = mean_h exp(-|x - y|^2 / (2 h^2)) over the `bandwidths` h, by default 1, 1/4 and 1/16 times the
    median distance between points of y that differ (or times 1 if none do).

    Args:
        x, y: (n, *event_shape) and (m, *event_shape).
        bandwidths: the h, in the units of x.
        unbiased: leaves out the pairs of a point with itself, so that MMD^2 is unbiased and may be negative.

    Returns:
        The signed root, sign(MMD^2) sqrt|MMD^2|.

    Source: Gretton et al. 2012, A kernel two-sample test, equations 3 (unbiased) and 5 (biased).
    """
    x, y = (_thin(v, max_points) for v in pair(x, y))
    if len(y) < 2 or (unbiased and len(x) < 2):
        raise ValueError(f"mmd compares two points or more, got {len(x)} and {len(y)}")
    if bandwidths is None:
        distances = torch.pdist(y[:1000])
        distances = distances[distances > 0]
        scale = distances.median().item() if len(distances) else 1.0
        bandwidths = [scale / 4**i for i in range(3)]
    if not bandwidths or min(bandwidths) <= 0:
        raise ValueError(f"bandwidths are positive lengths, got {list(bandwidths)}")

    def kernel(distance: Tensor) -> Tensor:
        squared = distance.square_()
        return sum((squared / (-2 * h**2)).exp_() for h in bandwidths) / len(bandwidths)  # type: ignore[return-value]

    def within(v: Tensor) -> float:
        n, mean = len(v), _mean_over_pairs(kernel, v, v)
        return (n * mean - 1) / (n - 1) if unbiased else mean

    squared = within(x) + within(y) - 2 * _mean_over_pairs(kernel, x, y)
    return abs(squared) ** 0.5 * (1 if squared >= 0 else -1)


def mode_weights(x: Tensor, mixture: GaussianMixture) -> Tensor:
    """The share of each component: the mean over samples of its responsibility r_k(x); shape (K,).

    For exact samples the expectation is w_k, however much the components overlap.
    """
    return mixture.responsibilities(_flat(x)).mean(dim=0)


def mode_spread(x: Tensor, mixture: GaussianMixture) -> Tensor:
    """Standard deviation within each component relative to the exact one, shape (K,); below 1, samples are too narrow.

    The spread of component k is the root of the trace of the samples' covariance weighted by r_k(x), about their own
    weighted mean; for exact samples it tends to sqrt(tr Sigma_k). Components that hold less than one sample get 0.
    """
    x = _flat(x)
    r = mixture.responsibilities(x)
    count = r.sum(dim=0)
    share = r / count.clamp_min(1)
    means = share.T @ x
    trace = (share * torch.cdist(x, means, compute_mode="donot_use_mm_for_euclid_dist").square()).sum(dim=0)
    exact = mixture.covariances.diagonal(dim1=-2, dim2=-1).sum(dim=-1).to(x)
    return torch.where(count < 1, 0, (trace / exact).sqrt())


def mode_weight_error(x: Tensor, mixture: GaussianMixture) -> float:
    """Total variation 1/2 sum_k |share_k - w_k| between the samples' mode weights and the exact ones, in [0, 1]."""
    return (mode_weights(x, mixture) - mixture.weights.to(x.device)).abs().sum().item() / 2


def mode_spread_error(x: Tensor, mixture: GaussianMixture) -> float:
    """Root mean square over the components of `mode_spread` - 1."""
    return (mode_spread(x, mixture) - 1).square().mean().sqrt().item()


class Moments(NamedTuple):
    """A mean (D,), and the trace and the symmetric root (D, D) of a covariance: what a Fréchet distance needs of one law."""

    mean: Tensor
    trace: Tensor
    root: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Those of the Gaussian fitted to features (n, F)."""
        x = _flat(x)
        return cls.given(x.mean(dim=0), _covariance(x))

    @classmethod
    def given(cls, mean: Tensor, covariance: Tensor) -> Moments:
        values, vectors = torch.linalg.eigh(covariance)  # eigenvalues below zero are round-off
        return cls(mean, covariance.trace(), (vectors * values.clamp_min(0).sqrt()) @ vectors.mT)


def frechet_distance(x: Tensor, y: Tensor, *, moments: Moments | None = None) -> float:
    """Squared Fréchet distance d^2 between the Gaussians fitted to two arrays of features, (n, F) and (m, F).

    As with the FID no root is taken. `moments` is `Moments.of(y)`, where it is known.

    Source: Heusel et al. 2017, https://arxiv.org/abs/1706.08500, equation 6.
    """
    x, y = pair(x, y)
    return _squared_w2(Moments.of(x), Moments.of(y) if moments is None else moments)


def squared_w2_of_gaussians(mu: Tensor, A: Tensor, nu: Tensor, B: Tensor) -> float:
    """|mu - nu|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) between N(mu, A) and N(nu, B), of shapes (D,) and (D, D).

    tr (A^1/2 B A^1/2)^1/2 is the sum of the singular values of A^1/2 B^1/2, whose factors come from `eigh`: real and
    stable for singular covariances too.

    Source: Dowson and Landau 1982, https://doi.org/10.1016/0047-259X(82)90077-X.
    """
    return _squared_w2(Moments.given(mu, A), Moments.given(nu, B))


def _squared_w2(p: Moments, q: Moments) -> float:
    overlap = torch.linalg.svdvals(p.root @ q.root).sum()
    return ((p.mean - q.mean).square().sum() + p.trace + q.trace - 2 * overlap).clamp_min(0).item()


def kid(x: Tensor, y: Tensor, *, within: float | None = None) -> float:
    """Kernel distance between two arrays of features, (n, F) and (m, F): unbiased, so 0 in the mean where P = Q.

    The squared MMD of k(x, y) = (x.y / F + 1)^3 without the pairs of a point with itself, over all points. `within` is
    `kernel_within(y)`, where it is known.

    Source: Binkowski et al. 2018, https://arxiv.org/abs/1801.01401, section 4.
    """
    x, y = pair(x, y)
    of_y = kernel_within(y) if within is None else within
    return kernel_within(x) + of_y - 2 * _kernel_sum(x, y) / (len(x) * len(y))


def kernel_within(x: Tensor) -> float:
    """The mean of KID's kernel over all pairs of two points of x (n, F)."""
    x, n = _flat(x), len(x)
    if n < 2:
        raise ValueError("KID leaves out the pairs of a point with itself: give at least 2 samples of each set")
    own = ((x.square().sum(dim=1) / x.shape[1] + 1) ** 3).sum().item()
    return (_kernel_sum(x, x) - own) / (n * (n - 1))


def _kernel_sum(x: Tensor, y: Tensor) -> float:
    """The sum of KID's kernel over all pairs, in blocks of bounded memory."""
    blocks = x.split(max(1, 2**22 // len(y)))
    return sum(((block @ y.T / x.shape[1] + 1) ** 3).sum().item() for block in blocks)


METRICS: dict[str, Metric] = {"sliced_w2": sliced_w2, "w2": w2, "energy": energy_distance, "mmd": mmd}
MODE_METRICS: dict[str, Callable[[Tensor, GaussianMixture], float]] = {
    "mode_weights": mode_weight_error,
    "mode_spread": mode_spread_error,
}


class Profile(NamedTuple):
    """A metric in two steps, metric(x, y) = between(of(x), of(y)): `of` is computed once for each set of samples."""

    of: Callable[[Tensor], Any]
    between: Callable[[Any, Any], float]


def _projections(x: Tensor) -> Tensor:
    x = _flat(x)
    return _sorted_along(_directions(x), x)


def _w2_of_projections(x: Tensor, y: Tensor) -> float:
    return _w2_on_lines(x, y).mean().sqrt().item()


PROFILES = {"sliced_w2": Profile(_projections, _w2_of_projections), "energy": Profile(_spread, _energy_between)}

PROFILED = 20_000
"""Profiles are used up to this number of samples: the sorted projections of one set then take 20 MB."""


def noise_floor(
    metric: Metric, reference: Target | Tensor, n: int, *, generator: torch.Generator, repeats: int = 8
) -> float:
    """Mean over `repeats` of the metric between two independent exact draws of n samples each.

    Args:
        metric: a function of two samples.
        reference: a target, or a tensor (m, *event_shape) of exact samples, m >= 2 n, from which both are drawn.
        n: size of each draw.
        generator: source of the draws.
        repeats: number of pairs.
    """
    pairs = [_draw_pair(reference, n, generator) for _ in range(repeats)]
    return sum(metric(x, y) for x, y in pairs) / repeats


class Yardstick:
    """A set of metrics, the exact draws that samples are compared with, and the floors between such draws.

    Made once, it compares any number of sets of samples with the same draws. A value is the mean over `repeats` draws of the
    metric between the samples and the draw. Its floor is the mean over `repeats` pairs of the metric between two draws;
    `spreads` has the standard deviation over these pairs. Some metrics use fewer points: `counts` has how many.

    Args:
        reference: a target, or a tensor (m, *event_shape) of exact samples, m >= 2 n.
        n: number of samples to be measured.
        generator: source of the exact draws.
        metrics: names in `METRICS` and, if the reference is a GaussianMixture, in `MODE_METRICS` (by default all of them),
            and functions (samples, exact draws) -> number; or a mapping from names to such functions.
        repeats: number of draws; with 8 the floor of the sliced W2 is known to about a tenth.

    Raises:
        ValueError: a metric is unknown, or the reference holds fewer than 2 n samples.
    """

    def __init__(
        self,
        reference: Target | Tensor,
        n: int,
        *,
        generator: torch.Generator,
        metrics: Metrics | None = None,
        repeats: int = 8,
    ) -> None:
        whole("repeats", repeats)
        self.n, self.metrics = n, _select(metrics, reference)
        self.counts = {name: min(n, _most_points(metric) or n) for name, metric in self.metrics.items()}
        pairs = [_draw_pair(reference, n, generator) for _ in range(repeats)]
        self.draws = [draw for draw, _ in pairs]
        own = {name for name in PROFILES if n <= PROFILED and self.metrics.get(name) is METRICS[name]}
        self.profiles = {name: PROFILES[name] if name in own else Profile(_itself, metric)
                         for name, metric in self.metrics.items()}  # fmt: skip
        self.known = {name: [of(draw) for draw in self.draws] for name, (of, _) in self.profiles.items()}
        between = {name: torch.tensor([self._between(name, x, known[k : k + 1])[0] for k, (_, x) in enumerate(pairs)],
                                      dtype=torch.float64) for name, known in self.known.items()}  # fmt: skip
        self.floors = {name: values.mean().item() for name, values in between.items()}
        self.spreads = {name: values.std(correction=int(repeats > 1)).item() for name, values in between.items()}

    def __call__(self, samples: Tensor) -> pd.DataFrame:
        """The columns metric, value, floor and ratio (value / floor) for samples of shape (n, *event_shape).

        Raises:
            ValueError: there are not n samples, they have another event shape, or are not all finite.
        """
        if len(samples) != self.n:
            raise ValueError(f"this yardstick measures {self.n} samples, its floors hold for no other number, "
                             f"got {len(samples)}")  # fmt: skip
        samples = samples.detach().cpu()
        pair(samples, self.draws[0][:1])
        values = {name: sum(self._between(name, samples, known)) / len(known) for name, known in self.known.items()}
        table = pd.DataFrame({"metric": list(values), "value": values.values(), "floor": self.floors.values()})
        return table.assign(ratio=table["value"] / table["floor"])

    def _between(self, name: str, samples: Tensor, known: Sequence[Any]) -> list[float]:
        """A metric between the samples and each of the draws whose profiles are given."""
        of, between = self.profiles[name]
        own = of(samples)
        return [between(own, each) for each in known]


def measure(
    samples: Tensor,
    reference: Target | Tensor,
    *,
    generator: torch.Generator,
    metrics: Metrics | None = None,
    repeats: int = 8,
) -> pd.DataFrame:
    """Every metric of the samples, its floor and their ratio: `Yardstick` for one set of samples.

    If the reference is a tensor of m samples, at most m / 2 of the given samples are used, as many as in each of the two
    disjoint draws between which the floor is measured.
    """
    n = min(len(samples), len(reference) // 2) if isinstance(reference, Tensor) else len(samples)
    yardstick = Yardstick(reference, n, generator=generator, metrics=metrics, repeats=repeats)
    return yardstick(_thin(samples, n))


def known_metrics(reference: Target | Tensor | None) -> list[str]:
    """The names of the metrics that a reference allows: those of a mixture's modes only for a GaussianMixture."""
    return [*METRICS, *(MODE_METRICS if isinstance(reference, GaussianMixture) else ())]


def _select(metrics: Metrics | None, reference: Target | Tensor) -> dict[str, Metric]:
    if isinstance(metrics, Mapping):
        return dict(metrics)
    known = dict(METRICS)
    if isinstance(reference, GaussianMixture):
        known |= {name: _of_modes(metric, reference) for name, metric in MODE_METRICS.items()}
    given = [*known] if metrics is None else [metrics] if isinstance(metrics, str) else metrics
    for metric in given:
        if callable(metric) and not hasattr(metric, "__name__"):
            raise ValueError(f"a metric needs a name: give metrics={{'<name>': {metric!r}}}")
    own = {metric.__name__: metric for metric in given if callable(metric)}
    chosen = [metric.__name__ if callable(metric) else metric for metric in given]
    known |= own
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        what = f"unknown metric {', '.join(map(repr, unknown))}" if unknown else "no metric"
        raise ValueError(f"{what}; for this reference: {', '.join(known)}")
    return {name: known[name] for name in chosen}


def _of_modes(metric: Callable[[Tensor, GaussianMixture], float], mixture: GaussianMixture) -> Metric:
    return lambda x, _: metric(x, mixture)


def _draw_pair(reference: Target | Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    if not isinstance(reference, Tensor):
        return reference.sample((n,), generator=generator), reference.sample((n,), generator=generator)
    if len(reference) < 2 * n or n < 1:
        raise ValueError(f"two disjoint draws of {n} need a reference of at least {max(2, 2 * n)} samples, "
                         f"got {len(reference)}")  # fmt: skip
    order = torch.randperm(len(reference), generator=generator)
    return reference[order[:n]], reference[order[n : 2 * n]]


def _flat(x: Tensor) -> Tensor:
    """Finite samples as float64 of shape (n, D)."""
    if tensor("x", x).ndim < 2 or len(x) == 0:
        raise ValueError(f"samples have shape (n, *event_shape) with n >= 1, got {tuple(x.shape)}")
    x = x.detach().double().flatten(1)
    broken = int((~x.isfinite().all(dim=1)).sum())
    if broken:
        raise ValueError(f"{broken} of {len(x)} samples are not finite")
    return x


def pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Two sets of finite samples of one event shape, flat in float64 on one device."""
    if tensor("x", x).shape[1:] != tensor("y", y).shape[1:]:
        raise ValueError(f"samples to compare have one event shape, got {tuple(x.shape[1:])} and {tuple(y.shape[1:])}")
    x = _flat(x)
    return x, _flat(y).to(x.device)


def _most_points(metric: Metric) -> int | None:
    """The default of a metric's argument `max_points`; None if it has none."""
    limit = inspect.signature(metric).parameters.get("max_points")
    return None if limit is None else limit.default


def _thin(x: Tensor, max_points: int) -> Tensor:
    """At most `max_points` rows, drawn without replacement by a fixed seed."""
    if len(x) <= max_points:
        return x
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:max_points]]


def _itself(x: Any) -> Any:
    return x


def _mean_over_pairs(function: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    """Mean of function(|x_i - y_j|) over all pairs, in blocks of bounded memory; its input may be overwritten."""
    blocks = x.split(max(1, 2**22 // len(y)))
    distances = (torch.cdist(block, y, compute_mode="donot_use_mm_for_euclid_dist") for block in blocks)
    return sum(function(d).sum().item() for d in distances) / (len(x) * len(y))


def _covariance(x: Tensor) -> Tensor:
    if len(x) < 2:
        raise ValueError("a covariance needs at least 2 samples, got 1")
    return torch.cov(x.T).reshape(x.shape[1], x.shape[1])

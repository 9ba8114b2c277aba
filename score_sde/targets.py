r"""Distributions (laws) of clean data in closed form.

A target has `sample` and `log_prob`, as in `torch.distributions`, and two more: its posterior mean under Gaussian noise,

    denoise(x, alpha, sigma) = E[x_0 | alpha x_0 + sigma eps = x],   grad log p(x) = (alpha denoise - x) / sigma^2,

and `marginal(alpha, sigma)`, the law of alpha x_0 + sigma eps, which is again a target. Mixtures of Gaussians, of kernels
on given points and of uniform boxes have both in closed form; all are evaluated with log-sum-exp, stable at any distance.
`make(name)` builds a named two-dimensional toy, `from_log_density` the law of a given density in few dimensions.
"""

from __future__ import annotations

import inspect
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from score_sde.checks import one_of, whole
from score_sde.copies import Copies
from score_sde.prediction import Coefficient
from score_sde.sde import expand

LOG_2PI = math.log(2 * math.pi)


class Linear(Protocol):
    """A linear observation of vectors (see `score_sde.guidance.operators.LinearOperator`)."""

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    def matrix(self) -> Tensor: ...


def _columns(x: Tensor, *values: Coefficient) -> Iterator[Coefficient]:
    """Per-sample coefficients shaped to multiply (batch, components, dimensions) arrays; floats stay floats."""
    return (v.to(x).reshape(-1, 1, 1) if isinstance(v, Tensor) else v for v in values)


class Target(ABC):
    """A law of clean data.

    Attributes:
        event_shape: shape of one sample.
        mean, std: first moments, the standard deviation pooled over dimensions (root mean variance).
    """

    event_shape: torch.Size
    mean: Tensor
    std: float

    @abstractmethod
    def sample(self, sample_shape: Sequence[int] = (), *, generator: torch.Generator | None = None) -> Tensor:
        """Independent draws, shape (*sample_shape, *event_shape), in torch's default dtype."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats at x of shape (batch, *event_shape); shape (batch,)."""

    @abstractmethod
    def denoise(self, x: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        """E[x_0 | alpha x_0 + sigma eps = x] for x of shape (batch, *event_shape).

        `alpha` and `sigma` are floats or tensors of shape (batch,), with sigma > 0.
        """

    @abstractmethod
    def marginal(self, alpha: float, sigma: float) -> Target:
        """The law of alpha x_0 + sigma eps."""

    def score(self, x: Tensor) -> Tensor:
        """grad log p(x), by automatic differentiation of `log_prob`."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.log_prob(x).sum(), x)[0]


def _weights(weights: Any, count: int) -> Tensor:
    """Weights (count,), float64, normalised. Raises ValueError unless they are non-negative with a positive sum."""
    weights = torch.as_tensor(weights, dtype=torch.float64)
    if weights.shape != (count,) or not (weights >= 0).all() or not 0 < weights.sum() < math.inf:
        raise ValueError(f"weights are {count} non-negative numbers with a positive sum, "
                         f"got shape {tuple(weights.shape)}: {weights.flatten()[:8].tolist()}")  # fmt: skip
    return weights / weights.sum()


def _once(values: Tensor) -> Tensor:
    """The values, cut to length 1 along dimensions where all are equal: saves work if every sample has its own time."""
    for dim in range(values.ndim):
        first = values.narrow(dim, 0, 1)
        values = first if (values == first).all() else values
    return values


def _like_generator(shape: Sequence[int], generator: torch.Generator | None) -> dict[str, Any]:
    """Arguments of torch.rand and its like, for numbers of a shape on the generator's device."""
    if not isinstance(shape, Sequence):
        raise TypeError(f"sample_shape is a tuple, such as ({shape},), got {shape!r}")
    return {"size": tuple(shape), "generator": generator, "device": generator.device if generator else "cpu"}


def _chosen(weights: Tensor, where: Mapping[str, Any]) -> Tensor:
    """Indices drawn with probabilities `weights`; `where` is as of `_like_generator`."""
    uniform = torch.rand(**where, dtype=torch.float64).unsqueeze(-1)
    return torch.searchsorted(weights.cumsum(0)[:-1].to(uniform), uniform, right=True).squeeze(-1)


def _float64(values: Any) -> Tensor:
    """Numbers, an array, a tensor or a list of tensors, as one float64 tensor."""
    listed = isinstance(values, Sequence) and len(values) > 0 and isinstance(values[0], Tensor)
    return torch.stack(list(values)).double() if listed else torch.as_tensor(values, dtype=torch.float64)


class GaussianMixture(Target):
    """p(x) = sum_k w_k N(x; mu_k, Sigma_k).

    Given component k, E[x_0 | x, k] = mu_k + alpha Sigma_k (alpha^2 Sigma_k + sigma^2 I)^{-1} (x - alpha mu_k), evaluated
    in the eigenbasis of Sigma_k; the posterior weight of k is softmax_k of log w_k + log N(x; alpha mu_k, .).

    Args:
        weights: (K,), non-negative; normalised here.
        means: (K, D).
        covariances: (K, D, D), symmetric and positive semi-definite; or for isotropic components one variance, or (K,).

    Raises:
        ValueError: shapes do not fit, or a covariance is not symmetric and positive semi-definite.
    """

    def __init__(self, weights: Any, means: Any, covariances: Any) -> None:
        self.means = _float64(means)
        self.covariances = _float64(covariances)
        if self.means.ndim == 2 and self.covariances.shape in ((), self.means.shape[:1]):
            (K, D), variances = self.means.shape, self.covariances
            self.covariances = variances.expand(K)[:, None, None] * torch.eye(D, dtype=torch.float64)
        if self.means.ndim != 2 or self.covariances.shape != (*self.means.shape, self.means.shape[-1]):
            raise ValueError(f"means have shape (K, D) and covariances (K, D, D), or variances (K,) or (), got "
                             f"{tuple(self.means.shape)} and {tuple(self.covariances.shape)}")  # fmt: skip
        self.weights = _weights(weights, len(self.means))
        if not (torch.isfinite(self.means).all() and torch.isfinite(self.covariances).all()):
            raise ValueError("means and covariances must be finite")
        if not torch.allclose(self.covariances, self.covariances.mT, rtol=1e-8, atol=1e-12):
            raise ValueError("covariances must be symmetric")
        variances, basis = torch.linalg.eigh(self.covariances)
        if not (variances >= -1e-10 * variances.abs().amax(-1, keepdim=True).clamp_min(1e-300)).all():
            raise ValueError(f"covariances must be positive semi-definite, least eigenvalue {variances.min().item():g}")
        self.event_shape = self.means.shape[1:]
        variances = variances.clamp_min(0)
        centre = torch.einsum("kde,kd->ke", basis, self.means)
        self._copies = Copies(log_weights=self.weights.log(), means=self.means, basis=basis, variances=_once(variances),
                              centre=centre)  # fmt: skip
        self._roots = basis * variances.sqrt().unsqueeze(-2)
        self._flat = bool((variances <= 1e-14 * variances.amax(-1, keepdim=True)).any())
        self.mean = self.weights @ self.means
        spread = self.weights @ (variances.sum(-1) + ((self.means - self.mean) ** 2).sum(-1))
        self.std = (spread / self.means.shape[1]).sqrt().item()

    def sample(self, sample_shape: Sequence[int] = (), *, generator: torch.Generator | None = None) -> Tensor:
        where = _like_generator(sample_shape, generator)
        component = _chosen(self.weights, where)
        normal = torch.randn(**_like_generator((*sample_shape, *self.event_shape), generator), dtype=torch.float64)
        roots, means = self._roots.to(normal), self.means.to(normal)
        return (means[component] + torch.einsum("...de,...e->...d", roots[component], normal)).to(
            torch.get_default_dtype()
        )

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats.

        Raises:
            ValueError: a covariance is singular, so that there is no density; `marginal(1.0, sigma)` has one.
        """
        return self._clean(x).logsumexp(-1)

    def responsibilities(self, x: Tensor) -> Tensor:
        """Posterior probability of each component at clean points x of shape (batch, D); shape (batch, K)."""
        return self._clean(x).softmax(-1)

    def _clean(self, x: Tensor) -> Tensor:
        """log w_k N(x; mu_k, Sigma_k), (batch, K)."""
        if self._flat:
            raise ValueError("a mixture with a singular covariance has no density: use marginal(1.0, sigma)")
        return self._log_joint(x, 1.0, 0.0)[0]

    def denoise(self, x: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        log_joint, offset, total = self._log_joint(x, alpha, sigma)
        p = self._copies.like(x)
        (alpha,) = _columns(x, alpha)
        weight = log_joint.softmax(-1)
        gain = weight.unsqueeze(-1) * (alpha * p["variances"] / total * offset)
        return weight @ p["means"] + torch.einsum("bke,kde->bd", gain, p["basis"])

    def marginal(self, alpha: float, sigma: float) -> GaussianMixture:
        alpha, sigma = float(alpha), float(sigma)
        noise = sigma**2 * torch.eye(self.means.shape[1], dtype=torch.float64)
        return GaussianMixture(self.weights, alpha * self.means, alpha**2 * self.covariances + noise)

    def condition(self, operator: Linear, y: Any, noise_std: float = 0.0) -> GaussianMixture:
        """The posterior p(x | y) for y = A x + noise_std e: a mixture again, exactly.

        With S_k = A Sigma_k A^T + noise_std^2 I and the gain K_k = Sigma_k A^T S_k^{-1}: weights w_k N(y; A mu_k, S_k),
        means mu_k + K_k (y - A mu_k), covariances (I - K_k A) Sigma_k (I - K_k A)^T + noise_std^2 K_k K_k^T. For
        noise_std = 0 it is the limit, which exists even if S_k is singular. Source: Bishop 2006, eq. 2.113 to 2.117.

        Args:
            operator: a linear operator on x (see `score_sde.guidance.operators`).
            y: one observation, of the operator's output shape.
            noise_std: 0 or more, in units of y.

        Raises:
            ValueError: the operator or y does not fit, or noise_std is negative.
        """
        if not hasattr(operator, "input_shape"):
            raise TypeError(f"operator is a LinearOperator, such as guidance.Matrix(A), got {type(operator).__name__}")
        if tuple(operator.input_shape) != tuple(self.event_shape):
            raise ValueError(f"an operator on x of shape {tuple(operator.input_shape)} does not observe this mixture, "
                             f"whose events have shape {tuple(self.event_shape)}")  # fmt: skip
        y, a = torch.as_tensor(y, dtype=torch.float64, device="cpu"), operator.matrix()
        if tuple(y.shape) != tuple(operator.output_shape):
            raise ValueError(f"one observation y has shape {tuple(operator.output_shape)}, got {tuple(y.shape)}")
        if not 0 <= noise_std < math.inf:
            raise ValueError(f"noise_std is a standard deviation >= 0, got {noise_std}")
        offset, seen = y.flatten() - self.means @ a.T, self.covariances @ a.mT
        variances, basis = torch.linalg.eigh(a @ seen + noise_std**2 * torch.eye(len(a), dtype=torch.float64))
        # In directions where S_k is 0 the gain is 0, and a y that differs from A mu_k there is as good as impossible.
        floor = 1e-13 * variances.amax().clamp_min(1e-300)
        inverse = torch.where(variances > floor, 1 / variances, 0)
        gain = seen @ (basis * inverse.unsqueeze(-2)) @ basis.mT
        squared = (torch.einsum("km,kme->ke", offset, basis) ** 2 / variances.clamp_min(floor)).sum(-1)
        log_weights = self.weights.log() - (squared + variances.clamp_min(floor).log().sum(-1)) / 2
        left = torch.eye(a.shape[1], dtype=torch.float64) - gain @ a
        covariances = left @ self.covariances @ left.mT + noise_std**2 * gain @ gain.mT
        means = self.means + torch.einsum("kdm,km->kd", gain, offset)
        return GaussianMixture(log_weights.softmax(0), means, (covariances + covariances.mT) / 2)

    def _log_joint(self, x: Tensor, alpha: Coefficient, sigma: Coefficient) -> tuple[Tensor, Tensor, Tensor]:
        """log w_k N(x; alpha mu_k, total), the offset x - alpha mu_k in the eigenbasis and the variances there."""
        p = self._copies.like(x)
        alpha, sigma = _columns(x, alpha, sigma)
        offset = torch.einsum("bd,kde->bke", x, p["basis"]) - alpha * p["centre"]
        total = alpha**2 * p["variances"] + sigma**2
        squared = (offset**2 / total).sum(-1)
        volume = (total.log() + LOG_2PI).sum(-1) * (x.shape[-1] / total.shape[-1])
        return p["log_weights"] - (squared + volume) / 2, offset, total

    def __repr__(self) -> str:
        return f"GaussianMixture({len(self.weights)} components in {self.means.shape[1]} dimensions)"


class _SquaredDistances(torch.autograd.Function):
    """|x_i - p_j|^2, (len(x), len(p)), without expanding the square, which would cancel; no derivative in p.

    Needed because `torch.cdist` has no forward-mode derivative, and its backward is wrong under `torch.func.vmap`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, p: Tensor) -> Tensor:
        return torch.cdist(x, p, compute_mode="donot_use_mm_for_euclid_dist").square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        x, p = ctx.saved_tensors
        return 2 * (g.sum(-1, keepdim=True) * x - g @ p), None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, dp: None) -> Tensor:
        x, p = ctx.saved_tensors
        return 2 * ((x * dx).sum(-1, keepdim=True) - dx @ p.mT)


class Empirical(Target):
    """The kernel mixture p(x) = sum_i w_i N(x; x_i, bandwidth^2 I) on given points; at bandwidth 0, the points themselves.

    E[x_0 | x] = sum_i u_i (x_i + k (x - alpha x_i)), with k = alpha bandwidth^2 / v, v = alpha^2 bandwidth^2 + sigma^2 and
    u = softmax_i(log w_i - |x - alpha x_i|^2 / (2 v)). Pairs (x, x_i) are evaluated in blocks of bounded memory.

    Args:
        data: (n, *event_shape) real numbers.
        bandwidth: standard deviation of the kernel.
        weights: (n,), non-negative; equal by default.

    Raises:
        ValueError: there are no points, values are not finite, weights do not fit, or the bandwidth is negative.
        TypeError: the data are integers, which have no density: scale and dequantise them first.
    """

    def __init__(self, data: Any, bandwidth: float = 0.0, weights: Any = None) -> None:
        data = torch.as_tensor(data)
        if not data.is_floating_point():
            raise TypeError(f"Empirical takes real-valued data, got {data.dtype}: scale it (and dequantise it) first")
        if data.ndim < 2 or len(data) == 0:
            raise ValueError(
                f"data has shape (n, *event_shape) with n >= 1, of numbers (n, 1); got {tuple(data.shape)}"
            )
        if not torch.isfinite(data).all():
            raise ValueError("data has values that are not finite: remove them first")
        if not 0 <= bandwidth < math.inf:
            raise ValueError(f"bandwidth is a standard deviation >= 0, got {bandwidth}")
        self.data, self.bandwidth = data.to("cpu", torch.float64), float(bandwidth)
        self.event_shape = self.data.shape[1:]
        share = _weights(torch.ones(len(data)) if weights is None else weights, len(data))
        self.weights = None if weights is None else share
        self._copies = Copies(points=self.data.flatten(1), log_weights=share.log())
        self.mean = torch.tensordot(share, self.data, 1)
        around = (self.data - self.mean).flatten(1).square().mean(1)
        self.std = (share @ around + self.bandwidth**2).sqrt().item()

    def sample(self, sample_shape: Sequence[int] = (), *, generator: torch.Generator | None = None) -> Tensor:
        where = _like_generator(sample_shape, generator)
        index = torch.randint(len(self.data), **where) if self.weights is None else _chosen(self.weights, where)
        noise = torch.randn(**_like_generator((*sample_shape, *self.event_shape), generator), dtype=torch.float64)
        return (self.data.to(noise)[index] + self.bandwidth * noise).to(torch.get_default_dtype())

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats.

        Raises:
            ValueError: the bandwidth is 0, so that there is no density; `marginal(1.0, sigma)` has one.
        """
        if self.bandwidth == 0:
            raise ValueError("points have no density: use Empirical(data, bandwidth=...) or marginal(1.0, sigma)")
        dimension = math.prod(self.event_shape)
        norm = dimension * (math.log(self.bandwidth) + LOG_2PI / 2)
        if self.weights is None:  # `_logits` leaves out equal weights
            norm += math.log(len(self.data))
        return torch.cat([logits.logsumexp(-1) for logits in self._logits(x, 1.0, self.bandwidth**2)]) - norm

    def denoise(self, x: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        variance = alpha**2 * self.bandwidth**2 + sigma**2
        points = self._copies.like(x)["points"]
        mean = torch.cat([logits.softmax(-1) @ points for logits in self._logits(x, alpha, variance)]).view_as(x)
        if self.bandwidth == 0:
            return mean
        gain = alpha * self.bandwidth**2 / variance
        alpha, gain = (expand(v, x) if isinstance(v, Tensor) else v for v in (alpha, gain))
        return mean + gain * (x - alpha * mean)

    def marginal(self, alpha: float, sigma: float) -> Empirical:
        bandwidth = math.hypot(float(alpha) * self.bandwidth, float(sigma))
        return Empirical(float(alpha) * self.data, bandwidth, self.weights)

    def _logits(self, x: Tensor, alpha: Coefficient, variance: Coefficient) -> Iterator[Tensor]:
        """log w_i - |x - alpha x_i|^2 / (2 variance), without log w_i if all are equal; in blocks that fit the cache."""
        points, log_weights = self._copies.like(x).values()
        rows = max(1, (2**18 if x.device.type == "cpu" else 2**26) // len(points))
        alpha, variance = (
            v.to(x).expand(len(x))[:, None] if isinstance(v, Tensor) else x.new_full((len(x), 1), v)
            for v in (alpha, variance)
        )
        for part, a, v in zip(*(y.split(rows) for y in (x.flatten(1), alpha, variance)), strict=True):
            # |x - a x_i|^2 = a^2 |x / a - x_i|^2.
            exponent = _SquaredDistances.apply(part / a, points) * (a**2 / (-2 * v))
            yield exponent if self.weights is None else exponent + log_weights

    def __repr__(self) -> str:
        return f"Empirical({len(self.data)} points of shape {tuple(self.event_shape)}, bandwidth={self.bandwidth:g})"


def log_mass(low: Tensor, high: Tensor) -> Tensor:
    """log(Phi(high) - Phi(low)), the log-probability of an interval under N(0, 1), elementwise for low < high."""
    # In the upper tail the same mass is taken from the lower one by symmetry, where log_ndtr keeps its digits.
    flip = low > 0
    upper, lower = torch.where(flip, -low, high), torch.where(flip, -high, low)
    top = torch.special.log_ndtr(upper)
    return top + torch.log(-torch.expm1(torch.special.log_ndtr(lower) - top))


class UniformBoxes(Target):
    """A mixture of uniform laws on axis-parallel boxes, smoothed by bandwidth^2 I.

    For one side [a, b] of a box and noise of standard deviation s = sqrt(alpha^2 bandwidth^2 + sigma^2), the density is
    (Phi((x - alpha a) / s) - Phi((x - alpha b) / s)) / (alpha (b - a)) and the posterior mean is that of a truncated
    normal. Evaluated in float64 whatever the input, because a narrow box under wide noise cancels.

    Args:
        low, high: (K, D) corners, low < high.
        weights: (K,), non-negative; equal by default.
        bandwidth: standard deviation of an added Gaussian.

    Raises:
        ValueError: corners or weights do not fit, or the bandwidth is negative.
    """

    def __init__(self, low: Any, high: Any, weights: Any = None, bandwidth: float = 0.0) -> None:
        low, high = torch.as_tensor(low, dtype=torch.float64), torch.as_tensor(high, dtype=torch.float64)
        if low.ndim != 2 or low.shape != high.shape or not (low < high).all():
            raise ValueError(
                f"boxes have corners low < high of shape (K, D), got {tuple(low.shape)}, {tuple(high.shape)}"
            )
        if not 0 <= bandwidth < math.inf:
            raise ValueError(f"bandwidth is a standard deviation >= 0, got {bandwidth}")
        self.low, self.high, self.bandwidth = low, high, float(bandwidth)
        self.weights = _weights(torch.ones(len(low)) if weights is None else weights, len(low))
        self.event_shape = low.shape[1:]
        self._copies = Copies(low=low, high=high, log_weights=self.weights.log())
        centre = (low + high) / 2
        self.mean = self.weights @ centre
        variance = ((high - low) ** 2 / 12 + (centre - self.mean) ** 2).mean(-1)
        self.std = (self.weights @ variance + self.bandwidth**2).sqrt().item()

    def sample(self, sample_shape: Sequence[int] = (), *, generator: torch.Generator | None = None) -> Tensor:
        box = _chosen(self.weights, _like_generator(sample_shape, generator))
        where = _like_generator((*sample_shape, *self.event_shape), generator)
        low, high = self.low.to(box.device)[box], self.high.to(box.device)[box]
        inside = low + (high - low) * torch.rand(**where, dtype=torch.float64)
        drawn = inside + self.bandwidth * torch.randn(**where, dtype=torch.float64)
        return drawn.to(torch.get_default_dtype())

    def log_prob(self, x: Tensor) -> Tensor:
        y = x.double()
        if self.bandwidth > 0:
            return self._log_joint(y, 1.0, self.bandwidth)[0].logsumexp(-1).to(x)
        p = self._copies.like(y)
        inside = ((y[:, None] >= p["low"]) & (y[:, None] <= p["high"])).all(-1)
        log_volume = (p["high"] - p["low"]).log().sum(-1)
        return (p["log_weights"] - log_volume).masked_fill(~inside, -math.inf).logsumexp(-1).to(x)

    def denoise(self, x: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        y = x.double()
        std = (alpha**2 * self.bandwidth**2 + sigma**2) ** 0.5
        log_joint, a, b, log_mass = self._log_joint(y, alpha, std)
        alpha, std = _columns(y, alpha, std)
        p = self._copies.like(y)
        # Mean of the box coordinate u given x: (x - s z) / alpha with z in [b, a], z a truncated standard normal.
        z = (-(b**2 + LOG_2PI) / 2 - log_mass).exp() - (-(a**2 + LOG_2PI) / 2 - log_mass).exp()
        inside = ((y[:, None] - std * z) / alpha).clamp(p["low"], p["high"])
        clean = inside + alpha * self.bandwidth**2 / std**2 * (y[:, None] - alpha * inside)
        return (log_joint.softmax(-1).unsqueeze(-1) * clean).sum(1).to(x)

    def marginal(self, alpha: float, sigma: float) -> UniformBoxes:
        alpha = float(alpha)
        bandwidth = math.hypot(alpha * self.bandwidth, float(sigma))
        return UniformBoxes(alpha * self.low, alpha * self.high, self.weights, bandwidth)

    def _log_joint(self, y: Tensor, alpha: Coefficient, std: Coefficient) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log w_k p_k(y), a = (y - alpha low) / s, b = (y - alpha high) / s, and log(Phi(a) - Phi(b)) for each side."""
        p = self._copies.like(y)
        alpha, std = _columns(y, alpha, std)
        a, b = (y[:, None] - alpha * p["low"]) / std, (y[:, None] - alpha * p["high"]) / std
        mass = log_mass(b, a)
        size = (alpha * (p["high"] - p["low"])).log().sum(-1)
        return p["log_weights"] + mass.sum(-1) - size, a, b, mass

    def __repr__(self) -> str:
        return f"UniformBoxes({len(self.low)} boxes in {self.low.shape[1]} dimensions)"


def from_log_density(
    log_density: Callable[[Tensor], Tensor], low: Sequence[float], high: Sequence[float], cells: int = 64
) -> Empirical:
    """The law of a density known up to a constant, p(x) ~ exp(f(x)) in a box, as kernels on a lattice of points.

    Points are delta = max(high - low) / cells apart. Kernels have standard deviation h = 3/4 delta, which leaves 1e-4 of
    the lattice's ripples; weights are p - h^2 / 2 Laplacian p, by finite differences, which undoes the kernels' widening, so
    that the error of the density is O(h^4). Warns if the lattice is coarse for the density.

    Args:
        log_density: (n, D) float64 -> (n,) log-density, e.g. a distribution's `log_prob`; -inf where the density is 0.
        low, high: corners of the box, D numbers each; what lies outside of it is left out.
        cells: number of cells along the longest side. The cost of a score is proportional to the number of points with
            mass, at most cells^D.

    Raises:
        ValueError: the corners do not make a box, there are over 4 million cells, or the function returns another shape,
            NaN, +inf or only -inf.
    """
    points, counts, delta = _lattice(low, high, cells)
    with torch.no_grad():
        log_p = torch.as_tensor(log_density(points)).double()
    if log_p.shape != points.shape[:1] or not (log_p < math.inf).all() or log_p.max() == -math.inf:
        raise ValueError(f"log_density gives (n,) numbers below +inf, not all -inf, for x of shape {tuple(points.shape)}; "
                         f"got shape {tuple(log_p.shape)}: {log_p.flatten()[:8].tolist()}")  # fmt: skip
    log_p = log_p - log_p.logsumexp(0)
    p = nn.functional.pad(log_p.exp().view(counts), [1, 1] * len(counts))
    laplacian = torch.stack([p.roll(1, d) + p.roll(-1, d) - 2 * p for d in range(p.ndim)]).sum(0)
    width = 0.75  # h / delta
    weights = (p - width**2 / 2 * laplacian)[(slice(1, -1),) * p.ndim].flatten().clamp(min=0)
    kept = weights > 1e-17 * weights.max()
    law = Empirical(points[kept], width * delta.item(), weights[kept])
    probe = _chosen(log_p.exp(), _like_generator((1000,), torch.Generator().manual_seed(0)))
    gap = (law.log_prob(points[probe]) - log_p[probe] + len(counts) * delta.log()).abs().mean().item()
    if gap > 0.05:
        warnings.warn(f"the lattice is coarse for this density: log p errs by {gap:.2g} on average; take a smaller box, or "
                      f"more cells than cells={cells}", stacklevel=2)  # fmt: skip
    return law


def _lattice(low: Sequence[float], high: Sequence[float], cells: int) -> tuple[Tensor, list[int], Tensor]:
    """Points (n, D) at the centres of cubic cells that cover a box, their number along each side, and their distance."""
    corner, opposite = _float64(low), _float64(high)
    if corner.ndim != 1 or corner.shape != opposite.shape or not (corner < opposite).all():
        raise ValueError(f"a box has corners low < high of D numbers each, got {low!r} and {high!r}")
    delta = (opposite - corner).max() / whole("cells", cells, 2)
    counts = ((opposite - corner) / delta - 1e-9).ceil().int().tolist()
    if math.prod(counts) > 2**22:
        raise ValueError(f"a lattice is for one to three dimensions, and has at most 4 million cells: got {counts}")
    axes = [
        (a + b - delta * (n - 1)) / 2 + delta * torch.arange(n)
        for a, b, n in zip(corner, opposite, counts, strict=True)
    ]
    return torch.cartesian_prod(*axes).view(-1, len(counts)), counts, delta


# --- the named toys, each about four units wide -----------------------------------------------------------------------


def ring(
    components: int = 8, radius: float = 4.0, std: float = 0.2, weights: Sequence[float] | None = None
) -> GaussianMixture:
    """Gaussians of standard deviation `std`, equally spaced on a circle, with equal weights by default."""
    if components < 1:
        raise ValueError(f"a ring has at least one component, got {components}")
    angle = 2 * math.pi * torch.arange(components, dtype=torch.float64) / components
    means = radius * torch.stack([angle.cos(), angle.sin()], -1)
    return _isotropic(means, std, torch.ones(components) if weights is None else weights)


def grid(
    side: int = 5, spacing: float = 2.0, std: float = 0.15, weights: Sequence[float] | None = None
) -> GaussianMixture:
    """side x side Gaussians of standard deviation `std` on a square lattice, with equal weights by default."""
    if side < 1:
        raise ValueError(f"a grid has at least one component a side, got {side}")
    axis = spacing * (torch.arange(side, dtype=torch.float64) - (side - 1) / 2)
    return _isotropic(torch.cartesian_prod(axis, axis), std, torch.ones(side**2) if weights is None else weights)


def two_moons(noise: float = 0.15, points: int = 512) -> Empirical:
    """Two interleaved half circles, each a curve of `points` / 2 kernels of width `noise`."""
    angle = _midpoints(points // 2) * math.pi
    outer = torch.stack([angle.cos(), angle.sin()], -1)
    inner = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], -1)
    return Empirical(2 * (torch.cat([outer, inner]) - torch.tensor([0.5, 0.25])), noise)


def swiss_roll(noise: float = 0.12, points: int = 512) -> Empirical:
    """A spiral of one and a half turns, uniform in its angle."""
    angle = 1.5 * math.pi * (1 + 2 * _midpoints(points))
    return Empirical(angle[:, None] / 3.5 * torch.stack([angle.cos(), angle.sin()], -1), noise)


def checkerboard(side: int = 4, width: float = 2.0) -> UniformBoxes:
    """The dark squares of a side x side board with squares of the given width."""
    if side < 2:
        raise ValueError(f"a checkerboard has at least two squares a side, got {side}")
    cells = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    low = width * (cells[cells.sum(-1) % 2 == 0].double() - side / 2)
    return UniformBoxes(low, low + width)


def pinwheel(
    arms: int = 5, radial_std: float = 0.3, rate: float = 0.25, noise: float = 0.1, points: int = 600
) -> Empirical:
    """Arms whose points turn with exp(radius): the warped Gaussians of Johnson et al. 2016, along quantiles of the radius."""
    normal = torch.special.ndtri(_midpoints(points // arms))
    radius = 1 + radial_std * normal
    angle = (2 * math.pi * torch.arange(arms, dtype=torch.float64) / arms)[:, None] + rate * radius.exp()
    return Empirical(2 * torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(0, 1), noise)


def circles(noise: float = 0.12, factor: float = 0.5, points: int = 512) -> Empirical:
    """Two concentric circles of radii 3 and 3 `factor`, equally likely."""
    angle = 2 * math.pi * _midpoints(points // 2)
    circle = 3 * torch.stack([angle.cos(), angle.sin()], -1)
    return Empirical(torch.cat([circle, factor * circle]), noise)


def two_spirals(noise: float = 0.1, points: int = 512) -> Empirical:
    """Two interleaved Archimedean spirals of one and a half turns, uniform in area."""
    angle = 3 * math.pi * _midpoints(points // 2).sqrt()
    arm = angle[:, None] / 3 * torch.stack([-angle.cos(), angle.sin()], -1)
    return Empirical(torch.cat([arm, -arm]), noise)


def s_curve(noise: float = 0.12, points: int = 512) -> Empirical:
    """The profile (sin u, sign(u) (cos u - 1)) of the S-curve, u uniform on [-3 pi / 2, 3 pi / 2]."""
    u = 3 * math.pi * (_midpoints(points) - 0.5)
    return Empirical(1.5 * torch.stack([u.sin(), u.sign() * (u.cos() - 1)], -1), noise)


def anisotropic(
    components: int = 10,
    dimension: int = 64,
    radius: float = 1.0,
    stds: tuple[float, float] = (0.05, 0.5),
    seed: int = 0,
) -> GaussianMixture:
    """Gaussians with random means N(0, radius^2 I), weights and covariances: random axes, log-uniform stds along them."""
    generator = torch.Generator().manual_seed(seed)
    shape, low, high = (components, dimension), math.log(stds[0]), math.log(stds[1])
    means = radius * torch.randn(*shape, generator=generator, dtype=torch.float64)
    axes = torch.linalg.qr(torch.randn(*shape, dimension, generator=generator, dtype=torch.float64))[0]
    variances = (2 * (low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64))).exp()
    covariances = axes @ torch.diag_embed(variances) @ axes.mT
    weights = 0.5 + torch.rand(components, generator=generator, dtype=torch.float64)
    return GaussianMixture(weights, means, (covariances + covariances.mT) / 2)


def digits(bandwidth: float = 0.0) -> Empirical:
    """scikit-learn's 1,797 handwritten digits, (1, 8, 8) in [-1, 1]."""
    from sklearn.datasets import load_digits

    return Empirical(torch.from_numpy(load_digits().images[:, None]) / 8 - 1, bandwidth)


def _midpoints(count: int) -> Tensor:
    """The midpoints of `count` equal cells of [0, 1]."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def _isotropic(means: Tensor, std: float, weights: Any) -> GaussianMixture:
    """Gaussians of standard deviation `std` at `means` (K, D)."""
    if not std > 0:
        raise ValueError(f"std is positive, got {std}")
    return GaussianMixture(weights, means, (std**2 * torch.eye(means.shape[1])).expand(len(means), -1, -1))


TOYS: dict[str, Callable[..., Target]] = {
    toy.__name__: toy
    for toy in (ring, grid, two_moons, swiss_roll, checkerboard, pinwheel, circles, two_spirals, s_curve)
}


def make(name: str, **options: Any) -> Target:
    """The named two-dimensional toy, with its options (see the function of that name).

    Raises:
        ValueError: the name or an option is unknown.
    """
    known = inspect.signature(TOYS[one_of("target", name, TOYS)]).parameters
    if unknown := options.keys() - known.keys():
        raise ValueError(f"target {name!r} has no option {', '.join(sorted(unknown))!r}; it has: {', '.join(known)}")
    return TOYS[name](**options)

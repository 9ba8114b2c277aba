r"""Log-likelihood through the probability-flow ODE, latent codes, and likelihoods of discrete data.

With y = x / alpha, s = sigma / alpha, n = E[eps | x] and u = log s the flow is dy/du = s n. It is integrated in

    z = y / r,  r^2 = s^2 + c^2,   dz/du = s n / r - z s^2 / r^2,   d log p(z) / du = -(sigma tr(dn/dx) - d s^2 / r^2),
    w = -sqrt(log((s^2 + c^2) / (s^2 + k^2))),    c = sqrt(2) sigma_data,  k << c,

in which state and divergence have bounded derivatives at both ends: w is linear in s^2 for s << k, and w and z are linear
in 1 / s for s >> c. With d the dimension of x,

    log p_0(x) = log p_T(x_T) + int div + d log(alpha_T r_T / r_0) + truncation (see `log_likelihood`).

Source: Song et al. 2021, https://arxiv.org/abs/2011.13456, appendix D.2; Chen et al. 2018.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from score_sde.adaptive import whole_lanes
from score_sde.brief import Brief
from score_sde.checks import finite, one_of, tensor, whole
from score_sde.embedded import PAIRS, Norm, SolverError, first_step, integrate, mixed_tolerance
from score_sde.keyed import generator, key
from score_sde.memory import keep_freed_memory
from score_sde.noise import SampleNoise
from score_sde.ode import METHODS as SCIPY
from score_sde.ode import by_scipy
from score_sde.progress import tqdm
from score_sde.score import ScoreModel, checked_condition
from score_sde.sde import expand
from score_sde.solver import PerSample, mean_calls
from score_sde.trace import ExactTrace, Hutchinson, HutchPlusPlus, Trace

__all__ = [
    "GaussianDequantizer",
    "LikelihoodResult",
    "bits_per_dim",
    "decode",
    "dequantize",
    "discrete_log_likelihood",
    "encode",
    "log_likelihood",
    "reconstruction_error",
    "slerp",
]

DIVERGENCES = ("exact", "hutchinson", "hutch++")
ON_DEVICE = ("dopri5", "tsit5", "bosh3")
METHODS = ("adams", *ON_DEVICE, *SCIPY)
TRUNCATIONS = ("none", "tweedie")


class HasLogProb(Protocol):
    """A law with a log-density, e.g. of `torch.distributions` or `score_sde.targets`."""

    def log_prob(self, x: Tensor, /) -> Tensor: ...


@dataclass(frozen=True, repr=False)
class LikelihoodResult(Brief):
    """Log-likelihoods, in nats.

    Attributes:
        log_prob: shape (batch,), float64.
        std_error: of the trace estimate, shape (batch,): 0 for the exact trace, NaN for a single probe, else from the spread
            of the probes. In few dimensions a few probes of +-1 may agree by chance: 0 does not mean exact there.
        nfe: the mean of `calls`, rounded up.
        calls: network calls of each sample, counted, int64 of shape (batch,); equal where samples share their steps. That
            of the truncation is included; a divergence takes no call of its own, only backward passes.
        latent: the codes x(t_max), shape (batch, *event), in x's dtype.
        log_terminal: log p_T of the codes, shape (batch,).
        truncation: the estimate of log p_0(x) - log p_{t_min}(x), shape (batch,), whether or not it was added.
        seconds: wall-clock time.
    """

    log_prob: Tensor
    std_error: Tensor
    nfe: int
    calls: Tensor
    latent: Tensor
    log_terminal: Tensor
    truncation: Tensor
    seconds: float


def log_likelihood(
    model: ScoreModel, x: Tensor, *, divergence: str = "exact", probes: int = 1, method: str = "dopri5",
    rtol: float = 1e-5, atol: float = 1e-5, steps: int | None = None, seed: int | Sequence[int] = 0,
    truncation: str = "tweedie", terminal: str | HasLogProb = "model", sigma_data: float | None = None,
    condition: Mapping[str, Any] | None = None,
) -> LikelihoodResult:  # fmt: skip
    """The log-density of data x under the probability-flow ODE of the model, in nats.

    The flow starts from x_{t_min} = alpha x, so that it gives log p_{s_min}(x), the density of data with noise s_min.
    Bayes' rule at y = x, log p_0(x) = log p_{s_min}(x) + log p(x_0 = x | y = x) - log N(0; 0, s_min^2 I), gives the
    truncation term. For a Gaussian posterior with Tweedie's mean D and variance s_min^2 J, J = tr(dD/dy) / d, it is

        truncation = -d / 2 log J - |x - D|^2 / (2 J s_min^2) = -s_min^2 / 2 (Laplacian p) / p + O(s_min^4),

    exact where the data are locally an isotropic Gaussian, at the cost of one call.

    Args:
        model: the score model; a network should be in evaluation mode.
        x: real-valued data, shape (batch, *event_shape). Closed-form models deserve float64.
        divergence: "exact" (one vector-Jacobian product per dimension), "hutchinson" (Rademacher probes; unbiased except in
            the truncation, which is not linear in the trace) or "hutch++" (the trace within a sketched range plus normalised
            probes for the rest: three products per probe, for less variance; Meyer et al. 2021, algorithm 1).
        probes: random vectors per sample, fixed along its path; two or more give a standard error.
        method: "dopri5", "tsit5" or "bosh3", on the device, with an error and a step size for each sample, independent of
            the rest of the batch; one of scipy's adaptive solvers (RK45, DOP853, ...), which control the error of the batch
            as one system; or "adams", the four-step Adams-Bashforth method on a fixed grid of w, one call per step: a
            fixed budget without error control.
        rtol, atol: tolerances of the adaptive solvers. On the device a step's error is the larger of that in z (root mean
            square over dimensions) and that in the log-density per dimension.
        steps: grid steps of "adams" (118, or 128 calls, by default); refused for other methods.
        seed: of the probes; an integer, or one for each sample.
        truncation: "tweedie" adds the term above, "none" leaves it out and returns log p_{s_min}.
        terminal: the law of x(t_max). "model" is the model's own (`ScoreModel.log_terminal`): for an exact score the exact
            marginal, whose distance from a Gaussian is more than rounding (6e-4 nats on VE at sigma_max = 50, data of
            spread 2), for a network the Gaussian that its samplers start from. "prior" is the SDE's. Or a law with
            `log_prob`.
        sigma_data: standard deviation of the data, the model's by default; it sets c and k and so only the cost.
        condition: named conditions for the model.

    Raises:
        TypeError: x holds integers, which have no density, or x and the network differ in dtype, or a condition is unknown.
        ValueError: an option is unknown or out of range, x has another event shape, is empty or not finite.
        SolverError: the solver failed, with its reason, or has not finished after `embedded.MAX_CALLS` calls.
    """
    one_of("divergence", divergence, DIVERGENCES)
    one_of("truncation", truncation, TRUNCATIONS)
    if whole("probes", probes) != 1 and divergence == "exact":
        raise ValueError(f"probes={probes} with divergence='exact': the exact trace takes none, leave it out")
    _check_solver(method, rtol, atol, steps)
    flow = _Flow(model, x, condition, sigma_data)
    flow.trace = trace = _trace(divergence, probes, x, seed)
    law = _terminal_law(model, terminal)
    clock = time.perf_counter()
    z = x.double().flatten(1) / flow.data_scale
    start = torch.cat([z, z.new_zeros((len(x), trace.count))], 1)
    state, calls = _integrate(flow, start, flow.ends, method, rtol, atol, steps)
    latent = flow.latent_scale * state[:, : flow.size].unflatten(1, flow.shape)
    log_terminal, draws = law(latent), state[:, flow.size :]
    stretch = flow.size * math.log(flow.latent_scale / flow.data_scale)
    before = flow.model.calls
    end = _truncation(flow)
    calls = calls + flow.model.calls - before
    log_prob = log_terminal + draws.mean(1) + stretch + (end if truncation == "tweedie" else 0.0)
    exact = torch.zeros_like(log_prob) if divergence == "exact" else torch.full_like(log_prob, math.nan)
    std_error = draws.std(1) / math.sqrt(trace.count) if trace.count > 1 else exact
    nfe, seconds = mean_calls(calls), time.perf_counter() - clock
    return LikelihoodResult(log_prob, std_error, nfe, calls, latent.to(x.dtype), log_terminal, end, seconds)


@torch.no_grad()
def _truncation(flow: _Flow) -> Tensor:
    """-d / 2 log J - |n|^2 / (2 J) at x_{t_min} = alpha x, J = 1 - sigma tr(dn / dx) / d."""
    t = torch.tensor(flow.sde.t_min, dtype=torch.float64)
    x = float(flow.sde.alpha(t)) * flow.x.double().flatten(1)
    noise, slope = flow.noise(x, t, flow.sde.sigma(t), torch.arange(len(x), device=x.device))
    gain = (1 - slope.mean(1) / flow.size).clamp_min(1e-12)
    return -flow.size / 2 * gain.log() - noise.square().sum(1) / (2 * gain)


def encode(
    model: ScoreModel, x: Tensor, *, method: str = "dopri5", rtol: float = 1e-5, atol: float = 1e-5,
    steps: int | None = None, sigma_data: float | None = None, condition: Mapping[str, Any] | None = None,
) -> Tensor:  # fmt: skip
    """The latent codes x(t_max) of data x, in x's shape; arguments and errors as in `log_likelihood`."""
    _check_solver(method, rtol, atol, steps)
    flow = _Flow(model, x, condition, sigma_data)
    z = x.double().flatten(1) / flow.data_scale
    state, _ = _integrate(flow, z, flow.ends, method, rtol, atol, steps)
    return (flow.latent_scale * state).view_as(x).to(x.dtype)


def decode(
    model: ScoreModel, latent: Tensor, *, method: str = "dopri5", rtol: float = 1e-5, atol: float = 1e-5,
    steps: int | None = None, sigma_data: float | None = None, condition: Mapping[str, Any] | None = None,
) -> Tensor:  # fmt: skip
    """The data whose codes x(t_max) are `latent`, in data units and latent's shape: the inverse of `encode`."""
    _check_solver(method, rtol, atol, steps)
    flow = _Flow(model, latent, condition, sigma_data)
    z = latent.double().flatten(1) / flow.latent_scale
    state, _ = _integrate(flow, z, flow.ends[::-1], method, rtol, atol, steps)
    return (flow.data_scale * state).view_as(latent).to(latent.dtype)


def reconstruction_error(model: ScoreModel, x: Tensor, **options: Any) -> Tensor:
    """Root mean square of decode(encode(x)) - x for each sample, shape (batch,); options as in `encode`."""
    return (decode(model, encode(model, x, **options), **options) - x).flatten(1).square().mean(1).sqrt()


def slerp(a: Tensor, b: Tensor, fractions: Tensor | Sequence[float]) -> Tensor:
    """Spherical interpolation sin((1 - f) o) / sin o a + sin(f o) / sin o b, o the angle between a and b, per sample.

    Where sin o vanishes it is linear. a and b of shape (batch, *event) and F fractions give (F, batch, *event), which
    `decode` takes as .flatten(0, 1).
    Source: Shoemake 1985; White 2016, https://arxiv.org/abs/1609.04468.
    """
    f = torch.as_tensor(fractions, dtype=torch.float64, device=a.device).reshape(-1, *[1] * a.ndim)
    u, v = a.double(), b.double()
    cosine = nn.functional.cosine_similarity(u.flatten(1), v.flatten(1)).clamp(-1, 1)
    angle = cosine.acos().reshape(-1, *[1] * (a.ndim - 1))
    straight = angle.sin() < 1e-6
    sine = torch.where(straight, 1, angle.sin())
    of_a = torch.where(straight, 1 - f, ((1 - f) * angle).sin() / sine)
    of_b = torch.where(straight, f, (f * angle).sin() / sine)
    return (of_a * u + of_b * v).to(a.dtype)


# --- discrete data ----------------------------------------------------------------------------------------------------


def bits_per_dim(log_prob: Tensor, event_shape: Sequence[int], bin_width: float) -> Tensor:
    """-log2(p(x) bin_width^d) / d: bits per dimension of data that are quantised in bins of that width, in units of x.

    log_prob is in nats. 8-bit data scaled to [-1, 1] have bins of width 2 / 256 (an offset of 7 bits), to [0, 1] of 1 / 256
    (8 bits).
    Source: Theis et al. 2016, https://arxiv.org/abs/1511.01844, section 3.1.
    """
    if not bin_width > 0:
        raise ValueError(f"bin_width is the positive width of a quantisation bin in the data's units, got {bin_width}")
    return -log_prob / (math.prod(event_shape) * math.log(2)) - math.log2(bin_width)


def dequantize(
    codes: Tensor, generator: torch.Generator, *, bin_width: float, low: float, dtype: torch.dtype = torch.float32
) -> Tensor:  # fmt: skip
    """low + bin_width (codes + u), u uniform on [0, 1): real-valued data from integer codes 0, 1, 2, ..., in codes' shape."""
    _check_codes(codes)
    u = torch.rand(codes.shape, generator=generator, device=codes.device, dtype=torch.float64)
    return (low + bin_width * (codes + u)).to(dtype)


class GaussianDequantizer(nn.Module):
    """Variational dequantisation: u = sigmoid(mean + std eps) in [0, 1], with a mean and a std for each dimension.

    At mean 0 and std 1.7, the start, u is nearly uniform. Source: Ho et al. 2019, https://arxiv.org/abs/1902.00275,
    section 3.1 (a flow there, an elementwise Gaussian here).
    """

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(tuple(event_shape), dtype=torch.float64))
        self.log_std = nn.Parameter(torch.full(tuple(event_shape), math.log(1.7), dtype=torch.float64))

    def forward(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """u, and log q(u) of shape (batch,), for standard normal eps of shape (batch, *event_shape)."""
        v = self.mean + self.log_std.exp() * eps
        log_slope = nn.functional.logsigmoid(v) + nn.functional.logsigmoid(-v)
        log_q = -(eps.square() + math.log(2 * math.pi)) / 2 - self.log_std - log_slope
        return v.sigmoid(), log_q.flatten(1).sum(1)

    def fit(
        self, model: ScoreModel, codes: Tensor, *, bin_width: float, low: float, steps: int = 200,
        learning_rate: float = 0.05, seed: int = 0, condition: Mapping[str, Any] | None = None,
    ) -> GaussianDequantizer:  # fmt: skip
        """Maximises E[log p(low + bin_width (codes + u)) - log q(u)], with grad log p the model's score at t_min."""
        _check_codes(codes)
        condition = checked_condition(model, codes.shape, condition, codes.device)
        source = generator(seed, "dequantizer", device=codes.device)
        optimizer = torch.optim.Adam(self.parameters(), learning_rate)
        alpha = float(model.sde.alpha(model.sde.t_min))
        for _ in tqdm(range(steps), desc="dequantizer", delay=2, leave=False):
            eps = torch.randn(codes.shape, generator=source, device=codes.device, dtype=torch.float64)
            with torch.enable_grad():
                u, log_q = self(eps)
                x = low + bin_width * (codes + u)
                with torch.no_grad():
                    slope = alpha * model((alpha * x).to(model.dtype), model.sde.t_min, **condition).score.double()
                loss = (log_q - (slope * x).flatten(1).sum(1)).mean()
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
        return self


def discrete_log_likelihood(
    model: ScoreModel, codes: Tensor, *, bin_width: float, low: float, draws: int = 1,
    dequantizer: GaussianDequantizer | None = None, seed: int = 0, **options: Any,
) -> Tensor:  # fmt: skip
    """A lower bound on log P(codes), in nats, shape (batch,): log mean_k p(x_k) bin_width^d / q(u_k).

    x_k = low + bin_width (codes + u_k), u_k uniform unless a dequantizer is given; more draws raise it towards log P.
    The draws share their probes, so that an estimated trace does not bias the bound; with separate probes the average over
    densities would raise it.
    Source: Theis et al. 2016, https://arxiv.org/abs/1511.01844, section 3.1; Burda et al. 2016,
    https://arxiv.org/abs/1509.00519, eq. 8.

    Args:
        codes: integers 0, 1, 2, ..., shape (batch, *event_shape).
        bin_width, low: width of a bin and lower edge of the first, in the units the model was trained in.
        draws: number of importance-weighted draws.
        dequantizer: draws u and gives its density; uniform if left out.
        seed: of the draws and probes.
        options: for `log_likelihood`.

    Raises:
        TypeError: codes are not integers.
    """
    _check_codes(codes)
    whole("draws", draws)
    source = generator(seed, "dequantisation", device=codes.device)
    terms = []
    for _ in range(draws):
        if dequantizer is None:
            x, log_q = dequantize(codes, source, bin_width=bin_width, low=low, dtype=model.dtype), 0.0
        else:
            eps = torch.randn(codes.shape, generator=source, device=codes.device, dtype=torch.float64)
            with torch.no_grad():
                u, log_q = dequantizer(eps)
            x = (low + bin_width * (codes + u)).to(model.dtype)
        terms.append(log_likelihood(model, x, seed=seed, **options).log_prob - log_q)
    volume = math.prod(codes.shape[1:]) * math.log(bin_width)
    return torch.stack(terms).logsumexp(0) - math.log(draws) + volume


# --- the flow ---------------------------------------------------------------------------------------------------------


class _Flow:
    """d(z, div)/dw for float64 states of shape (samples, d + trace.count): z of the flow, then a column for each probe.

    A `score_sde.embedded.Field`: `levels` gives what depends only on w, for w of shape () or (samples,).
    """

    def __init__(
        self, model: ScoreModel, x: Tensor, condition: Mapping[str, Any] | None, sigma_data: float | None
    ) -> None:
        if not tensor("x", x).is_floating_point():
            raise TypeError(f"{x.dtype} data have no density: dequantise them (likelihood.dequantize, or "
                            "discrete_log_likelihood), or pass real numbers")  # fmt: skip
        condition = checked_condition(model, x.shape, condition, x.device)
        if len(x) == 0:
            raise ValueError(f"x has shape {tuple(x.shape)}: give at least one sample")
        finite("x", x)
        weight = next(model.parameters(), x) if isinstance(model, nn.Module) else x
        if weight.dtype != x.dtype:
            raise TypeError(
                f"x is {x.dtype}, the network {weight.dtype}: give x.to({weight.dtype}), or model.to({x.dtype})"
            )
        scale = math.sqrt(2) * (model.data_std if sigma_data is None else sigma_data)
        if not 0 < scale < math.inf:
            raise ValueError(f"sigma_data is the positive standard deviation of the data, got {sigma_data}")
        self.model, self.sde = PerSample(model, condition, len(x)), model.sde
        self.trace: Trace | None = None
        self.x, self.shape, self.size = x, x.shape[1:], math.prod(x.shape[1:])
        self.s_max, self.s_min = self.sde.noise_level_range
        # Near s = 0 a rounding error of n is amplified by (k / s)^2: in single precision k is at most 32 s_min.
        finest = scale / 64 if x.dtype == torch.float64 else min(scale / 64, 32 * self.s_min)
        self.c2, self.k2 = scale**2, finest**2
        self.ends = (self._w(self.s_min), self._w(self.s_max))
        self.data_scale = self._r(self.s_min)  # x / z for the data, which are y at s_min
        self.latent_scale = float(self.sde.alpha(self.sde.t_max)) * self._r(self.s_max)  # x / z for x(t_max)

    def _w(self, s: float) -> float:
        return -math.sqrt(-math.log1p((self.k2 - self.c2) / (s * s + self.c2)))

    def _r(self, s: float) -> float:
        return math.sqrt(s * s + self.c2)

    def norm(self, rtol: float, atol: float) -> Norm:
        """The larger of the errors of z and of the divergence per dimension, each in units of its tolerance."""
        one = mixed_tolerance(rtol, atol)

        def norm(error: Tensor, y: Tensor, end: Tensor, v: Tensor) -> Tensor:
            d = self.size
            size = one(error[:, :d], y[:, :d], end[:, :d], v)
            if self.trace is None:
                return size
            return torch.maximum(size, one(error[:, d:] / d, y[:, d:] / d, end[:, d:] / d, v))

        return norm

    def levels(self, u: Tensor) -> tuple[Tensor, ...]:
        """Time and coefficients at w = u, of shape () or (samples,)."""
        return whole_lanes(self._levels, u) if u.ndim else self._levels(u)

    def _levels(self, u: Tensor) -> tuple[Tensor, ...]:
        ratio = torch.expm1(-u * u)
        s = ((self.k2 - self.c2) / ratio - self.c2).clamp_min(0).sqrt().clamp(self.s_min, self.s_max)
        t = self.sde.time_at_noise_level(s).clamp(self.sde.t_min, self.sde.t_max)
        r2 = s * s + self.c2
        speed = -u * (s * s + self.k2) * r2 / (s * s * (self.c2 - self.k2))
        return t, self.sde.alpha(t) * r2.sqrt(), self.sde.sigma(t), speed, speed * s / r2.sqrt(), speed * s * s / r2

    def __call__(self, y: Tensor, level: tuple[Tensor, ...], ids: Tensor) -> Tensor:
        t, scale, sigma, speed, of_noise, of_z = level
        z = y[:, : self.size]
        noise, slope = self.noise(expand(scale, z) * z, t, sigma, ids)
        rate = expand(of_noise, z) * noise - expand(of_z, z) * z
        return torch.cat([rate, expand(speed, z) * slope - expand(of_z, z) * self.size], 1) if self.trace else rate

    def noise(self, x: Tensor, t: Tensor, sigma: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """n and the columns of sigma tr(dn/dx) at flat points x (samples, d), both float64, from one model call."""
        time = t.item() if t.ndim == 0 else t

        def evaluate(v: Tensor) -> Tensor:
            return self.model.predict(v, time, ids).noise

        at = x.unflatten(1, self.shape).to(self.x.dtype)
        if self.trace is None:
            return evaluate(at).double().flatten(1), x[:, :0]
        noise, pull = torch.func.vjp(evaluate, at)  # type: ignore[misc]
        gain = expand(sigma, at.flatten(1))
        slope = self.trace(lambda v: gain * pull(v.unflatten(1, self.shape))[0].flatten(1), ids)
        return noise.double().flatten(1), slope


def _terminal_law(model: ScoreModel, terminal: str | HasLogProb) -> Callable[[Tensor], Tensor]:
    if not isinstance(terminal, str):
        return partial(_log_prob_of, terminal)
    if terminal not in ("model", "prior"):
        raise ValueError(f"terminal is 'model', 'prior' or a law with log_prob, got {terminal!r}")
    if terminal == "model":
        return model.log_terminal
    return lambda latent: torch.distributions.Normal(0.0, model.sde.prior_std).log_prob(latent).flatten(1).sum(1)


def _log_prob_of(law: HasLogProb, latent: Tensor) -> Tensor:
    log_prob = law.log_prob(latent).double()
    if log_prob.shape != latent.shape[:1]:
        raise ValueError(f"terminal gives a log-density of shape {tuple(log_prob.shape)} for {len(latent)} codes: give a law "
                         f"of whole events, e.g. torch.distributions.Independent(law, {latent.ndim - 1})")  # fmt: skip
    return log_prob


def _trace(divergence: str, probes: int, x: Tensor, seed: int | Sequence[int]) -> Trace:
    if divergence == "exact":
        return ExactTrace(x.flatten(1))
    # Keyed apart from samplers' noise: probes equal to the noise that x was sampled from would not be independent of x.
    if np.ndim(seed):  # a seed for each sample
        noise = SampleNoise([key(one, "probes") for one in seed])  # type: ignore[union-attr]
    else:
        noise = SampleNoise.of_run(key(int(seed), "probes"), range(len(x)))  # type: ignore[arg-type]
    stream = noise.open((len(x), math.prod(x.shape[1:])), x.dtype, x.device)
    kind, needed = (Hutchinson, probes) if divergence == "hutchinson" else (HutchPlusPlus, 2 * probes)
    return kind(torch.stack([stream(0, draw) for draw in range(needed)]))


# --- integration ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _integrate(
    flow: _Flow, start: Tensor, ends: tuple[float, float], method: str, rtol: float, atol: float, steps: int | None
) -> tuple[Tensor, Tensor]:
    """The state at ends[1], and the network calls of each sample."""
    keep_freed_memory()
    model, before = flow.model, flow.model.calls
    if method in ON_DEVICE:
        model.check_apart()
        pair = PAIRS[method]()
        first = first_step(pair, *ends, rtol + atol)
        found = integrate(flow, pair, start, *ends, flow.norm(rtol, atol), first, spent=lambda: model.calls)
        return found.y, found.calls
    ids = torch.arange(len(start), device=start.device)

    def field(w: float, state: Tensor) -> Tensor:
        return flow(state, flow.levels(torch.tensor(w, dtype=torch.float64)), ids)

    if method == "adams":
        end = _adams(field, start, ends, steps or 118)
        if lost := int((~end.isfinite().all(1)).sum()):
            raise SolverError(f"the flow of {lost} of {len(end)} samples is not finite: the model's outputs are wrong, or too "
                               "few steps are taken")  # fmt: skip
    else:
        end = by_scipy(field, start, ends, method, rtol, atol)[-1]
    return end, torch.full_like(ids, model.calls - before)


def _adams(field: Callable[[float, Tensor], Tensor], state: Tensor, ends: tuple[float, float], steps: int) -> Tensor:
    """Adams-Bashforth of order four, started by three Runge-Kutta steps (Hairer et al. 1993, section III.1)."""
    h = (ends[1] - ends[0]) / steps
    past: list[Tensor] = []
    for i in range(steps):
        w = ends[0] + i * h
        past = [field(w, state), *past[:3]]
        if len(past) < 4:
            k1 = past[0]
            k2 = field(w + h / 2, state + h / 2 * k1)
            k3 = field(w + h / 2, state + h / 2 * k2)
            k4 = field(w + h, state + h * k3)
            state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        else:
            state = state + h / 24 * (55 * past[0] - 59 * past[1] + 37 * past[2] - 9 * past[3])
    return state


def _check_solver(method: str, rtol: float, atol: float, steps: int | None) -> None:
    one_of("method", method, METHODS)
    if not (rtol > 0 and atol > 0):
        raise ValueError(f"tolerances are positive, got {rtol=} and {atol=}")
    if steps is not None and (method != "adams" or steps < 4):
        raise ValueError(
            f"steps={steps} with method={method!r}: steps >= 4 go with method='adams', tolerances with others"
        )


def _check_codes(codes: Tensor) -> None:
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise TypeError(f"codes are integers 0, 1, 2, ..., got {codes.dtype}: real-valued data go to log_likelihood")

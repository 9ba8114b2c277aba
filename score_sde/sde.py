r"""Forward noising processes.

Every process of this package is a linear SDE whose transition kernel from clean data is Gaussian and isotropic:

    dx_t = f(t) x_t dt + g(t) dw_t,        p(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I),
    f = d log(alpha) / dt,                 g^2 = d sigma^2 / dt - 2 f sigma^2 = -2 sigma^2 dlambda / dt,

with the half log signal-to-noise ratio lambda(t) = log(alpha(t) / sigma(t)), strictly decreasing. Two functions of
time, `alpha` and `sigma`, therefore determine the process; models are trained and sampled at times in [t_min, t_max].
Constructors raise ValueError where an option is out of range; `SDE.check` refuses a schedule that cannot be used.
Source: Song et al. 2021, https://arxiv.org/abs/2011.13456, section 3.4 and appendix B; Kingma et al. 2021,
https://arxiv.org/abs/2107.00630.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from score_sde.checks import number, whole
from score_sde.copies import Copies

Time = Tensor | float


def as_time(t: Time) -> Tensor:
    """A time as a tensor: floats become float64 scalars, integers float64, floating-point tensors stay as they are."""
    return t if isinstance(t, Tensor) and t.is_floating_point() else torch.as_tensor(t, dtype=torch.float64)


def expand(v: Tensor, x: Tensor) -> Tensor:
    """Reshapes v of shape () or (batch,) so that it multiplies x of shape (batch, *event), in x's dtype and device."""
    if v.ndim > 1 or (v.ndim == 1 and v.shape[0] not in (1, x.shape[0])):
        raise ValueError(f"a per-sample value has shape () or ({x.shape[0]},) here, not {tuple(v.shape)}")
    return v.to(x).reshape(v.shape + (1,) * (x.ndim - v.ndim))


def derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Derivative of a function that is elementwise in time.

    Each value depends only on its own time, so the gradient of their sum gives all derivatives in one backward pass, at a
    fifth of the cost of forward mode (jvp). (A vjp from ones would import torch's compiler, a second at its first call.)
    """
    return torch.func.grad(lambda times: function(times).sum())(t)


def _of_tensor(function: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Time], Tensor]:
    @functools.wraps(function)
    def method(self: Any, t: Time) -> Tensor:
        return function(self, as_time(t))

    return method


def _root(falling: Callable[[Tensor], Tensor], value: Tensor, low: float, high: float) -> Tensor:
    """The t in [low, high] with falling(t) = value, elementwise, for a continuous and decreasing function.

    Brackets come from a table of nodes that are dense at both ends; then 12 steps of the Illinois method, in which the
    secant point replaces the end whose residual has the same sign, and the residual of an end that stays twice is halved.
    The t with the least residual is returned. Source: Dowell & Jarratt 1971, https://doi.org/10.1007/BF01934364.
    """
    nodes = low + (high - low) * torch.linspace(0, math.pi / 2, 513, dtype=value.dtype, device=value.device).sin() ** 2
    table = falling(nodes)
    i = torch.searchsorted(-table, -value).clamp(1, len(nodes) - 1)
    a, b, at_a, at_b = nodes[i - 1], nodes[i], table[i - 1] - value, table[i] - value
    best, least, side = torch.where(at_a.abs() < at_b.abs(), a, b), torch.minimum(at_a.abs(), at_b.abs()), 0 * value
    for _ in range(12):
        t = (a * at_b - b * at_a) / (at_b - at_a)
        t = torch.where((t >= a) & (t <= b), t, (a + b) / 2)
        residual = falling(t) - value
        best, least = torch.where(residual.abs() < least, t, best), torch.minimum(residual.abs(), least)
        after = residual > 0
        at_a, at_b = (torch.where(after, residual, torch.where(side < 0, at_a / 2, at_a)),
                      torch.where(after, torch.where(side > 0, at_b / 2, at_b), residual))  # fmt: skip
        a, b, side = torch.where(after, t, a), torch.where(after, b, t), torch.where(after, 1.0, -1.0)
    return best


class SDE(ABC):
    """A linear forward SDE dx = f(t) x dt + g(t) dw, given by the `alpha` and `sigma` of its kernel.

    A subclass defines `alpha(t)` and `sigma(t)` with torch operations, elementwise in `t`, and the class attributes
    `t_min` (least noise at which models are trained and sampled) and `t_max` (where sampling starts). Everything else
    follows; a closed form may be overridden where it is known. `alpha` and `sigma` always receive a tensor, on any device: a
    table of your own must follow it there, `self.table.to(t)`.

    All methods take `t` as a float or as a tensor of shape () or (batch,), of any float dtype and on any device, and
    return a tensor of the same shape.
    """

    t_min: float = 1e-3
    t_max: float = 1.0

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in {"alpha", "sigma"} & vars(cls).keys():
            setattr(cls, name, _of_tensor(vars(cls)[name]))

    @abstractmethod
    def alpha(self, t: Time) -> Tensor:
        """Scale of the clean data: E[x_t | x_0] = alpha(t) x_0."""

    @abstractmethod
    def sigma(self, t: Time) -> Tensor:
        """Standard deviation of the noise: Var[x_t | x_0] = sigma(t)^2 I."""

    def drift(self, t: Time) -> Tensor:
        """Coefficient f(t) = d log(alpha) / dt of the drift f(t) x."""
        return derivative(lambda u: self.alpha(u).log(), as_time(t))

    def diffusion(self, t: Time) -> Tensor:
        """Diffusion g(t) = sigma(t) sqrt(-2 dlambda / dt)."""
        t = as_time(t)
        return self.sigma(t) * (-2 * derivative(self.half_log_snr, t)).sqrt()

    def half_log_snr(self, t: Time) -> Tensor:
        """lambda(t) = log(alpha(t) / sigma(t)), strictly decreasing in t."""
        return self.alpha(t).log() - self.sigma(t).log()

    def snr(self, t: Time) -> Tensor:
        """The signal-to-noise ratio alpha^2 / sigma^2 = exp(2 lambda), for data of unit variance."""
        return (2 * self.half_log_snr(t)).exp()

    def noise_level(self, t: Time) -> Tensor:
        """s(t) = sigma(t) / alpha(t) = exp(-lambda), the noise of x / alpha in the data's unit: EDM's sigma."""
        return (-self.half_log_snr(t)).exp()

    def time_at_noise_level(self, level: Time) -> Tensor:
        """The time t at which s(t) takes the given positive value; the inverse of `noise_level`."""
        return self.time_at(-as_time(level).log())

    @property
    def half_log_snr_range(self) -> tuple[float, float]:
        """lambda where sampling starts and where it ends: (lambda(t_max), lambda(t_min))."""
        first, last = self.half_log_snr(torch.tensor([self.t_max, self.t_min], dtype=torch.float64)).tolist()
        return first, last

    @property
    def noise_level_range(self) -> tuple[float, float]:
        """s where sampling starts and where it ends: (s(t_max), s(t_min))."""
        first, last = self.noise_level(torch.tensor([self.t_max, self.t_min], dtype=torch.float64)).tolist()
        return first, last

    def time_at(self, half_log_snr: Time) -> Tensor:
        """The time t at which lambda(t) takes the given value; the inverse of `half_log_snr`.

        Where a subclass has no closed form it is found numerically, to float64's rounding of lambda unless the slope of
        lambda changes a hundredfold within a thousandth of the interval. Values beyond those at t_min and t_max give times
        outside [t_min, t_max] (by the closed form, here by the tangent at the end), so that a grid can refuse them.
        """
        target = as_time(half_log_snr)
        value = target.double()
        t = _root(self.half_log_snr, value, self.t_min, self.t_max)
        ends = torch.stack(
            [torch.full((), end, dtype=value.dtype, device=value.device) for end in (self.t_min, self.t_max)]
        )
        near = 1e-9 * (ends.flip(0) - ends)  # a difference quotient costs a thirtieth of the derivative
        level = self.half_log_snr(ends)
        change = self.half_log_snr(ends + near) - level
        change = torch.where(change == 0, -near, change)  # flat: a slope of 1, so that no gradient is NaN
        beyond = ends + (value.unsqueeze(-1) - level) * near / change
        t = torch.where(value > level[0], beyond[..., 0], torch.where(value < level[1], beyond[..., 1], t))
        return t.to(target.dtype)

    def perturb(self, x0: Tensor, t: Time, noise: Tensor) -> Tensor:
        """x_t = alpha(t) x_0 + sigma(t) noise, for x_0 and noise of shape (batch, *event)."""
        t = as_time(t)
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * noise

    def transition_kernel(self, t: Time, s: Time) -> tuple[Tensor, Tensor]:
        """Scale and standard deviation of the exact p(x_s | x_t) = N(scale x_t, std^2 I), for s noisier than t.

        scale = alpha_s / alpha_t and std^2 = sigma_s^2 - scale^2 sigma_t^2 = -sigma_s^2 expm1(2 (lambda_s - lambda_t)).
        """
        t, s = as_time(t), as_time(s)
        ratio = torch.expm1(2 * (self.half_log_snr(s) - self.half_log_snr(t)))
        return self.alpha(s) / self.alpha(t), self.sigma(s) * (-ratio).sqrt()

    def transition(self, x: Tensor, t: Time, s: Time, noise: Tensor) -> Tensor:
        """A draw of the exact forward transition p(x_s | x_t), s noisier than t (NaN otherwise)."""
        scale, std = self.transition_kernel(t, s)
        return expand(scale, x) * x + expand(std, x) * noise

    @property
    def prior_std(self) -> float:
        """Standard deviation of the prior, by default sigma(t_max)."""
        return self.sigma(self.t_max).item()

    def prior(self, event_shape: Sequence[int]) -> Independent:
        """The law N(0, prior_std^2 I) from which sampling starts, as a `torch.distributions` object."""
        loc = torch.zeros(tuple(event_shape))
        return Independent(Normal(loc, torch.full_like(loc, self.prior_std)), len(loc.shape))

    def check(self) -> None:
        """Refuses a schedule that cannot be used, before any work is done.

        Raises:
            ValueError: a value is not finite or not positive, lambda does not decrease, drift or diffusion are not finite
                within the range, or t_min >= t_max.
        """
        name = type(self).__name__
        if not 0 <= self.t_min < self.t_max:
            raise ValueError(f"{name} needs 0 <= t_min < t_max, got t_min={self.t_min} and t_max={self.t_max}")
        t = torch.linspace(self.t_min, self.t_max, 257, dtype=torch.float64)
        values = [_values(self, part, t) for part in ("alpha", "sigma")]
        change = self.half_log_snr(t).diff()
        if (change[1:-1] > 0).all():
            raise ValueError(f"{name}: log(alpha / sigma) grows with t, but t_min is the data end and t_max the "
                             "noise end: write the schedule with t_min + t_max - t in place of t")  # fmt: skip
        for part, given in zip(("alpha", "sigma"), values, strict=True):
            bad = ~(torch.isfinite(given) & (given > 0))
            if bad.any():
                raise ValueError(f"{name}.{part}({t[bad][0].item():.6g}) is {given[bad][0].item()}: alpha and sigma must be "
                                 f"finite and positive on [t_min, t_max] = [{self.t_min:g}, {self.t_max:g}]; "
                                 "if only an end is not, move it inwards")  # fmt: skip
        if (rising := change >= 0).any():
            raise ValueError(f"{name}: log(alpha / sigma) does not decrease at t={t[:-1][rising][0].item():.6g}: "
                             "noise must grow with t")  # fmt: skip
        for part in ("drift", "diffusion"):
            _check_rate(self, part, t)

    def __repr__(self) -> str:
        options = ", ".join(
            f"{name}={value}"
            for name, value in vars(self).items()
            if isinstance(value, int | float) and not name.startswith("_")
        )
        return f"{type(self).__name__}({options})"


def _values(sde: SDE, part: str, t: Tensor) -> Tensor:
    """alpha or sigma at the times t, or a ValueError where it is not elementwise in them or not torch's."""
    name = f"{type(sde).__name__}.{part}"
    try:
        given = getattr(sde, part)(t)
        values = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}(t) fails for a tensor of times ({error}): write it with torch's functions, "
                         "e.g. torch.cos(t) for math.cos(t)") from error  # fmt: skip
    if values.shape != t.shape:
        raise ValueError(f"{name}(t) has shape {tuple(values.shape)} for t of shape {tuple(t.shape)}: "
                         "make it elementwise in t, e.g. torch.ones_like(t) for a constant")  # fmt: skip
    if not isinstance(given, Tensor):
        raise ValueError(f"{name}(t) is of type {type(given).__name__}: write it with torch's functions, "
                         "e.g. torch.cos(t) for numpy.cos(t)")  # fmt: skip
    return values


def _check_rate(sde: SDE, part: str, t: Tensor) -> None:
    """Refuses, with ValueError, a drift or diffusion that fails or is not finite between t[0] and t[-1]."""
    name, inside = f"{type(sde).__name__}.{part}", t[1:-1]
    try:
        values = torch.as_tensor(getattr(sde, part)(t)).expand(t.shape)[1:-1]
    except RuntimeError as error:
        raise ValueError(f"{name}(t), a derivative of alpha and sigma, fails ({error}): write these with "
                         "torch's functions, e.g. torch.cos(t) for numpy.cos(t)") from error  # fmt: skip
    if (bad := ~torch.isfinite(values)).any():
        raise ValueError(f"{name}({inside[bad][0].item():.6g}) is not finite; it is a derivative of alpha and sigma: "
                         "keep both branches of every torch.where in them finite, or define it yourself")  # fmt: skip


def _positive_and_ordered(owner: str, **ends: float) -> None:
    (low_name, low), (high_name, high) = ends.items()
    if isinstance(low, str) or isinstance(high, str) or not 0 < low < high < math.inf:
        raise ValueError(f"{owner} needs numbers 0 < {low_name} < {high_name}, "
                         f"got {low_name}={low!r} and {high_name}={high!r}")  # fmt: skip


class _LinearBeta(SDE):
    """The alpha that VP and sub-VP share: log alpha(t) = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2."""

    prior_std = 1.0  # of the limit law

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3) -> None:
        _positive_and_ordered(type(self).__name__, beta_min=beta_min, beta_max=beta_max)
        self.beta_min, self.beta_max, self.t_min = float(beta_min), float(beta_max), number("t_min", t_min)

    def beta(self, t: Time) -> Tensor:
        """beta(t) = beta_min + t (beta_max - beta_min)."""
        return self.beta_min + as_time(t) * (self.beta_max - self.beta_min)

    def log_alpha(self, t: Time) -> Tensor:
        """log alpha(t) = -1/2 int_0^t beta."""
        t = as_time(t)
        return t * (t * ((self.beta_min - self.beta_max) / 4) - self.beta_min / 2)

    def alpha(self, t: Time) -> Tensor:
        return self.log_alpha(t).exp()

    def drift(self, t: Time) -> Tensor:
        """f(t) = -beta(t) / 2."""
        return -self.beta(t) / 2

    def _time_when(self, lost: Tensor) -> Tensor:
        # The root of t^2 (beta_max - beta_min) / 2 + t beta_min = lost, lost = -2 log alpha, without cancellation near 0.
        half = self.beta_min / 2
        return lost / ((lost * ((self.beta_max - self.beta_min) / 2) + half**2).sqrt() + half)


class VPSDE(_LinearBeta):
    """Variance preserving: dx = -beta(t) x / 2 dt + sqrt(beta(t)) dw, sigma^2 = 1 - alpha^2.

    The continuous limit of DDPM (Ho et al. 2020). Source: Song et al. 2021, eq. 11 and appendix C.

    Args:
        beta_min, beta_max: noise rates at t = 0 and t = 1.
        t_min: the least time used in training and sampling; sigma(1e-3) = 0.0105 with the default rates.
    """

    def sigma(self, t: Time) -> Tensor:
        return (-torch.expm1(2 * self.log_alpha(t))).sqrt()

    def diffusion(self, t: Time) -> Tensor:
        """g(t) = sqrt(beta(t))."""
        return self.beta(t).sqrt()

    def half_log_snr(self, t: Time) -> Tensor:
        log_alpha = self.log_alpha(t)
        return log_alpha - (-torch.expm1(2 * log_alpha)).log() / 2

    def time_at(self, half_log_snr: Time) -> Tensor:
        # sigma^2 / alpha^2 = exp(-2 lambda) gives -2 log alpha = softplus(-2 lambda).
        return self._time_when(torch.nn.functional.softplus(-2 * as_time(half_log_snr), threshold=1e9))

    def time_at_noise_level(self, level: Time) -> Tensor:
        return self._time_when(as_time(level).square().log1p())


class SubVPSDE(_LinearBeta):
    """Sub-VP: the drift of VP with g^2 = beta(t) (1 - alpha(t)^4), so that sigma = 1 - alpha^2, the square of VP's.

    Source: Song et al. 2021, eq. 29 to 32.

    Args:
        beta_min, beta_max: noise rates at t = 0 and t = 1.
        t_min: the least time used in training and sampling; sigma(1e-3) = 1.1e-4 with the default rates.
    """

    def sigma(self, t: Time) -> Tensor:
        return -torch.expm1(2 * self.log_alpha(t))

    def diffusion(self, t: Time) -> Tensor:
        """g(t) = sqrt(beta(t) (1 - alpha(t)^4))."""
        return (-self.beta(t) * torch.expm1(4 * self.log_alpha(t))).sqrt()

    def half_log_snr(self, t: Time) -> Tensor:
        log_alpha = self.log_alpha(t)
        return log_alpha - (-torch.expm1(2 * log_alpha)).log()

    def time_at(self, half_log_snr: Time) -> Tensor:
        # 1 / alpha - alpha = exp(-lambda) = 2 sinh(-log alpha).
        return self._time_when(2 * torch.asinh((-as_time(half_log_snr)).exp() / 2))


class VESDE(SDE):
    """Variance exploding: alpha = 1, sigma(t) = sigma_min (sigma_max / sigma_min)^t, the continuous limit of SMLD.

    sigma(0) = sigma_min, not 0: data count as already smoothed by sigma_min. Source: Song et al. 2021, eq. 9 and
    appendix C.

    Args:
        sigma_min, sigma_max: noise levels at t = 0 and t = 1, in units of the data.
        t_min: the least time used in training and sampling.
    """

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0, t_min: float = 1e-5) -> None:
        _positive_and_ordered(type(self).__name__, sigma_min=sigma_min, sigma_max=sigma_max)
        self.sigma_min, self.sigma_max, self.t_min = float(sigma_min), float(sigma_max), number("t_min", t_min)
        self._log_ratio = math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Time) -> Tensor:
        return torch.ones_like(as_time(t))

    def sigma(self, t: Time) -> Tensor:
        return self.sigma_min * (as_time(t) * self._log_ratio).exp()

    def drift(self, t: Time) -> Tensor:
        """f(t) = 0."""
        return torch.zeros_like(as_time(t))

    def diffusion(self, t: Time) -> Tensor:
        """g(t) = sigma(t) sqrt(2 log(sigma_max / sigma_min))."""
        return self.sigma(t) * math.sqrt(2 * self._log_ratio)

    def half_log_snr(self, t: Time) -> Tensor:
        return -math.log(self.sigma_min) - as_time(t) * self._log_ratio

    def time_at(self, half_log_snr: Time) -> Tensor:
        return (-math.log(self.sigma_min) - as_time(half_log_snr)) / self._log_ratio


class CosineSDE(SDE):
    """Variance preserving with the cosine schedule: alpha(t) = c(t) / c(0), c(t) = cos(pi / 2 (t + s) / (1 + s)).

    `t_max = 0.9946`, where sigma / alpha is about 119; beyond it the rate diverges (Lu et al. 2022, appendix D).
    Source: Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, eq. 17.

    Args:
        s: the offset that keeps the rate from vanishing at t = 0.
        t_min: the least time used in training and sampling.
    """

    t_max = 0.9946
    prior_std = 1.0  # of the limit law

    def __init__(self, s: float = 0.008, t_min: float = 1e-3) -> None:
        if not 0 <= number("s", s) < 1:
            raise ValueError(f"CosineSDE needs an offset 0 <= s < 1, got s={s}")
        self.s, self.t_min = float(s), number("t_min", t_min)
        self._rate = math.pi / 2 / (1 + self.s)
        self._start = self.s * self._rate  # the angle at t = 0

    def alpha(self, t: Time) -> Tensor:
        return ((as_time(t) + self.s) * self._rate).cos() / math.cos(self._start)

    def sigma(self, t: Time) -> Tensor:
        # cos(a)^2 - cos(b)^2 = sin(b - a) sin(b + a), and b - a is t's own angle: no cancellation near t = 0.
        angle = (as_time(t) + self.s) * self._rate
        return ((as_time(t) * self._rate).sin() * (angle + self._start).sin()).sqrt() / math.cos(self._start)

    def time_at(self, half_log_snr: Time) -> Tensor:
        # tan^2(angle) = (sigma^2 cos^2(start) + alpha^2 sin^2(start)) / (alpha^2 cos^2(start)). Small times keep their
        # digits because angle - start is found from its own sine.
        lmbda, start = as_time(half_log_snr), self._start
        alpha, sigma = torch.sigmoid(2 * lmbda).sqrt(), torch.sigmoid(-2 * lmbda).sqrt()
        cosine = alpha * math.cos(start)
        sine = (math.sin(start) ** 2 + (sigma * math.cos(start)) ** 2).sqrt()
        difference = (sigma * math.cos(start)) ** 2 / (sine * math.cos(start) + cosine * math.sin(start))
        return torch.atan2(difference, cosine * math.cos(start) + sine * math.sin(start)) / self._rate


class KarrasSDE(SDE):
    """The noise level as time: alpha = 1, sigma(t) = t, so that dx = sqrt(2 t) dw.

    Source: Karras et al. 2022 (EDM), https://arxiv.org/abs/2206.00364, section 3.

    Args:
        sigma_min, sigma_max: noise levels (and times) between which models are trained and sampled.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        _positive_and_ordered(type(self).__name__, sigma_min=sigma_min, sigma_max=sigma_max)
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)
        self.t_min, self.t_max = self.sigma_min, self.sigma_max

    def alpha(self, t: Time) -> Tensor:
        return torch.ones_like(as_time(t))

    def sigma(self, t: Time) -> Tensor:
        return as_time(t).clone()

    def drift(self, t: Time) -> Tensor:
        """f(t) = 0."""
        return torch.zeros_like(as_time(t))

    def diffusion(self, t: Time) -> Tensor:
        """g(t) = sqrt(2 t)."""
        return (2 * as_time(t)).sqrt()

    def time_at(self, half_log_snr: Time) -> Tensor:
        return (-as_time(half_log_snr)).exp()


class RectifiedFlow(SDE):
    """The straight path x_t = (1 - t) x_0 + t noise of rectified flow and flow matching.

    Used on [t_min, t_max] inside (0, 1): at t = 1 the signal-to-noise ratio is 0 and f is infinite. `alpha` and
    `sigma` themselves are exact at both ends.
    Source: Liu et al. 2023, https://arxiv.org/abs/2209.03003; Lipman et al. 2023, https://arxiv.org/abs/2210.02747.

    Args:
        t_min, t_max: the times between which models are trained and sampled.
    """

    def __init__(self, t_min: float = 1e-3, t_max: float = 0.999) -> None:
        if not 0 < number("t_min", t_min) < number("t_max", t_max) < 1:
            raise ValueError(f"RectifiedFlow needs 0 < t_min < t_max < 1, got t_min={t_min} and t_max={t_max}")
        self.t_min, self.t_max = float(t_min), float(t_max)

    def alpha(self, t: Time) -> Tensor:
        return 1 - as_time(t)

    def sigma(self, t: Time) -> Tensor:
        return as_time(t).clone()

    def drift(self, t: Time) -> Tensor:
        """f(t) = -1 / (1 - t)."""
        return -1 / (1 - as_time(t))

    def diffusion(self, t: Time) -> Tensor:
        """g(t) = sqrt(2 t / (1 - t))."""
        t = as_time(t)
        return (2 * t / (1 - t)).sqrt()

    def time_at(self, half_log_snr: Time) -> Tensor:
        return torch.sigmoid(-as_time(half_log_snr))


class DiscreteSDE(SDE):
    """A ladder of noise levels, as DDPM and SMLD define them, made continuous in time.

    Time is the ladder's index: t = 0 is the least noisy level, t = num_steps - 1 the noisiest; between two levels
    lambda is interpolated linearly. With `variance_preserving`, alpha^2 = sigmoid(2 lambda) and sigma^2 = 1 - alpha^2;
    otherwise alpha = 1 and sigma = exp(-lambda).

    Args:
        half_log_snr: lambda at the levels, shape (num_steps,), strictly decreasing.
        variance_preserving: DDPM's scaling (True) or SMLD's (False).

    Raises:
        ValueError: fewer than two levels, values that are not finite, or levels that do not grow noisier.
    """

    t_min = 0.0

    def __init__(self, half_log_snr: Tensor | Sequence[float], variance_preserving: bool = True) -> None:
        ladder = torch.as_tensor(half_log_snr, dtype=torch.float64)
        if ladder.ndim != 1 or len(ladder) < 2:
            raise ValueError(f"a ladder has shape (num_steps,) with num_steps >= 2, got {tuple(ladder.shape)}")
        if not torch.isfinite(ladder).all() or (ladder.diff() >= 0).any():
            raise ValueError(
                "a ladder's levels must be finite and grow noisier with the index, no two equal: order them so"
            )
        self.ladder, self.variance_preserving = ladder, variance_preserving
        self.num_steps = len(ladder)
        self.t_max = float(self.num_steps - 1)
        self._copies = Copies(ladder=ladder)

    @classmethod
    def from_betas(cls, betas: Tensor | Sequence[float]) -> DiscreteSDE:
        """The ladder alpha_t^2 = prod_{i <= t} (1 - beta_i) of a variance-preserving chain, each beta in (0, 1)."""
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if not ((betas > 0) & (betas < 1)).all():
            raise ValueError("every beta of a ladder lies strictly between 0 and 1")
        log_alpha_bar = torch.log1p(-betas).cumsum(0)
        return cls((log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))) / 2)

    @classmethod
    def ddpm(cls, num_steps: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02) -> DiscreteSDE:
        """Linear betas from beta_1 to beta_T, given for 1,000 steps and scaled by 1000 / num_steps otherwise.

        Source: Ho et al. 2020, https://arxiv.org/abs/2006.11239, section 4.
        """
        scale = 1000 / whole("num_steps", num_steps, 2)
        if not 0 < number("beta_1", beta_1) < number("beta_T", beta_T) or beta_T * scale >= 1:
            raise ValueError(
                f"DDPM needs 0 < beta_1 < beta_T < num_steps / 1000, got {beta_1=}, {beta_T=}, {num_steps=}"
            )
        return cls.from_betas(torch.linspace(beta_1 * scale, beta_T * scale, num_steps, dtype=torch.float64))

    @classmethod
    def cosine(cls, num_steps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> DiscreteSDE:
        """beta_i = min(1 - c((i + 1) / N)^2 / c(i / N)^2, max_beta), c(t) = cos(pi / 2 (t + s) / (1 + s)).

        Source: Nichol & Dhariwal 2021, eq. 17.
        """
        t = torch.arange(whole("num_steps", num_steps, 2) + 1, dtype=torch.float64) / num_steps
        alpha_bar = ((t + s) / (1 + s) * math.pi / 2).cos() ** 2
        return cls.from_betas((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta))

    @classmethod
    def smld(cls, sigmas: Tensor | Sequence[float]) -> DiscreteSDE:
        """Noise levels of annealed Langevin dynamics, alpha = 1; given in either order (NCSN lists the largest first).

        Source: Song & Ermon 2019, https://arxiv.org/abs/1907.05600.
        """
        sigmas = torch.as_tensor(sigmas, dtype=torch.float64)
        if sigmas.ndim != 1 or not (sigmas > 0).all():
            raise ValueError("SMLD's noise levels are a list of positive numbers")
        return cls(-sigmas.sort().values.log(), variance_preserving=False)

    @classmethod
    def geometric(cls, sigma_min: float = 0.01, sigma_max: float = 50.0, num_steps: int = 1000) -> DiscreteSDE:
        """SMLD's geometric sequence sigma_i = exp(linspace(log sigma_min, log sigma_max, num_steps))."""
        _positive_and_ordered("a geometric ladder", sigma_min=sigma_min, sigma_max=sigma_max)
        ends = math.log(sigma_min), math.log(sigma_max)
        return cls.smld(torch.linspace(*ends, whole("num_steps", num_steps, 2), dtype=torch.float64).exp())

    @classmethod
    def overlapping(
        cls,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        event_shape: Sequence[int] = (3, 32, 32),
        overlap: float = 0.5,
    ) -> DiscreteSDE:
        """The shortest geometric sequence in which neighbouring levels share `overlap` of their samples (NCSNv2, technique 2).

        For noise of D = prod(event_shape) elements |x| / sigma is nearly N(sqrt D, 1/2), so that neighbours sigma and
        gamma sigma overlap by Phi(sqrt(2 D) (gamma - 1) + 3 gamma) - Phi(sqrt(2 D) (gamma - 1) - 3 gamma); gamma is the
        greatest with `overlap`. On CIFAR-10 the paper's 0.5 gives 220 levels; its published 232 correspond to 0.566.
        Source: Song & Ermon 2020, https://arxiv.org/abs/2006.09011, section 3.2.

        Raises ValueError where overlap is not in (0, 0.99), 0 < sigma_min < sigma_max does not hold, or D is below 5.
        """
        if not 0 < number("overlap", overlap) < 0.99:
            raise ValueError(
                f"overlap, the share of samples that neighbours have in common, lies in (0, 0.99), got {overlap}"
            )
        _positive_and_ordered("a geometric ladder", sigma_min=sigma_min, sigma_max=sigma_max)
        root = math.sqrt(2 * math.prod(event_shape))
        if root <= 3:
            raise ValueError(f"in {math.prod(event_shape)} dimensions neighbours overlap whatever their ratio: NCSNv2's rule "
                             "needs 5 or more; choose the number of levels by DiscreteSDE.geometric (sde=smld)")  # fmt: skip
        from scipy.optimize import brentq  # half a second to import
        from scipy.special import ndtr

        def excess(gap: float) -> float:
            return ndtr(root * gap + 3 * (1 + gap)) - ndtr(root * gap - 3 * (1 + gap)) - overlap

        gap = brentq(excess, 0.0, 50.0, xtol=1e-15)  # gamma - 1: the share falls from 0.997 to nothing
        levels = 1 + math.log(sigma_max / sigma_min) / math.log1p(gap)
        return cls.geometric(sigma_min, sigma_max, max(math.ceil(levels), 2))

    def half_log_snr(self, t: Time) -> Tensor:
        t = as_time(t)
        ladder = self._copies.like(t)["ladder"]
        index = t.detach().floor().long().clamp(0, self.num_steps - 2)
        return torch.lerp(ladder[index], ladder[index + 1], t - index)

    def alpha(self, t: Time) -> Tensor:
        lmbda = self.half_log_snr(t)
        return (1 + (-2 * lmbda).exp()).rsqrt() if self.variance_preserving else torch.ones_like(lmbda)

    def sigma(self, t: Time) -> Tensor:
        lmbda = self.half_log_snr(t)
        return (1 + (2 * lmbda).exp()).rsqrt() if self.variance_preserving else (-lmbda).exp()

    def time_at(self, half_log_snr: Time) -> Tensor:
        lmbda = as_time(half_log_snr)
        ladder = self._copies.like(lmbda)["ladder"]
        index = (torch.searchsorted(-ladder, -lmbda.detach().contiguous()) - 1).clamp(0, self.num_steps - 2)
        low, high = ladder[index], ladder[index + 1]
        return index + (lmbda - low) / (high - low)

    @property
    def prior_std(self) -> float:
        """1 for a variance-preserving ladder, else the largest sigma."""
        return 1.0 if self.variance_preserving else float(self.sigma(self.t_max))

    def __repr__(self) -> str:
        return f"DiscreteSDE(num_steps={self.num_steps}, variance_preserving={self.variance_preserving})"

r"""The probability-flow ODE with adaptive steps on the device; each sample has its own time, step size and error control.

As dx/dt the ODE is stiff. It is mild in the standardised state Y as a function of u,

    Y = S x / sqrt(S^2 alpha^2 + sigma^2),   sinh(u) = S alpha / sigma,   dY/du = D(x, t) - tanh(u) Y,

S the data's standard deviation. Y has the spread of the data at every noise level, and is constant for Gaussian data of
that spread; u is about S alpha / sigma in strong noise and log(2 S alpha / sigma) near the data; f and g do not occur.
`embedded` integrates it, each sample independently.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from score_sde.checks import one_of, whole
from score_sde.embedded import PAIRS, Exponential, Level, Norm, first_step, integrate, mixed_tolerance, rms
from score_sde.noise import NoiseSource
from score_sde.score import ScoreModel
from score_sde.sde import Time, as_time, expand
from score_sde.solver import ErrorControlled, PerSample, SampleResult, Start, begin, chosen_times, ending, mean_calls

LANES, GRAIN = 64, 2**15
"""A multiple of every vector unit's length, and the number of elements from which torch splits work between threads."""


def whole_lanes(function: Callable[[Tensor], Level], u: Tensor) -> Level:
    """function(u), elementwise, bitwise independent of an element's place in u.

    On a CPU some functions (log1p, sigmoid) differ in the last bit between the vector unit and the scalar loop that does
    the remainder of an array, or of a thread's share. So u is padded to whole vectors, and cut into pieces that are either
    split evenly between the threads or too small to be split.
    """
    if u.device.type != "cpu":
        return function(u)
    filled = torch.nn.functional.pad(u, (0, -len(u) % LANES), value=1.0)
    if len(filled) < GRAIN:
        return tuple(part[: len(u)] for part in function(filled))
    shared = GRAIN * torch.get_num_threads()
    cut = len(filled) - len(filled) % shared
    pieces = [*filled[:cut].split(shared), *filled[cut:].split(GRAIN - LANES)]
    return tuple(torch.cat(part)[: len(u)] for part in zip(*map(function, pieces), strict=True))


class StandardField:
    """dY/du = D(x, t) - tanh(u) Y: the probability-flow ODE in the standardised state (see `score_sde.adaptive`).

    Args:
        model: the score model.
        std: S, the data's standard deviation; a wrong value costs calls, not accuracy.
        like: a tensor with the state's dtype and number of dimensions.
    """

    def __init__(self, model: PerSample, std: float, like: Tensor) -> None:
        self.model, self.std, self.dtype, self.column = model, std, like.dtype, (-1, *[1] * (like.ndim - 1))
        self.sde = model.model.sde

    def u(self, t: Time) -> Tensor:
        """asinh(S alpha / sigma)."""
        return torch.asinh(self.std * self.sde.half_log_snr(as_time(t)).exp())

    def state(self, x: Tensor, t: Time) -> Tensor:
        """The state Y of x at t."""
        return x / expand(self._scale(as_time(t)), x)

    def back(self, y: Tensor, t: Time) -> Tensor:
        """The x of the state Y at t."""
        return y * expand(self._scale(as_time(t)), y)

    def levels(self, u: Tensor) -> Level:
        t, *scales = whole_lanes(self._levels, u)
        return t, *(scale.view(self.column) for scale in scales)

    def _levels(self, u: Tensor) -> Level:
        e = (-u).exp_()
        square = e * e
        tanh = 1 - square  # sinh(u) = (1 - e^2) / 2e and tanh(u) = (1 - e^2) / (1 + e^2)
        t = self.sde.time_at_noise_level(e.mul_(2 * self.std).div_(tanh)).clamp_(self.sde.t_min, self.sde.t_max)
        tanh.div_(square.add_(1))
        return t, self.sde.alpha(t).div_(tanh).to(self.dtype), tanh.to(self.dtype)

    def __call__(self, y: Tensor, level: Level, ids: Tensor) -> Tensor:
        t, scale, tanh = level
        return torch.addcmul(self.model.denoised(y * scale, t, ids), tanh, y, value=-1)

    def norm(self, rtol: float, atol: float) -> Norm:
        return mixed_tolerance(rtol, atol)

    def _scale(self, t: Tensor) -> Tensor:
        """x / Y = sqrt(alpha^2 + sigma^2 / S^2)."""
        return torch.hypot(self.sde.alpha(t), self.sde.sigma(t) / self.std)


class DenoisedField(StandardField):
    """The state z = x / alpha as a function of lambda, and D(x, t) for its rate: `Exponential` adds the rest, -z."""

    def u(self, t: Time) -> Tensor:
        """lambda."""
        return self.sde.half_log_snr(as_time(t))

    def _levels(self, u: Tensor) -> Level:
        t = self.sde.time_at(u).clamp_(self.sde.t_min, self.sde.t_max)
        return t, self.sde.alpha(t).to(self.dtype)

    def __call__(self, y: Tensor, level: Level, ids: Tensor) -> Tensor:
        t, alpha = level
        return self.model.denoised(y * alpha, t, ids)

    def norm(self, rtol: float, atol: float) -> Norm:
        """The tolerance is meant for the standardised state Y = tanh(u) z, as in `StandardField`.

        It is relative to z at the step's end, since after a long step out of noise z at its start is far larger.
        """

        def norm(error: Tensor, y: Tensor, end: Tensor, v: Tensor) -> Tensor:
            tanh = (1 + (-2 * v).exp() / self.std**2).rsqrt().to(self.dtype)
            return rms(error) * tanh / rms(end).mul(tanh).mul_(rtol).add_(atol)

        return norm

    def _scale(self, t: Tensor) -> Tensor:
        """x / z = alpha."""
        return self.sde.alpha(t)


@dataclass(frozen=True, repr=False)
class AdaptiveResult(SampleResult):
    """What an adaptive solver returns; `nfe` is the mean of `calls`, rounded up.

    Attributes:
        calls: network calls of each sample, int64 of shape (batch,).
        rejected: rejected steps of each sample, int64 of shape (batch,).
    """

    calls: Tensor
    rejected: Tensor


class AdaptiveODE(ErrorControlled):
    """The probability-flow ODE by embedded pairs on the device, with a step size for each sample.

    A sample is bitwise independent of the rest of its batch where the model's arithmetic is. Dense output costs no calls.
    "dopri5", "tsit5" and "bosh3" solve the standardised equation of `score_sde.adaptive`; "exponential" integrates the
    denoised prediction over lambda.

    Args:
        method: "dopri5", "tsit5", "exponential" (orders 5, 5 and 4) or "bosh3" (order 3, for loose tolerances).
        rtol, atol: relative and absolute tolerance of a step, in root mean square over a sample's elements, for the
            state scaled to the spread of the data: atol is in units of the data.
        final: "denoise" ends with Tweedie's formula at t_min; "none" keeps the solution, the inverse of `encode`.
        block: number of samples that are integrated at once; None takes what fits a CPU's cache, on a GPU the whole batch.

    Raises:
        ValueError: an option is unknown or a tolerance not positive.
    """

    def __init__(
        self, method: str = "dopri5", rtol: float = 1e-5, atol: float = 1e-5, final: str = "none",
        block: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(rtol, atol, final)
        self.method, self.block = one_of("method", method, PAIRS), None if block is None else whole("block", block)

    @torch.no_grad()
    def sample(
        self, model: ScoreModel, shape: Sequence[int], *, seed: int | None = None, noise: NoiseSource | None = None,
        x_init: Tensor | None = None, condition: Mapping[str, Any] | None = None, trajectory: bool = False,
        progress: bool = False, dtype: torch.dtype | None = None, points: int = 101, times: Tensor | None = None,
    ) -> AdaptiveResult:  # fmt: skip
        """Integrates from prior noise (or `x_init`) at t_max to t_min; arguments as in `Sampler.sample`.

        With `trajectory` the solution is also kept at `points` equally spaced times; with `times`, at these, decreasing and
        in [t_min, t_max].

        Raises:
            ValueError: the times leave [t_min, t_max] or are not ordered.
            SolverError: a step size vanished; see `integrate`.
        """
        start = begin(model, shape, seed, noise, x_init, condition, dtype)
        chosen = chosen_times(trajectory, points, times, model.sde.t_max, model.sde.t_min)
        return self._solve(start, start.times, chosen, progress, self.final)

    @torch.no_grad()
    def encode(
        self, model: ScoreModel, x: Tensor, *, condition: Mapping[str, Any] | None = None, trajectory: bool = False,
        progress: bool = False, points: int = 101, times: Tensor | None = None,
    ) -> AdaptiveResult:  # fmt: skip
        """Integrates data x, taken as x(t_min), to their latent codes x(t_max); `times`, if given, increase.

        Where alpha(t_min) is not near 1, as on a rectified flow, give alpha(t_min) x; `likelihood.encode` does so itself.
        """
        start = begin(model, x.shape, x_init=x, condition=condition)
        chosen = chosen_times(trajectory, points, times, model.sde.t_min, model.sde.t_max)
        return self._solve(start, start.times.flip(0), chosen, progress, "none")

    def _solve(
        self, start: Start, ends: Tensor, times: Tensor | None, progress: bool, final: str
    ) -> AdaptiveResult:  # fmt: skip
        x, model, (t_start, t_end) = start.x, start.model.model, ends.tolist()
        if self.rtol + self.atol < torch.finfo(x.dtype).eps:
            warnings.warn(f"rtol={self.rtol:g} and atol={self.atol:g} are below what {x.dtype} resolves, so the steps follow "
                          "rounding errors: loosen them, or give dtype=torch.float32", stacklevel=4)  # fmt: skip
        clock = time.perf_counter()
        pair = PAIRS[self.method]()
        kind = DenoisedField if isinstance(pair, Exponential) else StandardField
        per_sample = PerSample(model, start.model.condition, len(x))
        per_sample.check_apart()
        field = kind(per_sample, model.data_std, x)
        u_start, u_end = field.u(ends).tolist()
        first = first_step(pair, u_start, u_end, self.rtol + self.atol)
        found = integrate(
            field, pair, field.state(x, t_start), u_start, u_end, field.norm(self.rtol, self.atol), first,
            times=None if times is None else field.u(times), block=self.block, progress=progress,
            spent=lambda: per_sample.calls,
        )  # fmt: skip
        end, last = ending(final, per_sample, field.back(found.y, t_end), t_end)
        path = None
        if found.dense is not None and times is not None:
            path = torch.stack([field.back(y, t) for y, t in zip(found.dense, times.tolist(), strict=True)])
        calls, seconds = found.calls + last, time.perf_counter() - clock
        grid = ends if times is None else times
        return AdaptiveResult(end, mean_calls(calls), seconds, path, grid, calls, found.rejected)

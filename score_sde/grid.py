r"""Time grids: functions of an SDE that return N + 1 times, from t_max to t_min, as a float64 tensor.

A grid says where the network is called; it is data to the sampler. Noise levels are meant in the scaled variable
x / alpha, whose level is s(t) = sigma(t) / alpha(t) = exp(-lambda(t)). Bind the number of steps with
`functools.partial(grid.karras, steps=17)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor

from score_sde.sde import SDE

Grid = Callable[[SDE], Tensor]


def check(times: Tensor, sde: SDE) -> Tensor:
    """The grid itself, as float64 on the CPU, or a ValueError that says what is wrong with it."""
    times = torch.as_tensor(times).detach().to("cpu", torch.float64)
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"a grid is a list of at least two times, got shape {tuple(times.shape)}")
    if not torch.isfinite(sde.half_log_snr(times)).all():
        raise ValueError(f"a grid's times must have a finite noise level in {sde!r}; got times from "
                         f"{times.max().item():g} to {times.min().item():g}")  # fmt: skip
    if times[-1] >= times[0]:
        raise ValueError(f"a grid runs from noise to data, its times decrease; got {times[0].item():g} first and "
                         f"{times[-1].item():g} last: reverse it")  # fmt: skip
    if (times.diff() == 0).any():
        raise ValueError("a grid has two equal times in a row: remove one")
    slack = 1e-9 * (sde.t_max - sde.t_min)
    if times.max() > sde.t_max + slack or times.min() < sde.t_min - slack:
        raise ValueError(f"a grid lies in [t_min, t_max] = [{sde.t_min:g}, {sde.t_max:g}], "
                         f"got times from {times.max().item():g} to {times.min().item():g}")  # fmt: skip
    return times


def _fractions(steps: int) -> Tensor:
    """0, 1 / steps, ..., 1."""
    whole = isinstance(steps, Real) and not isinstance(steps, bool) and 1 <= steps < math.inf and int(steps) == steps
    if not whole:
        raise ValueError(f"a grid needs a whole number steps >= 1, got steps={steps}")
    return torch.linspace(0, 1, int(steps) + 1, dtype=torch.float64)


def _between(sde: SDE, inner: Tensor) -> Tensor:
    """The inner times with the two ends set exactly."""
    return torch.cat([inner.new_tensor([sde.t_max]), inner[1:-1], inner.new_tensor([sde.t_min])])


def uniform(sde: SDE, steps: int) -> Tensor:
    """Equal steps in time; on a `DiscreteSDE` with steps = num_steps - 1, its levels themselves."""
    return _between(sde, sde.t_max + _fractions(steps) * (sde.t_min - sde.t_max))


def quadratic(sde: SDE, steps: int) -> Tensor:
    """Equal steps in sqrt(t), finer near the data (Song et al. 2021, DDIM, https://arxiv.org/abs/2010.02502, D.2)."""
    return _between(sde, (sde.t_max**0.5 + _fractions(steps) * (sde.t_min**0.5 - sde.t_max**0.5)) ** 2)


def log_snr(sde: SDE, steps: int) -> Tensor:
    """Equal steps in lambda = log(alpha / sigma) (Lu et al. 2022, https://arxiv.org/abs/2206.00927, section 4.3)."""
    first, last = sde.half_log_snr(sde.t_max), sde.half_log_snr(sde.t_min)
    return _between(sde, sde.time_at(first + _fractions(steps) * (last - first)))


def karras(sde: SDE, steps: int, rho: float = 7.0) -> Tensor:
    """Equal steps in s^(1 / rho), s = sigma / alpha (Karras et al. 2022, https://arxiv.org/abs/2206.00364, eq. 5).

    EDM's "N steps" are its N noise levels: steps = N - 1 here, and the last step to zero is the sampler's
    `final="denoise"`.
    """
    if not 0 < rho < math.inf:
        raise ValueError(f"the Karras grid needs a finite rho > 0, got rho={rho}")
    first, last = ((-sde.half_log_snr(t) / rho).exp() for t in (sde.t_max, sde.t_min))
    return _between(sde, sde.time_at(-rho * (first + _fractions(steps) * (last - first)).log()))

"""Which times the network is trained at.

A time sampler is a quantile function u -> t(u), increasing in the noise level, applied to u in (0, 1): independent
uniforms, or one in each of `count` equal strata, which makes means over a batch vary far less. Losses are also logged by
the quartile of u. If t has a density p other than the objective's uniform one, it comes with the importance weight
1 / ((t_max - t_min) p(t)).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from score_sde.checks import number
from score_sde.sde import SDE

__all__ = ["ImportanceTimes", "LadderTimes", "LogNormalTimes", "OneLevelTimes", "TimeSampler", "Times", "UniformTimes"]


@dataclass(frozen=True)
class Times:
    """Times t, the u in (0, 1) they are quantiles of, and importance weights; float64, each of shape (count,)."""

    t: Tensor
    u: Tensor
    weight: Tensor


class TimeSampler(ABC):
    """Draws training times, one in each of `count` strata of equal probability unless `stratified` is False."""

    def __init__(self, stratified: bool = True) -> None:
        self.stratified = stratified

    @abstractmethod
    def quantile(self, sde: SDE, u: Tensor) -> Tensor:
        """The time below which a fraction u of the draws falls, float64 of u's shape."""

    def weight(self, sde: SDE, t: Tensor) -> Tensor:
        """The importance weight of a draw; 1 if the sampler's own law is part of the objective."""
        return torch.ones_like(t)

    def check(self, sde: SDE) -> None:  # noqa: B027
        """Raises ValueError for an SDE that these times do not fit."""

    def update(self, times: Times, losses: Tensor) -> None:  # noqa: B027
        """Given the losses (batch,) of the last draw, adapts a law that learns from them."""

    def state_dict(self) -> dict[str, Tensor]:
        """What the sampler has learnt, for a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Restores what `state_dict` returned."""

    def __call__(self, sde: SDE, count: int, generator: torch.Generator) -> Times:
        """Draws `count` times on the generator's device."""
        u = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)
        if self.stratified:
            u = (torch.arange(count, device=u.device) + u) / count
        t = self.quantile(sde, u)
        return Times(t, u, self.weight(sde, t))


class UniformTimes(TimeSampler):
    """t ~ U[t_min, t_max] (stratified: Kingma et al. 2021, https://arxiv.org/abs/2107.00630, appendix I)."""

    def quantile(self, sde: SDE, u: Tensor) -> Tensor:
        return sde.t_min + (sde.t_max - sde.t_min) * u


class OneLevelTimes(TimeSampler):
    """Always the time at which sigma / alpha = level, in units of the data: score matching at one noise level.

    Raises ValueError if the level is not positive; `check`, if the SDE does not reach it.
    """

    def __init__(self, level: float) -> None:
        super().__init__()
        self.level = number("level", level, above=0)

    def quantile(self, sde: SDE, u: Tensor) -> Tensor:
        t = float(sde.time_at_noise_level(self.level))
        return torch.full_like(u, min(max(t, sde.t_min), sde.t_max))

    def check(self, sde: SDE) -> None:
        high, low = sde.noise_level_range
        if not low <= self.level <= high:
            raise ValueError(
                f"level={self.level} is outside the SDE's noise levels: sigma / alpha is from {low:.3g} to {high:.3g}"
            )


class LogNormalTimes(TimeSampler):
    """ln(sigma / alpha) ~ N(mean, std^2), truncated to the SDE's range (Karras et al. 2022, table 1: -1.2 and 1.2).

    Raises ValueError if std is not positive; `check`, if less than 1 % of the normal law lies within the SDE's range.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2, stratified: bool = True) -> None:
        super().__init__(stratified)
        self.mean, self.std = number("mean", mean), number("std", std, above=0)

    def quantile(self, sde: SDE, u: Tensor) -> Tensor:
        low, high = self._range(sde)
        log_sigma = self.mean + self.std * torch.special.ndtri(low + (high - low) * u)
        return sde.time_at(-log_sigma).clamp(sde.t_min, sde.t_max)

    def check(self, sde: SDE) -> None:
        low, high = self._range(sde)
        if high - low < 0.01:
            raise ValueError(
                f"LogNormalTimes(mean={self.mean}, std={self.std}) has {high - low:.1e} of its probability within the noise "
                "levels of the SDE: move the mean of ln(sigma / alpha) into its range"
            )

    def _range(self, sde: SDE) -> tuple[float, float]:
        """Probability of the normal law below the least and below the greatest noise level."""
        high, low = (math.erfc((self.mean + lmbda) / (self.std * math.sqrt(2))) / 2 for lmbda in sde.half_log_snr_range)
        return low, high


class LadderTimes(TimeSampler):
    """The indices 0 .. num_steps - 1 of a `DiscreteSDE`, uniformly; `check` raises ValueError for any other SDE."""

    def quantile(self, sde: SDE, u: Tensor) -> Tensor:
        return (u * sde.num_steps).floor()  # type: ignore[attr-defined]

    def check(self, sde: SDE) -> None:
        if not hasattr(sde, "num_steps"):
            raise ValueError(f"LadderTimes needs a DiscreteSDE, {type(sde).__name__} has no ladder: use UniformTimes")


class ImportanceTimes(TimeSampler):
    """p(t) proportional to g^2 / sigma^2, with the weights that keep means over U[t_min, t_max] unbiased.

    As g^2 / sigma^2 = -2 d lambda / dt with lambda = ln(alpha / sigma), this is lambda ~ U[lambda(t_max), lambda(t_min)],
    and p is known in closed form. `LikelihoodWeighting` times the importance weight is then `SimpleWeighting`, up to a
    constant. For a learnt schedule, t and weight carry no gradient: they only estimate the mean
    over uniform t, which does not depend on how t is drawn.
    Song et al. 2021, https://arxiv.org/abs/2101.09258, section 5.1.
    """

    @torch.no_grad()
    def quantile(self, sde: SDE, u: Tensor) -> Tensor:
        first, last = sde.half_log_snr_range
        return sde.time_at(last + (first - last) * u).clamp(sde.t_min, sde.t_max)

    @torch.no_grad()
    def weight(self, sde: SDE, t: Tensor) -> Tensor:
        first, last = sde.half_log_snr_range
        return 2 * (last - first) / (sde.t_max - sde.t_min) * (sde.sigma(t) / sde.diffusion(t)) ** 2

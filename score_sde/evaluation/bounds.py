r"""The variational bound of a score model, term by term on a ladder of times and in continuous time.

For the ladder see `score_sde.training.variational`. As the ladder is refined, the bound becomes

    -log p(x) <= KL(q(x_T | x) || prior) - E log p(x | x_{t_min}) + int E|eps - eps_hat|^2 dlambda

with the integral over [lambda(t_max), lambda(t_min)], estimated with uniformly drawn lambda: likelihood weighting with
importance sampling.
Source: Kingma et al. 2021, https://arxiv.org/abs/2107.00630, eq. 11 to 18; Song et al. 2021, arXiv:2101.09258.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from score_sde.checks import whole
from score_sde.keyed import generator
from score_sde.score import ScoreModel, checked_condition
from score_sde.sde import expand
from score_sde.training.variational import ContinuousDecoder, Decoder, Ladder, Variance, check_variance

__all__ = ["Bound", "continuous_bound", "variational_bound"]


@dataclass(frozen=True)
class Bound:
    """An upper bound on -log p(x), in nats; `likelihood.bits_per_dim(-total, ...)` gives bits per dimension.

    Attributes:
        prior: KL(q(x_T | x) || prior), shape (batch,).
        decoder: -E log p(x | x_{t_min}), shape (batch,).
        steps: the terms in between, shape (K - 1, batch), row i for the step times[i + 1] -> times[i]; in continuous time
            shape (draws, batch), and the integral is their mean.
        times: (K,), float64; empty in continuous time.
        nfe: network calls.
    """

    prior: Tensor
    decoder: Tensor
    steps: Tensor
    times: Tensor
    nfe: int

    @property
    def total(self) -> Tensor:
        """The bound for each sample, shape (batch,)."""
        return self.prior + self.decoder + (self.steps.sum(0) if len(self.times) else self.steps.mean(0))

    @property
    def mean(self) -> float:
        return self.total.mean().item()

    @property
    def std_error(self) -> float:
        """Standard error of the mean, from the data's spread and the bound's own noise; NaN for one sample."""
        return (self.total.std() / math.sqrt(len(self.total))).item()

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """A normal confidence interval of the mean."""
        width = NormalDist().inv_cdf((1 + confidence) / 2) * self.std_error
        return self.mean - width, self.mean + width


@torch.no_grad()
def variational_bound(
    model: ScoreModel, x: Tensor, *, times: Tensor | None = None, variance: Variance = "large",
    decoder: Decoder | None = None, draws: int = 1, seed: int = 0, condition: Mapping[str, Any] | None = None,
) -> Bound:  # fmt: skip
    """DDPM's bound on clean data x, shape (batch, *event); each term is a mean over `draws` draws of x_t.

    Args:
        model: of a DiscreteSDE or, if `times` are given, of any SDE.
        times: (K,) increasing; by default the ladder of a DiscreteSDE.
        variance: "small", "large" (DDPM's two choices), "learned" (the network's own, on its training ladder) or a callable
            (x_t, index) -> w, e.g. `StepVariance`.
        decoder: by default `ContinuousDecoder()`; `DiscretisedDecoder(...)` for data on a lattice.

    Raises:
        TypeError: x is not real-valued.
        ValueError: an option is out of range, or x has another event shape.
    """
    condition = _checked(model, x, draws, condition)
    check_variance(variance)
    ladder, decoder = Ladder(model.sde, times), decoder or ContinuousDecoder()
    source = generator(seed, "bound", device=x.device)
    terms = torch.zeros((len(ladder), len(x)), dtype=torch.float64, device=x.device)
    for i, t in enumerate(ladder.times.tolist()):
        index = torch.full((len(x),), i, device=x.device)
        for _ in range(draws):
            prediction = model(model.sde.perturb(x, t, _noise(x, source)), t, **condition)
            terms[i] += ladder.term(x.double(), prediction, index, variance, decoder) / draws
    return Bound(ladder.prior(x), terms[0], terms[1:], ladder.times, len(ladder) * draws)


@torch.no_grad()
def continuous_bound(
    model: ScoreModel, x: Tensor, *, decoder: Decoder | None = None, draws: int = 32, seed: int = 0,
    condition: Mapping[str, Any] | None = None,
) -> Bound:  # fmt: skip
    """The bound in continuous time on clean data x, from `draws` values of lambda for each sample, one in each stratum.

    The decoder is N(D(x_{t_min}), (sigma / alpha)^2 I) at t_min. Raises as `variational_bound` does.
    """
    condition = _checked(model, x, draws, condition)
    sde, decoder = model.sde, decoder or ContinuousDecoder()
    ends = torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)
    first, last = sde.half_log_snr_range
    source = generator(seed, "bound", device=x.device)
    steps = torch.zeros((draws, len(x)), dtype=torch.float64, device=x.device)
    for i in range(draws):
        u = (i + torch.rand(len(x), generator=source, dtype=torch.float64, device=x.device)) / draws
        t = sde.time_at(first + (last - first) * u).clamp(sde.t_min, sde.t_max)
        noise = _noise(x, source)
        error = noise - model(sde.perturb(x, t, noise), t, **condition).noise
        steps[i] = (last - first) * error.double().square().flatten(1).sum(1)
    denoised = model(sde.perturb(x, sde.t_min, _noise(x, source)), sde.t_min, **condition).denoised
    level = expand(torch.tensor(-2 * last), x.double())
    decoded = decoder(x.double(), denoised.double(), level).flatten(1).sum(1)
    return Bound(Ladder(sde, ends).prior(x), decoded, steps, ends[:0], draws + 1)


def _noise(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def _checked(model: ScoreModel, x: Tensor, draws: int, condition: Mapping[str, Any] | None) -> dict[str, Any]:
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype} data: scale it to the units of the model (and give DiscretisedDecoder)")
    whole("draws", draws)
    return checked_condition(model, x.shape, condition, x.device)

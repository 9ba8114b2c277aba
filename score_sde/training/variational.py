r"""DDPM as variational inference: the terms of its bound on a ladder of noise levels 0 < 1 < ... < K - 1.

    -log p(x) <= KL(q(x_{K-1} | x) || prior) + sum_{t>0} KL(q(x_{t-1} | x_t, x) || p(x_{t-1} | x_t)) - E log p(x | x_0)

q(x_s | x_t, x) = N(a x_t + b x, small I), b = alpha_s rho, small = sigma_s^2 rho, rho = 1 - SNR_t / SNR_s,
p(x_s | x_t) = N(a x_t + b D, v I) with log v = w log large + (1 - w) log small, large = sigma_t^2 rho (DDPM's beta_t).
Each term is |x - D|^2 b^2 / (2 v) + d / 2 (small / v - 1 - log(small / v)), in nats.
Source: Ho et al. 2020, https://arxiv.org/abs/2006.11239, eq. 5 to 13; Nichol & Dhariwal 2021, arXiv:2102.09672.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from score_sde.checks import one_of, whole
from score_sde.data import Batch
from score_sde.keyed import generator
from score_sde.prediction import Prediction
from score_sde.score import ClosedForm, LearnedScore, ScoreModel
from score_sde.sde import SDE, expand
from score_sde.targets import log_mass
from score_sde.training.draws import draw
from score_sde.training.objective import LabelDropout, Losses, excess
from score_sde.training.times import Times, TimeSampler

__all__ = [
    "ContinuousDecoder",
    "Decoder",
    "DiscretisedDecoder",
    "Ladder",
    "LossAwareTimes",
    "StepVariance",
    "VariationalObjective",
]

VARIANCES = ("small", "large", "learned")
Variance = str | Callable[[Tensor, Tensor], Tensor]
"""One of "small", "large", "learned" (the network's own), or a callable (x_t, index) -> w, (batch,) or (batch, *event)."""


NO_VARIANCE = (
    "variance='learned' needs a network with a variance head: give it learned_variance=true, or use 'small' or 'large'"
)


class Decoder(Protocol):
    """-log p(x | x_0) in nats, element by element, for a Gaussian of the given mean and log-variance."""

    def __call__(self, x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor: ...


class ContinuousDecoder:
    """A Gaussian density, for real-valued data."""

    def __call__(self, x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        return ((x - mean).square() * (-log_variance).exp() + log_variance + math.log(2 * math.pi)) / 2


class DiscretisedDecoder:
    """The mass of a Gaussian in the bin around x; the outermost bins reach to infinity (Ho et al. 2020, eq. 13).

    Args:
        bin_width: distance between neighbouring values of x; 2 / 255 for 8-bit data scaled to [-1, 1] by 2 k / 255 - 1.
        low, high: the least and the greatest value.
    """

    def __init__(self, bin_width: float = 2 / 255, low: float = -1.0, high: float = 1.0) -> None:
        if not (bin_width > 0 and high - low > bin_width):
            raise ValueError(f"bin_width must be between 0 and high - low, got {bin_width=}, {low=}, {high=}")
        self.bin_width, self.low, self.high = bin_width, low, high

    def __call__(self, x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        half, scale = self.bin_width / 2, (-log_variance / 2).exp()
        above = torch.where(x > self.high - half, math.inf, (x + half - mean) * scale)
        below = torch.where(x < self.low + half, -math.inf, (x - half - mean) * scale)
        return -log_mass(below, above)


class Ladder:
    """The coefficients of the bound at K times, least noisy first; entry 0 is the decoder's, p(x | x_0) = N(D, v I).

    For entry 0, b = 1, large = sigma_0^2 (DDPM's beta_1) and small is that of entry 1, as in the published code.

    Args:
        sde: the forward process.
        times: (K,), increasing; by default all levels of a DiscreteSDE.

    Raises:
        ValueError: fewer than two times, times that do not increase, or no times for an SDE other than a DiscreteSDE.
    """

    def __init__(self, sde: SDE, times: Tensor | None = None) -> None:
        if times is None and not hasattr(sde, "num_steps"):
            raise ValueError(
                f"{type(sde).__name__} has no ladder: take a DiscreteSDE, e.g. sde=ddpm, or give increasing times"
            )
        self.times = torch.arange(sde.num_steps) if times is None else torch.as_tensor(times)  # type: ignore[attr-defined]
        self.times = self.times.to("cpu", torch.float64)
        if self.times.ndim != 1 or len(self.times) < 2 or not (self.times.diff() > 0).all():
            raise ValueError(f"times are two or more increasing numbers, got shape {tuple(self.times.shape)}")
        self.sde, alpha, sigma, lmbda = sde, *(f(self.times) for f in (sde.alpha, sde.sigma, sde.half_log_snr))
        rho = -torch.expm1(2 * lmbda.diff())
        first = torch.ones(1, dtype=torch.float64)
        self.of_data = torch.cat([first, alpha[:-1] * rho])
        small, large = sigma[:-1] ** 2 * rho, sigma[1:] ** 2 * rho
        self.log_small = torch.cat([small[:1], small]).log()
        self.log_large = torch.cat([sigma[:1] ** 2, large]).log()
        self.alpha, self.sigma = alpha, sigma

    def __len__(self) -> int:
        return len(self.times)

    def prior(self, x: Tensor) -> Tensor:
        """KL(q(x_{K-1} | x) || N(0, prior_std^2 I)), shape (batch,)."""
        ratio = (float(self.sigma[-1]) / self.sde.prior_std) ** 2
        mean = float(self.alpha[-1]) / self.sde.prior_std
        return ((mean * x.double()).square() + ratio - 1 - math.log(ratio)).flatten(1).sum(1) / 2

    def log_variance(self, variance: Variance, prediction: Prediction, index: Tensor) -> Tensor:
        """log v at the steps `index` (batch,), shaped to broadcast with x_t. Raises ValueError if the network learns none."""
        x_t = prediction.x
        small, large = (expand(part.to(x_t.device)[index], x_t) for part in (self.log_small, self.log_large))
        if variance in ("small", "large"):
            return small if variance == "small" else large
        w = prediction.variance_weight if variance == "learned" else variance(x_t, index)  # type: ignore[operator]
        if w is None:
            raise ValueError(NO_VARIANCE)
        w = expand(w, x_t) if w.ndim == 1 else w
        return w * large + (1 - w) * small

    def term(
        self, x: Tensor, prediction: Prediction, index: Tensor, variance: Variance, decoder: Decoder, *,
        only_variance: bool = False,
    ) -> Tensor:  # fmt: skip
        """Term `index` of each sample's bound in nats, shape (batch,); term 0 is the decoder's.

        Args:
            x: clean data.
            prediction: the model's at x_t, noised to the levels `index`.
            index: (batch,), integers.
            variance: v (see `Variance`).
            decoder: -log p(x | x_0).
            only_variance: gradients flow through the variance alone, not through the mean.
        """
        log_v, denoised = self.log_variance(variance, prediction, index), prediction.denoised.to(x.dtype)
        denoised = denoised.detach() if only_variance else denoised
        small, of_data = (expand(part.to(x.device)[index], x) for part in (self.log_small, self.of_data))
        ratio = small - log_v
        kl = (of_data.square() * (x - denoised).square() * (-log_v).exp() + torch.expm1(ratio) - ratio) / 2
        first = expand(index == 0, x).bool()
        # The decoder sees level 0 alone: elsewhere the probability of a bin may underflow to 0, whose gradient is NaN.
        nats = decoder(x, torch.where(first, denoised, x), torch.where(first, log_v, 0.0))
        return torch.where(first, nats, kl).flatten(1).sum(1)


def check_variance(variance: Variance) -> None:
    """Raises ValueError for a variance that is neither a known name nor a callable."""
    if variance not in VARIANCES and not callable(variance):
        raise ValueError(f"variance is 'small', 'large', 'learned' or a callable (x_t, index) -> w, got {variance!r}")


class StepVariance:
    """A weight w for each step, set to its optimum by `fit`; w = 0 is "small", w = 1 is "large".

    The optimum is v = small + b^2 E|x - D|^2 / d. Source: Bao et al. 2022 (Analytic-DPM),
    https://arxiv.org/abs/2201.06503, theorem 1.
    """

    def __init__(self, num_steps: int) -> None:
        self.w = torch.full((num_steps,), 0.5, dtype=torch.float64)

    def __call__(self, x_t: Tensor, index: Tensor) -> Tensor:
        return self.w.to(index.device)[index]

    @torch.no_grad()
    def fit(self, model: ScoreModel, x: Tensor, ladder: Ladder, seed: int = 0) -> StepVariance:
        """Sets w to its optimum on data x, with one call of the model for each step. Returns self."""
        if len(ladder) != len(self.w):
            raise ValueError(f"this variance has {len(self.w)} steps, the ladder {len(ladder)}: make them equal")
        source = generator(seed, "step variance", device=x.device)
        for i, t in enumerate(ladder.times.tolist()):
            noise = torch.randn(x.shape, generator=source, dtype=x.dtype, device=x.device)
            error = (x - model(ladder.sde.perturb(x, t, noise), t).denoised).double().square().mean().item()
            small, large, b = (float(part[i]) for part in (ladder.log_small, ladder.log_large, ladder.of_data))
            best = math.log((math.exp(small) if i else 0.0) + b**2 * error)
            self.w[i] = (best - small) / (large - small)
        return self


class LossAwareTimes(TimeSampler):
    """Ladder indices drawn with p_t proportional to sqrt(E[L_t^2]), and weighted by 1 / (K p_t).

    The mean is over the last `history` losses of each step; draws are uniform until every step has that many, and keep a
    share of 0.001 uniform. The losses are part of a checkpoint. Source: Nichol & Dhariwal 2021, eq. 18.
    """

    def __init__(self, num_steps: int, history: int = 10, stratified: bool = True) -> None:
        super().__init__(stratified)
        self.losses = torch.zeros((whole("num_steps", num_steps), whole("history", history)), dtype=torch.float64)
        self.counts = torch.zeros(len(self.losses), dtype=torch.int64)

    @property
    def probabilities(self) -> Tensor:
        """p_t, float64 of shape (num_steps,)."""
        steps, history = self.losses.shape
        p = self.losses.square().mean(1).sqrt()
        learnt = (self.counts.min() >= history) & (p.sum() > 0)
        return torch.where(learnt, 0.999 * p / p.sum() + 0.001 / steps, 1 / steps)

    def check(self, sde: SDE) -> None:
        if getattr(sde, "num_steps", None) != len(self.losses):
            raise ValueError(f"these LossAwareTimes need a DiscreteSDE of {len(self.losses)} steps, got {sde}")

    def quantile(self, sde: SDE, u: Tensor) -> Tensor:
        self._move(u.device)
        return torch.searchsorted(self.probabilities.cumsum(0)[:-1], u, right=True).double()

    def weight(self, sde: SDE, t: Tensor) -> Tensor:
        self._move(t.device)
        return 1 / (len(self.losses) * self.probabilities[t.long()])

    def update(self, times: Times, losses: Tensor) -> None:
        """Stores each loss, without its importance weight, over the oldest of its step; non-finite ones as 0."""
        index, order = times.t.long().sort(stable=True)
        loss = torch.nan_to_num(losses.detach().double() / times.weight, 0.0, 0.0, 0.0)[order]
        self._move(index.device)
        many = index.bincount(minlength=len(self.counts))
        rank = torch.arange(len(index), device=index.device) - (many.cumsum(0) - many)[index]
        history = self.losses.shape[1]
        latest = rank >= many[index] - history  # of more than `history` at once, the last are stored
        place = index * history + (self.counts[index] + rank) % history
        flat, padded = self.losses.flatten(), torch.where(latest, place, self.losses.numel())
        self.losses = torch.cat([flat, flat[:1]]).index_put((padded,), loss)[:-1].view_as(self.losses)
        self.counts = self.counts + many

    def state_dict(self) -> dict[str, Tensor]:
        return {"losses": self.losses, "counts": self.counts}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.losses, self.counts = state["losses"], state["counts"]

    def _move(self, device: torch.device) -> None:
        self.losses, self.counts = self.losses.to(device), self.counts.to(device)


class VariationalObjective:
    """L = simple L_simple + vlb L_vlb on a DiscreteSDE, in nats per dimension (without the constant prior term).

    L_simple = mean_d |eps - eps_hat|^2, L_vlb = K times the bound's term of the drawn step. Weights (simple, vlb) of (0, 1)
    give L_vlb, (1, 0) L_simple and (1, 0.001) L_hybrid. Beside L_simple the bound trains the variance alone: its mean is
    detached. Diagnostics are both parts, `simple` and `vlb`, and those of `objective.excess`.
    Source: Nichol & Dhariwal 2021, eq. 16 and 17.

    Args:
        simple, vlb: the weights.
        variance: "small", "large" or "learned" (by a network with `learned_variance=True`).
        decoder: p(x | x_0); `ContinuousDecoder` by default.
        target: the closed-form law of the data, for the diagnostics of `objective.excess`.
        label_dropout: the probability with which an example's label or context is dropped (see `LabelDropout`).

    Raises:
        ValueError: an option is unknown; a weight is negative, both are 0 or, with a fixed variance, both positive; the
            model's SDE is not a DiscreteSDE; or its network has no variance head.
    """

    def __init__(
        self, simple: float = 1.0, vlb: float = 0.001, variance: str = "learned", decoder: Decoder | None = None,
        target: ClosedForm | None = None, label_dropout: float = 0.0,
    ) -> None:  # fmt: skip
        one_of("variance", variance, VARIANCES)
        if min(simple, vlb) < 0 or simple + vlb == 0:
            raise ValueError(f"weights are 0 or more and not both 0, got {simple=} and {vlb=}")
        if simple > 0 and vlb > 0 and variance != "learned":
            raise ValueError(f"beside L_simple the bound trains the variance alone, and variance={variance!r} is fixed: "
                             "use vlb=0, simple=0 or variance='learned'")  # fmt: skip
        self.simple, self.vlb, self.variance, self.target = simple, vlb, variance, target
        self.decoder, self.label_dropout = decoder or ContinuousDecoder(), LabelDropout(label_dropout)
        self._ladders: dict[SDE, Ladder] = {}

    def check(self, model: LearnedScore, time_sampler: TimeSampler) -> None:
        """Raises ValueError, before training, for what the first step would not accept."""
        Ladder(model.sde)
        _check_steps(time_sampler(model.sde, 64, torch.Generator().manual_seed(0)))
        if self.variance == "learned" and not model.learns_variance:
            raise ValueError(NO_VARIANCE)

    def __call__(self, model: LearnedScore, batch: Batch, times: Times, generator: torch.Generator) -> Losses:
        """Losses in float32."""
        sde, x, index = model.sde, batch.x, times.t.long()
        if sde not in self._ladders:
            self._ladders[sde] = Ladder(sde)
            _check_steps(times)
        ladder = self._ladders[sde]
        eps = draw(torch.randn, x.shape, generator, device=x.device, dtype=x.dtype)
        x_t = sde.perturb(x, times.t, eps)
        prediction = model(x_t, times.t, **self.label_dropout(batch.condition, generator))
        noise = prediction.noise.float()
        simple = (noise - eps).square().flatten(1).mean(1)
        vlb = ladder.term(x, prediction, index, self.variance, self.decoder, only_variance=self.simple > 0)
        vlb = vlb.float() * (len(ladder) / x[0].numel())
        parts = {"simple": simple.detach(), "vlb": vlb.detach()}
        parts |= excess(self.target, model, x_t, times.t, eps, noise.detach())
        return Losses(times.weight.float() * (self.simple * simple + self.vlb * vlb), parts)


def _check_steps(times: Times) -> None:
    if (times.t != times.t.round()).any():
        raise ValueError("the bound is over the steps of a ladder, but the times drawn are not its indices: "
                         "use time_sampler=ladder (LadderTimes) or loss_aware (LossAwareTimes)")  # fmt: skip

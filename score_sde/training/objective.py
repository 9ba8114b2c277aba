"""Denoising score matching, one form for every network output and every weighting:

    L = E_{x_0, t, eps} w(t) lambda(t) c_out(t)^2 mean_d (F(c_in x_t, c_noise) - F*)_d^2,    x_t = alpha x_0 + sigma eps

lambda is the weighting (see `weighting`), w the importance weight of t (see `times`), and the mean is over the d
dimensions of an event. The error of the predicted noise n splits at the exact n* = E[eps | x_t] into an irreducible part
and an excess, the Fisher divergence, which is all that a network can lower:

    E|eps - n|^2 / d = E|eps - n*|^2 / d + E|n - n*|^2 / d

Vincent 2011; Song et al. 2021, arXiv:2011.13456, eq. 7.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from score_sde.data import Batch
from score_sde.score import ClosedForm, ExactScore, LearnedScore
from score_sde.sde import SDE, expand
from score_sde.training.draws import draw
from score_sde.training.times import Times
from score_sde.training.weighting import SimpleWeighting, Weighting

__all__ = ["DenoisingScoreMatching", "LabelDropout", "Losses", "Objective", "excess"]


@dataclass(frozen=True)
class Losses:
    """The losses of a batch.

    Attributes:
        loss: of each example, shape (batch,); training minimises the mean.
        diagnostics: further values (batch,) by name, without gradients; training logs their means, also by noise level.
    """

    loss: Tensor
    diagnostics: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Sequence[Losses]) -> Losses:
        """The losses of a batch from those of its parts, in order."""
        diagnostics = {name: torch.cat([part.diagnostics[name] for part in parts]) for name in parts[0].diagnostics}
        return cls(torch.cat([part.loss for part in parts]), diagnostics)


class Objective(Protocol):
    """A loss for each example, whose mean training minimises.

    An objective that draws its random numbers by `draws.draw` gives the same losses however a batch is split over
    processes. It may have a method `check(model, time_sampler)` that raises ValueError before training if they do not fit.
    """

    def __call__(self, model: LearnedScore, batch: Batch, times: Times, generator: torch.Generator) -> Losses:
        """The losses of a batch at the given times; all random numbers come from the generator."""


exact_score: Callable[[Any, SDE], ExactScore] = lru_cache(8)(ExactScore)
"""The exact score of a law under an SDE; cached, so that its checks run once rather than at every step."""


@torch.no_grad()
def exact_noise(target: ClosedForm, sde: SDE, x_t: Tensor, t: Tensor) -> Tensor:
    """E[eps | x_t] under a closed-form law of the data, outside autocast: never in half precision."""
    with torch.autocast(x_t.device.type, enabled=False):
        return exact_score(target, sde)(x_t, t).noise


@torch.no_grad()
def excess(
    target: ClosedForm | None, model: LearnedScore, x_t: Tensor, t: Tensor, eps: Tensor, noise: Tensor
) -> dict[str, Tensor]:
    """{"fisher": |n - n*|^2 / d, "irreducible": |eps - n*|^2 / d} of each example, n* the exact E[eps | x_t].

    Args:
        target: the closed-form law of the data; None returns an empty dict.
        x_t, t, eps, noise: noisy points (batch, *event), their times and noise, and the predicted noise n.
    """
    if target is None:
        return {}
    truth = exact_noise(target, model.sde, x_t, t).float()
    pairs = {"fisher": noise.float() - truth, "irreducible": eps.float() - truth}
    return {name: error.square().flatten(1).mean(1) for name, error in pairs.items()}


class LabelDropout:
    """Drops conditions at random, so that one network learns the conditional and the unconditional score.

    With probability `share`, all conditions of an example except `augment` are replaced by their null values: -1 for
    `label`, NaN for `context`, and `nulls[name]` for others (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598).

    Raises:
        ValueError: `share` is outside [0, 1]; when called, the examples have no condition, or one without a null value.
    """

    def __init__(self, share: float, nulls: Mapping[str, float] | None = None) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"label_dropout={share} is a probability: 0 <= label_dropout <= 1")
        self.share, self.nulls = share, {"label": -1, "context": torch.nan, **(nulls or {})}

    def __call__(self, given: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        if not self.share:
            return dict(given)
        # `augment` says how x was transformed, not what it depends on.
        left_out = {name: value for name, value in given.items() if name != "augment"}
        if not left_out:
            raise ValueError(f"label_dropout={self.share}, and the data have no conditions: leave it out")
        if without := sorted(left_out.keys() - self.nulls.keys()):
            raise ValueError(f"label_dropout={self.share} has no null value for the condition {without[0]!r}: give one, "
                             f"nulls={{{without[0]!r}: <the value that means no condition>}}")  # fmt: skip
        first = next(iter(left_out.values()))
        dropped = draw(torch.rand, first.shape[:1], generator, device=first.device) < self.share
        nulls = {
            name: torch.where(expand(dropped, value).bool(), self.nulls[name], _signed(value))
            for name, value in left_out.items()
        }
        return {**given, **nulls}


def _signed(value: Tensor) -> Tensor:
    """uint8, which cannot hold the null value -1, as int64."""
    return value.long() if value.dtype == torch.uint8 else value


class DenoisingScoreMatching:
    """Denoising score matching: the loss of the module's formula for each example.

    Args:
        weighting: lambda; `SimpleWeighting` by default.
        label_dropout: the probability with which an example's conditions are dropped (see `LabelDropout`).
        target: the closed-form law of the (unlabelled) data, for the diagnostics of `excess`.
        nulls: what dropped conditions become, by name, besides -1 for `label` and NaN for `context`.

    Raises:
        ValueError: `label_dropout` is outside [0, 1].
    """

    def __init__(
        self, weighting: Weighting | None = None, label_dropout: float = 0.0, target: ClosedForm | None = None,
        nulls: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        self.weighting, self.target = weighting or SimpleWeighting(), target
        self.label_dropout = LabelDropout(label_dropout, nulls)

    def __call__(self, model: LearnedScore, batch: Batch, times: Times, generator: torch.Generator) -> Losses:
        """Losses in float32; noise and label dropout come from the generator, on the device of the batch."""
        sde, t, x0 = model.sde, times.t, batch.x
        noise = draw(torch.randn, x0.shape, generator, device=x0.device, dtype=x0.dtype)
        target = model.parameterization.target(sde, t, x0, noise)
        x_t = sde.perturb(x0, t, noise)
        prediction = model(x_t, t, **self.label_dropout(batch.condition, generator))
        error = prediction.raw.float() - target
        weight = times.weight * self.weighting(sde, t) * prediction.c_out**2
        loss = weight.float() * error.square().flatten(1).mean(1)
        if self.target is None:
            return Losses(loss)
        # The error of the predicted noise is -alpha c_out / sigma times that of the output.
        scale = expand(prediction.alpha * prediction.c_out / prediction.sigma, error)
        return Losses(loss, excess(self.target, model, x_t, t, noise, noise - scale * error.detach()))

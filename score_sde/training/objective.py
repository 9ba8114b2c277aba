"""Denoising score matching, one form for every network output and every weighting:

    L = E_{x_0, t, eps} w(t) lambda(t) c_out(t)^2 mean_d (F(c_in x_t, c_noise) - F*)_d^2,    x_t = alpha x_0 + sigma eps

lambda is the weighting (see `weighting`), w the importance weight of t (see `times`), the mean runs over the dimensions
of an event. Of E|eps - n|^2 / d, n the predicted noise, E|eps - n*|^2 / d is irreducible and the excess, the Fisher
divergence E|n - n*|^2 / d, is what a network can lower. Vincent 2011; Song et al. 2021, arXiv:2011.13456, eq. 7.
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
    """What an objective says of a batch.

    Attributes:
        loss: of each example, shape (batch,); training minimises the mean.
        diagnostics: by name, without gradients, each of shape (batch,); training logs the means, also by noise level.
    """

    loss: Tensor
    diagnostics: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Sequence[Losses]) -> Losses:
        """Those of parts of a batch as one."""
        diagnostics = {name: torch.cat([part.diagnostics[name] for part in parts]) for name in parts[0].diagnostics}
        return cls(torch.cat([part.loss for part in parts]), diagnostics)


class Objective(Protocol):
    """What training minimises the mean of, and a test of a model may report.

    One that draws by `draws.draw` gives the same losses however a batch is split over processes. A method `check(model,
    time_sampler)`, where it has one, refuses before the first step what does not fit.
    """

    def __call__(self, model: LearnedScore, batch: Batch, times: Times, generator: torch.Generator) -> Losses:
        """The losses of the examples of a batch at their times; all randomness is the generator's."""


exact_score: Callable[[Any, SDE], ExactScore] = lru_cache(8)(ExactScore)
"""The exact score of a law and an SDE, checked once for all steps."""


@torch.no_grad()
def exact_noise(target: ClosedForm, sde: SDE, x_t: Tensor, t: Tensor) -> Tensor:
    """E[eps | x_t] under a closed-form law of the data, in float32 where the network computes in half precision."""
    with torch.autocast(x_t.device.type, enabled=False):
        return exact_score(target, sde)(x_t, t).noise


@torch.no_grad()
def excess(
    target: ClosedForm | None, model: LearnedScore, x_t: Tensor, t: Tensor, eps: Tensor, noise: Tensor
) -> dict[str, Tensor]:
    """{"fisher": |n - n*|^2 / d, "irreducible": |eps - n*|^2 / d} of each example, n* the exact E[eps | x_t].

    Args:
        target: the closed-form law of the data; without one there is nothing to say.
        x_t, t, eps, noise: noisy points (batch, *event), their times and noise, and the predicted noise n.
    """
    if target is None:
        return {}
    truth = exact_noise(target, model.sde, x_t, t).float()
    pairs = {"fisher": noise.float() - truth, "irreducible": eps.float() - truth}
    return {name: error.square().flatten(1).mean(1) for name, error in pairs.items()}


class LabelDropout:
    """Leaves conditions out of examples, so that one network learns the conditional and the unconditional score.

    With probability `share` all conditions of an example, its `augment` labels aside, become their nulls: -1 for `label`,
    NaN for `context`, and what `nulls` says for others, by name (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598).

    Raises:
        ValueError: `share` is outside [0, 1]; when called, examples have no condition, or one without a null.
    """

    def __init__(self, share: float, nulls: Mapping[str, float] | None = None) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"label_dropout={share} is a probability: 0 <= label_dropout <= 1")
        self.share, self.nulls = share, {"label": -1, "context": torch.nan, **(nulls or {})}

    def __call__(self, given: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        if not self.share:
            return dict(given)
        left_out = {name: value for name, value in given.items() if name != "augment"}  # which is of x, not of its law
        if not left_out:
            raise ValueError(f"label_dropout={self.share}, and the data have no conditions: leave it out")
        if without := sorted(left_out.keys() - self.nulls.keys()):
            raise ValueError(f"label_dropout={self.share} knows no null of the condition {without[0]!r}: give one, "
                             f"nulls={{{without[0]!r}: <the value that tells the network there is none>}}")  # fmt: skip
        first = next(iter(left_out.values()))
        dropped = draw(torch.rand, first.shape[:1], generator, device=first.device) < self.share
        nulls = {
            name: torch.where(expand(dropped, value).bool(), self.nulls[name], _signed(value))
            for name, value in left_out.items()
        }
        return {**given, **nulls}


def _signed(value: Tensor) -> Tensor:
    """Small unsigned integers, which cannot hold the null -1, as int64."""
    return value.long() if value.dtype == torch.uint8 else value


class DenoisingScoreMatching:
    """The loss of each example of a batch.

    `label_dropout` is the probability with which an example's conditions are left out, `nulls` are what they become (see
    `LabelDropout`). With `target`, the closed-form law of the (unlabelled) data, the diagnostics are those of `excess`.
    Raises ValueError where `label_dropout` is outside [0, 1].
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
        said = model(x_t, t, **self.label_dropout(batch.condition, generator))
        miss = said.raw.float() - target
        weight = times.weight * self.weighting(sde, t) * said.c_out**2
        loss = weight.float() * miss.square().flatten(1).mean(1)
        if self.target is None:
            return Losses(loss)
        # The predicted noise errs by -alpha c_out / sigma times the output's error.
        error = expand(said.alpha * said.c_out / said.sigma, miss) * miss.detach()
        return Losses(loss, excess(self.target, model, x_t, t, noise, noise - error))

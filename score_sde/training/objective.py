"""Denoising score matching, one form for every network output and every weighting:

    L = E_{x_0, t, eps} w(t) lambda(t) c_out(t)^2 mean_d (F(c_in x_t, c_noise) - F*)_d^2,    x_t = alpha x_0 + sigma eps

lambda is the weighting (see `weighting`), w the importance weight of t (see `times`), the mean runs over the dimensions
of an event. Vincent 2011; Song et al. 2021, https://arxiv.org/abs/2011.13456, eq. 7.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from score_sde.data import Batch
from score_sde.score import LearnedScore
from score_sde.training.times import Times
from score_sde.training.weighting import SimpleWeighting, Weighting

__all__ = ["DenoisingScoreMatching", "Objective"]


class Objective(Protocol):
    """What training minimises the mean of, and a test of a model may report."""

    def __call__(self, model: LearnedScore, batch: Batch, times: Times, generator: torch.Generator) -> Tensor:
        """The loss of each example of a batch at its time, shape (batch,); all randomness is the generator's."""


class DenoisingScoreMatching:
    """The loss of each example of a batch.

    `label_dropout` is the probability with which an example's `label` is replaced by -1, the null class, so that one
    network learns the conditional and the unconditional score (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598).
    Raises ValueError where it is outside [0, 1].
    """

    def __init__(self, weighting: Weighting | None = None, label_dropout: float = 0.0) -> None:
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout={label_dropout} is a probability: 0 <= label_dropout <= 1")
        self.weighting, self.label_dropout = weighting or SimpleWeighting(), label_dropout

    def __call__(self, model: LearnedScore, batch: Batch, times: Times, generator: torch.Generator) -> Tensor:
        """Losses (batch,), float32; noise and label dropout come from the generator, on the device of the batch."""
        sde, t, x0 = model.sde, times.t, batch.x
        noise = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
        target = model.parameterization.target(sde, t, x0, noise)
        output = model.raw(sde.perturb(x0, t, noise), t, **self._condition(batch, generator))
        weight = times.weight * self.weighting(sde, t) * model.parameterization.row(sde, t).c_out ** 2
        return weight.float() * (output.float() - target).square().flatten(1).mean(1)

    def _condition(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        condition = dict(batch.condition)
        if self.label_dropout and "label" in condition:
            label = condition["label"]
            dropped = torch.rand(len(label), generator=generator, device=label.device) < self.label_dropout
            condition["label"] = torch.where(dropped, -1, label)
        return condition

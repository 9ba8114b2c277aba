"""Training a classifier of noisy data:

    L = E_{x_0, label, t, eps} [-w(t) log p(label | x_t, t)],    x_t = alpha x_0 + sigma eps, w the importance weight of t

Its minimum is p(label | x_t), the posterior of the label given the noisy x. Dhariwal & Nichol 2021, section 4.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from score_sde.data import Batch
from score_sde.score import LearnedScore
from score_sde.training.draws import draw
from score_sde.training.objective import Losses
from score_sde.training.times import Times, TimeSampler

__all__ = ["NoisyCrossEntropy"]


class NoisyCrossEntropy:
    """The cross-entropy of each example's label in nats, at its time; the model is a `NoisyClassifier`.

    Raises ValueError for examples without a `label`, and before training for a model that is no classifier.
    """

    def check(self, model: LearnedScore, time_sampler: TimeSampler) -> None:
        """Refuses, with ValueError, a score model, of which the first numbers of each x would pass for logits."""
        if model.predicts:
            raise ValueError("cross-entropy trains a classifier, the model is none: take objective=simple, or "
                             "network=encoder, a NoisyClassifier")  # fmt: skip

    def __call__(self, model: LearnedScore, batch: Batch, times: Times, generator: torch.Generator) -> Losses:
        if "label" not in batch.condition:
            raise ValueError("a classifier is trained on labelled data: set data.labels=true, or give data with labels")
        x0 = batch.x
        noise = draw(torch.randn, x0.shape, generator, device=x0.device, dtype=x0.dtype)
        logits = model.raw(model.sde.perturb(x0, times.t, noise), times.t)
        nats = cross_entropy(logits.float(), batch.condition["label"], reduction="none")
        return Losses(times.weight.float() * nats)

"""Training a classifier of noisy data:

    L = E_{x_0, label, t, eps} [-w(t) log p(label | x_t, t)],    x_t = alpha x_0 + sigma eps, w the importance weight of t

It is minimal at the posterior of the label given the noisy x, p(label | x_t). Dhariwal & Nichol 2021, section 4.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from score_sde.data import Batch
from score_sde.score import LearnedScore
from score_sde.training.draws import draw
from score_sde.training.objective import Losses
from score_sde.training.times import Times, TimeSampler

__all__ = ["UNLABELLED", "NoisyCrossEntropy"]

UNLABELLED = "a classifier is trained on labelled data: set data.labels=true, or give data with labels"


class NoisyCrossEntropy:
    """Cross-entropy in nats of each example's label given x_t, for a `NoisyClassifier`.

    Raises ValueError for examples without a `label` and, before training, for a model that is not a classifier.
    """

    def check(self, model: LearnedScore, time_sampler: TimeSampler) -> None:
        """Raises ValueError for a score model, whose output would otherwise be read as logits."""
        if model.predicts:
            raise ValueError("cross-entropy trains a classifier, and this model is a score model: use objective=simple, "
                             "or network=encoder, a NoisyClassifier")  # fmt: skip

    def __call__(self, model: LearnedScore, batch: Batch, times: Times, generator: torch.Generator) -> Losses:
        if "label" not in batch.condition:
            raise ValueError(UNLABELLED)
        x0 = batch.x
        noise = draw(torch.randn, x0.shape, generator, device=x0.device, dtype=x0.dtype)
        logits = model.raw(model.sde.perturb(x0, times.t, noise), times.t)
        nats = cross_entropy(logits.float(), batch.condition["label"], reduction="none")
        return Losses(times.weight.float() * nats)

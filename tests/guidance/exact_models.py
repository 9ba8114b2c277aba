"""Closed-form models that the guidance tests share."""

from __future__ import annotations

import torch

from score_sde.prediction import Prediction
from score_sde.score import ExactScore, ScoreModel
from score_sde.sde import expand
from score_sde.targets import GaussianMixture


class Labelled(ScoreModel):
    """The exact score of a labelled mixture, one law a label; without a label that of them all together."""

    condition_names = frozenset({"label"})

    def __init__(self, target: GaussianMixture, sde):
        parts = zip(target.means, target.covariances, strict=True)
        self.each = [ExactScore(GaussianMixture([1.0], mean[None], cov[None]), sde) for mean, cov in parts]
        self.all = ExactScore(target, sde)
        self.sde, self.event_shape, self.calls = sde, tuple(target.event_shape), 0

    def __call__(self, x, t, label=None):
        self.calls += 1
        if label is None:
            return self.all(x, t)
        parts = [model(x, t) for model in self.each]
        choice = torch.stack([p.raw for p in parts])[label, torch.arange(len(x))]
        return type(parts[0])(x, choice, parts[0].alpha, parts[0].sigma)


class Shrink(ScoreModel):
    """A smooth D, elementwise: bitwise the same in any batch, with a Jacobian that is not constant."""

    def __init__(self, sde, event_shape):
        self.sde, self.event_shape = sde, tuple(event_shape)

    def __call__(self, x, t, **condition):
        self.check(x.shape, condition)
        t = torch.as_tensor(t, dtype=torch.float64)
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        gain = expand(alpha / (alpha**2 + sigma**2), x)
        return Prediction(x, torch.tanh(gain * x), alpha, sigma)

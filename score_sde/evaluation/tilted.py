"""Guidance by labels against the density that it is said to target.

Classifier-free guidance of scale w has the score of the tilted density p(x)^(1 - w) p(x | label)^w at each noise level, but
its samples do not follow that density at t = 0 (Bradley & Nakkiran 2024, https://arxiv.org/abs/2408.09000). On a mixture in
the plane both can be drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from score_sde.evaluation.budgets import SamplerLike
from score_sde.evaluation.metrics import Yardstick
from score_sde.guidance import ClassifierFree
from score_sde.prediction import Prediction
from score_sde.score import ExactScore, ScoreModel
from score_sde.sde import SDE, Time
from score_sde.targets import GaussianMixture, Target

__all__ = ["LabelledMixture", "compare_tilted", "component", "tilted"]


class LabelledMixture(ScoreModel):
    """The exact score of a mixture or, under the condition `label` of shape (batch,), of the component of that index."""

    condition_names = frozenset({"label"})

    def __init__(self, target: GaussianMixture, sde: SDE) -> None:
        self.target, self.sde, self.event_shape = target, sde, tuple(target.event_shape)
        self.parts = [ExactScore(component(target, k), sde) for k in range(len(target.weights))]
        self.whole, self.data_std = ExactScore(target, sde), target.std

    def __call__(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        self.check(x.shape, condition)
        if "label" not in condition:
            return self.whole(x, t)
        label = condition["label"].to(x.device)
        known = ((label >= 0) & (label < len(self.parts))).all()
        if label.shape != (len(x),) or label.is_floating_point() or not known:
            raise ValueError(f"label is an integer from 0 to {len(self.parts) - 1} per sample, of shape ({len(x)},)")
        predictions = [part(x, t) for part in self.parts]
        raw = torch.stack([p.raw for p in predictions])[label, torch.arange(len(x), device=x.device)]
        return Prediction(x, raw, predictions[0].alpha, predictions[0].sigma)


def component(mixture: GaussianMixture, k: int) -> GaussianMixture:
    """Component k alone."""
    return GaussianMixture([1.0], mixture.means[k : k + 1], mixture.covariances[k : k + 1])


def tilted(
    whole: Target, part: Target, scale: float, count: int, *, generator: torch.Generator, side: int = 801
) -> Tensor:
    """Draws in the plane of the normalised whole(x)^(1 - scale) part(x)^scale, which guidance is said to target.

    The density is taken as uniform in each cell of a grid of side x side over three times the extent of both laws' draws.

    Raises:
        ValueError: the cells are too wide for the density, or the density reaches beyond the grid.
    """
    seen = torch.cat([law.sample((4096,), generator=generator) for law in (whole, part)]).double()
    low, high = seen.amin(0), seen.amax(0)
    low, high = 2 * low - high, 2 * high - low
    axes = [torch.linspace(a, b, side, dtype=torch.float64) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    x = torch.cartesian_prod(*axes)
    log_prob = ((1 - scale) * whole.log_prob(x) + scale * part.log_prob(x)).double()
    weights = log_prob.softmax(0)
    _check_cells(log_prob.view(side, side), weights.view(side, side))
    cell = torch.multinomial(weights, count, replacement=True, generator=generator)
    jitter = torch.rand(count, 2, generator=generator, dtype=torch.float64) - 0.5
    return (x[cell] + jitter * (high - low) / (side - 1)).float()


def _check_cells(log_prob: Tensor, weights: Tensor) -> None:
    """Raises ValueError if a grid cuts the density off, or its cells are wider than half a standard deviation.

    Along an axis the second difference of a Gaussian's log-density is (cell / std)^2.
    """
    inner = weights[1:-1, 1:-1]
    if 1 - inner.sum().item() > 1e-6:
        raise ValueError("this tilted density reaches beyond the region of its two laws: take a smaller scale")
    bends = [log_prob.diff(2, 0)[:, 1:-1].abs(), log_prob.diff(2, 1)[1:-1].abs()]
    width = max((bend * inner).sum().item() for bend in bends) ** 0.5
    if not width < 0.5:
        raise ValueError(f"the cells of {len(weights)} x {len(weights)} are {width:.2g} standard deviations wide, and at most "
                         f"0.5 is allowed: give side={math.ceil(len(weights) * width / 0.4)}")  # fmt: skip


def compare_tilted(
    mixture: GaussianMixture, label: int, scales: Sequence[float], sampler: SamplerLike, sde: SDE, *,
    num_samples: int = 4000, seed: int = 0, side: int = 801,
) -> pd.DataFrame:  # fmt: skip
    """Classifier-free guidance towards one component of a plane mixture, against the tilted density of the same scale.

    Returns:
        A row per scale: sliced W2 to the tilted density (`value`), its floor and their ratio, and how much farther the
        samples' mean is from the mixture's mean than the tilted density's (`overshoot`), in units of the data.
    """
    model, rows = LabelledMixture(mixture, sde), []
    labels = torch.full((num_samples,), label)
    out = mixture.means[label] - mixture.mean
    out = out / out.norm()
    for scale in scales:
        generator = torch.Generator().manual_seed(seed)
        law = tilted(mixture, component(mixture, label), scale, 4 * num_samples, generator=generator, side=side)
        guided = ClassifierFree(model, scale)
        x = sampler.sample(guided, (num_samples, 2), seed=seed, condition={"label": labels}).x  # type: ignore[call-arg]
        yardstick = Yardstick(law, num_samples, generator=generator, metrics=("sliced_w2",))
        figures = yardstick(x).to_dict("records")[0]
        beyond = ((x.double().mean(0) - law.double().mean(0)) @ out).item()
        rows.append({"scale": scale} | figures | {"overshoot": beyond})
    return pd.DataFrame(rows)

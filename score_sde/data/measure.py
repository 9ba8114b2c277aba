"""Scales measured from data; configs ask for two of them by `sigma_max: auto` and `sigma_data: auto`.

sigma_max = max |x_i - x_j|  (Song & Ermon 2020, https://arxiv.org/abs/2006.09011, technique 1), or a quantile,
sigma_data = sqrt(mean x^2) over all components: the RMS that c_in normalises,
data_std = sqrt(mean (x - E x)^2), the spread about the mean example: guidance takes it as the prior's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from score_sde.data.base import Data
from score_sde.keyed import Draws, generator

__all__ = ["measure_data_std", "measure_sigma_data", "measure_sigma_max"]


def measure_sigma_max(data: Data, quantile: float = 1.0, count: int = 4000) -> float:
    """The given quantile of the Euclidean distances between `count` training examples, their maximum by default.

    Raises ValueError for a quantile outside (0, 1], and for examples that are all equal.
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile={quantile} must be in (0, 1]; 1 is the largest distance")
    distances = torch.pdist(_examples(data, count).flatten(1))
    rank = max(1, round(quantile * len(distances)))
    return _positive(float(distances.kthvalue(rank).values), "sigma_max")


def measure_sigma_data(data: Data, count: int = 10_000) -> float:
    """The root mean square of all components of `count` training examples. Raises ValueError if it is 0."""
    return _positive(float(_examples(data, count).double().square().mean().sqrt()), "sigma_data")


def measure_data_std(data: Data, count: int = 10_000) -> float:
    """The root mean square deviation of `count` training examples from their mean, per component. ValueError if it is 0."""
    x = _examples(data, count).double()
    return _positive(float((x - x.mean(0)).square().mean().sqrt()), "data_std")


def _examples(data: Data, count: int) -> Tensor:
    count = min(count, data.size or count)
    return data.prepare(data.batch(0, count), Draws(generator(0, "measure"), count)).x


def _positive(value: float, name: str) -> float:
    if not 0 < value < math.inf:
        why = "do not vary" if value <= 0 else "are too large"
        raise ValueError(f"{name}: auto measures {value} on these data, which {why}: give {name} as a number")
    return value

"""Tables from the data's covariance alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from score_sde.prediction import Prediction
from score_sde.score import ScoreModel
from score_sde.sde import SDE, VPSDE, Time, as_time
from score_sde.tuning.fitting import Search, check, chosen, fit_all, losses_of, rule_of, search_levels, searching
from score_sde.tuning.pairs import Pairs
from score_sde.tuning.table import TunedTable
from score_sde.tuning.untuned import RULES, begun_late, untuned


def tune_spectrum(
    eigenvalues: Tensor | Sequence[float], steps: int, *, sde: SDE | None = None, method: str = "grid",
    iterations: int = 400, progress: bool = True,
) -> TunedTable:  # fmt: skip
    """A table tuned for Gaussian data with this covariance spectrum, in seconds, without a network or samples.

    Along an eigenvector of variance v the denoiser is D = alpha v / (alpha^2 v + sigma^2) x, so a table multiplies a
    start of variance alpha^2 v + sigma^2 by a number, which gives the samples' std. The sum of (std - sqrt v)^2 over the
    spectrum is minimised: the squared 2-Wasserstein distance between samples and data.

    Args:
        eigenvalues: of the data's covariance, positive, shape (D,).
        steps: network calls per sample.
        sde: by default `VPSDE()`.
        method: "grid" fits the levels of Adams on the rectified path, which carries over to data that are not Gaussian (on
            Gaussian data an untuned solver of another rule may be better); "coefficients" fits all numbers, far better
            on Gaussian data and often far worse on others.
        iterations: largest number of iterations of the optimiser.
        progress: show a bar.

    Raises:
        ValueError: an eigenvalue is not positive and finite, the method is unknown, or the SDE cannot be used.
    """
    variances = torch.as_tensor(eigenvalues, dtype=torch.float64).flatten()
    if len(variances) == 0 or not ((variances > 0) & (variances < math.inf)).all():
        raise ValueError("eigenvalues of a covariance are positive and finite; drop those that are 0")
    check(steps, method=method, iterations=iterations)
    model = _GaussianScore(variances, sde or VPSDE())
    x, y = model.start(torch.ones_like(variances)).unsqueeze(0), variances.sqrt().unsqueeze(0)
    pairs = _Spectrum(model, x, y, unit=y.square().mean().sqrt().item(), robust=1e-6, batch_size=1)
    known, late = untuned(model.sde, steps), begun_late(model.sde, steps)
    losses = losses_of(known | late, pairs)
    starts, tuned = dict[str, TunedTable](), dict[str, TunedTable]()
    for tables in (late, known):
        for rule in ("velocity Adams 2", "velocity Adams 3"):  # not always the best, but near the best tables
            best = min((name for name in tables if rule_of(name) == rule), key=losses.__getitem__)
            starts[best] = tables[best]
    with searching(iterations * len(starts), progress) as bar:
        search = Search(bar, iterations)
        for name, table in starts.items():
            tuned[f"tuned from {name}"] = (search_levels(pairs, table, RULES[rule_of(name)], search)
                                           if method == "grid" else fit_all(pairs, table, search))  # fmt: skip
    rivals = losses if method == "coefficients" else {name: losses[name] for name in starts}
    return chosen(known, late | tuned, rivals | losses_of(tuned, pairs), f"spectrum, {method}")


class _Spectrum(Pairs):
    """W2 in the data's standard deviations."""

    def penalty(self, square: Tensor) -> Tensor:
        return (square + self.robust**2).sqrt()


class _GaussianScore(ScoreModel):
    """The exact model of N(0, diag v); states are standard deviations in the eigenbasis."""

    def __init__(self, variances: Tensor, sde: SDE) -> None:
        self.variances, self.sde, self.event_shape = variances, sde, tuple(variances.shape)

    def __call__(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        alpha, sigma = self.sde.alpha(as_time(t)), self.sde.sigma(as_time(t))
        return Prediction(x, alpha * self.variances / (alpha**2 * self.variances + sigma**2) * x, alpha, sigma)

    def start(self, z: Tensor) -> Tensor:
        alpha, sigma = self.sde.alpha(self.sde.t_max), self.sde.sigma(self.sde.t_max)
        return (alpha**2 * self.variances + sigma**2).sqrt() * z

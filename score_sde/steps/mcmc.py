r"""Metropolis-adjusted and kinetic Langevin, the correctors that are not linear steps.

    overdamped:   x' = x + eps score(x) + sqrt(2 eps) z,
    kinetic:      dx = v dt,  dv = score(x) dt - gamma v dt + sqrt(2 gamma) dw,

Step sizes are in units of the noise level: eps = ratio sigma_t^2, and kinetic steps h = sqrt(2 ratio) sigma_t, so that a
single one with fresh v is the overdamped step. On N(0, v I) both, unadjusted, leave the variance v / (1 - eps / (2 v)).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from score_sde.checks import number, whole
from score_sde.sde import SDE
from score_sde.steps.langevin import check_ratio
from score_sde.steps.step import Draw, Evaluate, History, Step, finite


class ChainRow(NamedTuple):
    """The time of a visit and the noise there."""

    t: float
    sigma: float


class _Chain(Step):
    """`steps` moves of a Markov chain at each visited time; a subclass sets `calls`, the network calls that they take."""

    role: ClassVar[Literal["predictor", "corrector"]] = "corrector"

    def __init__(self, ratio: float, steps: int) -> None:
        self.ratio, self.repeats = check_ratio(self, ratio), whole("steps", steps)

    def plan(self, sde: SDE, t: Tensor, s: Tensor) -> list[ChainRow]:
        return list(map(ChainRow, *finite(self, sde, t, [t, sde.sigma(t)])))


class MetropolisLangevin(_Chain):
    """Metropolis-adjusted Langevin: the overdamped step, accepted with the probability that leaves p_t exactly invariant.

    log accept = log p_t(x') - log p_t(x) + |z|^2 / 2 - |x - x' - eps score(x')|^2 / (4 eps), for each sample. It needs
    a model with a density `log_prob(x, t)`, such as `ExactScore`; others are refused before sampling.
    Source: Besag 1994; Roberts & Tweedie 1996, https://doi.org/10.2307/3318418, section 1.4.2.

    Args:
        ratio: eps / sigma_t^2, in (0, 1).
        steps: proposals at each visited time.
    """

    needs_density = True

    def __init__(self, ratio: float = 0.1, steps: int = 1) -> None:
        super().__init__(ratio, steps)
        self.calls = self.repeats + 1  # one for each proposal and one for the start

    def advance(
        self, row: ChainRow, x: Tensor, history: History, evaluate: Evaluate, draw: Draw
    ) -> tuple[Tensor, History]:
        t, eps = row.t, self.ratio * row.sigma**2
        density = evaluate.log_prob  # type: ignore[attr-defined]  # see `Step.needs_density`
        score, log_prob = evaluate(x, t).score, density(x, t)
        for k in range(self.repeats):
            z = draw(2 * k)
            proposal = x + eps * score + math.sqrt(2 * eps) * z
            new_score, new_log_prob = evaluate(proposal, t).score, density(proposal, t)
            back = (x - proposal - eps * new_score).square() / (4 * eps) - z.square() / 2
            log_accept = new_log_prob - log_prob - back.flatten(1).sum(1)
            accepted = torch.special.log_ndtr(draw(2 * k + 1).flatten(1)[:, 0].double()) < log_accept
            chosen = accepted.view(-1, *[1] * (x.ndim - 1))
            x, score = torch.where(chosen, proposal, x), torch.where(chosen, new_score, score)
            log_prob = torch.where(accepted, new_log_prob, log_prob)
        return x, history


class KineticLangevin(_Chain):
    """Underdamped Langevin by the splitting OBABO: half an Ornstein-Uhlenbeck step of v, leapfrog, the other half.

    v ~ N(0, I) at each visit (the chain's state is x alone), then `steps` times

        v <- v + h / 2 score(x);   x <- x + h v;   v <- v + h / 2 score(x);   v <- e v + sqrt(1 - e^2) z,

    with h = sqrt(2 ratio) sigma_t and e = persistence. Here the two half steps between leapfrogs are one, and what follows
    the last move of x is left out, since v is forgotten. On N(0, s I) the stationary variance is s / (1 - h^2 / (4 s)) for
    any persistence and number of steps.
    Source: Bussi & Parrinello 2007, https://arxiv.org/abs/0803.4083; Leimkuhler & Matthews 2013.

    Args:
        ratio: h^2 / (2 sigma_t^2), in (0, 1).
        steps: leapfrog steps at each visited time.
        persistence: e^{-gamma h}, the share of v that a step keeps, in [0, 1).
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"kinetic Langevin 1": {"steps": 1}}

    def __init__(self, ratio: float = 0.05, steps: int = 4, persistence: float = 0.8) -> None:
        super().__init__(ratio, steps)
        if not 0 <= number("persistence", persistence) < 1:
            raise ValueError(f"KineticLangevin's persistence lies in [0, 1), got {persistence}")
        self.persistence, self.calls = float(persistence), self.repeats

    def advance(
        self, row: ChainRow, x: Tensor, history: History, evaluate: Evaluate, draw: Draw
    ) -> tuple[Tensor, History]:
        t, h = row.t, math.sqrt(2 * self.ratio) * row.sigma
        keep, fresh = self.persistence, math.sqrt(1 - self.persistence**2)
        v = draw(0)
        for k in range(self.repeats):
            push = h / 2 * evaluate(x, t).score
            v = v + push if k == 0 else keep * (v + push) + fresh * draw(k) + push
            x = x + h * v
        return x, history

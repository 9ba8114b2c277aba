r"""Steps that use an observation y = A x_0 + noise_std e.

With A = U diag(s) V^T there are two estimates of the coordinates alpha V^T x_0:

    alpha U^T y / s, with variance (alpha noise_std / s)^2,      and      V^T x_t, with variance sigma^2.

Where alpha noise_std < sigma s the first is the better one, and added noise makes it a draw of V^T x_t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from score_sde.guidance.operators import LinearOperator
from score_sde.sde import SDE
from score_sde.steps.step import Draw, Evaluate, History, Step, finite


class ImputeRow(NamedTuple):
    alpha: float
    sigma: float


class _ObservedStep(Step):
    def __init__(self, operator: LinearOperator, y: Tensor, noise_std: float = 0.0) -> None:
        name = type(self).__name__
        if not isinstance(operator, LinearOperator):
            raise TypeError(f"{name} observes through a LinearOperator, got {type(operator).__name__}")
        if not 0 <= noise_std < math.inf:
            raise ValueError(f"{name}'s noise_std is 0 or more, got {noise_std}")
        self.operator, self.y, self.noise_std = operator, operator.observation(y), float(noise_std)

    def _observation(self, x: Tensor) -> Tensor:
        if len(self.y) not in (1, len(x)):
            raise ValueError(f"{len(self.y)} observations for {len(x)} samples: give one for all or one per sample")
        return self.y.to(x)

    def _known(self, s2: Tensor, level: float) -> Tensor:
        """1 / s^2 where y / s is more precise than the noise level sigma / alpha, else 0."""
        return torch.where(s2 * level**2 > self.noise_std**2, self.operator.invert(s2), 0)


class Impute(_ObservedStep):
    """x <- x + A^+ (alpha y - A x) + noise: the part of x that A observes is redrawn from y, at the noise level of x.

    The noise has variance sigma^2 - (alpha noise_std / s)^2 in the coordinate of singular value s, so that with the
    observation's own noise it is sigma^2; coordinates in which y is noisier than x are left alone. With `grid.jump_back`
    this is RePaint; without jumps, the replacement of Song et al. for any predictor. Assumes: linear A. Cost: no call of its
    own, but jumps multiply the predictor's. Bias: falls with more repeats; with noisy observations set the `low` of
    `grid.jump_back`, as repeats below it forget y. Certificate (5 repeats above it): 0.03 / 0.06.
    Source: Song et al. 2021, appendix I.2; Lugmayr et al. 2022, https://arxiv.org/abs/2201.09865, algorithm 1.

    Args:
        operator: the linear operator A.
        y: observations of shape (*output_shape) or (batch, *output_shape).
        noise_std: standard deviation of the observation's noise.
    """

    role: ClassVar[Literal["predictor", "corrector"]] = "corrector"
    calls = 0

    def plan(self, sde: SDE, t: Tensor, s: Tensor) -> Sequence[ImputeRow]:
        return list(map(ImputeRow, *finite(self, sde, t, [sde.alpha(s), sde.sigma(s)])))

    def advance(
        self, row: ImputeRow, x: Tensor, history: History, evaluate: Evaluate, draw: Draw
    ) -> tuple[Tensor, History]:
        operator, level = self.operator, row.sigma / row.alpha
        mean = operator.gram(row.alpha * self._observation(x) - operator(x), lambda s2: self._known(s2, level))

        def std(s2: Tensor) -> Tensor:
            inverse = self._known(s2, level)
            return inverse * (row.sigma**2 - (row.alpha * self.noise_std) ** 2 * inverse).clamp_min(0).sqrt()

        return x + operator.transpose(mean + operator.gram(operator(draw(0)), std)), history


class DDRMRow(NamedTuple):
    t: float
    alpha_t: float
    alpha_s: float
    level_t: float
    level_s: float


class DDRM(_ObservedStep):
    """Denoising diffusion restoration: DDIM whose mean and direction come from y in the coordinates that y determines.

    In scaled variables x / alpha with noise level l = sigma / alpha, in the coordinate of singular value s, with
    ybar = (U^T y) / s and n = noise_std / s, the new coordinate is, for a fresh standard normal z,

        D + sqrt(1 - eta^2) l_s (x - D) / l_t + eta l_s z           where s = 0,
        D + sqrt(1 - eta^2) l_s (ybar - D) / n + eta l_s z          where l_s < n,
        (1 - eta_b) D + eta_b ybar + sqrt(l_s^2 - eta_b^2 n^2) z    where l_s >= n.

    Assumes: linear A. Cost: one call, no gradient. Bias: as `Replacement`, y reaches the unobserved coordinates only through
    x_t. Certificate: 0.40 / 0.38, the spread 22 % too small. It is a step and not a score model, since the middle case has
    no denoiser that other steps could use.
    Source: Kawar et al. 2022, https://arxiv.org/abs/2201.11793, eq. 7 and 8.

    Args:
        operator, y, noise_std: as in `Impute`.
        eta: share of fresh noise, in [0, 1].
        eta_b: weight of the observation, in [0, 1].
    """

    def __init__(
        self, operator: LinearOperator, y: Tensor, noise_std: float = 0.0, eta: float = 0.85, eta_b: float = 1.0
    ) -> None:
        super().__init__(operator, y, noise_std)
        if not (0 <= eta <= 1 and 0 <= eta_b <= 1):
            raise ValueError(f"DDRM's eta and eta_b lie in [0, 1], got {eta=} and {eta_b=}")
        self.eta, self.eta_b = float(eta), float(eta_b)

    def plan(self, sde: SDE, t: Tensor, s: Tensor) -> Sequence[DDRMRow]:
        columns = [t, sde.alpha(t), sde.alpha(s), sde.noise_level(t), sde.noise_level(s)]
        return list(map(DDRMRow, *finite(self, sde, t, columns)))

    def advance(
        self, row: DDRMRow, x: Tensor, history: History, evaluate: Evaluate, draw: Draw
    ) -> tuple[Tensor, History]:
        operator, l_s, kept = self.operator, row.level_s, math.sqrt(1 - self.eta**2)
        clean, z = evaluate(x, row.t).denoised, draw(0)
        unseen = clean + kept * l_s / row.level_t * (x / row.alpha_t - clean) + self.eta * l_s * z

        def known(s2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """1 / s^2, n^2 and whether l_s >= n, all 0 where s = 0."""
            inverse = operator.invert(s2)
            n2 = self.noise_std**2 * inverse
            return inverse, n2, (l_s**2 >= n2).to(s2)

        def pull(s2: Tensor) -> Tensor:
            inverse, n2, better = known(s2)
            worse = kept * l_s * torch.where(n2 > 0, n2, 1).rsqrt()
            return inverse * torch.where(better > 0, self.eta_b, worse)

        def noise(s2: Tensor) -> Tensor:
            inverse, n2, better = known(s2)
            fresh = (l_s**2 - self.eta_b**2 * n2).clamp_min(0).sqrt()
            return inverse * torch.where(better > 0, fresh, self.eta * l_s)

        residual = self._observation(x) - operator(clean)
        seen = operator.gram(residual, pull) + operator.gram(operator(z), noise) + operator.gram(
            operator(clean - unseen), operator.invert)  # fmt: skip
        return row.alpha_s * (unseen + operator.transpose(seen)), history

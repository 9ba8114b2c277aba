r"""Langevin steps: correctors that leave p_t (nearly) unchanged.

    x <- x + eps score(x, t) + sqrt(2 eps) z.

All step sizes here have the form eps = ratio sigma_t^2 with a dimensionless ratio. Then the step is linear,
x <- (1 - ratio) x + ratio alpha D + sqrt(2 ratio) sigma z, and the same in x as in the scaled variable x / alpha. On
N(0, v I) the stationary variance is v / (1 - eps / (2 v)).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from score_sde.checks import number, one_of, whole
from score_sde.sde import SDE, expand
from score_sde.steps.linear import Coefficients, LinearStep, with_score
from score_sde.steps.step import Draw, Evaluate, History, Step


def check_ratio(step: Step, ratio: float) -> float:
    """`ratio` as a float, or a ValueError where it is not in (0, 1)."""
    if not 0 < number("ratio", ratio) < 1:
        raise ValueError(f"{type(step).__name__}'s ratio lies in (0, 1), got ratio={ratio}")
    return float(ratio)


class _Langevin(LinearStep):
    """`steps` Langevin steps of size eps = ratio sigma_t^2 at each visited time."""

    role: ClassVar[Literal["predictor", "corrector"]] = "corrector"

    def __init__(self, ratio: float, steps: int) -> None:
        self.ratio, self.repeats = ratio, whole("steps", steps)
        self.calls = self.repeats

    def coefficients(self, sde: SDE, times: Tensor, s: Tensor) -> Coefficients:
        eps = self.ratio * sde.sigma(s) ** 2
        return *with_score(sde, s, torch.ones_like(s), eps), (2 * eps).sqrt()


class LangevinCorrector(_Langevin):
    """The corrector of Song et al.: eps = 2 (snr |z| / |score|)^2, which fixes the step's signal-to-noise ratio.

    On N(0, v I) with measured norms the stationary variance is v (1 + snr^2) in high dimension. Source: Song et al. 2021,
    https://arxiv.org/abs/2011.13456, algorithms 4 and 5, without the factor 1 - beta_i, within 2 % of 1, by which the
    published code multiplies eps on VP's 1,000-step ladder.

    Args:
        snr: the signal-to-noise ratio, in (0, 1).
        steps: Langevin steps at each visited time.
        norm: "expected" takes E|z|^2 = d and E|score|^2 = d / sigma^2, the score of the noise itself: eps =
            2 snr^2 sigma^2, the same for every sample. "sample" measures |z| and |score| of each sample; the step size then
            depends on x and z, so that for small snr the stationary law is proportional to p_t^(d / (d + 2)) |score|^2
            instead of p_t, which is far from it in few dimensions d (for variance 1: 2.3 at d = 4, 1.06 at d = 64).
            "batch" divides the means of the norms over the batch, as the published code does, which couples its samples.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "Langevin norms per sample": {"norm": "sample"}, "Langevin norms per batch": {"norm": "batch"}
    }  # fmt: skip

    def __init__(self, snr: float = 0.16, steps: int = 1, norm: str = "expected") -> None:
        if not 0 < number("snr", snr) < 1:
            raise ValueError(f"LangevinCorrector's snr lies in (0, 1), got snr={snr}")
        super().__init__(2 * snr**2, steps)
        self.snr, self.norm = float(snr), one_of("LangevinCorrector's norm", norm, ("expected", "sample", "batch"))
        self.batch_independent = norm != "batch"

    def advance(self, row: Any, x: Tensor, history: History, evaluate: Evaluate, draw: Draw) -> tuple[Tensor, History]:
        if self.norm == "expected":
            return super().advance(row, x, history, evaluate, draw)
        for k in range(self.repeats):
            score, z = evaluate(x, row.t).score, draw(k)
            ratio = self._norms(z) / self._norms(score)
            x = x + 2 * (self.snr * ratio) ** 2 * score + 2 * self.snr * ratio * z
        return x, history

    def _norms(self, v: Tensor) -> Tensor:
        norms = expand(v.flatten(1).norm(dim=1), v)
        return norms if self.norm == "sample" else norms.mean(0, keepdim=True)


class AnnealedLangevin(_Langevin):
    """Annealed Langevin dynamics: at each level, `steps` steps of size epsilon sigma_i^2 / sigma_L^2.

    Without a predictor the sampler keeps the scaled variable x / alpha from level to level: NCSN's algorithm on VE, and the
    same in scaled variables on every other SDE. `grid.log_snr` gives the geometric ladder. The default epsilon is NCSN's,
    2e-5 at sigma_L = 0.01. A multimodal law needs about 20 steps on each of 232 levels to find its weights (NCSN takes 100
    steps on 10 levels; NCSNv2, for images, 5 on 232 with epsilon = 6.2e-6).
    Source: Song & Ermon 2019, https://arxiv.org/abs/1907.05600, algorithm 1; 2020, https://arxiv.org/abs/2006.09011.

    Args:
        epsilon: step size at the noise level sigma_L, in squared units of the data.
        sigma_L: the noise level at which the step size is epsilon.
        steps: Langevin steps at each level.
    """

    def __init__(self, epsilon: float = 2e-5, sigma_L: float = 0.01, steps: int = 20) -> None:
        ratio = number("epsilon", epsilon) / sigma_L**2 if number("sigma_L", sigma_L) > 0 else float("nan")
        if not 0 < ratio < 1:
            raise ValueError("annealed Langevin is stable for 0 < epsilon / sigma_L^2 < 1, "
                             f"got {epsilon=}, {sigma_L=}: lower epsilon")  # fmt: skip
        super().__init__(ratio, steps)
        self.epsilon, self.sigma_L = float(epsilon), float(sigma_L)

    @classmethod
    def by_variance(cls, gamma: float = 1.0376, steps: int = 5, sigma_L: float = 0.01) -> AnnealedLangevin:
        """The step size that best preserves the variance from level to level (NCSNv2's technique 4).

        r = epsilon / sigma_L^2 minimises |(1 - r)^(2 steps) (gamma^2 - q) + q - 1|, q = 2 r / (1 - (1 - r)^2): by how much
        variance / sigma_i^2 differs from 1, for a point mass, after `steps` steps at sigma_i that begin with the variance
        of the level before, sigma_{i-1} = gamma sigma_i. gamma = 1.0376 is that of 232 levels between 0.01 and 50
        (CIFAR-10), where r = 0.0618. Source: Song & Ermon 2020, https://arxiv.org/abs/2006.09011, proposition 3 and
        technique 4.

        Raises ValueError where gamma is not above 1 or `steps` is not a whole number of at least 1.
        """
        steps = whole("steps", steps)
        if not number("gamma", gamma) > 1:
            raise ValueError(f"gamma is the ratio of neighbouring noise levels, above 1; got {gamma=}")
        ratios = torch.logspace(-6, 0, 60_001, dtype=torch.float64)[:-1]  # 0.02 % apart
        q = 2 * ratios / (1 - (1 - ratios) ** 2)
        off = ((1 - ratios) ** (2 * steps) * (gamma**2 - q) + q - 1).abs()
        return cls(float(ratios[off.argmin()]) * sigma_L**2, sigma_L, steps)


class UnadjustedLangevin(_Langevin):
    """Unadjusted Langevin: eps = ratio sigma_t^2, or 2 ratio / (|score|^2 / d + 1 / sigma_t^2), adapted to the score.

    The two agree where the score is as large as that of the noise, |score|^2 = d / sigma_t^2. The adapted step, set for
    each sample, is at most twice as long where the score is small, and short where it is large, so that no sample is thrown
    far away. Because it depends on x, its chain's stationary law is proportional to p_t / eps instead of p_t: on
    N(0, sigma^2 I) the variance is (1 + 1 / d) sigma^2. That is negligible for images, but half too much in the plane: take
    the fixed step there. Source: Roberts & Tweedie 1996, https://doi.org/10.2307/3318418, section 1.4.1.

    Args:
        ratio: the step size as above, in (0, 1).
        steps: Langevin steps at each visited time.
        adapt: False for the fixed step, True for the adapted one.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"norm-adapted Langevin": {"adapt": True}}

    def __init__(self, ratio: float = 0.05, steps: int = 1, adapt: bool = False) -> None:
        super().__init__(check_ratio(self, ratio), steps)
        self.adapt = bool(adapt)

    def advance(self, row: Any, x: Tensor, history: History, evaluate: Evaluate, draw: Draw) -> tuple[Tensor, History]:
        if not self.adapt:
            return super().advance(row, x, history, evaluate, draw)
        for k in range(self.repeats):
            score = evaluate(x, row.t).score
            size = expand(score.square().flatten(1).mean(1), x)
            eps = 2 * self.ratio / (size + row.c**-2 * 2 * self.ratio)  # c^2 = 2 ratio sigma^2
            x = x + eps * score + (2 * eps).sqrt() * draw(k)
        return x, history

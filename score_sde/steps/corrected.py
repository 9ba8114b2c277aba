r"""Predictor-correctors with one call per move: the output at the predicted x_s corrects x_s and starts the next move.

    predict   x~_s = a x_t + sum_k b_k D_k + c z,
    correct   x_s  = x~_s + w D(x~_s, s) + sum_k (b'_k - b_k) D_k,       w, b' the weights of the corrector,

where D(x~_s, s) is the next move's D_0, so that correcting and then predicting is one linear step on the stored outputs.
The last x~ of a run is not corrected.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from score_sde.checks import one_of
from score_sde.sde import SDE
from score_sde.steps.linear import Coefficients, LinearStep
from score_sde.steps.multistep import carried, check_order, check_strength, weigh


class CorrectedStep(LinearStep):
    """An exponential multistep predictor with an implicit corrector; a subclass gives the weights of both.

    Attributes:
        memory: one more than the largest number of stored outputs that predictor or corrector use.
        eta: noise strength of the SDE family (see `ExponentialAdams`).
    """

    eta: float = 0.0

    def strength(self, sde: SDE, t: Tensor) -> float | Tensor:
        """eta of the moves that begin at t."""
        return self.eta

    @abstractmethod
    def predict(self, sde: SDE, times: Tensor, s: Tensor) -> Sequence[Tensor]:
        """The weights b of the D at `times` (k, ...), the newest first, in x~_s; those left out are 0."""

    @abstractmethod
    def correct(self, sde: SDE, times: Tensor, s: Tensor) -> Sequence[Tensor]:
        """The weights w, b' of the D at s and at `times` (k, ...) in the corrected x_s; those left out are 0."""

    def coefficients(self, sde: SDE, times: Tensor, s: Tensor) -> Coefficients:
        a, c = carried(sde, times[0], s, self.strength(sde, times[0]))
        b = [*self.predict(sde, times, s)]
        b += [torch.zeros_like(s)] * (len(times) - len(b))
        if len(times) > 1:
            before = times[1:]
            for k, weight in enumerate(self.correct(sde, before, times[0])):
                b[k] = b[k] + a * weight
            for k, weight in enumerate(self.predict(sde, before, times[0]), start=1):
                b[k] = b[k] - a * weight
        return a, b, c


class UniPC(CorrectedStep):
    """UniPC on the denoised prediction: UniP and UniC of order p, together of order p + 1.

    The weights of the interpolating polynomial, as in `ExponentialAdams`, solve the published linear systems
    R(h) a B(h) = phi(h). In two cases the authors set a = 1/2 instead of solving them, in the two-node predictor of p = 2
    and in the corrector of p = 1: these add B / 2 (D_1 - D_0) / r, with B = alpha_s h (B1) or alpha_s (1 - e^{-h}) (B2).
    Unlike the published code this does not lower p in the last moves of a short run (lower_order_final).
    Source: Zhao et al. 2023, https://arxiv.org/abs/2302.04867, eq. 3 to 9 and appendix E.

    Args:
        order: p, 1 to 3; the order of convergence is p + 1.
        variant: "B1" or "B2".
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        f"UniPC {p} {variant}": {"order": p, "variant": variant} for p in (1, 2, 3) for variant in ("B1", "B2")
    }

    def __init__(self, order: int = 3, variant: str = "B2") -> None:
        self.p, self.variant = check_order(self, order, 3), one_of("UniPC's variant", variant, ("B1", "B2"))
        self.order = self.memory = self.p + 1

    def predict(self, sde: SDE, times: Tensor, s: Tensor) -> Sequence[Tensor]:
        nodes = times[: self.p]
        return self._two(sde, nodes, s) if len(nodes) == 2 else weigh(sde, nodes, nodes[0], s, eta=0.0)

    def correct(self, sde: SDE, times: Tensor, s: Tensor) -> Sequence[Tensor]:
        nodes = torch.stack([s, *times[: self.p]])
        if len(nodes) == 2:
            return self._two(sde, nodes.flip(0), s)[::-1]
        return weigh(sde, nodes, times[0], s, eta=0.0)

    def _two(self, sde: SDE, nodes: Tensor, s: Tensor) -> Sequence[Tensor]:
        """The weights of the D at t = nodes[0] and at nodes[1], which is r h away from t in half log SNR, for a = 1/2."""
        start, other = sde.half_log_snr(nodes)
        h = sde.half_log_snr(s) - start
        total = -sde.alpha(s) * torch.expm1(-h)
        slope = (sde.alpha(s) * h if self.variant == "B1" else total) / 2 * h / (other - start)
        return [total - slope, slope]


class SASolver(CorrectedStep):
    """SA-Solver: exponential Adams-Bashforth predictor and Adams-Moulton corrector for the SDE family of strength eta.

    Both integrate the interpolating polynomial against the kernel of `ExponentialAdams` and share one draw of its noise. At
    eta = 0 the order is one more than the number of outputs used; with noise the weak order is 2, as in `ExponentialAdams`.
    Source: Xue et al. 2023, https://arxiv.org/abs/2309.05019, algorithm 1, eq. 14 and 17, with eta for tau.

    Args:
        order: number of outputs that the predictor uses, 1 to 4.
        corrector: number of stored outputs that the corrector uses besides the new one, 1 to 4.
        eta: noise strength, 0 or more; 1 is the reverse SDE.
        levels: (low, high); only moves that begin at a noise level sigma / alpha within add noise, others have eta = 0. The
            paper takes (0.05, 1) for CIFAR-10 (appendix E.1); all moves if left out.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "SA-Solver ODE 2 2": {"order": 2, "corrector": 2, "eta": 0.0},
        "SA-Solver ODE 3 3": {"order": 3, "corrector": 3, "eta": 0.0},
        "SA-Solver 3 3": {"order": 3, "corrector": 3, "eta": 1.0},
        "SA-Solver 1 1": {"order": 1, "corrector": 1, "eta": 1.0},
    }

    def __init__(
        self, order: int = 2, corrector: int = 1, eta: float = 1.0, levels: Sequence[float] | None = None
    ) -> None:
        for name, value in (("order", order), ("corrector", corrector)):
            if value not in (1, 2, 3, 4):
                raise ValueError(f"SASolver's {name} is 1 to 4, got {name}={value}")
        if levels is not None and not (len(levels) == 2 and 0 <= levels[0] < levels[1]):
            raise ValueError(f"SASolver's levels are (low, high) with 0 <= low < high, got {levels}")
        self.predicted, self.corrected, self.eta = int(order), int(corrector), check_strength(self, eta)
        self.levels = None if levels is None else (float(levels[0]), float(levels[1]))
        self.memory = max(self.predicted, self.corrected) + 1
        self.order = min(self.predicted, self.corrected) + 1 if eta == 0 else 2

    def predict(self, sde: SDE, times: Tensor, s: Tensor) -> Sequence[Tensor]:
        return weigh(sde, times[: self.predicted], times[0], s, self.strength(sde, times[0]))

    def correct(self, sde: SDE, times: Tensor, s: Tensor) -> Sequence[Tensor]:
        nodes = torch.stack([s, *times[: self.corrected]])
        return weigh(sde, nodes, times[0], s, self.strength(sde, times[0]))

    def strength(self, sde: SDE, t: Tensor) -> float | Tensor:
        if self.levels is None:
            return self.eta
        level = sde.noise_level(t)
        return torch.where((level >= self.levels[0]) & (level <= self.levels[1]), self.eta, 0.0).to(t)
